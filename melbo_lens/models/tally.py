"""How much memory does a piece of work hold?  Every tensor that it makes is counted for as long as it lives."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tally(TorchDispatchMode):
    """Counts the bytes of tensors that were made while it was active.

    It counts on any device, also on "meta", whose tensors have a size and no numbers.

    Attributes:
        live: the bytes of those that still exist.
        peak: the largest value that `live` has had.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and _key(x) not in before:
                self._add(x)
        return made

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Unknown(TorchDispatchMode):
    """Lets code run on the "meta" device that asks for a number: whatever has none is taken for 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        return func(*args, **(kwargs or {}))


def held_in(weight: Tensor) -> list[Tensor]:
    """Returns the tensors that hold a weight's numbers: itself or, of one that is packed by a subclass, its parts."""
    if not packed(weight) or not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [part for name in cast(Any, weight).__tensor_flatten__()[0] for part in held_in(getattr(weight, name))]


def packed(weight: Tensor) -> bool:
    """Whether a weight is quantised: it acts on activations as ever, and its numbers can't be read or added to."""
    return hasattr(weight, "__tensor_flatten__") or not weight.is_floating_point() or weight.element_size() < 2


def weights_of(module: nn.Module) -> Iterator[Tensor]:
    """Yields a module's parameters and buffers, also where its class hides some of them, as a bridge does."""
    yield from nn.Module.parameters(module)
    yield from nn.Module.buffers(module)


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of tensors, those that share their numbers counted once."""
    return sum({_key(x): x.untyped_storage().nbytes() for weight in tensors for x in held_in(weight)}.values())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
