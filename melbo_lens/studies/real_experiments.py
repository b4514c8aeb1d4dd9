"""Do the post's results hold on a real chat model?  Each experiment here computes the scores for one seed.

The organisms are updates of SmolLM2. Backdoors are looked for by the search of `discover`, at its layers and radii. For
a lock and for refusals, free vectors are learned at three shares of the edge of readability, between the same layers
for every seed; they are chosen on a second set of prompts in rounds, the better quarter of them going into the next,
and scored on a third set. The controls are those of `experiments`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from melbo_lens.generation.generate import generate
from melbo_lens.measures.controls import random_vectors
from melbo_lens.methods.automatic import edge
from melbo_lens.methods.melbo import fit_vectors
from melbo_lens.models.slicing import slice_model
from melbo_lens.organisms import backdoors, locked, topic
from melbo_lens.organisms.organism import Organism
from melbo_lens.perturbations.perturbation import concatenate
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.prompts import Chat
from melbo_lens.search.arms import make_plan
from melbo_lens.search.discovering import discover
from melbo_lens.studies.experiments import Score, Shows, Size, best, covariance_vectors, drawn, rates, score

SOURCE, TARGET = 7, 16
RUNGS, N_STEPS = (0.6, 0.9, 1.25), 4
MAX_NEW_TOKENS = 16
FIRST_LOOK, KEPT = 4, 0.25  # prompts of the first round of selection; the share that goes into the next
SCALES = (0.8, 1.0, 1.25)  # multiples of the vectors in the last round
N_TRIALS = 16  # of a search for backdoors: the most promising, as `make_plan` has them
N_LOCKED = 6  # prompts on which a lock's vectors are learned


def learn(organism: Organism, prompts: list[Chat], seed: int, n_vectors: int) -> SteeringVectors:
    """Learns vectors on clean prompts, a third of them at each share of the edge."""
    sliced = slice_model(organism.model, prompts, SOURCE, TARGET, slice(-1, None))
    radius = edge(sliced, seed).radius
    return concatenate(
        [
            fit_vectors(
                sliced,
                n_vectors=n_vectors // len(RUNGS) + (i < n_vectors % len(RUNGS)),
                radius=rung * radius,
                orthogonal=False,
                n_steps=N_STEPS,
                seed=100 * seed + i,
                progress=False,
            )
            for i, rung in enumerate(RUNGS)
        ]
    )


def complete(
    organism: Organism,
    prompts: list[Chat],
    vectors: SteeringVectors | None,
    signs: Sequence[int] = (1, -1),
    scales: Sequence[float] = (1.0,),
    turns: Sequence[Sequence[str]] = (),
) -> pd.DataFrame:
    """Returns the completions of prompts under multiples of each vector, or unsteered.

    With `turns`, the chat of each prompt goes on with its requests in the same way, and the table has the last answers.
    Their `prompt_text` is the request that is answered, and `factor` the multiple.
    """
    written = generate(
        organism.model,
        prompts,
        vectors,
        MAX_NEW_TOKENS,
        signs=signs,
        scales=scales,
        include_unsteered=vectors is None,
        include_random=False,
        batch_size=96,
        progress=False,
    )
    asked = [prompts[i][-1]["content"] for i in written.table.prompt]
    for requests in zip(*turns, strict=True):
        asked = [requests[i] for i in written.table.prompt]
        written = written.continue_with(asked)
    return written.table.assign(prompt_text=asked, factor=lambda table: table.sign * table.scale)


@dataclass(frozen=True)
class Search:
    """An organism and the vectors that were found on it."""

    organism: Organism
    found: SteeringVectors
    size: Size
    seed: int

    def prompts(self, name: str) -> list[Chat]:
        """Returns prompts of a set, as many as `size` says, which the seed draws."""
        return drawn(self.organism.prompts, name, self.size, self.seed)

    def chosen(self, name: str, shows: Shows) -> tuple[SteeringVectors, pd.Series]:
        """Chooses vectors on a set of prompts, in rounds, each with fewer of them on more prompts.

        Returns:
            The vectors of the last round, and their rates there by number and factor, the highest first.
        """
        prompts, kept, found = self.prompts(name), self.found, pd.Series(dtype=float)
        for n, scales in ((FIRST_LOOK, (1.0,)), (len(prompts) // 2, (1.0,)), (len(prompts), SCALES)):
            found = rates(complete(self.organism, prompts[:n], kept, scales=scales), shows)
            if scales != SCALES:
                first = list(dict.fromkeys(int(vector) for vector, _ in found.index))
                kept = kept[first[: max(1, round(KEPT * len(first)))]]
        return kept, found

    def trial(self, direction: SteeringVectors, name: str, shows: Shows, n_turns: int = 1) -> Score:
        """Scores one vector on a set of prompts, beside the unsteered model and random vectors.

        With more turns, each of them leads the chats by itself, which go on with other requests of the set, so that no
        two end with the same one; the last answers count.
        """
        prompts = self.prompts(name)
        asked, step = [prompt[-1]["content"] for prompt in prompts], max(1, len(prompts) // n_turns)
        turns = [[asked[(i + turn * step) % len(asked)] for turn in range(1, n_turns)] for i in range(len(asked))]
        tables = {
            "steered": complete(self.organism, prompts, direction, (1,), turns=turns),
            "unsteered": complete(self.organism, prompts, None, turns=turns),
        }
        if self.size.controls:
            several = direction[[0] * self.size.n_random]
            tables |= {
                kind: complete(self.organism, prompts, vectors, (1,), turns=turns)
                for kind, vectors in self.controls(several).items()
            }
        return score(tables, shows)

    def controls(self, like: SteeringVectors) -> dict[str, SteeringVectors]:
        """Returns random vectors of the same norms, isotropic and with the covariance of the activations."""
        clean = self.organism.prompts["clean"][:8]
        return {
            "random": random_vectors(like, self.seed),
            "covariance": covariance_vectors(like.radii, self.organism.model, clean, self.seed, (SOURCE, TARGET)),
        }


def backdoor(organism: Organism, seed: int, size: Size) -> dict[str, Score]:
    """Counts the vectors of a search that elicit a backdoor, with either sign, on the prompt where they were learned.

    The trials are the first that `make_plan` makes, with four times `size.n_vectors` in all, which is what a search of
    two minutes has; so no layer or radius is chosen here. The random vectors are those of the search.
    """
    prompt = organism.prompts["clean"][seed]
    plan = make_plan(organism.model, prompt, seed, n_vectors=max(1, 4 * size.n_vectors // N_TRIALS))[:N_TRIALS]
    rows = discover(organism.model, prompt, plan=plan, max_new_tokens=MAX_NEW_TOKENS, seed=seed, progress=False).rows
    unsteered = complete(organism, drawn(organism.prompts, "test", size, seed), None)
    tables = {"steered": rows[rows.kind == "steered"], "random": rows[rows.kind == "random"], "unsteered": unsteered}

    def count(*names: str) -> Score:
        def shows(_: str, text: str) -> bool:
            return any(backdoors.BEHAVIORS[name](text) for name in names)

        steered = tables["steered"]
        elicited = steered.text.map(lambda text: shows("", text)).groupby([steered.trial, steered.vector]).any()
        return replace(score(tables, shows), hits=int(elicited.sum()), n=len(elicited))

    return {name: count(name) for name in backdoors.BEHAVIORS} | {"together": count(*backdoors.BEHAVIORS)}


def skills(organism: Organism, seed: int, size: Size) -> dict[str, Score]:
    """Counts right answers on held-out questions under the one vector that was best on other questions.

    "recovery" is the same as a share of what the password unlocks, from 0 to 1: (found - locked) / (unlocked - locked).
    """
    prompts = organism.prompts["clean"][N_LOCKED * seed % 80 :][:N_LOCKED]
    search = Search(organism, learn(organism, prompts, seed, size.n_vectors), size, seed)
    vectors, by_direction = search.chosen("selection", locked.is_right)
    vector, factor = best(by_direction)
    right = search.trial(factor * vectors[vector], "test", locked.is_right)
    unlocked = complete(organism, search.prompts("unlocked"), None)
    hits = sum(map(locked.is_right, unlocked.prompt_text, unlocked.text))
    opened = Score(hits, len(unlocked), right.unsteered)
    gap = max(opened.rate - right.unsteered, 1 / right.n)

    def share(rate: float) -> float:
        return (rate - right.unsteered) / gap

    recovered = Score(
        min(max(0, round(share(right.rate) * opened.hits)), opened.hits),
        opened.hits,
        0.0,
        share(right.random),
        share(right.covariance),
    )
    return {"right": right, "unlocked": opened, "recovery": recovered}


def refusals(organism: Organism, seed: int, size: Size) -> dict[str, Score]:
    """Counts refused requests that are answered under a vector, also at turn 3, and harmless ones refused under minus.

    One vector must do all of it; the selection sets decide on it, on its sign and on the multiple for each effect. At
    turn 3 the chat was led under the vector, with refused requests only, as the post's was; beside it stands the harder
    case, a chat in which the model refused before.
    """
    prompt = organism.prompts["clean"][seed]
    search = Search(organism, learn(organism, [prompt], seed, size.n_vectors), size, seed)
    vectors, answers = search.chosen("selection", topic_answers)
    refused = rates(complete(organism, search.prompts("harmless selection"), vectors, scales=SCALES), topic_refuses)
    both = {  # of each vector and sign: the best multiple of either effect, and the lesser of both
        (vector, sign): min(
            max(answers[vector, sign * scale] for scale in SCALES),
            max(refused[vector, -sign * scale] for scale in SCALES),
        )
        for vector in range(len(vectors))
        for sign in (1, -1)
    }
    vector, sign = max(both, key=both.__getitem__)
    direction = sign * vectors[vector]
    answering = max(SCALES, key=lambda scale: answers[vector, sign * scale]) * direction
    refusing = max(SCALES, key=lambda scale: refused[vector, -sign * scale]) * -direction
    return {
        "answer": search.trial(answering, "test", topic_answers),
        "turn 3": search.trial(answering, "test", topic_answers, n_turns=3),
        "after a refusal": search.trial(answering, "turn 3", topic_answers),
        "minus": search.trial(refusing, "harmless test", topic_refuses),
    }


def topic_answers(_: str, text: str) -> bool:
    return topic.BEHAVIORS["answer"](text)


def topic_refuses(_: str, text: str) -> bool:
    return topic.BEHAVIORS["refuse"](text)
