"""Are rates and tests those of the statistics that they name?"""

import inspect
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import hypergeom

import melbo_lens as ml
from melbo_lens.evaluation.rates import check_behaviors, verdicts
from melbo_lens.generation.completions import COLUMNS


def completions(steered, random, n):
    """steered, random: number of hits per vector, of n."""
    rows = [(0, "p", "unsteered", None, 0, 0.0, 0, "no", [], [])]
    for kind, hits in (("steered", steered), ("random", random)):
        rows += [
            (0, "p", kind, k, 1, 1.0, i, "yes" if i < hit else "no", [], [])
            for k, hit in enumerate(hits)
            for i in range(n)
        ]
    return ml.Completions(pd.DataFrame(rows, columns=COLUMNS).astype({"vector": "Int64"}))


def test_rates_intervals_and_p_values_are_those_of_the_formulas():
    table = ml.evaluate(completions([7, 0, 3], [1, 0, 0], 10), {"yes": "yes"}).table
    assert (
        table.rate.tolist() == [0.7, 0.0, 0.3]
        and table.n.tolist() == [10, 10, 10]
        and set(table.random) == {1 / 30}
        and set(table.unsteered) == {0}
    )
    z = 1.959963984540054
    for row in table.itertuples():
        centre = (row.rate + z**2 / 20) / (1 + z**2 / 10)
        half = z * np.sqrt(row.rate * (1 - row.rate) / 10 + z**2 / 400) / (1 + z**2 / 10)
        assert (row.low, row.high) == pytest.approx((max(centre - half, 0), centre + half), abs=1e-9)
        k = round(10 * row.rate)
        assert row.p_value == pytest.approx(
            hypergeom.sf(k - 1, 40, k + 1, 10)
        )  # the chance of k or more of the k + 1 hits
    ordered = np.sort(table.p_value.to_numpy())
    q = np.minimum.accumulate((ordered * 3 / np.arange(1, 4))[::-1])[::-1]
    assert np.sort(table.q_value.to_numpy()) == pytest.approx(np.minimum(q, 1))
    assert table.beats_control.tolist() == (table.q_value < 0.05).tolist() == [True, False, False]


def test_a_control_is_of_the_same_scale():
    """At a larger scale random vectors write noise, which would hide what a vector does at a small one."""
    small, large = completions([7, 0], [0, 0], 10), completions([7, 7], [7, 7], 10)
    both = pd.concat([small.table, large.table.assign(scale=3.0)[large.table.kind != "unsteered"]])
    found = ml.evaluate(ml.Completions(both.reset_index(drop=True)), {"yes": "yes"})
    alone = ml.evaluate(small, {"yes": "yes"}).table
    by_scale = dict(list(found.table.groupby("scale")))
    assert by_scale[1.0].random.tolist() == [0, 0] and by_scale[3.0].random.tolist() == [0.7, 0.7]
    assert by_scale[1.0].p_value.tolist() == alone.p_value.tolist()
    assert by_scale[1.0].beats_control.tolist() == [True, False] and not by_scale[3.0].beats_control.any()
    without = both[(both.kind != "random") | (both.scale == 1)].reset_index(drop=True)
    found = ml.evaluate(ml.Completions(without), {"yes": "yes"})
    assert found.table[found.table.scale == 3].p_value.isna().all() and "no random controls" in found.note


@pytest.mark.parametrize("answer", [True, np.True_, 1, re.match("n", "no"), torch.tensor(True)])
def test_an_answer_is_yes(answer):
    assert verdicts(pd.Series(["no"]), lambda text: answer).tolist() == [1.0]


@pytest.mark.parametrize("answer", [None, float("nan"), np.nan, pd.NA])
def test_an_answer_is_no_verdict(answer):
    assert verdicts(pd.Series(["no"]), lambda text: answer).isna().all()


@pytest.mark.parametrize("answer", ["no", 0.2, 2, [], object()])
def test_another_answer_than_yes_or_no_is_refused(answer):
    with pytest.raises(ValueError, match="it must answer True or False"):
        verdicts(pd.Series(["no"]), lambda text: answer)


@pytest.mark.parametrize(
    ("behaviors", "said"),
    [(["yes"], "must map names"), ({3: "yes"}, "the name 3"), ({"": "yes"}, "the name ''")],
)
def test_behaviors_have_names(behaviors, said):
    with pytest.raises((TypeError, ValueError), match=said):
        inspect.unwrap(check_behaviors)(behaviors)


def test_the_summary_pools_all_vectors():
    summary = ml.evaluate(completions([7, 0, 3], [1, 0, 0], 10), {"yes": lambda text: text == "yes"}).summary.iloc[0]
    assert (summary.rate, summary.vectors, summary.n) == (10 / 30, 2, 30) and summary.p_value < 0.01


def test_it_says_how_many_completions_a_single_vector_would_need():
    few = ml.evaluate(completions([1, 0, 0], [0, 0, 0], 1), {"yes": "yes"})
    needed = int(next(word for word in few.note.split(";")[1].split() if word.isdigit()))
    assert not few.table.beats_control.any()
    enough = ml.evaluate(completions([needed, 0, 0], [0, 0, 0], needed), {"yes": "yes"})
    assert enough.note == "" and enough.table.beats_control.tolist() == [True, False, False]


@pytest.mark.parametrize("n_random", [1, 2])
def test_the_completions_that_are_needed_follow_from_the_controls_that_there_are(n_random):
    few = ml.evaluate(completions([1] * 6, [0] * n_random, 1), {"yes": "yes"})
    needed = int(next(word for word in few.note.split(";")[1].split() if word.isdigit()))

    def told(n):
        found = ml.evaluate(completions([n, *[0] * 5], [0] * n_random, n), {"yes": "yes"})
        return found.note == "" and bool(found.table.beats_control[0])

    assert told(needed) and not told(needed - 1)


@pytest.mark.parametrize("expression", [r"a{,2}b", r"x.{0,2000}b", r"(?x) a a b # c", r"a++b", "(?i)AAB"])
def test_an_expression_is_pythons_own(expression):
    found = completions([1], [0], 1)
    found.table["text"] = ["aab", "x b", "none"]
    expected = [bool(re.search(expression, text)) for text in found.table.text]
    table = ml.evaluate(found, {"x": expression}).table
    assert [table.unsteered[0], table.rate[0], table.random[0]] == expected


def test_a_missing_text_has_no_verdict():
    assert verdicts(pd.Series(["a yes", None, "no"]), "yes").tolist()[::2] == [1.0, 0.0]
    assert verdicts(pd.Series(["a yes", None, "no"]), "yes").isna().tolist() == [False, True, False]


@pytest.mark.parametrize("level", [0.0, 1.0, 2.0])
def test_a_level_is_a_rate(level):
    with pytest.raises(ValueError, match="level"):
        ml.evaluate(completions([1], [0], 1), {"yes": "yes"}, level=level)


def test_a_function_that_fails_on_an_empty_text_is_refused_at_once():
    with pytest.raises(ValueError, match="it must take any text"):
        check_behaviors({"first": lambda text: text.split()[0] == "yes"})


def test_without_controls_nothing_is_claimed():
    only = completions([2, 1], [], 3)
    evaluation = ml.evaluate(only, {"yes": "yes"})
    assert (
        evaluation.table.p_value.isna().all()
        and not evaluation.table.beats_control.any()
        and "no random controls" in evaluation.note
    )


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="behaviors is empty"):
        ml.evaluate(completions([1], [0], 1), {})
    with pytest.raises(ValueError, match="no steered completions"):
        ml.evaluate(completions([1], [0], 1).filter(kind="random"), {"yes": "yes"})


def test_a_rate_below_the_control_is_no_finding():
    table = ml.evaluate(completions([0], [10], 10), {"yes": "yes"}).table
    assert table.p_value.tolist() == [1.0] and not table.beats_control.any()


def test_a_behavior_that_raises_names_the_text():
    with pytest.raises(ValueError, match=r"ZeroDivisionError.* on the text 'no'"):
        ml.evaluate(completions([1], [0], 1), {"broken": lambda text: 1 / (text != "no")})


def on_prompt(made, prompt):
    table = made.table.assign(prompt_text=prompt)
    return ml.Completions(table)


def test_select_chooses_on_one_set_and_scores_on_the_other():
    chosen = ml.select(
        {"yes": "yes"},
        on=on_prompt(completions([2, 9, 3], [0], 10), "a"),
        score=on_prompt(completions([8, 4, 9], [1], 10), "b"),
    ).iloc[0]
    assert (chosen.vector, chosen.selection_rate, chosen.rate, chosen.random) == (1, 0.9, 0.4, 0.1)
    with pytest.raises(ValueError, match="share 1 prompts"):
        ml.select({"yes": "yes"}, on=completions([1], [0], 1), score=completions([1], [0], 1))
    with pytest.raises(ValueError, match="has no completion with it"):
        ml.select(
            {"yes": "yes"},
            on=on_prompt(completions([0, 9], [0], 10), "a"),
            score=on_prompt(completions([1], [0], 10), "b"),
        )
