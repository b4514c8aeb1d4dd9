"""What does an adapter do at its source?  The bias that each position receives, the vector nearest to it, and the control of equal norm."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from scipy.optimize import brentq
from torch import Tensor

from melbo_lens import blocks, hooks
from melbo_lens.arguments import public
from melbo_lens.adapters import SteeringAdapters
from melbo_lens.factors import normalize
from melbo_lens.perturbations import SteeringVectors, objective_of
from melbo_lens.prompts import PromptBatch, Prompts, pad, tokenize
from melbo_lens.randomness import gaussian_rows

ROWS_AT_ONCE = 128


@dataclass(frozen=True, eq=False, repr=False)
class AdapterEffect:
    """What the stream gains at one layer, position by position.

    Attributes:
        values: the bias that each adapter gives each position of each prompt, after a norm that follows the MLP; 0 in the padding.
        mask: True at the prompts' own positions.
        layer: the block whose MLP output gains it.
    """

    values: Float[Tensor, "adapter prompt pos d_model"]
    mask: Bool[Tensor, "prompt pos"]
    layer: int

    def norms(self) -> Float[Tensor, " adapter"]:
        """The mean norm of the update over the prompts' own positions."""
        return self.values.norm(dim=-1)[:, self.mask].mean(-1)

    def singular(self, adapter: int) -> tuple[Float[Tensor, " k"], Float[Tensor, "k d_model"]]:
        """Singular values and right singular vectors of one adapter's biases [position d_model], largest first, not centred."""
        _, values, vectors = torch.linalg.svd(self.values[adapter][self.mask], full_matrices=False)
        return values, vectors

    def __repr__(self) -> str:
        n, prompts = self.values.shape[:2]
        return f"AdapterEffect({n} adapters on {prompts} prompts at layer {self.layer}, mean norm {self.norms().mean():.3g})"


@public
def effect(adapters: SteeringAdapters, model: Any, prompts: Prompts, layer: int | None = None) -> AdapterEffect:
    """The bias that each position receives at a source layer: the MLP's output with that layer's update minus without.

    Updates at earlier source layers act in both runs, so that each layer's own share is measured.

    Args:
        adapters: each acts by itself.
        model: the one that they were learned on; left as it was.
        prompts: text, chats or token ids.
        layer: which source layer; needed if there are several.

    Raises:
        ValueError: the adapters don't fit the model, or `layer` is none of theirs.
    """
    hooks.check_model(model)
    adapters = adapters.on(model)
    layer = adapters.source_layer if layer is None else layer
    if layer not in adapters.factors:
        raise ValueError(f"layer={layer} is no source layer of these adapters: choose from {list(adapters.source_layers)}.")
    batch = tokenize(model, prompts)
    own = batch.own
    before = [other for other in adapters.source_layers if other < layer]
    parts = []
    with hooks.frozen(model), torch.no_grad():
        clean = _mlp_out(adapters[:1], model, batch, layer, [])
        for first in range(0, len(adapters), max(1, ROWS_AT_ONCE // len(batch))):
            some = adapters[first : first + max(1, ROWS_AT_ONCE // len(batch))]
            plain = _mlp_out(some, model, batch, layer, before) if before else clean
            parts.append((_mlp_out(some, model, batch, layer, [*before, layer]) - plain).masked_fill(~own[..., None], 0))
    return AdapterEffect(torch.cat(parts), own, layer)


@public
def to_vectors(adapters: SteeringAdapters, model: Any, prompts: Prompts) -> SteeringVectors:
    """The steering vector nearest to each adapter: the mean of the biases it gives, which has the least squared distance to them.

    Returns:
        One vector for each adapter. In the provenance, `explained` is the share of the adapter's squared effect that adding the vector at every
        position reproduces, ``1 - sum_t ||e_t - v||^2 / sum_t ||e_t||^2``, and `explained_by_direction` that of the top singular direction with a
        coefficient of its own at each position, the most that any single direction can.

    Raises:
        ValueError: adapters of several source layers, or of another model.
    """
    measured = effect(adapters, model, prompts)
    biases = measured.values[:, measured.mask]  # [adapter position d_model]
    total = biases.square().sum((1, 2)).clamp(min=1e-30)
    means = biases.mean(1)
    explained = len(biases[0]) * means.square().sum(1) / total
    top = torch.linalg.svdvals(biases)[:, 0].square() / total
    provenance = {
        "method": "to_vectors",
        "explained": [round(share, 6) for share in explained.tolist()],
        "explained_by_direction": [round(share, 6) for share in top.tolist()],
        "adapters": dict(adapters.provenance),
    }
    return SteeringVectors(means, measured.layer, provenance=provenance)


def mean_norms(adapters: SteeringAdapters, model: Any, prompts: Prompts) -> Float[Tensor, " adapter"]:
    """The mean norm of each adapter's update over the prompts' own positions and its source layers."""
    return torch.stack([effect(adapters, model, prompts, layer).norms() for layer in adapters.source_layers]).mean(0)


@public
def random_adapters(like: SteeringAdapters, model: Any, prompts: Prompts | None = None, seed: int = 0) -> SteeringAdapters:
    """The norm-matched control: Gaussian factors of the same rank and normalisation, scaled so that adapter k's update has, over the prompts, the
    mean norm at the source of `like`'s adapter k. Equal norms of the factors alone would be no control.

    Args:
        like: number, shapes, normalisation and update norms are taken from it.
        model: the one that `like` was learned on.
        prompts: those that `like` was learned on; None takes them from its provenance.
        seed: adapter k depends on (seed, k) alone.

    Raises:
        ValueError: no prompts known, or no scale gives that norm (a norm after the MLP bounds what an update can do).
    """
    prompts = fitting_prompts(like, prompts, next(model.parameters()).device)
    how = like.provenance.get("normalization", "frobenius")
    factors = {
        layer: tuple(_random_factor(factor, how, seed, layer, name) for factor, name in zip(pair, "AB", strict=True))
        for layer, pair in like.factors.items()
    }
    provenance = {"method": "random_adapters", "seed": seed, "normalization": how, **objective_of(like), "matched_to": dict(like.provenance)}
    # a norm after the MLP takes an update and its negative differently, so the control has the sign of what it is matched to
    control = SteeringAdapters(factors, torch.where(like.scales < 0, -1, 1).to(like.scales), provenance=provenance).on(model)
    scales = control.scales * scales_for_norms(control, model, prompts, mean_norms(like, model, prompts))
    return SteeringAdapters(factors, scales, provenance=provenance, sites=control.sites)


def fitting_prompts(adapters: SteeringAdapters, prompts: Prompts | None, device: Any = None) -> Prompts:
    """These prompts, or the ones that the adapters were learned on."""
    if prompts is not None:
        return prompts
    rows = adapters.provenance.get("prompt_tokens")
    if not rows:
        raise ValueError("these adapters know no prompts that they were learned on (they were not fitted): give prompts=.")
    return pad([list(row) for row in rows], adapters.provenance.get("prompts", [""] * len(rows)), device=device)


def scales_for_norms(adapters: SteeringAdapters, model: Any, prompts: Prompts, norms: Float[Tensor, " adapter"]) -> Float[Tensor, " adapter"]:
    """The factors by which the adapters' updates have these mean norms: in proportion where nothing bends an update, else bracketed and solved.

    Raises:
        ValueError: no scale gives that norm.
    """
    guesses = norms / mean_norms(adapters, model, prompts)
    reached = mean_norms(adapters * guesses, model, prompts)
    bent = ((reached - norms).abs() > 1e-4 * norms).tolist()
    solved = [_solved(adapters[k], model, prompts, float(norms[k]), guess) if bent[k] else guess for k, guess in enumerate(guesses.tolist())]
    return torch.tensor(solved, dtype=guesses.dtype, device=guesses.device)


def _solved(adapter: SteeringAdapters, model: Any, prompts: Prompts, norm: float, guess: float) -> float:
    def excess(factor: float) -> float:
        return float(mean_norms(adapter * factor, model, prompts)[0]) - norm

    low = high = guess
    while excess(low) > 0:
        low /= 2
    while excess(high) < 0:
        high *= 2
        if high > 1e5 * guess:
            raise ValueError(
                f"no scale gives an update of mean norm {norm:.4g} at the source: the norm after the MLP bounds it. Use a smaller scale."
            )
    return float(brentq(excess, low, high, rtol=1e-5))


def _random_factor(like: Tensor, how: Any, seed: int, layer: int, name: str) -> Tensor:
    rows = gaussian_rows(len(like), like[0].numel(), seed, "random_adapters", layer, name)
    return normalize(rows.view(like.shape).to(like.device), how)


def _mlp_out(
    adapters: SteeringAdapters, model: Any, batch: PromptBatch, layer: int, acting: Sequence[int]
) -> Float[Tensor, "adapter prompt pos d_model"]:
    """What one block adds to the stream by its MLP, float32, while the updates at the layers `acting` are on, for every adapter."""
    seen: list[Tensor] = []
    read = (f"blocks.{layer}.hook_mlp_out", lambda activation, hook: seen.append(activation.float().clone()))
    index = [k for k in range(len(adapters)) for _ in range(len(batch))]
    some = replace(adapters, factors={i: adapters.factors[i] for i in acting}) if acting else None
    active = some.row_hooks(index, some.scales.new_ones(len(index))) if some is not None else []
    blocks.record(model, batch.tokens.repeat(len(adapters), 1), layer, layer + 1, [*active, read])
    return seen[0].unflatten(0, (len(adapters), len(batch)))
