"""What do all fits share?  Checked settings, an ascent that is shown, saved and resumed, and a record of how it ended.

A method asks for a `Run`, resolves it for its slice, and hands a `Problem`, starting rows and a constraint to `fit`.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from jaxtyping import Bool, Float
from torch import Tensor

from melbo_lens.arguments import counts, positive
from melbo_lens.ascent.adamw import Descent, adamw
from melbo_lens.ascent.constraints import Constraint
from melbo_lens.ascent.fixed_point import Climb, fixed_point
from melbo_lens.ascent.objectives import Objective
from melbo_lens.ascent.sogi import Spread, Swarm, sogi
from melbo_lens.ascent.states import Point, State
from melbo_lens.measures.radius import median_norm
from melbo_lens.methods import checkpoints
from melbo_lens.methods.mean_change import MeanChange
from melbo_lens.methods.problem import Problem, default_batch_size
from melbo_lens.methods.provenance import describe
from melbo_lens.models.sinks import SINK
from melbo_lens.models.slices import SlicedModel
from melbo_lens.models.trimming import trimmed
from melbo_lens.progress import Progress

DEFAULT_LR = 1e-3
Optimizer: TypeAlias = Literal["power", "adamw"]
S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Run:
    """How a caller wants an ascent to be run. The settings are checked when the object is made, before any model runs.

    Attributes:
        optimizer: "power" (`fixed_point`) or "adamw" (`adamw`).
        n_steps: the number of steps; None takes the method's default for the optimizer.
        lr: the step size of "adamw"; None takes `DEFAULT_LR`.
        restarts: the number of random starts of "power".
        batch_size: the number of rows in one forward pass; None takes the default of the slice.
        seed: the seed of the starting rows.
        checkpoint: the file that holds the ascent's state; None keeps no state.
        progress: whether a progress bar is shown.
        trim: whether the weights outside the slice leave the accelerator during the ascent.
        began: the time at which the call began, so that all of its seconds are counted.

    Raises:
        ValueError: a setting breaks a rule, or doesn't go with the optimizer.
    """

    optimizer: Optimizer
    n_steps: int | None = None
    lr: float | None = None
    restarts: int = 1
    batch_size: int | None = None
    seed: int = 0
    checkpoint: str | Path | None = None
    progress: bool = True
    trim: bool = False
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        counts(n_steps=self.n_steps, restarts=self.restarts, batch_size=self.batch_size)
        if self.optimizer not in ("power", "adamw"):
            raise ValueError(f'optimizer={self.optimizer!r} must be "power" (fast) or "adamw" (the published recipe).')
        if self.lr is not None and self.optimizer != "adamw":
            raise ValueError(
                f'lr={self.lr} has no meaning for optimizer="power", which takes no step size: leave it out, or use '
                '"adamw".'
            )
        if self.lr is not None:
            positive("lr", self.lr, "")
        if self.restarts > 1 and self.optimizer != "power":
            raise ValueError(f'restarts={self.restarts} needs optimizer="power": the published recipe has one start.')

    def resolved(self, sliced: SlicedModel, steps: Mapping[str, int]) -> "ResolvedRun":
        """The same run with every default filled in.

        Args:
            sliced: the slice on which the ascent will run.
            steps: optimizer -> the method's default number of steps.
        """
        return ResolvedRun(
            optimizer=self.optimizer,
            n_steps=self.n_steps or steps[self.optimizer],
            lr=(self.lr or DEFAULT_LR) if self.optimizer == "adamw" else None,
            restarts=self.restarts,
            batch_size=self.batch_size or default_batch_size(sliced),
            seed=self.seed,
            checkpoint=self.checkpoint,
            progress=self.progress,
            trim=self.trim,
            began=self.began,
        )


@dataclass(frozen=True)
class ResolvedRun:
    """A `Run` with every default filled in, as `Run.resolved` makes it; `lr` is None only for "power"."""

    optimizer: Optimizer
    n_steps: int
    lr: float | None
    restarts: int
    batch_size: int
    seed: int
    checkpoint: str | Path | None
    progress: bool
    trim: bool
    began: float

    def trimmed(self, sliced: SlicedModel) -> AbstractContextManager[Any]:
        """Where an ascent runs: if the caller wants it so, without the weights outside the slice."""
        return trimmed(sliced.host, sliced.own_blocks) if self.trim else nullcontext()

    def settings(self) -> dict[str, Any]:
        """The settings that change the result."""
        return {name: getattr(self, name) for name in ("optimizer", "n_steps", "lr", "restarts", "batch_size", "seed")}


@dataclass(frozen=True, eq=False)
class Fitted:
    """The result of an ascent.

    Attributes:
        point: the rows that were found; each tensor is [row ...].
        history: the objective before each step and, in the last row, the objective of `point`.
        provenance: every setting, with `status` and `seconds`; `relative_radius`, the radius as a share of the
            stream's median norm; `effects`, of each row ``||change|| / ||target||``; `sinks`, the rows that run into
            an attention sink, whose effect says nothing about behaviour; and `minus`, both for minus each row.
    """

    point: Point
    history: Float[Tensor, "step row"]
    provenance: dict[str, Any]


def settings_of(method: str, sliced: SlicedModel, objective: Objective, run: ResolvedRun) -> dict[str, Any]:
    """The provenance that the fits of all methods have; a method adds its own settings to it."""
    return {"method": method, **describe(sliced), **without_place(objective), **run.settings()}


def objective_at(sliced: SlicedModel, **settings: Any) -> Objective:
    """The objective with these settings, read at the slice's target."""
    hook = sliced.target_hook if sliced.target_layer is None else None
    return Objective(sliced.target_layer, hook, sliced.batch.positions, **settings)


def without_place(objective: Objective) -> dict[str, Any]:
    """An objective's settings except the place where it is read, which the provenance of the slice names already."""
    return {name: value for name, value in objective.header().items() if name not in ("target_layer", "target_hook")}


def fit(
    problem: Problem, starts: Point, constraint: Constraint, run: ResolvedRun, settings: dict[str, Any], label: str
) -> Fitted:
    """Takes an ascent to its end.

    Args:
        problem: the function that is climbed.
        starts: the starting rows; each tensor is [restart row ...].
        constraint: the set within which the rows stay.
        run: how the ascent is run.
        settings: the provenance. A checkpoint is resumed only if it was written with the same settings.
        label: the text in front of the progress bar.
    """
    n_rows, device = starts[0].shape[1], starts[0].device
    with run.trimmed(problem.sliced):
        if run.optimizer == "adamw":
            assert run.lr is not None  # `Run.resolved` gives "adamw" a step size
            saved = checkpoints.resume(run.checkpoint, settings, Descent, device)
            states = adamw(problem, tuple(x[0] for x in starts), constraint, run.n_steps, run.lr, saved)
            total = (run.n_steps + 1) * len(constraint.groups(n_rows))
        else:
            saved = checkpoints.resume(run.checkpoint, settings, Climb, device)
            states = fixed_point(problem, starts, constraint, run.n_steps, state=saved)
            total = run.n_steps + 1
        state = climbed(states, saved, total, run, settings, label)
        steps = run.n_steps if run.optimizer == "adamw" else state.step - 1
        return ended(problem, state, steps, run, settings, status(state, n_rows, steps, constraint.patience))


def fit_swarm(
    changes: MeanChange,
    start: Point,
    targets: Float[Tensor, "row d_target"],
    spread: Spread,
    directed: bool,
    run: ResolvedRun,
    settings: dict[str, Any],
    label: str,
) -> tuple[Fitted, Float[Tensor, "row d_target"]]:
    """Takes the ascent of `sogi` to its end.

    Returns:
        What `fit` returns, and the unit direction in which each row changes the target.
    """
    with run.trimmed(changes.problem.sliced):
        saved = checkpoints.resume(run.checkpoint, settings, Swarm, start[0].device)
        states = sogi(changes, start, targets, spread, run.n_steps, directed, saved)
        state = climbed(states, saved, run.n_steps + 1, run, settings, label)
        said = f"ran all {run.n_steps} steps; the last iterate is kept"
        return ended(changes.problem, state, run.n_steps, run, settings, said), state.targets


def climbed(
    states: Iterator[S], saved: S | None, total: int, run: ResolvedRun, settings: dict[str, Any], label: str
) -> S:
    """Takes an ascent to its last state, which is shown on a bar and saved on the way."""
    with Progress(total=total, desc=label, unit="step", disable=not run.progress) as bar:
        return checkpoints.run(states, run.checkpoint, settings, bar, saved)


def ended(problem: Problem, state: State, steps: int, run: ResolvedRun, settings: dict[str, Any], said: str) -> Fitted:
    """Measures what an ascent arrived at, and records how it ended."""
    found = measured(problem, state.point, settings.get("radius"), said)
    seconds = round(time.monotonic() - run.began, 3)
    return Fitted(state.point, state.history[: steps + 1], {**settings, **found, "seconds": seconds})


def measured(problem: Problem, point: Point, radius: float | None, said: str = "") -> dict[str, Any]:
    """Measures what rows do: the part of a provenance that says how large they are and how strongly they act.

    Args:
        problem: says how the rows act, and on which slice.
        point: the rows.
        radius: their norm; None if they have none.
        said: how they were found, in words.
    """
    effects, sunk = problem.effects(point)
    minus_effects, minus_sunk = problem.effects(problem.minus(point))
    norm = float(f"{median_norm(problem.sliced):.6g}")
    return {
        "status": said + in_sinks(sunk),
        "stream_norm": norm,
        "relative_radius": None if radius is None else float(f"{radius / norm:.4g}"),
        **_figures(effects, sunk),
        "minus": _figures(minus_effects, minus_sunk),
    }


def _figures(effects: Float[Tensor, " row"], sunk: Bool[Tensor, " row"]) -> dict[str, Any]:
    return {
        "effects": [float(f"{effect:.4g}") for effect in effects.tolist()],
        "sinks": sunk.nonzero().flatten().tolist(),
    }


def in_sinks(sunk: Bool[Tensor, " row"]) -> str:
    """How many rows ended in a sink, as the rest of a sentence; nothing if none did."""
    n = int(sunk.sum())
    if not n:
        return ""
    return (
        f"; {n} of {len(sunk)} ran into a sink, where a position changes by more than {SINK:g} times the usual norm "
        "of the target: use a smaller radius"
    )


def status(state: Descent | Climb, n_rows: int, steps: int, patience: int) -> str:
    """How the ascent ended, as a sentence."""
    if isinstance(state, Descent):
        return f"ran all {steps} steps; the last iterate is kept"
    if state.settled == n_rows:
        return (
            f"settled after {steps} steps: no objective changed by more than .1 % in "
            f"{'a step' if patience == 1 else f'{patience} steps'}"
        )
    return (
        f"stopped after {steps} steps, as n_steps says; {state.settled} of {n_rows} had settled, each is the best "
        "point seen"
    )
