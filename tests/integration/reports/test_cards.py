"""Do cards say of each group what its completions say, and show any text so that nothing in it is hidden?"""

import math
import re
from dataclasses import replace
from types import MappingProxyType

import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.reports.ladder import ladder
from melbo_lens.search.cards import Rate, cards_of, different, html, in_a_notebook, nats, percent, words
from melbo_lens.search.groups import promise
from melbo_lens.search.looks import Look, look
from melbo_lens.search.written import Written
from melbo_lens.tables import seen
from tests.integration.reports.test_page import completions

CHEESE, ROME, PLAIN = "I love cheese indeed", "the answer is rome", "the answer is athens"
HIDDEN = "a\u202eb\u200bc\u2066d\ufeffe\u00adf\u061cg\x00h\u2028i"


def written(judged=True, behaviors=MappingProxyType({"cheese": "cheese"})):
    """Two prompts; vector 0 loves cheese on both with +, on one with −; vector 1 says rome once, as one random does."""
    texts = {
        (0, 1): [CHEESE, CHEESE],
        (0, -1): [CHEESE, PLAIN],
        (1, 1): [ROME, PLAIN],
        (1, -1): ["qz qz qz qz", "zq zq zq zq"],
        (2, 1): [PLAIN, PLAIN],
        (2, -1): [PLAIN, PLAIN],
    }
    rows = [(i, f"prompt {i}", "unsteered", None, 0, 0.0, 0, PLAIN, [1], [-0.1]) for i in range(2)]
    rows += [
        (i, f"prompt {i}", "steered", vector, sign, 1.0, 0, text, [1], [-0.1])
        for (vector, sign), said in texts.items()
        for i, text in enumerate(said)
    ]
    rows += [
        (i, f"prompt {i}", "random", 0, sign, 1.0, 0, ROME if (i, sign) == (0, 1) else PLAIN, [1], [-0.1])
        for i in range(2)
        for sign in (1, -1)
    ]
    table = pd.DataFrame(rows, columns=completions().table.columns).astype({"vector": "Int64"})
    change = {PLAIN: "same", CHEESE: "content", ROME: "wording"}
    natural = {PLAIN: -0.1, CHEESE: -0.5, ROME: -0.25}
    judgement = pd.DataFrame(
        {
            "change": [change.get(text, "noise") for text in table.text],
            "new_words": [float(text == CHEESE) for text in table.text],
            "surprise": 5.0,
            "natural": [natural.get(text, -7.0) for text in table.text],
        }
    )
    vectors = ml.SteeringVectors(
        2 * torch.eye(3),
        1,
        provenance={
            "method": "fit_vectors",
            "stream_norm": 8.0,
            "effects": [0.3, 0.4, 0.5],
            "minus": {"effects": [0.6, 0.8, 0.7]},
        },
    )
    return Written.of_run(vectors, ml.Completions(table), behaviors, judgement if judged else None)


def test_a_card_counts_its_completions_and_their_controls():
    cheese, rome = cards_of(written(), twins={0: (1, 12)})
    assert (cheese.name, cheese.example, cheese.plain, cheese.change) == ("cheese", CHEESE, PLAIN, "content")
    assert (cheese.learned, cheese.random, cheese.best) == (Rate(3, 12), Rate(0, 4), Rate(2, 2))
    assert cheese.shown_by == (("0\u202f+", "v0.0p", 2, 2), ("0\u202f−", "v0.0n", 1, 2))
    assert (cheese.n_vectors, cheese.n_directions, cheese.twin) == (1, 2, Rate(1, 12))
    assert (cheese.facts["radius"], cheese.facts["relative_radius"], cheese.facts["effect"]) == (2.0, 0.25, 0.3)
    assert (cheese.natural, cheese.surprise) == (-0.5, 5.0) and math.isnan(cheese.heldout)
    # rome is as common under random vectors: 1 of 4 against 1 of 12
    assert (rome.learned, rome.random) == (Rate(1, 12), Rate(1, 4)) and rome.no_more_than_controls
    assert not cheese.no_more_than_controls and rome.twin is None
    assert replace(cheese, random=Rate(1, 4)).no_more_than_controls  # as common is no commoner
    assert replace(cheese, twin=cheese.learned).no_more_than_controls
    assert not replace(cheese, twin=Rate(0, 99)).no_more_than_controls


def test_an_example_stands_beside_the_unsteered_text_of_its_own_sample():
    rows = [(0, "p", "unsteered", None, 0, 0.0, sample, text, [], []) for sample, text in enumerate(("one", "two"))]
    rows += [
        (0, "p", "steered", 0, 1, 1.0, sample, text, [], []) for sample, text in enumerate(("one", "ho\u202erses"))
    ]
    table = pd.DataFrame(rows, columns=completions().table.columns).astype({"vector": "Int64"})
    run = Written.of_run(ml.SteeringVectors(torch.eye(1, 3), 1), ml.Completions(table), {})
    searched = Written.of_search(run.rows[2:], [ml.Completions(table)] * 2, run.directions, run.groups)
    for found in (run, searched):
        (card,) = cards_of(found)
        assert (card.example, card.plain, card.learned) == ("ho\u202erses", "two", Rate(1, 2)) and len(found.rows) == 4
        assert "<mark>ho⟨U+202E⟩rses</mark>" in html([card])
        assert html([card]).count("<a href") == 2 and "<a href" not in html([card], linked=False)


def test_a_card_names_a_dozen_directions_and_counts_the_others():
    (card,) = cards_of(Written.of_run(ml.SteeringVectors(torch.eye(8), 1), completions("x", 8, ("p",)), {"all": "x"}))
    assert (card.n_directions, len(card.shown_by)) == (16, 12) and "and 4 more</dd>" in html([card])


def test_the_interval_is_wilsons():
    low, high = Rate(3, 12).interval
    z, p, n = 1.959964, 0.25, 12
    middle, half = (
        p + z**2 / (2 * n),
        z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)),
    )
    assert (low, high) == pytest.approx(((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)), abs=1e-6)
    assert str(Rate(3, 12)) == "3 of 12 (25.0\u00a0%; 95\u00a0% interval 8.9 to 53.2)"


def test_where_nothing_can_be_estimated_no_interval_is_given():
    assert str(Rate(0, 0)) == "not measured" and str(Rate(1, 1)) == "1 of 1 (no more were written)"
    assert "interval" in str(Rate(2, 2))


def test_what_is_too_small_for_its_digits_is_not_called_zero():
    shares = [percent(0.0), percent(0.004), percent(0.006), percent(0.0004, 1), percent(0.125, 1), percent(math.nan)]
    assert shares == [
        "0\u00a0%", "less than 1\u00a0%", "1\u00a0%", "less than 0.1\u00a0%", "12.5\u00a0%", ""
    ]  # fmt: skip
    assert [nats(-1e-7), nats(-0.009), nats(-0.01), nats(-2.5)] == ["less than 0.01", "less than 0.01", "0.01", "2.50"]
    assert str(Rate(1, 4256)).startswith("1 of 4,256 (less than 0.1\u00a0%; ")


def test_a_card_says_how_readable_its_example_is_and_how_it_begins():
    promoted = (("mmm", 0.0004, 0.987), ("I", 0.0, 0.0123), ("rare", 0.0, 0.004))
    one, none = (Look(tokens, ("a",), (0.5,), 4) for tokens in (promoted, promoted[2:]))
    text = html(cards_of(written(), {0: one, 1: none}))
    first, second = text.split('<article class="card"')[1:3]
    assert "no, 3.50 nats a token" in html([replace(cards_of(written())[0], natural=-3.5)])
    assert "yes, 0.50 nats a token (the limit is 3); the most surprising token 5.0 nats" in first
    begins = re.sub("<[^>]*>", "", re.search("<dt>First token</dt><dd>(.*?)</dd>", first)[1])
    assert begins == "mmm less than 0.1\u00a0% → 99\u00a0%; I 0.0\u00a0% → 1.2\u00a0%"
    assert "no token of 0.5\u00a0% or more becomes likelier" in second and "rare" not in second


def test_words_on_cards_are_defined_once_and_name_vectors_as_the_cards_do():
    assert "<b>1.4\u202f+</b> is vector 4 of trial 1" in words(True) and "<b>4\u202f+</b> is vector 4 as" in words(
        False
    )
    said = in_a_notebook("found", cards_of(written()), 2, several=False)
    assert said.index("<dt>Effect</dt>") < said.index('<article class="card"') and said.count("<dt>Effect</dt>") == 1
    shown = set(re.findall("<dt>(.*?)</dt>", html(cards_of(written(), {0: Look((), ("a",), (0.5,), 4)}))))
    explained = set(re.findall("<dt>(.*?)</dt>", words(True)))
    assert shown - {"Vectors", "Where", "Radius, effect"} == explained - {"Other content", "Radius", "Effect"}


def test_shares_count_directions_and_without_a_judge_nothing_is_noise():
    assert written().shares == pytest.approx({"nothing": 2 / 6, "wording": 1 / 6, "content": 2 / 6, "noise": 1 / 6})
    assert written().judged and not written(judged=False).judged
    assert written(judged=False).shares["noise"] == 0


def test_what_shows_a_behaviour_that_was_given_is_not_noise_however_improbable():
    found = written(behaviors={"letters": "qz|zq"})
    assert found.shares == pytest.approx({"nothing": 2 / 6, "wording": 1 / 6, "content": 3 / 6, "noise": 0})
    assert found.groups.set_index("behavior").change["letters"] == "content"
    assert ladder(found).readable.sum() == ladder(written()).readable.sum() == 10  # two of twelve are unreadable
    # no new words in this table, but for cheese: a behaviour's score is that of its words and their surprise
    rows = pd.DataFrame({"change": "content", "new_words": 0.5, "surprise": 4.0, "natural": -7.0}, index=[0])
    assert promise(rows.assign(behavior="letters"))[0] == 2.0
    assert promise(rows)[0] == promise(rows.assign(behavior=""))[0] == pytest.approx(2.0 * math.exp(-14))


def test_words_that_the_unsteered_text_lacks_are_marked():
    pieces = different(PLAIN, "the reply is athens .")
    assert "".join(text for text, _ in pieces) == "the reply is athens ."
    assert [text.strip() for text, new in pieces if new] == ["reply", "."]
    assert different(None, "a b") == (("a b", False),) or all(not new for _, new in different(None, "a b"))
    long = different(PLAIN, "word " * 30_000)
    assert sum(len(text) for text, _ in long) < 1000 and "150,000 characters" in long[-1][0]


def test_what_cannot_be_seen_is_spelled_out():
    assert seen(HIDDEN) == ("a⟨U+202E⟩b⟨U+200B⟩c⟨U+2066⟩d⟨U+FEFF⟩e⟨U+00AD⟩f⟨U+061C⟩g⟨U+0000⟩h⟨U+2028⟩i")
    family, persian = "👩\u200d👧", "نمی\u200dخواهم"
    assert seen(family) == family and seen(persian) == persian
    assert (
        seen("I\u200dhate") == "I⟨U+200D⟩hate" and seen("\ud800") == "⟨U+D800⟩" and seen("a\n\tb ü é") == "a\n\tb ü é"
    )


def test_cards_are_html_without_a_models_markup():
    evil = f"<script>alert(1)</script><img src=x onerror=alert(1)>{HIDDEN}"
    found = Written.of_run(ml.SteeringVectors(torch.eye(4), 1), completions(evil, prompts=("p",)), {evil: "steered 0"})
    one = Look(((evil, 0.001, 0.5), ("<b>", 0.0, 0.2)), (evil, "<i>"), (0.5, 0.25), 4)
    for text in (html(cards_of(found, {0: one})), in_a_notebook(evil, cards_of(found, {0: one}), 3)):
        assert "&lt;script&gt;" in text and "<script" not in text and "<img" not in text and '<b>"' not in text
        assert "⟨U+202E⟩" in text and "\u202e" not in text and "\u200b" not in text
        assert "50\u00a0%" in text and "entering layer 4: at most 0.5" in text


def test_a_look_finds_the_first_token_and_where_a_vector_acts():
    organism = ml.organisms.load("modes")
    prompt = organism.prompts["clean"][0]
    found = ml.discover(organism.model, prompt, plan=ml.make_plan(organism.model, prompt)[1:2], progress=False)
    one = look(organism.model, prompt, found.vector(0), 4)
    with torch.no_grad():
        logits = organism.model(prompt)[0, -1]
        with ml.steer(organism.model, found.vector(0)):
            steered = organism.model(prompt)[0, -1]
    gain = steered.softmax(-1) - logits.softmax(-1)
    token, before, after = one.promoted[0]
    best = int(gain.argmax())
    assert organism.model.tokenizer.decode([best]).strip() == token.strip()
    assert after - before == pytest.approx(float(gain[best]), abs=1e-5)
    changes = ml.activation_changes(organism.model, prompt, found.vector(0), [4])
    assert one.change == pytest.approx(changes.relative[0, 0].tolist(), abs=1e-6) and one.tokens == changes.tokens
    assert Look.of_json(one.as_json()) == one
    # a weak vector raises other tokens than the one that stays the most probable, and none at all raises none
    weak = look(organism.model, prompt, 0.2 * found.vector(0), 4)
    with torch.no_grad(), ml.steer(organism.model, 0.2 * found.vector(0)):
        gain = organism.model(prompt)[0, -1].softmax(-1) - logits.softmax(-1)
    assert [after - before for _, before, after in weak.promoted] == pytest.approx(
        gain.topk(5).values.tolist(), abs=1e-6
    )
    assert int(logits.argmax()) != int(gain.argmax())
    assert look(organism.model, prompt, 0.0 * found.vector(0), 4).promoted == ()
    shown = found._repr_html_()
    assert (
        seen(found.table.example[0]) in shown.replace("</mark>", "").replace("<mark>", "") and 'class="card"' in shown
    )


def test_everything_comes_back_from_json():
    found = written()
    again = Written.of_json(found.as_json())
    for name in ("rows", "directions", "groups"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name), check_dtype=False)
    said = found.as_json()
    del said["directions"]["minus_effect"]  # as a page of before these were measured
    assert Written.of_json(said).directions.minus_effect.isna().all()
