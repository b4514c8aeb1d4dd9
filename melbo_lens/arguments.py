"""What may a user hand in for a number?  Python's, NumPy's, pandas' and torch's alike; behind a public call there are plain Python values only."""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar, get_args, get_origin

import numpy as np
import pandas as pd
import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def plain(value: Any) -> Any:
    """The value with every NumPy and torch scalar in it, also inside lists, tuples, dicts and slices, as a Python number.

    Arrays and tensors with axes stay as they are.
    """
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 0):
        return value.item()
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(plain(item) for item in value)
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    return value


def plain_json(value: Any, what: str) -> Any:
    """The value as JSON keeps it: numbers, texts, booleans, None, and lists and dicts of them; tuples and arrays become lists.

    Raises:
        TypeError: something in it that a file can't hold.
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
        f"{what} holds {value!r} ({type(value).__name__}), which a file can't keep: use numbers, text, lists and dicts of them."
    )


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a public call: its scalars become Python numbers, and its arrays do where its signature asks for a sequence; autocast and inference mode
    are off inside.

    So what reaches a file is JSON by construction, and a model computes in its own dtype whatever surrounds the call.
    """
    signature = inspect.signature(function)
    lists = {name for name, parameter in signature.parameters.items() if _takes_a_list(parameter.annotation)}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = plain(as_list(value) if name in lists else value)
        if "seed" in bound.arguments:
            check_seed(bound.arguments["seed"])
        with without_autocast(), torch.inference_mode(False):
            return function(*bound.args, **bound.kwargs)

    call.is_public = True
    return call


def plain_fields(cls: type[T]) -> type[T]:
    """Marks a dataclass that users make: the scalars among its fields become Python numbers before it sees them."""
    make = cls.__init__

    @wraps(make)
    def __init__(self: T, *args: Any, **kwargs: Any) -> None:
        make(self, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    cls.__init__ = __init__
    return cls


def as_list(values: Any) -> Any:
    """Arrays, tensors and columns as lists of Python numbers; what is none of them stays."""
    return values.tolist() if isinstance(values, np.ndarray | Tensor | pd.Series | pd.Index) else values


@contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast would compute some operations in half precision, ours and the model's; what is not on is left alone."""
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _takes_a_list(annotation: Any) -> bool:
    """Whether a parameter is a sequence of numbers, and no tensor either."""
    kinds = {get_origin(kind) or kind for kind in (annotation, *get_args(annotation))}
    return bool(kinds & {Sequence, list, tuple}) and Tensor not in kinds


def count(name: str, value: Any, least: int = 1) -> None:
    """Refuses what is no integer of at least so much.

    Raises:
        ValueError: says so.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")


def counts(**values: Any) -> None:
    """`count` for each that is not None."""
    for name, value in values.items():
        if value is not None:
            count(name, value)


def check_seed(seed: Any) -> None:
    """Refuses a seed that is no integer: 1 and "1" would name one stream, 1.0 another."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} must be an integer.")


def positive(name: str, value: Any, what: str) -> None:
    """Refuses what is no positive, finite number; `what` ends the sentence.

    Raises:
        ValueError: says so.
    """
    if isinstance(value, bool | str) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be a positive, finite number{what}.")


def one_of(name: str, value: Any, allowed: Collection[Any], hint: str = "") -> None:
    """Refuses what is not among those allowed.

    Raises:
        ValueError: says so.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {sorted(allowed)}{hint}.")
