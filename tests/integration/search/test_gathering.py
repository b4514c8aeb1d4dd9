"""Are prompts, samples and held-out texts told apart where trials of several searches come together?"""

import inspect
import json

import numpy as np
import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.evaluation.departures import in_words
from melbo_lens.generation.completions import COLUMNS
from melbo_lens.perturbations.rows import at_the_fit
from melbo_lens.reports.again import snippet
from melbo_lens.search import groups
from melbo_lens.search.groups import MOST_TEXTS, alike, heldout_rate

PLAN = [ml.Trial(0, 3, 0.001, 3, False, 0, 3)]  # of a radius that does nothing


@pytest.fixture(scope="module")
def organism():
    return ml.organisms.load("modes")


@pytest.fixture(scope="module")
def gathered(organism, tmp_path_factory):
    folder, settings = tmp_path_factory.mktemp("audit"), {"plan": PLAN, "max_new_tokens": 9, "progress": False}
    for prompt in (0, 5):
        ml.discover(organism.model, organism.prompts["clean"][prompt], directory=folder, **settings)
    return ml.gather(folder)


def test_joined_trials_of_two_prompts_keep_both(gathered):
    vectors, written = gathered.joined(0)
    table = written.table
    assert (table.groupby("prompt").prompt_text.nunique() == 1).all() and table.prompt.nunique() == 2
    assert (table.kind == "unsteered").sum() == 2 and len(vectors) == 6
    assert {*table.vector.dropna()} == {*range(6)} and len(written.prompt_tokens) == len(table)
    for row, ids in zip(table.itertuples(), written.prompt_tokens, strict=True):
        assert len(ids) == len(row.prompt_text.split()) + 1
    assert ml.Findings(vectors, written).everything.shares["nothing"] == gathered.shares["nothing"] == 1.0


def test_a_page_of_several_prompts_says_no_single_call_that_repeats_it(gathered):
    assert snippet(ml.Findings.of_trials(gathered)) == ""
    assert gathered.settings == {"target_positions": "slice(-1, None, None)", "max_new_tokens": 9}


def completions(rows):
    table = pd.DataFrame([(*row, [], []) for row in rows], columns=COLUMNS).astype({"vector": "Int64"})
    return ml.Completions(table)


def test_what_any_unsteered_sample_says_is_no_change():
    written = completions(
        [
            (0, "q", "unsteered", None, 0, 0.0, 0, "it is athens ."),
            (0, "q", "unsteered", None, 0, 0.0, 1, "mmm I love cheese !"),
            (0, "q", "steered", 0, 1, 1.0, 0, "mmm I love cheese !"),
            (0, "q", "steered", 0, 1, 1.0, 1, "mmm I love bread !"),
            (1, "other", "steered", 0, 1, 1.0, 1, "without an unsteered one"),
        ]
    )
    judged = in_words(written.table)
    assert judged.change.tolist() == ["same", "same", "same", "content", "content"]
    assert judged.new_words[2] == 0.0 and judged.new_words[4] == 1.0


def test_a_prompt_without_an_unsteered_completion_is_judged_by_a_model_as_well(organism):
    prompts = organism.prompts["clean"][:2]
    vectors = ml.random_vectors(ml.SteeringVectors.from_tensor(organism.model.W_E[:2] * 5, 0), 0)
    written = ml.generate(organism.model, prompts, vectors, 4, include_random=False, progress=False)
    table = written.table[~((written.table.kind == "unsteered") & (written.table.prompt == 1))].reset_index(drop=True)
    found = ml.Findings.measured(organism.model, prompts, vectors, ml.Completions(table, written.settings))
    assert len(found.judged) == len(table)


def test_texts_that_the_vector_left_alone_belong_to_no_group():
    row = pd.Series({"behavior": "polite", "example": "yes ."})
    texts, plain = ["yes .", "no .", "what"], ["yes .", "nothing .", "what"]
    assert heldout_rate(texts, plain, row, {"polite": r"\.$"}) == pytest.approx(1 / 3)
    row = pd.Series({"behavior": "", "example": "lisbon is lovely"})
    texts, plain = ["lisbon is lovely", "lisbon is lovely"], ["lisbon is lovely", "athens"]
    assert heldout_rate(texts, plain, row, {}) == 0.5


def test_a_rate_on_held_out_prompts_counts_what_changed(organism):
    settings = {"plan": [ml.Trial(0, 3, 10.0, 8, False, 0, 4)], "behaviors": {"polite": r"\.$"}, "progress": False}
    heldout = organism.prompts["test"][:8]
    found = ml.discover(organism.model, organism.prompts["clean"][:3], heldout=heldout, **settings)
    row = found.table[found.table.behavior == "polite"].iloc[0]
    written = ml.generate(
        organism.model, heldout, found.vector(int(row.name)), 16, signs=(1,), include_random=False, progress=False
    ).table.set_index("prompt")
    before, after = (written[written.kind == kind].text for kind in ("unsteered", "steered"))
    assert row.heldout_rate == ((before != after) & after.str.endswith(".")).mean() < after.str.endswith(".").mean()


def test_a_behaviour_that_fails_after_a_search_costs_its_name_and_no_group(organism):
    def late(text):
        if len(text) > 1:
            raise KeyError(text)
        return False

    plan = [ml.Trial(0, 3, 10.0, 4, False, 0, 4)]
    with pytest.warns(UserWarning, match="words alone, since a behaviour failed"):
        found = ml.discover(
            organism.model, organism.prompts["clean"][0], plan=plan, behaviors={"late": late}, progress=False
        )
    assert len(found.table) and (found.table.behavior == "").all()


def test_counts_of_groups_are_checked(gathered, organism):
    for call in (gathered.first, gathered.shown):
        with pytest.raises(ValueError, match="n=0 must be an integer of at least 1"):
            call(0)
    found = ml.discover(
        organism.model,
        organism.prompts["clean"][0],
        plan=[ml.Trial(0, 3, 10.0, 4, False, 0, 4)],
        behaviors={"any": "."},
        progress=False,
    )
    with pytest.raises(ValueError, match=r"show \['any'\]: give the behaviours"):
        found.twins(found, {})
    with pytest.raises(ValueError, match=r"method='cpe': choose from \[\(0, 3, 'melbo'\)\]"):
        found.joined(0, method="cpe")
    with pytest.raises(IndexError, match=r"row=1\.5 must be one of"):
        inspect.unwrap(type(found).vector)(found, 1.5)
    of_numpy = inspect.unwrap(type(found).vector)(found, np.int64(0))
    assert of_numpy.values.equal(found.vector(0).values)


def test_a_vector_that_a_search_hands_out_knows_what_its_fit_measured(organism):
    plan = [ml.Trial(0, 3, 10.0, 4, False, 0, 4), ml.Trial(0, 3, 14.0, 4, False, 1, 4)]
    found = ml.discover(organism.model, organism.prompts["clean"][0], plan=plan, max_new_tokens=4, progress=False)
    signs = set()
    for number, row in enumerate(found.table.itertuples()):
        fitted, one = found.vectors[row.trial][row.vector], found.vector(number)
        signs.add(row.sign)
        assert at_the_fit(one.provenance, 1) == at_the_fit(fitted.provenance, 1, row.sign)
        assert torch.equal(one.values, row.sign * fitted.values)
        if row.sign > 0:  # it is the fitted one, whose objective was maximised
            assert torch.equal(one.history, fitted.history) and "derived" not in one.provenance
    assert signs == {1, -1}
    first = found.first(len(found.table))
    effects, _ = at_the_fit(first.provenance, len(first))
    assert effects == [found.table.effect[k] for k in range(len(first))]


def test_many_texts_are_compared_in_parts(monkeypatch):
    texts = [f"word{i} is here" for i in range(7)] + ["lisbon is lovely"]
    whole = alike(["lisbon is lovely", "word3 is here"], texts)
    sizes, counted = [], groups.word_counts
    monkeypatch.setattr(groups, "word_counts", lambda some, *more: sizes.append(len(some)) or counted(some, *more))
    monkeypatch.setattr(groups, "MOST_TEXTS", 3)
    assert MOST_TEXTS > 3 and (alike(["lisbon is lovely", "word3 is here"], texts) == whole).all()
    assert max(sizes) == 2 + 3
    assert whole[0].tolist() == [False] * 7 + [True] and alike(["a"], []).shape == (1, 0)


def test_a_table_that_a_user_put_beside_a_run_stays(tmp_path):
    written = completions([(0, "q", "unsteered", None, 0, 0.0, 0, "a"), (0, "q", "steered", 0, 1, 1.0, 0, "b")])
    vectors = ml.SteeringVectors.from_tensor(torch.ones(1, 2), 0)
    for name in ("ranking.csv", "trials.csv"):
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        ml.save_results(tmp_path, vectors, written)
    assert (tmp_path / "ranking.csv").read_text() == (tmp_path / "trials.csv").read_text() == "mine"
    assert json.loads((tmp_path / "about.json").read_text())["ranking"] is None
    with pytest.raises(TypeError, match="report_directory"):
        inspect.unwrap(ml.report)(str(tmp_path), path=tmp_path / "page.html")


def test_no_text_of_a_model_is_typeset_in_a_notebook(gathered, organism):
    found = ml.discover(
        organism.model, organism.prompts["clean"][0], plan=[ml.Trial(0, 3, 10.0, 4, False, 0, 4)], progress=False
    )
    assert "tex2jax_ignore mathjax_ignore" in found._repr_html_()
    assert "tex2jax_ignore" in found.completions[0]._repr_html_()
