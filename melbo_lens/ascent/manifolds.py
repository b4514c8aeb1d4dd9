"""Where do perturbations live?  They live on spheres, or in sets of orthogonal rows that are built in order."""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "*batch row d_model"]
linalg = cast(Any, torch.linalg)  # torch declares no types for these functions


def norm(x: Tensor, dim: int | tuple[int, int] = -1) -> Tensor:
    """Returns the Euclidean norms along an axis or two, which are kept with length 1."""
    return cast(Any, x).norm(dim=dim, keepdim=True)  # torch declares no types for this method


def to_sphere(rows: Rows, radii: Float[Tensor, "*batch row"]) -> Rows:
    """Scales each row to its radius; a row of zeros stays zero."""
    norms = norm(rows)
    return rows * torch.where(
        norms > 0, radii[..., None] / norms.clamp(min=torch.finfo(rows.dtype).tiny), torch.zeros_like(norms)
    )


def unit(rows: Rows) -> Rows:
    """Returns the direction of each row; a row of zeros stays zero."""
    return to_sphere(rows, rows.new_ones(rows.shape[:-1]))


def project_off(rows: Rows, found: Float[Tensor, "*batch other d_model"]) -> Rows:
    """Removes from each row its part in the span of `found`, whose rows are orthogonal to each other and not zero.

    This is done twice: once would leave a rounding error in proportion to the removed part, which may be much longer
    than what remains.
    """
    if found.shape[-2] == 0:
        return rows
    basis = unit(found)
    for _ in range(2):
        rows = rows - (rows @ basis.mT) @ basis
    return rows


def tangent(gradient: Rows, rows: Rows) -> Rows:
    """Returns the part of each gradient that is orthogonal to its row."""
    square = rows.square().sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return gradient - (gradient * rows).sum(-1, keepdim=True) / square * rows


def orthonormalize(rows: Rows) -> Rows:
    """Orthonormalises the rows in order (Gram-Schmidt): row k is normalised after projecting off rows 0 to k - 1.

    So row 0 never depends on the others. A QR decomposition with a positive diagonal gives the same, and is stable.
    """
    q, r = linalg.qr(unit(rows).mT)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs[..., None, :]).mT
