"""What does an adapter do at its source?  It gives each position a bias, to which a steering vector may be near."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from melbo_lens.arguments import one_of, positive, public
from melbo_lens.ascent.manifolds import unit
from melbo_lens.memory import in_batches
from melbo_lens.models import blocks, hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.host import Host
from melbo_lens.models.reaching import said_of
from melbo_lens.models.sinks import ordinary_positions
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.sites import site_of
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.prompts import PromptBatch, Prompts, tokenize

ROWS_AT_ONCE = 128
# the updated weights -> the site at which a vector acts in the same place
VECTOR_SITES = {"mlp": "mlp_out", "attn": "attn_out"}


@dataclass(frozen=True, eq=False, repr=False)
class AdapterEffect:
    """What the stream gains at one layer, position by position.

    Attributes:
        values: the bias that each adapter gives each position of each prompt, measured after a norm that follows the
            weights; 0 in the padding.
        mask: True at the prompts' own positions but attention sinks, where the clean stream of a layer has over ten
            times its median norm.
        layer: the block whose output gains the bias.
        site: the site at which a steering vector would act in the same place.
    """

    values: Float[Tensor, "adapter prompt pos d_model"]
    mask: Bool[Tensor, "prompt pos"]
    layer: int
    site: str = "mlp_out"

    def norms(self) -> Float[Tensor, " adapter"]:
        """The mean norm of the update over the positions of the mask."""
        return self.values.norm(dim=-1)[:, self.mask].mean(-1)

    def singular(self, adapter: int) -> tuple[Float[Tensor, " k"], Float[Tensor, "k d_model"]]:
        """Singular values and right singular vectors of one adapter's biases [position d_model], largest first.

        The biases are those of the positions of the mask, and not centred.

        Args:
            adapter: its index.

        Returns:
            The singular values, and below each other the directions that belong to them.
        """
        _, values, vectors = torch.linalg.svd(self.values[adapter][self.mask], full_matrices=False)
        return values, vectors

    def __repr__(self) -> str:
        n, prompts = self.values.shape[:2]
        return (
            f"AdapterEffect({n} adapters on {prompts} prompts at layer {self.layer}, mean norm "
            f"{self.norms().mean():.3g})"
        )


@public
def source_effects(
    adapters: SteeringAdapters, model: Model, prompts: Prompts, layer: int | None = None
) -> AdapterEffect:
    """The bias that each position receives at a source layer: what the weights write with the update minus without it.

    Updates at earlier source layers act in both runs, so that only this layer's share is measured.

    Args:
        adapters: the adapters, each of which acts by itself.
        model: the model that they were learned on; it is left as it was.
        prompts: text, chats or token ids.
        layer: the source layer to measure; it may be None if there is only one.

    Returns:
        The biases [adapter prompt pos d_model].

    Raises:
        ValueError: the adapters don't fit the model, or have no update at `layer`.
        FloatingPointError: an update holds NaN or infinity.
    """
    host = host_of(model)
    adapters = adapters.on(host)
    layer = adapters.source_layer if layer is None else layer
    if layer not in adapters.factors:
        raise ValueError(
            f"layer={layer} is no source layer of these adapters: choose from {list(adapters.source_layers)}."
        )
    batch = tokenize(host, prompts)
    with hooks.frozen(host):
        biases, ordinary = _biases(adapters, host, batch, layer), ordinary_positions(host, batch)
    return AdapterEffect(biases, ordinary, layer, VECTOR_SITES[adapters.sites[layer].name])


def _biases(
    adapters: SteeringAdapters, host: Host, batch: PromptBatch, layer: int
) -> Float[Tensor, "adapter prompt pos d_model"]:
    """What each adapter adds at one of its layers, 0 in the padding."""
    before = [other for other in adapters.source_layers if other < layer]
    with hooks.frozen(host), torch.no_grad():
        clean = _written(adapters[:1], host, batch, layer, [])

        def added(places: Sequence[int]) -> Float[Tensor, "adapter prompt pos d_model"]:
            some = adapters[list(places)]
            plain = _written(some, host, batch, layer, before) if before else clean
            return (_written(some, host, batch, layer, [*before, layer]) - plain).masked_fill(~batch.own[..., None], 0)

        at_once = max(1, ROWS_AT_ONCE // len(batch))
        parts = [part for _, part in in_batches(range(len(adapters)), at_once, added)]
    biases = torch.cat(parts)
    hooks.check_finite(host, biases.abs(), [f"adapter {k}" for k in range(len(biases))], "its update")
    return biases


@public
def nearest_vectors(
    adapters: SteeringAdapters,
    model: Model,
    prompts: Prompts,
    layer: int | None = None,
    *,
    mode: Literal["mean", "gain"] = "mean",
    gain: float = 6.0,
) -> SteeringVectors:
    """A steering vector for each adapter, which acts as the adapter does but whatever the position holds.

    At the positions t, all but attention sinks, the adapter gives the biases ``e_t``; for one of rank 1 that is
    ``s (a . x_t) b``. Then:

        mean:  v = mean over t of e_t
        gain:  v = gain * s * sign(mean over t of a . x_t) * b

    The mean is the vector with the least squared distance to the biases. "gain" opens the gate of a rank-1 adapter
    ("degating"): it writes b at full strength even where a reads little of it.

    Args:
        adapters: the adapters.
        model: the model that they were learned on; it is left as it was.
        prompts: text, chats or token ids.
        layer: the source layer whose share is replaced; it may be None if there is only one. A vector for each layer,
            all of them at once in `ml.steer`, replaces an adapter of several layers.
        mode: "mean" or "gain".
        gain: what ``a . x`` is set to, in units of the weights' own input; published ones are 6 and 8, and the right
            one is found by trying several.

    Returns:
        One vector for each adapter. In the provenance, `explained` is the share of the adapter's squared effect that
        the vector reproduces when it is added at every position, ``1 - sum_t ||e_t - v||^2 / sum_t ||e_t||^2``.
        `explained_by_direction` is the share of the top singular direction with a separate coefficient at each
        position, which is the most that any single direction can explain.

    Raises:
        ValueError: the adapters have several source layers and none is named, or don't fit the model; or "gain" is
            asked of adapters of a higher rank, or behind a norm, where the update is no multiple of b.

    Source: for the mean, a question of Mack and Turner's post (2024); for the gain, the replication of CPE in the
    public repository wusche1/cpe (2026).
    """
    one_of("mode", mode, ("mean", "gain"))
    positive("gain", gain, "")
    host = host_of(model)
    adapters = adapters.on(host)
    measured = source_effects(adapters, host, prompts, layer)
    biases = measured.values[:, measured.mask]  # [adapter position d_model]
    vectors = biases.mean(1) if mode == "mean" else _degated(adapters, measured.layer, biases, gain, host.dtype)
    total = biases.square().sum((1, 2)).clamp(min=1e-30)
    missed = (biases - vectors[:, None]).square().sum((1, 2))
    top = torch.linalg.svdvals(biases)[:, 0].square() / total
    provenance = {
        "method": "nearest_vectors",
        "mode": mode,
        "gain": gain if mode == "gain" else None,
        "explained": [round(share, 6) for share in (1 - missed / total).tolist()],
        "explained_by_direction": [round(share, 6) for share in top.tolist()],
        "adapters": dict(adapters.provenance),
        **said_of(host, tokenize(host, prompts), measured.layer, site_of(measured.site)),
    }
    return SteeringVectors(vectors, measured.layer, provenance=provenance, site=measured.site)


def _degated(
    adapters: SteeringAdapters,
    layer: int,
    biases: Float[Tensor, "adapter position d_model"],
    gain: float,
    dtype: torch.dtype,
) -> Float[Tensor, "adapter d_model"]:
    """Writes what rank-1 updates would write if their input were `gain`, with the sign of their mean bias."""
    if adapters.rank != 1:
        raise ValueError(f'mode="gain" asks for adapters of rank 1, and these have {adapters.rank}: use mode="mean".')
    written = (adapters.scales[:, None] * adapters.factors[layer][1][:, :, 0]).to(biases)
    along = unit(written)[:, None]
    aside = biases - (biases * along).sum(-1, keepdim=True) * along
    # in half precision a bias is a small difference of rounded activations
    most = 0.25 if dtype.itemsize < 4 else 1e-4
    if bool((aside.square().sum((1, 2)) > most * biases.square().sum((1, 2))).any()):
        raise ValueError(
            'mode="gain" asks for updates that write one direction; here a norm follows the weights: use mode="mean".'
        )
    signs = torch.where((written * biases.mean(1)).sum(1) < 0, -1.0, 1.0)
    return gain * signs[:, None] * written


def mean_norms(
    adapters: SteeringAdapters, model: Model, prompts: Prompts, where: Bool[Tensor, "prompt pos"] | None = None
) -> Float[Tensor, " adapter"]:
    """The mean norm of each adapter's update over its source layers and these positions.

    None means the prompts' own positions but attention sinks.
    """
    host = host_of(model)
    batch = tokenize(host, prompts)
    if where is None:
        with hooks.frozen(host):
            where = ordinary_positions(host, batch)
    norms = [_biases(adapters.on(host), host, batch, layer).norm(dim=-1) for layer in adapters.source_layers]
    return torch.stack([of_layer[:, where].mean(-1) for of_layer in norms]).mean(0)


def _written(
    adapters: SteeringAdapters, host: Host, batch: PromptBatch, layer: int, acting: Sequence[int]
) -> Float[Tensor, "adapter prompt pos d_model"]:
    """What the updated weights of one block write to the stream, in float32, while the layers `acting` are updated."""
    seen: list[Tensor] = []
    read = (
        adapters.sites[layer].written,
        lambda activation, hook: seen.append(activation.to(host.device).float().clone()),
    )
    index = [k for k in range(len(adapters)) for _ in range(len(batch))]
    some = replace(adapters, factors={i: adapters.factors[i] for i in acting}) if acting else None
    active = some.row_hooks(index, some.scales.new_ones(len(index))) if some is not None else []
    blocks.record(host, batch.tokens.repeat(len(adapters), 1), layer, layer + 1, [*active, read])
    return seen[0].unflatten(0, (len(adapters), len(batch)))
