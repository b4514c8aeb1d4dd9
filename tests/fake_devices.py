"""What if a model lay on several devices?  Tensors of devices that this machine doesn't have compute on the CPU here.

They are told apart as real ones are: an operation that mixes two devices raises, and moves are counted.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

TYPE = "lazy"  # a type of device whose gradients PyTorch computes in the calling thread
FIRST, SECOND = torch.device(TYPE, 0), torch.device(TYPE, 1)


class Placed(Tensor):
    """A tensor on a device of that type."""

    held: Tensor
    left: torch.device | None = None  # where a parameter lies to which other data were assigned

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "Placed":
        placed = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        placed.held = held
        return placed

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {}, Counter())

    @property
    def device(self) -> torch.device:
        return self.left or Tensor.device.__get__(self)

    @property
    def data(self) -> Tensor:
        return self.held if self.left else self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        # the C++ part of a tensor refuses data of another kind, as real ones of another device are not
        placed = isinstance(value, Placed)
        self.held, self.left = (value.held, None) if placed else (value, value.device)

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **settings: Any) -> str:
        return f"Placed({self.held}, {self.device})"


class Devices(TorchDispatchMode):
    """Makes the devices known while it is active; `moves` counts tensors moved, by (from, to)."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {}, self.moves)


@contextmanager
def devices() -> Iterator[Devices]:
    """Within it, `.to("lazy:1")` and `device="lazy:1"` work."""
    only_lift = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Devices() as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(only_lift)


def dispatched(func: Any, args: Any, kwargs: dict[str, Any], moves: Counter[tuple[str, str]]) -> Any:
    """Runs one operation on what the tensors hold, and says on which device its results lie."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    # numbers as tensors of no dimension may come from the CPU, as with real devices
    places = {x.device for x in tensors if x.ndim or x.device.type == TYPE}
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    name = func._schema.name
    copies = name in ("aten::copy_", "aten::_to_copy")
    indexing = name in (
        "aten::index.Tensor",
        "aten::index",
        "aten::index_put_",
        "aten::index_put",
        "aten::_index_put_impl_",
    )
    if indexing:  # indices may also lie on the CPU
        places = {x.device for x in tensors if x.device.type == TYPE or x is tensors[0]}
    if len(places) > 1 and not copies:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {sorted(map(str, places))} in {func}"
        )
    here = tensors[0].device if copies and tensors else next(iter(places), torch.device("cpu"))
    there = wanted or here
    if (copies and len(places) > 1) or (wanted is not None and tensors and wanted != here):
        moves[
            str(tensors[-1].device if name == "aten::copy_" else here), str(here if name == "aten::copy_" else there)
        ] += 1
    inner_args, inner_kwargs = tree_map(lambda x: x.held if isinstance(x, Placed) else x, (args, kwargs))
    if wanted is not None:
        inner_kwargs["device"] = torch.device("cpu")
    found = func(*inner_args, **inner_kwargs)
    if there.type != TYPE:
        return found
    out = tree_map(lambda x: Placed(x, there) if isinstance(x, Tensor) and not isinstance(x, Placed) else x, found)
    if not any(isinstance(x, Placed) for x in tensors):
        return out
    return return_and_correct_aliasing(func, args, kwargs, out)
