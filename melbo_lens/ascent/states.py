"""What exists between two steps of an ascent?  A point, what was seen so far, and a form of both that a file holds."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self
else:  # the tests' type checker accepts Self only inside a class that it checks as a whole
    Self = Any

# The tensors that are learned together. Their first axes are [restart row] in an ascent and [row] in its result; the
# further axes are [d_model] of the one tensor of vectors, or [rank d_in] and [d_model rank] of A and B of each layer in
# turn.
Point: TypeAlias = tuple[Tensor, ...]


class Evaluation(NamedTuple):
    """What an ascent learns about a point.

    Attributes:
        value: the objective of each row, which becomes the history.
        score: what is maximised: the objective, or the objective with a penalty.
        gradient: the gradient of the sum of the scores, one tensor for each tensor of the point.
        sunk: the rows that run into a sink, where a position of the target changes beyond all proportion; None if that
            is not known.
    """

    value: Float[Tensor, "restart row"]
    score: Float[Tensor, "restart row"]
    gradient: Point
    sunk: Bool[Tensor, "restart row"] | None = None


def check_finite(step: int, seen: Iterable[Tensor], first: int = 0, spared: Tensor | None = None) -> None:
    """Stops at the first row that isn't finite, since nothing can be learned from it, and other rows depend on it.

    Args:
        step: the step, which the message names.
        seen: what was computed of the rows, [restart row ...] each.
        first: the number of the first of these rows.
        spared: rows [restart row] that may overflow, since they go back to where they last did not.

    Raises:
        FloatingPointError: a value of a row is NaN or infinite.
    """
    finite = torch.stack([torch.isfinite(x.unsqueeze(-1)).flatten(2).all(2) for x in seen]).all(0)
    finite = finite if spared is None else finite | spared
    if not finite.all():
        row = first + int((~finite).any(0).nonzero()[0])
        raise FloatingPointError(
            f"row {row} changes the target by NaN or infinity in step {step}, or its gradient is: use a smaller "
            "radius, scale or exponent p, or load the model in bfloat16 or float32."
        )


# Evaluates a point's rows from number `first` on. The rows before it stand still, but may affect the scores of later
# rows.
Evaluate: TypeAlias = Callable[[Point, int], Evaluation]


@dataclass(frozen=True, eq=False)
class State:
    """Everything that an interrupted ascent needs to go on.

    Each step makes a new state of new tensors, so states yielded earlier are never modified.

    Attributes:
        point: the result so far, [row ...] each.
        history: row t is the objective before step t, and the last row is the objective of the result; NaN where
            nothing was evaluated yet.
        step: how many steps were made.
    """

    point: Point
    history: Float[Tensor, "step row"]
    step: int

    def tensors(self) -> dict[str, Tensor]:
        """Returns the whole state as tensors by name."""
        return dict(self._named())

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                yield from ((f"{field.name}.{i}", tensor) for i, tensor in enumerate(cast(Point, value)))
            else:
                yield (
                    field.name,
                    value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.long, device="cpu"),
                )

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Self:
        """Makes the state, on a device, from what its `tensors` returned."""
        values: dict[str, Any] = {f.name: _value(f.type, f.name, tensors, device) for f in fields(cls)}
        return cls(**values)


def _value(kind: Any, name: str, tensors: Mapping[str, Tensor], device: torch.device | str) -> Point | Tensor | int:
    if kind is int:
        return int(tensors[name])
    if name in tensors:
        return tensors[name].to(device)
    several = sorted(
        (key for key in tensors if key.rpartition(".")[0] == name), key=lambda key: int(key.rpartition(".")[2])
    )
    return tuple(tensors[key].to(device) for key in several)
