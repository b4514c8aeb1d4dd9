"""What is a found perturbation compared with?  With random ones of its kind and norm, measured at the same place."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from melbo_lens.arguments import public
from melbo_lens.ascent.constraints import NORMALIZATIONS
from melbo_lens.ascent.manifolds import to_sphere
from melbo_lens.measures.source import mean_norms
from melbo_lens.models import hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.sinks import ordinary_positions
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.prompts import Prompts, pad, tokenize
from melbo_lens.randomness import gaussian_rows


@public
def random_vectors(like: SteeringVectors, seed: int = 0) -> SteeringVectors:
    """The norm-matched control: isotropic random directions, vector k with the norm of `like`'s vector k.

    Args:
        like: the control takes its number, width, layer and norms from these vectors.
        seed: random vector k depends on (seed, k) alone.

    Returns:
        As many vectors at the same layer and site.
    """
    values = gaussian_rows(len(like), like.d_model, seed, "random_vectors").to(like.values.device)
    provenance = {"method": "random_vectors", "seed": seed, "matched_to": dict(like.provenance)}
    values = to_sphere(values, like.radii)
    return SteeringVectors(values, like.source_layer, provenance=provenance, site=like.site, objective=like.objective)


@public
def random_adapters(
    like: SteeringAdapters, model: Model, prompts: Prompts | None = None, seed: int = 0
) -> SteeringAdapters:
    """The norm-matched control: Gaussian factors of the same rank and normalisation as those of `like`.

    Random adapter k is scaled so that its update has, over the prompts, the same mean norm at the source as the update
    of `like`'s adapter k. Factors of equal norm alone would be no control, since their updates may have other norms.

    Args:
        like: the control takes its number, shapes, normalisation and update norms from these adapters.
        model: the model that `like` was learned on.
        prompts: the prompts that `like` was learned on; None takes them from its provenance.
        seed: random adapter k depends on (seed, k) alone.

    Returns:
        As many adapters at the same layers and weights.

    Raises:
        ValueError: no prompts are known, or no scale gives that norm (a norm after the MLP bounds an update).
    """
    host = host_of(model)
    prompts = fitting_prompts(like, prompts, host.device)
    how = like.provenance.get("normalization", "frobenius")
    factors = {
        layer: (_random_factor(a, how, seed, layer, "A"), _random_factor(b, how, seed, layer, "B"))
        for layer, (a, b) in like.factors.items()
    }
    provenance = {"method": "random_adapters", "seed": seed, "normalization": how, "matched_to": dict(like.provenance)}
    # A norm after the MLP treats an update and its negative differently, so the control takes the sign of `like`.
    signs = torch.where(like.scales < 0, -1, 1).to(like.scales)
    control = SteeringAdapters(factors, signs, provenance=provenance, sites=like.sites, objective=like.objective).on(
        host
    )
    scales = control.scales * scales_for_norms(control, host, prompts, mean_norms(like, host, prompts))
    return replace(control, scales=scales)


def fitting_prompts(learned: Perturbation, prompts: Prompts | None, device: torch.device | None = None) -> Prompts:
    """These prompts or, if none are given, the ones that the adapters or vectors were learned on.

    Raises:
        ValueError: none are given and they know none.
    """
    if prompts is not None:
        return prompts
    rows = learned.provenance.get("prompt_tokens")
    if not rows:
        raise ValueError(
            f"these {learned.word}s know no prompts that they were learned on (they were not fitted): give prompts=."
        )
    return pad([list(row) for row in rows], learned.provenance.get("prompts", [""] * len(rows)), device=device)


def scales_for_norms(
    adapters: SteeringAdapters, model: Model, prompts: Prompts, norms: Float[Tensor, " adapter"]
) -> Float[Tensor, " adapter"]:
    """The numbers by which the adapters must be multiplied so that their updates have these mean norms.

    They are proportional to the norms, unless a norm after the weights bends an update. Then each is bracketed and
    solved.

    Raises:
        ValueError: no scale gives that norm.
    """
    host = host_of(model)
    batch = tokenize(host, prompts)
    with hooks.frozen(host):
        where = ordinary_positions(host, batch)

    def norms_of(some: SteeringAdapters) -> Float[Tensor, " adapter"]:
        return mean_norms(some, host, batch, where)

    guesses = norms / norms_of(adapters)
    reached = norms_of(adapters * guesses)
    bent = ((reached - norms).abs() > 1e-4 * norms).tolist()
    solved = [
        _solved(adapters[k], norms_of, float(norms[k]), guess) if bent[k] else guess
        for k, guess in enumerate(guesses.tolist())
    ]
    return torch.tensor(solved, dtype=guesses.dtype, device=guesses.device)


def _solved(
    adapter: SteeringAdapters, norms_of: Callable[[SteeringAdapters], Tensor], norm: float, guess: float
) -> float:
    """The number at which one adapter's update has this mean norm, found from a first guess."""

    def excess(factor: float) -> float:
        return float(norms_of(adapter * factor)[0]) - norm

    low = high = guess
    while excess(low) > 0:
        low /= 2
    while excess(high) < 0:
        high *= 2
        if high > 1e5 * guess:
            raise ValueError(
                f"no scale gives an update of mean norm {norm:.4g} at the source: the norm after the MLP bounds it. "
                "Use a smaller scale."
            )
    return float(brentq(excess, low, high, rtol=1e-5))


def _random_factor(like: Tensor, how: str, seed: int, layer: int, name: str) -> Tensor:
    rows = gaussian_rows(len(like), like[0].numel(), seed, "random_adapters", layer, name)
    return NORMALIZATIONS[how].normalize(rows.view(like.shape).to(like.device))


@public
def random_like(
    perturbations: Perturbation, model: Model, prompts: Prompts | None = None, seed: int = 0
) -> Perturbation:
    """The norm-matched control of any kind: `random_vectors`, or `random_adapters` of the same update norms.

    Args:
        perturbations: vectors or adapters.
        model: the model, which is needed for adapters, since their update norms are measured on prompts.
        prompts: adapters that were not fitted are matched on these; fitted adapters know their prompts.
        seed: row k depends on (seed, k) alone.

    Returns:
        Perturbations of the same kind and number.

    Raises:
        TypeError: the perturbations are of another package's kind, which has no control here.
    """
    if isinstance(perturbations, SteeringVectors):
        return random_vectors(perturbations, seed)
    if isinstance(perturbations, SteeringAdapters):
        return random_adapters(
            perturbations, model, None if "prompt_tokens" in perturbations.provenance else prompts, seed
        )
    raise TypeError(
        f"no random control is known for {type(perturbations).__name__}: generate with include_random=False, and "
        "compare with a control of your own."
    )
