"""Does a row that runs into an attention sink leave the others alone, and come back?"""

import pytest
import torch

from melbo_lens.ascent.constraints import INERTIA, Columns, OrderedRows, Sphere
from melbo_lens.ascent.fixed_point import Climb, fixed_point
from melbo_lens.ascent.states import Evaluation

D = 6
STRETCH = torch.tensor([3.0, 2.0, 1.5, 1.0, 0.5, 0.1])


def with_sink(depth, edge=0.8, stretch=STRETCH):
    """A quadratic form over the sphere, and a pit of huge values around its top: beyond `edge` along the first axis."""

    def evaluate(point, first=0):
        rows = point[0][:, first:].flatten(2)[..., :D]
        sunk = rows[..., 0].abs() > edge * rows.norm(dim=-1)
        value = (stretch * rows.square()).sum(-1) * torch.where(sunk, depth, 1.0)
        gradient = 2 * stretch * rows * torch.where(sunk, depth, 1.0)[..., None]
        whole = torch.zeros_like(point[0][:, first:])
        whole.flatten(2)[..., :D] = gradient
        rest = tuple(torch.zeros_like(x[:, first:]) for x in point[1:])
        return Evaluation(value, value, (whole, *rest), sunk)

    return evaluate


def starts(restarts, rows, seed=0):
    return torch.randn(restarts, rows, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("constraint", [Sphere, OrderedRows])
@pytest.mark.parametrize("restarts", [1, 3])
def test_the_result_is_outside_the_sink_and_near_its_rim(constraint, restarts):
    radii = torch.ones(3)
    *_, climb = fixed_point(with_sink(1e6), (starts(restarts, 3),), constraint(radii), 60)
    along = climb.point[0][:, 0].abs()
    assert (along <= 0.8 + 1e-5).all()
    # the best point outside lies on the rim: .8 along the first axis and .6 along the second
    best = 3.0 * 0.64 + 2.0 * 0.36
    assert float(climb.history[climb.step - 1].max()) == pytest.approx(best, rel=0.1)


def test_the_history_does_not_jump_and_rows_outside_are_what_they_are_without_a_sink():
    radii = torch.ones(4)
    begin = starts(1, 4)
    begin[:, 1:, 0] = 0  # these never leave the plane in which there is no sink
    *_, sunk = fixed_point(with_sink(1e6), (begin,), Sphere(radii), 30, tolerance=0.0)
    *_, plain = fixed_point(with_sink(1.0, edge=2.0), (begin,), Sphere(radii), 30, tolerance=0.0)
    torch.testing.assert_close(sunk.point[0][1:], plain.point[0][1:])
    known = sunk.history[: sunk.step]
    assert float(known[known.isfinite()].max()) <= 3.0


def test_a_row_that_only_knows_the_sink_takes_the_usual_steps():
    begin = torch.zeros(1, 1, D)
    begin[..., 0] = 1.0
    *_, climb = fixed_point(with_sink(10.0), (begin,), Sphere(torch.ones(1)), 5)
    torch.testing.assert_close(climb.point[0].abs(), begin[0])
    assert float(climb.history[climb.step - 1, 0]) == pytest.approx(30.0)  # and its value is shown as it is


def test_an_interrupted_ascent_goes_on_the_same_way():
    radii, begin = torch.ones(3), (starts(1, 3),)
    states = list(fixed_point(with_sink(1e6), begin, OrderedRows(radii), 20))
    saved = Climb.of({name: x.clone() for name, x in states[6].tensors().items()})
    *_, resumed = fixed_point(with_sink(1e6), begin, OrderedRows(radii), 20, state=saved)
    torch.testing.assert_close(resumed.point[0], states[-1].point[0])
    torch.testing.assert_close(resumed.history, states[-1].history, equal_nan=True)


def test_factors_come_back_too():
    """Column-normalised factors [rank d_in]: the first row of A is the vector of the quadratic form."""
    begin = (torch.randn(1, 2, D, 1, generator=torch.Generator().manual_seed(1)), torch.ones(1, 2, 1, 1))
    states = list(fixed_point(with_sink(1e6), begin, Columns(), 60))
    assert (states[-1].point[0][:, 0, 0].abs() <= 0.8 + 1e-5).all()
    for state in states:
        torch.testing.assert_close(state.moving[0].norm(dim=-2), torch.ones(1, 2, 1))
        assert (state.inertia == INERTIA).all()  # they take turns, and coming back from a sink is no cycle


def test_a_row_that_begins_in_a_sink_leaves_it_by_the_usual_steps():
    begin = torch.tensor([[[0.9, 0.436, 0, 0, 0, 0]]])
    stretch = torch.tensor([1.0, 3.0, 1, 1, 1, 1])
    *_, climb = fixed_point(with_sink(10.0, stretch=stretch), (begin,), Sphere(torch.ones(1)), 3)
    expected = begin[0, 0]
    for _ in range(3):  # the second step starts outside already
        expected = torch.nn.functional.normalize(
            torch.nn.functional.normalize(stretch * expected, dim=0) + INERTIA * expected, dim=0
        )
    torch.testing.assert_close(climb.point[0][0], expected)


@pytest.mark.parametrize("overflow", [torch.inf, torch.nan])
def test_a_row_that_overflows_in_a_sink_goes_back_as_well(overflow):
    weights = torch.tensor([2.0, 1.0, 1.0])

    def evaluate(theta):
        sunk = theta[..., 0].abs() > 0.9
        value = (theta.square() * weights).sum(-1).masked_fill(sunk, overflow)
        return Evaluation(value, value, ((theta * weights).masked_fill(sunk[..., None], torch.nan),), sunk)

    rows = torch.tensor([[[0.5, 1.0, 1.0], [0.1, 1.0, 0.2]], [[0.6, 1.0, 0.8], [0.2, 1.0, 0.1]]])
    start = torch.nn.functional.normalize(rows, dim=-1)
    *_, climb = fixed_point(lambda point, first: evaluate(point[0][:, first:]), (start,), Sphere(torch.ones(2)), 20)
    assert torch.isfinite(climb.point[0]).all() and (climb.point[0][:, 0].abs() <= 0.9).all()
    assert (climb.point[0][:, 0].abs() > start[:, :, 0].abs().amax(0)).all()
    inside = torch.nn.functional.normalize(torch.tensor([[[1.0, 0.1, 0.1]]]), dim=-1)
    with pytest.raises(FloatingPointError, match=r"row 0 .* in step 0"):  # it has nowhere to go back to
        list(fixed_point(lambda point, first: evaluate(point[0]), (inside,), Sphere(torch.ones(1)), 3))


def test_a_restart_that_overflows_in_a_sink_hides_no_better_one():
    seen = []

    def evaluate(point, first):
        seen.append(point)
        late = len(seen) == 2
        value = torch.tensor([[torch.nan if late else 1.0], [5.0 if late else 1.0]])
        return Evaluation(value, value, (torch.ones_like(point[0]),), torch.tensor([[late], [False]]))

    start = torch.eye(3)[:2, None]
    *_, climb = fixed_point(evaluate, (start,), Sphere(torch.ones(1)), 1)
    assert climb.history[-1].item() == 5.0 and torch.equal(climb.point[0], seen[1][0][1])
