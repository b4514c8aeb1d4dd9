"""Does a sweep go on where it stopped, whatever stops it, and is each of its trials there once?"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from typer.testing import CliRunner

import melbo_lens as ml
from melbo_lens.cli import app
from melbo_lens.sweeps import engines, outcomes, running, tasks
from melbo_lens.sweeps.jobs import Job, job_from, jobs_of
from melbo_lens.sweeps.outcomes import TrialTask
from melbo_lens.sweeps.sweep import of_shard
from tests.integration.search.test_methods import PLAN

PROMPTS = ["w1 w2 w3 w4", "w5 w6"]
TRIALS = [ml.Trial(0, 3, 2.0, 2, False, seed, 2) for seed in range(3)]


@pytest.fixture
def plan():
    return ml.plan_jobs("somewhere", TRIALS, PROMPTS, max_new_tokens=3)


def run(plan, folder, model, **settings):
    return list(ml.sweep(plan, folder, model=model, progress=False, **settings))


def without_seconds(table):
    return table.drop(columns="seconds").sort_values("digest").reset_index(drop=True)


@pytest.mark.parametrize("trial", PLAN, ids=lambda trial: trial.method)
def test_a_job_is_plain_json_and_comes_back_from_it(trial):
    (job,) = ml.plan_jobs("modes", [trial], [[{"role": "user", "content": "w1"}]])
    assert job_from(json.loads(json.dumps(job.as_json()))) == job


def test_the_digest_changes_with_all_that_changes_the_result_and_with_nothing_else():
    job = Job(TRIALS[0], ("w1",), ml.ModelKey("somewhere"))
    others = [
        replace(job, trial=replace(job.trial, **{name: value}))
        for name, value in {
            "source_layer": 1, "target_layer": 4, "radius": 3.0, "n_vectors": 3, "orthogonal": True, "seed": 9,
            "n_steps": 3, "optimizer": "adamw",
        }.items()
    ]  # fmt: skip
    others += [
        replace(job, prompts=("w2",)),
        replace(job, prompts=("w1", "w2")),
        replace(job, target_positions="[0]"),
        replace(job, max_new_tokens=5),
        replace(job, model=ml.ModelKey("somewhere", "bfloat16")),
        replace(job, trial=ml.NoiseTrial(0, 3, 2.0, 2, 0)),
    ]
    digests = {one.digest("these weights") for one in others} | {job.digest("these weights"), job.digest("others")}
    assert len(digests) == len(others) + 2
    assert replace(job, model=ml.ModelKey("elsewhere", device="cuda")).digest("a") == job.digest("a")


def test_a_sweep_yields_what_each_trial_gives_and_its_folder_makes_a_table(plan, model, tmp_path):
    found = run(plan, tmp_path, model)
    assert [one.job for one in found] == plan and all(one.failure is None for one in found)
    again = ml.Outcome.load(tmp_path / f"{found[1].digest}.safetensors")
    expected = ml.fit_vectors(
        model, PROMPTS[0], 0, 3, n_vectors=2, radius=2.0, orthogonal=False, n_steps=2, seed=1, progress=False,
        target_positions=slice(-1, None),
    )  # fmt: skip
    torch.testing.assert_close(again.learned.values, expected.values)
    written = ml.generate(model, PROMPTS[0], expected, 3, include_random=2, seed=1, progress=False)
    assert again.completions.table.text.tolist() == written.table.text.tolist()
    table = ml.merge(tmp_path)
    assert len(table) == 6 and table.digest.is_unique and set(table.method) == {"melbo"}
    assert (table[["nothing", "wording", "content", "noise"]].sum(axis=1) == 1).all()
    said = ml.status(tmp_path)
    assert (said.n_done, said.n_asked, said.failures, said.seconds_left) == (6, 6, {}, 0.0)


def test_what_is_done_is_not_done_again(plan, model, tmp_path, monkeypatch):
    run(plan[:4], tmp_path, model)
    ran = []
    monkeypatch.setattr(outcomes, "perform", lambda *a: ran.append(a[0]) or running.perform(*a))
    found = run(plan, tmp_path, model)
    assert ran == [job.trial for job in plan[4:]] and [one.job for one in found] == plan
    assert run(plan, tmp_path, model)[0].learned.values.shape == (2, model.cfg.d_model) and len(ran) == 2


def test_what_another_process_did_meanwhile_is_not_done_again(plan, model, tmp_path, monkeypatch):
    run(plan[:1], tmp_path, model)
    monkeypatch.setattr(outcomes, "perform", lambda *_: pytest.fail("it ran again"))
    assert engines.Worker(model, tmp_path).run(TrialTask(plan[0]))


def test_where_there_is_no_memory_for_a_slice_the_trial_fails_and_the_sweep_goes_on(plan, model, tmp_path, monkeypatch):
    real = tasks.slice_model

    def hungry(host, prompts, *settings):
        if prompts == [PROMPTS[0]]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(host, prompts, *settings)

    monkeypatch.setattr(tasks, "slice_model", hungry)
    found = run(plan, tmp_path, model)
    assert [one.failure is None for one in found] == [False] * 3 + [True] * 3


def test_a_result_that_another_process_finishes_meanwhile_stays(plan, model, tmp_path):
    """It is finished between the look at what is there and the run."""
    found = ml.sweep(plan[:2], tmp_path, model=model, progress=False)
    first = next(found)  # by now this sweep knows the second as missing
    (other,) = run(plan[1:2], tmp_path, model)
    path = tmp_path / f"{other.digest}.safetensors"
    written = path.stat().st_mtime_ns
    assert next(found).digest == other.digest != first.digest and path.stat().st_mtime_ns == written


def test_nothing_runs_until_it_is_asked_for(plan, model, tmp_path):
    found = ml.sweep(plan, tmp_path, model=model, progress=False)
    assert not list(tmp_path.glob("*.safetensors"))
    next(found)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert ml.status(tmp_path).n_asked == 6


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"{}" * 99])
def test_a_damaged_file_is_named_and_its_trial_is_run_again(plan, model, tmp_path, damage):
    found = run(plan[:2], tmp_path, model)
    path = tmp_path / f"{found[0].digest}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=path.name):
        assert len(ml.merge(tmp_path)) == 1
    with pytest.warns(UserWarning, match=path.name):
        again = run(plan[:2], tmp_path, model)
    torch.testing.assert_close(
        {one.digest: one for one in again}[found[0].digest].learned.values, found[0].learned.values
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ml.merge(tmp_path)) == 2


def test_a_folder_of_another_model_is_refused(plan, build, tmp_path):
    run(plan[:1], tmp_path, build("gpt2", "bridge"))
    with pytest.raises(ValueError, match=r"holds results of .* with other weights"):
        run(plan[:1], tmp_path, build("llama", "bridge"))


def test_a_trial_that_fails_is_a_row_with_its_reason_and_the_sweep_goes_on(plan, model, tmp_path):
    bad = ml.plan_jobs("somewhere", [ml.Trial(0, 99, 2.0, 2, False, 0, 2)], PROMPTS[:1], max_new_tokens=3)
    found = run([*bad, *plan], tmp_path, model)
    assert len(found) == 7 and "target_layer=99" in found[0].failure and found[1].failure is None
    table = ml.merge(tmp_path)
    assert table.failure.notna().sum() == 1 and list(ml.status(tmp_path).failures) == [found[0].digest]
    again = run([*bad, *plan], tmp_path, model)  # it isn't tried again unless that is asked for
    assert again[0].failure == found[0].failure


def test_a_trial_that_failed_is_run_again_if_asked_for(plan, model, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("a cable was loose")

    monkeypatch.setattr(outcomes, "perform", broken)
    assert run(plan[:2], tmp_path, model)[0].failure == "RuntimeError: a cable was loose"
    monkeypatch.undo()
    assert run(plan[:2], tmp_path, model)[0].failure is not None
    assert [one.failure for one in run(plan[:2], tmp_path, model, retry=True)] == [None, None]
    assert ml.merge(tmp_path).failure.isna().all() and not list(tmp_path.glob("*.failed.json"))


def test_a_job_of_a_model_in_the_callers_hands_needs_that_model(plan, model, tmp_path):
    jobs = [replace(job, model=None) for job in plan[:2]]
    with pytest.raises(ValueError, match="name none: give it as model"):
        ml.sweep(jobs, tmp_path)
    assert job_from(json.loads(json.dumps(jobs[0].as_json()))) == jobs[0]
    found = run(jobs, tmp_path, model)
    assert [one.job for one in map(ml.Outcome.load, tmp_path.glob("*.safetensors"))] and len(found) == 2
    assert len({*(one.digest for one in found), *(one.digest for one in run(plan[:2], tmp_path, model))}) == 4


def test_token_ids_are_prompts_of_a_job(model, tmp_path):
    ids = [{"ids": [1, 5, 6], "text": "a"}, {"ids": [1, 7], "text": "b"}]
    jobs = ml.plan_jobs("somewhere", TRIALS[:1], ids, together=True, max_new_tokens=3)
    (found,) = run(jobs, tmp_path, model)
    assert found.completions.prompt_tokens[:2] == ((1, 5, 6), (1, 7))
    assert found.learned.provenance["prompt_tokens"] == [[1, 5, 6], [1, 7]]


def test_a_bench_keeps_the_last_slices_as_far_as_they_are_small(model, monkeypatch):
    made, real = [], tasks.slice_model
    monkeypatch.setattr(tasks, "slice_model", lambda *a: made.append(a[2:4]) or real(*a))
    bench = tasks.Bench(model)
    for target in (3, 4, 3, 4):
        assert bench.slice(("w1 w2",), 0, target, "[-1]").target_layer == target
    assert made == [(0, 3), (0, 4)]
    assert bench.slice(("w1 w2",), 0, 3, None).batch.target_mask.sum() == 3  # BOS and two words
    one = tasks._n_bytes(bench.slice(("w1 w2",), 0, 3, "[-1]"))
    made.clear()
    monkeypatch.setattr(tasks, "KEPT_BYTES", 1.6 * one)
    for source in (0, 1, 0, 2, 0, 1):
        bench.slice(("w1 w2",), source, source + 2, "[-1]")
    assert made == [(0, 2), (1, 3), (2, 4), (1, 3)]  # the one that was not asked for longest went first
    monkeypatch.setattr(tasks, "KEPT_BYTES", 0)
    made.clear()
    for target in (3, 3, 4, 3):
        bench.slice(("w1 w2",), 0, target, "[-1]")
    assert made == [(0, 3), (0, 4), (0, 3)]


def test_a_model_that_is_not_there_is_no_other_one(tmp_path):
    with pytest.raises(ValueError, match="did you mean the organism 'modes-twin'"):
        ml.ModelKey("mode-twin").load()
    with pytest.raises(ValueError, match=r"'modes' have the fingerprint \w+, not 1234: it is another model"):
        ml.ModelKey("modes").load("1234")


def test_shards_share_out_a_plan_and_slurm_names_them(plan, monkeypatch):
    parts = [plan[of_shard((i, 4))] for i in range(1, 5)]
    assert sorted(map(repr, [job for part in parts for job in part])) == sorted(map(repr, plan))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for name, value in {"ID": 7, "MIN": 5, "MAX": 8, "COUNT": 4}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert plan[of_shard(None)] == plan[2::4]
    for number in range(5):  # --array=1-9:2
        for name, value in {"ID": 1 + 2 * number, "MIN": 1, "MAX": 9, "COUNT": 5, "STEP": 2}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        assert plan[of_shard(None)] == plan[number::5]
    for name, value in {"ID": 3, "MIN": 0, "MAX": 7, "COUNT": 3, "STEP": 1}.items():  # --array=0,3,7
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    with pytest.raises(ValueError, match="an array without gaps"):
        of_shard(None)
    for wrong in ((0, 4), (5, 4), (1, 0)):
        with pytest.raises(ValueError, match="must have a number from 1"):
            of_shard(wrong)


def test_a_trial_that_another_process_runs_is_waited_for_last(plan, model, tmp_path):
    (first, *others) = plan[:3]
    digests = [one.digest for one in run(plan[:3], tmp_path / "known", model)]
    (tmp_path / engines.LOCKS).mkdir()
    hold = "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(); time.sleep(1.5)"
    other = subprocess.Popen(
        [sys.executable, "-uc", hold, str(tmp_path / engines.LOCKS / digests[0])], stdout=subprocess.PIPE
    )
    other.stdout.readline()
    assert [one.job for one in run(plan[:3], tmp_path, model)] == [*others, first]
    assert other.wait() == 0


def test_a_plan_in_a_file_stands_for_every_combination():
    said = yaml.safe_load(
        """
        model: modes
        prompts: [w1, w2]
        max_new_tokens: 4
        target_positions: [-1]
        trials:
          - {kind: vectors, source_layer: [0, 1], target_layer: 4, radius: [2.0, 3.0], n_vectors: 4, orthogonal: soft,
             seed: 0}
          - {kind: contrastive, source_layer: 0, target_layer: 4, radius: 2.0, positive: [w1, w3], negative: [w2]}
        """
    )
    jobs = jobs_of(said)
    assert len(jobs) == 2 * (4 + 1) and {job.target_positions for job in jobs} == {"[-1]"}
    assert {(job.trial.source_layer, job.trial.radius) for job in jobs if job.trial.method == "soft"} == {
        (0, 2.0), (0, 3.0), (1, 2.0), (1, 3.0),
    }  # fmt: skip
    assert jobs[-1].trial.positive == ("w1", "w3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, r"lacks \['model'\]"),
        ({"speed": 3}, r"knows no \['speed'\]"),
        ({"trials": [{"kind": "sae"}]}, "kind='sae' must be one of"),
        ({"trials": [{"kind": "noise", "rank": 3}]}, r"has no setting \['rank'\]"),
        ({"trials": [{"kind": "noise", "seed": 3}]}, "needs"),
        ({"trials": []}, "at least one trial"),
        ({"trials": ["vectors"]}, "list of mappings"),
        ({"trials": {"kind": "noise"}}, "list of mappings"),
        ({"prompts": [3]}, "3 is no prompt"),
        ({"prompts": [[]]}, "is no prompt"),
        ({"prompts": 5}, "must be a text, a chat"),
        ({"prompts": {"role": "user"}}, "must be a text, a chat"),
        ({"target_positions": -1}, "'-1' is neither a slice"),
        ({"target_positions": "slice(1,"}, "neither a slice"),
        ({"dtype": "float64"}, "dtype='float64' must be"),
    ],
)
def test_a_plan_that_says_something_unknown_is_refused(change, message):
    trial = {"kind": "noise", "source_layer": 0, "target_layer": 4, "radius": 1.0, "n_vectors": 2, "seed": 0}
    said = {"model": "modes", "prompts": ["w1"], "trials": [trial], **change}
    with pytest.raises(ValueError, match=message):
        jobs_of({name: value for name, value in said.items() if value is not None})


def test_a_plan_that_is_no_mapping_is_refused():
    for said in (None, ["model"]):
        with pytest.raises(ValueError, match="a plan is a mapping"):
            jobs_of.__wrapped__(said)


def test_one_text_and_one_chat_are_one_prompt():
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    for prompts in ("w1 w2", ["w1 w2"], chat, [chat]):
        jobs = ml.plan_jobs("modes", TRIALS[:1], prompts)
        assert [job.prompts for job in jobs] == [(chat,) if chat in (prompts, prompts[0]) else ("w1 w2",)]
    said = {"model": "modes", "prompts": "w1 w2", "trials": [{"kind": "noise", "source_layer": 0, "target_layer": 4}]}
    said["trials"][0] |= {"radius": 1.0, "n_vectors": 2, "seed": 0}
    (job,) = jobs_of({**said, "target_positions": "slice(-3, None)"})
    assert job.prompts == ("w1 w2",) and job.target_positions == "slice(-3, None, None)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"engine": "dask"}, "engine"), ({"engine": "ray"}, "leave model out"), ({"n_workers": 0}, "n_workers")],
)
def test_bad_settings_are_refused_before_anything_is_loaded(plan, model, tmp_path, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ml.sweep(plan, tmp_path / "new", model=model, **settings)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="this plan has 2"):
        ml.sweep([*plan, replace(plan[0], model=ml.ModelKey("other"))], tmp_path / "new", model=model)
    with pytest.raises(ValueError, match="no sweep was begun"):
        ml.status(tmp_path)


def command(folder, engine="here"):
    asked = ["sweep", str(folder / "plan.yaml"), "--out", str(folder / "out"), "--engine", engine]
    return [sys.executable, "-m", "melbo_lens", *asked]


def write_plan(folder, n):
    text = ml.organisms.load("modes").prompts["clean"][0]
    entry = {"kind": "vectors", "source_layer": 0, "target_layer": 4, "radius": [6.0, 12.0], "n_vectors": 8}
    entry |= {"orthogonal": False, "seed": list(range(n // 2)), "n_steps": 6}
    said = {"model": "modes", "prompts": [text], "max_new_tokens": 8, "trials": [entry]}
    (folder / "plan.yaml").write_text(yaml.safe_dump(said))


def killed(folder, n_kills, seed=0, engine="here"):
    """Kills a sweep so many times at random moments, and then lets it end."""
    draw, done = random.Random(seed), folder / "out"
    for _ in range(n_kills):
        before = len(list(done.glob("*.safetensors")))
        process = subprocess.Popen(command(folder, engine), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(done.glob("*.safetensors"))) <= before:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(folder, engine), check=True, capture_output=True)
    return ml.merge(done)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_sweep_that_is_killed_ends_with_the_table_of_an_undisturbed_one(tmp_path):
    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
        write_plan(tmp_path / name, 24)
    calm = killed(tmp_path / "calm", 0)
    other = killed(tmp_path / "killed", 3)
    assert len(calm) == 24 and calm.failure.isna().all()
    pd.testing.assert_frame_equal(without_seconds(other), without_seconds(calm))


LOGGED = """
import os, sys, yaml, melbo_lens as ml
from melbo_lens.sweeps import outcomes
from melbo_lens.sweeps.jobs import jobs_of
real = outcomes.perform

def perform(trial, *more):
    with open(sys.argv[3], "a") as log:
        log.write(f"{os.getpid()} {trial.seed} {trial.radius}\\n")
    return real(trial, *more)

outcomes.perform = perform
with open(sys.argv[1]) as plan:
    jobs = jobs_of(yaml.safe_load(plan))
print(len(list(ml.sweep(jobs, sys.argv[2], progress=False))))
"""


@pytest.mark.long
@pytest.mark.timeout(300)
def test_two_processes_on_one_folder_share_its_trials_and_end_with_one_table(tmp_path):
    """Both are given the whole plan; each trial is run by one of them, and both yield all outcomes."""
    write_plan(tmp_path, 24)
    asked = [str(tmp_path / name) for name in ("plan.yaml", "out", "log")]
    both = [subprocess.Popen([sys.executable, "-c", LOGGED, *asked], stdout=subprocess.PIPE) for _ in range(2)]
    assert [int(process.communicate()[0]) for process in both] == [24, 24]
    ran = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len(ran) == 24 and len({(seed, radius) for _, seed, radius in ran}) == 24
    assert len({pid for pid, _, _ in ran}) == 2
    jobs = jobs_of(yaml.safe_load((tmp_path / "plan.yaml").read_text()))
    list(ml.sweep(jobs, tmp_path / "alone", progress=False))
    pd.testing.assert_frame_equal(
        without_seconds(ml.merge(tmp_path / "out")), without_seconds(ml.merge(tmp_path / "alone"))
    )


def test_the_commands_say_what_failed_and_how_far_a_sweep_is(tmp_path):
    write_plan(tmp_path, 2)
    said = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    said["trials"].append({**said["trials"][0], "target_layer": 77, "radius": 1.0})
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(said))
    result = CliRunner().invoke(app, command(tmp_path)[3:])
    assert result.exit_code == 0, result.output
    assert "2 of 3 trials done, 1 failed" in result.output.replace("\n", " ")
    assert len(pd.read_csv(tmp_path / "out" / "trials.csv")) == 3
    shown = CliRunner().invoke(app, ["status", str(tmp_path / "out")])
    assert "target_layer=77" in shown.output
    wrong = CliRunner().invoke(app, [*command(tmp_path)[3:], "--shard", "x"])
    assert wrong.exit_code == 2 and Path(tmp_path / "out").is_dir()
