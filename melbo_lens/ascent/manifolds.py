"""Where do perturbations live?  Spheres, and sets of orthogonal rows built in order."""

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "*batch row d_model"]


def to_sphere(rows: Rows, radii: Float[Tensor, "*batch row"]) -> Rows:
    """Scales each row to its radius; a row of zeros stays zero."""
    norms = rows.norm(dim=-1, keepdim=True)
    return rows * torch.where(
        norms > 0, radii[..., None] / norms.clamp(min=torch.finfo(rows.dtype).tiny), torch.zeros_like(norms)
    )


def unit(rows: Rows) -> Rows:
    """The direction of each row; a row of zeros stays zero."""
    return to_sphere(rows, rows.new_ones(rows.shape[:-1]))


def project_off(rows: Rows, found: Float[Tensor, "*batch other d_model"]) -> Rows:
    """Removes from each row what lies in the span of `found`, whose rows are orthogonal to each other (any length above 0).

    Done twice: once leaves an error of the size of the part removed, which may be much longer than what remains.
    """
    if found.shape[-2] == 0:
        return rows
    basis = unit(found)
    for _ in range(2):
        rows = rows - (rows @ basis.mT) @ basis
    return rows


def tangent(gradient: Rows, rows: Rows) -> Rows:
    """The part of each gradient that is orthogonal to its row."""
    square = rows.square().sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return gradient - (gradient * rows).sum(-1, keepdim=True) / square * rows


def orthonormalize(rows: Rows) -> Rows:
    """Gram-Schmidt in order: row k becomes the unit vector along what of it is orthogonal to rows 0 to k - 1.

    So row 0 never depends on the others. Computed as a QR decomposition with a positive diagonal, which is the same and stable.
    """
    q, r = torch.linalg.qr(unit(rows).mT)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs[..., None, :]).mT
