"""Do adapters learned on one clean prompt elicit what the modes organism hides, and does diversity find more of it?"""

import pytest
from scipy.stats import fisher_exact

import melbo_lens as ml
from tests.benchmarks.breadth import doubling

pytestmark = pytest.mark.long

# of the source stream's median norm: modes sit at different ones (organisms/README.md); of its mean .4, .5, .6 and .8
FRACTIONS = (0.381, 0.476, 0.572, 0.762)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def organism():
    return ml.organisms.load("modes")


@pytest.mark.parametrize("seed", SEEDS)
def test_an_adapter_elicits_the_second_language_on_held_out_prompts(organism, seed):
    """Learned on one prompt, chosen on others, scored on a third set, beside random adapters of equal update norm."""
    model, prompts, portuguese = organism.model, organism.prompts, organism.behaviors["portuguese"]
    learned_on = prompts["clean"][10 * (seed + 1)]
    norm = ml.calibrate_radius(model, learned_on, 0, 4, rule="stream", target=1.0).radius
    settings = {
        "n_adapters": 12,
        "rank": 8,
        "optimizer": "power",
        "target_positions": slice(-1, None),
        "progress": False,
    }
    parts = [
        ml.fit_adapters(model, learned_on, 0, 4, radius=x * norm, seed=10 * seed + i, **settings)
        for i, x in enumerate(FRACTIONS)
    ]
    adapters = ml.concatenate(parts)
    control = ml.random_adapters(adapters, model, learned_on, seed)

    def shown(texts_of, on, **signs):
        table = ml.generate(model, on, texts_of, max_new_tokens=8, include_random=False, progress=False, **signs).table
        return table.assign(shown=table.text.map(portuguese))

    chosen = shown(adapters, prompts["selection"][:4]).groupby(["vector", "sign"]).shown.mean().idxmax()
    test = shown(adapters[int(chosen[0])], prompts["test"][:32], signs=(int(chosen[1]),)).groupby("kind").shown
    random = shown(control, prompts["test"][:8]).groupby("kind").shown.get_group("steered")
    steered = test.get_group("steered")
    assert steered.mean() >= max(0.1, 3 * random.mean()) and test.get_group("unsteered").sum() == 0
    table = [[int(rows.sum()), int((~rows).sum())] for rows in (steered, random)]
    assert fisher_exact(table, alternative="greater").pvalue < 0.001


def test_diversity_doubles_the_planted_behaviours_found_at_little_loss():
    """Updates of full rank within spectral norms collapse: most adapters find one change.

    `make bench` repeats this with nine other seeds.
    """
    measured = doubling((3, 4, 5))
    assert measured["median_with"] >= 2 * measured["median_without"] > 0, measured
    assert measured["objective_kept"] >= 0.9, measured
    assert measured["cosine_with"] < 0.65 < 0.75 < measured["cosine_without"], measured
