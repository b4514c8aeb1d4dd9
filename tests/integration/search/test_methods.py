"""Do all methods take part in a search, each under its name, with what it found?"""

import re
from dataclasses import replace
from typing import get_args

import pytest
import torch

import melbo_lens as ml
from melbo_lens.evaluation.rates import check_behaviors
from melbo_lens.perturbations.rows import at_the_fit
from melbo_lens.search import groups
from melbo_lens.search.arms import Method, arms_of, check_methods, layer_pairs
from melbo_lens.search.pace import Pace

PLAN = [
    ml.Trial(0, 4, 10.0, 3, False, 0, 2),
    ml.CpeTrial(0, 4, 3, 1, n_layers=2, scale=2.0, n_steps=2),
    ml.DctTrial(0, 4, 10.0, 4, 2, n_steps=2),
    ml.AdapterTrial(0, 4, 10.0, 2, 2, 3),
    ml.Trial(0, 4, 10.0, 3, "soft", 4, 2),
    ml.Trial(0, 4, 10.0, 2, True, 5, 3, "adamw"),
    ml.DctTrial(0, 4, 10.0, 2, 6, "qr", 2),
    ml.JacobianTrial(0, 4, 10.0, 2, 7, 2),
    ml.NoiseTrial(0, 4, 10.0, 5, 8),
]


@pytest.fixture(scope="module")
def organism():
    return ml.organisms.load("modes")


@pytest.fixture
def prompt(organism):
    return organism.prompts["clean"][0]


def test_a_plan_may_hold_trials_of_every_method_and_repeats_them(organism, prompt):
    model = organism.model
    found, again = (ml.discover(model, prompt, plan=PLAN, max_new_tokens=4, progress=False) for _ in range(2))
    assert found.plan == tuple(PLAN) and [len(one) for one in found.vectors] == [3, 3, 4, 2, 3, 2, 2, 2, 5]
    assert [type(one).__name__ for one in found.vectors] == [
        "SteeringVectors", "SteeringAdapters", "SteeringVectors", "SteeringAdapters",
        *5 * ["SteeringVectors"],
    ]  # fmt: skip
    assert found.vectors[1].source_layers == (0, 1) and found.vectors[1].scales.tolist() == [2.0] * 3
    assert found.rows.equals(again.rows)
    methods = ["melbo", "cpe", "dct", "adapters", "soft", "adamw", "dct_qr", "jacobian", "noise"]
    for planned, vectors, method in zip(found.plan, found.vectors, methods, strict=True):
        assert planned.method == method
        if isinstance(vectors, ml.SteeringVectors):
            torch.testing.assert_close(vectors.radii, torch.full((len(vectors),), 10.0), atol=1e-3, rtol=0)
    for row in found.table.itertuples():
        assert row.method == methods[row.trial] and row.effect >= 0
        assert (row.relative_radius > 0) == (row.method != "cpe")  # NaN, since unit factors have no radius
    assert set(found.table.method) <= set(methods) and len(set(found.table.method)) > 1
    completions = ml.generate(model, prompt, found.vector(0), 4, include_random=False, progress=False)
    with pytest.raises(IndexError, match=rf"row={len(found.table)} must be one of the {len(found.table)} rows"):
        found.vector(len(found.table))
    assert len(completions.filter(kind="steered")) == 2


def test_a_difference_of_means_stands_beside_the_others(organism, prompt):
    clean, marked = organism.prompts["clean"][4:8], organism.prompts["triggered"][:4]
    plan = [ml.ContrastiveTrial(0, 4, 12.0, tuple(marked), tuple(clean))]
    found = ml.discover(organism.model, prompt, plan=plan, max_new_tokens=4, progress=False)
    (vectors,) = found.vectors
    expected = ml.fit_contrastive(organism.model, marked, clean, 0, radius=12.0)
    torch.testing.assert_close(vectors.values, expected.values)
    assert len(vectors) == 1 and set(found.table.method) <= {"contrastive"}
    assert vectors.provenance["effects"][0] > 0 and vectors.provenance["relative_radius"] > 0


def test_noise_is_random_at_its_radius_and_knows_its_effects(organism, prompt):
    sliced = ml.slice_model(organism.model, prompt, 1, 4)
    one, more = (ml.noise_vectors(sliced, radius=5.0, n_vectors=n, seed=3) for n in (2, 40))
    torch.testing.assert_close(one.values, more.values[:2])  # vector k depends on the seed and k alone
    assert more.cosine_similarity().fill_diagonal_(0).abs().mean() < 0.2
    torch.testing.assert_close(more.radii, torch.full((40,), 5.0))
    larger = ml.noise_vectors(sliced, radius=10.0, n_vectors=2, seed=3)
    assert all(b > a > 0 for a, b in zip(one.provenance["effects"], larger.provenance["effects"], strict=True))
    assert larger.provenance["relative_radius"] == pytest.approx(2 * one.provenance["relative_radius"], rel=1e-3)
    again = ml.noise_vectors(organism.model, prompt, 1, 4, radius=5.0, n_vectors=2, seed=4)
    assert (again.values - one.values).norm() > 1
    with pytest.raises(ValueError, match="radius=0"):
        ml.noise_vectors(organism.model, prompt, 1, 4, radius=0)


def test_every_method_of_a_search_makes_trials_under_its_own_name():
    for method in get_args(Method):
        for arm in arms_of(30, [method]):
            made = arm.trial(1.0, 4, 64, 0).method
            assert made == method or (method == "melbo" and made == "orthogonal")


@pytest.mark.parametrize("n_layers", [8, 10, 12, 24, 32])
def test_every_method_begins_at_every_source_layer(n_layers):
    sources = {pair[0] for pair in layer_pairs(n_layers)}
    for method in get_args(Method):
        assert {arm.source_layer for arm in arms_of(n_layers, [method])} == sources


def test_what_methods_of_several_forms_found_stands_side_by_side_by_form(organism, prompt):
    plan = [PLAN[0], PLAN[1], PLAN[-1], ml.Trial(0, 4, 12.0, 4, False, 3, 2)]
    found = ml.discover(organism.model, prompt, plan=plan, max_new_tokens=4, progress=False)
    assert isinstance(found.first(50), (ml.SteeringVectors, ml.SteeringAdapters))
    assert set(found.table.sign) == {1, -1}
    for row in found.table.itertuples():  # the effect is that of the vector with its sign
        effects, _ = at_the_fit(found.vectors[row.trial].provenance, len(found.vectors[row.trial]), row.sign)
        assert row.effect == effects[row.vector] > 0
    with pytest.raises(ValueError, match=r"name one of the methods \['cpe', 'melbo', 'noise'\]"):
        found.joined(0)
    vectors, completions = found.joined(0, method="noise")
    assert len(vectors) == 5 and completions.table.vector.max() == 4
    vectors, completions = found.joined(0, method="melbo")
    assert len(vectors) == 7 and vectors.history.isfinite().all()
    rest = replace(found, plan=found.plan[2:], vectors=found.vectors[2:], completions=found.completions[2:])
    vectors, _ = rest.joined(0)  # random ones have no history, and stand beside learned ones
    assert len(vectors) == 9 and vectors.history[:, :5].isnan().all() and vectors.history[:, 5:].isfinite().all()


def test_a_method_that_does_not_suit_a_model_costs_nothing_that_others_found(build):
    model = build("mixtral", "bridge")  # without an MLP that adapters could update
    plan = [ml.Trial(0, 3, 2.0, 2, False, 0, 2), ml.AdapterTrial(0, 3, 2.0, 2, 2, 0), ml.NoiseTrial(0, 3, 2.0, 2, 0)]
    with pytest.warns(UserWarning, match="AdapterTrial.* is left out"):
        found = ml.discover(model, "w1 w2", plan=plan, max_new_tokens=2, progress=False)
    assert [trial.method for trial in found.plan] == ["melbo", "noise"]
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="no trial could be completed"):
        ml.discover(model, "w1 w2", plan=plan[1:2], max_new_tokens=2, progress=False)


@pytest.mark.parametrize("error", [FloatingPointError, RuntimeError])
def test_held_out_prompts_that_can_not_be_written_on_cost_nothing_that_was_found(build, monkeypatch, error):
    def fails(*arguments, **settings):
        raise error("the logits are gone")

    monkeypatch.setattr(groups, "generate", fails)
    with pytest.warns(UserWarning, match="no group has a rate on held-out prompts: the logits are gone") as warned:
        found = ml.discover(
            build("gpt2", "bridge"), "w1 w2", plan=[ml.Trial(0, 2, 9.0, 4, False, 0, 2)], heldout="w3",
            max_new_tokens=2, behaviors={"any": "w"}, progress=False,
        )  # fmt: skip
    assert len(found.table) and found.table.heldout_rate.isna().all()
    assert not any("no time was left" in str(one.message) for one in warned)  # it is not what went wrong


@pytest.mark.parametrize("which", ["prompts", "heldout"])
def test_prompts_that_leave_no_room_for_a_completion_are_refused_before_anything_is_computed(build, which, monkeypatch):
    model = build("gpt2", "bridge")
    monkeypatch.setattr(model, "forward", None)
    asked = {"prompts": "w1", "heldout": "w1"} | {which: "w1 " * (model.cfg.n_ctx - 3)}
    with pytest.raises(ValueError, match=r"prompts\[0\].*tokens remain for new ones, 4 were asked for"):
        ml.discover(model, max_new_tokens=4, progress=False, **asked)


def test_a_behaviour_that_fails_on_a_held_out_text_costs_nothing_that_was_found(build, monkeypatch):
    model, settings = build("gpt2", "bridge"), {"max_new_tokens": 2, "progress": False}
    plan, seen = [ml.Trial(0, 2, 9.0, 4, False, 0, 2)], {"", " "}
    ml.discover(model, "w1 w2", plan=plan, behaviors={"any": lambda text: not seen.add(text)}, **settings)

    def knows_only_what_it_saw(text):
        if text not in seen:
            raise RuntimeError("no judge answers")
        return True

    monkeypatch.setattr(groups.HeldoutTask, "run", lambda self, bench: ["something else"])
    with pytest.warns(UserWarning, match="has no rate on held-out prompts: the behavior raised .*no judge answers"):
        found = ml.discover(
            model, "w1 w2", plan=plan, heldout="w3", behaviors={"any": knows_only_what_it_saw}, **settings
        )
    assert len(found.table)


def test_held_out_prompts_for_which_no_time_is_left_are_said(build):
    with pytest.warns(UserWarning, match="no time was left to score a group on 2 held-out prompts: give fewer"):
        found = ml.discover(
            build("gpt2", "bridge"), "w1 w2", 1e-6, heldout=["w3", "w4"], max_new_tokens=2, behaviors={"any": "w"},
            progress=False,
        )  # fmt: skip
    assert len(found.table) and found.table.heldout_rate.isna().all()


def test_what_is_no_behaviour_is_refused_at_once(build, monkeypatch, tmp_path):
    model = build("gpt2", "bridge")
    written = ml.generate(model, "w1 w2", max_new_tokens=2, progress=False)
    monkeypatch.setattr(model, "forward", None)
    for call in (
        lambda bad: ml.discover(model, "w1 w2", 1.0, bad, progress=False),
        lambda bad: ml.gather(tmp_path, bad),
        lambda bad: ml.evaluate(written, bad),
    ):
        with pytest.raises(ValueError, match=r"behaviors\['x'\]='\(a' is no regular expression"):
            call({"x": "(a"})
    check_behaviors.__wrapped__({"x": re.compile("a", re.IGNORECASE)})
    with pytest.raises(TypeError, match=r"behaviors\['x'\] is of type int: give a regular expression, a function"):
        check_behaviors.__wrapped__({"x": 3})


def test_an_empty_plan_is_refused(build):
    with pytest.raises(ValueError, match="plan is empty"):
        ml.discover(build("gpt2", "bridge"), "w1 w2", plan=[], progress=False)


def test_methods_take_turns_in_a_search(organism, prompt):
    model = organism.model
    found = ml.discover(model, prompt, 15.0, methods=["melbo", "cpe", "dct"], max_new_tokens=3, progress=False)
    turns = ["melbo", "cpe", "dct"]
    assert [arm.method for arm in arms_of(4, turns)[:3]] == turns
    # how many follow, and which of them are repeated, depends on the machine's speed
    assert found.plan[0].method == "melbo" and {trial.method for trial in found.plan} <= set(turns)
    plan = ml.make_plan(model, prompt, methods=["dct"], n_vectors=5)
    assert plan and all(isinstance(trial, ml.DctTrial) and trial.n_factors == 5 for trial in plan)


def test_the_arms_of_cpe_and_dct_lie_within_the_model():
    for n_layers in (2, 3, 4, 12, 30, 80):
        for arm in arms_of(n_layers, ["cpe", "dct"]):
            trial = arm.trial(1.0, 4, 64, 0)
            assert 0 <= trial.source_layer < trial.target_layer <= n_layers
            if arm.method == "cpe":
                assert trial.source_layer + trial.n_layers < trial.target_layer and trial.n_layers >= 1
                assert trial.scale == arm.rung


def test_each_method_has_a_pace_of_its_own():
    clock = Pace(100.0, 1)
    melbo, cpe = ml.Trial(0, 10, 1.0, 10, False, 0, 4), ml.CpeTrial(0, 10, 10, 0, n_steps=4)
    clock.learn(melbo, 5.0, 1.0)
    assert clock.expected(cpe) == pytest.approx(clock.expected(melbo))  # as long as nothing better is known
    clock.learn(cpe, 50.0, 1.0)
    assert clock.expected(melbo) == pytest.approx(6.0) and clock.expected(cpe) == pytest.approx(51.0)


@pytest.mark.parametrize("methods", [[], ["melbo", "sae"], "melbo"])
def test_unknown_methods_are_refused(methods):
    with pytest.raises(ValueError, match="must be a list of some of"):
        check_methods(methods)
