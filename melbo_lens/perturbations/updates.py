"""How is a low-rank update of weights applied to a batch?  It is computed as a gain, added to the weights' output."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.arguments import as_list


@dataclass(eq=False)
class RowUpdate:
    """Computes ``c_r * B A a`` for each row r of a batch.

    The rows of one adapter are computed together, so that no factor is copied for every row.
    """

    a: Float[Tensor, "adapter rank d_mlp"]
    b: Float[Tensor, "adapter d_model rank"]
    index: Sequence[int]
    coefficients: Float[Tensor, " row"]

    def __call__(self, hidden: Float[Tensor, "row_or_any pos d_mlp"]) -> Float[Tensor, "row_or_any pos d_model"]:
        if len(self.index) not in (1, hidden.shape[0]):
            raise ValueError(
                f"{len(self.index)} steering adapters can't be applied to a batch of {hidden.shape[0]} rows: "
                "use one adapter (adapters[k]), or a batch with one row for each adapter."
            )
        if self.a.device != hidden.device:  # moved only once, since a decoder calls this for every token
            self.a, self.b, self.coefficients = (
                tensor.to(hidden.device) for tensor in (self.a, self.b, self.coefficients)
            )
        if len(self.index) == 1:
            return self.coefficients * (hidden.float() @ self.a[self.index[0]].T @ self.b[self.index[0]].T)
        gained = hidden.new_zeros(*hidden.shape[:-1], self.b.shape[1], dtype=torch.float32)
        for k, rows in self._rows.items():
            c = self.coefficients[rows][:, None, None]
            gained[rows] = c * (hidden[rows].float() @ self.a[k].T @ self.b[k].T)
        return gained

    @cached_property
    def _rows(self) -> dict[int, list[int]]:
        """The rows that each adapter changes."""
        acting = [r for r, coefficient in enumerate(as_list(self.coefficients)) if coefficient != 0]
        return {k: [r for r in acting if self.index[r] == k] for k in dict.fromkeys(self.index[r] for r in acting)}


@dataclass(eq=False)
class GridUpdate:
    """Computes ``scale * B A a`` for a batch that repeats the same prompts for each adapter in turn.

    It is differentiable in the factors.
    """

    a: Float[Tensor, "adapter rank d_mlp"]
    b: Float[Tensor, "adapter d_model rank"]
    scales: Float[Tensor, " adapter"]

    def __call__(self, hidden: Float[Tensor, "row pos d_mlp"]) -> Float[Tensor, "row pos d_model"]:
        grid = cast(Tensor, hidden.float().unflatten(0, (len(self.scales), -1)))  # [adapter prompt pos d_mlp]
        a, b, scales = (tensor.to(hidden.device) for tensor in (self.a, self.b, self.scales))
        return (scales[:, None, None, None] * (grid @ a.mT[:, None] @ b.mT[:, None])).flatten(0, 1)
