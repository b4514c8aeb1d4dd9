"""Which pair of layers is worth a search?  A few fast vectors per pair, compared with random ones, give a hint."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter, methodcaller
from typing import Any, Literal

import pandas as pd

from melbo_lens import tables
from melbo_lens.arguments import counts, positive, public
from melbo_lens.ascent.constraints import OrderedRows
from melbo_lens.ascent.fixed_point import fixed_point
from melbo_lens.ascent.manifolds import to_sphere
from melbo_lens.ascent.objectives import Objective, positions_text
from melbo_lens.measures.output import output_effects
from melbo_lens.measures.radius import median_norm
from melbo_lens.memory import halving
from melbo_lens.methods.automatic import automatic
from melbo_lens.methods.problem import Problem, bias, default_batch_size
from melbo_lens.models import hooks
from melbo_lens.models.slices import SlicedModel
from melbo_lens.models.slicing import without_sink
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.progress import Progress
from melbo_lens.prompts import Positions, PromptBatch, Prompts, tokenize
from melbo_lens.randomness import gaussian_rows
from melbo_lens.sweeps.engines import Folder, Where, engine_for
from melbo_lens.sweeps.jobs import Loadable, as_prompts
from melbo_lens.sweeps.tasks import Bench, Measurement, digest

COLUMNS = (
    "source_layer target_layer sign radius relative_radius objective random_objective effect random_effect kl entropy"
).split()


@dataclass(frozen=True, eq=False, repr=False)
class LayerScan:
    """What a few vectors do at each pair of layers.

    Attributes:
        table: source_layer, target_layer, sign, radius, relative_radius (as a share of the stream's median norm),
            objective (mean over the vectors), random_objective (mean over random vectors of equal norm), effect and
            random_effect (medians of ``||change|| / ||target||``), kl (``KL(clean || steered)`` of the next-token
            distributions, nats) and entropy (nats); the last two are means over vectors and prompts.
        settings: the settings of the scan.
    """

    table: pd.DataFrame
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        pairs = self.table.drop_duplicates(["source_layer", "target_layer"])
        return f"LayerScan({len(pairs)} pairs of layers)"

    def _repr_html_(self) -> str:
        return tables.html(repr(self), self.table)


@public
def scan_layers(
    model: Loadable,
    prompts: Prompts,
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    radius: float | Literal["auto"] = "auto",
    n_vectors: int = 4,
    n_steps: int = 8,
    target_positions: Positions | None = None,
    seed: int = 0,
    directory: Folder | None = None,
    progress: bool = True,
    *,
    engine: Where = "here",
) -> LayerScan:
    """Learns a few vectors for every valid pair of layers and measures how much they change beyond random ones.

    The prompts run once for each source layer; all target layers of that source layer share the pass.

    Args:
        model: the model, which is left as it was; or its name or an `ml.ModelKey`, by which it is loaded.
        prompts: text, chats or token ids.
        source_layers, target_layers: the layers to pair; None means all. Pairs without a block between them are
            skipped.
        radius: one radius for all pairs, or "auto": it is calibrated at one pair, about a quarter and a half of the way
            through the model, and every source layer then has the same share of its stream's median norm.
        n_vectors, n_steps: how many vectors are learned, in how many steps. Few are enough for an overview.
        target_positions: where a change counts, as in `slice_model`.
        seed: the seed of the starts and of the random vectors.
        directory: a folder of a sweep, in which each finished pair is kept, atomically; it is made if it is missing.
            The same call, made later on a model of the same weights, skips these pairs.
        progress: whether to show a progress bar.
        engine: "here", or "ray" for Ray's actors, which need a directory and a name or key of the model.

    Returns:
        A table with two rows, one for each sign, for each pair of layers.

    Raises:
        ValueError: there is no valid pair, a setting breaks a rule, no radius can be calibrated, or the directory holds
            results of another model.

    Warns:
        UserWarning: the file of a pair is damaged, and the pair is measured again.
    """
    counts(n_vectors=n_vectors, n_steps=n_steps)
    if radius != "auto":
        positive("radius", radius, ', or "auto" to calibrate one')
    where = None if target_positions is None else positions_text(target_positions)
    with engine_for(model, directory, engine) as workers:
        n_layers = workers.ask(attrgetter("host.n_layers"))
        pairs = _pairs(source_layers, target_layers, n_layers)
        # where the radius is calibrated: in the middle of the scan
        usual = min(pairs, key=lambda pair: abs(pair[0] - n_layers / 4) + abs(pair[1] - 0.55 * n_layers))
        ids = workers.ask(methodcaller("tokens", prompts))
        shared = _Shared(ids, radius, n_vectors, n_steps, where, seed, usual if radius == "auto" else None)
        pairs = sorted(pairs, key=lambda pair: ([source for source, _ in pairs].index(pair[0]), pair[1]))
        farthest = dict(sorted(pairs))
        tasks = [PairTask(shared, source, target, farthest[source]) for source, target in pairs]
        workers.begin(tasks)
        if radius == "auto" and any(workers.known(task) is None for task in tasks):
            (share,) = (done.value() for done in workers.results([ShareTask(shared)]))
            tasks = [replace(task, share=share) for task in tasks]
        rows = dict[tuple[int, int], list[list[float]]]()
        with Progress(total=len(pairs), desc="scan layers", unit="pair", disable=not progress) as bar:
            for done in workers.results(tasks):
                rows[done.task.source_layer, done.task.target_layer] = done.value()
                bar.update()
    settings = {
        "n_vectors": n_vectors,
        "n_steps": n_steps,
        "radius": radius,
        "seed": seed,
        "target_positions": where,
    }
    return LayerScan(pd.DataFrame([row for pair in pairs for row in rows[pair]], columns=COLUMNS), settings)


def _pairs(
    source_layers: Sequence[int] | None, target_layers: Sequence[int] | None, n_layers: int
) -> list[tuple[int, int]]:
    """Lists the valid pairs.

    Raises:
        ValueError: there is none.
    """
    sources = list(range(n_layers) if source_layers is None else source_layers)
    targets = list(range(n_layers + 1) if target_layers is None else target_layers)
    pairs = [
        (source, target) for source in sources for target in targets if 0 <= source < target - 1 and target <= n_layers
    ]
    if not pairs:
        raise ValueError(
            f"source_layers={sources} and target_layers={targets} have no valid pair: a target must be at least "
            "source + 2 "
            f"and at most n_layers = {n_layers}."
        )
    return pairs


@dataclass(frozen=True)
class _Shared:
    """What all pairs of a scan have in common, and what their results depend on beside the layers.

    Attributes:
        prompts: the "ids" and the "text" of each prompt.
        where: the target positions, as `positions_text` writes them; None as in `slice_model`.
        calibrated: the pair at which the radius is calibrated, if it is "auto".
    """

    prompts: tuple[dict[str, Any], ...]
    radius: float | Literal["auto"]
    n_vectors: int
    n_steps: int
    where: str | None
    seed: int
    calibrated: tuple[int, int] | None

    def name(self, fingerprint: str) -> str:
        # the files of an earlier version, which knew of no pair, are found under these names if their radius was given
        rows, pair = [prompt["ids"] for prompt in self.prompts], [] if self.calibrated is None else [self.calibrated]
        return digest([rows, self.radius, self.n_vectors, self.n_steps, self.where, self.seed, fingerprint, *pair])


@dataclass(frozen=True)
class ShareTask(Measurement[float]):
    """Calibrates the radius of a scan, as a share of the stream's median norm."""

    shared: _Shared

    def name(self, fingerprint: str) -> str:
        return f"{self.shared.name(fingerprint)}-share"

    def run(self, bench: Bench) -> float:
        assert self.shared.calibrated is not None  # the radius is "auto"
        sliced = bench.slice(self.shared.prompts, *self.shared.calibrated, self.shared.where)
        found = automatic(sliced, self.shared.seed).relative
        assert found is not None  # calibrations of a slice know the norm of its stream
        return found

    def of_json(self, said: Any) -> float:
        if not isinstance(said, float):
            raise ValueError(f"it holds {said!r}")
        return said


@dataclass(frozen=True)
class PairTask(Measurement[list[list[float]]]):
    """Measures one pair of layers; the result has a row for each sign.

    Attributes:
        farthest: the last target of the scan with this source, up to which the slice is made that its pairs share.
        share: what `ShareTask` gives, where the radius is "auto".
    """

    shared: _Shared
    source_layer: int
    target_layer: int
    farthest: int
    share: float | None = None

    def name(self, fingerprint: str) -> str:
        return f"{self.shared.name(fingerprint)}-{self.source_layer}-{self.target_layer}"

    def run(self, bench: Bench) -> list[list[float]]:
        shared = self.shared
        longest = bench.slice(shared.prompts, self.source_layer, self.farthest, shared.where)
        own = self.share * median_norm(longest) if self.share is not None else float(shared.radius)
        batch = tokenize(bench.host, as_prompts(shared.prompts))
        sliced = longest.shorter(self.target_layer)
        if shared.where is None:  # whether the first position is a sink depends on the target
            sliced = without_sink(replace(sliced, batch=batch))
        usual = min(default_batch_size(sliced), 2 * shared.n_vectors * len(batch))  # so many are in a pass
        return halving(partial(_scan_pair, sliced, batch, own, shared.n_vectors, shared.n_steps, shared.seed), usual)

    def of_json(self, said: Any) -> list[list[float]]:
        rows = [[math.nan if value is None else value for value in row] for row in said]
        if [len(row) for row in rows] != [len(COLUMNS)] * 2:
            raise ValueError(f"it holds {len(rows)} rows")
        return rows


def _scan_pair(
    sliced: SlicedModel,
    prompts: PromptBatch,
    chosen: float,
    n_vectors: int,
    n_steps: int,
    seed: int,
    batch_size: int | None,
) -> list[list[float]]:
    """The rows of one pair of layers, one for each sign."""
    assert sliced.target_layer is not None  # a scan's targets are layers
    with hooks.frozen(sliced.host):
        problem = Problem(sliced, bias(sliced), Objective().value, batch_size or default_batch_size(sliced))
        starts = gaussian_rows(n_vectors, sliced.d_model, "scan_layers", seed).to(sliced.device)
        radii = starts.new_full((n_vectors,), chosen)
        *_, climb = fixed_point(problem, (starts[None],), OrderedRows(radii), n_steps)
        (values,) = climb.point
        random = to_sphere(
            gaussian_rows(2 * n_vectors, sliced.d_model, "scan control", seed).to(sliced.device), radii.repeat(2)
        )
        random_objective = float(problem((random[None],)).value.mean())
        random_effect, norm = float(problem.effects((random,))[0].median()), median_norm(sliced)
        vectors = SteeringVectors(values, sliced.source_layer)
        rows = []
        for sign in (1, -1):
            measured = output_effects(sliced.host, prompts, vectors, signs=(sign,)).table
            objective = float(problem((sign * values[None],)).value.mean())
            effect = float(problem.effects((sign * values,))[0].median())
            row = [sliced.source_layer, sliced.target_layer, sign, chosen, chosen / norm, objective, random_objective]
            rows.append([*row, effect, random_effect, float(measured.kl.mean()), float(measured.entropy.mean())])
    return rows
