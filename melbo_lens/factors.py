"""Where do low-rank factors live, and how does one climb there?  Normalised matrices and two ascents that ask only for values and gradients."""

from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from melbo_lens.optimization import State, moments_of, whole

Normalization: TypeAlias = Literal["column", "frobenius", "spectral"]
Matrices: TypeAlias = Float[Tensor, "*batch row column"]
Point: TypeAlias = tuple[Tensor, ...]  # A and B of each layer in turn: [adapter rank d_mlp], [adapter d_model rank]
Values: TypeAlias = Float[Tensor, " adapter"]
Evaluate: TypeAlias = Callable[[Point], tuple[Values, Values, Point]]  # objective, score (objective less penalty) and the score's gradients

INERTIA = 0.4  # share of the old factor in the new one
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def normalize(matrices: Matrices, how: Normalization) -> Matrices:
    """Scales each matrix onto its constraint: every column of unit norm, unit Frobenius norm, or a largest singular value of 1."""
    norms = {
        "column": lambda: matrices.norm(dim=-2, keepdim=True),
        "frobenius": lambda: matrices.norm(dim=(-2, -1), keepdim=True),
        "spectral": lambda: torch.linalg.matrix_norm(matrices, ord=2, keepdim=True),
    }[how]()
    return matrices / norms.clamp(min=torch.finfo(matrices.dtype).tiny)


def maximizer(gradients: Matrices, how: Normalization) -> Matrices:
    """The matrix M within the constraint that maximises ``<G, M>``, the objective made linear.

    For "column" and "frobenius" it is G normalised; for "spectral" it is the polar factor U V^T of G = U S V^T.
    """
    if how != "spectral":
        return normalize(gradients, how)
    left, _, right = torch.linalg.svd(gradients, full_matrices=False)
    return left @ right


def adamw(evaluate: Evaluate, start: Point, how: Normalization, n_steps: int, lr: float, state: State | None = None) -> Iterator[State]:
    """The published recipe: AdamW (betas .9 and .98, no weight decay, amsgrad) on both factors, each normalised after every step.

    It acts on each coordinate alone, so all adapters at once are the same as one by one. The last iterate is kept.

    Args:
        evaluate: objective, score and gradients.
        start: factors, normalised before the first step.
        how: the constraint.
        n_steps: number of steps.
        lr: step size in units of the factors' entries.
        state: a state yielded before, to go on from it.

    Yields:
        The state after each step: the point, the history (row t is the objective before step t, the last one that of the values).
    """
    state = state or _blank(tuple(normalize(factor, how) for factor in start), n_steps)
    while int(state["step"]) <= n_steps:
        step, history = int(state["step"]), state["history"].clone()
        parameters = [nn.Parameter(factor.clone()) for factor in point_of(state)]
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)
        for i, parameter in enumerate(parameters):
            optimizer.state[parameter] = {name: state[f"{name}.{i}"].clone() for name in MOMENTS} if step else moments_of(parameter)
        history[step], _, gradients = evaluate(point_of(state))
        if step < n_steps:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = -gradient
            optimizer.step()
        moved = {f"point.{i}": normalize(parameter.detach(), how) if step < n_steps else parameter.detach() for i, parameter in enumerate(parameters)}
        moments = {f"{name}.{i}": optimizer.state[p][name] for i, p in enumerate(parameters) for name in MOMENTS if optimizer.state[p]}
        # a new mapping of new tensors, so that whoever holds an earlier state holds a whole one
        state = {**moved, **moments, "history": history, "step": whole(step + 1)}
        yield state


def alternate(
    evaluate: Evaluate, start: Point, how: Normalization, n_steps: int, tolerance: float = 1e-3, state: State | None = None
) -> Iterator[State]:
    """The fast ascent: each factor in turn becomes the maximiser of the objective made linear in it; part of the old one damps oscillation.

    Args:
        evaluate: objective, score and gradients.
        start: factors, normalised before the first step.
        how: the constraint.
        n_steps: at most so many steps; one factor of every layer moves in each.
        tolerance: ends when no adapter's best score has risen by more than this share over the last ten steps.
        state: a state yielded before, to go on from it.

    Yields:
        The state after each evaluation; its point is the best seen of each adapter, and so is the objective in its history.
    """
    if state is None:
        first = tuple(normalize(factor, how) for factor in start)
        state = _blank(first, n_steps) | {f"moving.{i}": factor for i, factor in enumerate(first)}
        state |= {"scores": state["history"].clone(), "settled": whole(0)}
    while int(state["step"]) <= n_steps and not int(state["settled"]):
        step, history, scores = int(state["step"]), state["history"].clone(), state["scores"].clone()
        moving = tuple(state[f"moving.{i}"] for i in range(len(start)))
        value, score, gradients = evaluate(moving)
        better = score > (scores[step - 1] if step else torch.full_like(score, float("-inf")))
        history[step] = torch.where(better, value, history[step - 1])
        scores[step] = torch.where(better, score, scores[step - 1])
        best = [torch.where(better[:, None, None], new, old) for new, old in zip(moving, point_of(state), strict=True)]
        settled = step >= 10 and bool((scores[step] - scores[step - 10] <= tolerance * scores[step].abs()).all())
        turn = step % 2  # B first: of a random A much is used, of a random B nothing is
        moved = [
            normalize(maximizer(gradient, how) + INERTIA * factor, how) if i % 2 != turn else factor
            for i, (factor, gradient) in enumerate(zip(moving, gradients, strict=True))
        ]
        state = {f"point.{i}": factor for i, factor in enumerate(best)} | {f"moving.{i}": factor for i, factor in enumerate(moved)}
        state |= {"history": history, "scores": scores, "step": whole(step + 1), "settled": whole(int(settled))}
        yield state


def point_of(state: State) -> Point:
    """The factors in a state."""
    return tuple(state[f"point.{i}"] for i in range(sum(name.startswith("point.") for name in state)))


def _blank(point: Point, n_steps: int) -> State:
    history = point[0].new_full((n_steps + 1, len(point[0])), float("nan"))
    return {f"point.{i}": factor for i, factor in enumerate(point)} | {"history": history, "step": whole(0)}
