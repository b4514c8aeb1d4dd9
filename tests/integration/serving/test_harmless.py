"""Does any command hand a terminal what a model, a file or an error says as anything but text?"""

import ast
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import melbo_lens as ml
from melbo_lens import cli
from melbo_lens.cli import app
from tests import models

# a title, a cleared screen, a C1 code, a turned direction of writing, and markup of rich's
EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e[bold]x[/bold]"
WRITTEN = r"\x1b]0;title\x07\x1b[2J\x9b31m\u202e[bold]x[/bold]"


def run(*arguments, fails=False):
    """What a command shows, which holds nothing that a terminal would obey."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == int(fails), result.output
    assert not set("\x1b\x07\x9b\u202e") & set(result.output)
    return re.sub(r"[\s│┃]", "", result.output)


@pytest.fixture
def evil_folder(tmp_path):
    """A folder whose name, files and their contents are foreign."""
    folder = tmp_path / EVIL.replace("/", "")
    folder.mkdir()
    provenance = {"model": EVIL, "target_hook": EVIL, "derived": [EVIL], EVIL: EVIL}
    ml.SteeringVectors(torch.ones(1, models.D_MODEL), 1, provenance=provenance).save(folder / "v.safetensors")
    return folder


def test_the_representation_of_a_file_and_its_path(evil_folder):
    said = run("export", evil_folder / "v.safetensors", "--format", "vllm-lens", "--out", evil_folder / "out.pt")
    assert said.count(WRITTEN.replace("/", "")) >= 1 and f"target{WRITTEN}" in said


def test_errors_about_names_and_keys(evil_folder, tmp_path):
    assert WRITTEN.replace("/", "") in run("status", evil_folder, fails=True)
    assert WRITTEN.replace("/", "") in run("export", evil_folder / "no", "--format", "peft", "--out", "x", fails=True)
    torch.save({EVIL: torch.ones(1, 3)}, tmp_path / "v.pt")
    assert WRITTEN in run("export", tmp_path / "v.pt", "--format", "lm-eval", "--out", tmp_path / "x", fails=True)
    (tmp_path / "loaded.json").write_text(json.dumps({EVIL: 1}))
    assert WRITTEN in run("chat", tmp_path, fails=True)


def test_warnings_hold_what_a_file_says(monkeypatch, tmp_path):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    run("status", tmp_path, fails=True)
    assert warnings.formatwarning(UserWarning(EVIL), UserWarning, EVIL, 1, EVIL) == f"warning: {WRITTEN}\n"


def test_completions_and_groups_of_a_search(directories, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.console, "width", 400)
    decode = type(models.tokenizer()).decode
    monkeypatch.setattr(type(models.tokenizer()), "decode", lambda *args, **kw: f"{decode(*args, **kw)} {EVIL}")
    model = ["--model", directories("llama"), "--device", "cpu", "--prompt", EVIL.replace("\x1b", "w1 "), "--no-chat"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = run("discover", *model, "--budget", "1", "--out", tmp_path / "found")
    assert WRITTEN in said


def test_no_text_is_taken_for_an_emoji_or_changed(monkeypatch):
    said = "answer :x: path a:key:b [red]x[/red] and a folder C:\\"
    with cli.console.capture() as capture:
        cli._show(said)
    assert capture.get().strip() == said


def test_a_command_shows_nothing_but_through_the_two_doors():
    """`_show` and `_add_row`; a table is printed when it is filled, and its title is shown."""
    tree = ast.parse(Path(cli.__file__).read_text())
    doors = {"_show", "_add_row"}
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name not in doors):
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            assert not name.endswith(".add_row") and name not in ("print", "typer.echo"), ast.unparse(call)
            assert name != "console.print" or ast.unparse(call.args[0]) == "table", ast.unparse(call)
            for title in (keyword.value for keyword in call.keywords if name == "Table" and keyword.arg == "title"):
                assert ast.unparse(title).startswith("shown("), title
