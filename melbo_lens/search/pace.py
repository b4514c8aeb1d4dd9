"""How long will a trial take?  As long as the last one of its kind, by its vectors, steps, blocks and completions."""

import time
from dataclasses import dataclass, field

from melbo_lens.search.arms import N_STEPS
from melbo_lens.sweeps.running import LEARNED_PER_RANDOM
from melbo_lens.sweeps.trials import AnyTrial

FEWEST, FIRST, MOST = 4, 16, 64  # the vectors of a trial: at the least, in the first round, and at the most
MARGIN = 1.2  # a trial is begun if so many times its expected duration is left
USUAL_STEPS = 40  # of a trial that doesn't say, for "power" settles by itself
GUESS, USUAL_TOKENS = 6.0, 16  # the first trial, if it writes so many tokens, lasts so many rungs of the calibration


@dataclass
class Pace:
    """The time that is left, and the seconds that parts of a trial were seen to take.

    Attributes:
        seconds: the time that a search may take.
        n_prompts: the number of prompts of each trial.
        began: when it began.
        per_step: by method, seconds of a fit for each vector, step and block between.
        per_row: seconds of writing and judging for each completion.
        whole: before any trial was timed, the expected seconds of one of `FIRST` vectors that makes `N_STEPS` steps.
        spent: the seconds that the search took before it was stopped, if it goes on.
    """

    seconds: float
    n_prompts: int
    began: float = field(default_factory=lambda: time.monotonic())
    per_step: dict[str, float] = field(default_factory=dict)
    per_row: float = 0.0
    whole: float = 0.0
    spent: float = 0.0

    @property
    def passed(self) -> float:
        return self.spent + time.monotonic() - self.began

    @property
    def left(self) -> float:
        return self.seconds - self.passed

    def expected(self, trial: AnyTrial) -> float:
        """Returns the seconds that a trial is expected to take."""
        if not self.per_row:
            return self.whole * trial.n_vectors / FIRST * max(_steps(trial) / (1 + N_STEPS), 1.0)
        per_step = self.per_step.get(trial.method, max(self.per_step.values(), default=0.0))
        return trial.n_vectors * (per_step * _work(trial) + self.per_row * _rows(1, self.n_prompts))

    def n_vectors(self, trial: AnyTrial, seconds: float) -> int:
        """Returns how many vectors fit into so many seconds, at most `MOST`; 0 if not even `FEWEST` do."""
        each = MARGIN * self.expected(trial) / trial.n_vectors
        if not each:
            return FEWEST
        fitting = int(seconds / each)
        return min(fitting, MOST) if fitting >= FEWEST else 0

    def learn(self, trial: AnyTrial, fit: float, writing: float) -> None:
        """Takes note of how long a trial took, its fit and its writing apart."""
        self.per_step[trial.method] = fit / trial.n_vectors / _work(trial)
        self.per_row = writing / _rows(trial.n_vectors, self.n_prompts)


def _work(trial: AnyTrial) -> int:
    return _steps(trial) * (trial.target_layer - trial.source_layer)


def _steps(trial: AnyTrial) -> int:
    """Returns how often a fit evaluates its vectors."""
    return 1 + (trial.n_steps if trial.n_steps is not None else USUAL_STEPS)


def _rows(n_vectors: int, n_prompts: int) -> float:
    return 2 * n_prompts * n_vectors * (1 + 1 / LEARNED_PER_RANDOM)
