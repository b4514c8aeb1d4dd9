"""Does a search spend its time on trials that fit into it, whatever one method takes and whichever trials fail?"""

import pandas as pd
import pytest

from melbo_lens.generation.completions import COLUMNS, Completions
from melbo_lens.search.arms import Arm, arms_of
from melbo_lens.search.pace import Pace
from melbo_lens.search.rounds import Rounds
from melbo_lens.sweeps.jobs import Job
from melbo_lens.sweeps.outcomes import Outcome


def make(arm, n_vectors, number):
    return arm.trial(2.0, n_vectors, 64, number)


def outcome(trial, change="wording"):
    table = pd.DataFrame(columns=COLUMNS, index=[0]).assign(kind="steered", text="x")
    judged = pd.DataFrame({"change": [change], "new_words": [0.5], "surprise": [2.0], "natural": [-1.0]})
    job = Job(trial, ("x",), model=None)
    return Outcome(job, job.digest("weights"), None, Completions(table), judged, 25.0)


class Clock(Pace):
    """A clock that stands still until it is moved."""

    @property
    def passed(self):
        return self.spent


def begun(methods, seconds, fit=1.0, change="wording"):
    arms = arms_of(12, methods)
    rounds, clock = Rounds(list(arms), list(arms), 0), Clock(seconds, 1, whole=1.0)
    trial = next(rounds.trials(clock, make))
    clock.spent += 2 * fit
    clock.learn(trial, fit, fit)
    rounds.over(trial, outcome(trial, change), clock, make, 1)
    return rounds, clock


def test_a_method_that_takes_too_long_ends_no_round():
    rounds, clock = begun(["melbo", "adamw"], 20.0)
    tried = [trial.method for trial in rounds.trials(clock, make)]
    assert "adamw" not in tried and len(tried) >= 4  # 300 steps don't fit, four steps do


def test_trials_that_all_fail_end_with_the_time():
    arms = arms_of(12)
    rounds, clock = Rounds(list(arms), list(arms), 0), Clock(10.0, 1, whole=1.0)
    n = 0
    for trial in rounds.trials(clock, make):
        n, clock.spent = n + 1, clock.spent + 4.0
        rounds.over(trial, None, clock, make, 1)
    assert n == 3 and not rounds.next()


def test_a_rung_beyond_the_ladder_stays_among_the_arms():
    rounds, _ = begun(["melbo"], 100.0, change="noise")  # most of the highest rung is noise
    highest = max((arm for arm in rounds.arms), key=lambda arm: arm.rung)
    beyond = highest.beyond(1.0)
    trial = make(highest, 8, 1)
    rounds.running.append((highest, trial))
    rounds.over(trial, outcome(trial), Clock(100.0, 1), make, 1)
    assert isinstance(beyond, Arm) and beyond in rounds.chosen and beyond in rounds.arms


def test_a_rung_beyond_the_ladder_that_failed_is_not_tried_again():
    rounds, _ = begun(["melbo"], 100.0)
    highest = max((arm for arm in rounds.arms), key=lambda arm: arm.rung)
    beyond = highest.beyond(1.0)

    def over(arm, outcome_of):
        trial = make(arm, 8, 1)
        rounds.running.append((arm, trial))
        rounds.over(trial, outcome_of(trial), Clock(100.0, 1), make, 1)

    over(highest, outcome)
    assert beyond in rounds.chosen
    over(beyond, lambda trial: None)
    rounds.chosen = [highest]  # a later round
    over(highest, outcome)
    assert rounds.chosen == [highest]


@pytest.mark.parametrize("left", [10.0, 4.0])
def test_the_first_trial_leaves_half_of_the_time_to_others(left):
    arms = arms_of(12)
    clock = Clock(left, 1, whole=4.0)  # 16 vectors are expected to take 4 s
    trial = next(Rounds(list(arms), list(arms), 0).trials(clock, make))
    assert trial.n_vectors == {10.0: 16, 4.0: 6}[left]  # half of the time, with the margin of a fifth
