"""What do rows change on the mean over positions and prompts, and how does that depend on them?  CPE and DCT ask it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.ascent.manifolds import unit
from melbo_lens.ascent.states import Point
from melbo_lens.methods.problem import Problem, pulled_back
from melbo_lens.models.slices import SlicedModel


@dataclass(frozen=True, eq=False)
class MeanChange:
    """The mean change of the target over each prompt's target positions, and over the prompts.

    Attributes:
        problem: what acts on which slice, and in which chunks.
        per_prompt: whether, where no directions are given, each prompt has its own. The gradients are then those of
            the mean of the prompts' norms, otherwise of the norm of the prompts' mean.
    """

    problem: Problem
    per_prompt: bool = False

    def __call__(self, rows: Point, targets: Tensor | None) -> tuple[Float[Tensor, "row d_target"], Point]:
        """Computes mean changes, and the gradients of their components along directions.

        Args:
            rows: the rows, [row ...] each.
            targets: a direction [row d_target] for each row; None takes the directions of the changes themselves.
        """
        sliced = self.problem.sliced
        if targets is None and not self.per_prompt and self.problem.batch_size < len(sliced.batch):
            targets = unit(self.means(rows))  # the prompts don't fit into one pass, and all of them decide
        means = rows[0].new_zeros(len(rows[0]), sliced.target.shape[-1])
        gradients = tuple(torch.zeros_like(x) for x in rows)
        for chunk, prompts in self.problem.chunks(len(rows[0])):
            leaves = tuple(x[chunk].detach().requires_grad_() for x in rows)
            with torch.enable_grad():
                change = self.problem.act(leaves, prompts)
            weights = self._weights[prompts][None, :, :, None]
            parts = (change.detach().unflatten(0, (len(leaves[0]), -1)) * weights).sum(2)  # [row prompt d_target]
            mean = parts.sum(1)
            if targets is not None:
                directions = targets[chunk][:, None]
            else:
                directions = unit(parts) if self.per_prompt else unit(mean)[:, None]
            cotangent = directions[:, :, None] * weights
            found = pulled_back(change, leaves, cotangent)
            means[chunk] += mean
            for whole, part in zip(gradients, found, strict=True):
                whole[chunk] += part
        return means, gradients

    def means(self, rows: Point) -> Float[Tensor, "row d_target"]:
        """Computes the mean changes alone."""
        means = rows[0].new_zeros(len(rows[0]), self.problem.sliced.target.shape[-1])
        with torch.no_grad():
            for chunk, prompts in self.problem.chunks(len(rows[0])):
                some = tuple(x[chunk] for x in rows)
                change = self.problem.act(some, prompts).unflatten(0, (len(some[0]), -1))
                means[chunk] += (change * self._weights[prompts][None, :, :, None]).sum((1, 2))
        return means

    @property
    def _weights(self) -> Float[Tensor, "prompt pos"]:
        return mean_weights(self.problem.sliced)


def mean_weights(sliced: SlicedModel) -> Float[Tensor, "prompt pos"]:
    """Returns the weight of each position in the mean over target positions and prompts; all of them sum to 1."""
    mask = sliced.batch.target_mask.float()
    return mask / mask.sum(1, keepdim=True) / len(mask)
