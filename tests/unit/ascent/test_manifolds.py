"""Do the manifolds obey their laws?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from melbo_lens.ascent.manifolds import orthonormalize, project_off, tangent, to_sphere

SEEDS = st.integers(0, 10_000)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_schmidt(rows):
    """The textbook, one vector after another."""
    found = []
    for row in rows:
        for other in found:
            row = row - (row @ other) * other
        found.append(row / row.norm())
    return torch.stack(found)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_rows_on_the_sphere_have_their_radius_and_direction(seed):
    rows, radii = draw(seed, 4, 6), draw(seed + 1, 4).abs() + 0.1
    scaled = to_sphere(rows, radii)
    torch.testing.assert_close(scaled.norm(dim=1), radii)
    torch.testing.assert_close(torch.cosine_similarity(scaled, rows), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(to_sphere(scaled, radii), scaled)


def test_a_row_of_zeros_stays_zero():
    assert torch.equal(to_sphere(torch.zeros(2, 3), torch.ones(2)), torch.zeros(2, 3))


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_what_is_projected_off_is_gone_and_the_rest_is_kept(seed):
    found, rows = 3 * gram_schmidt(draw(seed, 2, 6)), draw(seed + 1, 4, 6)
    left = project_off(rows, found)
    torch.testing.assert_close(left @ found.T, torch.zeros(4, 2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(project_off(left, found), left)
    assert torch.linalg.matrix_rank(torch.cat([found, rows - left])) == 2  # only their span was removed


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_float32_stays_orthogonal_when_almost_all_is_removed(scale):
    found = gram_schmidt(draw(0, 3, 32)).float()
    rows = scale * found[:1] + draw(1, 1, 32).float()
    left = project_off(rows, found)
    assert (left @ found.T).abs().max() < 1e-5 * left.norm()


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_a_tangent_gradient_is_orthogonal_to_its_row(seed):
    rows, gradient = draw(seed, 4, 6), draw(seed + 1, 4, 6)
    torch.testing.assert_close(
        (tangent(gradient, rows) * rows).sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0
    )


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_orthonormalize_is_gram_schmidt_in_order(seed):
    rows = draw(seed, 4, 7)
    torch.testing.assert_close(orthonormalize(rows), gram_schmidt(rows))
    torch.testing.assert_close(
        orthonormalize(rows[None])[0, :2], orthonormalize(rows[:2])
    )  # earlier rows don't see later ones
