"""Which directions does the slice amplify most?  The top singular vectors of its Jacobian ("power steering")."""

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.arguments import counts, positive, public
from melbo_lens.ascent.manifolds import linalg, orthonormalize, unit
from melbo_lens.ascent.objectives import Objective
from melbo_lens.methods import derivatives
from melbo_lens.methods.automatic import automatic
from melbo_lens.methods.fitting import Run, ended, objective_at, settings_of
from melbo_lens.methods.mean_change import mean_weights
from melbo_lens.methods.problem import Problem, bias
from melbo_lens.models import hooks
from melbo_lens.models.access import Model
from melbo_lens.models.slices import SlicedModel
from melbo_lens.models.slicing import as_slice, opened
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.progress import Progress
from melbo_lens.prompts import Positions, Prompts
from melbo_lens.randomness import gaussian_rows

POSITIONS = slice(-3, None)
SPARE = 8  # so many more rows are iterated than asked for, since the last ones converge slowly


@public
def fit_jacobian(
    model: Model | SlicedModel,
    prompts: Prompts | None = None,
    source_layer: int | None = None,
    target_layer: int | None = None,
    *,
    n_vectors: int = 12,
    radius: float | Literal["auto"] = "auto",
    target_positions: Positions | None = None,
    target_hook: str | None = None,
    site: str | None = None,
    n_steps: int | None = None,
    tolerance: float = 1e-4,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    trim: bool = False,
) -> SteeringVectors:
    """Finds the directions that the slice amplifies most, to first order.

    J is the Jacobian at 0 of the target at the target positions of all prompts, stacked. Its top right singular vectors
    are found by block power iteration on J^T J with Rayleigh-Ritz: ``V <- orthonormalised J^T J V``, and in the span of
    V the eigenvectors of ``(J V)^T (J V)`` are exact.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, or a slice of `slice_model`, as in `fit_vectors`.
        prompts: text, chat messages, a list of either, or token ids [prompt pos].
        source_layer: the block at whose `site` the vectors are added, at every position.
        target_layer: the change is measured in the stream that enters this block.
        n_vectors: how many singular vectors, at most d_model.
        radius: the norm at which the vectors are returned; "auto" as in `fit_vectors`.
        n_steps: the largest number of steps, 30 by default, each three passes back through the slice.
        tolerance: the iteration ends when no singular value that is asked for changes by more than this share.
        target_positions: as in `fit_vectors`, but the last three by default.
        target_hook, site, batch_size, seed, progress, trim: as in `fit_vectors`.

    Returns:
        The vectors, the largest singular value first, with `targets`, the unit mean change that each makes to first
        order. The provenance has "singular_values"; "gaps", by how much of itself each exceeds the next one; and
        "degenerate", groups of vectors whose values differ by less than 1 %: within a group any rotation is as good.
        The sign of a vector means nothing: steer with both.

    Raises:
        TypeError, ValueError: arguments break a rule; this is raised before any step.
        FloatingPointError: the activations hold NaN or infinity.
    """
    asked = Run("power", n_steps, None, 1, batch_size, seed, None, progress, trim)
    counts(n_vectors=n_vectors)
    positive("tolerance", tolerance, "")
    if radius != "auto":
        positive("radius", radius, ', or "auto" to calibrate one')
    model = opened(model)
    if n_vectors > model.d_model:
        raise ValueError(
            f"n_vectors={n_vectors} singular vectors don't exist: the Jacobian has d_model={model.d_model} columns."
        )
    sliced = as_slice(model, prompts, source_layer, target_layer, target_positions, target_hook, site, POSITIONS)
    run = asked.resolved(sliced, {"power": 30})
    aim = objective_at(sliced)
    with hooks.frozen(sliced.host):
        exact = sliced.in_float32()
        n = min(n_vectors + SPARE, model.d_model)
        start = gaussian_rows(n, model.d_model, "fit_jacobian", seed).to(sliced.device)
        R = automatic(sliced, seed).radius if radius == "auto" else float(radius)
        with run.trimmed(sliced):
            v, along, values, steps = top(exact, start, n_vectors, run.n_steps, tolerance, run.batch_size, progress)
        settings = settings_of("fit_jacobian", sliced, aim, run) | {
            "optimizer": "rayleigh-ritz",
            "n_vectors": n_vectors,
            "tolerance": tolerance,
            "radius": R,
            "radius_rule": "auto" if radius == "auto" else "given",
        }
        problem = Problem(sliced, bias(sliced), Objective().value, run.batch_size)
        found = ended(problem, derivatives.reached(R * v), 0, run, settings, f"{steps} steps")
    asked_for = values[:n_vectors].tolist()
    gaps = [1 - after / max(value, 1e-30) for value, after in pairwise(values.tolist())][:n_vectors]
    groups: list[list[int]] = [[0]]
    for k in range(1, n_vectors):
        if gaps[k - 1] < 0.01:
            groups[-1].append(k)
        else:
            groups.append([k])
    measured = {
        "singular_values": [float(f"{value:.6g}") for value in asked_for],
        "gaps": [round(gap, 6) for gap in gaps],
        "degenerate": [group for group in groups if len(group) > 1],
    }
    provenance = {**found.provenance, **measured}
    weights = mean_weights(sliced)[None, ..., None]
    targets = unit((along * weights).sum((1, 2)))
    return SteeringVectors(R * v, sliced.source_layer, found.history, provenance, sliced.site.name, aim, targets)


def top(
    sliced: SlicedModel,
    start: Float[Tensor, "row d_model"],
    n: int,
    n_steps: int,
    tolerance: float,
    batch_size: int,
    progress: bool,
) -> tuple[Float[Tensor, "vector d_model"], Float[Tensor, "vector prompt pos d_target"], Float[Tensor, " row"], int]:
    """Iterates until the first n singular values stand still.

    Returns:
        The first n right singular vectors, what each does to the target to first order, the singular values of all rows
        of the block, and the number of steps.
    """
    v, before, step = orthonormalize(start), start.new_zeros(len(start)), 0
    for step in Progress(range(1, n_steps + 1), desc="singular vectors", unit="step", disable=not progress):
        along, back = derivatives.products(sliced, v, batch_size)
        flat = along.flatten(1).double()
        squares, rotation = linalg.eigh(flat @ flat.T)  # in ascending order
        rotation = rotation.flip(1).to(v)
        values = squares.flip(0).clamp(min=0).sqrt().to(v)
        v, along, back = rotation.T @ v, torch.einsum("ij,i...->j...", rotation, along), rotation.T @ back
        settled = ((values - before).abs() <= tolerance * values.abs())[:n].all()
        if settled or step == n_steps:
            return v[:n], along[:n], values, step
        v, before = orthonormalize(back), values
    raise AssertionError("a loop of at least one step returns")
