"""Do the ascents find what linear algebra says they must, in order, and go on exactly after an interrupt?"""

import pytest
import torch

from melbo_lens.manifolds import to_sphere
from melbo_lens.optimization import _blocks, adamw, power

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


def last(states):
    *_, state = states
    return state


def test_orthogonal_power_finds_the_singular_vectors_in_order():
    a, evaluate = quadratic()
    _, singular, right = torch.linalg.svd(a)
    state = last(power(evaluate, starts(4), radii(4), 3000, tolerance=1e-13))
    cosines = (state["values"] / RADIUS * right[:4]).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(evaluate(state["values"])[0], (RADIUS * singular[:4]) ** 2)


def test_free_power_finds_the_top_vector_in_every_row():
    a, evaluate = quadratic()
    _, singular, _ = torch.linalg.svd(a)
    state = last(power(evaluate, starts(3), radii(3), 2000, orthogonal=False, tolerance=1e-13))
    torch.testing.assert_close(evaluate(state["values"])[0], (RADIUS * singular[:1].expand(3)) ** 2)


def test_adamw_finds_the_singular_vectors_in_order():
    a, evaluate = quadratic()
    _, singular, _ = torch.linalg.svd(a)
    state = last(adamw(evaluate, starts(3)[0], radii(3), 1500, 0.03))
    torch.testing.assert_close(evaluate(state["values"])[0], (RADIUS * singular[:3]) ** 2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("restarts", [1, 3])
def test_power_stays_on_the_sphere_and_its_history_ends_with_the_values_returned(orthogonal, restarts):
    evaluate = wavy()
    state = last(power(evaluate, starts(5, restarts), radii(5), 25, orthogonal))
    values = state["values"]
    torch.testing.assert_close(values.norm(dim=1), radii(5))
    history = state["history"][: int(state["step"])]
    torch.testing.assert_close(history[-1], evaluate(values)[0])
    assert torch.isfinite(history).all()
    if orthogonal:
        cosines = (values @ values.T / RADIUS**2).fill_diagonal_(0)
        assert cosines.abs().max() < 1e-10


def test_a_row_never_falls_once_the_rows_before_it_are_frozen():
    state = last(power(wavy(), starts(4, 2), radii(4), 40, tolerance=0))
    history = state["history"]
    for row in range(4):
        frozen_before = 0 if row == 0 else _blocks(4, 40)[row].start and round(20 * (1 + (row - 1) / 3))
        assert (history[frozen_before + 1 :, row].diff() >= -1e-12).all()


def test_earlier_rows_do_not_depend_on_later_ones():
    evaluate = wavy()
    five = starts(5)
    changed = five.clone()
    changed[:, 3:] = starts(2, seed=9)
    a, b = (last(power(evaluate, s, radii(5), 20))["values"] for s in (five, changed))
    torch.testing.assert_close(a[:3], b[:3])
    assert not torch.allclose(a[3:], b[3:])


def test_more_restarts_do_not_find_a_worse_first_vector():
    evaluate = wavy()
    many = starts(3, 6)
    found = [evaluate(last(power(evaluate, many[:n], radii(3), 30, tolerance=0))["values"])[0] for n in (1, 3, 6)]
    assert found[0][0] <= found[1][0] <= found[2][0] and found[0][0] < found[2][0]


def test_power_stops_by_tolerance():
    _, evaluate = quadratic()
    state = last(power(evaluate, starts(2), radii(2), 5000, tolerance=1e-4))
    assert int(state["step"]) < 1000 and int(state["settled"]) == 2


@pytest.mark.parametrize("n_rows", [1, 2, 8, 40])
@pytest.mark.parametrize("n_steps", [1, 2, 7, 40])
def test_every_row_is_frozen_in_exactly_one_block(n_rows, n_steps):
    blocks = _blocks(n_rows, n_steps)
    assert [row for block in blocks for row in block] == list(range(n_rows))


@pytest.mark.parametrize("n_steps", [1, 2])
def test_very_few_steps_still_give_valid_vectors(n_steps):
    state = last(power(wavy(), starts(6, 2), radii(6), n_steps))
    torch.testing.assert_close(state["values"].norm(dim=1), radii(6))
    assert int(state["step"]) == n_steps + 1


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("name", ["adamw", "power"])
def test_going_on_from_any_state_gives_the_same_end(name, orthogonal):
    evaluate = wavy()

    def run(state=None):
        if name == "adamw":
            return adamw(evaluate, starts(3)[0], radii(3), 6, 0.1, orthogonal, state)
        return power(evaluate, starts(3, 2), radii(3), 12, orthogonal, state=state)

    states = [{key: tensor.clone() for key, tensor in state.items()} for state in run()]
    for state in states[:-1:3]:
        resumed = last(run({key: tensor.clone() for key, tensor in state.items()}))
        for key in ("values", "history"):
            torch.testing.assert_close(resumed[key], states[-1][key], rtol=0, atol=0, equal_nan=True)


def test_free_adamw_is_adamw_on_each_row_alone():
    evaluate = wavy()
    together = last(adamw(evaluate, starts(3)[0], radii(3), 10, 0.1, orthogonal=False))["values"]
    alone = [last(adamw(evaluate, starts(3)[0, k : k + 1], radii(1), 10, 0.1, orthogonal=False))["values"] for k in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_adamw_starts_from_the_projected_start():
    evaluate = wavy()
    first = next(iter(adamw(evaluate, starts(2)[0], radii(2), 3, 0.1)))
    torch.testing.assert_close(first["history"][0, :1], evaluate(to_sphere(starts(2)[0, :1], radii(1)))[0])


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
    state = last(adamw(evaluate, starts(1)[0], radii(1), 60, 0.3))
    theta, values = adamw_by_hand(evaluate, starts(1)[0, 0], 60, 0.3)
    torch.testing.assert_close(state["history"][:-1, 0], values)
    torch.testing.assert_close(state["values"][0], theta)
