"""What does a picture show?  Frozen arrays with labels and units, so that numbers can be checked apart from looks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_ROWS = 200  # more can't be told apart on a page


@dataclass(frozen=True, eq=False)
class Matrix:
    """A heat-map: one number for each pair of labels.

    Attributes:
        values: [row column]; NaN is left blank.
        signed: a diverging scale around 0, else one that begins at 0.
        texts: for each row what hovering adds, such as a completion.
        upward: the first row is at the bottom, as layers are drawn.
        note: what a reader has to know, such as what was left out.
    """

    values: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_axis: str
    column_axis: str
    quantity: str
    title: str
    signed: bool = False
    bound: float | None = None
    texts: tuple[str, ...] = ()
    upward: bool = False
    note: str = ""


@dataclass(frozen=True, eq=False)
class Clustered:
    """A matrix in the order of a clustering, with its tree.

    Attributes:
        matrix: rows and columns in that order.
        order: which original row stands where.
        joins: [join 4 2], the corners of each join: place along the columns, and distance.
    """

    matrix: Matrix
    order: tuple[int, ...]
    joins: np.ndarray


@dataclass(frozen=True, eq=False)
class Line:
    """One curve, with an interval around it if low and high are given."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    text: str = ""
    control: bool = False


@dataclass(frozen=True, eq=False)
class Lines:
    """Curves over one axis; `level` is a horizontal line, `mark` a vertical one."""

    lines: tuple[Line, ...]
    x_axis: str
    y_axis: str
    title: str
    log_x: bool = False
    log_y: bool = False
    percent: bool = False
    level: tuple[str, float] | None = None
    mark: tuple[str, float] | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Bars:
    """Rates of several things (`names`) for several groups, with intervals [group name]."""

    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    names: tuple[str, ...]
    groups: tuple[str, ...]
    quantity: str
    title: str
    note: str = ""


@dataclass(frozen=True, eq=False)
class Panels:
    """Several measures of the same rows, side by side: values [measure row]."""

    values: np.ndarray
    rows: tuple[str, ...]
    measures: tuple[str, ...]
    title: str
    texts: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, eq=False)
class Points:
    """Points in a plane, in groups, with a text each."""

    x: np.ndarray
    y: np.ndarray
    groups: tuple[str, ...]
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    x_axis: str
    y_axis: str
    title: str
    note: str = ""


def left_out(n: int, what: str, most: int = MOST_ROWS, how: str = "choose others as vectors[[...]]") -> str:
    """A sentence about what is not drawn; empty if all is."""
    return "" if n <= most else f"The first {most:,} of {n:,} {what} are drawn; {how}."


def without_numbers(values: np.ndarray, what: str, where: Sequence[object] | None = None) -> str:
    """A sentence about rows that hold NaN or infinity; empty if none does."""
    bad = [int(i) for i in np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))]
    named = ", ".join(str(i if where is None else where[i]) for i in bad[:8])
    more = "…" if len(bad) > 8 else ""
    return f"NaN or infinity in {what} {named}{more}." if bad else ""
