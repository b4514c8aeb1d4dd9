"""What does a perturbation at one layer change at a later one?  A slice computes it with only the blocks between."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from melbo_lens.arguments import without_autocast
from melbo_lens.models import blocks, hooks
from melbo_lens.models.host import Host
from melbo_lens.models.sinks import SINK
from melbo_lens.models.targets import stream_name
from melbo_lens.perturbations.sites import SITES, Hook, Site
from melbo_lens.prompts import PromptBatch


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
            return self.change_under([(self.source_hook, lambda activation, hook: plus(activation, added))], prompts)
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
        target = replay(self.host, calls, added, read, stream, prompts, len(self.batch), self.recomputed)
        return target.to(self.device).float()

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
        shared: blocks.Shared = {}
        calls = tuple(blocks.in_float32(call, shared) for call in self.calls)
        resid = self.resid.float()
        with hooks.frozen(self.host), torch.no_grad():
            target = replay(self.host, calls, [], None, resid, self.everyone, len(self.batch))
        return replace(self, calls=calls, resid=resid, target=target.to(self.device))

    @cached_property
    def kept(self) -> tuple[int, int]:
        """The bytes that one row's forward pass keeps for its backward pass, and the most that both hold at once."""
        return blocks.bytes_of_row(self.host, self.calls, self.streams, len(self.batch), self.recomputed)


def replay(
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
    shared: blocks.Shared = {}
    everything = [*added, *([(read, lambda activation, hook: seen.append(activation))] if read else [])]

    def run(call: blocks.BlockCall, stream: Tensor) -> Tensor:
        # attached here, so that a block which is computed again has them again
        with hooks.attached(host, hooks.within(host, call.block, everything)):
            return call(stream, prompts, n_prompts, shared)

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


def plus(activation: Tensor, added: Tensor) -> Tensor:
    """Returns the activation with something added to it, in its own dtype, rounded once."""
    return (activation + added.to(activation.device)).to(activation.dtype)
