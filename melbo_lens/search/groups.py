"""In which ways do completions differ from the unsteered ones?  Groups by behaviour or by words show them, ranked.

The rank is what a person wants to see first: a readable change of content, which the unsteered model would hardly have
begun, that several vectors elicit and random ones don't.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from scipy.sparse import csr_matrix, diags_array
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize
from torch import Tensor

from melbo_lens.arguments import plain_json
from melbo_lens.evaluation.rates import Behavior, shows, verdicts
from melbo_lens.evaluation.words import ordinary_in, pieces, weights, word_counts
from melbo_lens.generation.completions import Completions
from melbo_lens.generation.generate import generate
from melbo_lens.measures.ranking import cluster
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.perturbations.rows import at_the_fit
from melbo_lens.sweeps.jobs import Job, as_prompts
from melbo_lens.sweeps.tasks import Bench, Measurement, digest
from melbo_lens.sweeps.trials import AnyTrial

COLUMNS = (
    "group behavior change example method source_layer target_layer radius relative_radius effect vector sign rate "
    "heldout_rate random_rate n_vectors natural surprise score"
).split()
SURPRISING = 6.0  # nats; a token less probable than this, 1 in 400, is not more of a surprise
MOST_TEXTS = 2000  # so many different texts are compared with each other
ALIKE = 0.5  # completions whose word counts have a smaller average cosine distance form a group
LEAST_NEW = 0.1  # a changed text without a new word counts as one with so many
LEAST_BEYOND = 0.25  # a group that random vectors write as often keeps so much of its score


def collected(written: Sequence[Completions], judged: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Puts the completions of all trials, without the unsteered ones, beside what is said of them (`departures`)."""
    parts = [
        completions.table.assign(trial=number).join(judgement)[completions.table.kind != "unsteered"]
        for number, (completions, judgement) in enumerate(zip(written, judged, strict=True))
    ]
    return pd.concat(parts, ignore_index=True)


def promise(rows: pd.DataFrame) -> pd.Series:
    """Scores each completion by what makes it worth a look; 0 if it says the same, or is noise.

    That is the share of its words that are new, at least a tenth, times the surprise of its least probable token, in
    nats and at most 6, times the square of the probability per token of the rest: a behaviour that was trained goes on
    by itself. Of what shows a behaviour that was given, however improbable, that last factor is 1.
    """
    fluent = (2 * rows.natural.fillna(0.0).clip(upper=0)).map(math.exp)  # where no model judged, words alone count
    if "behavior" in rows.columns:
        fluent = fluent.where(rows.behavior == "", 1.0)
    scores = rows.new_words.clip(lower=LEAST_NEW) * rows.surprise.fillna(SURPRISING).clip(upper=SURPRISING) * fluent
    return scores.where(rows.change.isin(["wording", "content"]), 0.0)


def ordinary_words(tables: Iterable[pd.DataFrame]) -> set[str]:
    """What prompts and unsteered completions in tables of completions have, and so many answers share."""
    plain = pd.concat([table.loc[table.kind == "unsteered", ["text", "prompt_text"]] for table in tables])
    return ordinary_in({*plain.text}, {*plain.prompt_text})


def named(rows: pd.DataFrame, behaviors: Mapping[str, Behavior], ordinary: Set[str]) -> pd.DataFrame:
    """Says of each completion to which group it belongs.

    Completions that show a behaviour form a group of its name; all others that differ from the unsteered one are
    grouped by their words. Noise forms no group. What shows a behaviour that was given is not noise, however improbable
    its text: it counts as a change of content. Of very many different texts the most promising `MOST_TEXTS` form
    groups, which others join.

    Args:
        rows: completions without the unsteered ones, and how they depart.
        behaviors: as in `discover`.
        ordinary: words that count less where texts are compared, so that one with a sentence too many is not taken for
            a paraphrase; and forms, so that those of another one, as in capitals, come together.

    Returns:
        The rows with behavior and group, both empty where there is none.
    """
    names = rows.assign(behavior="", group="")
    changed = rows.change != "same"
    for name, behavior in behaviors.items():
        names.loc[changed & (names.behavior == "") & shows(rows.text, behavior), "behavior"] = name
    names.loc[(names.behavior != "") & (names.change == "noise"), "change"] = "content"
    by_words = changed & (names.change != "noise") & (names.behavior == "")
    # in the order of the texts, on which groups must depend in no other way
    best = promise(names[by_words]).astype(float).groupby(rows.text[by_words]).max()
    most = set(best.nlargest(MOST_TEXTS).index)
    texts = [text for text in best.index if text in most]
    labels = dict(zip(texts, cluster(word_counts(texts, ordinary), ALIKE), strict=True))
    labels |= _joined(labels, [text for text in best.index if text not in most], ordinary)
    said = rows.text[by_words].map(labels)
    names.loc[said[said.notna()].index, "group"] = [f"words {int(label)}" for label in said.dropna()]
    names["group"] = names.behavior.where(names.behavior != "", names.group)
    return names


def _joined(labels: Mapping[str, int], texts: Sequence[str], ordinary: Set[str]) -> dict[str, int]:
    """The cluster of each further text whose words are, on the mean, as near to it as those that formed it."""
    if not texts:
        return {}
    counter = CountVectorizer(tokenizer=partial(pieces, ordinary=ordinary), token_pattern=None, lowercase=False)
    counter.fit([*labels, *texts])
    heavy = diags_array(weights(counter.get_feature_names_out().tolist(), ordinary).numpy())
    unit = normalize(counter.transform(list(labels)) @ heavy)
    member = csr_matrix((np.ones(len(labels)), (list(labels.values()), range(len(labels)))))
    means = normalize(member, "l1") @ unit
    found: dict[str, int] = {}
    for first in range(0, len(texts), MOST_TEXTS):
        some = list(texts[first : first + MOST_TEXTS])
        cosines = (normalize(counter.transform(some) @ heavy) @ means.T).toarray()
        best = cosines.argmax(1)
        found |= {text: int(k) for text, k, row in zip(some, best, cosines, strict=True) if row[k] > 1 - ALIKE}
    return found


def directions_of(done: Sequence[AnyTrial], fitted: Sequence[Perturbation]) -> pd.DataFrame:
    """The trial, number, method, layers, radius and effects, of it and of minus it, of every vector of a search."""
    return pd.DataFrame(
        [
            {
                "trial": trial,
                "vector": vector,
                "method": plan.method,
                "source_layer": plan.source_layer,
                "target_layer": plan.target_layer,
                "radius": plan.radius,
                "relative_radius": plan.radius / learned.provenance["stream_norm"],
                "effect": effect,
                "minus_effect": minus_effect,
            }
            for trial, (plan, learned) in enumerate(zip(done, fitted, strict=True))
            for vector, (effect, minus_effect) in enumerate(
                zip(*(at_the_fit(learned.provenance, len(learned), sign)[0] for sign in (1, -1)), strict=True)
            )
        ]
    )


def signed(table: pd.DataFrame) -> pd.DataFrame:
    """A table of vectors with signs, beside the facts of the vectors, with the effect that each has with its sign."""
    return table.assign(effect=table.effect.where(table.sign > 0, table.minus_effect)).drop(columns="minus_effect")


def grouped(directions: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The groups of readable completions that differ from the unsteered completion of their prompt, best first.

    A group's score is the `promise` of its commonest text times log2(1 + the number of directions that elicit it),
    times the share by which it is commoner under learned vectors than under random ones, at least a quarter: what
    random vectors bring out is a finding, too.

    Args:
        directions: as from `directions_of`.
        rows: every completion but the unsteered ones, as from `named`.
    """
    rows = rows.assign(promise=promise(rows))
    of_kind = rows.groupby("kind").size()
    of_direction = rows[rows.kind == "steered"].groupby(["trial", "vector", "sign"]).size()
    facts = signed(directions.merge(pd.DataFrame({"sign": [1, -1]}), how="cross")).set_index(
        ["trial", "vector", "sign"]
    )
    found = [
        _group(str(group), members, facts, of_kind, of_direction)
        for group, members in rows[rows.group != ""].groupby("group")
        if (members.kind == "steered").any()
    ]
    table = pd.DataFrame(found, columns=[*COLUMNS, "trial"])
    return table.sort_values(["score", "n_vectors"], ascending=False, kind="stable").reset_index(drop=True)


def _group(
    name: str, members: pd.DataFrame, directions: pd.DataFrame, of_kind: pd.Series, of_direction: pd.Series
) -> dict[str, Any]:
    """A row of the table: the group's commonest text, the direction that elicits it, and how common the group is."""
    steered, random = members[members.kind == "steered"], members[members.kind == "random"]
    hits = steered.groupby(["trial", "vector", "sign"]).text.size().rename("hits")
    ranked = steered.join(hits, on=["trial", "vector", "sign"]).assign(
        times=steered.groupby("text").text.transform("size")
    )
    example = ranked.sort_values(["times", "hits", "promise", "text"], ascending=False, kind="stable").iloc[0]
    trial, vector, sign = int(example.trial), int(example.vector), int(example.sign)
    rate, random_rate = len(steered) / of_kind["steered"], len(random) / max(int(of_kind.get("random", 0)), 1)
    beyond_chance = max(1 - random_rate / rate, LEAST_BEYOND)
    return {
        "group": name,
        "behavior": example.behavior,
        "change": example.change,
        "example": example.text,
        **directions.loc[(trial, vector, sign)].to_dict(),
        "vector": vector,
        "sign": sign,
        "rate": example.hits / of_direction[trial, vector, sign],
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
    """Writes on held-out prompts with the vector of a group, or without any; the result has a text for each prompt.

    Attributes:
        number: the row of the group, which changes nothing.
        job: the job that learned the vector.
        vector, sign: which vector of it, and in which direction.
        learned: the vector itself; None writes unsteered.
        prompts: the held-out prompts, as a `Job` has them.
        seed: the seed of the search.
    """

    number: int
    job: Job
    vector: int
    sign: int
    learned: Perturbation | None
    prompts: tuple[Any, ...]
    seed: int

    def name(self, fingerprint: str) -> str:
        asked = plain_json(self.prompts, "heldout")
        if self.learned is None:
            return f"{digest([fingerprint, self.job.max_new_tokens, asked, self.seed])}-heldout"
        return f"{digest([self.job.digest(fingerprint), self.vector, self.sign, asked, self.seed])}-heldout"

    def run(self, bench: Bench) -> list[str]:
        completions = generate(
            bench.host,
            as_prompts(self.prompts),
            self.learned,
            self.job.max_new_tokens,
            signs=(self.sign,),
            include_unsteered=self.learned is None,
            include_random=False,
            seed=self.seed,
            progress=False,
        )
        return completions.table.text.tolist()

    def of_json(self, said: Any) -> list[str]:
        if len(said) != len(self.prompts) or not all(isinstance(text, str) for text in said):
            raise ValueError(f"it doesn't hold {len(self.prompts)} texts")
        return said


def heldout_rate(
    texts: Sequence[str],
    plain: Sequence[str],
    row: Any,
    behaviors: Mapping[str, Behavior],
    ordinary: Set[str] = frozenset(),
) -> float:
    """Returns the share of completions of held-out prompts that belong to the row's group, and that the vector changed.

    Args:
        texts: the completions.
        plain: the unsteered completions of the same prompts.
        row: a row of the table of groups.
        behaviors: those with which the groups were made.
        ordinary: the words that counted less when they were made.
    """
    changed = np.array([text != before for text, before in zip(texts, plain, strict=True)])
    if row.behavior:
        shown = verdicts(pd.Series(list(texts)), behaviors[row.behavior])
        return float(shown.where(changed | shown.isna(), 0.0).mean())
    return float((alike([row.example], texts, ordinary)[0].numpy() & changed).mean())


def alike(
    examples: Sequence[str], texts: Sequence[str], ordinary: Set[str] = frozenset()
) -> Bool[Tensor, "example text"]:
    """Says which texts have words so similar to those of which examples that they are of one group."""
    found, n = [torch.zeros(len(examples), 0, dtype=torch.bool, device="cpu")], len(examples)
    for first in range(0, len(texts), MOST_TEXTS):
        some = [*examples, *texts[first : first + MOST_TEXTS]]
        counts = torch.nn.functional.normalize(word_counts(some, ordinary), dim=1)
        found.append(counts[:n] @ counts[n:].T > 1 - ALIKE)
    return torch.cat(found, dim=1)
