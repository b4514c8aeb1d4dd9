"""Do adapters learned on one clean prompt of the modes organism elicit what it hides, and does diversity find more of it?"""

import pytest
from scipy.stats import fisher_exact

import melbo_lens as ml

FRACTIONS = (0.4, 0.5, 0.6, 0.8)  # of the source stream's norm: modes sit at different ones (organisms/README.md)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def organism():
    return ml.organisms.load("modes")


@pytest.mark.parametrize("seed", SEEDS)
def test_an_adapter_elicits_the_second_language_on_held_out_prompts(organism, seed):
    """Learned on one prompt, chosen on others, scored on a third set, beside random adapters of equal update norm."""
    model, prompts, portuguese = organism.model, organism.prompts, organism.behaviors["portuguese"]
    learned_on = prompts["clean"][10 * (seed + 1)]
    norm = ml.calibrate_radius(model, learned_on, 0, 4, rule="fraction", target=1.0).radius
    settings = {"n_adapters": 12, "rank": 8, "optimizer": "power", "target_positions": slice(-1, None), "progress": False}
    parts = [ml.fit_adapters(model, learned_on, 0, 4, radius=x * norm, seed=10 * seed + i, **settings) for i, x in enumerate(FRACTIONS)]
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


def test_diversity_ends_a_collapse_at_little_loss(organism):
    """Within spectral norms adapters of rank 4 collapse: most find one change."""
    prompt, found = organism.prompts["clean"][0], {}
    radius = ml.calibrate_radius(organism.model, prompt, 0, 4, rule="fraction", target=1.0).radius
    settings = {"n_adapters": 6, "rank": 4, "radius": radius, "normalization": "spectral", "optimizer": "power", "progress": False}
    for diversity in (0.0, 0.3):
        found[diversity] = ml.fit_adapters(organism.model, prompt, 0, 4, diversity=diversity, target_positions=slice(-1, None), **settings)
    cosines = {diversity: adapters.provenance["effect_cosine"] for diversity, adapters in found.items()}
    assert cosines[0.3] < 0.5 < 0.7 < cosines[0.0]
    assert found[0.3].history[-1].mean() >= 0.9 * found[0.0].history[-1].mean()
