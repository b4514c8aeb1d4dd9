"""Which trial is run next?  Small ones everywhere first, then larger ones where something came (successive halving)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from melbo_lens.search.arms import Arm
from melbo_lens.search.groups import promise
from melbo_lens.search.pace import FEWEST, FIRST, MOST, Pace
from melbo_lens.sweeps.outcomes import Outcome
from melbo_lens.sweeps.trials import AnyTrial, trial_as, trial_from

SHARE_OF_FIRST_ROUND = 0.5  # of the time that is left after the edge was found
FEWEST_ARMS = 2  # so many arms go into every later round

Make: TypeAlias = Callable[[Arm, int, int], AnyTrial]  # an arm, the number of vectors and the trial's number -> a trial


@dataclass
class Rounds:
    """Where a search is in its rounds.

    Attributes:
        arms: those that are still worth a trial, the most promising first.
        chosen: those of this round, which may grow on the way.
        number: the number of the next trial, which is its seed.
        place: how many of the chosen arms had their turn.
        n_vectors: how many vectors a trial of this round has, if the time allows.
        share: which share of the time that is left this round may take.
        ends: the second at which this round ends; None before its first trial.
        worth: the score of each arm that was tried in this round.
        tried, failed: the arms that were ever tried, and those whose trial failed.
        running: the trials that were begun and are not over, with their arms.
        any_done: whether any trial succeeded.
    """

    arms: list[Arm]
    chosen: list[Arm]
    number: int
    place: int = 0
    n_vectors: int = FIRST
    share: float = SHARE_OF_FIRST_ROUND
    ends: float | None = None
    worth: dict[Arm, float] = field(default_factory=dict)
    tried: list[Arm] = field(default_factory=list)
    failed: list[Arm] = field(default_factory=list)
    running: list[tuple[Arm, AnyTrial]] = field(default_factory=list)
    any_done: bool = False

    def trials(self, clock: Pace, make: Make) -> Iterator[AnyTrial]:
        """Yields the trials of this round, as long as there is time for one more when it is asked for.

        Trials that were begun before the search was stopped come first.
        """
        yield from [trial for _, trial in self.running]
        while self.place < len(self.chosen):
            arm = self.chosen[self.place]
            ends = clock.passed + self.share * clock.left if self.ends is None else self.ends
            # a later round has one trial, if there is time for it
            until = clock.seconds if self.any_done and not (self.worth or self.running) else ends
            fitting = clock.n_vectors(make(arm, FEWEST, self.number), until - clock.passed)
            if self.failed and not self.any_done and clock.left <= 0:
                return
            if self.any_done and not fitting:  # another method or nearer layers may take less
                self.place += 1
                continue
            trial = make(arm, max(FEWEST, min(self.n_vectors, fitting)), self.number)
            self.ends = ends
            self.place += 1
            self.number += 1
            self.tried += [] if arm in self.tried else [arm]
            self.running.append((arm, trial))
            yield trial

    def over(self, trial: AnyTrial, outcome: Outcome | None, clock: Pace, make: Make, n_at_once: int) -> None:
        """Takes note of a trial that is over; without an outcome, its arm is not tried again."""
        place = next(i for i, (_, other) in enumerate(self.running) if other == trial)
        arm, _ = self.running.pop(place)
        if outcome is None:
            self.failed.append(arm)
            return
        self.worth[arm] = worth(outcome)
        beyond = arm.beyond(readable(outcome))
        if beyond is not None and beyond not in [*self.chosen, *self.failed]:
            self.chosen.insert(max(self.chosen.index(arm) + 1, self.place), beyond)
            self.arms += [] if beyond in self.arms else [beyond]
        if not self.any_done:  # now the pace is known: all arms may have a place in the first round
            assert self.ends is not None  # the round has a trial
            each = n_at_once * (self.ends - clock.passed) / len(self.chosen)
            self.n_vectors = max(self.n_vectors, clock.n_vectors(make(arm, FEWEST, self.number), each))
            self.any_done = True

    def next(self) -> bool:
        """Goes on to the next round, with twice as many vectors; says whether there is one."""
        if not self.worth:
            return False
        self.arms = [arm for arm in self.arms if arm not in self.failed]
        best = sorted(self.worth, key=self.worth.__getitem__, reverse=True)
        untried = [arm for arm in self.arms if arm not in self.tried]
        # when the halving has come to its end, there is time left for the arms that fell out, with more vectors
        ended = len(best) <= FEWEST_ARMS and not untried
        self.chosen = list(self.arms) if ended else best[: max(FEWEST_ARMS, len(best) // 2)] + untried
        self.n_vectors, self.share = min(2 * self.n_vectors, MOST), 1.0
        self.place, self.ends, self.worth = 0, None, {}
        return bool(self.chosen)

    def as_json(self) -> dict[str, Any]:
        """Describes where the search is in JSON's types."""
        return {
            **vars(self),
            "worth": list(self.worth.items()),
            "running": [(arm, trial_as(trial)) for arm, trial in self.running],
        }

    @classmethod
    def of_json(cls, said: Mapping[str, Any]) -> "Rounds":
        """Makes what `as_json` described.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        arms = {name: [Arm(*arm) for arm in said[name]] for name in ("arms", "chosen", "tried", "failed")}
        return cls(
            **{
                **said,
                **arms,
                "worth": {Arm(*arm): float(score) for arm, score in said["worth"]},
                "running": [(Arm(*arm), trial_from(trial)) for arm, trial in said["running"]],
            }
        )


def readable(outcome: Outcome) -> float:
    """Returns the share of a trial's completions under learned vectors that are not noise."""
    assert outcome.completions is not None and outcome.judged is not None  # it succeeded
    steered = (outcome.completions.table.kind == "steered").to_numpy()
    return float((outcome.judged.change[steered] != "noise").mean())


def worth(outcome: Outcome) -> float:
    """Scores a trial: the promise of its different texts, over the number of its completions.

    A text that many vectors elicit counts once, since more of it is not what a search is for.
    """
    assert outcome.completions is not None and outcome.judged is not None  # it succeeded
    table, judged = outcome.completions.table, outcome.judged
    steered = table.kind == "steered"
    first = steered & ~table[steered].text.duplicated().reindex(table.index, fill_value=True)
    return float(promise(judged[first]).sum() / steered.sum())
