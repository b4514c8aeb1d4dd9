"""What does a picture show?  Each class holds the arrays, labels and units of one kind of picture.

Nothing is drawn here, so the numbers can be checked without looking at a figure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_ROWS = 60  # a reader can't tell more rows apart; beyond, figures show the first in rank and quantiles of all
QUANTILES = {0.95: "95 % quantile", 0.75: "75 % quantile", 0.5: "median", 0.25: "25 % quantile", 0.05: "5 % quantile"}


@dataclass(frozen=True, eq=False)
class Matrix:
    """A heat map has one number for each pair of labels.

    Attributes:
        values: the numbers, [row column]; NaN is left blank.
        signed: True gives a diverging colour scale around 0, False one that begins at 0.
        bound: the value with the strongest colour; the largest finite one by default.
        texts: one text for each row, such as a completion, which is shown on hovering.
        upward: puts the first row at the bottom, as layers are usually drawn.
        note: what the reader has to know, such as how many rows were left out.
        marked: cells that get a colour of their own and are left out of the scale, [row column].
        mark: what the marked cells are.
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
    marked: np.ndarray | None = None
    mark: str = "attention sink"


@dataclass(frozen=True, eq=False)
class Clustered:
    """A matrix whose rows and columns follow a clustering, and the tree of that clustering.

    Attributes:
        matrix: the matrix, already in the order of the clustering.
        order: the original row at each place.
        joins: [join 4 2], the four corners of each join: the place along the columns, and the distance.
    """

    matrix: Matrix
    order: tuple[int, ...]
    joins: np.ndarray


@dataclass(frozen=True, eq=False)
class Line:
    """One curve, with an interval around it if `low` and `high` are given, and a colour of its own if it has one."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    text: str = ""
    control: bool = False
    color: str = ""


@dataclass(frozen=True, eq=False)
class Band:
    """The area between two curves, such as the quantiles of many."""

    name: str
    x: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, eq=False)
class Lines:
    """Several curves over one axis, and bands behind them; `level` is a horizontal line and `mark` a vertical one."""

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
    bands: tuple[Band, ...] = ()


@dataclass(frozen=True, eq=False)
class Bars:
    """Rates of several things (`names`) in several groups, with intervals; the arrays are [group name]."""

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
    """Several measures of the same rows, shown side by side; `values` is [measure row].

    The last `n_summaries` rows are no vectors: they say how all of them are distributed.
    """

    values: np.ndarray
    rows: tuple[str, ...]
    measures: tuple[str, ...]
    title: str
    texts: tuple[str, ...] = ()
    note: str = ""
    n_summaries: int = 0


@dataclass(frozen=True, eq=False)
class Points:
    """Points in a plane; each has a group, a label and a text. The labels of those in `named` stand beside them."""

    x: np.ndarray
    y: np.ndarray
    groups: tuple[str, ...]
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    x_axis: str
    y_axis: str
    title: str
    note: str = ""
    named: tuple[int, ...] = ()


def left_out(n: int, what: str, most: int = MOST_ROWS, how: str = "choose others as vectors[[...]]") -> str:
    """Returns a sentence about what is not drawn, or an empty text if everything is drawn."""
    return "" if n <= most else f"The first {most:,} of {n:,} {what} are drawn; {how}."


def without_numbers(values: np.ndarray, what: str, where: Sequence[object] | None = None) -> str:
    """Returns a sentence about the rows that hold NaN or infinity, or an empty text if no row does."""
    bad = [int(i) for i in np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))]
    named = ", ".join(str(i if where is None else where[i]) for i in bad[:8])
    more = "…" if len(bad) > 8 else ""
    return f"NaN or infinity in {what} {named}{more}." if bad else ""
