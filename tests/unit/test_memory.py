"""Is everything done in the end, with as many rows at once as memory has room for, and no other error hidden?"""

import pytest
import torch

from melbo_lens.memory import halving, in_batches, is_out_of_memory

SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
]


@pytest.mark.parametrize("error", SHORT, ids=lambda error: f"{type(error).__name__} {str(error)[:12]}")
def test_rows_are_halved_until_there_is_room(error):
    assert is_out_of_memory(error)
    tried = []

    def attempt(rows):
        tried.append(rows)
        if rows is None or rows > 3:
            raise error
        return "done"

    assert halving(attempt, 20) == "done" and tried == [None, 10, 5, 2]


def test_without_room_for_one_row_the_error_is_raised():
    tried = []

    def attempt(rows):
        tried.append(rows)
        raise SHORT[0]

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        halving(attempt, 5)
    assert tried == [None, 2, 1]


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("x")])
def test_another_error_is_raised_at_once(error):
    tried = []

    def attempt(rows):
        tried.append(rows)
        raise error

    with pytest.raises(type(error)):
        halving(attempt, 8)
    with pytest.raises(type(error)):
        list(in_batches(range(9), 4, attempt))
    assert len(tried) == 2 and not is_out_of_memory(error)


def test_batches_are_halved_once_and_nothing_is_run_twice_or_left_out():
    tried = []

    def run(some):
        tried.append(len(some))
        if len(some) > 5:
            raise SHORT[0]
        return [2 * item for item in some]

    found = [(list(some), result) for some, result in in_batches(range(23), 16, run)]
    assert tried == [16, 8, 4, 4, 4, 4, 4, 3]
    assert [item for some, _ in found for item in some] == list(range(23))
    assert [twice for _, result in found for twice in result] == [2 * item for item in range(23)]
    assert list(in_batches([], 4, run)) == []


def test_an_item_for_which_there_is_no_room_is_not_tried_for_ever():
    with pytest.raises(MemoryError):
        list(in_batches("ab", 2, lambda some: (_ for _ in ()).throw(MemoryError())))
