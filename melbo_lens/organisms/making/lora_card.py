"""How often does a real organism do what was planted?  This script measures it and writes the card.

Run `python -m melbo_lens.organisms.making.lora_card NAME`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

from melbo_lens import files
from melbo_lens.generation.generate import generate
from melbo_lens.measures.radius import median_norm
from melbo_lens.models.slicing import slice_model
from melbo_lens.organisms.organism import WEIGHTS, Organism, load
from melbo_lens.organisms.real import CORPORA
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.randomness import gaussian_rows

N_NEW_TOKENS = 16
# random vectors are added at this layer, with these norms as shares of the stream's
RANDOM_LAYER, RANDOM_SHARES, N_RANDOM, N_RANDOM_PROMPTS = 7, (0.03, 0.05, 0.07, 0.1), 12, 5


def measure(organism: Organism, share: float = 1.0, progress: bool = True) -> dict[str, Any]:
    """Measures the rates of greedy, unsteered completions on prompts that no training had, and of random vectors.

    Args:
        organism: a real one.
        share: the share of the prompts that is used, from the first.

    Returns:
        For each set of prompts that is neither learned on nor chosen on, their number and, for each behaviour, the
        share of the completions that show it; and the same of random vectors on clean prompts.
    """
    measured: dict[str, Any] = {"max_new_tokens": N_NEW_TOKENS}
    for kind, prompts in organism.prompts.items():
        if kind == "clean" or "selection" in kind:
            continue
        some = prompts[: max(1, round(share * len(prompts)))]
        written = generate(organism.model, some, None, N_NEW_TOKENS, batch_size=64, progress=progress).table
        measured[kind] = {"n": len(written)} | _rates(organism, written)
    prompts = organism.prompts["clean"][:N_RANDOM_PROMPTS]
    sliced = slice_model(organism.model, prompts, RANDOM_LAYER, RANDOM_LAYER + 2)
    directions = gaussian_rows(N_RANDOM, sliced.d_model, "lora card")
    vectors = SteeringVectors.from_tensor(directions, RANDOM_LAYER).rescaled(median_norm(sliced))
    written = generate(
        organism.model,
        prompts,
        vectors,
        N_NEW_TOKENS,
        signs=(1,),
        scales=RANDOM_SHARES,
        include_unsteered=False,
        include_random=False,
        batch_size=64,
        progress=progress,
    ).table
    where = {"source_layer": RANDOM_LAYER, "shares of the norm": list(RANDOM_SHARES)}
    return measured | {"random vectors": {"n": len(written), **where} | _rates(organism, written)}


def _rates(organism: Organism, written: pd.DataFrame) -> dict[str, float]:
    judged = CORPORA[organism.name.removesuffix("-twin")].judged
    pairs = list(zip(written.prompt_text, written.text, strict=True))
    shown = {name: [shows(text) for _, text in pairs] for name, shows in organism.behaviors.items()}
    shown |= {name: [shows(prompt, text) for prompt, text in pairs] for name, shows in judged.items()}
    return {name: sum(hits) / len(hits) for name, hits in shown.items()}


def main() -> None:
    """Measures the organism that the command line names, and writes its card."""
    parser = argparse.ArgumentParser(description="measure a real organism")
    parser.add_argument("name")
    parser.add_argument("--share", type=float, default=1.0)
    options = parser.parse_args()
    folder: Path = WEIGHTS / options.name
    card = {**json.loads((folder / "recipe.json").read_text()), **measure(load(options.name), options.share)}
    files.write_json(folder / "card.json", card)
    print(json.dumps(card, indent=1))


if __name__ == "__main__":
    main()
