"""What are the objective and its gradient for many adapters?  They run through the slice as batch rows, source block included."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.factors import Point, Values
from melbo_lens.methods.gradients import power_of_two
from melbo_lens.objectives import TokenNorm, change_objective
from melbo_lens.sites import WeightSite
from melbo_lens.sliced_model import SlicedModel
from melbo_lens.updates import GridUpdate


@dataclass(frozen=True, eq=False)
class AdapterObjective:
    """The function from factors to their objective, summed over the prompts, and the gradient of that less the penalty.

    A row is one adapter on one prompt. Rows never see each other, so `batch_size` changes results by rounding only.

    Attributes:
        sliced: begins at the first of the sites.
        sites: one for each source layer, in order.
        hidden: the clean hidden activation at each site, at the prompts' own positions [position d_mlp].
        p, q, token_norm: see `change_objective`.
        batch_size: rows at once.
        scale: of every update; None solves each adapter's so that its update has the mean norm `update_norm`.
        update_norm: mean over own positions and layers of the update before any norm, on the clean hidden activations.
        diversity: see `penalized`.
    """

    sliced: SlicedModel
    sites: Sequence[WeightSite]
    hidden: Sequence[Float[Tensor, "position d_mlp"]]
    p: float
    q: float
    token_norm: TokenNorm
    batch_size: int
    scale: float | None
    update_norm: float | None = None
    diversity: float = 0.0

    def scales(self, point: Point) -> Values:
        """What multiplies each adapter's update."""
        if self.scale is not None:
            return point[0].new_full((len(point[0]),), self.scale)
        return self.update_norm / self.norms(point).clamp(min=torch.finfo(point[0].dtype).tiny)

    def norms(self, point: Point) -> Values:
        """The mean norm of ``B A a`` of each adapter over the clean hidden activations of all layers."""
        pairs = zip(self.hidden, point[::2], point[1::2], strict=True)
        with torch.no_grad():
            layers = [torch.stack([(h @ a.T @ b.T).norm(dim=-1).mean() for a, b in zip(many_a, many_b, strict=True)]) for h, many_a, many_b in pairs]
        return torch.stack(layers).mean(0)

    def __call__(self, point: Point) -> tuple[Values, Values, Point]:
        """Objective, score (objective less penalty) and the gradient of the score, all for fixed scales."""
        scales = self.scales(point)
        score, cotangents = self._penalized(self.changes(point, scales)) if self.diversity else (None, None)
        values = point[0].new_zeros(len(point[0]))
        gradients = tuple(torch.zeros_like(factor) for factor in point)
        for adapters, prompts in self._chunks(len(point[0])):
            leaves = tuple(factor[adapters].detach().requires_grad_() for factor in point)
            with torch.enable_grad():
                change, mask = self._change(leaves, scales[adapters], prompts)
                outer = change.detach().requires_grad_()
                value = change_objective(outer, mask, self.p, self.q, self.token_norm)
                if cotangents is None:
                    (cotangent,) = torch.autograd.grad(value.sum(), outer)
                else:
                    cotangent = cotangents[adapters, prompts].flatten(0, 1)
                # half precision overflows easily, and a power of two is exact
                unit = power_of_two(cotangent).max()
                parts = torch.autograd.grad(change, leaves, cotangent / unit)
            values[adapters] += value.detach().unflatten(0, (len(leaves[0]), -1)).sum(1)
            for whole, part in zip(gradients, parts, strict=True):
                whole[adapters] += unit * part
        return values, values if score is None else score, gradients

    def changes(self, point: Point, scales: Values) -> Float[Tensor, "adapter prompt pos d_target"]:
        """The target change of every adapter on every prompt, 0 outside the target positions."""
        whole = point[0].new_zeros(len(point[0]), *self.sliced.target.shape)
        with torch.no_grad():
            for adapters, prompts in self._chunks(len(point[0])):
                change, mask = self._change(tuple(factor[adapters] for factor in point), scales[adapters], prompts)
                whole[adapters, prompts] = (change * mask[..., None]).unflatten(0, whole[adapters, prompts].shape[:2])
        return whole

    def _change(self, factors: Point, scales: Values, prompts: slice) -> tuple[Tensor, Tensor]:
        """Target changes and target masks of rows: adapter by adapter these prompts."""
        rows = self.sliced.everyone[prompts]
        triples = zip(self.sites, factors[::2], factors[1::2], strict=True)
        added = [hook for site, a, b in triples for hook in site.hooks(GridUpdate(a, b, scales))]
        rows = rows.repeat(len(scales))
        return self.sliced.change_under(added, rows), self.sliced.batch.target_mask[rows]

    def _penalized(self, changes: Tensor) -> tuple[Values, Tensor]:
        with torch.enable_grad():
            leaf = changes.requires_grad_()
            masks = self.sliced.batch.target_mask.repeat(len(leaf), 1)
            values = change_objective(leaf.flatten(0, 1), masks, self.p, self.q, self.token_norm).unflatten(0, (len(leaf), -1)).sum(1)
            score = penalized(values, leaf.flatten(1), self.diversity)
            return score.detach(), torch.autograd.grad(score.sum(), leaf)[0]

    def _chunks(self, n_adapters: int) -> Iterator[tuple[slice, slice]]:
        """Groups of adapters and of prompts whose rows together are at most `batch_size`."""
        n_prompts = len(self.sliced.batch)
        together, at_once = max(1, self.batch_size // n_prompts), min(n_prompts, self.batch_size)
        for adapter in range(0, n_adapters, together):
            for prompt in range(0, n_prompts, at_once):
                yield slice(adapter, adapter + together), slice(prompt, prompt + at_once)


def penalized(values: Values, changes: Float[Tensor, "adapter change"], diversity: float) -> Values:
    """The objective of each adapter less a penalty for a change like that of an earlier one, in order::

        f_k / (1 + diversity * sum over j < k of cos(d_k, d_j) ** 4)

    The earlier ones are held fixed, so adapter 0 is never bent, and adapter k only by those before it. The fourth power spares changes that
    merely share something, as different behaviours do (cosines about .5), and repels copies.
    """
    unit = changes / changes.norm(dim=1, keepdim=True).clamp(min=1e-30)
    alike = (unit @ unit.detach().T) ** 4
    return values / (1 + diversity * alike.tril(diagonal=-1).sum(1))
