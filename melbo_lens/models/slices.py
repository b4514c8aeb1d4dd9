"""What does a perturbation at one layer change at a later one?  A slice computes it with only the blocks between."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from melbo_lens.arguments import public, without_autocast
from melbo_lens.models import blocks, hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.host import Host
from melbo_lens.models.targets import stream_name, target_of
from melbo_lens.perturbations.sites import SITES, Hook, Site, site_of
from melbo_lens.prompts import Positions, PromptBatch, Prompts, tokenize
from melbo_lens.randomness import gaussian

# A position whose norm, or its change, is so many times the usual norm of the target is an attention sink. In clean
# text sinks have over a hundred times the usual norm, and changes of behaviour have about once of it.
SINK = 10.0
KEPT_BYTES = 2**30  # what the forward pass of one row may keep for the backward pass without recomputing blocks
NO_GRADIENT = 1e-3  # a derivative that is so small a share of a difference is none
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, eq=False, repr=False)
class SlicedModel:
    """The function from the stream that leaves block `source_layer` to the target activations, for fixed prompts.

    Adding a bias at `hook_mlp_out` of that block equals adding it to this stream, so what comes before is run only
    once, and neither the blocks after the target nor the unembedding ever run. For a site within the block
    (`hook_attn_out`), the block itself runs too.

    Attributes:
        host: the opened model. Its blocks may lie on several devices; the tensors of the slice itself, and whatever it
            computes, lie on `host.device`.
        batch: the prompts, right-padded.
        source_layer: the block at whose `site` perturbations are added.
        target_layer: the block whose incoming stream is the target, or None if `target_hook` is another activation.
        source_hook, target_hook: the names of the hooks in the model; the target is read at the latter.
        calls: the blocks between, with the arguments of one ordinary pass.
        resid: the clean stream that leaves block `source_layer`, in the model's dtype.
        target: the clean target activations, float32; axes after `pos` are flattened.
        streams: the clean streams that leave block `source_layer` and each of the blocks between.
        source_call, entry: block `source_layer` itself with its arguments, and the clean stream that enters it; they
            serve updates of its weights.
        site: where in block `source_layer` perturbations are added.
        recomputed: whether the backward pass computes each block again instead of keeping what it needs. This bounds
            memory for long prompts, at the cost of one more forward pass.
    """

    host: Host
    batch: PromptBatch
    source_layer: int
    target_layer: int | None
    source_hook: str
    target_hook: str
    calls: tuple[blocks.BlockCall, ...]
    resid: Float[Tensor, "prompt pos d_model"]
    target: Float[Tensor, "prompt pos d_target"]
    streams: tuple[Tensor, ...] = ()
    source_call: blocks.BlockCall | None = None
    entry: Float[Tensor, "prompt pos d_model"] | None = None
    site: Site = SITES["mlp_out"]
    recomputed: bool = False

    @property
    def d_model(self) -> int:
        return self.resid.shape[-1]

    @property
    def everyone(self) -> Int[Tensor, " prompt"]:
        """The number of each prompt, for rows that are the prompts themselves."""
        return torch.arange(len(self.batch), device=self.device)

    @property
    def usual_norm(self) -> float:
        """The median norm of the clean target, at the prompts' own positions."""
        return float(self.target.norm(dim=-1)[self.batch.own].median())

    @property
    def begins_with_a_sink(self) -> bool:
        """Whether the first position of every prompt has a massive activation at the target, and others follow it."""
        first = self.target[:, 0].norm(dim=-1)
        return bool((self.batch.lengths > 1).all() and (first > SINK * self.usual_norm).all())

    @property
    def device(self) -> torch.device:
        return self.resid.device

    @property
    def own_blocks(self) -> list[nn.Module]:
        """The source block and those between, which are all that a replay runs."""
        assert self.source_call is not None  # `slice_model` recorded it
        return [self.source_call.block, *(call.block for call in self.calls)]

    def __repr__(self) -> str:
        return (
            f"SlicedModel({self.host.name}, {self.source_hook} to {self.target_hook}, "
            f"{len(self.batch)} prompts, {len(self.calls)} blocks between)"
        )

    def __call__(
        self, resid: Float[Tensor, "row pos d_model"], prompts: Int[Tensor, " row"]
    ) -> Float[Tensor, "row pos d_target"]:
        """Computes the target activations, float32, from this stream; row r belongs to prompt `prompts[r]`."""
        with without_autocast():
            return self._target(self.calls, [], resid, prompts)

    def change(
        self,
        perturbation: Float[Tensor, "row d_model"] | Float[Tensor, "row pos d_model"],
        prompts: Int[Tensor, " row"],
    ) -> Float[Tensor, "row pos d_target"]:
        """Computes the target activations with the perturbation added to the stream, minus those without.

        Args:
            perturbation: one vector for all positions of a row, or one for each position.
            prompts: the prompt to which each row belongs.
        """
        added = perturbation[:, None, :] if perturbation.ndim == 2 else perturbation
        if not self.site.after_block:
            return self.change_under([(self.source_hook, lambda activation, hook: _plus(activation, added))], prompts)
        # float32 plus half is float32, so this rounds only once
        perturbed = (self.resid[prompts] + added).to(self.resid.dtype)
        return self(perturbed, prompts) - self.target[prompts]

    def change_under(self, added: Sequence[Hook], prompts: Int[Tensor, " row"]) -> Float[Tensor, "row pos d_target"]:
        """Computes the target activations with hooks in the source block and those between, minus those without.

        This costs one block more than `change`, and takes any perturbation whose hooks are in these blocks.
        """
        assert self.source_call is not None and self.entry is not None  # `slice_model` recorded them
        with without_autocast():
            changed = self._target((self.source_call, *self.calls), added, self.entry[prompts], prompts)
            return changed - self.target[prompts]

    def _target(
        self, calls: tuple[blocks.BlockCall, ...], added: Sequence[Hook], stream: Tensor, prompts: Tensor
    ) -> Float[Tensor, "row pos d_target"]:
        read = None if self.target_layer is not None else self.target_hook
        target = _replay(self.host, calls, added, read, stream, prompts, len(self.batch), self.recomputed)
        return target.to(self.device).float()

    def check_source(self) -> None:
        """Checks that the source block can be replayed, which `change_under` needs.

        Raises:
            RuntimeError: the replay doesn't reproduce the recorded stream.
        """
        assert self.source_call is not None and self.entry is not None  # `slice_model` recorded them
        with hooks.frozen(self.host), torch.no_grad():
            _compare(
                self.host,
                self.source_call(self.entry, self.everyone, len(self.batch)),
                self.resid,
                f"block {self.source_layer} replayed by itself",
            )

    def shorter(self, target_layer: int) -> "SlicedModel":
        """Returns the slice that ends at an earlier target layer; nothing is run again.

        Args:
            target_layer: the new target, between the source and the present one.

        Raises:
            ValueError: the target is not between `source_layer` + 2 and this slice's own target, which must be a layer.
        """
        n_blocks = target_layer - self.source_layer - 1
        if self.target_layer is None or not 0 < n_blocks <= len(self.calls):
            raise ValueError(
                f"target_layer={target_layer} must lie from {self.source_layer + 2} to {self.target_layer}, "
                "the target layer of this slice."
            )
        name = hooks.resolved_name(self.host, stream_name(target_layer, self.host.n_layers))
        streams = self.streams[: n_blocks + 1]
        return replace(
            self,
            target_layer=target_layer,
            target_hook=name,
            calls=self.calls[:n_blocks],
            target=streams[-1].float(),
            streams=streams,
        )

    def in_float32(self) -> "SlicedModel":
        """Returns the same slice computed in float32, on copies of the blocks.

        It serves derivatives, which half precision drowns in rounding errors. A slice that needs a hook, to read a
        `target_hook` or within the source block, is returned unchanged, since copies don't have the model's hooks.
        """
        if self.resid.dtype in (torch.float32, torch.float64) or self.target_layer is None or not self.site.after_block:
            return self
        calls = tuple(blocks.in_float32(call) for call in self.calls)
        resid = self.resid.float()
        with hooks.frozen(self.host), torch.no_grad():
            target = _replay(self.host, calls, [], None, resid, self.everyone, len(self.batch))
        return replace(self, calls=calls, resid=resid, target=target.to(self.device))

    @cached_property
    def kept(self) -> tuple[int, int]:
        """The bytes that one row's forward pass keeps for its backward pass, and the most that both hold at once."""
        return blocks.bytes_of_row(self.host, self.calls, self.streams, len(self.batch), self.recomputed)


@public
def slice_model(
    model: Model,
    prompts: Prompts,
    source_layer: int,
    target_layer: int | None = None,
    target_positions: Positions | None = None,
    target_hook: str | None = None,
    site: str = "mlp_out",
) -> SlicedModel:
    """Runs the model once and cuts out the part between two layers.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`; it is left as it was.
        prompts: text, chat messages, a list of either, or token ids [prompt pos].
        source_layer: the block at whose `site` perturbations are added.
        target_layer: the target is the stream that enters this block, or for `n_layers` the stream that leaves the last
            block. Larger ones cost more.
        target_positions: a slice or indices into each prompt's own tokens; a change counts only there. None means all
            of them, except a first position that is an attention sink: in many models the stream has over a hundred
            times its usual norm there, which would drown every change of behaviour.
        target_hook: the activation to read instead of a layer's stream, for instance "blocks.9.attn.hook_z".
        site: "mlp_out", "resid_post" or "attn_out"; the first two give the same slice, and the last runs the source
            block too.

    Returns:
        The slice. It was checked: replaying the blocks without a perturbation reproduces the recorded stream, and with
        a random perturbation it reproduces a hooked run of the model.

    Raises:
        TypeError, ValueError: the model can't be steered, or the arguments don't fit it; this is raised before
            any forward pass.
        FloatingPointError: the activations hold NaN or infinity.
        RuntimeError: the model's blocks can't be replayed faithfully.
    """
    host = host_of(model)
    last, target_name = target_of(host, source_layer, target_layer, target_hook)
    where = site_of(site)
    source_hook = hooks.source_hook(host, where, source_layer)
    batch = tokenize(host, prompts, slice(None) if target_positions is None else target_positions)
    with hooks.frozen(host):
        whole = blocks.record_with_axes(host, batch.tokens, source_layer, last)
        recording = blocks.Recording(whole.calls[1:], whole.streams[1:])
        _check_finite(recording, batch, source_layer)
        everyone = torch.arange(len(batch), device=batch.tokens.device)
        read = target_name if target_layer is None else None
        with torch.no_grad():
            _check_replay(host, recording, everyone, source_layer)
            target = _replay(host, recording.calls, [], read, recording.streams[0], everyone, len(batch))
            entry, *streams = (stream.to(host.device) for stream in whole.streams)
            sliced = SlicedModel(
                host,
                batch,
                source_layer,
                target_layer,
                source_hook,
                hooks.resolved_name(host, target_name),
                tuple(recording.calls),
                streams[0],
                target.to(host.device).float(),
                tuple(streams),
                whole.calls[0],
                entry,
                where,
            )
            _check_hooked_run(sliced, last)
            _check_alone(sliced, last, recording.streams[-1])
            if host.quantised:
                _check_gradient(sliced)
    if target_positions is None and sliced.begins_with_a_sink:
        sliced = replace(sliced, batch=tokenize(host, batch, slice(1, None)))
    return replace(sliced, recomputed=True) if sliced.kept[0] > KEPT_BYTES else sliced


def opened(model: "Model | SlicedModel") -> "SlicedModel | Host":
    """Opens a model, so that it can be asked for its sizes; a slice is returned unchanged."""
    return model if isinstance(model, SlicedModel) else host_of(model)


def as_slice(
    model: "Model | SlicedModel",
    prompts: Prompts | None,
    source_layer: int | None,
    target_layer: int | None,
    target_positions: Positions | None,
    target_hook: str | None,
    site: str | None,
    default_positions: Positions | None = None,
) -> SlicedModel:
    """Returns the slice that was given in place of a model, or makes a new one.

    Raises:
        TypeError: a model was given without prompts or a source layer, or a slice with arguments that it fixes itself.
    """
    if not isinstance(model, SlicedModel):
        if prompts is None or source_layer is None:
            name = "prompts" if prompts is None else "source_layer"
            raise TypeError(
                f"{name} is missing: give it beside the model, or a slice of slice_model in the model's place."
            )
        positions = default_positions if target_positions is None else target_positions
        return slice_model(model, prompts, source_layer, target_layer, positions, target_hook, site or "mlp_out")
    beside = {
        "prompts": prompts,
        "source_layer": source_layer,
        "target_layer": target_layer,
        "target_positions": target_positions,
        "target_hook": target_hook,
        "site": site,
    }
    given = [name for name, value in beside.items() if value is not None]
    if given:
        raise TypeError(
            f"a slice was given, which says {' and '.join(given)} itself: "
            f"leave {'it' if len(given) == 1 else 'them'} out."
        )
    return model


def _replay(
    host: Host,
    calls: tuple[blocks.BlockCall, ...] | list[blocks.BlockCall],
    added: Sequence[Hook],
    read: str | None,
    stream: Tensor,
    prompts: Tensor,
    n_prompts: int,
    recomputed: bool = False,
) -> Tensor:
    """Runs the blocks one after the other, each with its own hooks, and returns what was read or left the last one."""
    seen: list[Tensor] = []
    everything = [*added, *([(read, lambda activation, hook: seen.append(activation))] if read else [])]

    def run(call: blocks.BlockCall, stream: Tensor) -> Tensor:
        # attached here, so that a block which is computed again has them again
        with hooks.attached(host, hooks.within(host, call.block, everything)):
            return call(stream, prompts, n_prompts)

    for call in calls:
        again = recomputed and torch.is_grad_enabled()
        stream = (
            checkpoint(run, call, stream, use_reentrant=False, preserve_rng_state=False) if again else run(call, stream)
        )
    if read is None:
        return stream
    if len(seen) != 1 or seen[0].ndim < 3 or seen[0].shape[:2] != stream.shape[:2]:
        shapes = [tuple(activation.shape) for activation in seen]
        raise ValueError(
            f"target_hook={read!r} must fire once with an activation [row pos ...]; seen: {shapes}. "
            "Choose another hook."
        )
    return seen[0].flatten(2)


def _plus(activation: Tensor, added: Tensor) -> Tensor:
    """Returns the activation with something added to it, in its own dtype, rounded once."""
    return (activation + added.to(activation.device)).to(activation.dtype)


def _check_finite(recording: blocks.Recording, batch: PromptBatch, source_layer: int) -> None:
    for i, stream in enumerate(recording.streams):
        bad = ~torch.isfinite(stream).all(-1) & batch.own.to(stream.device)
        if bad.any():
            prompt, position = bad.nonzero()[0].tolist()
            raise FloatingPointError(
                f"the clean activations that leave block {source_layer + i} hold NaN or infinity "
                f"(prompt {prompt}, position {position}): check the weights, or load the model in bfloat16 or float32."
            )


def _check_replay(host: Host, recording: blocks.Recording, everyone: Tensor, source_layer: int) -> None:
    for i, call in enumerate(recording.calls):
        _compare(
            host,
            call(recording.streams[i], everyone, len(everyone)),
            recording.streams[i + 1],
            f"block {source_layer + 1 + i} replayed by itself",
        )


def _check_hooked_run(sliced: SlicedModel, last: int) -> None:
    """Checks that a random perturbation at the hook has the effect that the replay predicts.

    It has another effect in a model that scales or normalises the sum afterwards.
    """
    typical = sliced.resid.float().norm(dim=-1).mean()
    noise = gaussian((sliced.d_model,), "slice check").to(sliced.device)
    vector = noise / noise.norm() * typical * 0.1
    seen: list[Tensor] = []
    add = (sliced.source_hook, lambda activation, hook: _plus(activation, vector))
    read = (
        [(sliced.target_hook, lambda activation, hook: seen.append(activation.flatten(2)))]
        if sliced.target_layer is None
        else []
    )
    hooked = blocks.record(sliced.host, sliced.batch.tokens, sliced.source_layer + 1, last, [add, *read])
    # the rows have another order and number, so that arguments must follow their prompts
    rows = torch.cat([sliced.everyone, sliced.everyone[:1]]).flip(0)
    replayed = sliced.change(vector.expand(len(rows), -1), rows) + sliced.target[rows]
    expected = seen[0] if seen else hooked.streams[-1]
    _compare(
        sliced.host,
        replayed,
        expected.to(sliced.device)[rows],
        f"the blocks after a perturbation at {sliced.source_hook!r}",
    )


def _check_gradient(sliced: SlicedModel) -> None:
    """Checks that the blocks pass gradients on; some kernels of quantised weights drop them without a word.

    Along a random v, the derivative of the change is compared with a difference, in the direction u of what the change
    has beyond v itself: the stream passes v on whatever the blocks do, and only they change it in other directions.
    """
    row, noise = sliced.everyone[:1], gaussian((sliced.d_model,), "gradient check").to(sliced.device)
    typical = float(sliced.resid[:1].float().norm(dim=-1)[sliced.batch.own[:1]].median()) or 1.0
    step = 0.05 * typical
    v = noise / noise.norm()
    difference = (sliced.change(step * v[None], row) - sliced.change(-step * v[None], row)) / (2 * step)
    difference = difference * sliced.batch.own[:1, :, None]
    u = difference
    if u.shape[-1] == len(v):
        u = difference - (difference @ v)[..., None] * v
    u = u / u.norm().clamp(min=1e-30)
    with torch.enable_grad():
        theta = torch.zeros_like(v[None]).requires_grad_()
        along = (sliced.change(theta, row) * u).sum()
        found = torch.autograd.grad(along, theta)[0] @ v if along.requires_grad else v.new_zeros(1)
    expected = float((difference * u).sum())
    if abs(float(found)) <= NO_GRADIENT * abs(expected):
        raise RuntimeError(
            f"the blocks change the target, but pass on no gradient (along one direction {float(found):.2g}, where a "
            f"difference has {expected:.2g}): a kernel of this model computes forwards only. This is so for "
            "bitsandbytes' 4 bits on CPUs with AVX512 in bfloat16, after the first pass. Load the model without "
            "quantisation, with torchao's int8 weights, or on a GPU. Writing and measures work as they are."
        )


def _check_alone(sliced: SlicedModel, last: int, together: Tensor) -> None:
    """Checks that the shortest prompt gives the same activations in the batch as alone.

    It doesn't in models that derive positions from the length of the batch, where padding matters.
    """
    lengths = sliced.batch.lengths.tolist()
    if min(lengths) == max(lengths):
        return
    row = lengths.index(min(lengths))
    ids = sliced.batch.tokens[[row], : lengths[row]]
    alone = blocks.record(sliced.host, ids, last, last).streams[-1]
    _compare(
        sliced.host,
        together[[row], : lengths[row]],
        alone,
        f"the activations of prompt {row} beside longer prompts",
        "on the length of the batch; give prompts of one length",
    )


def _compare(host: Host, replayed: Tensor, recorded: Tensor, what: str, why: str = "rescale the perturbation") -> None:
    error = (replayed.float() - recorded.float()).norm() / recorded.float().norm().clamp(min=1e-30)
    tolerance = TOLERANCES[torch.float16] if host.quantised else TOLERANCES.get(recorded.dtype, 1e-4)
    if not error <= tolerance:
        raise RuntimeError(
            f"{what} differ from a run of the whole model by {error:.1e} of their norm (allowed: {tolerance:.0e}). "
            f"This model can't be sliced here: its blocks depend on something other than their arguments, or {why}."
        )
