"""What do vectors do to the model, behaviours aside?  Next-token distributions, norms, promoted tokens, texts they align with, clusters."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

from melbo_lens import blocks, hooks, tables
from melbo_lens.access import host_of
from melbo_lens.arguments import public
from melbo_lens.calibration import divergence
from melbo_lens.completions import Completions
from melbo_lens.host import Host
from melbo_lens.manifolds import unit
from melbo_lens.perturbation import Perturbation
from melbo_lens.perturbations import SteeringVectors
from melbo_lens.prompts import Prompts, decoded, tokenize
from melbo_lens.sites import Hook
from melbo_lens.sliced_model import SlicedModel

ROWS_AT_ONCE = 128


@dataclass(frozen=True, eq=False, repr=False)
class Effects:
    """Changes after each prompt.

    Attributes:
        table: vector, sign, prompt, kl (of the steered next-token distribution from the clean one, nats), entropy and entropy_unsteered (nats),
            logit_difference and logit_difference_unsteered (of the two tokens asked for, else absent).
        norm_change: relative change of the residual stream's norm leaving each layer, a row for each row of the table; NaN in the padding.
    """

    table: pd.DataFrame
    norm_change: Float[Tensor, "row layer pos"]

    def __repr__(self) -> str:
        kl = self.table.kl
        return f"Effects({len(self.table)} rows, KL {kl.min():.3g} to {kl.max():.3g} nats; norm_change {list(self.norm_change.shape)})"

    def _repr_html_(self) -> str:
        return tables.html(repr(self), self.table)


@public
def effects(
    model: Any,
    prompts: Prompts,
    vectors: Perturbation,
    signs: Sequence[int] = (+1, -1),
    tokens: Sequence[int] | None = None,
) -> Effects:
    """What each vector or adapter changes in the next-token distribution and in the norms of the stream.

    Args:
        model: left as it was.
        prompts: text, chats or token ids.
        vectors: vectors or adapters, each by itself.
        signs: +1, -1 or both.
        tokens: two token ids whose logit difference is wanted.
    """
    host = host_of(model)
    vectors = vectors.on(host)
    batch = tokenize(host, prompts)
    runs = list(product(range(len(batch)), range(len(vectors)), signs))
    with hooks.frozen(host), torch.no_grad():
        clean_logits, clean_norms = _run(host, batch.tokens, batch.lengths, [])
        parts = []
        for first in range(0, len(runs), ROWS_AT_ONCE):
            prompt, vector, sign = (list(column) for column in zip(*runs[first : first + ROWS_AT_ONCE], strict=True))
            steering = vectors.row_hooks(vector, torch.tensor(sign, dtype=torch.float32, device="cpu"))
            parts.append(_run(host, batch.tokens[prompt], batch.lengths[prompt], steering))
            names = [f"vector {k} with sign {s:+d}, on prompt {i}," for k, s, i in zip(vector, sign, prompt, strict=True)]
            hooks.check_finite(host, parts[-1][0], names, "the logits")
    logits, norms = (torch.cat(column) for column in zip(*parts, strict=True))
    which = [prompt for prompt, _, _ in runs]
    clean, steered = clean_logits.log_softmax(-1)[which], logits.log_softmax(-1)
    table = pd.DataFrame([(vector, sign, prompt) for prompt, vector, sign in runs], columns=["vector", "sign", "prompt"])
    table["kl"] = divergence(clean, steered).clamp(min=0).tolist()
    table["entropy"] = torch.special.entr(steered.exp()).sum(-1).tolist()
    table["entropy_unsteered"] = torch.special.entr(clean.exp()).sum(-1).tolist()
    if tokens is not None:
        table["logit_difference"] = (logits[:, tokens[0]] - logits[:, tokens[1]]).tolist()
        table["logit_difference_unsteered"] = (clean_logits[which][:, tokens[0]] - clean_logits[which][:, tokens[1]]).tolist()
    return Effects(table, norms / clean_norms[which] - 1)


def _run(host: Host, tokens: Tensor, lengths: Tensor, steering: list[Hook]) -> tuple[Float[Tensor, "row d_vocab"], Tensor]:
    """Logits after the first `lengths` tokens of each row, and the norms [row layer pos] of the stream, NaN in the padding."""
    norms: list[Tensor] = []
    readers = [(f"blocks.{i}.hook_resid_post", lambda stream, hook: norms.append(stream.float().norm(dim=-1))) for i in range(host.n_layers)]
    with hooks.attached(host, [*steering, *readers]):
        logits = host.forward(tokens)
    own = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    stacked = torch.stack(norms, dim=1).masked_fill(~own[:, None], float("nan"))
    return logits[torch.arange(len(tokens), device=tokens.device), lengths - 1].float(), stacked


@public
def top_tokens(model: Any, vectors: SteeringVectors, k: int = 10, prompts: Prompts | None = None, position: int = -1) -> pd.DataFrame:
    """The tokens that each vector promotes and suppresses most.

    By the direct path, the vector's product with the unembedding, and with `prompts` also by the mean change of the steered logits at a
    `position` of each prompt's own tokens.

    Returns:
        One row for each vector and route ("direct" or "steered"): promoted and suppressed, lists of (token, change of the logit).
    """
    host = host_of(model)
    changes = {"direct": vectors.values.to(host.model.W_U.device) @ host.model.W_U.detach().float()}
    if prompts is not None:
        batch = tokenize(host, prompts, target_positions=[position])
        ends = (batch.lengths + position if position < 0 else torch.full_like(batch.lengths, position)) + 1
        with hooks.frozen(host), torch.no_grad():
            clean, _ = _run(host, batch.tokens, ends, [])
            steered = [_run(host, batch.tokens, ends, vector.hooks())[0] for vector in vectors]
        for number, logits in enumerate(steered):
            hooks.check_finite(host, logits, [f"vector {number}"] * len(logits), "the logits")
        # a token that is masked in both runs, -inf less -inf, has not changed
        changes["steered"] = torch.stack([(logits - clean).nan_to_num(nan=0.0).mean(0) for logits in steered])
    rows = []
    for vector, route in product(range(len(vectors)), changes):
        change = changes[route][vector]
        best = [[(decoded(host, [int(i)]), float(change[i])) for i in (sign * change).topk(k).indices] for sign in (1, -1)]
        rows.append((vector, route, *best))
    return pd.DataFrame(rows, columns=["vector", "route", "promoted", "suppressed"])


@public
def max_activating(model: Any, vectors: SteeringVectors, texts: Prompts, k: int = 5) -> pd.DataFrame:
    """The positions in texts whose stream after the source layer has the highest cosine with each vector.

    Returns:
        k rows for each vector, best first: vector, rank, text (index), position, token, before (the text up to the token), cosine.
    """
    host = host_of(model)
    batch = tokenize(host, texts)
    with hooks.frozen(host):
        stream = blocks.record(host, batch.tokens, vectors.source_layer + 1, vectors.source_layer + 1).streams[-1].float()
    hooks.check_finite(host, stream.abs().masked_fill(~batch.own[..., None], 0), ["the unsteered model"] * len(batch), "the stream")
    places = batch.own.nonzero().tolist()
    cosines = unit(stream[batch.own]) @ unit(vectors.values.to(stream.device)).T
    rows = []
    for vector in range(len(vectors)):
        best = cosines[:, vector].topk(min(k, len(places)))
        for rank, (value, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            text, position = places[index]
            ids = batch.rows()[text]
            before = "".join(decoded(host, [i]) + " " for i in ids[:position]).strip()
            rows.append((vector, rank, text, position, decoded(host, [ids[position]]), before, value))
    return pd.DataFrame(rows, columns=["vector", "rank", "text", "position", "token", "before", "cosine"])


@public
def closest_directions(
    vectors: SteeringVectors, matrix: Float[Tensor, "direction d_model"], names: Sequence[str] | None = None, k: int = 5
) -> pd.DataFrame:
    """The rows of any matrix (an SAE's decoder, an unembedding's transpose) with the largest |cosine| to each vector.

    Raises:
        ValueError: another width, or not one name for each row.
    """
    if matrix.shape[1] != vectors.d_model:
        raise ValueError(f"matrix has rows of width {matrix.shape[1]}, the vectors have d_model {vectors.d_model}: transpose it, or use another.")
    if names is not None and len(names) != len(matrix):
        raise ValueError(f"{len(names)} names were given for {len(matrix)} directions: give one for each.")
    cosines = unit(vectors.values) @ unit(matrix.float().to(vectors.values.device)).T
    rows = []
    for vector, row in enumerate(cosines):
        for rank, index in enumerate(row.abs().topk(min(k, len(row))).indices.tolist()):
            rows.append((vector, rank, index, names[index] if names is not None else str(index), float(row[index])))
    return pd.DataFrame(rows, columns=["vector", "rank", "direction", "name", "cosine"])


@public
def rank(vectors: Perturbation, measured: Effects, clusters: Sequence[int] | None = None) -> pd.DataFrame:
    """One ranking of vectors and signs, with its reasons as columns.

    Args:
        vectors: those that were measured.
        measured: their `effects`.
        clusters: labels as from `cluster_by_effect`; only the best of each cluster and sign is kept.

    Returns:
        Best first, by kl: vector, sign, kl and entropy_change (means over prompts, nats), objective (NaN without history), cluster, and
        near_duplicates (how many of its cluster it stands for).
    """
    table = measured.table.assign(entropy_change=measured.table.entropy - measured.table.entropy_unsteered)
    table = table.groupby(["vector", "sign"])[["kl", "entropy_change"]].mean().reset_index()
    final = vectors.history[-1].tolist() if len(vectors.history) else [float("nan")] * len(vectors)
    labels = list(clusters) if clusters is not None else list(range(len(vectors)))
    if len(labels) != len(vectors):
        raise ValueError(f"{len(labels)} cluster labels were given for {len(vectors)} vectors: give one for each.")
    table = table.assign(objective=[final[k] for k in table.vector], cluster=[labels[k] for k in table.vector])
    table = table.sort_values("kl", ascending=False)
    sizes = table.groupby(["cluster", "sign"]).size()
    best = table.drop_duplicates(["cluster", "sign"])
    return best.assign(near_duplicates=[int(sizes[key]) - 1 for key in zip(best.cluster, best.sign, strict=True)]).reset_index(drop=True)


@public
def target_changes(sliced: SlicedModel, perturbations: Perturbation) -> Float[Tensor, "perturbation change"]:
    """What each vector or adapter changes at the target positions of all prompts, as one long row."""
    everyone, changes = sliced.everyone, []
    with hooks.frozen(sliced.host), torch.no_grad():
        for one in perturbations.on(sliced.host):
            changes.append(sliced.change_under(one.hooks(), everyone)[sliced.batch.target_mask].flatten())
    found = torch.stack(changes)
    hooks.check_finite(sliced.host, found.abs(), [f"vector {k}" for k in range(len(found))], "the target")
    return found


@public
def cluster_by_effect(sliced: SlicedModel, vectors: Perturbation, threshold: float = 0.3) -> list[int]:
    """A label for each vector or adapter; those whose target changes have an average cosine distance below `threshold` share one."""
    return cluster(target_changes(sliced, vectors), threshold)


@public
def cluster_by_words(completions: Completions, threshold: float = 0.3) -> pd.DataFrame:
    """Clusters vectors and signs by the words of their steered completions: vector, sign, cluster.

    Those whose word counts, over all their completions, have an average cosine distance below `threshold` share a label.
    """
    steered = completions.table[completions.table.kind == "steered"]
    joined = steered.groupby(["vector", "sign"]).text.agg(" ".join).reset_index()
    return joined[["vector", "sign"]].assign(cluster=cluster(word_counts(joined.text.tolist()), threshold))


def word_counts(texts: Sequence[str]) -> Tensor:
    """How often each word occurs in each text, [text word]; a text without words counts one empty word."""
    split = [text.split() or [""] for text in texts]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(word for words in split for word in words))}
    counts = torch.zeros(len(texts), max(len(vocabulary), 1), dtype=torch.float32, device="cpu")
    for row, words in zip(counts, split, strict=True):
        for word in words:
            row[vocabulary[word]] += 1
    return counts


def cluster(features: Float[Tensor, "row feature"], threshold: float) -> list[int]:
    """Labels by average-linkage clustering of cosine distances; the first row has label 0, labels are numbered by first appearance."""
    if len(features) < 2:
        return [0] * len(features)
    distances = (1 - unit(features.double()) @ unit(features.double()).T).clamp(min=0).cpu().numpy()
    found = AgglomerativeClustering(n_clusters=None, metric="precomputed", linkage="average", distance_threshold=threshold).fit_predict(distances)
    order = {label: i for i, label in enumerate(dict.fromkeys(found.tolist()))}
    return [order[label] for label in found.tolist()]
