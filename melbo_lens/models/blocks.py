"""What does each block do as a function?  One ordinary pass is recorded, and its calls are repeated on other rows."""

import copy
from collections import UserDict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from melbo_lens.models.hooks import attached, frozen, watched, without_reason
from melbo_lens.models.host import Host
from melbo_lens.models.tally import Tally
from melbo_lens.perturbations.sites import Hook

# What blocks hand to later ones beside the stream, as keys and values in Gemma 4: the id of the recorded mapping -> the
# one that serves in its place. A pass changes it, so each has its own.
Shared: TypeAlias = dict[int, UserDict]


@dataclass(frozen=True)
class BlockCall:
    """One block with the arguments, other than the stream, that the model called it with.

    Attributes:
        block: the module.
        arguments, keywords: the positional and the keyword arguments.
        axes: the same structure as (arguments, keywords), with each tensor replaced by the axis along which its rows
            lie, or by None if all rows share it.
        device: where the model hands the stream over to the block; in a model on several devices, each block has its
            own. None takes the stream wherever it lies.
    """

    block: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    axes: tuple[Any, Any] = ((), {})
    device: torch.device | None = None

    def __call__(self, stream: Tensor, prompts: Tensor, n_prompts: int, shared: Shared | None = None) -> Tensor:
        """Calls the block on rows that belong to the given prompts.

        `shared` holds what several blocks share in one pass; without it, the block alone has a copy.
        """
        shared = {} if shared is None else shared
        arguments, keywords = _select_rows((self.arguments, self.keywords), self.axes, prompts, n_prompts, shared)
        stream = stream.to(self.device or stream.device)
        if "hidden_states" in keywords:
            return _stream(self.block(*arguments, **{**keywords, "hidden_states": stream}))
        return _stream(self.block(stream, *arguments, **keywords))


def in_float32(call: BlockCall, shared: Shared) -> BlockCall:
    """Returns the same call on float32 copies of the block and its arguments; the model itself is unchanged.

    `shared` is the same for all calls of a slice.
    """
    hung = {id(one): one for module in call.block.modules() for one in _hung_on(module) if not _can_be_copied(one)}
    block = copy.deepcopy(call.block, hung).float()
    for module in block.modules():
        attributes = vars(module)
        # a bridge in compatibility mode keeps its processed weights as plain attributes
        attributes.update(
            {name: _float(value, shared) for name, value in attributes.items() if isinstance(value, Tensor)}
        )
        cfg = cast(Any, getattr(module, "cfg", None))
        if isinstance(getattr(cfg, "dtype", None), torch.dtype):
            # TransformerLens' own layers cast to the dtype of their configuration, which the copy has for itself
            cfg.dtype = torch.float32
    return replace(call, block=block, arguments=_float(call.arguments, shared), keywords=_float(call.keywords, shared))


def _hung_on(module: nn.Module) -> list[Any]:
    """The functions that torch calls before and after a module, and TransformerLens' handles of them."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    handles = [*getattr(module, "fwd_hooks", []), *getattr(module, "bwd_hooks", [])]
    return [*handles, *(function for kind in kinds for function in getattr(module, kind).values())]


def _can_be_copied(function: Any) -> bool:
    """Whether what hangs on a hook can be copied: a user's may hold anything, such as a lock or an open file."""
    try:
        copy.deepcopy(function)
    except Exception:  # whatever an object raises that won't be copied
        return False
    return True


@dataclass(frozen=True)
class Recording:
    """What one ordinary pass did between two layers.

    Attributes:
        calls: how each block was called.
        streams: the stream [prompt pos d_model] that entered each block, and finally the one that left the last.
    """

    calls: list[BlockCall] = field(default_factory=list)
    streams: list[Tensor] = field(default_factory=list)


class _Reached(Exception):
    """Ends a forward pass once everything that is needed was recorded."""


def record(host: Host, tokens: Tensor, first: int, last: int, hooks: Sequence[Hook] = ()) -> Recording:
    """Runs the model up to and including block `last - 1`, and records the calls of blocks `first` to `last - 1`.

    Nothing after those blocks is run. If `first == last`, it records the stream that leaves block `first - 1`, and no
    call.

    Raises:
        ValueError: a hook did not fire exactly once.
        RuntimeError: a block did not run exactly once.
    """
    recording = Recording()

    def enter(block: nn.Module, arguments: tuple, keywords: dict) -> None:
        stream = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
        rest = arguments if "hidden_states" in keywords else arguments[1:]
        recording.calls.append(BlockCall(block, rest, dict(keywords), device=stream.device))
        recording.streams.append(stream.detach())

    def leave(block: nn.Module, arguments: tuple, output: Any) -> None:
        recording.streams.append(_stream(output).detach())
        raise _Reached

    with ExitStack() as stack:
        fired = stack.enter_context(attached(host, hooks))
        stack.enter_context(
            watched([(block, enter) for block in host.blocks[first:last]], [(host.blocks[last - 1], leave)])
        )
        with torch.no_grad(), suppress(_Reached):
            host.forward(tokens)
    for (name, _), times in zip(hooks, fired, strict=True):
        if times != 1:
            raise ValueError(
                f"the hook {name!r} fired {times} times in one forward pass, it must fire once: "
                f"{without_reason(host, name)}"
            )
    if len(recording.calls) != last - first or len(recording.streams) != last - first + 1:
        raise RuntimeError(
            f"blocks {first} to {last - 1} should run once each in a forward pass; "
            f"{len(recording.calls)} calls were seen. This model can't be sliced."
        )
    return recording


def record_with_axes(host: Host, tokens: Tensor, first: int, last: int) -> Recording:
    """Records as `record` does, and also finds the axis along which the rows lie in each argument.

    It is the axis whose size changes in a second pass with another number of rows. A guess from one pass would be wrong
    where the number of heads equals the number of prompts, or where heads and rows share an axis (ALiBi).
    """
    recording = record(host, tokens, first, last)
    n_rows, n_other = len(tokens), 1 if len(tokens) > 1 else 2
    other = record(host, tokens[:1].expand(n_other, -1), first, last)
    calls = [
        replace(call, axes=_row_axes((call.arguments, call.keywords), (same.arguments, same.keywords), n_rows, n_other))
        for call, same in zip(recording.calls, other.calls, strict=True)
    ]
    return Recording(calls, recording.streams)


def bytes_of_row(
    host: Host, calls: Sequence[BlockCall], streams: Sequence[Tensor], n_prompts: int, recomputed: bool = False
) -> tuple[int, int]:
    """Measures what one row of a forward pass through the blocks keeps for its backward pass.

    One row runs forwards and backwards, block by block, so that no more than one block's share is held at once.

    Args:
        host: the opened model.
        calls: the blocks.
        streams: the clean streams that enter them.
        n_prompts: the number of prompts in the streams.
        recomputed: whether the backward pass computes each block again.

    Returns:
        The bytes kept, and the most that is held at once, which includes the gradients of one block.
    """
    first = torch.zeros(1, dtype=torch.long, device=streams[0].device)
    kept, more, left = [], [], []  # left: what a block goes on holding, such as its last attention pattern
    with frozen(host), torch.enable_grad():
        for call, stream in zip(calls, streams, strict=False):
            row = stream[:1].detach().clone().requires_grad_()
            with Tally() as tally:
                after = call(row, first, n_prompts)
                kept.append(tally.live)
                torch.autograd.grad(after, row, torch.ones_like(after))
                more.append(tally.peak)
                del after
                left.append(tally.live)
    entering = [stream[:1].numel() * stream.element_size() for stream in streams[: len(calls)]]
    if recomputed:
        always = sum(entering) + sum(left)
        return always + max(kept), always + max(more)
    return sum(kept), sum(kept) + max(most - part for most, part in zip(more, kept, strict=True))


def _row_axes(value: Any, other: Any, n_rows: int, n_other: int) -> Any:
    """Finds for each tensor the axis whose size grows with the number of rows; None if both passes have one shape."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        if value.shape == other.shape:
            return None
        axes = [axis for axis, sizes in enumerate(zip(value.shape, other.shape, strict=False)) if sizes[0] != sizes[1]]
        if (
            value.ndim == other.ndim
            and len(axes) == 1
            and value.shape[axes[0]] * n_other == other.shape[axes[0]] * n_rows
        ):
            return axes[0]
        raise RuntimeError(
            f"a block is called with a tensor of shape {tuple(value.shape)} for {n_rows} prompts and "
            f"{tuple(other.shape)} for {n_other}: it can't be "
            "told where the rows lie in it, so this model can't be sliced."
        )
    if isinstance(value, tuple | list):
        return tuple(_row_axes(item, same, n_rows, n_other) for item, same in zip(value, other, strict=True))
    if isinstance(value, dict | UserDict):
        return {key: _row_axes(item, other[key], n_rows, n_other) for key, item in value.items()}
    return None


def _select_rows(value: Any, axes: Any, prompts: Tensor, n_prompts: int, shared: Shared) -> Any:
    """Selects the rows of the prompts along each tensor's own axis; what all rows share stays as it is."""
    if isinstance(value, Tensor):
        if axes is None:
            return value
        per_row = value.unflatten(axes, (n_prompts, -1))
        return per_row.index_select(axes, prompts.to(value.device)).flatten(axes, axes + 1)
    if isinstance(value, tuple | list):
        return type(value)(
            _select_rows(item, axis, prompts, n_prompts, shared)
            for item, axis in zip(value, axes or [None] * len(value), strict=True)
        )
    if isinstance(value, dict):
        return {
            key: _select_rows(item, (axes or {}).get(key), prompts, n_prompts, shared) for key, item in value.items()
        }
    if isinstance(value, UserDict):
        if id(value) not in shared:
            shared[id(value)] = type(value)(_select_rows(dict(value), axes, prompts, n_prompts, shared))
        return shared[id(value)]
    return value


def _stream(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _float(value: Any, shared: Shared) -> Any:
    """Converts half-precision tensors to float32, also inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, tuple | list):
        return type(value)(_float(item, shared) for item in value)
    if isinstance(value, dict):
        return {key: _float(item, shared) for key, item in value.items()}
    if isinstance(value, UserDict):
        if id(value) not in shared:
            shared[id(value)] = type(value)(_float(dict(value), shared))
        return shared[id(value)]
    return value
