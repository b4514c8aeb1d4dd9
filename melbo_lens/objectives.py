"""How much did the target activations change?  One number for each row, differentiable everywhere it is used."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TokenNorm: TypeAlias = Literal["d_model", "pos"]


def change_objective(
    change: Float[Tensor, "row pos d_target"],
    mask: Bool[Tensor, "row pos"],
    p: float = 2.0,
    q: float = 1.0,
    token_norm: TokenNorm = "d_model",
) -> Float[Tensor, " row"]:
    """The MELBO objective of each row: ``(sum over t of ||change_t||_2 ** p) ** (1 / q)``, t over the target positions.

    It is homogeneous of degree p / q in the change. Larger p favours a change concentrated on few positions.

    Args:
        change: target activation with the perturbation minus without.
        mask: True at the target positions.
        p: exponent of each position's norm, at least 1.
        q: the sum is raised to 1 / q, at least 1.
        token_norm: "d_model" takes the norm over the activation at each position, as the equation of the post has it; "pos" takes it over the
            positions for each coordinate, as the published code does. They agree at p = 2.

    Returns:
        One number for each row, in float32 or better.

    Source: Mack and Turner, "Mechanistically Eliciting Latent Behaviors in Language Models" (2024).
    """
    selected = torch.where(mask[..., None], change, torch.zeros((), dtype=change.dtype, device=change.device))
    squared = selected.square().sum(-1 if token_norm == "d_model" else -2)
    return _power(_power(squared, p / 2).sum(-1), 1 / q)


def check_exponents(p: float, q: float, token_norm: str) -> None:
    """Refuses exponents for which the objective is no norm-like quantity.

    Raises:
        ValueError: p or q below 1 or not finite, or an unknown `token_norm`.
    """
    for name, value in (("p", p), ("q", q)):
        if not 1 <= value < float("inf"):
            raise ValueError(f"{name}={value} must be a finite number of at least 1: published settings are p in {{2, 4}}, q in {{1, p}}.")
    if token_norm not in ("d_model", "pos"):
        raise ValueError(f'token_norm={token_norm!r} must be "d_model" (as published) or "pos" (as the published code computes it).')


def _power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent for x >= 0, with gradient 0 at 0 where the true one is infinite or undefined."""
    if exponent >= 1:
        return x if exponent == 1 else x**exponent
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)) ** exponent, torch.zeros_like(x))
