"""What would someone find who knows what to look for?  The difference of means between prompts with and without it.

It uses labels, and stands beside the unsupervised methods as a yardstick.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.arguments import count, positive, public
from melbo_lens.ascent.manifolds import to_sphere
from melbo_lens.ascent.objectives import positions_text
from melbo_lens.memory import in_batches
from melbo_lens.methods.provenance import describe_model
from melbo_lens.models import blocks, hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.host import Host
from melbo_lens.models.reaching import said_of
from melbo_lens.perturbations.sites import site_of
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.prompts import Positions, PromptBatch, Prompts, tokenize

ROWS_AT_ONCE = 16


@public
def fit_contrastive(
    model: Model,
    positive_prompts: Prompts,
    negative_prompts: Prompts,
    source_layer: int,
    *,
    radius: float | None = None,
    positions: Positions = slice(-1, None),
    site: str = "resid_post",
) -> SteeringVectors:
    """Computes the difference of means at a site: a supervised steering vector.

    ``theta = mean of the positive activations - mean of the negative ones``, where a prompt's activation is the mean
    over its positions.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; it is left as it was.
        positive_prompts: prompts that show what is wanted.
        negative_prompts: prompts that don't, best the same ones otherwise.
        source_layer: the block at whose `site` the activations are read, and the vector is added.
        radius: the norm of the vector; None keeps that of the difference.
        positions: the positions that count, in each prompt's own tokens.
        site: "resid_post" (the stream that leaves the block, as is usual), "mlp_out" or "attn_out".

    Returns:
        One vector. The provenance has the number of prompts and the norm of the difference.

    Raises:
        TypeError, ValueError: arguments break a rule, a set is empty or both share a prompt; this is raised before
            the model runs.
        FloatingPointError: the activations hold NaN or infinity.
    """
    if radius is not None:
        positive("radius", radius, ", or None to keep the norm of the difference")
    host = host_of(model)
    count("source_layer", source_layer, 0)
    if source_layer >= host.n_layers:
        raise ValueError(f"source_layer={source_layer} must be below {host.n_layers}: the model has so many blocks.")
    name = hooks.source_hook(host, site_of(site), source_layer)
    sides = [tokenize(host, prompts, positions) for prompts in (positive_prompts, negative_prompts)]
    shared = set(map(tuple, sides[0].rows())) & set(map(tuple, sides[1].rows()))
    if shared:
        raise ValueError(
            f"{len(shared)} prompts are among both the positive and the negative ones, where they say nothing: leave "
            "them out of one."
        )
    with hooks.frozen(host), torch.no_grad():
        means = [_mean(host, batch, name, source_layer) for batch in sides]
    difference = (means[0] - means[1])[None]
    hooks.check_finite(host, difference, ["the difference of means"], "the activations")
    length = float(difference.norm())
    if length == 0:
        raise ValueError("the means of both sets are equal, so that there is no direction between them.")
    values = difference if radius is None else to_sphere(difference, difference.new_full((1,), radius))
    provenance: dict[str, Any] = {
        "method": "fit_contrastive",
        **describe_model(host),
        "source_layer": source_layer,
        "site": site,
        **said_of(host, sides[0], source_layer, site_of(site)),
        "positions": positions_text(positions),
        **{
            name: value
            for side, batch in zip(("positive", "negative"), sides, strict=True)
            for name, value in ((f"{side}_prompts", list(batch.texts)), (f"{side}_prompt_tokens", batch.rows()))
        },
        "n_positive": len(sides[0]),
        "n_negative": len(sides[1]),
        "difference_norm": length,
        "radius": radius,
        "source_hook": name,
    }
    return SteeringVectors(values, source_layer, provenance=provenance, site=site)


def _mean(host: Host, batch: PromptBatch, name: str, layer: int) -> Float[Tensor, " d_model"]:
    """Computes the mean activation of a set of prompts, each of which is the mean over its positions."""

    def of_some(some: Sequence[int]) -> list[Tensor]:
        seen: list[Tensor] = []
        blocks.record(host, batch.tokens[list(some)], layer, layer + 1, [(name, partial(_keep, seen))])
        return [rows[own].mean(0) for rows, own in zip(seen[0], batch.target_mask[list(some)], strict=True)]

    parts = in_batches(range(len(batch)), ROWS_AT_ONCE, of_some)
    return torch.stack([mean for _, part in parts for mean in part]).mean(0)


def _keep(seen: list[Tensor], activation: Tensor, hook: Any = None) -> None:
    seen.append(activation.detach().float())
