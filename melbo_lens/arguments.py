"""What may a user hand in for a number?  A number of Python, NumPy, pandas or torch.

Behind a public call there are only plain Python values.
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast, get_args, get_origin

import numpy as np
import pandas as pd
import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def plain(value: Any) -> Any:
    """Returns the value with every NumPy and torch scalar as a Python number, also inside lists, dicts and slices.

    Arrays and tensors with axes stay as they are.
    """
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 0):
        return value.item()
    if type(value) in (list, tuple, set, frozenset):
        kind = cast(Any, type(value))
        return kind(plain(item) for item in value)
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    return value


def plain_json(value: Any, what: str) -> Any:
    """Returns the value as JSON keeps it: numbers, texts, booleans, None, and lists and dicts of them.

    Tuples and arrays become lists.

    Raises:
        TypeError: the value holds something that a file can't keep.
    """
    value = plain(value)
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else str(plain(key)): plain_json(item, f"{what}[{key!r}]")
            for key, item in value.items()
        }
    value = as_list(value)
    if isinstance(value, list | tuple | set | frozenset | range):
        return [plain_json(item, what) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{what} holds {value!r} ({type(value).__name__}), which a file can't keep: "
        "use numbers, text, lists and dicts of them."
    )


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a public call.

    Its scalars become Python numbers, and its arrays become lists where its signature asks for a sequence, and tensors
    where it asks for a tensor. Where it asks for a class that has `check_argument`, that is asked of the value.
    Autocast and inference mode are off inside. So whatever reaches a file is JSON by construction, and a model
    computes in its own dtype whatever surrounds the call.
    """
    signature = inspect.signature(function)
    annotations = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    lists = {name for name, annotation in annotations.items() if _takes_a_list(annotation)}
    tensors = {name for name, annotation in annotations.items() if _takes_a_tensor(annotation)}
    kinds = {name: kind for name, annotation in annotations.items() if (kind := _only_kind(annotation))}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in tensors and isinstance(value, np.ndarray):
                value = _as_tensor(value)
            bound.arguments[name] = plain(as_list(value) if name in lists else value)
        for name, kind in kinds.items():
            if bound.arguments.get(name) is not None or signature.parameters[name].default is not None:
                kind.check_argument(name, bound.arguments.get(name))
        if "seed" in bound.arguments:
            check_seed(bound.arguments["seed"])
        with without_autocast(), torch.inference_mode(False):
            return function(*bound.args, **bound.kwargs)

    vars(call)["is_public"] = True
    return call


def plain_fields(cls: type[T]) -> type[T]:
    """Marks a dataclass that users make: scalars that are passed for its fields become Python numbers first."""
    make = cls.__init__

    @wraps(make)
    def __init__(self: T, *args: Any, **kwargs: Any) -> None:
        make(self, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    cls.__init__ = __init__
    return cls


def as_list(values: Any) -> Any:
    """Returns arrays, tensors and pandas columns as lists of Python numbers, and anything else unchanged."""
    return values.tolist() if isinstance(values, np.ndarray | Tensor | pd.Series | pd.Index) else values


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switches autocast off inside the block, wherever it is on.

    Otherwise some operations, ours and the model's, would be computed in half precision.
    """
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _takes_a_list(annotation: Any) -> bool:
    """Whether a parameter takes a sequence of numbers and doesn't take a tensor."""
    if get_origin(annotation) is Callable:  # its arguments are not the call's
        return False
    kinds = {get_origin(kind) or kind for kind in (annotation, *get_args(annotation))}
    return bool(kinds & {Sequence, list, tuple}) and Tensor not in kinds


def _takes_a_tensor(annotation: Any) -> bool:
    """Whether a parameter takes a tensor, perhaps with axes that its annotation names, and doesn't take an array."""
    kinds = [getattr(kind, "array_type", kind) for kind in (annotation, *get_args(annotation))]
    return Tensor in kinds and np.ndarray not in kinds


def _only_kind(annotation: Any) -> Any:
    """The class that a parameter takes, or None in its place, if the class says of a value that it is another one."""
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and hasattr(kinds[0], "check_argument") else None


def _as_tensor(array: Any) -> Any:
    """Copies an array of numbers to a tensor, and returns any other as it is, for the call to refuse."""
    kind = array.dtype.kind
    if kind not in "fiub":
        return array
    dtype = np.dtype(np.float64) if kind == "f" and array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def flag(name: str, value: Any) -> None:
    """Refuses a value that is neither True nor False, such as the text "false", which counts as true.

    Raises:
        ValueError: the value is something else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False.")


def check_tensor(name: str, value: Any) -> None:
    """Refuses what is no tensor.

    Raises:
        TypeError: the value is something else.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}: torch.as_tensor makes one.")


def count(name: str, value: Any, least: int = 1) -> None:
    """Refuses a value that is not an integer of at least `least`.

    Raises:
        ValueError: the value is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")


def counts(**values: Any) -> None:
    """Applies `count` to each value that is not None."""
    for name, value in values.items():
        if value is not None:
            count(name, value)


def check_seed(seed: Any) -> None:
    """Refuses a seed that is not an integer: 1 and "1" would name one stream, and 1.0 another."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} must be an integer.")


def signs_of(signs: int | Sequence[int]) -> tuple[int, ...]:
    """Returns +1, -1 or both.

    Raises:
        ValueError: signs holds something else, or one of them twice.
    """
    several = [signs] if isinstance(signs, int | float) else signs
    if not isinstance(several, Sequence) or any(
        isinstance(one, bool) or not isinstance(one, int | float) for one in several
    ):
        raise ValueError(f"signs={signs!r} must be a list of numbers.")
    if not several or any(sign not in (1, -1) for sign in several):
        raise ValueError(
            f"signs={signs!r} must hold +1, -1 or both. For another strength multiply the vectors, as in 2 * vectors, "
            "or use the scales of generate."
        )
    if len(set(several)) < len(several):
        raise ValueError(f"signs={signs!r} repeat a value: name each once.")
    return tuple(map(int, several))


def positive(name: str, value: Any, what: str) -> None:
    """Refuses a value that is not a positive, finite number; `what` ends the sentence of the error.

    Raises:
        ValueError: the value is something else.
    """
    if isinstance(value, bool | str) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be a positive, finite number{what}.")


def finite(name: str, value: Any) -> float:
    """Returns a number of any library as Python's.

    Raises:
        ValueError: the value is no number, or is NaN or infinite.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{name}={value!r} must be a finite number.")
    return float(number)


def one_of(name: str, value: Any, allowed: Collection[Any], hint: str = "") -> None:
    """Refuses a value that is not among the allowed ones.

    Raises:
        ValueError: the value is not allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {sorted(allowed)}{hint}.")
