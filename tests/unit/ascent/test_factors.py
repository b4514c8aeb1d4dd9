"""Do factors stay within their constraint, and does each ascent find what theory says?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from melbo_lens.ascent.adamw import Descent, adamw
from melbo_lens.ascent.constraints import INERTIA, NORMALIZATIONS
from melbo_lens.ascent.fixed_point import Climb, fixed_point
from melbo_lens.ascent.states import Evaluation

HOW = ["column", "frobenius", "spectral"]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("how", HOW)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), columns=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_normalised_matrices_obey_their_constraint_and_stay_put(how, seed, rows, columns):
    matrix = normalize(gaussian(3, rows, columns, seed=seed), how)
    norm = {
        "column": lambda: matrix.square().sum(-2).sqrt(),
        "frobenius": lambda: matrix.square().sum((-2, -1)).sqrt(),
        "spectral": lambda: torch.linalg.svdvals(matrix)[:, 0],
    }[how]()
    torch.testing.assert_close(norm, torch.ones_like(norm), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalize(matrix, how), matrix, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", HOW)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_no_matrix_within_the_constraint_beats_the_maximizer(how, seed):
    gradient = gaussian(4, 5, seed=seed)
    best = maximizer(gradient, how)
    torch.testing.assert_close(normalize(best, how), best, atol=1e-5, rtol=0)
    others = normalize(gaussian(200, 4, 5, seed=seed + 1), how)
    near = normalize(best + 0.1 * gaussian(200, 4, 5, seed=seed + 2), how)
    assert (gradient * torch.cat([others, near])).sum((1, 2)).max() <= (gradient * best).sum() + 1e-5


def test_the_value_of_the_maximizer_is_the_dual_norm():
    gradient = gaussian(4, 7)
    dual = {
        "column": gradient.norm(dim=0).sum(),
        "frobenius": gradient.norm(),
        "spectral": torch.linalg.svdvals(gradient).sum(),
    }
    for how in HOW:
        torch.testing.assert_close((gradient * maximizer(gradient, how)).sum(), dual[how])


def normalize(matrix, how):
    return NORMALIZATIONS[how].normalize(matrix)


def maximizer(gradient, how):
    return NORMALIZATIONS[how].maximizer(gradient)


def alternate(evaluate, start, how, n_steps, tolerance=1e-3, state=None):
    return fixed_point(
        evaluate, tuple(factor[None] for factor in start), NORMALIZATIONS[how], n_steps, tolerance, state
    )


def bilinear(target):
    """<target, B A> with its gradients: what the objective is to first order."""

    def evaluate(point, first=0):
        a, b = (factor[:, first:] for factor in point)
        value = ((b @ a) * target).sum((-2, -1))
        return Evaluation(value, value, (b.mT @ target, target @ a.mT))

    return evaluate


@pytest.mark.parametrize(("how", "rank"), [("frobenius", 1), ("frobenius", 3), ("spectral", 1), ("spectral", 3)])
def test_alternating_on_a_bilinear_objective_finds_its_singular_values(how, rank):
    """Within Frobenius balls only the top singular pair pays; within spectral ones, the top `rank` of them."""
    target = gaussian(6, 8)
    singular = torch.linalg.svdvals(target)
    expected = singular[0] if how == "frobenius" else singular[:rank].sum()
    start = (gaussian(2, rank, 8, seed=1), gaussian(2, 6, rank, seed=2))
    *_, state = alternate(bilinear(target), start, how, 400, tolerance=0.0)
    torch.testing.assert_close(state.history[state.step - 1], expected.expand(2), rtol=1e-3, atol=0)


def test_the_alternating_ascent_keeps_the_best_and_says_when_it_settled():
    target = gaussian(6, 8)
    start = (gaussian(2, 3, 8, seed=1), gaussian(2, 6, 3, seed=2))
    states = list(alternate(bilinear(target), start, "column", 300))
    history = states[-1].history[: len(states)]
    assert (history.diff(dim=0) >= 0).all()
    torch.testing.assert_close(
        bilinear(target)(tuple(factor[None] for factor in states[-1].point)).value[0], history[-1]
    )
    assert 10 < len(states) < 300 and states[-1].settled == 2


@pytest.mark.parametrize("ascent", ["adamw", "alternate"])
def test_an_interrupted_ascent_goes_on_where_it_was(ascent):
    target = gaussian(6, 8)
    start = (gaussian(2, 3, 8, seed=1), gaussian(2, 6, 3, seed=2))

    def run(state=None):
        if ascent == "adamw":
            return list(adamw(bilinear(target), start, NORMALIZATIONS["column"], 12, 0.1, state))
        return list(alternate(bilinear(target), start, "column", 12, state=state))

    whole = run()
    kept = {name: tensor.clone() for name, tensor in whole[4].tensors().items()}
    kind = Descent if ascent == "adamw" else Climb
    rest = run(kind.of(kept))
    assert len(rest) == len(whole) - 5
    for name, tensor in whole[-1].tensors().items():
        assert torch.equal(rest[-1].tensors()[name].nan_to_num(-1), tensor.nan_to_num(-1)), name
    for name, tensor in kept.items():  # a state that was yielded is never written to
        assert torch.equal(whole[4].tensors()[name].nan_to_num(-1.0), tensor.nan_to_num(-1.0)), name


@pytest.mark.parametrize("how", HOW)
def test_factors_that_take_turns_do_not_turn_back(how):
    start = gaussian(2, 3, 5), gaussian(2, 4, 3, seed=1)
    states = list(alternate(bilinear(gaussian(4, 5, seed=2)), start, how, 30, tolerance=0.0))
    assert len(states) == 31 and all((state.inertia == INERTIA).all() for state in states)
