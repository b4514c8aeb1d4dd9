"""Which perturbations elicit a behaviour beyond chance?  Those whose rates exceed those of norm-matched random ones."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias, cast

import pandas as pd
from scipy.stats import binomtest, false_discovery_control, fisher_exact

from melbo_lens import tables
from melbo_lens.arguments import finite, public
from melbo_lens.evaluation.judges import Judge, KeptVerdicts
from melbo_lens.generation.completions import Completions

Behavior: TypeAlias = str | Callable[[str], bool]
COLUMNS = "vector sign scale behavior n errors rate low high unsteered random p_value q_value beats_control".split()


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """The rates of behaviours.

    Attributes:
        table: one row for each vector, sign, scale and behaviour, with n (completions), errors (further ones on which a
            judge gave no verdict; they count in nothing else), rate with a 95 % Wilson interval (low, high), the
            unsteered rate, that of all random vectors at this scale (random), p_value of Fisher's exact test (is the
            rate higher than with random vectors?), q_value after Benjamini and Hochberg over the rows of a behaviour,
            and beats_control (q_value below the level of `evaluate`, .05 by default).
        summary: one row for each behaviour, over all steered completions, with n, errors, rate, low, high, unsteered,
            random, p_value, vectors (how many of them elicited it with either sign at least once), the numbers of
            completions n_random and n_unsteered, and errors_random and errors_unsteered.
        note: says what the tests could not show with so few completions; empty if there is no such limit.
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    note: str = ""

    def __repr__(self) -> str:
        flagged = self.table[self.table.beats_control].groupby("behavior").size()
        found = ", ".join(f"{name}: {count} rows" for name, count in flagged.items()) or "nothing"
        return f"Evaluation({len(self.table)} rows; beats the random control: {found})"

    def _repr_html_(self) -> str:
        shown = self.table.sort_values(["q_value", "rate"], ascending=[True, False])
        return tables.html(repr(self), self.summary, note=self.note) + tables.html(
            "Each vector and sign, the surest first:", shown, most=40
        )


@public
def evaluate(completions: Completions, behaviors: Mapping[str, Behavior], level: float = 0.05) -> Evaluation:
    """Counts behaviours in completions and tests every vector against the random controls of its scale together.

    Args:
        completions: the completions, as `generate` returns them; tests need random controls among them.
        behaviors: name -> a regular expression that is searched for, a function of the text (which answers True or
            False, or None where it can't tell), or a `judge`.
        level: the false discovery rate at which a row counts as beating the control.

    Returns:
        The rates by vector, sign, scale and behaviour, a summary by behaviour, and a note on what so few completions
        can't show.

    Raises:
        TypeError, ValueError: there are no behaviours or no steered completions, one is no behaviour or fails on a
            text, or `level` is not between 0 and 1.
    """
    _check_level(level)
    table = _checked(completions, behaviors)
    rows, summaries = [], []
    for name, behavior in behaviors.items():
        judged = table.assign(shown=verdicts(table.text, behavior))
        steered, random, unsteered = (judged[judged.kind == kind] for kind in ("steered", "random", "unsteered"))
        # a push of another length is no control: at several times the radius, random vectors write noise
        controls = {scale: random[random.scale == scale].shown for scale in steered.scale.unique()}
        block = [
            {"vector": vector, "sign": sign, "scale": scale, "behavior": name}
            | _rate(group.shown)
            | {"unsteered": unsteered.shown.mean(), "random": controls[scale].mean()}
            | _test(group.shown, controls[scale])
            for (vector, sign, scale), group in steered.groupby(["vector", "sign", "scale"])
        ]
        q_values = _q_values([float(row["p_value"]) for row in block])
        rows += [
            row | {"q_value": q, "beats_control": q < level}  # NaN is below nothing
            for row, q in zip(block, q_values, strict=True)
        ]
        summaries.append(_summary(name, judged))
    result = pd.DataFrame(rows)[COLUMNS].sort_values(["behavior", "vector", "sign", "scale"]).reset_index(drop=True)
    return Evaluation(result, pd.DataFrame(summaries), _note(table, len(rows) // len(behaviors), level))


def overall(completions: Completions, behaviors: Mapping[str, Behavior], level: float = 0.05) -> Evaluation:
    """Does the same as `evaluate` over all vectors together; the table of single ones, which takes long, is empty."""
    _check_level(level)
    table = _checked(completions, behaviors)
    summaries = [
        _summary(name, table.assign(shown=verdicts(table.text, behavior))) for name, behavior in behaviors.items()
    ]
    n_tests = table[table.kind == "steered"].groupby(["vector", "sign", "scale"]).ngroups
    return Evaluation(pd.DataFrame(columns=COLUMNS), pd.DataFrame(summaries), _note(table, n_tests, level))


def _checked(completions: Completions, behaviors: Mapping[str, Behavior]) -> pd.DataFrame:
    if not behaviors:
        raise ValueError("behaviors is empty: name at least one, as {'portuguese': r'\\ba resposta'}.")
    check_behaviors(behaviors)
    if not (completions.table.kind == "steered").any():
        raise ValueError("there are no steered completions to evaluate: generate some with perturbations.")
    return completions.table


def _summary(name: str, shown: pd.DataFrame) -> dict[str, Any]:
    """The row of one behaviour over all steered completions."""
    steered, random, unsteered = (shown[shown.kind == kind] for kind in ("steered", "random", "unsteered"))
    base = {"unsteered": unsteered.shown.mean(), "random": random.shown.mean()}
    sizes: dict[str, Any] = {"vectors": steered[steered.shown == 1].vector.nunique()}
    for kind, group in (("random", random), ("unsteered", unsteered)):
        sizes |= {f"n_{kind}": int(group.shown.count()), f"errors_{kind}": int(group.shown.isna().sum())}
    return {"behavior": name} | _rate(steered.shown) | base | _test(steered.shown, random.shown) | sizes


def _check_level(level: float) -> None:
    if not 0 < finite("level", level) < 1:
        raise ValueError(f"level={level} must lie between 0 and 1.")


def check_behaviors(behaviors: Mapping[str, Behavior]) -> None:
    """Refuses what can't be asked of a text, before anything is computed.

    Raises:
        TypeError, ValueError: as `check_kinds` says, or a function fails on an empty text.
    """
    check_kinds(behaviors)
    for behavior in behaviors.values():
        if not isinstance(behavior, str | Judge | KeptVerdicts | re.Pattern):
            verdicts(pd.Series(["", " "]), behavior)  # as completions may be


def check_kinds(behaviors: Any) -> None:
    """Refuses what is no behaviour, without asking any of a text.

    Raises:
        TypeError, ValueError: they don't map names to behaviours, or one of these is neither a regular expression, nor
            a function, nor a judge.
    """
    if not isinstance(behaviors, Mapping):
        raise TypeError(f"behaviors={behaviors!r} must map names to what is looked for, as {{'greek': 'greece'}}.")
    for name, behavior in cast(Mapping[Any, Any], behaviors).items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"behaviors has the name {name!r}: a name must be a text that is not empty.")
        if isinstance(behavior, str):
            try:
                re.compile(behavior)
            except re.error as error:
                raise ValueError(
                    f"behaviors[{name!r}]={behavior!r} is no regular expression ({error}): re.escape(...) makes one of "
                    "a text."
                ) from error
        elif not (callable(behavior) or isinstance(behavior, Judge | KeptVerdicts | re.Pattern)):
            raise TypeError(
                f"behaviors[{name!r}] is of type {type(behavior).__name__}: give a regular expression, a function of "
                "the text, or a judge."
            )


def verdicts(texts: pd.Series, behavior: Behavior) -> pd.Series:
    """1 for each text that shows the behaviour, 0 for each that doesn't, and NaN where there is no verdict.

    Raises:
        ValueError: the behaviour's function raised, or answered something else than yes, no, or no verdict; the message
            says on which text.
    """
    if isinstance(behavior, Judge | KeptVerdicts):
        found = [float("nan") if verdict is None else verdict for verdict in behavior.verdicts(texts.tolist())]
        return pd.Series(found, index=texts.index, dtype=float)
    if not callable(behavior):
        # with pandas' own search, another engine may read the expression than the one that checked it
        pattern = re.compile(behavior)
        return texts.map(lambda text: float(pattern.search(text) is not None), na_action="ignore").astype(float)
    found = []
    for text in texts:
        try:
            shown = behavior(text)
        except Exception as error:
            raise ValueError(f"the behavior raised {error!r} on the text {text!r}: it must take any text.") from error
        found.append(_verdict(shown, text))
    return pd.Series(found, index=texts.index, dtype=float)


def _verdict(shown: Any, text: str) -> float:
    """1, 0 or NaN, of which None is another name; any other answer would silently count as yes.

    Raises:
        ValueError: the answer is none of these.
    """
    if shown is None or shown is pd.NA or (isinstance(shown, float) and math.isnan(shown)):
        return math.nan
    if isinstance(shown, re.Match):
        return 1.0
    try:
        if not isinstance(shown, str) and float(shown) in (0.0, 1.0):
            return float(shown)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"the behavior answered {shown!r} on the text {text!r}: it must answer True or False, or None for no verdict."
    )


def shows(texts: pd.Series, behavior: Behavior) -> pd.Series:
    """Whether each text is known to show the behaviour; rates are made of `verdicts`, in which errors are missing."""
    return verdicts(texts, behavior) == 1


@public
def select(behaviors: Mapping[str, Behavior], on: Completions, score: Completions) -> pd.DataFrame:
    """Chooses the vector, sign and scale with the highest rate of each behaviour on one set, and scores it on another.

    A rate on the prompts that were used for the choice is too high, so both rates are given. Ties go to the first
    vector.

    Args:
        behaviors: name -> a regular expression, a function of the text, or a `judge`.
        on: the completions that are used for the choice.
        score: completions of the same perturbations on other prompts.

    Returns:
        One row for each behaviour: vector, sign, scale, selection_rate, and on the scoring set n, rate with its
        interval (low, high), unsteered, random and p_value.

    Raises:
        TypeError, ValueError: the sets share a prompt, the scoring set lacks a chosen vector, or as in `evaluate`.
    """
    shared = set(on.table.prompt_text) & set(score.table.prompt_text)
    if shared:
        raise ValueError(
            f"the selection and the scoring set share {len(shared)} prompts, as {min(shared)!r}: score on prompts "
            "that chose nothing."
        )
    chosen, scored, rows = evaluate(on, behaviors).table, evaluate(score, behaviors).table, []
    for name in behaviors:
        best = chosen[chosen.behavior == name].sort_values("rate", ascending=False, kind="stable").iloc[0]
        same = (
            (scored.behavior == name)
            & (scored.vector == best.vector)
            & (scored.sign == best.sign)
            & (scored.scale == best.scale)
        )
        if not same.any():
            raise ValueError(
                f"vector {best.vector} with sign {best.sign:+d} was chosen for {name!r}; the scoring set has no "
                "completion with it."
            )
        result = scored[same].iloc[0]
        rows.append(
            {
                "behavior": name,
                "vector": best.vector,
                "sign": best.sign,
                "scale": best.scale,
                "selection_rate": best.rate,
            }
            | {key: result[key] for key in ("n", "rate", "low", "high", "unsteered", "random", "p_value")}
        )
    return pd.DataFrame(rows)


def _rate(shown: pd.Series) -> dict[str, Any]:
    """The rate of a behaviour among the verdicts, with its 95 % Wilson interval; NaN if there are none."""
    n, known = int(shown.count()), {"n": int(shown.count()), "errors": int(shown.isna().sum())}
    if not n:
        return known | dict.fromkeys(("rate", "low", "high"), float("nan"))
    interval = binomtest(int(shown.sum()), n).proportion_ci(method="wilson")
    return known | {"rate": float(shown.mean()), "low": interval.low, "high": interval.high}


def _test(steered: pd.Series, random: pd.Series) -> dict[str, float]:
    """The p-value of the steered rate against the random one; NaN without verdicts on completions of both."""
    (k, n), (k_random, n_random) = ((int(shown.sum()), int(shown.count())) for shown in (steered, random))
    return {"p_value": _fisher(k, n, k_random, n_random) if n and n_random else float("nan")}


def _q_values(p_values: list[float]) -> list[float]:
    """The p-values after Benjamini and Hochberg; NaN where there was no test."""
    found = pd.Series(p_values, dtype=float)
    tested = found.dropna()
    if len(tested):
        found[tested.index] = false_discovery_control(tested)
    return found.tolist()


@cache  # most vectors share their counts
def _fisher(k: int, n: int, k_control: int, n_control: int) -> float:
    """The one-sided p-value of Fisher's exact test that k of n exceeds chance, given k_control of n_control."""
    return float(fisher_exact([[k, n - k], [k_control, n_control - k_control]], alternative="greater").pvalue)


def _note(table: pd.DataFrame, n_tests: int, level: float) -> str:
    """Says whether a single vector that always shows a behaviour could be told from controls that never do."""
    scales = table[table.kind == "steered"].scale.unique()
    n_random = min(int(((table.kind == "random") & (table.scale == scale)).sum()) for scale in scales)
    if n_random == 0:
        return "There are no random controls: generate with include_random=True to test anything."
    per_row = int((table.kind == "steered").sum()) // n_tests
    if _fisher(per_row, per_row, 0, n_random) * n_tests < level:
        return ""

    def told(n: int) -> bool:  # the controls grow with the completions
        return _fisher(n, n, 0, n * n_random // per_row) * n_tests < level

    needed = next(filter(told, range(per_row + 1, 10_001)), None)
    each = f"{per_row} completion{'s' if per_row > 1 else ''}"
    return (
        f"With {each} for each vector and sign, a single vector that always shows a behaviour can't be told from "
        "chance "
        f"among {n_tests} tests (several together can); {needed} completions each would do: add prompts or samples."
    )
