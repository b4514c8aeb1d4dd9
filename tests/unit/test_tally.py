"""Is memory counted as it is held?"""

import gc

import pytest
import torch

from melbo_lens.models.tally import Tally, stored_bytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_held_and_the_most_that_was(device):
    weight = torch.ones(64, 32, device=device)
    with Tally() as tally:
        x = torch.zeros(10, 64, device=device)
        assert tally.live == x.nbytes
        y = x @ weight
        assert tally.live == x.nbytes + y.nbytes
        view, same = y[2:4].T, y.add_(1)
        assert tally.live == x.nbytes + y.nbytes and same is y
        del x
        assert tally.live == y.nbytes
        del y, same
        assert tally.live == view.untyped_storage().nbytes() == 10 * 32 * 4
        del view
        small = torch.zeros(3, device=device)
        assert tally.live == small.nbytes and tally.peak == 10 * 64 * 4 + 10 * 32 * 4


def test_what_a_graph_keeps_is_held_until_the_backward_pass():
    gc.collect()
    weight = torch.ones(64, 64)
    with Tally() as tally:
        x = torch.ones(10, 64).requires_grad_()
        y = (x @ weight).sigmoid().sum()  # a sigmoid keeps its result
        assert tally.live == 2 * x.nbytes + 4
        torch.autograd.grad(y, x)
        assert tally.live == x.nbytes + 4


def test_tensors_that_share_numbers_count_once():
    x = torch.zeros(8, 4)
    assert stored_bytes(iter([x, x[2:], x.T, torch.zeros(3)])) == x.nbytes + 12
