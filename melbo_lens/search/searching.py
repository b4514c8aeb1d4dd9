"""How does a search take its course?  Trial by trial, or several at a time, and on from where it was stopped."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from melbo_lens import files
from melbo_lens.arguments import plain_json
from melbo_lens.measures.radius import Calibration
from melbo_lens.search.arms import Arm, Ladder, LadderTask, Method, arms_of, ladder_task
from melbo_lens.search.pace import GUESS, USUAL_TOKENS, Pace
from melbo_lens.search.rounds import Rounds
from melbo_lens.sweeps.engines import Done, Engine
from melbo_lens.sweeps.jobs import Job
from melbo_lens.sweeps.outcomes import Outcome, TrialTask
from melbo_lens.sweeps.tasks import Bench, digest
from melbo_lens.sweeps.trials import AnyTrial, trial_as, trial_from

ERRORS = {"ValueError": ValueError, "NoRadius": ValueError, "FloatingPointError": FloatingPointError}  # of one trial


@dataclass
class Search:
    """The trials of a search that are over.

    Attributes:
        workers: where its trials are run.
        prompts: its prompts, as a `Job` has them.
        where: where a change counts, as `positions_text` writes it.
        max_new_tokens: the length of the completions.
        seed: its seed.
        clock: its time.
        edge: the edge of readability, if it was looked for.
        trials: by number, every trial that succeeded, with its outcome and the second at which it ended.
        failure: why the last trial failed that did.
        interrupted: whether the user ended it.
    """

    workers: Engine
    prompts: tuple[Any, ...]
    where: str
    max_new_tokens: int
    seed: int
    clock: Pace = field(init=False)
    edge: Calibration | None = None
    trials: dict[int, tuple[Outcome, float]] = field(default_factory=dict)
    failure: Exception | None = None
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.clock = Pace(float("inf"), len(self.prompts))

    @property
    def outcomes(self) -> list[Outcome]:
        """The outcomes in the order in which their trials were begun.

        Raises:
            FloatingPointError, ValueError, RuntimeError: there is none; it is the error of the last trial.
        """
        if not self.trials:
            kind = next(
                (one for one in (ValueError, RuntimeError) if isinstance(self.failure, one)), FloatingPointError
            )
            raise kind(f"no trial could be completed: {self.failure}") from self.failure
        return [self.trials[number][0] for number in sorted(self.trials)]

    @property
    def ended(self) -> list[float]:
        """The second at which each of them ended."""
        return [self.trials[number][1] for number in sorted(self.trials)]

    def task(self, trial: AnyTrial, number: int) -> TrialTask:
        """Returns the task of a trial; the number says its place in the search."""
        return TrialTask(Job(trial, self.prompts, None, self.where, self.max_new_tokens), number)

    def take(self, done: Done, seconds: float | None = None) -> Outcome | None:
        """Takes note of a trial that is over, and returns its outcome; None if it failed and is left out.

        Args:
            done: the trial.
            seconds: when it ended; None means now.

        Raises:
            Exception: the trial ended with an error that says something of the whole search.
        """
        outcome, error = done.result, done.error
        if error is not None and not isinstance(error, FloatingPointError | ValueError):
            raise error
        if outcome is not None and outcome.failure is not None:
            error = _error(outcome.failure)
        if error is not None:  # of a single trial: what others found is not to be lost
            warnings.warn(f"{done.task.job.trial} is left out: {error}", stacklevel=5)
            self.failure = error
            return None
        assert outcome is not None  # else there is an error
        self.trials[done.task.number] = (outcome, self.clock.passed if seconds is None else seconds)
        return outcome


@contextmanager
def until_interrupted(search: Search) -> Iterator[None]:
    """Ends a search that is in memory alone where the user interrupts it, so that what it found is not lost.

    Raises:
        KeyboardInterrupt: no trial was over, or a folder keeps them all.

    Warns:
        UserWarning: the search was interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        if search.workers.folder is not None or not search.trials:
            raise
        search.interrupted = True
        warnings.warn(
            f"interrupted after {search.clock.passed:.0f} seconds: this is what was found in the trials that were "
            f"over ({len(search.trials)}).",
            stacklevel=5,
        )


class State:
    """What a search keeps beside its trials, when one is begun or over, so that it can go on.

    Args:
        search: the search.
        methods: what it tries in turns.
        first: the task that finds its ladder.
    """

    def __init__(self, search: Search, methods: Sequence[Method], first: LadderTask) -> None:
        self.search, self.path = search, None
        workers = search.workers
        if workers.folder is not None:
            asked = plain_json(search.prompts, "prompts")
            said = [asked, search.where, search.max_new_tokens, search.seed, list(methods), workers.fingerprint]
            self.path = workers.folder / f"search-{digest(said)}.json"
            workers.begin([first], self.path.stem)

    def keep(self, rounds: Rounds) -> None:
        """Writes the state."""
        if self.path is None:
            return
        search, clock = self.search, self.search.clock
        search.workers.begin([search.task(trial, trial.seed) for _, trial in rounds.running], self.path.stem)
        said = {
            "spent": clock.passed,
            "pace": {"per_step": clock.per_step, "per_row": clock.per_row, "whole": clock.whole},
            "rounds": rounds.as_json(),
            "failure": None if search.failure is None else f"{type(search.failure).__name__}: {search.failure}",
            "over": [(n, trial_as(one.job.trial), seconds) for n, (one, seconds) in search.trials.items()],
        }
        files.write_json(self.path, said)

    def resumed(self) -> Rounds | None:
        """Reads the state into the search, with the trials that are over; None if it was never begun.

        Raises:
            ValueError: the file is damaged.
        """
        if self.path is None or not self.path.is_file():
            return None
        search = self.search
        try:
            said = files.read_json(self.path)
            rounds = Rounds.of_json(said["rounds"])
            tasks = [search.task(trial_from(trial), int(number)) for number, trial, _ in said["over"]]
            ended = {int(number): float(seconds) for number, _, seconds in said["over"]}
            failure = said.get("failure")  # an earlier version kept none
            clock = replace(search.clock, spent=float(said["spent"]), **said["pace"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged ({error!r}): delete it, and the search begins anew.") from error
        search.clock, search.failure = clock, None if failure is None else _error(failure)
        for done in search.workers.results(tasks):
            search.take(done, ended[done.task.number])
        return rounds


def as_planned(search: Search, plan: Sequence[AnyTrial], bar: Any) -> None:
    """Runs every trial of a plan."""
    tasks = [search.task(trial, number) for number, trial in enumerate(plan)]
    search.workers.begin(tasks)
    for done in search.workers.results(tasks):
        search.take(done)
        bar.set_postfix_str(f"{len(search.trials)} trials", refresh=False)
        bar.update(round(search.clock.passed) - bar.n)


def in_rounds(search: Search, methods: Sequence[Method], for_edge: float, bar: Any) -> None:
    """Runs rounds of trials until the time is used; a search that was stopped goes on.

    Args:
        search: the search, before its first trial.
        methods: what it tries in turns.
        for_edge: the seconds after which the edge is bisected no further.
        bar: shows the seconds.
    """
    workers = search.workers
    n_layers, d_model = workers.ask(_size)
    arms = arms_of(n_layers, methods)
    first = ladder_task(search.prompts, search.where, arms, search.seed, for_edge)
    state = State(search, methods, first)
    bar.set_postfix_str("the edge of readability", refresh=True)
    (ladder,) = (done.value() for done in workers.results([first]))
    search.edge = ladder.edge
    longer = max(search.max_new_tokens / USUAL_TOKENS, 1.0)
    search.clock.whole = GUESS * longer * ladder.seconds / max(len(ladder.edge.curve), 1)
    rounds = state.resumed() or Rounds(list(arms), list(arms), search.seed * 1000)
    clock, make = search.clock, partial(_made, ladder, d_model)

    def tasks() -> Iterator[TrialTask]:
        for trial in rounds.trials(clock, make):
            state.keep(rounds)
            yield search.task(trial, trial.seed)

    while True:
        for done in workers.run(tasks()):
            outcome = search.take(done)
            if outcome is not None:
                clock.learn(outcome.job.trial, outcome.fitting, outcome.seconds - outcome.fitting)
            rounds.over(done.task.job.trial, outcome, clock, make, workers.n_at_once)
            state.keep(rounds)
            bar.set_postfix_str(f"{len(search.trials)} trials", refresh=False)
            bar.update(round(clock.passed) - bar.n)
        if not rounds.next():
            return


def _error(said: str) -> Exception:
    """The error of which this is kept: its kind and what it said."""
    kind, _, why = said.partition(": ")
    return ERRORS.get(kind, RuntimeError)(why)


def _size(bench: Bench) -> tuple[int, int]:
    return bench.host.n_layers, bench.host.d_model


def _made(ladder: Ladder, d_model: int, arm: Arm, n_vectors: int, number: int) -> AnyTrial:
    return arm.trial(ladder.radius_at_edge(arm.source_layer), n_vectors, d_model, number)
