"""In which ways do completions differ from the unsteered ones?  Groups by behaviour or by words show them."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from melbo_lens.evaluation.rates import Behavior, shows
from melbo_lens.evaluation.words import word_counts
from melbo_lens.generation.completions import Completions
from melbo_lens.generation.generate import generate
from melbo_lens.measures.ranking import cluster
from melbo_lens.models.access import Model
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Prompts
from melbo_lens.search.trials import AdapterTrial, Trial

COLUMNS = (
    "group behavior example source_layer target_layer radius vector sign rate heldout_rate random_rate n_vectors"
).split()
ALIKE = 0.5  # completions whose word counts have a smaller average cosine distance form a group


def grouped(
    done: Sequence[Trial | AdapterTrial], written: Sequence[Completions], behaviors: Mapping[str, Behavior]
) -> pd.DataFrame:
    """The groups of completions that differ from the unsteered completion of their prompt, best first.

    A group's score is its share of the steered completions minus its share of the random ones, times the `variety` of
    its example.
    """
    parts = []
    for number, completions in enumerate(written):
        table = completions.table.assign(trial=number)
        plain = table[table.kind == "unsteered"].set_index("prompt").text
        parts.append(
            table[table.kind != "unsteered"].assign(
                differs=lambda rows, plain=plain: rows.text != rows.prompt.map(plain)
            )
        )
    rows = pd.concat(parts, ignore_index=True)
    changed = rows[rows.differs].copy()
    changed["behavior"] = ""
    for name, behavior in behaviors.items():
        changed.loc[shows(changed.text, behavior) & (changed.behavior == ""), "behavior"] = name
    unnamed = changed.text[changed.behavior == ""].drop_duplicates().tolist()
    labels = dict(zip(unnamed, cluster(word_counts(unnamed), ALIKE), strict=True))
    changed["group"] = [
        behavior or f"words {labels[text]}" for behavior, text in zip(changed.behavior, changed.text, strict=True)
    ]
    n_each = rows.groupby("kind").size()
    found = []
    for group, members in changed.groupby("group"):
        steered, random = members[members.kind == "steered"], members[members.kind == "random"]
        if steered.empty:
            continue
        hits = steered.groupby(["trial", "vector", "sign"]).size().reset_index(name="hits")
        hits["radius"] = [done[trial].radius for trial in hits.trial]
        best = hits.sort_values(["hits", "radius"], ascending=[False, True]).iloc[0]
        mine = rows[
            (rows.kind == "steered")
            & (rows.trial == best.trial)
            & (rows.vector == best.vector)
            & (rows.sign == best.sign)
        ]
        example = steered[
            (steered.trial == best.trial) & (steered.vector == best.vector) & (steered.sign == best.sign)
        ].text.iloc[0]
        trial = done[int(best.trial)]
        random_rate = len(random) / max(int(n_each.get("random", 0)), 1)
        excess = len(steered) / int(n_each["steered"]) - random_rate
        found.append(
            {
                "group": group,
                "behavior": steered.behavior.iloc[0],
                "example": example,
                "source_layer": trial.source_layer,
                "target_layer": trial.target_layer,
                "radius": trial.radius,
                "vector": int(best.vector),
                "sign": int(best.sign),
                "rate": best.hits / len(mine),
                "heldout_rate": float("nan"),
                "random_rate": random_rate,
                "n_vectors": len(hits.drop_duplicates(["trial", "vector"])),
                "trial": int(best.trial),
                "score": excess * variety(example),
            }
        )
    table = pd.DataFrame(found, columns=[*COLUMNS, "trial", "score"])
    return table.sort_values("score", ascending=False).drop(columns="score").reset_index(drop=True)


def heldout_rate(
    model: Model,
    prompts: Prompts,
    vectors: Perturbation,
    row: Any,
    behaviors: Mapping[str, Behavior],
    max_new_tokens: int,
    seed: int,
) -> float:
    """The share of held-out prompts whose completion belongs to the row's group."""
    completions = generate(
        model,
        prompts,
        vectors,
        max_new_tokens,
        signs=(row.sign,),
        include_unsteered=False,
        include_random=False,
        seed=seed,
        progress=False,
    )
    texts = completions.table.text
    if row.behavior:
        return float(shows(texts, behaviors[row.behavior]).mean())
    counts = word_counts([row.example, *texts])
    similar = torch.cosine_similarity(counts[:1], counts[1:])
    return float((similar > 1 - ALIKE).float().mean())


def variety(text: str) -> float:
    """The number of different words divided by the number of words; low for a text that repeats itself."""
    words = text.split()
    return len(set(words)) / len(words) if words else 0.0
