"""How often do completions show a behaviour?  The bars and curves of that, with intervals and controls, as arrays."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from melbo_lens.evaluation.rates import Behavior, Evaluation, verdicts
from melbo_lens.generation.completions import Completions
from melbo_lens.perturbations.perturbation import Numbers
from melbo_lens.plots.arrays import Bars, Line, Lines
from melbo_lens.plots.labels import some, wilson


def behavior_rates(evaluation: Evaluation) -> Bars:
    """Returns the rate of each behaviour in all steered completions and in the controls, with 95 % Wilson intervals."""
    summary = evaluation.summary
    some(len(summary), "behaviours")
    rows: list[tuple[Iterable[float], ...]] = [(summary.rate, summary.low, summary.high)]
    for name in ("random", "unsteered"):
        counts = summary.get(f"n_{name}", pd.Series(0, index=summary.index))
        rows.append(
            (
                summary[name],
                *zip(*[wilson(rate, n) for rate, n in zip(summary[name], counts, strict=True)], strict=True),
            ),
        )
    values, low, high = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    groups = ("steered", "random, same norms", "unsteered")
    return Bars(
        values,
        low,
        high,
        tuple(summary.behavior),
        groups,
        "share of completions",
        "How often completions show each behaviour",
        evaluation.note,
    )


def scale_sweep(
    completions: Completions, behaviors: Mapping[str, Behavior], coherence: Numbers | None = None
) -> tuple[Lines, Lines]:
    """Returns rates, and coherence, against signed multiples of the vectors; multiple 0 is unsteered.

    `coherence` has one number for each completion, as from `coherence`; without it, the share of different words is
    used instead. Of several behaviours, random vectors have one curve: how often they show any.
    """
    table = completions.table
    some(len(table), "completions")
    if not behaviors:
        raise ValueError("behaviors is empty: name at least one, as {'portuguese': r'\\ba resposta'}.")
    if coherence is None:
        measure = table.text.map(lambda text: len(set(text.split())) / max(len(text.split()), 1))
        quantity = "share of different words"
    else:
        measure = pd.Series(np.asarray(coherence, dtype=float), index=table.index)
        quantity = "log-probability per token, unsteered"
    rows = table.assign(multiple=table.sign * table.scale, measure=measure)
    rates, means = list[Line](), list[Line]()
    for kind in ("steered", "random"):
        part, control = rows[rows.kind.isin([kind, "unsteered"])], kind == "random"
        if not (part.kind == kind).any():
            continue
        shown = {name: verdicts(part.text, behavior) for name, behavior in behaviors.items()}
        if control:
            shown = {f"{'any' if len(shown) > 1 else next(iter(shown))}, random": _any(pd.DataFrame(shown))}
        rates += [_curve(name, verdict, part.multiple, control) for name, verdict in shown.items()]
        mean = part.groupby("multiple").measure.mean()
        means.append(Line(kind, mean.index.to_numpy(float), mean.to_numpy(), control=control))
    axis = "multiple of the vector (0: unsteered)"
    return (
        Lines(tuple(rates), axis, "share of completions", "Behaviour and coherence against scale", percent=True),
        Lines(tuple(means), axis, quantity, "Coherence"),
    )


def _any(verdict: pd.DataFrame) -> pd.Series:
    """Whether each completion shows any of several behaviours; NaN where one without a verdict might have been it."""
    shown = verdict.eq(1).any(axis=1)
    return shown.astype(float).where(shown | verdict.notna().all(axis=1))


def _curve(name: str, verdict: pd.Series, multiple: pd.Series, control: bool) -> Line:
    """The share of positive verdicts at each multiple, with its 95 % Wilson interval."""
    groups = verdict.groupby(multiple)
    rate = groups.mean()
    low, high = np.array([wilson(share, n) for share, n in zip(rate, groups.count(), strict=True)]).T
    return Line(name, rate.index.to_numpy(float), rate.to_numpy(), low, high, control=control)
