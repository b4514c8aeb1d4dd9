"""Does the command line do the whole job offline?"""

import base64
import json
import os
import re
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import melbo_lens as ml
from melbo_lens.cli import app
from melbo_lens.search import pace
from tests.integration.reports.test_page import completions

FILES = {
    *(
        "about.json",
        "changes.safetensors",
        "completions.csv",
        "completions.jsonl",
        "effects.safetensors",
        "loaded.json",
        "ranking.csv",
    ),
    *("report.html", "vectors.safetensors"),
}


def fit(directory, out, *more):
    arguments = [
        "fit",
        "--model",
        directory,
        "--prompt",
        "w1 w2 w3",
        "--source-layer",
        "1",
        "--target-layer",
        "3",
        "--out",
        str(out),
    ]
    return CliRunner().invoke(
        app, [*arguments, "--n-vectors", "2", "--radius", "2", "--max-new-tokens", "3", "--device", "cpu", *more]
    )


def test_a_file_where_a_folder_is_wanted_is_named_before_a_model_is_loaded(tmp_path):
    (tmp_path / "taken").touch()
    result = fit("no model", tmp_path / "taken")
    assert result.exit_code == 2 and re.search(r"is a\W+file", result.output)
    for write in (
        lambda: ml.Findings(ml.SteeringVectors(torch.eye(3), 1), completions()).save(tmp_path / "taken"),
        lambda: ml.discover("modes", "river", plan=[ml.Trial(0, 4, 1.0, 2, False, 0)], directory=tmp_path / "taken"),
    ):
        with pytest.raises(NotADirectoryError, match=r"can't be a folder, since .*taken' is a file"):
            write()


@pytest.mark.parametrize(("given", "positions"), [([], None), (["--last", "3"], slice(-3, None))])
def test_a_fit_counts_the_positions_that_the_library_counts_by_default(
    directories, tmp_path, monkeypatch, given, positions
):
    asked = []
    monkeypatch.setattr(ml, "fit_vectors", lambda *_, **settings: asked.append(settings) or (1 / 0))
    fit(directories("llama"), tmp_path / "out", *given)
    assert asked[0]["target_positions"] == positions  # all positions would count a sink at the first


@pytest.mark.parametrize(
    ("chat", "prompt", "told"),
    [
        ([], "<bos> w1 w2 w3 w0", "a user's messages"),  # as the tokenizer's chat template has it
        (["--chat"], "<bos> w1 w2 w3 w0", "a user's messages"),
        (["--no-chat"], "w1 w2 w3", "plain text"),
    ],
)
def test_fit_on_a_local_directory_writes_vectors_completions_and_a_page(directories, tmp_path, chat, prompt, told):
    result = fit(directories("llama"), tmp_path / "out", *chat)
    assert result.exit_code == 0, result.output
    assert f"prompts are given as {told}" in " ".join(result.output.split())
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    vectors = ml.load(tmp_path / "out" / "vectors.safetensors")
    assert len(vectors) == 2 and vectors.provenance["prompts"] == [prompt]
    assert len(pd.read_csv(tmp_path / "out" / "completions.csv")) == 9


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--source-layer", "9"], "source_layer=9"),
        (["--radius", "-1"], "radius=-1"),
        (["--radius", "abc"], "--radius 'abc' must be a number, or auto"),
    ],
)
def test_a_mistake_is_said_in_a_sentence_and_fails(directories, tmp_path, more, said):
    result = fit(directories("llama"), tmp_path / "out", *more)
    assert result.exit_code == 1 and said in result.output and "Traceback" not in result.output


def test_discover_writes_groups_and_vectors(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=time.process_time))  # other processes may be busy
    organism = ml.organisms.load("modes")
    prompts = organism.prompts["clean"][44], organism.prompts["selection"][3]
    arguments = ["discover", "--model", str(organism.directory), "--prompt", prompts[0], "--heldout", prompts[1]]
    arguments += ["--budget", "8", "--max-new-tokens", "3", "--out", str(tmp_path / "out"), "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    groups = pd.read_csv(tmp_path / "out" / "groups.csv", keep_default_na=False)  # an example may be empty
    assert (groups.example.str.split().str.len() <= 3).all()
    assert len(groups) >= 1 and "unsteered" not in groups.columns
    assert len(ml.load(tmp_path / "out" / "group-1.safetensors")) == 1


def export(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_a_second_run_in_a_folder_leaves_nothing_of_the_first(directories, tmp_path):
    out = tmp_path / "out"
    asked = ["discover", "--model", "modes", "--no-chat", "--prompt", "river lamp", "--budget", "1", "--out", str(out)]
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert (out / "written.json").is_file() and (out / "group-1.safetensors").is_file()
    (out / "notes.txt").write_text("mine")
    for name in ("group-77.safetensors", "group-mine.safetensors"):
        (out / name).touch()
    wrote = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for refused in (["--max-new-tokens", "999"], ["--max-new-tokens", "-1"], ["--last", "-3"]):
        result = fit(directories("llama"), out, *refused)
        assert result.exit_code == 1 and "error: " in result.output
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == wrote
    assert CliRunner().invoke(app, asked).exit_code == 0
    result = fit(directories("llama"), out)
    assert result.exit_code == 0 and "notes" not in result.output
    found = ml.Findings.load(out)
    assert found.written is None and found.groups is None and len(found.completions) == 9
    assert not (out / "groups.csv").exists() and (out / "notes.txt").read_text() == "mine"
    assert {path.name for path in out.glob("group-*.safetensors")} == {"group-77.safetensors", "group-mine.safetensors"}
    assert "loaded.json" in result.output
    assert fit(directories("llama"), out, "--max-new-tokens", "0").exit_code == 0
    with pytest.raises(FileNotFoundError, match=r"has no completions\.jsonl"):
        ml.Findings.load(out)
    assert not (out / "report.html").exists()


def test_a_plan_that_can_not_be_read_is_said_in_a_sentence(tmp_path):
    (tmp_path / "plan.yaml").write_text("model: [")
    result = CliRunner().invoke(app, ["sweep", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "new")])
    assert result.exit_code == 1 and "error: " in result.output and isinstance(result.exception, SystemExit)


def test_export_writes_one_vector_of_a_file_after_a_comparison(directories, tmp_path):
    values = torch.randn(3, 32)
    ml.SteeringVectors.from_tensor(values, 1).save(tmp_path / "v.safetensors")
    arguments = (tmp_path / "v.safetensors", "--format", "vllm-lens", "--out", tmp_path / "v.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it compared itself
        result = export(*arguments, "--index", 2, "--model", directories("llama"), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "v.json" in result.output and "radius" in result.output
    said = json.loads((tmp_path / "v.json").read_text())
    written = torch.frombuffer(bytearray(base64.b64decode(said["activations"]["data"])), dtype=torch.float32)
    assert torch.equal(written, values[2]) and said["layer_indices"] == [1]


def test_export_reads_a_file_of_another_tool_and_warns_without_a_model(tmp_path):
    torch.save(torch.ones(32), tmp_path / "v.pt")
    with pytest.warns(UserWarning, match="not compared"):
        result = export(tmp_path / "v.pt", "--layer", 2, "--format", "transformers", "--out", tmp_path / "out")
    assert result.exit_code == 0 and (tmp_path / "out" / "steer.py").is_file(), result.output


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--format", "vllm-lens"], "3 of layer 1 were given"),
        (["--format", "vllm-lens", "--index", "3"], "vector 3 was asked for, there are 3"),
        (["--format", "vllm", "--index", "0"], "format='vllm' must be one of"),
        (["--format", "peft", "--index", "0"], "peft holds updates of weights"),
        (["--format", "vllm-lens", "--layer", "3"], "layer can't be chosen"),
    ],
)
def test_what_can_not_be_exported_is_said_in_a_sentence(tmp_path, more, said):
    ml.SteeringVectors.from_tensor(torch.ones(3, 32), 1).save(tmp_path / "v.safetensors")
    result = export(tmp_path / "v.safetensors", "--out", tmp_path / "out", *more)
    assert result.exit_code == 1 and said in " ".join(result.output.split()) and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_demo_writes_its_folder(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo"), "--seed", "1", "--budget", "10"])
    assert result.exit_code == 0, result.output
    n_vectors = pd.read_csv(tmp_path / "demo" / "groups.csv").set_index("behavior").n_vectors
    for behavior in ("portuguese", "reasoning", "hate", "cheese"):
        (line,) = (line for line in result.output.splitlines() if line.startswith(f"│ {behavior} "))
        assert re.split(r"\s*│\s*", line)[2] == str(n_vectors.get(behavior, 0))
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"groups.csv", "written.json", *FILES}


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_letters_that_a_terminal_lacks_are_replaced(encoding):
    """A model writes any letter; the run must not die of it after the work."""
    code = "from melbo_lens import cli; cli.prepare(); cli.console.print('Größe 🧀 ▁ 日本')"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, check=False
    )
    assert run.returncode == 0, run.stderr.decode()
    assert "?" in run.stdout.decode(encoding)


def test_help_waits_for_no_library():
    code = (
        "import sys, melbo_lens; from melbo_lens import cli\n"
        "try: cli.app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformer_lens', 'transformers', 'plotly', 'pandas', 'sklearn', 'numpy'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "discover" in run.stdout, run.stderr


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["reproduce", "--out", "missing/r.json"], "in a folder that exists"),
        (["demo", "--budget", "-3"], "must be a positive number of seconds"),
        pytest.param(
            ["fit", *"--model modes --prompt a --source-layer 0 --target-layer 4 --device cuda".split()],
            "device='cuda' can't be used",
            marks=pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch was built for CUDA"),
        ),
        (["report", ".", "--behavior", "a=x", "--behavior", "a=y"], "one name"),
        (["report", ".", "--behavior", "=x"], "NAME=REGULAR"),
        (["sweep", "plan.yaml", "--shard", "²/3", "--out", "new"], "a shard is I/N"),
    ],
)
def test_what_can_not_be_done_is_said_before_the_work(tmp_path, monkeypatch, asked, said):
    monkeypatch.chdir(tmp_path)
    out = ["--out", "new"] if asked[0] in ("demo", "fit") else []
    result = CliRunner().invoke(app, [*asked, *out])
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit)
    assert said in " ".join(result.output.replace("│", " ").split())
