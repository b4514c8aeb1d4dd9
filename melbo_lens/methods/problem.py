"""What does an ascent climb on a model?  A slice and an objective as one function of many perturbations, in chunks that bound memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_lens.ascent.objectives import penalized
from melbo_lens.ascent.states import Evaluation, Point
from melbo_lens.models.slices import SlicedModel

SAVED_BYTES = 2**30
SAVED_PER_TOKEN = (
    40  # numbers that one block keeps for the backward pass, per token and unit of d_model: measured 25 to 45
)

# What rows of a point [row ...] change at the target of these prompts: row by row all prompts, [(row prompt) pos d_target].
Act: TypeAlias = Callable[[Point, Int[Tensor, " prompt"]], Float[Tensor, "row_prompt pos d_target"]]
Value: TypeAlias = Callable[
    [Tensor, Tensor], Tensor
]  # changes and target masks of many rows -> a number for each, as `Objective.value`


@dataclass(frozen=True, eq=False)
class Problem:
    """The function from a point to its objective, summed over the prompts, and the gradient of that less the penalty.

    Rows never see each other but in the penalty, so `batch_size` changes results by rounding only.

    Attributes:
        sliced: the part of the model that runs.
        act: how rows of a point act on it.
        value: what is maximised.
        batch_size: rows times prompts in one forward pass.
        diversity: see `penalized`.
    """

    sliced: SlicedModel
    act: Act
    value: Value
    batch_size: int
    diversity: float = 0.0

    def __call__(self, point: Point, first: int = 0) -> Evaluation:
        """Objective, score and gradient of the rows `first` and after of a point [restart row ...]."""
        shape = (len(point[0]), point[0].shape[1] - first)
        rows = tuple(x[:, first:].flatten(0, 1) for x in point)
        score, cotangents = self._penalized(point, first) if self.diversity else (None, None)
        values = rows[0].new_zeros(len(rows[0]))
        gradients = tuple(torch.zeros_like(x) for x in rows)
        for chunk, prompts in self._chunks(len(rows[0])):
            leaves = tuple(x[chunk].detach().requires_grad_() for x in rows)
            with torch.enable_grad():
                change, mask = self.act(leaves, prompts), self._mask(prompts, len(leaves[0]))
                outer = change.detach().requires_grad_()
                value = self.value(outer, mask)
                if cotangents is None:
                    (cotangent,) = torch.autograd.grad(value.sum(), outer)
                else:
                    cotangent = cotangents[chunk, prompts].flatten(0, 1)
                # Half precision overflows easily; a power of two is exact, and rows are independent, so each may have its own.
                scales = power_of_two(cotangent.unflatten(0, (len(leaves[0]), -1)))
                parts = torch.autograd.grad(
                    change, leaves, (cotangent.unflatten(0, (len(scales), -1)) / scales).flatten(0, 1)
                )
            values[chunk] += value.detach().unflatten(0, (len(leaves[0]), -1)).sum(1)
            for whole, part in zip(gradients, parts, strict=True):
                whole[chunk] += scales.flatten().view(-1, *[1] * (part.ndim - 1)) * part
        values = values.view(shape)
        return Evaluation(values, values if score is None else score, tuple(x.unflatten(0, shape) for x in gradients))

    def changes(self, rows: Point) -> Float[Tensor, "row prompt pos d_target"]:
        """The target change of every row [row ...] on every prompt, 0 outside the target positions."""
        whole = rows[0].new_zeros(len(rows[0]), *self.sliced.target.shape)
        with torch.no_grad():
            for chunk, prompts in self._chunks(len(rows[0])):
                some = tuple(x[chunk] for x in rows)
                change = self.act(some, prompts) * self._mask(prompts, len(some[0]))[..., None]
                whole[chunk, prompts] = change.unflatten(0, (len(some[0]), -1))
        return whole

    def _penalized(
        self, point: Point, first: int
    ) -> tuple[Float[Tensor, "restart row"], Float[Tensor, "restart_row prompt pos d_target"]]:
        """The scores of the rows `first` and after, and the gradients of their sum with respect to what these rows change."""
        scores, cotangents = [], []
        for restart in range(len(point[0])):
            with torch.enable_grad():
                changes = self.changes(tuple(x[restart] for x in point)).requires_grad_()
                masks = self.sliced.batch.target_mask.repeat(len(changes), 1)
                values = self.value(changes.flatten(0, 1), masks).unflatten(0, (len(changes), -1)).sum(1)
                score = penalized(values, changes.flatten(1), self.diversity)[first:]
                cotangents.append(torch.autograd.grad(score.sum(), changes)[0][first:])
            scores.append(score.detach())
        return torch.stack(scores), torch.cat(cotangents)

    def _mask(self, prompts: Int[Tensor, " prompt"], n_rows: int) -> Tensor:
        return self.sliced.batch.target_mask[prompts].repeat(n_rows, 1)

    def _chunks(self, n_rows: int) -> Iterator[tuple[slice, Int[Tensor, " prompt"]]]:
        """Groups of rows and of prompts that make at most `batch_size` rows of a forward pass."""
        everyone = self.sliced.everyone
        together = max(1, self.batch_size // len(everyone))
        for row in range(0, n_rows, together):
            for prompts in everyone.split(min(len(everyone), self.batch_size)):
                yield slice(row, row + together), prompts


def default_batch_size(sliced: SlicedModel) -> int:
    """Rows whose forward pass keeps about 1 GiB for the backward pass."""
    per_row = sliced.resid.shape[1] * sliced.d_model * len(sliced.calls) * SAVED_PER_TOKEN * sliced.resid.element_size()
    return max(1, SAVED_BYTES // per_row)


def power_of_two(cotangents: Float[Tensor, "row prompt pos d_target"]) -> Float[Tensor, "row 1 1 1"]:
    """The power of two next to each row's largest entry; 1 for a row of zeros."""
    largest = cotangents.abs().amax((1, 2, 3), keepdim=True)
    return torch.where(largest > 0, torch.exp2(largest.clamp(min=1e-30).log2().floor()), torch.ones_like(largest))


def bias(sliced: SlicedModel) -> Act:
    """Rows that are vectors, each added at the slice's site."""

    def act(rows: Point, prompts: Int[Tensor, " prompt"]) -> Float[Tensor, "row_prompt pos d_target"]:
        return sliced.change(rows[0].repeat_interleave(len(prompts), 0), prompts.repeat(len(rows[0])))

    return act
