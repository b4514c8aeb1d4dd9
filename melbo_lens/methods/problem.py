"""What does an ascent climb on a model?  A `Problem`: a function of many perturbations, made of slice and objective.

It runs the model in chunks that bound memory. A new method needs little more than its own `Act`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from melbo_lens.ascent.objectives import Objective, penalized
from melbo_lens.ascent.states import Evaluation, Point
from melbo_lens.models.sinks import SINK
from melbo_lens.models.slices import SlicedModel

CHUNK_BYTES = 2**30  # what the forward pass of one chunk may keep for the backward pass

# An act says what the rows of a point [row ...] change at the target of these prompts. Its result has, row by row,
# an entry for each of the prompts: [(row prompt) pos d_target].
Act: TypeAlias = Callable[[Point, Int[Tensor, " prompt"]], Float[Tensor, "row_prompt pos d_target"]]
# A value turns changes [row pos d_target] and target masks [row pos] into a number for each row, as `Objective.value`.
Value: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def opposite(rows: Point) -> Point:
    """Minus the rows, where these act by being added."""
    return tuple(-x for x in rows)


@dataclass(frozen=True, eq=False)
class Problem:
    """The objective of every row of a point, summed over the prompts, and the gradient of the scores.

    The score of a row is its objective, or its objective less a penalty (`penalized`). Rows influence each other only
    through that penalty, so `batch_size` changes results by rounding only.

    Attributes:
        sliced: the part of the model that runs.
        act: how the rows of a point act on the slice.
        value: what is maximised, summed over the prompts.
        batch_size: the number of rows times prompts in one forward pass.
        diversity: the weight of the penalty; 0 turns it off.
        minus: what the sign -1 makes of rows.
    """

    sliced: SlicedModel
    act: Act
    value: Value
    batch_size: int
    diversity: float = 0.0
    minus: Callable[[Point], Point] = opposite

    def __call__(self, point: Point, first: int = 0) -> Evaluation:
        """Objective, score and gradient of row `first` and all rows after it, of a point [restart row ...]."""
        shape = (len(point[0]), point[0].shape[1] - first)
        rows = tuple(x[:, first:].flatten(0, 1) for x in point)
        score, cotangents = self._penalized(point, first) if self.diversity else (None, None)
        values, sunk = rows[0].new_zeros(len(rows[0])), rows[0].new_zeros(len(rows[0]), dtype=torch.bool)
        gradients = tuple(torch.zeros_like(x) for x in rows)
        for chunk, prompts in self.chunks(len(rows[0])):
            leaves = tuple(x[chunk].detach().requires_grad_() for x in rows)
            n_rows = len(leaves[0])
            with torch.enable_grad():
                change, mask = self.act(leaves, prompts), self._mask(prompts, n_rows)
                outer = change.detach().requires_grad_()
                value = self.value(outer, mask)
                if cotangents is None:
                    (cotangent,) = torch.autograd.grad(value.sum(), outer)
                else:
                    cotangent = cotangents[chunk, prompts].flatten(0, 1)
                parts = pulled_back(change, leaves, cotangent.unflatten(0, (n_rows, -1)))
            values[chunk] += value.detach().unflatten(0, (n_rows, -1)).sum(1)
            sunk[chunk] |= self._sunk(outer.detach(), mask).unflatten(0, (n_rows, -1)).any(1)
            for whole, part in zip(gradients, parts, strict=True):
                whole[chunk] += part
        values = values.view(shape)
        gradient = tuple(x.unflatten(0, shape) for x in gradients)
        return Evaluation(values, values if score is None else score, gradient, sunk.view(shape))

    def effects(self, rows: Point) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
        """How strongly each of the rows [row ...] acts, and which of them run into a sink.

        The effect is ``||change|| / ||target||``, both over the target positions of all prompts.
        """
        squares, sunk = rows[0].new_zeros(len(rows[0])), rows[0].new_zeros(len(rows[0]), dtype=torch.bool)
        with torch.no_grad():
            for chunk, prompts in self.chunks(len(rows[0])):
                some = tuple(x[chunk] for x in rows)
                change, mask = self.act(some, prompts), self._mask(prompts, len(some[0]))
                each = (change.float().square().sum(-1) * mask).sum(1)
                squares[chunk] += each.unflatten(0, (len(some[0]), -1)).sum(1)
                sunk[chunk] |= self._sunk(change, mask).unflatten(0, (len(some[0]), -1)).any(1)
        whole = self.sliced.target[self.sliced.batch.target_mask].norm().clamp(min=1e-30)
        return squares.sqrt() / whole, sunk

    def _sunk(self, change: Tensor, mask: Bool[Tensor, "row_prompt pos"]) -> Bool[Tensor, " row_prompt"]:
        """Whether a target position changes beyond all proportion, as it does where it becomes an attention sink."""
        return ((change.norm(dim=-1) > SINK * self._usual) & mask).any(1)

    @cached_property
    def _usual(self) -> float:
        return self.sliced.usual_norm or float("inf")

    def changes(self, rows: Point) -> Float[Tensor, "row prompt pos d_target"]:
        """What each of the rows [row ...] changes at the target of each prompt; 0 outside the target positions."""
        whole = rows[0].new_zeros(len(rows[0]), *self.sliced.target.shape)
        with torch.no_grad():
            for chunk, prompts in self.chunks(len(rows[0])):
                some = tuple(x[chunk] for x in rows)
                change = self.act(some, prompts) * self._mask(prompts, len(some[0]))[..., None]
                whole[chunk, prompts] = change.unflatten(0, (len(some[0]), -1))
        return whole

    def _penalized(
        self, point: Point, first: int
    ) -> tuple[Float[Tensor, "restart row"], Float[Tensor, "restart_row prompt pos d_target"]]:
        """The scores of row `first` and all rows after it, and the gradients of their sum by these rows' changes."""
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

    def _mask(self, prompts: Int[Tensor, " prompt"], n_rows: int) -> Bool[Tensor, "row_prompt pos"]:
        """The target mask of every entry of an act's result."""
        return self.sliced.batch.target_mask[prompts].repeat(n_rows, 1)

    def chunks(self, n_rows: int) -> Iterator[tuple[slice, Int[Tensor, " prompt"]]]:
        """Groups of rows and of prompts that make at most `batch_size` rows of a forward pass."""
        everyone = self.sliced.everyone
        together = max(1, self.batch_size // len(everyone))
        for row in range(0, n_rows, together):
            for prompts in everyone.split(min(len(everyone), self.batch_size)):
                yield slice(row, row + together), prompts


def default_batch_size(sliced: SlicedModel) -> int:
    """The number of rows whose forward pass keeps about 1 GiB for the backward pass, as measured with one row."""
    return max(1, CHUNK_BYTES // max(1, sliced.kept[0]))


def pulled_back(change: Tensor, leaves: Point, cotangents: Float[Tensor, "row prompt pos d_target"]) -> Point:
    """The gradients by the leaves of each row's change, along its cotangents.

    Gradients in half precision overflow easily, so each row's cotangents are divided by a power of two. Such a division
    is exact, and rows are independent, so each row may have its own.
    """
    scales = power_of_two(cotangents)
    parts = torch.autograd.grad(change, leaves, (cotangents / scales).flatten(0, 1))
    return tuple(scales.flatten().view(-1, *[1] * (part.ndim - 1)) * part for part in parts)


def power_of_two(cotangents: Float[Tensor, "row prompt pos d_target"]) -> Float[Tensor, "row 1 1 1"]:
    """The largest power of two that does not exceed a row's largest entry; 1 for a row of zeros."""
    largest = cotangents.abs().amax((1, 2, 3), keepdim=True)
    return torch.where(largest > 0, torch.exp2(largest.clamp(min=1e-30).log2().floor()), torch.ones_like(largest))


def bias(sliced: SlicedModel) -> Act:
    """The act of steering vectors: each row is a vector [d_model] that is added at the slice's site."""

    def act(rows: Point, prompts: Int[Tensor, " prompt"]) -> Float[Tensor, "row_prompt pos d_target"]:
        return sliced.change(rows[0].repeat_interleave(len(prompts), 0), prompts.repeat(len(rows[0])))

    return act


def vectors_on(sliced: SlicedModel, batch_size: int | None = None) -> Problem:
    """The problem that steering vectors at the slice's site are measured by, with MELBO's objective at p = 2."""
    return Problem(sliced, bias(sliced), Objective().value, batch_size or default_batch_size(sliced))
