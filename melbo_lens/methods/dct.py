"""Which directions change the target most, taken together?  A decomposition of the mean change (DCT) finds them.

It approximates ``Delta(R v)``, for unit v, by ``sum_l alpha_l f(<v_l, v>) u_l`` with ``f(x) = R x`` (linear),
``R^2 x^2 / 2`` (quadratic) or ``exp(x) - 1`` (exponential).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.arguments import counts, one_of, positive, public
from melbo_lens.ascent.manifolds import linalg, orthonormalize, unit
from melbo_lens.ascent.objectives import Objective
from melbo_lens.ascent.sogi import Spread, soft_orthogonalize
from melbo_lens.ascent.states import Point
from melbo_lens.measures.radius import solve_radius
from melbo_lens.methods import derivatives
from melbo_lens.methods.automatic import resumed_or_automatic
from melbo_lens.methods.fitting import Run, ended, fit_swarm, objective_at, settings_of
from melbo_lens.methods.mean_change import MeanChange
from melbo_lens.methods.problem import Problem, bias
from melbo_lens.models import hooks
from melbo_lens.models.access import Model
from melbo_lens.models.slices import SlicedModel
from melbo_lens.models.slicing import as_slice, opened
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.prompts import Positions, Prompts
from melbo_lens.randomness import gaussian_rows

Kind = Literal["exponential", "linear", "quadratic"]
POSITIONS = slice(-3, None)
STEPS = {"exponential": 10, "linear": 0, "quadratic": 20}


@public
def fit_dct(
    model: Model | SlicedModel,
    prompts: Prompts | None = None,
    source_layer: int | None = None,
    target_layer: int | None = None,
    *,
    kind: Kind = "exponential",
    n_factors: int = 64,
    radius: float | Literal["auto", "nonlinearity"] = "auto",
    orthogonalize: Literal["qr", "soft"] = "qr",
    prompt_reduction: Literal["mean_change", "sum_norms"] = "mean_change",
    n_steps: int | None = None,
    temperature: float = 1.0,
    target_positions: Positions | None = None,
    target_hook: str | None = None,
    site: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    trim: bool = False,
) -> SteeringVectors:
    """Learns the factors of a decomposition of the mean change of the target.

    With Delta(theta) the mean over prompts and target positions of what the target changes by:

        linear:       J = U diag(alpha) V^T by singular values, J the Jacobian of Delta at 0
        quadratic:    v <- the gradient of <u, H(v, v)>, u <- H(v, v), H the second derivative of Delta at 0
        exponential:  u <- Delta(R v), v <- the gradient of <u, Delta(R v)>

    In each step of the last two the u are normalised and the v orthogonalised. The strengths of the exponential are
    ``alpha = K^-1 c`` with ``K = (U^T U) * (exp(V^T V) - 1)`` and ``c_l = <u_l, Delta(R v_l)>``.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, or a slice of `slice_model`, as in `fit_vectors`.
        prompts: text, chat messages, a list of either, or token ids [prompt pos].
        source_layer: the block at whose `site` the vectors are added, at every position.
        target_layer: the change is measured in the stream that enters this block.
        kind: which decomposition. The linear and the quadratic one say nothing of signs: use both.
        n_factors: how many vectors; at most d_model, except for the exponential with `orthogonalize="soft"`.
        radius: R, the norm of the vectors. "auto" is that of `fit_vectors`. "nonlinearity" is the published rule: where
            random directions bend the mean change Delta, which departs from its linear part by half. On SmolLM2 that is
            three times the edge of readability. (`calibrate_radius(rule="nonlinearity")` asks it of the changes at all
            positions, without a mean, and gives a smaller radius.)
        orthogonalize: of the exponential: "qr" keeps the v orthogonal in order, "soft" lets them repel each other
            (`soft_orthogonalize`); of two alone, the second is then minus the first, so ask for three or more.
        prompt_reduction: of the exponential: "mean_change" takes u from the mean over the prompts, as published, and
            "sum_norms" one u for each prompt, as `fit_vectors` does.
        n_steps: 10 for the exponential and 20 for the quadratic by default; the linear one takes none.
        temperature: of "soft".
        target_positions: as in `fit_vectors`, but the last three by default.
        checkpoint: as in `fit_vectors`; of the exponential alone.
        target_hook, site, batch_size, seed, progress, trim: as in `fit_vectors`.

    Returns:
        The vectors, the strongest first, with `targets` u and, in the provenance, their strengths "alpha".

    Raises:
        TypeError, ValueError: arguments break a rule; this is raised before any step.
        FloatingPointError: the activations hold NaN or infinity.

    Source: Mack and Turner, "Deep Causal Transcoding" (2025). Its public code keeps rows of torch's V^H as the linear
    factors where it means columns of V; here they are the right singular vectors.
    """
    asked = Run("power", n_steps, None, 1, batch_size, seed, checkpoint, progress, trim)
    counts(n_factors=n_factors)
    one_of("kind", kind, STEPS)
    one_of("orthogonalize", orthogonalize, ("qr", "soft"))
    one_of("prompt_reduction", prompt_reduction, ("mean_change", "sum_norms"))
    positive("temperature", temperature, ": lower ones concentrate on the most similar factors")
    if radius not in ("auto", "nonlinearity"):
        positive("radius", radius, ', or "auto" or "nonlinearity" to calibrate one')
    if kind != "exponential" and checkpoint is not None:
        raise ValueError(f"checkpoint={str(checkpoint)!r} has no meaning for kind={kind!r}: leave it out.")
    model = opened(model)
    if n_factors > model.d_model and not (kind == "exponential" and orthogonalize == "soft"):
        raise ValueError(
            f"n_factors={n_factors} can't be orthogonal in d_model={model.d_model} dimensions: ask for at most "
            f'{model.d_model}, or kind="exponential", orthogonalize="soft".'
        )
    sliced = as_slice(model, prompts, source_layer, target_layer, target_positions, target_hook, site, POSITIONS)
    d_target = sliced.target.shape[-1]
    if kind == "linear" and n_factors > d_target:
        raise ValueError(
            f"n_factors={n_factors}, and the Jacobian of a target of {d_target} dimensions has {d_target} singular "
            "vectors: ask for at most so many."
        )
    run = asked.resolved(sliced, {"power": STEPS[kind] or 1})
    aim = objective_at(sliced, p=1, q=1)
    of_exponential = {
        "orthogonalize": orthogonalize,
        "prompt_reduction": prompt_reduction,
        "temperature": temperature,
    }
    with hooks.frozen(sliced.host):
        if radius == "auto":
            R, why = resumed_or_automatic(sliced, seed, checkpoint, "radius_rule")
        elif radius == "nonlinearity":
            bend = solve_radius(sliced, "nonlinearity", seed=seed, reduction="mean")
            R, why = bend.radius, f"given as {bend.why} of the mean change"
        else:
            R, why = float(radius), "given"
        settings = settings_of("fit_dct", sliced, aim, run) | {
            "optimizer": "sogi" if kind == "exponential" else "derivatives",
            "kind": kind,
            "n_factors": n_factors,
            "radius": R,
            "radius_rule": why,
            **(of_exponential if kind == "exponential" else dict.fromkeys(of_exponential)),
        }
        problem = Problem(sliced, bias(sliced), Objective(p=1, q=1).value, run.batch_size)
        changes = MeanChange(problem, prompt_reduction == "sum_norms")
        start = orthonormal_or_unit(gaussian_rows(n_factors, model.d_model, "fit_dct", seed).to(sliced.device))
        if kind == "exponential":
            spread = spread_of(orthogonalize, temperature, R)
            targets = start.new_zeros(n_factors, sliced.target.shape[-1])
            label = f"layer {sliced.source_layer}, radius {R:.3g}"
            found, u = fit_swarm(changes, (R * start,), targets, spread, False, run, settings, label)
            alpha = strengths(unit(found.point[0]), u, changes.means(found.point))
            values = found.point[0]
        else:
            with run.trimmed(sliced):
                v, u, alpha = (
                    derivatives.singular(sliced, n_factors, run.batch_size)
                    if kind == "linear"
                    else derivatives.quadratic(sliced, start, run.n_steps, run.batch_size, run.progress)
                )
            values = R * v
            said = "exact" if kind == "linear" else f"ran all {run.n_steps} steps; the last iterate is kept"
            found = ended(problem, derivatives.reached(values), 0, run, settings, said)
    order = alpha.argsort(descending=True)
    listed = [float(f"{one:.6g}") for one in alpha[order].tolist()]
    known = found.provenance
    figures = _reordered(known, order.tolist()) | {"minus": _reordered(known["minus"], order.tolist())}
    provenance = {**known, "alpha": listed, **figures}
    history = found.history[:, order] if len(found.history) else found.history
    return SteeringVectors(values[order], sliced.source_layer, history, provenance, sliced.site.name, aim, u[order])


def _reordered(known: Mapping[str, Any], order: list[int]) -> dict[str, Any]:
    """What was measured of the rows, in their new order."""
    places = {old: new for new, old in enumerate(order)}
    return {"effects": [known["effects"][i] for i in order], "sinks": sorted(places[i] for i in known["sinks"])}


def spread_of(orthogonalize: str, temperature: float, radius: float) -> Spread:
    """Returns the step from gradients to the next vectors of norm `radius`."""

    def spread(gradient: Point) -> Point:
        (rows,) = gradient
        if orthogonalize == "qr":
            return (radius * orthonormalize(rows),)
        size = rows.norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)
        return (radius * soft_orthogonalize(unit(rows), size.log(), unit, temperature=temperature),)

    return spread


def strengths(
    v: Float[Tensor, "factor d_model"], u: Float[Tensor, "factor d_target"], means: Float[Tensor, "factor d_target"]
) -> Float[Tensor, " factor"]:
    """Computes ``alpha = K^-1 c`` with ``K = (U^T U) * (exp(V^T V) - 1)`` and ``c_l = <u_l, Delta(R v_l)>``."""
    v, u, means = v.double(), u.double(), means.double()
    together = (u @ u.T) * torch.expm1(v @ v.T)
    # more factors than dimensions make K singular, so the solution of least norm is taken
    return (linalg.pinv(together) @ (u * means).sum(1)).float()


def orthonormal_or_unit(rows: Float[Tensor, "factor d_model"]) -> Float[Tensor, "factor d_model"]:
    """Orthonormalises rows in order; if there are more of them than dimensions, they are only scaled to norm 1."""
    return orthonormalize(rows) if len(rows) <= rows.shape[1] else unit(rows)
