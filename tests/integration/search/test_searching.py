"""Does a search that was stopped go on as if it had not been, and do several trials at a time keep to its rounds?

Most tests run on a clock that trials alone move, so that what a search decides doesn't depend on the machine.
"""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

import melbo_lens as ml
from melbo_lens.cli import app
from melbo_lens.generation.completions import COLUMNS, Completions
from melbo_lens.search import discovering, pace
from melbo_lens.search.arms import Arm, arms_of
from melbo_lens.search.rounds import Rounds
from melbo_lens.sweeps import outcomes, running
from melbo_lens.sweeps.engines import Done, InMemory
from melbo_lens.sweeps.jobs import Job

pytestmark = pytest.mark.long

PER_STEP, PER_VECTOR = 0.025, 0.125  # seconds of a fit for each vector, step and block; of the rest for each vector


@pytest.fixture(scope="module")
def organism():
    return ml.organisms.load("modes")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still, but for about 10 s in a trial; it knows what ran, and may stop the search."""
    clock = SimpleNamespace(now=0.0, ran=[], ended=[], stop_at=None)

    def perform(trial, *more):
        if clock.stop_at == len(clock.ran):
            clock.stop_at = None
            raise KeyboardInterrupt
        clock.ran.append(trial)
        done = running.perform(trial, *more)
        steps = (trial.n_steps + 1) * (trial.target_layer - trial.source_layer)
        seconds = {"fitting": PER_STEP * steps * trial.n_vectors, "writing": PER_VECTOR * trial.n_vectors}
        clock.now += sum(seconds.values())
        clock.ended.append(clock.now)
        return done._replace(**seconds)

    monkeypatch.setattr(outcomes, "perform", perform)
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def search(organism, folder=None, budget=90.0, **settings):
    asked = {"max_new_tokens": 4, "seed": 3, "progress": False, "directory": folder} | settings
    return ml.discover(organism.model, organism.prompts["clean"][5], budget, **asked)


def arm(trial):
    return trial.source_layer, trial.target_layer, trial.radius, trial.method


def same(one, other):
    assert one.plan == other.plan and dict(one.settings) == dict(other.settings) and one.shares == other.shares
    pd.testing.assert_frame_equal(one.table, other.table)
    pd.testing.assert_frame_equal(one.rows, other.rows)
    for a, b in zip(one.completions, other.completions, strict=True):
        pd.testing.assert_frame_equal(a.table, b.table)


def test_a_folder_changes_nothing_and_the_next_call_runs_nothing(organism, clock, tmp_path):
    heldout = organism.prompts["selection"][:3]
    plain = search(organism, heldout=heldout)
    n = len(clock.ran)
    assert n >= 6 and len({(trial.source_layer, trial.radius) for trial in clock.ran}) >= 3
    clock.now = 0.0
    kept = search(organism, tmp_path, heldout=heldout)
    same(kept, plain)
    assert clock.ran[n:] == clock.ran[:n] and ml.status(tmp_path).n_done == ml.status(tmp_path).n_asked == n + 1
    assert len(ml.merge(tmp_path)) == n
    clock.now = 0.0
    same(search(organism, tmp_path, heldout=heldout), plain)
    assert len(clock.ran) == 2 * n


@pytest.mark.parametrize("stop_at", [0, 1, 5])
def test_a_search_that_was_stopped_ends_as_one_that_was_not(organism, clock, tmp_path, stop_at):
    plain = search(organism)
    n = len(clock.ran)
    clock.now, clock.ran, clock.stop_at = 0.0, [], stop_at
    with pytest.raises(KeyboardInterrupt):
        search(organism, tmp_path)
    assert len(clock.ran) == stop_at
    clock.now = 1000.0  # the time in between is not the search's
    same(search(organism, tmp_path), plain)
    assert clock.ran == list(plain.plan) and len(clock.ran) == n


def test_a_search_in_memory_that_is_interrupted_returns_the_trials_that_were_over(organism, clock):
    heldout = organism.prompts["selection"][:2]
    plain = search(organism, heldout=heldout)
    clock.now, clock.ran, clock.stop_at = 0.0, [], 5
    with pytest.warns(UserWarning, match=r"interrupted after \d+ seconds: .* trials that were over \(5\)"):
        found = search(organism, heldout=heldout)
    assert found.plan == plain.plan[:5] and found.settings["interrupted"] and not plain.settings["interrupted"]
    assert found.table.heldout_rate.isna().all()  # whoever stops a search doesn't wait for more
    pd.testing.assert_frame_equal(
        found.rows[["trial", "vector", "text"]], plain.rows[plain.rows.trial < 5][["trial", "vector", "text"]]
    )


def test_a_plan_that_is_interrupted_returns_the_trials_that_were_over(organism, clock):
    plan = [ml.Trial(0, 4, 4.0 + i, 4, False, i, 2) for i in range(3)]
    clock.stop_at = 2
    with pytest.warns(UserWarning, match="interrupted"):
        assert search(organism, plan=plan).plan == tuple(plan[:2])


def test_held_out_prompts_that_are_interrupted_cost_no_group(organism, clock, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(discovering, "heldout_rate", interrupted)
    with pytest.warns(UserWarning, match="interrupted"):
        found = search(organism, heldout=organism.prompts["selection"][:2])
    assert len(found.table) and found.settings["interrupted"] and found.table.heldout_rate.isna().all()


def test_an_interrupt_before_the_first_trial_is_over_is_raised(organism, clock):
    clock.stop_at = 0
    with pytest.raises(KeyboardInterrupt):
        search(organism)


def test_the_seconds_before_the_stop_count(organism, clock, tmp_path):
    clock.stop_at = 6
    with pytest.raises(KeyboardInterrupt):
        search(organism, tmp_path)
    (path,) = tmp_path.glob("search-*.json")
    assert json.loads(path.read_text())["spent"] == clock.ended[5]
    found = search(organism, tmp_path)
    assert found.settings["seconds"] == round(clock.now, 1) <= 90
    assert found.settings["trials_ended"] == [round(seconds, 1) for seconds in clock.ended]


def test_with_a_larger_budget_an_ended_search_goes_on(organism, clock, tmp_path):
    first = search(organism, tmp_path, 50.0)
    more = search(organism, tmp_path, 110.0)
    n = len(first.plan)
    assert more.plan[:n] == first.plan and len(more.plan) > n and len(clock.ran) == len(more.plan)
    assert more.settings["seconds"] > first.settings["seconds"] and max(more.settings["trials_ended"]) <= 110
    # the next round has the better half of the arms, with twice as many vectors from other starts
    assert len({trial.seed for trial in more.plan}) == len(more.plan)


def test_a_search_of_something_else_has_a_state_of_its_own(organism, clock, tmp_path):
    search(organism, tmp_path, 50.0)
    for change in ({"seed": 4}, {"methods": ["soft"]}, {"max_new_tokens": 3}, {"target_positions": [-2]}):
        before = len(clock.ran)
        search(organism, tmp_path, 50.0, **change)
        assert len(clock.ran) > before
    assert len(list(tmp_path.glob("search-*.json"))) == 5
    # what is the same trial in both is not run twice
    before = len(clock.ran)
    ml.discover(
        organism.model, organism.prompts["clean"][5], plan=clock.ran[:2], max_new_tokens=4, progress=False,
        directory=tmp_path,
    )  # fmt: skip
    assert len(clock.ran) == before


def test_a_trial_whose_file_is_gone_is_run_again_and_a_damaged_state_is_named(organism, clock, tmp_path):
    first = search(organism, tmp_path, 60.0)
    n = len(clock.ran)
    gone = sorted(tmp_path.glob("*.safetensors"))[0]
    gone.unlink()
    again = search(organism, tmp_path, 60.0)
    assert again.plan == first.plan and len(clock.ran) == n + 1 and gone.exists()
    pd.testing.assert_frame_equal(again.table, first.table)
    (path,) = tmp_path.glob("search-*.json")
    for text in ("{", "{}", '{"spent": 1, "pace": {}, "rounds": {"arms": [[1]]}, "over": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path.name} is damaged"):
            search(organism, tmp_path, 60.0)


def test_a_trial_that_fails_is_left_out_and_its_arm_is_not_tried_again(organism, clock, tmp_path, monkeypatch):
    stubbed = outcomes.perform
    bad = set()

    def perform(trial, *more):
        if not bad or arm(trial) in bad:
            bad.add(arm(trial))
            clock.now += 1.0
            raise RuntimeError("a cable was loose")
        return stubbed(trial, *more)

    monkeypatch.setattr(outcomes, "perform", perform)
    with pytest.warns(UserWarning, match="Trial.* is left out: a cable was loose"):
        found = search(organism, tmp_path)
    assert not bad & set(map(arm, found.plan))
    assert len(ml.status(tmp_path).failures) == 1
    bad.clear()
    with pytest.raises(RuntimeError, match="a cable"):  # without a folder it ends the search, as any surprise
        search(organism)


def test_a_search_whose_trials_all_failed_says_why_when_it_is_asked_again(organism, clock, tmp_path, monkeypatch):
    def perform(trial, *more):
        clock.now += 100.0
        raise ValueError("a cable was loose")

    monkeypatch.setattr(outcomes, "perform", perform)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match="no trial could be completed: a cable was loose"):
                search(organism, tmp_path, 60.0)


def test_if_every_trial_fails_the_error_of_the_last_is_raised(organism, tmp_path):
    plan = [ml.Trial(0, 99, 2.0, 2, False, 0, 2)]
    for folder in (None, tmp_path, tmp_path):
        with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="target_layer=99"):
            search(organism, folder, plan=plan)


class Several(InMemory):
    """Begins so many tasks before the first of them ends, the longest one last."""

    n_at_once = 3

    def run(self, tasks):
        waiting, held = iter(tasks), deque()
        self.at_once = getattr(self, "at_once", [])
        while True:
            while len(held) < self.n_at_once and (task := next(waiting, None)) is not None:
                held.append(task)
            if not held:
                return
            self.at_once.append(len(held))
            task = held.popleft() if len(self.at_once) % 2 else held.pop()  # in another order than they began
            yield Done(task, task.run(self.bench))


def test_several_trials_at_a_time_fill_the_rounds_of_a_search(organism, clock, monkeypatch):
    made = []

    def several(model, *_):
        made.append(Several(model))
        return made[-1]

    monkeypatch.setattr(discovering, "engine_for", several)
    # three workers: a third of each trial's seconds pass
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: clock.now / 3))
    found = search(organism, budget=100.0)
    assert max(made[0].at_once) == 3 and clock.now > 200 and found.settings["seconds"] <= 100
    # their order is that in which they were begun, whatever ended first
    assert [trial.seed for trial in found.plan] == sorted(trial.seed for trial in found.plan)
    assert [trial.seed for trial in found.plan] != [trial.seed for trial in clock.ran]
    # the first round has each arm once; the better half comes next
    first = found.plan[: len(arms_of(4))]
    assert len(set(map(arm, first))) == len(first)


def test_rounds_come_back_from_json_with_trials_that_were_begun():
    arms = arms_of(12, ["melbo", "cpe"])
    rounds = Rounds(list(arms), list(arms), 7000)
    clock = pace.Pace(100.0, 1, began=time.monotonic(), whole=1.0)
    begun = [next(rounds.trials(clock, lambda arm, n, number: arm.trial(2.0, n, 64, number))) for _ in range(1)]
    rounds.worth[arms[3]] = 0.25
    rounds.tried.append(Arm(1, 2, 3.5, "soft"))
    again = Rounds.of_json(json.loads(json.dumps(rounds.as_json())))
    assert again == rounds
    trials = again.trials(clock, lambda arm, n, number: arm.trial(2.0, n, 64, number))
    assert next(trials) == begun[0] and next(trials) != begun[0]


def test_with_several_workers_a_round_has_time_for_larger_trials():
    def after_the_first(n_at_once):
        arms = arms_of(12)
        rounds, clock = Rounds(list(arms), list(arms), 0), pace.Pace(1000.0, 1)
        make = lambda arm, n, number: arm.trial(2.0, n, 64, number)  # noqa: E731
        trial = next(rounds.trials(clock, make))
        clock.learn(trial, 4.0, 1.0)
        table = pd.DataFrame(columns=COLUMNS, index=[0]).assign(kind="steered", text="x")
        judged = pd.DataFrame({"change": ["wording"], "new_words": [0.5], "surprise": [2.0], "natural": [-1.0]})
        job = Job(trial, ("x",), model=None)
        outcome = outcomes.Outcome(job, job.digest("weights"), None, Completions(table), judged, 25.0)
        rounds.over(trial, outcome, clock, make, n_at_once)
        return rounds.n_vectors

    alone, three = after_the_first(1), after_the_first(3)
    assert 16 <= alone < three <= 64 and three == pytest.approx(min(3 * alone, 64), abs=3)


def test_other_held_out_prompts_are_written_on_anew(organism, clock, tmp_path):
    plan = [ml.Trial(0, 4, 12.0, 6, False, 0, 4)]
    rates = [
        search(organism, folder, plan=plan, heldout=organism.prompts["selection"][some], max_new_tokens=8).table
        for some in (slice(0, 3), slice(3, 9))
        for folder in (None, tmp_path, tmp_path)
    ]
    assert rates[0].heldout_rate.notna().all()
    for plain, *kept in (rates[:3], rates[3:]):
        assert all(one.equals(plain) for one in kept)
    assert not rates[0].equals(rates[3]) and len(list(tmp_path.glob("*-heldout.json"))) == 2 * (len(rates[0]) + 1)


def test_a_plan_in_a_folder_gives_the_table_that_it_gives_without_whoever_stopped_it(organism, clock, tmp_path):
    plan = [ml.Trial(0, 4, 4.0 + i, 4, False, i, 2) for i in range(4)] + [
        ml.CpeTrial(0, 4, 3, 1, n_layers=2, n_steps=2)
    ]
    ids = organism.model.to_tokens(organism.prompts["clean"][5])
    settings = {"max_new_tokens": 3, "progress": False, "plan": plan, "behaviors": organism.behaviors}
    plain = ml.discover(organism.model, ids, **settings)
    clock.ran, clock.stop_at = [], 3
    with pytest.raises(KeyboardInterrupt):
        ml.discover(organism.model, ids, directory=tmp_path, **settings)
    found = ml.discover(organism.model, ids, directory=tmp_path, **settings)
    assert clock.ran == plan and found.plan == plain.plan
    pd.testing.assert_frame_equal(found.table, plain.table)
    pd.testing.assert_frame_equal(found.rows, plain.rows)


CODE = """
import sys, melbo_lens as ml
organism = ml.organisms.load("modes")
ml.discover(organism.model, organism.prompts["clean"][5], 12.0, max_new_tokens=4, seed=3, progress=False,
            directory=sys.argv[1])
"""


@pytest.mark.timeout(300)
def test_a_search_whose_process_is_killed_goes_on_with_what_is_finished(organism, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", CODE, str(tmp_path)], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob("*.safetensors"))) < 3:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (path,) = tmp_path.glob("search-*.json")
    state = json.loads(path.read_text())
    before = {one.job.trial for one in map(ml.Outcome.load, tmp_path.glob("*.safetensors"))}
    began = time.monotonic()
    found = search(organism, tmp_path, 12.0)
    assert len(before) >= 3 and before <= set(found.plan)
    # what was spent before is not there again: with the trial that was cut off, the budget is kept
    assert time.monotonic() - began < 1.3 * 12 - state["spent"] + 5
    assert found.settings["seconds"] >= state["spent"]


def test_the_command_goes_on_in_its_folder(organism, tmp_path):
    text = organism.prompts["clean"][5]
    asked = ["discover", "--model", "modes", "--prompt", text, "--budget", "4", "--out", str(tmp_path / "out")]
    asked += ["--directory", str(tmp_path / "trials")]
    for _ in range(2):
        result = CliRunner().invoke(app, asked)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "groups.csv").is_file() and len(list((tmp_path / "trials").glob("search-*.json"))) == 1
    assert yaml.safe_load((tmp_path / "trials" / "model.json").read_text())["fingerprint"]
