"""What happens as the radius grows?  Behaviour, readability and effect, for each method, pair of layers and radius."""

import math
from typing import Any

import numpy as np
import pandas as pd

from melbo_lens.evaluation.departures import NATURAL
from melbo_lens.plots.arrays import Line, Lines
from melbo_lens.plots.drawing import CONTROL
from melbo_lens.search.cards import Rate, color_of, short
from melbo_lens.search.groups import signed
from melbo_lens.search.written import Written

MOST_GROUPS = 4
LABEL = 32  # characters of a group in the legend
MOST_RUNGS = 12  # more radii of one pair of layers are put together, two to an octave
AT = ["method", "source_layer", "target_layer", "radius", "relative_radius"]


def ladder(written: Written) -> pd.DataFrame:
    """Returns one row for each method, pair of layers and radius, which is the norm times the multiple of it.

    Returns:
        The columns of `AT`, n (completions), readable (how many are natural text, or the unsteered one), changed (how
        many differ from the unsteered ones), group 0, group 1, ... (how many belong to each of the first groups), and
        effect (the median over vectors and signs at the norm that was fitted; NaN at other multiples of it).
    """
    facts = written.directions.assign(vector=written.directions.vector.astype(int))
    rows = written.steered.astype({"vector": int}).merge(facts, on=["trial", "vector"], how="left")
    for name in ("radius", "relative_radius"):
        rows[name] = (rows[name] * rows.scale).map(lambda value: float(f"{value:.4g}"))
        if rows.groupby(AT[:3], dropna=False)[name].nunique().max() > MOST_RUNGS:  # vectors with norms of their own
            rows[name] = 2 ** ((2 * np.log2(rows[name].clip(lower=1e-30))).round() / 2)
    rows = signed(rows)
    rows.loc[rows.scale != 1, "effect"] = math.nan  # it was measured at the norm that was fitted
    # what shows a behaviour that was named counts as content, and may be unreadable all the same
    rows["changed"] = rows.change != "same"
    rows["readable"] = ~(rows.changed & (rows.natural < NATURAL))
    groups = [f"group {number}" for number in range(min(len(written.groups), MOST_GROUPS))]
    for number, name in enumerate(groups):
        rows[name] = (rows.group == number).fillna(False)
    counted = ["readable", "changed", *groups]
    found = rows.groupby(AT, dropna=False)
    table = found[counted].sum().astype(int)
    table.insert(0, "n", found.size())
    return table.assign(effect=found.effect.median()).reset_index()


def figure(table: pd.DataFrame, written: Written) -> tuple[Lines, Lines] | None:
    """Returns the curves of the pair of layers with the most radii; None if no pair has two radii."""
    table = table[table.radius.notna()]
    if table.empty:
        return None
    pairs = table.groupby(AT[:3], dropna=False)
    key, size = max(((key, part.radius.nunique()) for key, part in pairs), key=lambda one: one[1])
    if size < 2:
        return None
    part = pairs.get_group(key).sort_values("radius")
    relative = bool(part.relative_radius.notna().all())
    x = part.relative_radius.to_numpy(float) if relative else part.radius.to_numpy(float)
    axis = "radius, as a share of the stream's norm" if relative else "radius"
    names = {"readable": "readable"} if written.judged else {}
    names |= {
        name: row.behavior or row.example
        for name, row in ((f"group {i}", row) for i, row in enumerate(written.groups.itertuples()))
        if name in table
    }
    colors = {"readable": CONTROL} | {f"group {i}": color_of(i) for i in range(MOST_GROUPS)}
    lines = tuple(
        _curve(_called(label), x, part[name].tolist(), part.n.tolist(), colors[name]) for name, label in names.items()
    )
    where = f"{key[0]}, layers {_layer(key[1])} to {_layer(key[2])}"
    above = Lines(lines, axis, "share of completions", f"By radius: {where}", log_x=True, percent=True)
    below = Lines((Line("effect", x, part.effect.to_numpy(float)),), axis, "effect", "Effect", log_x=True)
    return above, below


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns the rows as a template shows them."""
    return [
        {
            **row,
            "layers": f"{_layer(row['source_layer'])} to {_layer(row['target_layer'])}",
            "shares": [Rate(int(row[name]), int(row["n"])).share for name in table if str(name).startswith("group ")],
        }
        for row in table.to_dict("records")
    ]


def _curve(name: str, x: np.ndarray, hits: list[int], n: list[int], color: str) -> Line:
    rates = [Rate(int(k), int(m)) for k, m in zip(hits, n, strict=True)]
    low, high = (np.array(bounds) for bounds in zip(*(rate.interval for rate in rates), strict=True))
    return Line(name, x, np.array([rate.share for rate in rates]), low, high, control=color == CONTROL, color=color)


def _called(label: str) -> str:
    label = short(label)
    return label if len(label) <= LABEL else label[: LABEL - 1] + "…"


def _layer(value: float) -> str:
    return "?" if value is None or math.isnan(value) else f"{int(value)}"
