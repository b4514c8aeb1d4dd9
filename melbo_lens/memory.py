"""What is done where memory runs out?  The same once more, with half of the rows at once."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
SAID = ("out of memory", "can't allocate memory", "not enough memory")  # by MPS, by torch on Linux and on Windows


def is_out_of_memory(error: Exception) -> bool:
    """Says whether memory ran out, of a GPU or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in SAID)


def halving(attempt: Callable[[int | None], R], usual: int) -> R:
    """Makes an attempt, and further ones with half of the rows each, as long as memory runs out.

    Args:
        attempt: a function of the number of rows at once; None stands for its default.
        usual: how many rows that default has at most.

    Raises:
        Exception: what the attempt raised, if it is another error or there is only one row left.
    """
    rows: int | None = None
    while True:
        try:
            return attempt(rows)
        except Exception as error:
            rows = _half(rows or usual, error)
        _empty()


def in_batches(items: Sequence[T], at_once: int, run: Callable[[Sequence[T]], R]) -> Iterator[tuple[Sequence[T], R]]:
    """Runs items in batches; where memory runs out, that batch and those after it are made half as large.

    Yields:
        Each batch with its result.

    Raises:
        Exception: what the run raised, if it is another error or there is only one item in the batch.
    """
    while items:
        some = items[:at_once]
        try:
            result = run(some)
        except Exception as error:
            at_once = _half(len(some), error)
        else:
            yield some, result
            items = items[len(some) :]
            continue
        _empty()


def _half(rows: int, error: Exception) -> int:
    """Returns half of the rows; raises the error if it is another one than memory's, or there is only one row."""
    if rows <= 1 or not is_out_of_memory(error):
        raise error
    return rows // 2


def _empty() -> None:
    """Gives back what torch keeps of a failed attempt, once its error, which holds the tensors, is gone."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
