"""How much did the target activations change?  The objective is one number for each row.

It is differentiable everywhere it is used, and says where it is read.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from melbo_lens.ascent.manifolds import norm

TokenNorm: TypeAlias = Literal["d_model", "pos"]


@dataclass(frozen=True)
class Objective:
    """What is maximised, and where it is read; a learned perturbation carries its objective, and so does a control.

    Attributes:
        target_layer: the block whose incoming stream is read, or None if another activation is read.
        target_hook: the name of that activation.
        target_positions: where a change counts, in each prompt's own tokens.
        p, q, token_norm: see `change_objective`.
        diversity: see `penalized`.

    Raises:
        ValueError: the exponents or the diversity make no sense.
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
                    f"{name}={value} must be a finite number of at least 1: "
                    "published settings are p in {2, 4}, q in {1, p}."
                )
        if self.token_norm not in ("d_model", "pos"):
            raise ValueError(
                f'token_norm={self.token_norm!r} must be "d_model" (as published) or '
                '"pos" (as the published code computes it).'
            )
        if not 0 <= self.diversity < float("inf"):
            raise ValueError(f"diversity={self.diversity!r} must be 0 (off) or a positive, finite number.")

    def value(self, change: Float[Tensor, "row pos d_target"], mask: Bool[Tensor, "row pos"]) -> Float[Tensor, " row"]:
        """Computes `change_objective` with these settings."""
        return change_objective(change, mask, self.p, self.q, cast(TokenNorm, self.token_norm))

    def header(self) -> dict[str, Any]:
        """Returns the attributes in JSON's types."""
        return {**asdict(self), "target_positions": positions_text(self.target_positions)}

    @classmethod
    def of(cls, header: Mapping[str, Any] | None) -> "Objective | None":
        """Makes the objective of a `header`, or of a provenance of version 0.1.0; None if that names no place."""
        said: Mapping[str, Any] = header or {}
        known = {name: said[name] for name in cls.__dataclass_fields__ if name in said}
        if known.get("target_layer") is None and known.get("target_hook") is None:
            return None
        if "target_positions" in known:
            known["target_positions"] = positions_of(known["target_positions"])
        return cls(**known)


def change_objective(
    change: Float[Tensor, "row pos d_target"],
    mask: Bool[Tensor, "row pos"],
    p: float = 2.0,
    q: float = 1.0,
    token_norm: TokenNorm = "d_model",
) -> Float[Tensor, " row"]:
    """Computes the MELBO objective of each row: ``(sum over t of ||change_t||_2 ** p) ** (1 / q)``.

    The sum runs over the target positions. The objective is homogeneous of degree p / q in the change. A larger p
    favours a change that is concentrated on few positions.

    Args:
        change: the target activation with the perturbation minus the one without.
        mask: True at the target positions.
        p: the exponent of each position's norm, at least 1.
        q: the sum is raised to 1 / q; at least 1.
        token_norm: "d_model" takes the norm over the activation at each position, as in the equation of the post; "pos"
            takes it over the positions for each coordinate, as the published code does. They agree at p = 2.

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
    """Divides the objective of each row by a penalty for changes that resemble those of earlier rows:

        f_k / (1 + diversity * sum over j < k of cos(d_k, d_j) ** 4)

    Earlier rows are held fixed, so row 0 is never bent, and row k only by the rows before it. The fourth power spares
    changes that merely share something, as different behaviours do (cosines about .5), and repels copies.
    """
    unit = changes / norm(changes, dim=1).clamp(min=1e-30)
    alike = (unit @ unit.detach().T) ** 4
    return values / (1 + diversity * alike.tril(diagonal=-1).sum(1))


def positions_text(positions: slice | Sequence[int]) -> str:
    """Writes target positions as files keep them, in the same way for a list and a tuple."""
    return str(positions if isinstance(positions, slice) else list(positions))


def positions_of(text: str) -> slice | list[int]:
    """Reads what `positions_text` wrote.

    Raises:
        ValueError: the text is something else.
    """
    try:
        if text.startswith("slice"):
            return slice(*ast.literal_eval(text.removeprefix("slice")))
        return list(ast.literal_eval(text))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f'{text!r} is neither a slice, such as "slice(-3, None)", nor a list of positions.') from error


def _power(x: Tensor, exponent: float) -> Tensor:
    """Computes x ** exponent for x >= 0, with gradient 0 at 0 where the true gradient is infinite or undefined."""
    if exponent >= 1:
        return x if exponent == 1 else x**exponent
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)) ** exponent, torch.zeros_like(x))
