"""Do the ascents find what linear algebra says they must, in order, and go on exactly after an interrupt?"""

import pytest
import torch

from melbo_lens.ascent.adamw import Descent, adamw
from melbo_lens.ascent.constraints import INERTIA, OrderedRows, Sphere
from melbo_lens.ascent.fixed_point import AT_EASE, HEAVIEST, Climb, fixed_point
from melbo_lens.ascent.manifolds import to_sphere
from tests.builders import as_evaluate

D, RADIUS = 12, 3.0


def quadratic(seed=0, dtype=torch.float64):
    """f(theta) = ||A theta||^2: its maxima on spheres are the right-singular vectors of A, in order."""
    a = torch.randn(20, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    def evaluate(theta):
        return (theta @ a.T).square().sum(1), 2 * theta @ a.T @ a

    return a, evaluate


def wavy(seed=1):
    """A bumpy function with many maxima."""
    a = torch.randn(30, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def evaluate(theta):
        leaf = theta.detach().requires_grad_()
        value = (2 + torch.sin(2 * leaf @ a.T)).sum(1)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    return evaluate


def starts(n, restarts=1, seed=5):
    return torch.randn(restarts, n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def radii(n):
    return torch.full((n,), RADIUS, dtype=torch.float64)


def climbed(evaluate, start, orthogonal, n_steps, tolerance=1e-3, state=None):
    constraint = (OrderedRows if orthogonal else Sphere)(radii(start.shape[1]))
    return fixed_point(as_evaluate(evaluate), (start,), constraint, n_steps, tolerance, state)


def descended(evaluate, start, n_steps, lr, orthogonal=True, state=None):
    constraint = (OrderedRows if orthogonal else Sphere)(radii(len(start)))
    return adamw(as_evaluate(evaluate), (start,), constraint, n_steps, lr, state)


def last(states):
    *_, state = states
    return state


def test_orthogonal_power_finds_the_singular_vectors_in_order():
    a, evaluate = quadratic()
    _, singular, right = torch.linalg.svd(a)
    state = last(climbed(evaluate, starts(4), True, 3000, tolerance=1e-13))
    cosines = (state.point[0] / RADIUS * right[:4]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(evaluate(state.point[0])[0], (RADIUS * singular[:4]) ** 2)


def test_free_power_finds_the_top_vector_in_every_row():
    a, evaluate = quadratic()
    _, singular, _ = torch.linalg.svd(a)
    state = last(climbed(evaluate, starts(3), False, 2000, tolerance=1e-13))
    torch.testing.assert_close(evaluate(state.point[0])[0], (RADIUS * singular[:1].expand(3)) ** 2)


def narrow(height=100.0):
    """A ridge along the first axis that is so narrow that one step from its side lands as far on the other side."""

    def evaluate(theta):
        leaf = theta.detach().requires_grad_()
        value = leaf[:, 0] - height * leaf[:, 1:].square().sum(1) + 2 * height * RADIUS**2
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    return evaluate


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_row_that_jumps_to_and_fro_slows_down_and_settles(orthogonal, monkeypatch):
    """On a ridge the iteration has a cycle of two points, far from the top; AdamW has no such trouble."""
    evaluate, start = narrow(), starts(1, restarts=2)
    (top,) = evaluate(radii(1)[:, None] * torch.eye(D, dtype=torch.float64)[:1])[0]

    def reached():
        state = last(climbed(evaluate, start, orthogonal, 60))
        return float(state.history[state.step - 1, 0])

    assert reached() == pytest.approx(float(top), rel=1e-4)
    monkeypatch.setattr("melbo_lens.ascent.fixed_point.SLOWER", 1.0)
    assert reached() < top - 10


@pytest.mark.parametrize("constraint", [OrderedRows, Sphere])
def test_a_slowed_row_has_not_settled_because_its_steps_are_small(constraint):
    """A slope in one direction, steep walls in five others: what a slowed row gains in a step says little."""
    generator, one = torch.Generator().manual_seed(0), torch.ones(1, dtype=torch.float64)
    slope = torch.randn(40, generator=generator, dtype=torch.float64)
    start = torch.randn(1, 1, 40, generator=generator, dtype=torch.float64)
    walls = torch.tensor([100.0] * 5 + [0.0] * 35, dtype=torch.float64)

    def evaluate(theta):
        value = torch.exp(2 * theta @ slope / slope.norm() - theta.square() @ walls / 2)
        return value, value[:, None] * (2 * slope / slope.norm() - walls * theta)

    def reached(tolerance):
        state = last(fixed_point(as_evaluate(evaluate), (start,), constraint(one), 400, tolerance))
        return state.step, float(state.history[state.step - 1, 0])

    (steps, settled), (_, best) = reached(1e-3), reached(0.0)
    assert steps < 200 and settled > 0.997 * best


def test_a_short_ascent_keeps_its_large_steps():
    states = list(climbed(narrow(), starts(2), False, AT_EASE + 3, tolerance=0.0))
    assert all((state.inertia == INERTIA).all() for state in states[:AT_EASE])
    assert (states[AT_EASE].inertia > INERTIA).all()


def test_however_often_a_row_turns_back_it_stays_finite():
    state = last(climbed(narrow(1e6), starts(2), False, 400, tolerance=0.0))
    assert state.inertia.max() <= HEAVIEST and state.point[0].isfinite().all()


def test_a_row_that_is_slowed_leaves_the_others_as_they_would_be():
    _, smooth = quadratic()
    start = starts(3)

    def evaluate(theta):  # the first row alone has the ridge
        value, gradient = smooth(theta)
        ridge, slope = narrow()(theta)
        first = torch.arange(len(theta)) == 0
        return torch.where(first, ridge, value), torch.where(first[:, None], slope, gradient)

    together = last(climbed(evaluate, start, False, 12, tolerance=0.0))
    alone = last(climbed(smooth, start[:, 1:], False, 12, tolerance=0.0))
    assert torch.equal(together.point[0][1:], alone.point[0])
    assert together.inertia[0, 0] > 2 * together.inertia[0, 1:].max()


def test_adamw_finds_the_singular_vectors_in_order():
    a, evaluate = quadratic()
    _, singular, _ = torch.linalg.svd(a)
    state = last(descended(evaluate, starts(3)[0], 1500, 0.03))
    torch.testing.assert_close(evaluate(state.point[0])[0], (RADIUS * singular[:3]) ** 2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("restarts", [1, 3])
def test_power_stays_on_the_sphere_and_its_history_ends_with_the_values_returned(orthogonal, restarts):
    evaluate = wavy()
    state = last(climbed(evaluate, starts(5, restarts), orthogonal, 25))
    values = state.point[0]
    torch.testing.assert_close(values.norm(dim=1), radii(5))
    history = state.history[: state.step]
    torch.testing.assert_close(history[-1], evaluate(values)[0])
    assert torch.isfinite(history).all()
    if orthogonal:
        cosines = (values @ values.T / RADIUS**2).fill_diagonal_(0)
        assert cosines.abs().max() < 1e-10


def test_a_row_never_falls_once_the_rows_before_it_are_frozen():
    state = last(climbed(wavy(), starts(4, 2), True, 40, tolerance=0))
    history = state.history
    for row in range(4):
        frozen_before = (0, 20, 27, 33)[row]  # the deadline of the row before: 20 (1 + (row - 1) / 3)
        assert (history[frozen_before + 1 :, row].diff() >= -1e-12).all()


def test_earlier_rows_do_not_depend_on_later_ones():
    evaluate = wavy()
    five = starts(5)
    changed = five.clone()
    changed[:, 3:] = starts(2, seed=9)
    a, b = (last(climbed(evaluate, s, True, 20)).point[0] for s in (five, changed))
    torch.testing.assert_close(a[:3], b[:3])
    assert not torch.allclose(a[3:], b[3:])


def test_more_restarts_do_not_find_a_worse_first_vector():
    evaluate = wavy()
    many = starts(3, 6)
    found = [evaluate(last(climbed(evaluate, many[:n], True, 30, tolerance=0)).point[0])[0] for n in (1, 3, 6)]
    assert found[0][0] <= found[1][0] <= found[2][0] and found[0][0] < found[2][0]


def test_power_stops_by_tolerance():
    _, evaluate = quadratic()
    state = last(climbed(evaluate, starts(2), True, 5000, tolerance=1e-4))
    assert state.step < 1000 and state.settled == 2


@pytest.mark.parametrize("n_rows", [1, 2, 8, 40])
@pytest.mark.parametrize("n_steps", [1, 2, 7, 40])
def test_every_row_is_frozen_in_exactly_one_block(n_rows, n_steps):
    blocks = OrderedRows(radii(n_rows)).blocks(n_rows, n_steps)
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(n_rows))
    assert [block.deadline for block in blocks] == sorted(block.deadline for block in blocks) and blocks[
        -1
    ].deadline == n_steps


@pytest.mark.parametrize("n_steps", [1, 2])
def test_very_few_steps_still_give_valid_vectors(n_steps):
    state = last(climbed(wavy(), starts(6, 2), True, n_steps))
    torch.testing.assert_close(state.point[0].norm(dim=1), radii(6))
    assert state.step == n_steps + 1


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("name", ["adamw", "power"])
def test_going_on_from_any_state_gives_the_same_end(name, orthogonal):
    evaluate = wavy()

    def run(state=None):
        if name == "adamw":
            return descended(evaluate, starts(3)[0], 6, 0.1, orthogonal, state)
        return climbed(evaluate, starts(3, 2), orthogonal, 12, state=state)

    kind = Descent if name == "adamw" else Climb
    states = list(run())
    kept = [{key: tensor.clone() for key, tensor in state.tensors().items()} for state in states]
    for tensors in kept[:-1:3]:
        resumed = last(run(kind.of({key: tensor.clone() for key, tensor in tensors.items()}))).tensors()
        for key in ("point.0", "history"):
            torch.testing.assert_close(resumed[key], kept[-1][key], rtol=0, atol=0, equal_nan=True)
    for state, tensors in zip(states, kept, strict=True):  # a state that was yielded is never written to
        assert all(
            torch.equal(state.tensors()[key].nan_to_num(-1), tensor.nan_to_num(-1)) for key, tensor in tensors.items()
        )


def test_free_adamw_is_adamw_on_each_row_alone():
    evaluate = wavy()
    together = last(descended(evaluate, starts(3)[0], 10, 0.1, orthogonal=False)).point[0]
    alone = [last(descended(evaluate, starts(3)[0, k : k + 1], 10, 0.1, orthogonal=False)).point[0] for k in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_adamw_starts_from_the_projected_start():
    evaluate = wavy()
    first = next(iter(descended(evaluate, starts(2)[0], 3, 0.1)))
    torch.testing.assert_close(first.history[0, :1], evaluate(to_sphere(starts(2)[0, :1], radii(1)))[0])


def adamw_by_hand(evaluate, start, n_steps, lr):
    """The published loop with AdamW's own equations written out (amsgrad, no weight decay)."""
    theta = start / start.norm() * RADIUS
    mean, square, largest = torch.zeros(D).double(), torch.zeros(D).double(), torch.zeros(D).double()
    values = []
    for step in range(1, n_steps + 1):
        value, gradient = (x[0] for x in evaluate(theta[None]))
        values.append(value)
        descent = -(gradient - (gradient @ theta) / (theta @ theta) * theta)
        mean = 0.9 * mean + 0.1 * descent
        square = 0.98 * square + 0.02 * descent**2
        largest = torch.maximum(largest, square)
        moved = theta - lr * (mean / (1 - 0.9**step)) / ((largest / (1 - 0.98**step)).sqrt() + 1e-8)
        theta = moved / moved.norm() * RADIUS
    return theta, torch.stack(values)


def test_adamw_is_the_equations_written_out():
    evaluate = wavy()
    state = last(descended(evaluate, starts(1)[0], 60, 0.3))
    theta, values = adamw_by_hand(evaluate, starts(1)[0, 0], 60, 0.3)
    torch.testing.assert_close(state.history[:-1, 0], values)
    torch.testing.assert_close(state.point[0][0], theta)


@pytest.mark.parametrize("where", ["value", "gradient"])
@pytest.mark.parametrize(("ascend", "place"), [("power", 1), ("free", 1), ("adamw", 0)])  # of adamw's one row at a time
def test_the_first_row_that_is_not_finite_is_named(ascend, place, where):
    _, evaluate = quadratic()

    def overflows(theta):
        value, gradient = evaluate(theta)
        spoiled = torch.arange(len(theta)) == place
        if where == "value":
            return value.masked_fill(spoiled, torch.nan), gradient
        return value, gradient.masked_fill(spoiled[:, None], torch.inf)

    start = starts(3)
    states = (
        descended(overflows, start[0], 3, 0.1) if ascend == "adamw" else climbed(overflows, start, ascend == "power", 3)
    )
    with pytest.raises(FloatingPointError, match=rf"row {place} .* in step 0"):
        last(states)
