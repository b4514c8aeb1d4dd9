"""How are unsupervised steering adapters learned?  `fit_adapters`: MELBO with a low-rank update of output weights in place of a bias."""

import hashlib
import re
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
from melbo_lens.ascent.states import Point
from melbo_lens.measures.radius import solve_radius
from melbo_lens.methods.fitting import Optimizer, Run, fit, objective_at, settings_of
from melbo_lens.methods.low_rank import LowRank, hidden_activations
from melbo_lens.methods.problem import Problem
from melbo_lens.methods.provenance import remembered
from melbo_lens.models import hooks
from melbo_lens.models.access import Model
from melbo_lens.models.host import Host
from melbo_lens.models.slices import SlicedModel, as_slice, opened
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.sites import WEIGHTS, WeightSite
from melbo_lens.prompts import Positions, Prompts
from melbo_lens.randomness import gaussian_rows

STEPS = {"adamw": 400, "power": 60}
POSITIONS = slice(-3, None)
ALIKE = 0.9  # mean |cosine| between effects from which one is warned


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
    target_hook: str | None = None,
    site: str = "mlp",
) -> SteeringAdapters:
    """Learns low-rank updates of MLP output weights that change a later activation most.

    The MLP output of a source layer gains ``s B A a``, a [d_mlp] the hidden activation that enters W_out, A [rank d_mlp], B [d_model rank] within
    the normalisation. Maximises, as `fit_vectors` does over biases::

        sum over prompts i of ( sum over t in I_i of || Z_i,t(A, B) - Z_i,t(0) || ** p ) ** (1 / q)

    Args:
        model: `HookedTransformer` or `TransformerBridge`; it is left as it was. Or a slice of `slice_model` that begins at the (first) source layer.
        prompts: text, chat messages, a list of either, or token ids [prompt pos]. One is enough.
        source_layer: the block whose MLP is updated, or a list of them: an adapter then has factors at each. Of a slice, None is where it begins.
        target_layer: the change is measured in the stream entering this block (`n_layers`: leaving the last one).
        n_adapters: how many to learn.
        rank: of the update, from 1 to min(d_mlp, d_model).
        scale: s itself. "auto", the default, lets s follow the ascent so that each adapter's update has, over the prompts' positions, a mean norm of
            `radius` (with a norm after the MLP: the mean norm before it that gives random updates that radius after it).
        alpha: instead of `scale`: s = alpha / rank, as published (.35 at rank 512).
        radius: with `scale="auto"`, the mean norm of the updates; "auto", the default, takes the one that `calibrate_radius` gives vectors.
        normalization: "column" (every column of A and of B has unit norm), "frobenius" (each matrix has) or "spectral" (largest singular value 1).
        diversity: above 0, adapter k's objective is divided by 1 + diversity * sum over j < k of cos(d_k, d_j) ** 4, d the changes at the target.
            Without it many adapters find the same change; with .2 eight found more planted behaviours, for 8 % of the objective (README).
        p, q, token_norm, target_hook: as in `fit_vectors`.
        target_positions: where a change counts, in each prompt's own tokens; None: at the last three, or where the slice says.
        optimizer: "adamw" is the published recipe, step by step; "power" makes each factor in turn the maximiser of the objective made linear.
        n_steps: default 400 for "adamw", 60 at most for "power", which stops by tolerance.
        lr: of "adamw", in units of the factors' entries; default 1e-3, as published.
        init: adapters of the same number, shape and layers to start from, instead of random ones.
        restarts: number of random starts from which "power" keeps the best of each adapter.
        batch_size: rows (adapter x prompt) in one forward pass. It bounds memory and changes results by rounding only; None takes about 1 GiB.
        seed: of the starting factors; those of adapter k depend on (seed, k) alone.
        checkpoint: a file to which the state is saved twice a minute and on an interrupt; the same call later goes on from it.
        progress: whether to show a progress bar with the mean objective.
        site: which output weights are updated: the "mlp"'s, or those of the attention ("attn", also on mixtures of experts).

    Returns:
        The adapters, with `history` [step adapter] and every resolved setting in `provenance`.

    Raises:
        TypeError, ValueError: arguments that break a rule, or a model whose MLP can't be updated; said before any optimisation step.
        FloatingPointError: NaN or infinity in the activations.

    Warns:
        UserWarning: the effects are nearly one: their mean |cosine| exceeds .9.

    Source: Mack and Turner, "Mechanistically Eliciting Latent Behaviors in Language Models" (2024).
    """
    run = Run(optimizer, n_steps, lr, restarts, batch_size, seed, checkpoint, progress)
    scale, radius = (None if given == "auto" else given for given in (scale, radius))
    _check_settings(n_adapters, rank, scale, alpha, radius, normalization)
    one_of("site", site, WEIGHTS)
    Objective(p=p, q=q, token_norm=token_norm, diversity=diversity)  # checks them before the model runs
    model = opened(model)
    layers = _layers(model, source_layer)
    host = model.host if isinstance(model, SlicedModel) else model
    target = (model.target_layer, model.target_hook) if isinstance(model, SlicedModel) else (target_layer, target_hook)
    sites = _sites(host, layers, site, rank, *target)
    _check_init(host, sites, init, n_adapters, rank)
    first = None if isinstance(model, SlicedModel) else layers[0]
    sliced = as_slice(model, prompts, first, target_layer, target_positions, target_hook, None, POSITIONS)
    sliced.check_source()
    run, objective = (
        run.resolved(sliced, STEPS),
        objective_at(sliced, p=p, q=q, token_norm=token_norm, diversity=diversity),
    )
    starts = tuple(
        torch.stack(same)
        for same in zip(*(_starts(host, sites, init, n_adapters, rank, seed, r) for r in range(restarts)), strict=True)
    )
    starts, constraint = tuple(x.to(sliced.device) for x in starts), NORMALIZATIONS[normalization]
    with hooks.frozen(host):
        act = LowRank(sliced, sites, hidden_activations(sliced, sites), alpha / rank if alpha is not None else scale)
        rule = "alpha / rank" if alpha is not None else "given"
        if act.scale is None:
            solved = solve_radius(sliced, seed=seed) if radius is None else None
            radius, rule = (
                (solved.radius, f"{solved.rule} {solved.target:.3g}") if solved else (float(radius), "radius given")
            )
            few = tuple(constraint.normalize(x[0, :4]) for x in starts)
            act = replace(act, update_norm=act.update_norm_for(few, radius))
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
            "init": None if init is None else _digest(init),
        }
        problem = Problem(sliced, act, objective.value, run.batch_size, diversity)
        found = fit(problem, starts, constraint, run, settings, f"layer {settings['source_layer']}, rank {rank}")
        scales = act.scales(found.point)
        alike = _alikeness(problem.changes(found.point))
    if alike > ALIKE:
        warnings.warn(
            f"the {n_adapters} adapters change the target alike: the mean |cosine| between their effects is {alike:.3f}. "
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
    """The source layers in order; those of a slice begin where it begins."""
    if source_layer is None and not isinstance(model, SlicedModel):
        raise TypeError(
            "source_layer is missing: give it beside the model, or a slice of slice_model in the model's place."
        )
    layers = model.source_layer if source_layer is None else source_layer
    layers = sorted({layers} if isinstance(layers, int) else set(layers))
    if isinstance(model, SlicedModel) and layers[:1] != [model.source_layer]:
        raise ValueError(
            f"source_layer={source_layer} must begin at layer {model.source_layer}, where the slice begins."
        )
    return layers


def _sites(
    host: Host, layers: Sequence[int], name: str, rank: int, target_layer: int | None, target_hook: str | None
) -> list[WeightSite]:
    if not layers:
        raise ValueError("source_layer is an empty list: name at least one layer.")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < host.n_layers:
            raise ValueError(
                f"source_layer={layer!r} must be an integer from 0 to {host.n_layers - 1}: the model has {host.n_layers} blocks."
            )
    sites = [host.weight_site(layer, name) for layer in layers]
    for layer in layers:
        most = min(host.widths(layer, name))
        if rank > most:
            raise ValueError(
                f"rank={rank} must be from 1 to min(d_mlp, d_model) = {most} of layer {layer}: no update of W_out has more."
            )
        read_in = re.match(r"blocks\.(\d+)\.", target_hook or "")
        if read_in and int(read_in[1]) <= layer and len(layers) > 1:
            raise ValueError(
                f"source layer {layer} must lie before the block of target_hook={target_hook!r}: what it updates is not read there."
            )
        if target_layer is not None and layer + 1 >= target_layer and len(layers) > 1:
            raise ValueError(
                f"source layer {layer} must lie at least two before target_layer={target_layer}: a block has to lie between."
            )
    return sites


def _starts(
    host: Host,
    sites: Sequence[WeightSite],
    init: SteeringAdapters | None,
    n_adapters: int,
    rank: int,
    seed: int,
    restart: int,
) -> Point:
    """The given factors or Gaussian ones; those of adapter k depend on (seed, k), the layer, and on which restart they are for."""
    if init is not None and restart == 0:
        return tuple(factor.cpu() for pair in init.factors.values() for factor in pair)
    point: list[Tensor] = []
    for site in sites:
        d_in, d_model = host.widths(site.layer, site.name)
        for name, shape in (("A", (rank, d_in)), ("B", (d_model, rank))):
            which = (site.layer, name, *([restart] if restart else []))
            point.append(
                gaussian_rows(n_adapters, shape[0] * shape[1], "fit_adapters", seed, *which).view(n_adapters, *shape)
            )
    return tuple(point)


def _check_init(
    host: Host, sites: Sequence[WeightSite], init: SteeringAdapters | None, n_adapters: int, rank: int
) -> None:
    if init is None:
        return
    wanted = {site.layer: (n_adapters, rank, *host.widths(site.layer, site.name)) for site in sites}
    there = {layer: (len(a), a.shape[1], a.shape[2], b.shape[1]) for layer, (a, b) in init.factors.items()}
    if wanted != there or init.site != sites[0].name:
        raise ValueError(
            f"init holds at layer -> (n_adapters, rank, d_in, d_model) {there} of {init.site!r}; asked for are {wanted} of {sites[0].name!r}."
        )


def _digest(init: SteeringAdapters) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for pair in init.factors.values():
        for factor in pair:
            digest.update(factor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _alikeness(changes: Float[Tensor, "adapter prompt pos d_target"]) -> float:
    """The mean |cosine| between the effects of different adapters; 0 for one alone."""
    unit = torch.nn.functional.normalize(changes.flatten(1), dim=1)
    n = len(unit)
    return float(((unit @ unit.T).abs().sum() - n) / (n * (n - 1))) if n > 1 else 0.0


def _check_settings(
    n_adapters: int, rank: int, scale: float | None, alpha: float | None, radius: float | None, normalization: str
) -> None:
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
            f"radius={radius!r} is the mean norm at which the scale is held, and the scale is given: leave one of them out."
        )
    if alpha is not None:
        positive("alpha", alpha, ": the update is multiplied by alpha / rank")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f'normalization={normalization!r} must be "column" (as published), "frobenius" or "spectral".')
