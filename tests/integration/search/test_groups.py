"""Are completions grouped by behaviour or by words, and groups ranked as the formula of their score says?"""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.generation.completions import COLUMNS
from melbo_lens.search import groups
from melbo_lens.search.groups import heldout_rate
from melbo_lens.search.written import Written

PLAIN = "it is so"
# what a judge says of each text: change, new words, surprise, natural
JUDGED = {
    PLAIN: ("same", 0.0, 0.1, -0.1),
    "alpha beta": ("content", 0.5, 9.0, -0.5),
    "alpha beta now": ("content", 1.0, 9.0, -0.1),
    "other words here": ("content", 1.0, 2.0, -0.1),
    "zz": ("noise", 1.0, 9.0, -8.0),
}


def grouped(steered, random=(), behaviors=None):
    """The run of these texts: by vector and sign those of its prompts, and those of random vectors."""
    n = max(map(len, [*steered.values(), random]))
    rows = [(i, f"prompt {i}", "unsteered", None, 0, 0.0, 0, PLAIN, [], []) for i in range(n)]
    for (vector, sign), texts in steered.items():
        rows += [(i, f"prompt {i}", "steered", vector, sign, 1.0, 0, text, [], []) for i, text in enumerate(texts)]
    rows += [(i, f"prompt {i}", "random", 0, 1, 1.0, 0, text, [], []) for i, text in enumerate(random)]
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"vector": "Int64"})
    judged = pd.DataFrame([JUDGED[text] for text in table.text], columns=["change", "new_words", "surprise", "natural"])
    vectors = ml.SteeringVectors(torch.eye(4), 1)
    return Written.of_run(vectors, ml.Completions(table), behaviors or {}, judged)


def test_the_score_of_a_group_is_promise_times_directions_times_what_exceeds_chance():
    steered = {(0, 1): ["alpha beta"] * 2, (0, -1): ["alpha beta", PLAIN], (1, 1): ["alpha beta now", "zz"]}
    found = grouped(steered, ["alpha beta", PLAIN, PLAIN, PLAIN])
    (row,) = found.groups.itertuples()
    assert (row.example, row.change, row.vector, row.sign) == ("alpha beta", "content", 0, 1)  # the commonest text
    assert (row.rate, row.random_rate, row.n_vectors) == (1.0, 0.25, 2)
    promise, exceeds = 0.5 * 6 * math.exp(-1), (4 / 6 - 1 / 4) / (4 / 6)
    assert row.score == pytest.approx(promise * math.log2(1 + 3) * exceeds)
    assert found.rows.group[found.rows.text == "zz"].isna().all()
    commoner = grouped({(0, 1): ["alpha beta now"] * 2, (1, 1): ["alpha beta", PLAIN]})
    assert commoner.groups.example.tolist() == ["alpha beta now"]


def test_noise_forms_a_group_only_where_it_shows_a_behaviour():
    found = grouped({(0, 1): ["zz", "alpha beta"], (1, 1): ["zz", PLAIN]}, behaviors={"buzz": "z+"})
    assert sorted(found.groups.behavior) == ["", "buzz"]


def test_of_many_texts_the_commonest_form_groups_which_only_similar_ones_join(monkeypatch):
    monkeypatch.setattr(groups, "MOST_TEXTS", 1)
    found = grouped({(0, 1): ["alpha beta"] * 2, (1, 1): ["alpha beta now", "other words here"]})
    by_text = found.rows[found.rows.kind == "steered"].drop_duplicates("text").set_index("text").group
    assert by_text["alpha beta"] == by_text["alpha beta now"] == 0 and pd.isna(by_text["other words here"])


def test_the_rate_on_held_out_prompts_is_that_of_the_behaviour_or_of_similar_words():
    texts = ["alpha beta", "alpha gamma delta epsilon", "other"]  # cosines 1, 0.35 and 0
    assert heldout_rate(texts, SimpleNamespace(behavior="", example="alpha beta"), {}) == pytest.approx(1 / 3)
    row = SimpleNamespace(behavior="named", example="x")
    assert heldout_rate(texts, row, {"named": "alpha"}) == pytest.approx(2 / 3)
