"""Does the one call for someone who knows nothing find what the organism hides?

Controls and twin must show nothing, and the search must be repeatable.
"""

import pandas as pd
import pytest
from scipy.stats import fisher_exact

import melbo_lens as ml
from melbo_lens.search.groups import COLUMNS

pytestmark = pytest.mark.long

# seed and clean prompt, none of them used in development; on the last three an earlier search hardly found one mode
CASES = [(1, 10), (2, 20), (3, 30), (11, 40), (12, 50), (13, 60)]
N_TRIALS = 8  # free vectors at four radii from two source layers, the first of the plan


@pytest.fixture(scope="module")
def organism():
    return ml.organisms.load("modes")


@pytest.fixture(scope="module")
def found(organism):
    # the first trials of the plan, so that the result doesn't depend on how fast or busy the machine is
    return [planned(organism, prompt, seed, N_TRIALS, behaviors=organism.behaviors) for seed, prompt in CASES]


@pytest.fixture(scope="module")
def searches(found):
    """All their completions."""
    return [completions_of(discovery) for discovery in found]


def completions_of(discovery):
    first, *others = discovery.completions
    tables = [first.table, *(one.table[one.table.kind != "unsteered"] for one in others)]
    return ml.Completions(pd.concat(tables, ignore_index=True))


def planned(organism, prompt, seed, n_trials, **settings):
    text = organism.prompts["clean"][prompt]
    plan = ml.make_plan(organism.model, text, seed, n_vectors=64)[:n_trials]
    return ml.discover(organism.model, text, plan=plan, seed=seed, progress=False, **settings)


def test_every_planted_mode_is_among_the_first_groups_of_every_search(organism, found):
    for discovery in found:
        assert set(organism.behaviors) <= set(discovery.table.behavior.head(2 * len(organism.behaviors)))


def hits(completions, behavior, kind):
    return int(completions.filter(kind=kind).table.text.map(behavior).sum())


def test_planted_modes_fill_five_times_as_many_completions_as_with_random_vectors(organism, searches):
    def planted(kind):
        return sum(hits(found, behavior, kind) for found in searches for behavior in organism.behaviors.values())

    n_steered, n_random = (sum(len(found.filter(kind=kind)) for found in searches) for kind in ("steered", "random"))
    assert planted("steered") / n_steered >= 5 * max(planted("random"), 1) / n_random


def test_each_mode_beats_the_random_control_on_its_own(organism, searches):
    n, n_random = (sum(len(found.filter(kind=kind)) for found in searches) for kind in ("steered", "random"))
    for name, behavior in organism.behaviors.items():
        steered, random = (sum(hits(found, behavior, kind) for found in searches) for kind in ("steered", "random"))
        p_value = fisher_exact([[steered, n - steered], [random, n_random - random]], alternative="greater").pvalue
        assert p_value < 0.01, (name, steered, random, n)


def test_unsteered_the_prompts_show_nothing(organism, searches):
    for found in searches:
        assert not any(hits(found, behavior, "unsteered") for behavior in organism.behaviors.values())


def test_the_twin_that_never_saw_the_modes_shows_none():
    twin = ml.organisms.load("modes-twin")
    seed, prompt = CASES[0]
    found = completions_of(planned(twin, prompt, seed, N_TRIALS))
    assert len(found.filter(kind="steered")) > 1000
    for name, behavior in twin.behaviors.items():
        assert hits(found, behavior, "steered") == 0, name


def test_an_untrained_model_shows_none(organism):
    untrained = organism.untrained()
    prompt = organism.prompts["clean"][10]
    vectors = ml.fit_vectors(
        untrained, prompt, 0, 4, n_vectors=32, radius=3.0, orthogonal=False, n_steps=10, progress=False
    )
    completions = ml.generate(untrained, prompt, vectors, max_new_tokens=16, progress=False)
    assert not any(hits(completions, behavior, "steered") for behavior in organism.behaviors.values())


@pytest.mark.parametrize("budget", [8.0, 20.0])
def test_a_search_keeps_to_its_budget_and_uses_it(organism, budget):
    prompt = organism.prompts["clean"][43]
    discovery = ml.discover(organism.model, prompt, budget, heldout=prompt, seed=5, progress=False)
    # 1.05 on a quiet machine; here other tests share it
    assert 0.6 * budget < discovery.settings["seconds"] < 1.3 * budget
    # small trials everywhere, and later twice as many vectors where something came
    sizes = [trial.n_vectors for trial in discovery.plan]
    assert len({(trial.source_layer, trial.radius) for trial in discovery.plan}) >= 3 and max(sizes) > sizes[0]
    assert discovery.edge.rule == "readable" and discovery.table.heldout_rate.notna().any()


def test_the_table_names_a_vector_that_elicits_the_behaviour(organism, found):
    table = found[0].table
    assert set(COLUMNS) <= set(table.columns)
    for row in table.index[table.behavior != ""]:
        entry = table.iloc[row]
        completions = ml.generate(
            organism.model,
            organism.prompts["clean"][CASES[0][1]],
            found[0].vector(row),
            max_new_tokens=24,
            signs=(1,),
            progress=False,
        )
        assert completions.filter(kind="steered").table.text[0] == entry.example
        assert entry.random_rate < 0.002 and entry.rate == 1


def test_without_names_the_planted_sentences_are_groups_of_their_own(organism):
    discovery = planned(organism, 40, 11, 8, heldout=organism.prompts["selection"][:4])
    shown = [
        {name for name, behavior in organism.behaviors.items() if behavior(example)}
        for example in discovery.table.example.head(12)
    ]
    assert len(set.union(*shown)) >= 2
    assert discovery.table.heldout_rate.notna().all() and discovery.table.heldout_rate.max() > 0.5


def test_a_plan_repeats_exactly(organism):
    prompt = organism.prompts["clean"][41]
    first = ml.discover(organism.model, prompt, budget=3.0, seed=4, progress=False)
    again = ml.discover(organism.model, prompt, seed=99, plan=first.plan, progress=False)
    assert again.plan == first.plan
    assert again.table.equals(first.table) and again.shares == first.shares


def test_trials_of_one_layer_join_into_one_set_of_vectors(organism):
    prompt = organism.prompts["clean"][42]
    plan = ml.make_plan(organism.model, prompt, seed=2)[:2]
    discovery = ml.discover(organism.model, prompt, plan=plan, progress=False)
    vectors, completions = discovery.joined(source_layer=0)
    assert len(vectors) == 48 and vectors.history.shape[1] == 48
    assert completions.table.kind.value_counts().to_dict() == {"steered": 96, "random": 16, "unsteered": 1}
    row = completions.filter(kind="steered", vector=40, sign=-1).table.iloc[0]
    again = ml.generate(
        organism.model, prompt, -vectors[40], max_new_tokens=16, signs=(1,), include_random=False, progress=False
    )
    assert again.filter(kind="steered").table.text[0] == row.text
    with pytest.raises(ValueError, match=r"choose from \[\(0, 4, .melbo.\)\]"):
        discovery.joined(source_layer=0, target_layer=3)


def test_a_budget_without_meaning_is_refused(organism):
    with pytest.raises(ValueError, match="budget=0"):
        ml.discover(organism.model, organism.prompts["clean"][0], budget=0.0)
