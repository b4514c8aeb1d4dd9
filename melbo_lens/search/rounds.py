"""Which trial is run next?  Small ones everywhere first, then larger ones where something came (successive halving)."""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pandas as pd

from melbo_lens.generation.completions import Completions
from melbo_lens.models.host import Host
from melbo_lens.models.slices import SlicedModel, slice_model
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Positions, PromptBatch, Prompts
from melbo_lens.search.arms import Arm, Ladder
from melbo_lens.search.groups import promise
from melbo_lens.search.pace import FEWEST, FIRST, MOST, Pace
from melbo_lens.sweeps.running import perform
from melbo_lens.sweeps.trials import AnyTrial

SHARE_OF_FIRST_ROUND = 0.5  # of the time that is left after the edge was found
FEWEST_ARMS = 2  # so many arms go into every later round


@dataclass
class Search:
    """What a search has done so far."""

    host: Host
    prompts: Prompts
    batch: PromptBatch
    target_positions: Positions
    max_new_tokens: int
    slices: dict[tuple[int, int], SlicedModel] = field(default_factory=dict)
    done: list[AnyTrial] = field(default_factory=list)
    fitted: list[Perturbation] = field(default_factory=list)
    written: list[Completions] = field(default_factory=list)
    judged: list[pd.DataFrame] = field(default_factory=list)
    failure: Exception | None = None
    ended: list[float] = field(default_factory=list)  # when each trial was over, by the monotonic clock

    def slice(self, source_layer: int, target_layer: int) -> SlicedModel:
        """Returns the slice between two layers, which is made only once."""
        between = (source_layer, target_layer)
        if between not in self.slices:
            self.slices[between] = slice_model(self.host, self.batch, *between, self.target_positions)
        return self.slices[between]

    def run(self, trial: AnyTrial) -> tuple[float, float] | None:
        """Runs a trial, and returns the seconds of its fit and of its writing; None if it is left out."""
        try:
            sliced = self.slice(trial.source_layer, trial.target_layer)
            learned, completions, judged, fitting, writing = perform(trial, sliced, self.prompts, self.max_new_tokens)
        except (FloatingPointError, ValueError) as error:  # of a single trial: what others found is not to be lost
            warnings.warn(f"{trial} is left out: {error}", stacklevel=3)
            self.failure = error
            return None
        self.done.append(trial)
        self.fitted.append(learned)
        self.written.append(completions)
        self.judged.append(judged)
        self.ended.append(time.monotonic())
        return fitting, writing

    def readable(self, number: int) -> float:
        """Returns the share of a completed trial's learned completions that are not noise."""
        steered = (self.written[number].table.kind == "steered").to_numpy()
        return float((self.judged[number].change[steered] != "noise").mean())

    def worth(self, number: int) -> float:
        """Scores a completed trial: the promise of its different texts, over the number of its completions.

        A text that many vectors elicit counts once, since more of it is not what a search is for.
        """
        table, judged = self.written[number].table, self.judged[number]
        steered = table.kind == "steered"
        first = steered & ~table[steered].text.duplicated().reindex(table.index, fill_value=True)
        return float(promise(judged[first]).sum() / steered.sum())


def rounds(
    search: Search, clock: Pace, arms: Sequence[Arm], ladder: Ladder, d_model: int, seed: int
) -> Iterator[AnyTrial]:
    """Yields trials until the time is used: first small ones everywhere, then larger ones where something came."""
    chosen, n_vectors, number, share = list(arms), FIRST, seed * 1000, SHARE_OF_FIRST_ROUND
    tried, failed = set[Arm](), set[Arm]()
    while chosen:
        ends, worth = clock.passed + share * clock.left, dict[Arm, float]()
        for place, arm in enumerate(chosen):  # it may grow on the way
            radius = ladder.radius_at_edge(arm.source_layer)
            until = ends if worth else clock.seconds  # a round has one trial at least, if there is time
            small = arm.trial(radius, FEWEST, d_model, number)
            fitting = clock.n_vectors(small, until - clock.passed)
            if search.done and not fitting:
                break
            n_done = len(search.done)
            yield arm.trial(radius, max(FEWEST, min(n_vectors, fitting)), d_model, number)
            number += 1
            tried.add(arm)
            if len(search.done) > n_done:
                worth[arm] = search.worth(n_done)
                if (beyond := arm.beyond(search.readable(n_done))) and beyond not in chosen:
                    chosen.insert(place + 1, beyond)
                if not n_done:  # now the pace is known: all arms may have a place in the first round
                    n_vectors = max(n_vectors, clock.n_vectors(small, (ends - clock.passed) / len(chosen)))
            else:
                failed.add(arm)
        if not worth:
            return
        arms = [arm for arm in arms if arm not in failed]
        best = sorted(worth, key=worth.__getitem__, reverse=True)
        untried = [arm for arm in arms if arm not in tried]
        # when the halving has come to its end, there is time left for the arms that fell out, with more vectors
        ended = len(best) <= FEWEST_ARMS and not untried
        chosen = list(arms) if ended else best[: max(FEWEST_ARMS, len(best) // 2)] + untried
        n_vectors, share = min(2 * n_vectors, MOST), 1.0
