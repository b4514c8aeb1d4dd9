"""What do adapters do in a slice, and how much?  Updates of weights run as batch rows, each at the scale that gives it its mean norm."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_lens.ascent.states import Point
from melbo_lens.measures.controls import scales_for_norms
from melbo_lens.models.slices import SlicedModel
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.sites import WeightSite, flat_heads
from melbo_lens.perturbations.updates import GridUpdate


@dataclass(frozen=True, eq=False)
class LowRank:
    """Rows that are adapters, A and B of each site in turn, acting on the slice: an `Act`.

    Attributes:
        sliced: begins at the first of the sites.
        sites: one for each source layer, in order.
        hidden: the clean hidden activation at each site, at the prompts' own positions [position d_in].
        scale: of every update; None solves each adapter's so that its update has the mean norm `update_norm`.
        update_norm: mean over own positions and layers of the update before any norm, on the clean hidden activations.
    """

    sliced: SlicedModel
    sites: Sequence[WeightSite]
    hidden: Sequence[Float[Tensor, "position d_in"]]
    scale: float | None
    update_norm: float | None = None

    def __call__(self, rows: Point, prompts: Int[Tensor, " prompt"]) -> Float[Tensor, "row_prompt pos d_target"]:
        scales = self.scales(tuple(factor.detach() for factor in rows))
        triples = zip(self.sites, rows[::2], rows[1::2], strict=True)
        added = [hook for site, a, b in triples for hook in site.hooks(GridUpdate(a, b, scales))]
        return self.sliced.change_under(added, prompts.repeat(len(scales)))

    def scales(self, rows: Point) -> Float[Tensor, " row"]:
        """What multiplies each adapter's update; the gradient takes it as fixed."""
        if self.scale is not None:
            return rows[0].new_full((len(rows[0]),), self.scale)
        return self.update_norm / self.norms(rows).clamp(min=torch.finfo(rows[0].dtype).tiny)

    def norms(self, rows: Point) -> Float[Tensor, " row"]:
        """The mean norm of ``B A a`` of each adapter over the clean hidden activations of all layers."""
        pairs = zip(self.hidden, rows[::2], rows[1::2], strict=True)
        with torch.no_grad():
            layers = [
                torch.stack([(h @ a.T @ b.T).norm(dim=-1).mean() for a, b in zip(many_a, many_b, strict=True)])
                for h, many_a, many_b in pairs
            ]
        return torch.stack(layers).mean(0)

    def update_norm_for(self, random: Point, radius: float) -> float:
        """The radius; with a norm after the weights, the norm before it at which random updates have the radius after it."""
        factors = {site.layer: (random[2 * i], random[2 * i + 1]) for i, site in enumerate(self.sites)}
        few = SteeringAdapters(
            factors, random[0].new_ones(len(random[0])), sites={site.layer: site for site in self.sites}
        )
        scales = scales_for_norms(few, self.sliced.host, self.sliced.batch, few.scales.new_full((len(few),), radius))
        return float((scales * self.norms(random)).mean())


def hidden_activations(sliced: SlicedModel, sites: Sequence[WeightSite]) -> list[Float[Tensor, "position d_in"]]:
    """The clean hidden activations at each site, at the prompts' own positions."""
    seen: dict[int, Tensor] = {}

    def read(layer: int):
        return lambda activation, hook: seen.update({layer: flat_heads(activation).float()[sliced.batch.own]})

    with torch.no_grad():
        sliced.change_under([(site.hidden_hook, read(site.layer)) for site in sites], sliced.everyone)
    return [seen[site.layer] for site in sites]
