"""What is a low-rank update while it is learned?  The weights it updates, its starting factors, and its act on a slice.

`LowRank` is the act: it runs adapters as batch rows, each at the scale that gives its update the wanted mean norm.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_lens.ascent.states import Point
from melbo_lens.measures.controls import scales_for_norms
from melbo_lens.models.host import Host
from melbo_lens.models.sinks import ordinary_positions
from melbo_lens.models.slices import SlicedModel
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.sites import WeightSite, flat_heads, layer_of
from melbo_lens.perturbations.updates import GridUpdate
from melbo_lens.randomness import gaussian_rows

MOST_HALVINGS = 10  # of an automatic radius that a norm bounds


@dataclass(frozen=True, eq=False)
class LowRank:
    """Adapters that act on a slice: an `Act` whose points hold A [row rank d_in] and B [row d_model rank] of each site.

    Attributes:
        sliced: the slice, which begins at the first of the sites or before it.
        sites: the weights that are updated, one entry for each source layer, in order.
        hidden: the clean hidden activation at each site, at the prompts' own positions but attention sinks.
        scale: the scale of every update. None solves each adapter's scale so that its update has the mean norm
            `update_norm`.
        update_norm: the wanted mean of ``||s B A a||`` over these positions and layers, a the clean hidden activation.
            It is measured before any norm that follows the weights.
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

    def minus(self, rows: Point) -> Point:
        """The rows whose updates are the opposite ones: A and minus B at each site."""
        return tuple(-x if i % 2 else x for i, x in enumerate(rows))

    def scales(self, rows: Point) -> Float[Tensor, " row"]:
        """The scale s of each adapter's update. The ascent's gradient treats it as a constant."""
        if self.scale is not None:
            return rows[0].new_full((len(rows[0]),), self.scale)
        assert self.update_norm is not None, "a LowRank without a scale needs an update_norm"
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
        """The `update_norm` that belongs to a radius.

        Without a norm after the weights it is the radius itself. With such a norm it is the mean norm before it at
        which the updates of these random rows have the radius after it.
        """
        factors = {site.layer: (random[2 * i], random[2 * i + 1]) for i, site in enumerate(self.sites)}
        few = SteeringAdapters(
            factors, random[0].new_ones(len(random[0])), sites={site.layer: site for site in self.sites}
        )
        scales = scales_for_norms(few, self.sliced.host, self.sliced.batch, few.scales.new_full((len(few),), radius))
        return float((scales * self.norms(random)).mean())

    def reachable(self, random: Point, radius: float, rule: str) -> tuple[float, str, float]:
        """Returns the radius, halved until updates can have it, with its rule in words and its `update_norm`.

        A norm after the weights bounds what an update can add to the stream.
        """
        for halvings in range(MOST_HALVINGS):
            smaller = radius / 2**halvings
            said = f"{rule}, halved {halvings} times, since a norm after the weights bounds updates"
            with suppress(ValueError):
                return smaller, said if halvings else rule, self.update_norm_for(random, smaller)
        raise ValueError(
            f"no scale gives updates a mean norm of {radius / 2 ** (MOST_HALVINGS - 1):.4g}: a norm after the weights "
            "bounds them. Give a smaller radius, or a scale."
        )


def hidden_activations(sliced: SlicedModel, sites: Sequence[WeightSite]) -> list[Float[Tensor, "position d_in"]]:
    """The clean hidden activations at each site, at the prompts' own positions but attention sinks.

    At a sink an update may be many times as large as elsewhere, and a mean would be that of the first position.
    """
    seen: dict[int, Tensor] = {}
    where = ordinary_positions(sliced.host, sliced.batch)

    def read(layer: int) -> Callable[..., None]:
        return lambda activation, hook: seen.update({layer: flat_heads(activation).to(sliced.device).float()[where]})

    with torch.no_grad():
        sliced.change_under([(site.hidden_hook, read(site.layer)) for site in sites], sliced.everyone)
    return [seen[site.layer] for site in sites]


def weight_sites(
    host: Host, layers: Sequence[int], name: str, rank: int, target_layer: int | None, target_hook: str | None
) -> list[WeightSite]:
    """The weights that adapters of these source layers update: the "mlp"'s or the "attn"'s, one entry for each layer.

    Raises:
        ValueError: a layer that the model doesn't have or whose update the target can't show, or too large a rank.
    """
    if not layers:
        raise ValueError("no source layer was named: give at least one.")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < host.n_layers:
            raise ValueError(
                f"source_layer={layer!r} must be an integer from 0 to {host.n_layers - 1}: the model has "
                f"{host.n_layers} blocks."
            )
    sites = [host.weight_site(layer, name) for layer in layers]
    for layer in layers:
        most = min(host.widths(layer, name))
        if rank > most:
            raise ValueError(
                f"rank={rank} must be from 1 to {most}, the smaller side of the {name} output weights of layer "
                f"{layer}: no update of them has more."
            )
        read_in = layer_of(target_hook or "")
        if read_in is not None and read_in <= layer and len(layers) > 1:
            raise ValueError(
                f"source layer {layer} must lie before the block of target_hook={target_hook!r}: what it updates is "
                "not read there."
            )
        if target_layer is not None and layer + 1 >= target_layer and len(layers) > 1:
            raise ValueError(
                f"source layer {layer} must lie at least two before target_layer={target_layer}: a block has to lie "
                "between."
            )
    return sites


def band_with(host: Host, name: str, band: range, most: int) -> list[int]:
    """Returns the layers of a band that have such weights, else the next one before `most` that has them.

    In a hybrid, only full attention has output weights. If there is none, it is the whole band, and the fit says so.
    """

    def has(layer: int) -> bool:
        try:
            host.weight_site(layer, name)
        except ValueError:
            return False
        return True

    later = (layer for layer in range(band.stop, most) if has(layer))
    return [layer for layer in band if has(layer)] or list(itertools.islice(later, 1)) or [*band]


def starting_factors(
    host: Host,
    sites: Sequence[WeightSite],
    init: SteeringAdapters | None,
    n_adapters: int,
    rank: int,
    seed: int,
    n: int,
) -> Point:
    """The factors of `n` starts: for each site A [restart adapter rank d_in] and then B [restart adapter d_model rank].

    The first start takes the factors of `init` if they are given. All other factors are Gaussian; those of adapter k
    depend only on (seed, k), on the layer, and on which restart they are for.
    """
    starts = [_one_start(host, sites, init, n_adapters, rank, seed, restart) for restart in range(n)]
    return tuple(torch.stack(same) for same in zip(*starts, strict=True))


def _one_start(
    host: Host,
    sites: Sequence[WeightSite],
    init: SteeringAdapters | None,
    n_adapters: int,
    rank: int,
    seed: int,
    restart: int,
) -> Point:
    if init is not None and restart == 0:
        signs = _signs(init)
        return tuple(factor.cpu() for a, b in init.factors.values() for factor in (a, signs * b))
    point: list[Tensor] = []
    for site in sites:
        d_in, d_model = host.widths(site.layer, site.name)
        for name, shape in (("A", (rank, d_in)), ("B", (d_model, rank))):
            which = (site.layer, name, *([restart] if restart else []))
            rows = gaussian_rows(n_adapters, shape[0] * shape[1], "fit_adapters", seed, *which)
            point.append(rows.view(n_adapters, *shape))
    return tuple(point)


def check_init(
    host: Host, sites: Sequence[WeightSite], init: SteeringAdapters | None, n_adapters: int, rank: int
) -> None:
    """Refuses adapters that can't be the starting point of a fit of these sites.

    Raises:
        ValueError: another number, rank or width, other source layers, or other weights.
    """
    if init is None:
        return
    wanted = {site.layer: (n_adapters, rank, *host.widths(site.layer, site.name)) for site in sites}
    there = {layer: (len(a), a.shape[1], a.shape[2], b.shape[1]) for layer, (a, b) in init.factors.items()}
    if wanted != there or init.site != sites[0].name:
        raise ValueError(
            f"init holds at layer -> (n_adapters, rank, d_in, d_model) {there} of {init.site!r}; asked for are "
            f"{wanted} of {sites[0].name!r}."
        )


def _signs(adapters: SteeringAdapters) -> Float[Tensor, "adapter 1 1"]:
    """The sign of each adapter's scale, which is all of it that a fit from its factors keeps."""
    return (1 - 2 * (adapters.scales < 0).to(adapters.scales))[:, None, None]


def digest_of_factors(adapters: SteeringAdapters) -> str:
    """A short digest of the factors' bits, by which a provenance names the adapters that a fit started from."""
    digest = hashlib.blake2b(digest_size=8)
    for a, b in adapters.factors.values():
        for factor in (a, _signs(adapters) * b):
            digest.update(factor.cpu().numpy().tobytes())
    return digest.hexdigest()
