"""How are adapters learned without choosing a radius?  As rank-1 updates of unit norm of a band of attention outputs.

This is causal perturbative elicitation (CPE), the successor of the adapters of `fit_adapters` by the same author.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from melbo_lens.arguments import counts, one_of, positive, public
from melbo_lens.ascent.manifolds import unit
from melbo_lens.ascent.objectives import Objective
from melbo_lens.ascent.sogi import Spread, soft_orthogonalize
from melbo_lens.ascent.states import Point
from melbo_lens.methods import checkpoints
from melbo_lens.methods.fitting import Run, fit_swarm, objective_at, settings_of
from melbo_lens.methods.low_rank import LowRank, band_with, starting_factors, weight_sites
from melbo_lens.methods.mean_change import MeanChange
from melbo_lens.methods.problem import Problem
from melbo_lens.methods.provenance import remembered
from melbo_lens.models import hooks
from melbo_lens.models.access import Model
from melbo_lens.models.fidelity import check_source
from melbo_lens.models.slices import SlicedModel
from melbo_lens.models.slicing import as_slice, opened
from melbo_lens.models.targets import target_of
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.prompts import Positions, Prompts
from melbo_lens.randomness import gaussian_rows

POSITIONS = slice(-3, None)
STEPS = {"power": 30}
BAND, TARGET = (0.15, 0.3), 0.53  # shares of the depth: the published bands lie from a tenth to a third of it


@public
def fit_cpe(
    model: Model | SlicedModel,
    prompts: Prompts | None = None,
    source_layers: int | Sequence[int] | None = None,
    target_layer: int | None = None,
    *,
    n_factors: int = 64,
    n_steps: int | None = None,
    scale: float = 1.0,
    objective: Literal["direction", "norm"] = "direction",
    norm: Literal["unit", "torus"] = "unit",
    temperature: float = 1.0,
    n_iterations: int = 10,
    target_positions: Positions | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    trim: bool = False,
) -> SteeringAdapters:
    """Learns rank-1 updates of the attention output weights of a band of layers, each of unit norm.

    Factor i adds ``R b_l (a_l . x_l)`` to the attention output of every layer l of the band, where x_l is what enters
    the output weights (the heads side by side) and a_l and b_l are unit vectors. With Delta(phi_i) the mean over
    prompts and target positions of what the target changes by, the factors climb `sogi` on:

        sum over i of <u_i, Delta(phi_i)>,    u_i a unit direction that follows Delta(phi_i)

    and repel each other (`soft_orthogonalize`), each by the norm of its gradient. There is no radius to choose: unit
    norms at R = 1 act at the scale of the weights themselves.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, which is left as it was, or a slice of `slice_model` that
            begins at the first source layer or before it.
        prompts: text, chat messages, a list of either, or token ids [prompt pos]. One prompt is enough.
        source_layers: the blocks whose attention output weights are updated; None takes those from .15 to .3 of the
            depth, or with a slice the block where it begins. In a hybrid, only blocks with full attention have such
            weights: None takes those among them, and others are refused.
        target_layer: the change is measured in the stream that enters this block; None takes .53 of the depth.
        n_factors: how many factors to learn; published runs take 256 to 512.
        n_steps: the number of steps, 30 by default; each is a forward and a backward pass of the slice for every factor
            and prompt.
        scale: R; published strengths peak at 1.
        objective: "direction" takes each gradient along the u of the step before, as published; "norm" along the
            present change, which makes it MELBO's objective of the mean change.
        norm: how factors are compared: "unit" scales the whole factor to norm 1, as the public code does; "torus" every
            a_l and b_l, as the paper does, so that only near duplicates repel each other.
        temperature: of the repulsion; lower ones concentrate on the most similar factors. Of two factors each is the
            other's whole neighbourhood, and they end as one and the same update: ask for one, or for three and more.
        n_iterations: of the repulsion, in each step; 0 turns it off.
        target_positions: where a change counts, in each prompt's own tokens. None means the last three positions, or
            the positions of the slice.
        batch_size: the number of rows (factor x prompt) in one forward pass; None takes about 1 GiB.
        seed: the seed of the starting factors; those of factor i depend on (seed, i) alone.
        checkpoint: a file to which the state is saved twice a minute and on an interrupt.
        progress: whether to show a progress bar.
        trim: whether the weights outside the slice leave the accelerator during the ascent, to make room; they are put
            back afterwards.

    Returns:
        Adapters of rank 1 at the site "attn", whose `history` [step factor] holds ``<u, Delta>``.

    Raises:
        TypeError, ValueError: arguments break a rule, or a block has no attention output weights; this is raised before
            any step.
        FloatingPointError: the activations hold NaN or infinity.

    Source: Mack, Panickssery and Turner, "Causal Perturbative Elicitation" (2026). As in its public code, and unlike
    its equation 5, there is no penalty in the objective and no strength alpha, positions are averaged, and the factors
    start from the normalised gradient at random ones.
    """
    asked = Run("power", n_steps, None, 1, batch_size, seed, checkpoint, progress, trim)
    counts(n_factors=n_factors)
    positive("scale", scale, ": unit factors act at R = 1")
    positive("temperature", temperature, ": lower ones concentrate on the most similar factors")
    one_of("objective", objective, ("direction", "norm"))
    one_of("norm", norm, ("unit", "torus"))
    if isinstance(n_iterations, bool) or not isinstance(n_iterations, int) or n_iterations < 0:
        raise ValueError(f"n_iterations={n_iterations!r} must be a whole number, 0 for no repulsion.")
    model = opened(model)
    source_layers = [source_layers] if isinstance(source_layers, int) else source_layers
    if isinstance(model, SlicedModel):
        host, usual, target = model.host, [model.source_layer], (model.target_layer, model.target_hook)
    else:
        host, n = model, model.n_layers
        band = range(round(BAND[0] * n), max(round(BAND[1] * n), round(BAND[0] * n) + 1))
        usual = band_with(host, "attn", band, round(TARGET * n))
        last = max([n for n in (source_layers or usual) if isinstance(n, int)], default=0)
        target = (min(max(round(TARGET * n), last + 2), n) if target_layer is None else target_layer, None)
    layers = sorted(set(usual if source_layers is None else source_layers))
    sites = weight_sites(host, layers, "attn", 1, *target)
    if isinstance(model, SlicedModel):
        if layers[0] < model.source_layer:
            raise ValueError(
                f"source_layers={layers} must not lie before layer {model.source_layer}, where the slice begins."
            )
        read = None if model.target_layer is not None else model.target_hook
        target_of(host, layers[-1], model.target_layer, read)  # refuses a band that reaches past the target
        sliced = as_slice(model, prompts, None, target_layer, target_positions, None, None)
    else:
        sliced = as_slice(model, prompts, layers[0], target[0], target_positions, None, None, POSITIONS)
    check_source(sliced)
    run = asked.resolved(sliced, STEPS)
    aim = objective_at(sliced, p=1, q=1)
    settings = settings_of("fit_cpe", sliced, aim, run) | {
        "optimizer": "sogi",
        "source_layer": layers[0] if len(layers) == 1 else layers,
        "site": "attn",
        "source_hook": [[one.hidden_hook, one.output_hook] for one in sites],
        "n_factors": n_factors,
        "rank": 1,
        "scale": scale,
        "objective": objective,
        "norm": norm,
        "temperature": temperature,
        "n_iterations": n_iterations,
        "normalization": "frobenius",  # of matrices of rank 1: unit vectors
    }
    with hooks.frozen(host):
        act = LowRank(sliced, sites, [], scale)
        problem = Problem(sliced, act, Objective(p=1, q=1).value, run.batch_size, minus=act.minus)
        changes = MeanChange(problem)
        random = tuple(x[0].to(sliced.device) for x in starting_factors(host, sites, None, n_factors, 1, seed, 1))
        targets = unit(gaussian_rows(n_factors, sliced.target.shape[-1], "fit_cpe", seed).to(sliced.device))
        start = _unit_vectors(random)
        if not checkpoints.settings(checkpoint):  # otherwise the ascent goes on from its own point
            _, gradient = changes(start, targets)
            start = _unit_vectors(gradient)
        spread = repulsion(norm, temperature, n_iterations)
        label = f"layers {layers[0]} to {layers[-1]}"
        found, _ = fit_swarm(changes, start, targets, spread, objective == "direction", run, settings, label)
    factors = {layer: (found.point[2 * i], found.point[2 * i + 1]) for i, layer in enumerate(layers)}
    scales = found.point[0].new_full((n_factors,), scale)
    where = {one.layer: one for one in sites}
    return remembered(SteeringAdapters(factors, scales, found.history, found.provenance, where, aim), host)


def repulsion(norm: str, temperature: float, n_iterations: int) -> Spread:
    """Returns the step from gradients to the next factors: unit vectors that were softly orthogonalised."""

    def spread(gradient: Point) -> Point:
        size = torch.cat([x.flatten(1) for x in gradient], dim=1).norm(dim=1)
        log_weights = size.clamp(min=torch.finfo(size.dtype).tiny).log()
        point = _unit_vectors(gradient)

        def project(rows: Tensor) -> Tensor:
            return unit(rows) if norm == "unit" else _flat(_unit_vectors(_shaped(rows, point)))

        if not n_iterations:
            return point
        rows = soft_orthogonalize(
            _flat(gradient if norm == "unit" else point), log_weights, project, n_iterations, temperature
        )
        return _unit_vectors(_shaped(rows, point))

    return spread


def _unit_vectors(point: Point) -> Point:
    """Scales every a_l [row 1 d_in] and b_l [row d_model 1] to unit norm."""
    return tuple(unit(x.flatten(1)).view_as(x) for x in point)


def _flat(point: Point) -> Tensor:
    return torch.cat([x.flatten(1) for x in point], dim=1)


def _shaped(rows: Tensor, like: Point) -> Point:
    parts = rows.split([x[0].numel() for x in like], dim=1)
    return tuple(part.reshape(x.shape) for part, x in zip(parts, like, strict=True))
