"""How does the published recipe climb?  It uses AdamW, and projects back into the constraint after every step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from melbo_lens.ascent.constraints import Constraint
from melbo_lens.ascent.states import Evaluate, Point, State, check_finite

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@dataclass(frozen=True, eq=False)
class Descent(State):
    """The state of `adamw`.

    Attributes:
        group: the number of the group of rows that climbs, or the number of groups at the end; `step` counts the steps
            of this group.
        exp_avg, exp_avg_sq, max_exp_avg_sq: the optimizer's moments for these rows.
    """

    group: int
    exp_avg: Point
    exp_avg_sq: Point
    max_exp_avg_sq: Point


def adamw(
    evaluate: Evaluate, start: Point, constraint: Constraint, n_steps: int, lr: float, state: Descent | None = None
) -> Iterator[Descent]:
    """Climbs with AdamW (betas .9 and .98, no weight decay, amsgrad) within a constraint, and keeps the last iterate.

    Orthogonal vectors are learned one after another, each in the complement of those already found and with a fresh
    optimizer. Other rows are learned all at once, which gives the same as one by one, since AdamW acts on each
    coordinate separately.

    Args:
        evaluate: the function to climb.
        start: the starting rows, [row ...] each, which are moved into the constraint before the first step.
        constraint: the set in which the rows stay.
        n_steps: the number of steps for each group of rows.
        lr: the step size in units of the rows' entries.
        state: a state that was yielded earlier, from which the ascent goes on.

    Yields:
        The state after each step.

    Raises:
        FloatingPointError: an objective or a gradient is NaN or infinite.
    """
    n_rows = len(start[0])
    if state is None:
        history = start[0].new_full((n_steps + 1, n_rows), float("nan"))
        state = Descent(tuple(x.clone() for x in start), history, 0, 0, (), (), ())
    for rows in constraint.groups(n_rows)[state.group :]:
        at = slice(rows.start, rows.stop)
        found = tuple(x[None, : rows.start] for x in state.point)
        first = tuple(x[at].clone() for x in state.point)  # the optimizer writes into its parameters
        moving = [nn.Parameter(x) for x in (first if state.step else _one(constraint.project(_many(first), found)))]
        optimizer = _optimizer(moving, lr, state)
        for step in range(state.step, n_steps + 1):
            here = tuple(x.detach() for x in moving)
            seen = evaluate(
                tuple(torch.cat([old, x[None]], dim=1) for old, x in zip(found, here, strict=True)), rows.start
            )
            check_finite(step, (seen.value, *seen.gradient), rows.start)
            if step < n_steps:
                ascents = constraint.tangent(seen.gradient, _many(here), found)
                for x, ascent in zip(moving, ascents, strict=True):
                    x.grad = -ascent[0]
                optimizer.step()  # pyright: ignore[reportUnknownMemberType]  # torch doesn't type its closure
                for x, projected in zip(
                    moving, constraint.project(_many(tuple(x.detach() for x in moving)), found), strict=True
                ):
                    x.detach().copy_(projected[0])
            history = state.history.clone()
            history[step, at] = seen.value[0]
            point = tuple(
                torch.cat([x[: rows.start], new.detach(), x[rows.stop :]])
                for x, new in zip(state.point, moving, strict=True)
            )
            moments = {name: tuple(optimizer.state[x][name].clone() for x in moving) for name in MOMENTS}
            state = replace(state, point=point, history=history, step=step + 1, **moments)
            if step == n_steps:
                state = replace(state, group=state.group + 1, step=0)
            yield state


def _optimizer(moving: list[nn.Parameter], lr: float, state: Descent) -> torch.optim.AdamW:
    """Makes AdamW as it was after the state's steps.

    The first moments are made here, since torch would use the default dtype and the default device for them.
    """
    optimizer = torch.optim.AdamW(moving, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)
    for i, x in enumerate(moving):
        moments = {name: getattr(state, name)[i].clone() if state.step else torch.zeros_like(x) for name in MOMENTS}
        optimizer.state[x] = {"step": torch.tensor(float(state.step), dtype=torch.float32, device="cpu"), **moments}
    return optimizer


def _many(rows: Point) -> Point:
    """Adds the axis of restarts that a constraint expects: [restart row ...]."""
    return tuple(x[None] for x in rows)


def _one(rows: Point) -> Point:
    return tuple(x[0] for x in rows)
