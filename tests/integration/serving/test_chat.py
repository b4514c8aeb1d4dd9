"""Does a chat show what the steered and the unsteered model write, each from its own history, and nothing else?"""

import io
import json
import re
import warnings

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import melbo_lens as ml
from melbo_lens.cli import app
from melbo_lens.serving.conversation import Conversation, remember_model, what_to_open
from melbo_lens.serving.harmless import harmless
from melbo_lens.serving.terminal import HELP, command, talk
from tests import models

KEY = ml.ModelKey("here")


@pytest.fixture
def vectors():
    values = torch.randn(3, models.D_MODEL, generator=torch.Generator().manual_seed(3))
    return ml.SteeringVectors(values, 1).rescaled(6.0)


@pytest.fixture
def conversation(build, vectors):
    return Conversation(build("llama"), vectors, KEY, max_new_tokens=5)


def shown(conversation, *lines, width=100):
    """What the terminal shows when these lines are typed."""
    left, out = list(lines), io.StringIO()

    def read():
        if not left:
            raise EOFError
        return left.pop(0)

    talk(conversation, Console(file=out, width=width), read)
    return out.getvalue()


def test_each_side_goes_on_from_its_own_answers(conversation, build, vectors):
    conversation.choose(vector=2, sign=-1, scale=0.5)
    first, second = conversation.say("w1 w2"), conversation.say("w3")
    settings = {"signs": -1, "scales": 0.5, "include_random": False, "progress": False}
    for side in ("steered", "unsteered"):
        chat = [{"role": "user", "content": "w1 w2"}]
        written = ml.generate(build("llama"), [chat], vectors[2], 5, **settings).filter(kind=side)
        assert getattr(first, side) == written.table.text[0]
        chat += [{"role": "assistant", "content": getattr(first, side)}, {"role": "user", "content": "w3"}]
        written = ml.generate(build("llama"), [chat], vectors[2], 5, **settings).filter(kind=side)
        assert getattr(second, side) == written.table.text[0]
    assert first.steered != first.unsteered


def test_commands_change_what_steers_from_the_next_turn_on(conversation, tmp_path):
    out = shown(
        conversation,
        "w1 w2",
        "/vector 2",
        "/sign -",
        "/scale 0.25",
        "/length 3",
        "/temperature 1.5",
        "w3",
        f"/save {tmp_path / 'said.json'}",
    )
    assert "vector 2 of 3 (0 to 2), multiplied by -0.25" in out
    said = json.loads((tmp_path / "said.json").read_text())
    keys = ("message", "vector", "sign", "scale", "temperature")
    assert [tuple(turn[key] for key in keys) for turn in said["turns"]] == [
        ("w1 w2", 0, 1, 1.0, 0.0),
        ("w3", 2, -1, 0.25, 1.5),
    ]
    assert said["model"]["name"] == "here" and said["max_new_tokens"] == 3
    assert all(turn[side] in " ".join(out.split()) for turn in said["turns"] for side in ("steered", "unsteered"))
    shown(conversation, "/reset", "w4", "/quit", "w5")
    assert [turn.message for turn in conversation.turns] == ["w4"]


def test_the_scale_moves_in_steps_on_a_slider(conversation):
    out = shown(conversation, "/scale +", "/scale -", "/scale -", "/scale 0.6", "/scale +", "/scale -").splitlines()
    assert [re.search(r"by (\S+)", line)[1] for line in out] == ["+1", "+1.25", "+1", "+0.75", "+0.6", "+0.75", "+0.5"]
    places = [line.split("0.125 ")[1].index("●") for line in out]
    assert places == [4, 5, 4, 3, 2, 3, 2] and all("─ 8" in line for line in out)
    command(conversation, "/scale 0.01")
    command(conversation, "/scale +")
    assert conversation.scale == 0.125
    for end, way in ((0.125, "-"), (20, "+")):
        conversation.choose(scale=end)
        assert f"/scale {way} goes from 0.125 to 8, and it is at {end:g}" in shown(conversation, f"/scale {way}")


def test_help_names_every_command_that_is_known(conversation):
    assert all(usage in command(conversation, "/help") for usage in HELP)
    for usage in HELP:
        name = usage.split()[0]
        if name not in ("/help", "/quit", "/reset"):
            with pytest.raises(ValueError, match=name):
                command(conversation, f"{name} ?" if name != "/save" else name)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/vector 3", "there are 3: choose from 0 to 2"),
        ("/vector 1.5", "must be a number"),
        ("/scale -1", "positive, finite"),
        ("/scale nan", "positive, finite"),
        ("/sign x", "/sign + or /sign -"),
        ("/temperature -1", "greedy"),
        ("/length 0", "max_new_tokens=0"),
        ("/dance", "/help lists them"),
        ("/save", "needs a path"),
        ("/save /no/such/folder/x.json", "can't be written"),
        ("w1 " * 70, "context n_ctx holds 64"),
    ],
)
def test_a_mistake_is_said_and_changes_nothing(conversation, line, said):
    before = {**vars(conversation), "turns": []}
    assert said in " ".join(shown(conversation, line, width=400).split())
    assert vars(conversation) == before


def test_a_file_of_somebody_else_is_not_overwritten(conversation, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    assert "exists already" in " ".join(shown(conversation, f"/save {tmp_path / 'mine.json'}", width=400).split())
    assert (tmp_path / "mine.json").read_text() == "{}"
    for _ in range(2):  # its own file it writes again
        assert "wrote" in shown(conversation, f"/save {tmp_path / 'own.json'}")


def test_what_a_model_writes_is_no_command_to_the_terminal(conversation, monkeypatch):
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m [red]red[/red] [link=file:///x]y[/link] \u202eabc\r\x7f/vector 2"
    monkeypatch.setattr(type(conversation), "_answer", lambda *_: evil)
    out = shown(conversation, "w1", width=400)
    assert not set("\x1b\x07\x9b\u202e\r\x7f") & set(out)
    assert out.count("[red]red[/red] [link=file:///x]y[/link]") == out.count("\\x1b]0;title\\x07") == 2  # on both sides
    assert conversation.vector == 0 and conversation.turns[0].steered == evil
    assert harmless("two\nlines\tand ünïcode 日本 🧀") == "two\nlines\tand ünïcode 日本 🧀"


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory \x1b]0;x\x07"), MemoryError(), KeyError("x")])
def test_an_answer_that_fails_ends_no_chat(conversation, monkeypatch, tmp_path, error):
    conversation.say("w1 w2")

    def fails(*_):
        raise error

    monkeypatch.setattr(type(conversation), "_answer", fails)
    out = shown(conversation, "w3", f"/save {tmp_path / 'said.json'}", width=400)
    assert f"error: {harmless(str(error) or repr(error))}" in out and "\x1b" not in out
    assert [turn["message"] for turn in json.loads((tmp_path / "said.json").read_text())["turns"]] == ["w1 w2"]


def test_an_interrupted_answer_was_not_said(conversation, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(conversation), "_answer", interrupted)
    assert "nothing was said" in shown(conversation, "w1") and conversation.turns == []


def test_a_model_without_a_chat_template_gets_lines(conversation, monkeypatch):
    monkeypatch.setattr(conversation.model.tokenizer, "chat_template", None)
    first = conversation.say("w1 w2")
    text = f"w1 w2\n{first.unsteered}\nw3"
    written = ml.generate(conversation.model, text, None, 5, progress=False).table.text[0]
    assert conversation.say("w3").unsteered == written


def test_a_folder_knows_its_model_and_says_what_it_lacks(directories, vectors, tmp_path, monkeypatch):
    vectors.save(tmp_path / "vectors.safetensors")
    with pytest.raises(ValueError, match="give --model"):
        what_to_open(tmp_path, None, None)
    with pytest.raises(ValueError, match="which model"):
        what_to_open(None, None, None)
    with pytest.raises(ValueError, match="--vectors FILE"):
        what_to_open(None, KEY, None)
    with pytest.raises(FileNotFoundError, match="no file"):
        what_to_open(tmp_path, KEY, tmp_path / "none.pt")
    (tmp_path / "loaded.json").write_text('{"path": "x"}')
    with pytest.raises(ValueError, match="damaged"):
        what_to_open(tmp_path, None, None)
    remember_model(tmp_path, ml.ModelKey("modes", "float32", "cpu"))
    key, found = what_to_open(tmp_path, None, None)
    assert key == ml.ModelKey("modes", "float32", "cpu") and torch.equal(found.values, vectors.values)
    monkeypatch.chdir(tmp_path.parent)
    remember_model(tmp_path, ml.ModelKey(tmp_path.name))
    assert what_to_open(tmp_path, None, None)[0].name == str(tmp_path.resolve())


def test_the_command_talks_by_standard_input(directories, vectors, tmp_path):
    vectors.save(tmp_path / "vectors.safetensors")
    remember_model(tmp_path, ml.ModelKey(directories("llama"), device="cpu"))
    lines = f"w1 w2\n/vector 1\n\nw3\n/save {tmp_path / 'said.json'}\n"
    arguments = ["chat", str(tmp_path), "--max-new-tokens", "3", "--scale", "-0.5"]
    result = CliRunner().invoke(app, arguments, input=lines)
    assert result.exit_code == 0, result.output
    turns = json.loads((tmp_path / "said.json").read_text())["turns"]
    assert [(turn["vector"], turn["sign"], turn["scale"]) for turn in turns] == [(0, -1, 0.5), (1, -1, 0.5)]
    assert "vector 1, multiplied by -0.5" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["chat", str(tmp_path), "--vector", "9"])
    assert result.exit_code == 1 and "choose from 0 to 2" in result.output


def test_a_model_of_other_weights_is_said_before_the_chat_begins(directories, build, tmp_path):
    learned = ml.fit_vectors(build("llama"), "w1 w2 w3", 1, 3, n_vectors=1, radius=2.0, n_steps=1, progress=False)
    learned.save(tmp_path / "vectors.safetensors")
    other = models.save("llama", tmp_path / "other", seed=1)
    with pytest.warns(UserWarning, match="other weights than those of this model"):
        Conversation(models.bridge(other), learned, KEY)
    Conversation(build("llama"), learned, KEY)
    arguments = ["chat", str(tmp_path), "--device", "cpu", "--max-new-tokens", "2", "--model"]
    with pytest.warns(UserWarning, match="other weights than those of this model"):
        assert CliRunner().invoke(app, [*arguments, other], input="w1\n").exit_code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert CliRunner().invoke(app, [*arguments, directories("llama")], input="w1\n").exit_code == 0
