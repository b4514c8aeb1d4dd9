"""In which ways do completions differ from the unsteered ones?  Groups by behaviour or by words show them, ranked.

The rank is what a person wants to see first: a readable change of content, which the unsteered model would hardly have
begun, that several vectors elicit and random ones don't.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from melbo_lens.arguments import plain_json
from melbo_lens.evaluation.rates import Behavior, shows, verdicts
from melbo_lens.evaluation.words import word_counts
from melbo_lens.generation.completions import Completions
from melbo_lens.generation.generate import generate
from melbo_lens.measures.ranking import cluster
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.sweeps.jobs import Job, as_prompts
from melbo_lens.sweeps.tasks import Bench, Measurement, digest
from melbo_lens.sweeps.trials import AnyTrial

COLUMNS = (
    "group behavior change example method source_layer target_layer radius relative_radius effect vector sign rate "
    "heldout_rate random_rate n_vectors natural surprise score"
).split()
SURPRISING = 6.0  # nats; a token less probable than this, 1 in 400, is not more of a surprise
ALIKE = 0.5  # completions whose word counts have a smaller average cosine distance form a group


def collected(written: Sequence[Completions], judged: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Puts the completions of all trials, without the unsteered ones, beside what is said of them (`departures`)."""
    parts = [
        completions.table.assign(trial=number).join(judgement)[completions.table.kind != "unsteered"]
        for number, (completions, judgement) in enumerate(zip(written, judged, strict=True))
    ]
    return pd.concat(parts, ignore_index=True)


def promise(rows: pd.DataFrame) -> pd.Series:
    """Scores each completion by what makes it worth a look; 0 if it says the same, or is noise.

    That is the share of its words that are new, times the surprise of its least probable token, in nats and at most 6,
    times the square of the probability per token of the rest: a behaviour that was trained goes on by itself.
    """
    fluent = (2 * rows.natural.clip(upper=0)).map(math.exp)
    scores = rows.new_words * rows.surprise.clip(upper=SURPRISING) * fluent
    return scores.where(rows.change.isin(["wording", "content"]), 0.0)


def grouped(
    done: Sequence[AnyTrial],
    fitted: Sequence[Perturbation],
    rows: pd.DataFrame,
    behaviors: Mapping[str, Behavior],
) -> pd.DataFrame:
    """The groups of readable completions that differ from the unsteered completion of their prompt, best first.

    A group's score is the `promise` of its commonest text times log2(1 + the number of directions that elicit it),
    times the share by which it is commoner under learned vectors than under random ones. Noise forms no group, except
    where it shows a behaviour that was given.
    """
    changed = rows[rows.change != "same"].copy()
    changed["behavior"] = ""
    for name, behavior in behaviors.items():
        changed.loc[shows(changed.text, behavior) & (changed.behavior == ""), "behavior"] = name
    changed = changed[(changed.change != "noise") | (changed.behavior != "")]
    unnamed = changed.text[changed.behavior == ""].drop_duplicates().tolist()
    labels = dict(zip(unnamed, cluster(word_counts(unnamed), ALIKE), strict=True))
    changed["group"] = [
        behavior or f"words {labels[text]}" for behavior, text in zip(changed.behavior, changed.text, strict=True)
    ]
    changed["promise"] = promise(changed)
    of_kind = rows.groupby("kind").size()
    found = [
        _group(str(group), members, done, fitted, rows, of_kind)
        for group, members in changed.groupby("group")
        if (members.kind == "steered").any()
    ]
    table = pd.DataFrame(found, columns=[*COLUMNS, "trial"])
    return table.sort_values(["score", "n_vectors"], ascending=False).reset_index(drop=True)


def _group(
    name: str,
    members: pd.DataFrame,
    done: Sequence[AnyTrial],
    fitted: Sequence[Perturbation],
    rows: pd.DataFrame,
    of_kind: pd.Series,
) -> dict[str, Any]:
    """A row of the table: the group's commonest text, the direction that elicits it, and how common the group is."""
    steered, random = members[members.kind == "steered"], members[members.kind == "random"]
    hits = steered.groupby(["trial", "vector", "sign"]).text.size().rename("hits")
    ranked = steered.join(hits, on=["trial", "vector", "sign"]).assign(
        times=steered.groupby("text").text.transform("size")
    )
    example = ranked.sort_values(["times", "hits", "promise"], ascending=False, kind="stable").iloc[0]
    trial, vector, sign = int(example.trial), int(example.vector), int(example.sign)
    mine = (rows.kind == "steered") & (rows.trial == trial) & (rows.vector == vector) & (rows.sign == sign)
    plan, known = done[trial], fitted[trial].provenance
    rate, random_rate = len(steered) / of_kind["steered"], len(random) / max(int(of_kind.get("random", 0)), 1)
    beyond_chance = max(rate - random_rate, 0.0) / rate
    return {
        "group": name,
        "behavior": example.behavior,
        "change": example.change,
        "example": example.text,
        "method": plan.method,
        "source_layer": plan.source_layer,
        "target_layer": plan.target_layer,
        "radius": plan.radius,
        "relative_radius": plan.radius / known["stream_norm"],
        "effect": known["effects"][vector],
        "vector": vector,
        "sign": sign,
        "rate": example.hits / mine.sum(),
        "heldout_rate": float("nan"),
        "random_rate": random_rate,
        "n_vectors": len(steered[["trial", "vector"]].drop_duplicates()),
        "natural": example.natural,
        "surprise": example.surprise,
        "score": example.promise * math.log2(1 + len(hits)) * beyond_chance,
        "trial": trial,
    }


@dataclass(frozen=True)
class HeldoutTask(Measurement[list[str]]):
    """Writes on held-out prompts with the vector of a group; the result has a text for each prompt.

    Attributes:
        number: the row of the group, which changes nothing.
        job: the job that learned the vector.
        vector, sign: which vector of it, and in which direction.
        learned: the vector itself.
        prompts: the held-out prompts, as a `Job` has them.
        seed: the seed of the search.
    """

    number: int
    job: Job
    vector: int
    sign: int
    learned: Perturbation
    prompts: tuple[Any, ...]
    seed: int

    def name(self, fingerprint: str) -> str:
        asked = plain_json(self.prompts, "heldout")
        return f"{digest([self.job.digest(fingerprint), self.vector, self.sign, asked, self.seed])}-heldout"

    def run(self, bench: Bench) -> list[str]:
        completions = generate(
            bench.host,
            as_prompts(self.prompts),
            self.learned,
            self.job.max_new_tokens,
            signs=(self.sign,),
            include_unsteered=False,
            include_random=False,
            seed=self.seed,
            progress=False,
        )
        return completions.table.text.tolist()

    def of_json(self, said: Any) -> list[str]:
        if len(said) != len(self.prompts) or not all(isinstance(text, str) for text in said):
            raise ValueError(f"it doesn't hold {len(self.prompts)} texts")
        return said


def heldout_rate(texts: Sequence[str], row: Any, behaviors: Mapping[str, Behavior]) -> float:
    """Returns the share of completions of held-out prompts that belong to the row's group."""
    if row.behavior:
        return float(verdicts(pd.Series(list(texts)), behaviors[row.behavior]).mean())
    counts = word_counts([row.example, *texts])
    similar = torch.cosine_similarity(counts[:1], counts[1:])
    return float((similar > 1 - ALIKE).float().mean())
