"""Do all methods take part in a search, each under its name, with what it found?"""

import pytest

import melbo_lens as ml
from melbo_lens.search.pace import Pace
from melbo_lens.search.trials import arms_of, check_methods

PLAN = [
    ml.Trial(0, 4, 10.0, 3, False, 0, 2),
    ml.CpeTrial(0, 4, 3, 1, n_layers=2, scale=2.0, n_steps=2),
    ml.DctTrial(0, 4, 10.0, 4, 2, n_steps=2),
    ml.AdapterTrial(0, 4, 10.0, 2, 2, 3),
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
    assert found.plan == tuple(PLAN) and [len(one) for one in found.vectors] == [3, 3, 4, 2]
    assert [type(one).__name__ for one in found.vectors] == [
        "SteeringVectors", "SteeringAdapters", "SteeringVectors", "SteeringAdapters",
    ]  # fmt: skip
    assert found.vectors[1].source_layers == (0, 1) and found.vectors[1].scales.tolist() == [2.0] * 3
    assert found.rows.equals(again.rows)
    methods = ["melbo", "cpe", "dct", "adapters"]
    for row in found.table.itertuples():
        assert row.method == methods[row.trial] and row.effect >= 0
        assert (row.relative_radius > 0) == (row.method != "cpe")  # NaN, since unit factors have no radius
    assert set(found.table.method) <= set(methods) and len(set(found.table.method)) > 1
    completions = ml.generate(model, prompt, found.vector(0), 4, include_random=False, progress=False)
    assert len(completions.filter(kind="steered")) == 2


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
