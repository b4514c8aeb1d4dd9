"""What is between two steps of an ascent?  A point, what was seen so far, and a form of both that a file can hold."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

# Tensors that together are what is learned, first axes [restart row] in an ascent and [row] in its result: of vectors one [d_model],
# of adapters A [rank d_in] and B [d_model rank] of each layer in turn.
Point: TypeAlias = tuple[Tensor, ...]


class Evaluation(NamedTuple):
    """What an ascent is told of a point.

    Attributes:
        value: the objective of each row; it becomes the history.
        score: what is maximised: the objective, or the objective less a penalty.
        gradient: of the sum of the scores, one tensor for each of the point's.
    """

    value: Float[Tensor, "restart row"]
    score: Float[Tensor, "restart row"]
    gradient: Point


# The evaluation of rows `first` and after of a point. The rows before it stand still, and may matter to the score of those after them.
Evaluate: TypeAlias = Callable[[Point, int], Evaluation]


@dataclass(frozen=True, eq=False)
class State:
    """Everything that an interrupted ascent needs to go on.  Each step makes a new one of new tensors, so an earlier one stays whole.

    Attributes:
        point: the result so far, [row ...] each.
        history: row t is the objective before step t, and the last one that of the result; NaN where nothing was evaluated yet.
        step: how many steps were made.
    """

    point: Point
    history: Float[Tensor, "step row"]
    step: int

    def tensors(self) -> dict[str, Tensor]:
        """The same as tensors by name."""
        return dict(self._named())

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                yield from ((f"{field.name}.{i}", tensor) for i, tensor in enumerate(value))
            else:
                yield (
                    field.name,
                    value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.long, device="cpu"),
                )

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Any:
        """The state of which `tensors` gave these, on a device."""
        return cls(**{field.name: _value(field.type, field.name, tensors, device) for field in fields(cls)})


def _value(kind: Any, name: str, tensors: Mapping[str, Tensor], device: torch.device | str) -> Point | Tensor | int:
    if kind is int:
        return int(tensors[name])
    if name in tensors:
        return tensors[name].to(device)
    several = sorted(
        (key for key in tensors if key.rpartition(".")[0] == name), key=lambda key: int(key.rpartition(".")[2])
    )
    return tuple(tensors[key].to(device) for key in several)
