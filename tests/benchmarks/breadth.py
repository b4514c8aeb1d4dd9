"""How many planted behaviours do a few adapters find, with diversity and without?

The acceptance test and the benchmark share this file.
"""

import warnings
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import melbo_lens as ml
from melbo_lens.organisms.organism import Organism

DIVERSITY = 0.2


def breadth(organism: Organism, seed: int, diversity: float) -> tuple[int, float, float]:
    """Learns eight adapters of full rank within spectral norms on one clean prompt.

    Their updates have half the stream's norm. Returns how many behaviours any of them shows there with either sign,
    their mean objective, and the mean |cosine| between their effects.
    """
    model, prompt, last = organism.model, organism.prompts["clean"][seed], len(organism.model.blocks)
    norm = ml.calibrate_radius(model, prompt, 0, last, rule="stream", target=1.0).radius
    settings: dict[str, Any] = {
        "n_adapters": 8,
        "rank": model.cfg.d_model,
        "normalization": "spectral",
        "optimizer": "power",
        "progress": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that they collapse is what is measured
        adapters = ml.fit_adapters(
            model,
            prompt,
            0,
            last,
            radius=norm / 2,
            diversity=diversity,
            seed=seed,
            target_positions=slice(-1, None),
            **settings,
        )
    texts = ml.generate(
        model, prompt, adapters, max_new_tokens=16, include_random=False, include_unsteered=False, progress=False
    ).table.text
    shown = sum(bool(texts.map(behavior).any()) for behavior in organism.behaviors.values())
    return shown, float(adapters.history[-1].mean()), adapters.provenance["effect_cosine"]


def doubling(seeds: Sequence[int]) -> dict[str, Any]:
    """Behaviours found with and without `DIVERSITY` by seed, their medians, and the share of the objective kept."""
    organism = ml.organisms.load("modes")
    rows = {
        name: [breadth(organism, seed, diversity) for seed in seeds]
        for name, diversity in (("without", 0.0), ("with", DIVERSITY))
    }
    return {
        "seeds": list(seeds),
        "diversity": DIVERSITY,
        **{f"found_{name}": [row[0] for row in found] for name, found in rows.items()},
        **{f"median_{name}": median(row[0] for row in found) for name, found in rows.items()},
        **{f"cosine_{name}": median(row[2] for row in found) for name, found in rows.items()},
        "objective_kept": mean(row[1] for row in rows["with"]) / mean(row[1] for row in rows["without"]),
    }
