"""Do adapters learned on one clean prompt of the modes organism elicit what it hides, and does diversity find more of it?"""

from statistics import mean, median

import pytest
from scipy.stats import fisher_exact

import melbo_lens as ml

FRACTION = 0.6  # of the source stream's norm: modes sit between .4 and 1.0 (organisms/README.md)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def organism():
    return ml.organisms.load("modes")


def fit(organism, seed, **settings):
    prompt = organism.prompts["clean"][10 * (seed + 1)]
    radius = ml.calibrate_radius(organism.model, prompt, 0, 4, rule="fraction", target=FRACTION).radius
    chosen = {"n_adapters": 16, "rank": 16, "optimizer": "power", "target_positions": slice(-1, None), **settings}
    return ml.fit_adapters(organism.model, prompt, 0, 4, radius=radius, seed=seed, progress=False, **chosen)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_adapter_elicits_the_second_language_on_held_out_prompts(organism, seed):
    """Chosen on one set of prompts, scored on another, beside the random control of equal update norm."""
    adapters = fit(organism, seed)
    behaviors = {"portuguese": organism.behaviors["portuguese"]}
    selection = ml.generate(organism.model, organism.prompts["selection"][:8], adapters, max_new_tokens=12, progress=False)
    best = ml.evaluate(selection, behaviors).table.sort_values("rate", ascending=False, kind="stable").iloc[0]
    chosen = adapters[int(best.vector)]
    test = ml.generate(organism.model, organism.prompts["test"], chosen, max_new_tokens=12, signs=(int(best.sign),), seed=seed, progress=False)
    everything = ml.generate(
        organism.model, organism.prompts["test"][:8], ml.random_adapters(adapters, organism.model, seed=seed), include_random=False, progress=False
    )
    shown = {kind: rows.text.map(organism.behaviors["portuguese"]) for kind, rows in test.table.groupby("kind")}
    random = everything.table[everything.table.kind == "steered"].text.map(organism.behaviors["portuguese"])
    assert shown["steered"].mean() >= 3 * max(shown["random"].mean(), random.mean()) and shown["unsteered"].sum() == 0
    table = [[shown["steered"].sum(), (~shown["steered"]).sum()], [random.sum(), (~random).sum()]]
    assert fisher_exact(table, alternative="greater").pvalue < 0.001


def test_diversity_doubles_the_behaviors_found_at_little_loss(organism):
    """Within spectral norms adapters of rank 4 collapse: most find one change, and few of what is planted."""
    found, objectives = {}, {}
    for diversity in (0.0, 0.3):
        for seed in SEEDS:
            prompt = organism.prompts["clean"][seed]
            radius = ml.calibrate_radius(organism.model, prompt, 0, 4, rule="fraction", target=1.0).radius
            settings = {"n_adapters": 8, "rank": 4, "radius": radius, "normalization": "spectral", "optimizer": "power", "progress": False}
            adapters = ml.fit_adapters(organism.model, prompt, 0, 4, diversity=diversity, target_positions=slice(-1, None), seed=seed, **settings)
            texts = ml.generate(organism.model, prompt, adapters, max_new_tokens=12, include_random=False, progress=False).table.text
            found.setdefault(diversity, []).append(sum(any(map(behavior, texts)) for behavior in organism.behaviors.values()))
            objectives.setdefault(diversity, []).append(float(adapters.history[-1].mean()))
    assert median(found[0.3]) >= max(2, 2 * median(found[0.0]))
    assert mean(objectives[0.3]) >= 0.9 * mean(objectives[0.0])
