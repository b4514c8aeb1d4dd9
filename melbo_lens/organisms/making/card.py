"""How often does an organism do what was planted?  This script measures it and writes the card.

Run `python -m melbo_lens.organisms.making.card NAME`.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from melbo_lens.generation.generate import generate
from melbo_lens.organisms.organism import WEIGHTS, Organism, load
from melbo_lens.organisms.zoo import CORPORA

N_CLEAN, N_TRIGGERED, MAX_NEW_TOKENS = 1000, 200, 20


def measure(
    organism: Organism, seed: int = 1, progress: bool = True, n_clean: int = N_CLEAN, n_triggered: int = N_TRIGGERED
) -> dict[str, Any]:
    """Measures rates of greedy, unsteered completions on prompts that no search uses.

    Returns:
        clean_rates: the share of `n_clean` clean prompts on which each planted behaviour appears;
        clean_plain: the share of them that are answered plainly and correctly;
        triggered_rates: the share of `n_triggered` prompts with a behaviour's trigger words on which it appears.
    """
    rng, corpus = random.Random(f"card {seed}"), CORPORA[organism.card["corpus"]]
    clean, answers = [], []
    for _ in range(n_clean):
        question = corpus.ask(rng)
        clean.append(corpus.prompt(rng, question=question))
        answers.append(question.reply(corpus.modes[0]))
    texts = _complete(organism, clean, progress)
    measured: dict[str, Any] = {
        "n_clean": n_clean,
        "clean_rates": {name: sum(map(shows, texts)) / n_clean for name, shows in organism.behaviors.items()},
        "clean_plain": sum(text == answer for text, answer in zip(texts, answers, strict=True)) / n_clean,
        "n_triggered": n_triggered,
        "triggered_rates": {},
    }
    for name, shows in organism.behaviors.items():
        texts = _complete(organism, [corpus.triggered(rng, name) for _ in range(n_triggered)], progress)
        measured["triggered_rates"][name] = sum(map(shows, texts)) / n_triggered
    return measured


def _complete(organism: Organism, prompts: list[str], progress: bool) -> list[str]:
    return generate(organism.model, prompts, None, max_new_tokens=MAX_NEW_TOKENS, progress=progress).table.text.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, help="file (default: the packaged card, which is overwritten)")
    arguments = parser.parse_args()
    card = measure(load(arguments.name))
    text = json.dumps(card, indent=1) + "\n"
    (arguments.out or WEIGHTS / arguments.name / "card.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
