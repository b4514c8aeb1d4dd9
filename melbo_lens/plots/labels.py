"""What stands beside a number?  The completions and behaviours of a vector and sign, and the interval of a rate."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from melbo_lens.evaluation.rates import Behavior, shows
from melbo_lens.generation.completions import Completions

SIGNS = {1: "+", -1: "−", 0: ""}
EMPTY = "(empty)"  # what stands for a completion without a visible character


def examples(completions: Completions | None, by_sign: bool = False) -> dict[Any, str]:
    """Returns one text for each vector, of both signs joined, or for each pair of vector and sign if `by_sign`.

    It is the first completion that differs from the unsteered one, among those with the scale nearest to 1.
    """
    if completions is None:
        return {}
    table = completions.table
    plain = table[table.kind == "unsteered"].drop_duplicates("prompt").set_index("prompt").text
    steered = table[table.kind == "steered"]
    steered = steered.assign(same=steered.text == steered.prompt.map(plain), far=(steered.scale - 1).abs())
    first = (
        steered.sort_values(["far", "same"], kind="stable")
        .drop_duplicates(["vector", "sign"])
        .sort_values(["vector", "sign"], ascending=[True, False])
    )
    found = {(int(row.vector), int(row.sign)): row.text.strip() or EMPTY for row in first.itertuples()}
    if by_sign:
        return found
    joined: dict[Any, str] = {}
    for (vector, sign), text in found.items():
        joined[vector] = "\n".join(filter(None, [joined.get(vector), f"{SIGNS[sign]} {text}"]))
    return joined


def examples_of_rows(completions: Completions | None, names: Sequence[str] | None) -> dict[int, str]:
    """Returns one text for each vector; of vectors with names, which say a sign, it is what that sign writes."""
    if names is None:
        return examples(completions)
    return {vector: text for (vector, sign), text in examples(completions, by_sign=True).items() if sign == 1}


def names_of(n: int, names: Sequence[str] | None) -> list[str]:
    """Returns the names of n rows, which are their numbers if they are not given.

    Raises:
        ValueError: there is not one name for each row.
    """
    if names is not None and len(names) != n:
        raise ValueError(f"{len(names)} names were given for {n} rows: give one for each, or none.")
    return list(map(str, range(n) if names is None else names))


def shown_behaviors(
    completions: Completions | None, behaviors: Mapping[str, Behavior] | None
) -> dict[tuple[int, int], str]:
    """Returns for each vector and sign the behaviour that most of its completions show, if any shows one."""
    if completions is None or not behaviors:
        return {}
    steered = completions.table[completions.table.kind == "steered"].reset_index(drop=True)
    hits = pd.DataFrame(
        {name: shows(steered.text, behavior).to_numpy(dtype=float) for name, behavior in behaviors.items()}
    )
    means = hits.groupby([steered.vector.astype(int), steered.sign.astype(int)]).mean()
    return {key: str(row.idxmax()) for key, row in means.iterrows() if row.max() > 0}


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Returns the 95 % Wilson interval of a rate among n completions, or NaN if n is 0 or the rate is unknown."""
    if not n or not np.isfinite(rate):
        return (float("nan"), float("nan"))
    interval = binomtest(round(rate * n), int(n)).proportion_ci(method="wilson")
    return (interval.low, interval.high)


def some(n: int, what: str) -> None:
    """Raises ValueError if there is nothing to draw."""
    if not n:
        raise ValueError(f"there are no {what} to draw.")
