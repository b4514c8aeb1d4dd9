"""Are completions grouped by behaviour or by words, and groups ranked as the formula of their score says?"""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.evaluation.words import words
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
    "so it is": ("wording", 0.0, 9.0, -0.1),
    "it is so yes": ("wording", 0.3, 9.0, -0.1),
    "so it is yes": ("wording", 0.3, 9.0, -0.1),
    "it is so XK-42 4711": ("wording", 0.4, 9.0, -0.1),
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


def test_what_random_vectors_write_as_often_keeps_a_quarter_of_its_score():
    alone = grouped({(0, 1): ["alpha beta now"]}).groups.score[0]
    assert grouped({(0, 1): ["alpha beta now"]}, ["alpha beta now"]).groups.score[0] == pytest.approx(0.25 * alone)


def test_a_change_without_a_new_word_has_a_score_too():
    (row,) = grouped({(0, 1): ["so it is"]}).groups.itertuples()
    assert (row.change, row.score) == ("wording", pytest.approx(0.1 * 6 * math.exp(-0.2)))


def test_a_sentence_too_many_is_told_from_paraphrases_that_share_all_other_words():
    texts = ["it is so yes", "so it is yes", "it is so XK-42 4711"]
    found = grouped({(i, 1): [text] for i, text in enumerate(texts)})
    numbers = found.rows[found.rows.kind == "steered"].set_index("text").group
    assert numbers[texts[0]] == numbers[texts[1]] != numbers[texts[2]]


def test_noise_forms_a_group_only_where_it_shows_a_behaviour():
    found = grouped({(0, 1): ["zz", "alpha beta"], (1, 1): ["zz", PLAIN]}, behaviors={"buzz": "z+"})
    assert sorted(found.groups.behavior) == ["", "buzz"]


def test_of_many_texts_the_most_promising_form_groups_which_only_similar_ones_join(monkeypatch):
    monkeypatch.setattr(groups, "MOST_TEXTS", 1)
    found = grouped({(0, 1): ["alpha beta"] * 2 + ["so it is"] * 2, (1, 1): ["alpha beta now"]})
    by_text = found.rows[found.rows.kind == "steered"].drop_duplicates("text").set_index("text").group
    assert by_text["alpha beta"] == by_text["alpha beta now"] == 0 and pd.isna(by_text["so it is"])


def test_groups_depend_on_no_order_of_the_texts():
    said = [f"{a} {b} {c}" for a in ("red", "blue") for b in ("car", "bus", "tram") for c in ("left", "right", "away")]
    rows = pd.DataFrame({"text": said, "change": "content", "new_words": 1.0, "surprise": 9.0, "natural": -0.1})
    known = None
    for seed in range(5):
        found = groups.named(rows.sample(frac=1, random_state=seed).reset_index(drop=True), {}, set())
        together = {frozenset(some) for _, some in found.groupby("group").text}
        assert known in (None, together) and 1 < len(together) < len(said)
        known = together


def test_a_text_that_joins_is_compared_with_all_of_its_words(monkeypatch):
    monkeypatch.setattr(groups, "MOST_TEXTS", 1)
    longer = "alpha beta " + " ".join(f"further{i}" for i in range(8))
    rows = pd.DataFrame({"text": ["alpha beta", longer], "change": "content", "new_words": [1.0, 0.5]})
    found = groups.named(rows.assign(surprise=9.0, natural=-0.1), {}, set())
    assert found.group.tolist() == ["words 0", ""]  # a cosine of 2 / (2 * 10) ** .5


def test_the_rate_on_held_out_prompts_is_that_of_the_behaviour_or_of_similar_words():
    plain, texts = [""] * 3, ["alpha beta", "alpha gamma delta epsilon", "other"]  # cosines 1, 0.35 and 0
    assert heldout_rate(texts, plain, SimpleNamespace(behavior="", example="alpha beta"), {}) == pytest.approx(1 / 3)
    row = SimpleNamespace(behavior="", example="The capital of Portugal is the city of Lisbon.")
    ordinary, other = words("The capital of Portugal is Lisbon."), ["The capital of Spain is Madrid."]
    assert heldout_rate(other, [""], row, {}) == 1.0 and heldout_rate(other, [""], row, {}, ordinary) == 0.0
    row = SimpleNamespace(behavior="named", example="x")
    assert heldout_rate(texts, plain, row, {"named": "alpha"}) == pytest.approx(2 / 3)


def test_ordinary_are_the_words_and_forms_of_prompts_and_unsteered_completions():
    table = pd.DataFrame(
        {
            "kind": ["unsteered", "steered"],
            "prompt_text": ["Which city?", "x"],
            "text": ["It is Lisbon.", "NO IDEA AT ALL"],
        }
    )
    assert groups.ordinary_words([table]) == {"which", "city", "it", "is", "lisbon", "\0LATIN"}
