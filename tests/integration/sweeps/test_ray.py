"""Do Ray's workers give what one process gives, and what does it cost when one of them is lost?"""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

import melbo_lens as ml
from melbo_lens.search.arms import LadderTask
from melbo_lens.studies import reproduction
from melbo_lens.studies.claims import Claim, Experiment, Suite
from melbo_lens.studies.experiments import Score, Size
from melbo_lens.sweeps.engines import OnRay, engine_for
from melbo_lens.sweeps.jobs import jobs_of
from melbo_lens.sweeps.outcomes import TrialTask
from melbo_lens.sweeps.tasks import Task
from tests.integration.sweeps.test_sweep import without_seconds, write_plan

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # other tests share the machine
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


def test_a_lost_worker_costs_one_trial(ray, tmp_path):
    """The trial that was cut off is run again by a new worker, the others are not, and the table is as ever."""
    write_plan(tmp_path, 12)
    jobs, log = jobs_of(yaml.safe_load((tmp_path / "plan.yaml").read_text())), tmp_path / "log"

    class Logged(TrialTask):
        def run(self, bench):
            with log.open("a") as file:
                file.write(f"{self.job.trial.seed} {self.job.trial.radius}\n")
            return super().run(bench)

    def begun():
        return log.read_text().splitlines() if log.exists() else []

    with engine_for(jobs[0].model, tmp_path / "ray", "ray", 1) as workers:
        tasks = [Logged(job) for job in jobs]
        workers.begin(tasks)
        pid = workers.ask(lambda bench: os.getpid())

        def kill():
            while len(begun()) < 5:
                time.sleep(0.005)
            os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        found = [done.value() for done in workers.results(tasks)]
        killer.join()
        assert workers.ask(lambda bench: os.getpid()) != pid
    assert len({one.digest for one in found}) == 12 and all(one.failure is None for one in found)
    assert len(begun()) == 13 and begun()[4] == begun()[5] and len(set(begun())) == 12
    list(ml.sweep(jobs, tmp_path / "here", progress=False))
    pd.testing.assert_frame_equal(
        without_seconds(ml.merge(tmp_path / "ray")), without_seconds(ml.merge(tmp_path / "here"))
    )


def test_a_trial_that_kills_every_worker_fails_and_the_sweep_goes_on(ray, tmp_path):
    write_plan(tmp_path, 2)
    jobs = jobs_of(yaml.safe_load((tmp_path / "plan.yaml").read_text()))

    class Deadly(TrialTask):
        def run(self, bench):
            os.kill(os.getpid(), signal.SIGKILL)

    with engine_for(jobs[0].model, tmp_path / "ray", "ray", 1) as workers:
        tasks = [Deadly(jobs[0]), TrialTask(jobs[1])]
        workers.begin(tasks)
        lost, good = [done.value() for done in workers.run(tasks)]
        assert "its worker was lost 4 times" in lost.failure and good.failure is None
    assert len(ml.status(tmp_path / "ray").failures) == 1


def test_a_lost_measurement_is_an_error_and_not_kept(tmp_path):
    """As Ray would report it, without the minute that it takes to lose four workers."""

    class Lost(Exception):
        pass

    def get(_):
        raise Lost

    engine = object.__new__(OnRay)
    engine.folder, engine.fingerprint = tmp_path, "these weights"
    engine.ray = SimpleNamespace(get=get, exceptions=SimpleNamespace(RayTaskError=KeyError, RayError=Lost))
    done = engine._got(None, LadderTask(("w1",), "[-1]", (0, 2), (0,), 0))
    with pytest.raises(RuntimeError, match=r"its worker was lost 4 times \(Lost\)"):
        done.value()
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_worker_is_the_callers(ray, tmp_path):
    class Broken(Task):
        def name(self, fingerprint):
            return "broken"

        def run(self, bench):
            raise KeyError("a cable")

        def keep(self, result, folder, name):
            raise AssertionError("there is none")

        def kept(self, folder, name):
            return None

    with engine_for("modes", tmp_path / "ray", "ray", 1) as workers:
        workers.begin([Broken()])
        (done,) = workers.run([Broken()])
        with pytest.raises(KeyError, match="a cable"):
            done.value()
        with pytest.raises(ZeroDivisionError):
            workers.ask(lambda bench: 1 / 0)


def test_scans_searches_and_reproductions_give_on_ray_what_they_give_here(ray, tmp_path):
    key, organism = ml.ModelKey("modes"), ml.organisms.load("modes")
    prompt = organism.prompts["clean"][5]
    scan = {"radius": "auto", "n_vectors": 2, "n_steps": 2, "progress": False}
    here = ml.scan_layers(organism.model, prompt, **scan).table
    pd.testing.assert_frame_equal(
        ml.scan_layers(key, prompt, directory=tmp_path / "ray", engine="ray", **scan).table, here
    )
    plan = [ml.Trial(0, 4, 4.0 + i, 4, False, i, 2) for i in range(4)]
    asked = {"plan": plan, "max_new_tokens": 3, "heldout": organism.prompts["selection"][:2], "progress": False}
    one = ml.discover(organism.model, prompt, **asked)
    other = ml.discover(key, prompt, directory=tmp_path / "ray", engine="ray", **asked)
    assert other.plan == one.plan
    pd.testing.assert_frame_equal(other.table, one.table)
    # a search by rounds runs two trials at a time, and what it kept goes on here
    asked = {"max_new_tokens": 3, "seed": 2, "directory": tmp_path / "ray", "progress": False}
    found = ml.discover(key, prompt, 8.0, engine="ray", **asked)
    assert len(found.plan) >= 3 and found.settings["seconds"] < 1.5 * 8
    again = ml.discover(organism.model, prompt, 8.0, **asked)
    assert again.plan[: len(found.plan)] == found.plan

    def count(organism, seed, size):
        return {"quick": Score(seed, len(organism.prompts["clean"]), 0.25)}

    claim = Claim("quick", "quick", "hits", "", "two", lambda scores: True)
    suite = Suite((Experiment("quick", "modes", count),), (claim,), (1, 2), Size())
    rows = [
        reproduction.reproduce(suite=suite, progress=False, **more)["rows"][0]["scores"]
        for more in ({}, {"directory": tmp_path / "reproduced", "engine": "ray"})
    ]
    assert repr(rows[0]) == repr(rows[1])  # there is NaN among them


def test_a_folder_of_another_model_is_refused_on_ray_too(ray, tmp_path):
    write_plan(tmp_path, 2)
    said = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    list(ml.sweep(jobs_of(said)[:1], tmp_path / "out", progress=False))
    with pytest.raises(ValueError, match="with other weights"):
        ml.sweep(jobs_of({**said, "model": "modes-twin"}), tmp_path / "out", "ray", n_workers=1, progress=False)
    # its workers were let go, so that there is room for others
    with engine_for("modes", tmp_path / "out", "ray", 2) as workers:
        assert workers.n_at_once == 2 and workers.check_folder()
