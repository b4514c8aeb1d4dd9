"""How are unsupervised steering adapters learned?  `fit_adapters`: MELBO with a low-rank update of MLP output weights in place of a bias."""

import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from melbo_lens import hooks
from melbo_lens.access import host_of
from melbo_lens.adapters import SteeringAdapters
from melbo_lens.arguments import counts, one_of, public
from melbo_lens.calibration import solve_radius
from melbo_lens.controls import scales_for_norms
from melbo_lens.factors import Normalization, Point, adamw, alternate, normalize, point_of
from melbo_lens.host import Host
from melbo_lens.methods import checkpoints
from melbo_lens.methods.adapter_gradients import AdapterObjective
from melbo_lens.methods.gradients import default_batch_size
from melbo_lens.methods.provenance import describe, remembered
from melbo_lens.objectives import TokenNorm, check_exponents
from melbo_lens.optimization import State
from melbo_lens.prompts import Positions, Prompts, positions_text
from melbo_lens.randomness import gaussian_rows
from melbo_lens.sites import WEIGHTS, WeightSite, flat_heads
from melbo_lens.sliced_model import SlicedModel, slice_model

DEFAULT_STEPS = {"adamw": 400, "power": 60}
DEFAULT_LR = 1e-3
ALIKE = 0.9  # mean |cosine| between effects from which one is warned
Optimizer = Literal["adamw", "power"]


@public
def fit_adapters(
    model: Any,
    prompts: Prompts,
    source_layer: int | Sequence[int],
    target_layer: int | None = None,
    n_adapters: int = 16,
    rank: int = 64,
    scale: float | Literal["auto"] | None = None,
    alpha: float | None = None,
    radius: float | Literal["auto"] | None = None,
    normalization: Normalization = "column",
    diversity: float = 0.0,
    p: float = 2,
    q: float = 2,
    target_positions: Positions = slice(-3, None),
    optimizer: Optimizer = "adamw",
    n_steps: int | None = None,
    lr: float | None = None,
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
        model: `HookedTransformer` or `TransformerBridge`; it is left as it was.
        prompts: text, chat messages, a list of either, or token ids [prompt pos]. One is enough.
        source_layer: the block whose MLP is updated, or a list of them: an adapter then has factors at each.
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
        p, q, token_norm, target_positions, target_hook: as in `fit_vectors`.
        optimizer: "adamw" is the published recipe, step by step; "power" makes each factor in turn the maximiser of the objective made linear.
        n_steps: default 400 for "adamw", 60 at most for "power", which stops by tolerance.
        lr: of "adamw", in units of the factors' entries; default 1e-3, as published.
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
    began = time.monotonic()
    _check_settings(n_adapters, rank, scale, alpha, radius, normalization, diversity, optimizer, n_steps, lr, batch_size)
    check_exponents(p, q, token_norm)
    host = host_of(model)
    one_of("site", site, WEIGHTS)
    layers = sorted({source_layer} if isinstance(source_layer, int) else set(source_layer))
    sites = _sites(host, layers, site, rank, target_layer, target_hook)
    sliced = slice_model(host, prompts, layers[0], target_layer, target_positions, target_hook)
    sliced.check_source()
    start = _starts(host, sites, n_adapters, rank, seed, sliced.device)
    with hooks.frozen(host):
        hidden = _hidden(sliced, sites)
        given = alpha / rank if alpha is not None else None if scale in (None, "auto") else float(scale)
        rows = batch_size or default_batch_size(sliced)
        objective = AdapterObjective(sliced, sites, hidden, p, q, token_norm, rows, given, diversity=diversity)
        rule = "alpha / rank" if alpha is not None else "given"
        if given is None:
            solved = None if radius not in (None, "auto") else solve_radius(sliced, seed=seed)
            radius, rule = (float(radius), "radius given") if solved is None else (solved.radius, f"{solved.rule} {solved.target:.3g}")
            objective = replace(objective, update_norm=_update_norm(objective, start, normalization, radius))
        settings = {
            "method": "fit_adapters",
            **describe(sliced),
            "source_layer": layers[0] if len(layers) == 1 else layers,
            "site": site,
            "source_hook": [[one.hidden_hook, one.output_hook] for one in sites],
            "n_adapters": n_adapters,
            "rank": rank,
            "scale": "auto" if given is None else given,
            "scale_rule": rule,
            "alpha": alpha,
            "radius": radius,
            "update_norm": objective.update_norm,
            "normalization": normalization,
            "diversity": diversity,
            "p": p,
            "q": q,
            "token_norm": token_norm,
            "target_positions": positions_text(target_positions),
            "optimizer": optimizer,
            "n_steps": n_steps or DEFAULT_STEPS[optimizer],
            "lr": (lr or DEFAULT_LR) if optimizer == "adamw" else None,
            "batch_size": rows,
            "seed": seed,
        }
        state = _ascend(objective, start, settings, checkpoint, progress)
        point = point_of(state)
        scales = objective.scales(point)
        alike = _alikeness(objective.changes(point, scales))
    steps = int(state["step"]) - 1
    if alike > ALIKE:
        warnings.warn(
            f"the {n_adapters} adapters change the target alike: the mean |cosine| between their effects is {alike:.3f}. "
            "Set diversity above 0 (.2 is a good start), or ask for fewer.",
            stacklevel=2,
        )
    settings |= {
        "effect_cosine": round(alike, 4),
        "scales": [float(f"{one:.6g}") for one in scales.tolist()],
        "update_norms": [float(f"{one:.6g}") for one in (scales * objective.norms(point)).tolist()],
        "status": _status(state, settings, steps),
        "seconds": round(time.monotonic() - began, 3),
    }
    factors = {layer: (point[2 * i], point[2 * i + 1]) for i, layer in enumerate(layers)}
    return remembered(SteeringAdapters(factors, scales, state["history"][: steps + 1], settings, {one.layer: one for one in sites}), host)


def _sites(host: Host, layers: Sequence[int], name: str, rank: int, target_layer: int | None, target_hook: str | None) -> list[WeightSite]:
    if not layers:
        raise ValueError("source_layer is an empty list: name at least one layer.")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < host.n_layers:
            raise ValueError(f"source_layer={layer!r} must be an integer from 0 to {host.n_layers - 1}: the model has {host.n_layers} blocks.")
    sites = [host.weight_site(layer, name) for layer in layers]
    for layer in layers:
        most = min(host.widths(layer, name))
        if rank > most:
            raise ValueError(f"rank={rank} must be from 1 to min(d_mlp, d_model) = {most} of layer {layer}: no update of W_out has more.")
        read_in = re.match(r"blocks\.(\d+)\.", target_hook or "")
        if read_in and int(read_in[1]) <= layer and len(layers) > 1:
            raise ValueError(f"source layer {layer} must lie before the block of target_hook={target_hook!r}: what it updates is not read there.")
        if target_layer is not None and layer + 1 >= target_layer and len(layers) > 1:
            raise ValueError(f"source layer {layer} must lie at least two before target_layer={target_layer}: a block has to lie between.")
    return sites


def _starts(host: Host, sites: Sequence[WeightSite], n_adapters: int, rank: int, seed: int, device: torch.device) -> Point:
    """Gaussian factors; those of adapter k depend on (seed, k) and the layer alone."""
    point: list[Tensor] = []
    for site in sites:
        d_in, d_model = host.widths(site.layer, site.name)
        for name, shape in (("A", (rank, d_in)), ("B", (d_model, rank))):
            rows = gaussian_rows(n_adapters, shape[0] * shape[1], "fit_adapters", seed, site.layer, name)
            point.append(rows.view(n_adapters, *shape).to(device))
    return tuple(point)


def _hidden(sliced: SlicedModel, sites: Sequence[WeightSite]) -> list[Float[Tensor, "position d_mlp"]]:
    """The clean hidden activations at each site, at the prompts' own positions."""
    seen: dict[int, Tensor] = {}

    def read(layer: int):
        return lambda activation, hook: seen.update({layer: flat_heads(activation).float()[sliced.batch.own]})

    with torch.no_grad():
        sliced.change_under([(site.hidden_hook, read(site.layer)) for site in sites], sliced.everyone)
    return [seen[site.layer] for site in sites]


def _update_norm(objective: AdapterObjective, start: Point, how: Normalization, radius: float) -> float:
    """The radius; with a norm after the MLP, the norm before it at which random updates have the radius after it."""
    few = tuple(normalize(factor[:4], how) for factor in start)
    factors = {site.layer: (few[2 * i], few[2 * i + 1]) for i, site in enumerate(objective.sites)}
    random = SteeringAdapters(factors, few[0].new_ones(len(few[0])), sites={site.layer: site for site in objective.sites})
    norms = random.scales.new_full((len(random),), radius)
    scales = scales_for_norms(random, objective.sliced.host, objective.sliced.batch, norms)
    return float((scales * objective.norms(few)).mean())


def _ascend(objective: AdapterObjective, start: Point, settings: dict, checkpoint: Any, progress: bool) -> State:
    n_steps, how = settings["n_steps"], settings["normalization"]
    saved = checkpoints.resume(checkpoint, settings)
    saved = None if saved is None else {name: tensor.to(start[0].device) for name, tensor in saved.items()}
    if settings["optimizer"] == "adamw":
        states = adamw(objective, start, how, n_steps, settings["lr"], saved)
    else:
        states = alternate(objective, start, how, n_steps, state=saved)
    label = f"layer {settings['source_layer']}, rank {settings['rank']}"
    with tqdm(total=n_steps + 1, desc=label, unit="step", disable=not progress) as bar:
        return checkpoints.run(states, checkpoint, settings, bar, saved)


def _alikeness(changes: Float[Tensor, "adapter prompt pos d_target"]) -> float:
    """The mean |cosine| between the effects of different adapters; 0 for one alone."""
    unit = torch.nn.functional.normalize(changes.flatten(1), dim=1)
    n = len(unit)
    return float(((unit @ unit.T).abs().sum() - n) / (n * (n - 1))) if n > 1 else 0.0


def _status(state: State, settings: dict, steps: int) -> str:
    if settings["optimizer"] == "adamw":
        return f"ran all {steps} steps; the last iterate is kept"
    if int(state["settled"]):
        return f"settled after {steps} steps: no score had risen by .1 % in ten"
    return f"stopped after {steps} steps, as n_steps says; each adapter is the best point seen"


def _check_settings(
    n_adapters: int,
    rank: int,
    scale: float | str | None,
    alpha: float | None,
    radius: float | str | None,
    normalization: str,
    diversity: float,
    optimizer: str,
    n_steps: int | None,
    lr: float | None,
    batch_size: int | None,
) -> None:
    counts(n_adapters=n_adapters, rank=rank, n_steps=n_steps, batch_size=batch_size)
    if scale is not None and alpha is not None:
        raise ValueError(f"scale={scale!r} and alpha={alpha!r} say the same thing (scale = alpha / rank): give one of them.")
    if scale not in (None, "auto") and (isinstance(scale, str) or not 0 < scale < float("inf")):
        raise ValueError(f'scale={scale!r} must be a positive, finite number, or "auto" to calibrate it.')
    if radius not in (None, "auto") and (isinstance(radius, str) or not 0 < radius < float("inf")):
        raise ValueError(f'radius={radius!r} must be a positive, finite number, or "auto" to calibrate it.')
    if radius is not None and (alpha is not None or scale not in (None, "auto")):
        raise ValueError(f"radius={radius!r} is the mean norm at which the scale is held, and the scale is given: leave one of them out.")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha!r} must be a positive, finite number: the update is multiplied by alpha / rank.")
    if normalization not in ("column", "frobenius", "spectral"):
        raise ValueError(f'normalization={normalization!r} must be "column" (as published), "frobenius" or "spectral".')
    if not 0 <= diversity < float("inf"):
        raise ValueError(f"diversity={diversity!r} must be 0 (off) or a positive, finite number.")
    if optimizer not in DEFAULT_STEPS:
        raise ValueError(f'optimizer={optimizer!r} must be "adamw" (the published recipe) or "power" (fast).')
    if lr is not None and optimizer != "adamw":
        raise ValueError(f'lr={lr} has no meaning for optimizer="power", which takes no step size: leave it out, or use "adamw".')
    if lr is not None and not 0 < lr < float("inf"):
        raise ValueError(f"lr={lr} must be a positive, finite number.")
