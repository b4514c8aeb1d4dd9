"""Which pair of layers is worth a search?  A few fast vectors per pair, compared with random ones, give a hint."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm.auto import tqdm

from melbo_lens import files, tables
from melbo_lens.arguments import counts, positive, public
from melbo_lens.ascent.constraints import OrderedRows
from melbo_lens.ascent.fixed_point import fixed_point
from melbo_lens.ascent.manifolds import to_sphere
from melbo_lens.ascent.objectives import Objective, positions_text
from melbo_lens.measures.output import output_effects
from melbo_lens.measures.radius import median_norm
from melbo_lens.methods.automatic import automatic
from melbo_lens.methods.problem import Problem, bias, default_batch_size
from melbo_lens.methods.provenance import fingerprint
from melbo_lens.models import hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.host import Host
from melbo_lens.models.slices import SlicedModel, slice_model
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.prompts import Positions, PromptBatch, Prompts, tokenize
from melbo_lens.randomness import gaussian_rows

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
    model: Model,
    prompts: Prompts,
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    radius: float | Literal["auto"] = "auto",
    n_vectors: int = 4,
    n_steps: int = 8,
    target_positions: Positions | None = None,
    seed: int = 0,
    directory: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> LayerScan:
    """Learns a few vectors for every valid pair of layers and measures how much they change beyond random ones.

    The prompts run once for each source layer; all target layers of that source layer share the pass.

    Args:
        model: the model, which is left as it was.
        prompts: text, chats or token ids.
        source_layers, target_layers: the layers to pair; None means all. Pairs without a block between them are
            skipped.
        radius: one radius for all pairs, or "auto": it is calibrated at one pair, about a quarter and a half of the way
            through the model, and every source layer then has the same share of its stream's median norm.
        n_vectors, n_steps: how many vectors are learned, in how many steps. Few are enough for an overview.
        target_positions: where a change counts, as in `slice_model`.
        seed: the seed of the starts and of the random vectors.
        directory: a folder in which each finished pair is saved, atomically; it is made if it is missing. The same
            call, made later on a model of the same weights, skips these pairs.
        progress: whether to show a progress bar.

    Returns:
        A table with two rows, one for each sign, for each pair of layers.

    Raises:
        ValueError: there is no valid pair, a setting breaks a rule, or no radius can be calibrated.

    Warns:
        UserWarning: the file of a pair is damaged, and the pair is measured again.
    """
    counts(n_vectors=n_vectors, n_steps=n_steps)
    if radius != "auto":
        positive("radius", radius, ', or "auto" to calibrate one')
    host = host_of(model)
    n_layers = host.n_layers
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
    batch = tokenize(host, prompts)
    where = None if target_positions is None else positions_text(target_positions)
    digest = None
    if directory is not None:
        key = json.dumps([batch.rows(), radius, n_vectors, n_steps, where, seed, fingerprint(host)])
        digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    rows, share = [], None
    with tqdm(total=len(pairs), desc="scan layers", unit="pair", disable=not progress) as bar:
        for source in dict.fromkeys(source for source, _ in pairs):
            longest: SlicedModel | None = None
            for target in sorted(target for other, target in pairs if other == source):
                path = None if directory is None else Path(directory) / f"{digest}-{source}-{target}.json"
                pair = None if path is None else _read_pair(path)
                if pair is None:
                    if longest is None:
                        last = max(target for other, target in pairs if other == source)
                        longest = slice_model(host, batch, source, last, target_positions)
                    if share is None and radius == "auto":
                        share = _share_of_norm(host, batch, pairs, target_positions, seed)
                    own = share * median_norm(longest) if share is not None else float(radius)
                    pair = _scan_pair(longest.shorter(target), batch, own, n_vectors, n_steps, seed)
                    if path is not None:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        files.write_atomically(path, _as_bytes(pair))
                rows += pair
                bar.update()
    settings = {
        "n_vectors": n_vectors,
        "n_steps": n_steps,
        "radius": radius,
        "seed": seed,
        "target_positions": where,
    }
    return LayerScan(pd.DataFrame(rows, columns=COLUMNS), settings)


def _as_bytes(pair: list[list[float]]) -> bytes:
    """The rows of a pair as JSON, with null for NaN."""
    return json.dumps(
        [[None if math.isnan(value) else value for value in row] for row in pair], allow_nan=False
    ).encode()


def _read_pair(path: Path) -> list[list[float]] | None:
    """The rows of a pair that was finished earlier; None if its file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        rows = [[math.nan if value is None else value for value in row] for row in json.loads(path.read_text())]
        if [len(row) for row in rows] != [len(COLUMNS)] * 2:
            raise ValueError(f"it holds {len(rows)} rows")
        return rows
    except (ValueError, TypeError) as error:
        warnings.warn(f"{path} is damaged ({error}): its pair of layers is measured again.", stacklevel=3)
        return None


def _share_of_norm(
    host: Host, batch: PromptBatch, pairs: list[tuple[int, int]], target_positions: Positions | None, seed: int
) -> float:
    """The calibrated radius as a share of the stream's median norm, at a pair in the middle of those of the scan."""
    n_layers = host.n_layers
    usual = min(pairs, key=lambda pair: abs(pair[0] - n_layers / 4) + abs(pair[1] - 0.55 * n_layers))
    found = automatic(slice_model(host, batch, *usual, target_positions), seed).relative
    assert found is not None  # calibrations of a slice know the norm of its stream
    return found


def _scan_pair(
    sliced: SlicedModel, prompts: PromptBatch, chosen: float, n_vectors: int, n_steps: int, seed: int
) -> list[list[float]]:
    """The rows of one pair of layers, one for each sign."""
    assert sliced.target_layer is not None  # a scan's targets are layers
    with hooks.frozen(sliced.host):
        problem = Problem(sliced, bias(sliced), Objective().value, default_batch_size(sliced))
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
