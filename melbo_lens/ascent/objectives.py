"""How much did the target activations change?  One number for each row, differentiable everywhere it is used, and where it is read."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TokenNorm: TypeAlias = Literal["d_model", "pos"]


@dataclass(frozen=True)
class Objective:
    """What is maximised, and where it is read. What was learned carries it, and so does its control.

    Attributes:
        target_layer: the stream that enters this block; None if another activation is read.
        target_hook: that activation.
        target_positions: where a change counts, in each prompt's own tokens.
        p, q, token_norm: see `change_objective`.
        diversity: see `penalized`.

    Raises:
        ValueError: exponents or a diversity without meaning.
    """

    target_layer: int | None = None
    target_hook: str | None = None
    target_positions: slice | Sequence[int] = field(default_factory=lambda: slice(None))
    p: float = 2.0
    q: float = 1.0
    token_norm: str = "d_model"
    diversity: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("p", self.p), ("q", self.q)):
            if not 1 <= value < float("inf"):
                raise ValueError(
                    f"{name}={value} must be a finite number of at least 1: published settings are p in {{2, 4}}, q in {{1, p}}."
                )
        if self.token_norm not in ("d_model", "pos"):
            raise ValueError(
                f'token_norm={self.token_norm!r} must be "d_model" (as published) or "pos" (as the published code computes it).'
            )
        if not 0 <= self.diversity < float("inf"):
            raise ValueError(f"diversity={self.diversity!r} must be 0 (off) or a positive, finite number.")

    def value(self, change: Float[Tensor, "row pos d_target"], mask: Bool[Tensor, "row pos"]) -> Float[Tensor, " row"]:
        """`change_objective` with these exponents."""
        return change_objective(change, mask, self.p, self.q, self.token_norm)

    def header(self) -> dict[str, Any]:
        """The same in JSON's types."""
        return {**asdict(self), "target_positions": positions_text(self.target_positions)}

    @classmethod
    def of(cls, header: Mapping[str, Any] | None) -> "Objective | None":
        """What `header` was made of; None if it names no place. Provenances of version 0.1.0 will do."""
        known = {name: header[name] for name in cls.__dataclass_fields__ if name in (header or {})}
        if known.get("target_layer") is None and known.get("target_hook") is None:
            return None
        if "target_positions" in known:
            known["target_positions"] = _positions(known["target_positions"])
        return cls(**known)


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


def penalized(
    values: Float[Tensor, " row"], changes: Float[Tensor, "row change"], diversity: float
) -> Float[Tensor, " row"]:
    """The objective of each row less a penalty for a change like that of an earlier row, in order::

        f_k / (1 + diversity * sum over j < k of cos(d_k, d_j) ** 4)

    The earlier ones are held fixed, so row 0 is never bent, and row k only by those before it. The fourth power spares changes that merely
    share something, as different behaviours do (cosines about .5), and repels copies.
    """
    unit = changes / changes.norm(dim=1, keepdim=True).clamp(min=1e-30)
    alike = (unit @ unit.detach().T) ** 4
    return values / (1 + diversity * alike.tril(diagonal=-1).sum(1))


def positions_text(positions: slice | Sequence[int]) -> str:
    """Target positions as files keep them, the same for a list and a tuple."""
    return str(positions if isinstance(positions, slice) else list(positions))


def _positions(text: str) -> slice | list[int]:
    """What `positions_text` wrote."""
    if text.startswith("slice"):
        return slice(*ast.literal_eval(text.removeprefix("slice")))
    return list(ast.literal_eval(text))


def _power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent for x >= 0, with gradient 0 at 0 where the true one is infinite or undefined."""
    if exponent >= 1:
        return x if exponent == 1 else x**exponent
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)) ** exponent, torch.zeros_like(x))
