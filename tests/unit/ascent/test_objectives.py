"""Does the objective obey the laws that its equation implies?"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from melbo_lens.ascent.objectives import Objective, change_objective

EXPONENTS = st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0])
SEEDS = st.integers(0, 10_000)


def draw(seed, rows=3, pos=5, d=4):
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(rows, pos, d, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, pos, generator=generator) < 0.6
    mask[:, 0] = True
    return change, mask


def by_loops(change, mask, p, q, token_norm="d_model"):
    """The equation, number by number."""
    rows, pos, d = change.shape
    totals = []
    for row in range(rows):
        chosen = [t for t in range(pos) if mask[row, t]]
        if token_norm == "d_model":
            lengths = [sum(float(change[row, t, i]) ** 2 for i in range(d)) ** 0.5 for t in chosen]
        else:
            lengths = [sum(float(change[row, t, i]) ** 2 for t in chosen) ** 0.5 for i in range(d)]
        totals.append(sum(length**p for length in lengths) ** (1 / q))
    return torch.tensor(totals, dtype=torch.float64)


@given(SEEDS, EXPONENTS, EXPONENTS, st.sampled_from(["d_model", "pos"]))
@settings(max_examples=60, deadline=None)
def test_equals_the_equation_written_with_loops(seed, p, q, token_norm):
    change, mask = draw(seed)
    torch.testing.assert_close(
        change_objective(change, mask, p, q, token_norm), by_loops(change, mask, p, q, token_norm)
    )


@given(SEEDS, EXPONENTS, EXPONENTS, st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_is_homogeneous_of_degree_p_over_q(seed, p, q, factor):
    change, mask = draw(seed)
    torch.testing.assert_close(
        change_objective(factor * change, mask, p, q), factor ** (p / q) * change_objective(change, mask, p, q)
    )


@given(SEEDS, EXPONENTS, EXPONENTS)
@settings(max_examples=40, deadline=None)
def test_does_not_depend_on_the_basis_of_the_activations(seed, p, q):
    change, mask = draw(seed)
    basis, _ = torch.linalg.qr(
        torch.randn(4, 4, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    )
    torch.testing.assert_close(change_objective(change @ basis, mask, p, q), change_objective(change, mask, p, q))


@given(SEEDS, EXPONENTS, EXPONENTS, st.sampled_from(["d_model", "pos"]))
@settings(max_examples=40, deadline=None)
def test_what_stands_in_the_padding_counts_for_nothing(seed, p, q, token_norm):
    change, mask = draw(seed)
    garbage = torch.where(mask[..., None], change, 1e6 * torch.ones_like(change))
    torch.testing.assert_close(
        change_objective(garbage, mask, p, q, token_norm), change_objective(change, mask, p, q, token_norm)
    )
    wider = (
        torch.cat([change, torch.full((3, 2, 4), 9.0, dtype=torch.float64)], dim=1),
        torch.cat([mask, torch.zeros(3, 2, dtype=bool)], dim=1),
    )
    torch.testing.assert_close(
        change_objective(*wider, p, q, token_norm), change_objective(change, mask, p, q, token_norm)
    )


@given(SEEDS, EXPONENTS, EXPONENTS, st.permutations(range(5)))
@settings(max_examples=30, deadline=None)
def test_does_not_depend_on_the_order_of_positions(seed, p, q, order):
    change, mask = draw(seed)
    order = list(order)
    torch.testing.assert_close(
        change_objective(change[:, order], mask[:, order], p, q), change_objective(change, mask, p, q)
    )


def test_the_two_token_norms_agree_only_at_p_2():
    change, mask = draw(3)
    torch.testing.assert_close(change_objective(change, mask, 2, 1, "pos"), change_objective(change, mask, 2, 1))
    assert not torch.allclose(
        change_objective(change, mask, 4, 1, "pos"), change_objective(change, mask, 4, 1), rtol=1e-2
    )


@pytest.mark.parametrize(("p", "q", "norm"), itertools.product([1, 1.5, 2, 4], [1, 2, 4], ["d_model", "pos"]))
def test_the_gradient_is_finite_where_nothing_changed(p, q, norm):
    change = torch.zeros(2, 3, 4, requires_grad=True)
    change_objective(change, torch.ones(2, 3, dtype=torch.bool), p, q, norm).sum().backward()
    assert torch.isfinite(change.grad).all()


@pytest.mark.parametrize(
    ("p", "q", "norm", "named"),
    [(0.5, 1, "d_model", "p=0.5"), (2, 0.9, "d_model", "q=0.9"), (2, 1, "rows", "token_norm")],
)
def test_refuses_exponents_and_norms_without_meaning(p, q, norm, named):
    with pytest.raises(ValueError, match=named):
        Objective(p=p, q=q, token_norm=norm)
