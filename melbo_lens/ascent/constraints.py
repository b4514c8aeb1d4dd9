"""Where may a point live?  On spheres, on spheres and orthogonal in order, or among low-rank factors that are normalised."""

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.ascent.manifolds import orthonormalize, project_off, tangent, to_sphere, unit
from melbo_lens.ascent.states import Point

INERTIA = 0.4  # the share of the old direction in the new one, which damps oscillation
Normalization: TypeAlias = Literal["column", "frobenius", "spectral"]
Matrices: TypeAlias = Float[Tensor, "*batch row column"]


class Block(NamedTuple):
    """Consecutive rows that the fixed-point ascent freezes together.

    Attributes:
        start, stop: the rows.
        deadline: the step after which they are frozen at the latest.
        joint: whether they are kept together, all from one restart at one step, or each row by itself.
    """

    start: int
    stop: int
    deadline: int
    joint: bool

    def __len__(self) -> int:
        return self.stop - self.start


class Constraint(ABC):
    """Where points live, and which point there a gradient asks for.

    Rows are [restart row ...]; `found` are the rows before them, which stand still.

    Attributes:
        patience: rows have settled when their scores stand still for so many steps.
    """

    patience: int = 1

    def groups(self, n_rows: int) -> list[range]:
        """The rows that AdamW climbs with at once."""
        return [range(n_rows)]

    def blocks(self, n_rows: int, n_steps: int) -> list[Block]:
        """The rows that the fixed-point ascent freezes, in order."""
        return [Block(0, n_rows, n_steps, joint=False)]

    @abstractmethod
    def project(self, rows: Point, found: Point) -> Point:
        """The rows, moved into the constraint."""

    def tangent(self, gradient: Point, rows: Point, found: Point) -> Point:
        """The part of a gradient along which a row can move."""
        return gradient

    @abstractmethod
    def pulled(self, rows: Point, gradient: Point, found: Point, step: int) -> Point:
        """The maximiser within the constraint of the objective made linear, with a share of the old rows added."""


@dataclass(frozen=True, eq=False)
class Sphere(Constraint):
    """Each row has its radius, and is a problem of its own."""

    radii: Float[Tensor, " row"]

    def project(self, rows: Point, found: Point) -> Point:
        return (to_sphere(rows[0], self._radii(rows, found)),)

    def tangent(self, gradient: Point, rows: Point, found: Point) -> Point:
        return (tangent(gradient[0], rows[0]),)

    def pulled(self, rows: Point, gradient: Point, found: Point, step: int) -> Point:
        radii = self._radii(rows, found)
        return (to_sphere(unit(gradient[0]) + INERTIA * rows[0] / radii[..., None], radii),)

    def _radii(self, rows: Point, found: Point) -> Float[Tensor, "restart row"]:
        first, restarts = found[0].shape[1], len(rows[0])
        return self.radii[first : first + rows[0].shape[1]].expand(restarts, -1)


@dataclass(frozen=True, eq=False)
class OrderedRows(Sphere):
    """Each row has its radius and is orthogonal to the rows before it, so that no row depends on the rows after it."""

    def groups(self, n_rows: int) -> list[range]:
        return [range(k, k + 1) for k in range(n_rows)]

    def blocks(self, n_rows: int, n_steps: int) -> list[Block]:
        """The first half of the steps moves all rows; then they are frozen in order, and the last row takes the last step.

        Rows that share a deadline share a block: there are such rows only if rows outnumber the steps left.
        """
        deadlines = [n_steps if n_rows == 1 else round(n_steps / 2 * (1 + row / (n_rows - 1))) for row in range(n_rows)]
        edges = [row for row in range(n_rows) if row == 0 or deadlines[row] != deadlines[row - 1]] + [n_rows]
        return [Block(start, stop, deadlines[start], joint=True) for start, stop in itertools.pairwise(edges)]

    def project(self, rows: Point, found: Point) -> Point:
        return (self._scaled(_in_order(rows[0], found[0]), rows, found),)

    def tangent(self, gradient: Point, rows: Point, found: Point) -> Point:
        return (tangent(project_off(gradient[0], found[0]), rows[0]),)

    def pulled(self, rows: Point, gradient: Point, found: Point, step: int) -> Point:
        pull = _in_order(gradient[0], found[0]) + INERTIA * rows[0] / self._radii(rows, found)[..., None]
        return (self._scaled(_in_order(pull, found[0]), rows, found),)

    def _scaled(self, units: Tensor, rows: Point, found: Point) -> Tensor:
        return units * self._radii(rows, found)[..., None]


class Factors(Constraint):
    """Every factor is normalised; in the fixed-point ascent the factors of a product take turns.

    Two factors that move at once each answer to what the other one was, so A and B of every layer alternate. A step in which scores stand
    still therefore says little, and ten are waited for.
    """

    patience = 10

    @abstractmethod
    def normalize(self, matrices: Matrices) -> Matrices:
        """The matrices scaled into the constraint."""

    def maximizer(self, gradients: Matrices) -> Matrices:
        """The matrix M within the constraint that maximises ``<G, M>``."""
        return self.normalize(gradients)

    def project(self, rows: Point, found: Point) -> Point:
        return tuple(self.normalize(factor) for factor in rows)

    def pulled(self, rows: Point, gradient: Point, found: Point, step: int) -> Point:
        resting = step % 2  # B moves first: a random A passes on all of its input, a random B writes only noise
        return tuple(
            factor if i % 2 == resting else self.normalize(self.maximizer(along) + INERTIA * factor)
            for i, (factor, along) in enumerate(zip(rows, gradient, strict=True))
        )


class Columns(Factors):
    """Every column has unit norm, as published."""

    def normalize(self, matrices: Matrices) -> Matrices:
        return _divided(matrices, matrices.norm(dim=-2, keepdim=True))


class Frobenius(Factors):
    """Every matrix has unit Frobenius norm."""

    def normalize(self, matrices: Matrices) -> Matrices:
        return _divided(matrices, matrices.norm(dim=(-2, -1), keepdim=True))


class Spectral(Factors):
    """Every matrix has a largest singular value of 1."""

    def normalize(self, matrices: Matrices) -> Matrices:
        return _divided(matrices, torch.linalg.matrix_norm(matrices, ord=2, keepdim=True))

    def maximizer(self, gradients: Matrices) -> Matrices:
        """The polar factor ``U V^T`` of ``G = U S V^T``."""
        left, _, right = torch.linalg.svd(gradients, full_matrices=False)
        return left @ right


NORMALIZATIONS: dict[str, Factors] = {"column": Columns(), "frobenius": Frobenius(), "spectral": Spectral()}


def _divided(matrices: Matrices, norms: Tensor) -> Matrices:
    return matrices / norms.clamp(min=torch.finfo(matrices.dtype).tiny)


def _in_order(
    rows: Float[Tensor, "restart row d_model"], found: Float[Tensor, "restart found d_model"]
) -> Float[Tensor, "restart row d_model"]:
    """The rows orthonormalised in order, in the complement of the ones found."""
    if rows.shape[-2] == 1:
        return unit(project_off(rows, found))
    return orthonormalize(torch.cat([found, rows], dim=-2))[..., found.shape[-2] :, :]
