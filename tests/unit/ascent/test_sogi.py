"""Do rows that repel each other do what the published algorithm says?"""

import math

import numpy as np
import pytest
import torch

from melbo_lens.ascent.constraints import INERTIA, RepellingRows
from melbo_lens.ascent.fixed_point import unslowed
from melbo_lens.ascent.manifolds import orthonormalize, to_sphere, unit
from melbo_lens.ascent.sogi import soft_orthogonalize, sogi
from melbo_lens.methods.cpe import repulsion
from melbo_lens.methods.dct import spread_of, strengths


def by_hand(rows, log_weights, project, n_iterations, temperature):
    """The same in plain Python, row by row."""
    rows = [np.array(row, dtype=np.float64) for row in rows]
    for _ in range(n_iterations):
        rows = [project(row) for row in rows]
        new = []
        for i, mine in enumerate(rows):
            weights = [
                0.0 if j == i else math.exp(float(mine @ other) / temperature + log_weights[j])
                for j, other in enumerate(rows)
            ]
            others = sum(weight * other for weight, other in zip(weights, rows, strict=True))
            new.append(mine - others / sum(weights))
        rows = new
    return np.stack([project(row) for row in rows])


def torus(row):
    """Two vectors side by side, each of norm 1."""
    a, b = row[:4], row[4:]
    return np.concatenate([a / np.linalg.norm(a), b / np.linalg.norm(b)])


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("kind", ["unit", "torus"])
def test_soft_orthogonalisation_is_what_the_algorithm_says(kind, temperature):
    rows = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def project(x):
        return unit(x) if kind == "unit" else torch.cat([unit(x[:, :4]), unit(x[:, 4:])], dim=1)

    found = soft_orthogonalize(rows, weights, project, 10, temperature)
    plain = torus if kind == "torus" else lambda row: row / np.linalg.norm(row)
    expected = by_hand(rows.numpy(), weights.tolist(), plain, 10, temperature)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("restarts", [1, 2])
def test_rows_on_a_sphere_go_where_their_gradients_ask_and_repel_each_other(restarts):
    draw = torch.Generator().manual_seed(2)
    gradient = torch.randn(restarts, 4, 9, generator=draw, dtype=torch.float64)
    gradient[:, 1] *= 300  # no row repels the others by more than twice as much as is usual
    radii = torch.tensor([2.0, 3.0, 2.5, 2.0], dtype=torch.float64)
    rows = to_sphere(torch.randn(restarts, 4, 9, generator=draw, dtype=torch.float64), radii.expand(restarts, -1))
    (found,) = RepellingRows(radii).pulled((rows,), (gradient,), (rows[:, :0],), 3, unslowed((rows,)))
    for k in range(restarts):
        slopes, before = gradient[k].numpy(), rows[k].numpy()
        sizes = np.linalg.norm(slopes, axis=1, keepdims=True)
        pull = slopes / sizes + INERTIA * before / np.linalg.norm(before, axis=1, keepdims=True)
        usual = np.sort(sizes[:, 0])[1]
        weights = np.log(np.clip(sizes[:, 0], usual / 2, usual * 2)).tolist()
        apart = by_hand(pull, weights, lambda row: row / np.linalg.norm(row), 10, 1.0)
        np.testing.assert_allclose(found[k].numpy(), apart * radii[:, None].numpy(), atol=1e-9)


def test_rows_that_repel_each_other_are_kept_together():
    """A row's best step is worth nothing beside other rows of another step, which it was not kept apart from."""
    blocks = RepellingRows(torch.ones(5)).blocks(5, 12)
    assert [(one.start, one.stop, one.deadline, one.joint) for one in blocks] == [(0, 5, 12, True)]


def test_a_single_row_has_none_to_be_repelled_by():
    row = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(soft_orthogonalize(row, torch.zeros(1), unit), row / 5)


def test_near_duplicates_are_driven_apart():
    base = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    rows = base + 0.1 * torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    found = soft_orthogonalize(unit(rows), torch.zeros(4), unit)
    before, after = ((unit(x) @ unit(x).T - torch.eye(4)).abs().max() for x in (rows, found))
    assert before > 0.9 and after < 0.5


@pytest.mark.parametrize("norm", ["unit", "torus"])
def test_the_factors_of_cpe_are_unit_vectors_whatever_the_norm(norm):
    gradient = tuple(
        torch.randn(3, *shape, generator=torch.Generator().manual_seed(i))
        for i, shape in enumerate([(1, 5), (7, 1)] * 2)
    )
    point = repulsion(norm, 1.0, 10)(gradient)
    for before, after in zip(gradient, point, strict=True):
        assert before.shape == after.shape
        torch.testing.assert_close(after.flatten(1).norm(dim=1), torch.ones(3))
    plain = repulsion(norm, 1.0, 0)(gradient)
    torch.testing.assert_close(plain[0], gradient[0] / gradient[0].norm(dim=-1, keepdim=True))


def test_the_unit_norm_is_of_the_whole_gradient_and_its_parts_are_scaled_at_the_end():
    """The public code scales a_l and b_l only after the factors repelled each other, so that large parts count more."""
    draw = torch.Generator().manual_seed(3)
    gradient = tuple(
        size * torch.randn(4, *shape, generator=draw, dtype=torch.float64)
        for size, shape in ((1.0, (1, 5)), (30.0, (7, 1)), (0.2, (1, 5)), (4.0, (7, 1)))
    )
    flat = torch.cat([x.flatten(1) for x in gradient], dim=1).numpy()
    weights = np.log(np.linalg.norm(flat, axis=1)).tolist()
    apart = by_hand(flat, weights, lambda row: row / np.linalg.norm(row), 10, 1.0)
    parts = np.split(apart, [5, 12, 17], axis=1)
    for found, part in zip(repulsion("unit", 1.0, 10)(gradient), parts, strict=True):
        expected = part / np.linalg.norm(part, axis=1, keepdims=True)
        np.testing.assert_allclose(found.flatten(1).numpy(), expected, atol=1e-9)


def test_on_the_torus_every_part_has_norm_one_in_each_iteration():
    draw = torch.Generator().manual_seed(4)
    gradient = tuple(
        size * torch.randn(4, *shape, generator=draw, dtype=torch.float64) for size, shape in ((1, (1, 4)), (9, (5, 1)))
    )
    flat = torch.cat([x.flatten(1) for x in gradient], dim=1).numpy()
    apart = by_hand([torus(row) for row in flat], np.log(np.linalg.norm(flat, axis=1)).tolist(), torus, 10, 1.0)
    for found, part in zip(repulsion("torus", 1.0, 10)(gradient), np.split(apart, [4], axis=1), strict=True):
        np.testing.assert_allclose(found.flatten(1).numpy(), part, atol=1e-9)


@pytest.mark.parametrize("where", ["mean", "gradient"])
def test_the_first_row_that_is_not_finite_is_named_and_the_others_are_not_spoiled(where):
    def changes(rows, targets):
        means, gradient = torch.ones(3, 2), torch.ones(3, 4)
        (means if where == "mean" else gradient)[1, 0] = float("inf")
        return means, (gradient,)

    with pytest.raises(FloatingPointError, match="row 1 changes the target by NaN or infinity in step 0"):
        next(sogi(changes, (torch.ones(3, 4),), torch.ones(3, 2), lambda gradient: gradient, 3, True))


def planted(n=3, d=12, d_target=9, seed=0):
    """An exponential decomposition with orthonormal v and u, as a function from rows to means and gradients."""
    generator = torch.Generator().manual_seed(seed)
    v, u = (orthonormalize(torch.randn(n, width, generator=generator, dtype=torch.float64)) for width in (d, d_target))
    alpha = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)

    def changes(rows, targets):
        (leaf,) = (x.clone().requires_grad_() for x in rows)
        means = torch.expm1(leaf @ v.T) * alpha @ u
        along = unit(means.detach()) if targets is None else targets
        return means.detach(), torch.autograd.grad((means * along).sum(), (leaf,))

    return v, u, alpha, changes


def test_orthogonal_iteration_finds_planted_factors_and_their_strengths():
    v, u, alpha, changes = planted()
    noise = torch.randn(3, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    start = orthonormalize(v + 0.05 * noise)  # near them, since minus a factor is a fixed point, too
    *_, end = sogi(changes, (start,), torch.zeros(3, 9, dtype=torch.float64), spread_of("qr", 1.0, 1.0), 60, False)
    (found,) = end.point
    cosines = found @ v.T
    order = cosines.abs().argmax(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    torch.testing.assert_close(cosines.amax(1), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(end.targets, u[order], atol=1e-5, rtol=0)
    found_alpha = strengths(found, end.targets, changes(end.point, None)[0])
    torch.testing.assert_close(found_alpha.double(), alpha[order], rtol=1e-4, atol=0)


@pytest.mark.parametrize("directed", [True, False])
def test_a_step_goes_to_the_gradient_along_the_direction_before_or_after(directed):
    _, _, _, changes = planted()
    start = unit(torch.randn(3, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64))
    targets = unit(torch.randn(3, 9, generator=torch.Generator().manual_seed(7), dtype=torch.float64))
    first, second = list(sogi(changes, (start,), targets, lambda gradient: gradient, 1, directed))
    means, _ = changes((start,), targets)
    along = targets if directed else unit(means)
    torch.testing.assert_close(first.point[0], changes((start,), along)[1][0])
    torch.testing.assert_close(first.targets, unit(means))
    torch.testing.assert_close(first.history[0], (means * along).sum(1))
    torch.testing.assert_close(second.point[0], first.point[0])  # the last state is measured, not moved
    assert second.step == 2 and torch.isfinite(second.history).all()
    (resumed,) = list(sogi(changes, (start,), targets, lambda gradient: gradient, 1, directed, first))
    torch.testing.assert_close(resumed.history, second.history)
