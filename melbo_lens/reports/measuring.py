"""What is measured of vectors for a page?  Their changes and effects, and where the directions of a search lie."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from melbo_lens.ascent.objectives import Objective
from melbo_lens.measures.changes import activation_changes, objective, target_effects
from melbo_lens.measures.controls import random_like
from melbo_lens.measures.output import output_effects
from melbo_lens.measures.ranking import rank
from melbo_lens.models.host import Host
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Prompts, tokenize
from melbo_lens.search.discovery import Discovery
from melbo_lens.search.written import PLACES

MOST_WORK = 2e11  # directions times tokens times layers times width squared, up to which a map is measured: a minute


def measures(host: Host, prompts: Prompts, vectors: Perturbation) -> dict[str, Any]:
    """The measures of vectors for a page; what was learned for several targets is read at the model's end."""
    aim = vectors.objective or Objective()
    batch = tokenize(host, prompts, aim.target_positions)
    known = aim.target_layer is not None or aim.target_hook is not None
    layer = None if known else host.n_layers
    return {
        "changes": activation_changes(host, first_of(host, prompts), vectors),
        "effects": target_effects(host, batch, vectors, layer, target_positions=batch.positions, signs=(1, -1)),
        "control": objective(host, batch, random_like(vectors, host, batch)) if known else None,
        "ranked": rank(vectors, output_effects(host, batch, vectors)),
    }


def measures_of_directions(
    host: Host, prompts: Prompts, found: Discovery, chosen: Sequence[tuple[int, int, int]]
) -> dict[str, Any]:
    """The measures of directions of a search, form by form, since they act at several layers and in several ways.

    What they change is read at the model's end, which all of them reach.
    """
    joined = list(found.together(chosen))
    first, start = first_of(host, prompts), min(min(vectors.source_layers) for _, vectors in joined)
    trial, vector, _ = chosen[0]
    aim = found.vectors[trial][vector].objective or Objective()  # joined ones, of several targets, have none
    batch = tokenize(host, prompts, aim.target_positions)
    places, changes, effects, ranked = [], [], [], []
    for mine, vectors in joined:
        places += mine
        changes.append(activation_changes(host, first, vectors, range(start + 1, host.n_layers + 1)))
        effects.append(target_effects(host, batch, vectors, host.n_layers, batch.positions))
        table = rank(vectors, output_effects(host, batch, vectors, signs=(1,)))
        number = table.vector.map(dict(enumerate(mine)))
        ranked.append(table.assign(vector=number, cluster=number))
    order = torch.tensor(places, dtype=torch.long, device="cpu").argsort()  # back to that of the chosen
    return {
        "changes": replace(changes[0], change=torch.cat([one.change for one in changes])[order]),
        "effects": replace(
            effects[0],
            values=torch.cat([one.values for one in effects])[order],
            vectors=tuple(range(len(chosen))),
            signs=(1,) * len(chosen),
        ),
        "ranked": pd.concat(ranked).sort_values(["sink", "kl"], ascending=[True, False], ignore_index=True),
    }


def first_of(host: Host, prompts: Prompts) -> Tensor:
    batch = tokenize(host, prompts)
    return batch.tokens[:1, : int(batch.lengths[0])]


def places(host: Host, prompt: Tensor, found: Discovery) -> pd.DataFrame | None:
    """The points of all directions of a search: what each changes at the last position of a prompt, at the model's end.

    Only the direction of the change counts, so that a few large ones don't push all others together. None if that would
    take long.
    """
    if 2 * sum(map(len, found.vectors)) * prompt.shape[1] * host.n_layers * host.d_model**2 > MOST_WORK:
        return None
    keys, rows = [], []
    for trial, vectors in enumerate(found.vectors):
        effects = target_effects(host, prompt, vectors, host.n_layers, signs=(1, -1))
        keys += [(trial, vector, sign) for vector, sign in zip(effects.vectors, effects.signs, strict=True)]
        rows.append(effects.values)
    return pd.DataFrame(
        [(*key, *place) for key, place in zip(keys, plane(torch.cat(rows)), strict=True)], columns=PLACES
    )


def plane(effects: Tensor) -> list[tuple[float, float]]:
    """The two principal components of the directions of effects; rows with NaN are put at the middle."""
    rows = torch.nan_to_num(effects.double())
    unit = (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)).numpy()
    if min(unit.shape) < 2 or (unit == unit[0]).all():
        return [(0.0, 0.0)] * len(unit)
    return [(float(x), float(y)) for x, y in PCA(2, svd_solver="randomized", random_state=0).fit_transform(unit)]
