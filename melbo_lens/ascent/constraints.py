"""Where may a point live?  On spheres, on spheres and orthogonal in order, or among normalised low-rank factors."""

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.ascent.manifolds import linalg, norm, orthonormalize, project_off, tangent, to_sphere, unit
from melbo_lens.ascent.sogi import soft_orthogonalize
from melbo_lens.ascent.states import Point

INERTIA = 0.4  # the least share of the old direction that is added to the new one; it damps oscillation
LOUDEST = 2.0  # a row repels the others by at most so many times as much as the median row, and at least the inverse
Normalization: TypeAlias = Literal["column", "frobenius", "spectral"]
Matrices: TypeAlias = Float[Tensor, "*batch row column"]
Inertia: TypeAlias = Float[Tensor, "restart row"]


class Block(NamedTuple):
    """Consecutive rows that the fixed-point ascent freezes together.

    Attributes:
        start, stop: the range of rows.
        deadline: the step after which they are frozen at the latest.
        joint: whether all rows are kept from the same restart and step, or each row is kept by itself.
    """

    start: int
    stop: int
    deadline: int
    joint: bool

    def __len__(self) -> int:
        return self.stop - self.start


class Constraint(ABC):
    """A set in which points live, and the rule for which of its points a gradient asks for.

    Rows are [restart row ...]; `found` holds the rows before them, which stand still.

    Attributes:
        patience: rows have settled when their scores stand still for this many steps.
    """

    patience: int = 1

    def groups(self, n_rows: int) -> list[range]:
        """Lists the groups of rows that AdamW moves at once."""
        return [range(n_rows)]

    def blocks(self, n_rows: int, n_steps: int) -> list[Block]:
        """Lists the blocks of rows that the fixed-point ascent freezes, in order."""
        return [Block(0, n_rows, n_steps, joint=False)]

    @abstractmethod
    def project(self, rows: Point, found: Point) -> Point:
        """Moves the rows into the constraint."""

    def tangent(self, gradient: Point, rows: Point, found: Point) -> Point:
        """Returns the part of a gradient along which a row can move."""
        return gradient

    @abstractmethod
    def pulled(self, rows: Point, gradient: Point, found: Point, step: int, inertia: Inertia) -> Point:
        """Maximises the linearised objective within the constraint, with a share of the old rows added: `inertia`."""


@dataclass(frozen=True, eq=False)
class Sphere(Constraint):
    """Each row lies on a sphere of its own radius, and is an independent problem."""

    radii: Float[Tensor, " row"]

    def project(self, rows: Point, found: Point) -> Point:
        return (to_sphere(rows[0], self._radii(rows, found)),)

    def tangent(self, gradient: Point, rows: Point, found: Point) -> Point:
        return (tangent(gradient[0], rows[0]),)

    def pulled(self, rows: Point, gradient: Point, found: Point, step: int, inertia: Inertia) -> Point:
        radii = self._radii(rows, found)
        return (to_sphere(unit(gradient[0]) + (inertia / radii)[..., None] * rows[0], radii),)

    def _radii(self, rows: Point, found: Point) -> Float[Tensor, "restart row"]:
        first, restarts = found[0].shape[1], len(rows[0])
        return self.radii[first : first + rows[0].shape[1]].expand(restarts, -1)


@dataclass(frozen=True, eq=False)
class OrderedRows(Sphere):
    """Each row has its radius and is orthogonal to the rows before it, so that no row depends on the rows after it."""

    def groups(self, n_rows: int) -> list[range]:
        return [range(k, k + 1) for k in range(n_rows)]

    def blocks(self, n_rows: int, n_steps: int) -> list[Block]:
        """Moves all rows in the first half of the steps, then freezes them in order; the last row takes the last step.

        Rows that share a deadline share a block. That happens only if there are more rows than steps left.
        """
        deadlines = [n_steps if n_rows == 1 else round(n_steps / 2 * (1 + row / (n_rows - 1))) for row in range(n_rows)]
        edges = [row for row in range(n_rows) if row == 0 or deadlines[row] != deadlines[row - 1]] + [n_rows]
        return [Block(start, stop, deadlines[start], joint=True) for start, stop in itertools.pairwise(edges)]

    def project(self, rows: Point, found: Point) -> Point:
        return (self._scaled(_in_order(rows[0], found[0]), rows, found),)

    def tangent(self, gradient: Point, rows: Point, found: Point) -> Point:
        return (tangent(project_off(gradient[0], found[0]), rows[0]),)

    def pulled(self, rows: Point, gradient: Point, found: Point, step: int, inertia: Inertia) -> Point:
        pull = _in_order(gradient[0], found[0]) + (inertia / self._radii(rows, found))[..., None] * rows[0]
        return (self._scaled(_in_order(pull, found[0]), rows, found),)

    def _scaled(self, units: Tensor, rows: Point, found: Point) -> Tensor:
        return units * self._radii(rows, found)[..., None]


@dataclass(frozen=True, eq=False)
class RepellingRows(Sphere):
    """Each row has its radius, and rows that point the same way repel each other (`soft_orthogonalize`).

    A row pushes the others by the norm of its gradient, but counts at most twice and at least half as much as the
    median row: otherwise a single loud row would turn all others into its opposite. Rows depend on each other, so all
    of them are kept from the same restart and step.
    """

    def blocks(self, n_rows: int, n_steps: int) -> list[Block]:
        return [Block(0, n_rows, n_steps, joint=True)]

    def pulled(self, rows: Point, gradient: Point, found: Point, step: int, inertia: Inertia) -> Point:
        radii = self._radii(rows, found)
        pull = unit(gradient[0]) + (inertia / radii)[..., None] * rows[0]
        size = norm(gradient[0]).squeeze(-1).clamp(min=torch.finfo(pull.dtype).tiny)
        usual = size.median(-1, keepdim=True).values
        weights = size.clamp(usual / LOUDEST, usual * LOUDEST).log()
        apart = [soft_orthogonalize(some, strength, unit) for some, strength in zip(pull, weights, strict=True)]
        return (to_sphere(torch.stack(apart), radii),)


class Factors(Constraint):
    """Every factor is normalised, and in the fixed-point ascent the factors of a product take turns.

    If two factors moved at once, each would answer to the old value of the other; so A and B of every layer alternate.
    A single step in which scores stand still therefore says little, and ten such steps are required.
    """

    patience = 10

    @abstractmethod
    def normalize(self, matrices: Matrices) -> Matrices:
        """Scales the matrices into the constraint."""

    def maximizer(self, gradients: Matrices) -> Matrices:
        """Returns the matrix M within the constraint that maximises ``<G, M>``."""
        return self.normalize(gradients)

    def project(self, rows: Point, found: Point) -> Point:
        return tuple(self.normalize(factor) for factor in rows)

    def pulled(self, rows: Point, gradient: Point, found: Point, step: int, inertia: Inertia) -> Point:
        resting = step % 2  # update B first: a random A already passes signal, a random B writes only noise
        return tuple(
            factor if i % 2 == resting else self.normalize(self.maximizer(along) + inertia[..., None, None] * factor)
            for i, (factor, along) in enumerate(zip(rows, gradient, strict=True))
        )


class Columns(Factors):
    """Every column has unit norm, as in the published recipe."""

    def normalize(self, matrices: Matrices) -> Matrices:
        return _divided(matrices, norm(matrices, dim=-2))


class Frobenius(Factors):
    """Every matrix has unit Frobenius norm."""

    def normalize(self, matrices: Matrices) -> Matrices:
        return _divided(matrices, norm(matrices, dim=(-2, -1)))


class Spectral(Factors):
    """Every matrix has a largest singular value of 1."""

    def normalize(self, matrices: Matrices) -> Matrices:
        return _divided(matrices, linalg.matrix_norm(matrices, ord=2, keepdim=True))

    def maximizer(self, gradients: Matrices) -> Matrices:
        """Returns the polar factor ``U V^T`` of ``G = U S V^T``."""
        left, _, right = linalg.svd(gradients, full_matrices=False)
        return left @ right


NORMALIZATIONS: dict[str, Factors] = {"column": Columns(), "frobenius": Frobenius(), "spectral": Spectral()}


def _divided(matrices: Matrices, norms: Tensor) -> Matrices:
    return matrices / norms.clamp(min=torch.finfo(matrices.dtype).tiny)


def _in_order(
    rows: Float[Tensor, "restart row d_model"], found: Float[Tensor, "restart found d_model"]
) -> Float[Tensor, "restart row d_model"]:
    """Orthonormalises the rows in order, in the complement of those already found."""
    if rows.shape[-2] == 1:
        return unit(project_off(rows, found))
    return orthonormalize(torch.cat([found, rows], dim=-2))[..., found.shape[-2] :, :]
