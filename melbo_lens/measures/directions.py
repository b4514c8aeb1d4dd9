"""What does a direction point at?  At tokens it promotes, texts it aligns with, and nearby rows of a matrix."""

from collections.abc import Sequence
from itertools import product
from typing import cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.arguments import check_tensor, count, public
from melbo_lens.ascent.manifolds import unit
from melbo_lens.measures.output import run_to_the_end
from melbo_lens.models import blocks, hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.prompts import Prompts, tokenize
from melbo_lens.texts import decoded, token_texts


@public
def top_tokens(
    model: Model, vectors: SteeringVectors, k: int = 10, prompts: Prompts | None = None, position: int = -1
) -> pd.DataFrame:
    """The tokens that each vector promotes and suppresses most.

    They are measured along the direct path (the product of the vector, times the final norm's weight, with the
    unembedding, so up to the norm's common factor) and, if `prompts` are given,
    also by the mean change of the steered logits at a `position` of each prompt's own tokens.

    Args:
        model: the model, which is left as it was.
        vectors: the vectors.
        k: how many tokens to list on each side.
        prompts: text, chats or token ids; None leaves out the route "steered".
        position: where the logits are read, in each prompt's own tokens.

    Returns:
        One row for each vector and route ("direct" or "steered"). Its columns promoted and suppressed are lists of
        (token, change of the logit), the largest change first.

    Raises:
        ValueError: k is not positive, or the vectors don't fit the model.
    """
    count("k", k)
    host = host_of(model)
    vectors = vectors.on(host)
    unembedding = cast(Tensor, host.model.W_U).detach().float()  # [d_model d_vocab]
    with hooks.frozen(host):
        changes = {"direct": host.through_final_norm(vectors.values.to(unembedding.device)) @ unembedding}
    if prompts is not None:
        batch = tokenize(host, prompts, target_positions=[position])
        ends = (batch.lengths + position if position < 0 else torch.full_like(batch.lengths, position)) + 1
        with hooks.frozen(host), torch.no_grad():
            clean, _ = run_to_the_end(host, batch.tokens, ends, [])
            steered = [run_to_the_end(host, batch.tokens, ends, vector.hooks())[0] for vector in vectors]
        for number, logits in enumerate(steered):
            hooks.check_finite(host, logits, [f"vector {number}"] * len(logits), "the logits")
        # a token that is masked in both runs (-inf minus -inf is NaN) has not changed
        changes["steered"] = torch.stack([(logits - clean).nan_to_num(nan=0.0).mean(0) for logits in steered])
    rows = []
    for vector, route in product(range(len(vectors)), changes):
        change = changes[route][vector]
        best = [
            list(zip(token_texts(host, indices), change[indices].tolist(), strict=True))
            for indices in ((sign * change).topk(min(k, len(change))).indices.tolist() for sign in (1, -1))
        ]
        rows.append((vector, route, *best))
    return pd.DataFrame(rows, columns=["vector", "route", "promoted", "suppressed"])


@public
def max_activating(model: Model, vectors: SteeringVectors, texts: Prompts, k: int = 5) -> pd.DataFrame:
    """The positions in texts whose stream after the source layer has the highest cosine with each vector.

    Args:
        model: the model, which is left as it was and not steered.
        vectors: the vectors.
        texts: text, chats or token ids among whose positions to look.
        k: how many positions to list for each vector.

    Returns:
        k rows for each vector, best first: vector, rank, text (index), position, token, before (the text up to the
        token) and cosine.

    Raises:
        ValueError: k is not positive, or the vectors don't fit the model.
        FloatingPointError: the stream holds NaN or infinity.
    """
    count("k", k)
    host = host_of(model)
    vectors = vectors.on(host)
    batch = tokenize(host, texts)
    with hooks.frozen(host):
        stream = (
            blocks.record(host, batch.tokens, vectors.source_layer + 1, vectors.source_layer + 1)
            .streams[-1]
            .to(host.device)
            .float()
        )
    hooks.check_finite(
        host, stream.abs().masked_fill(~batch.own[..., None], 0), ["the unsteered model"] * len(batch), "the stream"
    )
    places = batch.own.nonzero().tolist()
    cosines = unit(stream[batch.own]) @ unit(vectors.values.to(stream.device)).T
    rows = []
    for vector in range(len(vectors)):
        best = cosines[:, vector].topk(min(k, len(places)))
        for rank, (value, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            text, position = places[index]
            ids = batch.rows()[text]
            token, before = token_texts(host, [ids[position]])[0], decoded(host, ids[:position])
            rows.append((vector, rank, text, position, token, before, value))
    return pd.DataFrame(rows, columns=["vector", "rank", "text", "position", "token", "before", "cosine"])


@public
def closest_directions(
    vectors: SteeringVectors, matrix: Float[Tensor, "direction d_model"], names: Sequence[str] | None = None, k: int = 5
) -> pd.DataFrame:
    """The rows of any matrix (an SAE's decoder, an unembedding's transpose) with the largest |cosine| to each vector.

    Args:
        vectors: the vectors.
        matrix: the directions, one in each row.
        names: a name for each row; None numbers them.
        k: how many rows to list for each vector.

    Returns:
        k rows for each vector, the largest |cosine| first: vector, rank, direction (the index of the row), name and
        cosine.

    Raises:
        TypeError, ValueError: the matrix has another width than the vectors or holds NaN, k is not positive, or there
            isn't one name for each row.
    """
    count("k", k)
    check_tensor("matrix", matrix)
    if matrix.ndim != 2 or matrix.shape[1] != vectors.d_model:
        raise ValueError(
            f"matrix has the shape {list(matrix.shape)}, and the vectors have d_model {vectors.d_model}: give one "
            "direction in each row, so transpose it, or use another."
        )
    if not torch.isfinite(matrix).all():
        raise ValueError("matrix holds NaN or infinity, of which no cosine is known.")
    if names is not None and len(names) != len(matrix):
        raise ValueError(f"{len(names)} names were given for {len(matrix)} directions: give one for each.")
    cosines = unit(vectors.values) @ unit(matrix.float().to(vectors.values.device)).T
    rows = []
    for vector, row in enumerate(cosines):
        for rank, index in enumerate(row.abs().topk(min(k, len(row))).indices.tolist()):
            rows.append((vector, rank, index, names[index] if names is not None else str(index), float(row[index])))
    return pd.DataFrame(rows, columns=["vector", "rank", "direction", "name", "cosine"])
