"""Which perturbations are worth a look?  A ranking orders them and gives reasons; clusters leave one of each kind."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

from melbo_lens.arguments import finite, public
from melbo_lens.ascent.manifolds import unit
from melbo_lens.measures.output import Effects
from melbo_lens.models import hooks
from melbo_lens.models.slices import SlicedModel
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.perturbations.rows import at_the_fit


@public
def rank(vectors: Perturbation, measured: Effects, clusters: Sequence[int] | None = None) -> pd.DataFrame:
    """One ranking of vectors and signs, with its reasons as columns.

    Args:
        vectors: the vectors or adapters that were measured.
        measured: what `output_effects` measured of them.
        clusters: a label for each vector, as from `cluster_by_effect`; only the best of each cluster and sign is kept.

    Returns:
        One row for each vector and sign that is kept, the highest kl first, but those that ran into an attention sink
        last, since they write noise: vector, sign, kl and entropy_change (means over prompts, nats), objective (of the
        vector as it was learned: NaN for sign -1, and without a history), effect (``||change|| / ||target||`` of the
        vector with its sign at the fit, NaN if that is not known), sink, cluster, and near_duplicates (how many others
        of its cluster and sign the row stands for).

    Raises:
        ValueError: others were measured, or there isn't one label for each vector.
    """
    table = measured.table.assign(entropy_change=measured.table.entropy - measured.table.entropy_unsteered)
    table = table.groupby(["vector", "sign"])[["kl", "entropy_change"]].mean().reset_index()
    if set(table.vector) != set(range(len(vectors))):
        raise ValueError(
            f"{table.vector.nunique()} vectors were measured and {len(vectors)} are to be ranked: give those of which "
            "`output_effects` was asked."
        )
    final = vectors.history[-1].tolist() if len(vectors.history) else [float("nan")] * len(vectors)
    labels = list(clusters) if clusters is not None else list(range(len(vectors)))
    if len(labels) != len(vectors):
        raise ValueError(f"{len(labels)} cluster labels were given for {len(vectors)} vectors: give one for each.")
    of_sign = {sign: at_the_fit(vectors.provenance, len(vectors), sign) for sign in (1, -1)}
    rows = list(zip(table.vector, table.sign, strict=True))
    table = table.assign(
        objective=[final[k] if sign > 0 else float("nan") for k, sign in rows],
        effect=[of_sign[sign][0][k] for k, sign in rows],
        sink=[of_sign[sign][1][k] for k, sign in rows],
        cluster=[labels[k] for k, _ in rows],
    )
    table = table.sort_values(["sink", "kl"], ascending=[True, False])
    sizes = table.groupby(["cluster", "sign"]).size()
    best = table.drop_duplicates(["cluster", "sign"])
    return best.assign(
        near_duplicates=[int(sizes[key]) - 1 for key in zip(best.cluster, best.sign, strict=True)]
    ).reset_index(drop=True)


def target_changes(sliced: SlicedModel, perturbations: Perturbation) -> Float[Tensor, "perturbation change"]:
    """What each vector or adapter changes at the target positions of all prompts, as one long row.

    Raises:
        ValueError: something acts outside the blocks of the slice, which alone are run.
    """
    first, last = sliced.source_layer, sliced.source_layer + len(sliced.calls)
    if outside := [layer for layer in perturbations.source_layers if not first <= layer <= last]:
        raise ValueError(
            f"the {perturbations.word}s act at layers {list(perturbations.source_layers)}, and the slice runs those "
            f"from {first} to {last}: make one with "
            + (f"source_layer={min(outside)}." if min(outside) < first else f"target_layer above {max(outside)}.")
        )
    everyone, changes = sliced.everyone, []
    with hooks.frozen(sliced.host), torch.no_grad():
        for one in perturbations.on(sliced.host):
            changes.append(sliced.change_under(one.hooks(), everyone)[sliced.batch.target_mask].flatten())
    found = torch.stack(changes)
    hooks.check_finite(sliced.host, found.abs(), [f"vector {k}" for k in range(len(found))], "the target")
    return found


@public
def cluster_by_effect(sliced: SlicedModel, vectors: Perturbation, threshold: float = 0.3) -> list[int]:
    """A label for each vector or adapter, by average-linkage clustering of their target changes.

    Clusters are joined as long as the average cosine distance between them is below `threshold`.

    Args:
        sliced: a slice of `slice_model`, on whose prompts and target the changes are measured.
        vectors: vectors or adapters.
        threshold: the cosine distance, from 0 to 2, below which clusters are joined; a larger one makes fewer and
            larger clusters.

    Returns:
        One label for each vector, numbered in the order in which they first appear.

    Raises:
        ValueError: something acts outside the blocks of the slice, or the threshold is no distance.
    """
    if not 0 <= finite("threshold", threshold) <= 2:
        raise ValueError(f"threshold={threshold} must be a cosine distance, from 0 to 2.")
    return cluster(target_changes(sliced, vectors), threshold)


def cluster(features: Float[Tensor, "row feature"], threshold: float) -> list[int]:
    """Labels by average-linkage clustering of cosine distances, numbered in the order in which they first appear."""
    if len(features) < 2:
        return [0] * len(features)
    distances = (1 - unit(features.double()) @ unit(features.double()).T).clamp(min=0).cpu().numpy()
    found = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="average", distance_threshold=threshold
    ).fit_predict(distances)
    order = {label: i for i, label in enumerate(dict.fromkeys(found.tolist()))}
    return [order[label] for label in found.tolist()]
