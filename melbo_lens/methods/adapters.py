"""How are unsupervised steering adapters learned?  By MELBO, with a low-rank update of weights in place of a bias."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.arguments import counts, one_of, positive, public
from melbo_lens.ascent.constraints import NORMALIZATIONS, Normalization
from melbo_lens.ascent.objectives import Objective, TokenNorm
from melbo_lens.methods.automatic import resumed_or_automatic
from melbo_lens.methods.fitting import Optimizer, Run, fit, objective_at, settings_of
from melbo_lens.methods.low_rank import (
    LowRank,
    check_init,
    digest_of_factors,
    hidden_activations,
    starting_factors,
    weight_sites,
)
from melbo_lens.methods.problem import Problem
from melbo_lens.methods.provenance import remembered
from melbo_lens.models import hooks
from melbo_lens.models.access import Model
from melbo_lens.models.fidelity import check_source
from melbo_lens.models.host import Host
from melbo_lens.models.slices import SlicedModel
from melbo_lens.models.slicing import as_slice, opened
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.sites import WEIGHTS
from melbo_lens.prompts import Positions, Prompts

STEPS = {"adamw": 400, "power": 60}
POSITIONS = slice(-3, None)
ALIKE = 0.9  # a mean |cosine| between the effects above this gives a warning


@public
def fit_adapters(
    model: Model | SlicedModel,
    prompts: Prompts | None = None,
    source_layer: int | Sequence[int] | None = None,
    target_layer: int | None = None,
    *,
    n_adapters: int = 16,
    rank: int = 64,
    scale: float | Literal["auto"] | None = None,
    alpha: float | None = None,
    radius: float | Literal["auto"] | None = None,
    normalization: Normalization = "column",
    diversity: float = 0.0,
    p: float = 2,
    q: float = 2,
    target_positions: Positions | None = None,
    optimizer: Optimizer = "adamw",
    n_steps: int | None = None,
    lr: float | None = None,
    init: SteeringAdapters | None = None,
    restarts: int = 1,
    token_norm: TokenNorm = "d_model",
    batch_size: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    trim: bool = False,
    target_hook: str | None = None,
    site: str = "mlp",
) -> SteeringAdapters:
    """Learns low-rank updates of output weights that change a later activation most.

    At each position the MLP output of a source layer gains ``s B A a``. Here a [d_mlp] is the hidden activation that
    enters W_out, and A [rank d_mlp] and B [d_model rank] obey the normalisation. Maximises, as `fit_vectors` does:

        sum over prompts i of ( sum over t in I_i of || Z_i,t(A, B) - Z_i,t(0) || ** p ) ** (1 / q)

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, which is left as it was, or a slice of `slice_model` that
            begins at the first source layer.
        prompts: text, chat messages, a list of either, or token ids [prompt pos]. One prompt is enough.
        source_layer: the block whose weights are updated, or a list of blocks; an adapter then has factors at each of
            them. With a slice, None means the block where it begins.
        target_layer: the change is measured in the stream that enters this block; `n_layers` means the stream that
            leaves the last block.
        n_adapters: how many adapters to learn.
        rank: the rank of each update, from 1 to min(d_mlp, d_model).
        scale: the scale s itself. "auto", the default, lets s follow the ascent, so that each adapter's update has over
            the prompts' positions a mean norm of `radius`. In a model with a norm after the MLP, s keeps the mean norm
            before it at which random updates have that radius after it.
        alpha: sets s = alpha / rank in place of `scale`, as published (.35 at rank 512).
        radius: with `scale="auto"`, the mean norm of the updates. "auto", the default, takes 0.65 of the edge
            that `calibrate_radius` finds for vectors, halved until a norm after the weights, if any, lets it through.
        normalization: "column" (every column of A and of B has unit norm), "frobenius" (each matrix has unit norm) or
            "spectral" (the largest singular value of each matrix is 1).
        diversity: above 0, adapter k's objective is divided by 1 + diversity * sum over j < k of cos(d_k, d_j) ** 4,
            where d are the changes at the target. Without it many adapters find the same change. With .2, eight
            adapters found more planted behaviours, at a cost of 8 % of the objective (docs/results.md).
        p, q, token_norm, target_hook: as in `fit_vectors`.
        target_positions: where a change counts, in each prompt's own tokens. None means the last three positions, or
            the positions of the slice.
        optimizer: "adamw" is the published recipe, step by step. "power" replaces each factor in turn by the maximiser
            of the linearised objective.
        n_steps: by default 400 for "adamw", and at most 60 for "power", which stops by tolerance.
        lr: the step size of "adamw" in units of the factors' entries; 1e-3 by default, as published.
        init: adapters of the same number, shape and layers to start from, instead of random ones.
        restarts: the number of random starts from which "power" keeps the best of each adapter.
        batch_size: the number of rows (adapter x prompt) in one forward pass. It bounds memory and changes results by
            rounding only; None takes about 1 GiB.
        seed: the seed of the starting factors; those of adapter k depend on (seed, k) alone.
        checkpoint: a file to which the state is saved twice a minute and on an interrupt. The same call, made later,
            goes on from it.
        progress: whether to show a progress bar with the mean objective.
        trim: whether the weights outside the slice leave the accelerator during the ascent, to make room; they are put
            back afterwards.
        site: which output weights are updated: those of the "mlp" or of the attention ("attn", which also works on
            mixtures of experts).

    Returns:
        The adapters, with `history` [step adapter] and every resolved setting in `provenance`.

    Raises:
        TypeError, ValueError: arguments break a rule, or the model's weights can't be updated; this is raised before
            any optimisation step.
        FloatingPointError: the activations hold NaN or infinity.

    Warns:
        UserWarning: the effects are nearly one: their mean |cosine| exceeds .9.

    Source: Mack and Turner, "Mechanistically Eliciting Latent Behaviors in Language Models" (2024).
    """
    asked = Run(optimizer, n_steps, lr, restarts, batch_size, seed, checkpoint, progress, trim)
    scale, radius = (None if given == "auto" else given for given in (scale, radius))
    _check_settings(n_adapters, rank, scale, alpha, radius, normalization)
    one_of("site", site, WEIGHTS)
    Objective(p=p, q=q, token_norm=token_norm, diversity=diversity)  # checks them before the model runs
    model = opened(model)
    layers = _layers(model, source_layer)
    if isinstance(model, SlicedModel):
        host, target = model.host, (model.target_layer, model.target_hook)
    else:
        host, target = model, (target_layer, target_hook)
    sites = weight_sites(host, layers, site, rank, *target)
    check_init(host, sites, init, n_adapters, rank)
    first = None if isinstance(model, SlicedModel) else layers[0]
    sliced = as_slice(model, prompts, first, target_layer, target_positions, target_hook, None, POSITIONS)
    check_source(sliced)
    run = asked.resolved(sliced, STEPS)
    objective = objective_at(sliced, p=p, q=q, token_norm=token_norm, diversity=diversity)
    starts = starting_factors(host, sites, init, n_adapters, rank, seed, restarts)
    starts, constraint = tuple(x.to(sliced.device) for x in starts), NORMALIZATIONS[normalization]
    with hooks.frozen(host):
        act = LowRank(sliced, sites, hidden_activations(sliced, sites), alpha / rank if alpha is not None else scale)
        rule = "alpha / rank" if alpha is not None else "given"
        if act.scale is None:
            few = tuple(constraint.normalize(x[0, :4]) for x in starts)
            if radius is None:
                radius, rule = resumed_or_automatic(sliced, seed, checkpoint, "scale_rule")
                radius, rule, update_norm = act.reachable(few, radius, rule)
            else:
                radius, rule = float(radius), "radius given"
                update_norm = act.update_norm_for(few, radius)
            act = replace(act, update_norm=update_norm)
        settings = settings_of("fit_adapters", sliced, objective, run) | {
            "source_layer": layers[0] if len(layers) == 1 else layers,
            "site": site,
            "source_hook": [[one.hidden_hook, one.output_hook] for one in sites],
            "n_adapters": n_adapters,
            "rank": rank,
            "scale": "auto" if act.scale is None else act.scale,
            "scale_rule": rule,
            "alpha": alpha,
            "radius": radius,
            "update_norm": act.update_norm,
            "normalization": normalization,
            "init": None if init is None else digest_of_factors(init),
        }
        problem = Problem(sliced, act, objective.value, run.batch_size, diversity, act.minus)
        found = fit(problem, starts, constraint, run, settings, f"layer {settings['source_layer']}, rank {rank}")
        scales = act.scales(found.point)
        alike = _alikeness(problem.changes(found.point))
    if alike > ALIKE:
        warnings.warn(
            f"the {n_adapters} adapters change the target alike: the mean |cosine| between their effects is "
            f"{alike:.3f}. "
            "Set diversity above 0 (.2 is a good start), or ask for fewer.",
            stacklevel=2,
        )
    measured = {
        "effect_cosine": round(alike, 4),
        "scales": [float(f"{one:.6g}") for one in scales.tolist()],
        "update_norms": [float(f"{one:.6g}") for one in (scales * act.norms(found.point)).tolist()],
    }
    factors = {layer: (found.point[2 * i], found.point[2 * i + 1]) for i, layer in enumerate(layers)}
    provenance = found.provenance | measured
    adapters = SteeringAdapters(
        factors, scales, found.history, provenance, {one.layer: one for one in sites}, objective
    )
    return remembered(adapters, host)


def _layers(model: SlicedModel | Host, source_layer: int | Sequence[int] | None) -> list[int]:
    """The source layers in order; with a slice, the first of them must be the block where the slice begins."""
    if source_layer is None:
        if not isinstance(model, SlicedModel):
            raise TypeError(
                "source_layer is missing: give it beside the model, or a slice of slice_model in the model's place."
            )
        source_layer = model.source_layer
    layers = sorted({source_layer} if isinstance(source_layer, int) else set(source_layer))
    if isinstance(model, SlicedModel) and layers[:1] != [model.source_layer]:
        raise ValueError(
            f"source_layer={source_layer} must begin at layer {model.source_layer}, where the slice begins."
        )
    return layers


def _alikeness(changes: Float[Tensor, "adapter prompt pos d_target"]) -> float:
    """The mean |cosine| between the effects of different adapters; 0 for a single adapter."""
    unit = torch.nn.functional.normalize(changes.flatten(1), dim=1)
    n = len(unit)
    return float(((unit @ unit.T).abs().sum() - n) / (n * (n - 1))) if n > 1 else 0.0


def _check_settings(
    n_adapters: int, rank: int, scale: float | None, alpha: float | None, radius: float | None, normalization: str
) -> None:
    """Refuses settings that break a rule; in `scale` and `radius` None stands for "auto"."""
    counts(n_adapters=n_adapters, rank=rank)
    if scale is not None and alpha is not None:
        raise ValueError(
            f"scale={scale!r} and alpha={alpha!r} say the same thing (scale = alpha / rank): give one of them."
        )
    for name, value in (("scale", scale), ("radius", radius)):
        if value is not None:
            positive(name, value, ', or "auto" to calibrate it')
    if radius is not None and (alpha is not None or scale is not None):
        raise ValueError(
            f"radius={radius!r} is the mean norm at which the scale is held, and the scale is given: leave one of "
            "them out."
        )
    if alpha is not None:
        positive("alpha", alpha, ": the update is multiplied by alpha / rank")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f'normalization={normalization!r} must be "column" (as published), "frobenius" or "spectral".')
