"""Does a value come back from the hub as it was, with a card, and with nothing run and nothing outside the cache?

The client is that of huggingface_hub, in a process of its own, since it reads its settings when it is imported.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

import melbo_lens as ml
from melbo_lens import files
from melbo_lens.perturbations import hub as client
from melbo_lens.perturbations.card import card
from tests import fake_hub

PROMPTS = ["w1 w2 w3", "w4 `w5` ``` <b>w6</b> | w7"]


@pytest.fixture(scope="module")
def learned(build):
    model = build("llama", "bridge")
    vectors = ml.fit_vectors(model, PROMPTS, 1, 3, n_vectors=2, radius=2.0, n_steps=2, progress=False)
    adapters = ml.fit_adapters(model, PROMPTS, [0, 1], 3, n_adapters=1, rank=2, n_steps=2, radius=1.0, progress=False)
    return {"vectors": vectors, "adapters": adapters}


@pytest.fixture
def world(tmp_path):
    with fake_hub.running() as (hub, address):
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_none"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "no_proxy": "*"}

        def run(code, *arguments, **more):
            command = [sys.executable, "-c", f"import sys, melbo_lens as ml\n{code}", *map(str, arguments)]
            return subprocess.run(command, capture_output=True, text=True, env={**environment, **more}, check=False)

        yield hub, run


PUSH = "print(ml.load(sys.argv[1]).push_to_hub('user/found', private=True))"
PULL = "ml.from_pretrained('user/found').save(sys.argv[1])"


def check_same(one, other):
    (mine, header), (theirs, same) = one.parts(), other.parts()
    assert type(one) is type(other) and header == same and mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", ["vectors", "adapters"])
def test_a_value_comes_back_bit_by_bit_and_without_the_path_of_its_model(learned, world, tmp_path, kind):
    hub, run = world
    value = learned[kind]
    assert os.path.isabs(value.provenance["model"])
    value.save(tmp_path / "value")
    done = run(PUSH, tmp_path / "value")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"/user/found/commit/{fake_hub.COMMIT}")
    assert sorted(hub.files["user/found"]) == ["README.md", "perturbation.safetensors"]
    done = run(PULL, tmp_path / "back")
    assert done.returncode == 0, done.stderr
    back = ml.load(tmp_path / "back")
    check_same(back, value)
    folder = os.path.basename(value.provenance["model"])
    assert back.provenance == {**value.provenance, "model": folder}
    assert os.path.dirname(value.provenance["model"]).encode() not in b"".join(hub.files["user/found"].values())
    name = type(value).__name__
    for unreachable in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):  # then from the cache
        done = run(f"print(ml.{name}.from_pretrained('user/found'))", **unreachable)
        assert done.returncode == 0 and name in done.stdout, done.stderr


def test_the_card_says_what_the_provenance_has(learned, world, tmp_path):
    hub, run = world
    learned["vectors"].save(tmp_path / "value")
    assert run(PUSH, tmp_path / "value").returncode == 0
    text = hub.files["user/found"]["README.md"].decode()
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.S).groups()
    said = yaml.safe_load(head)
    assert said["library_name"] == "melbo_lens" and "melbo" in said["tags"] and "base_model" not in said
    for section in ("Settings", "Learned from", "Controls", "Figures", "Limits"):
        assert f"\n## {section}\n" in body
    assert 'ml.from_pretrained("user/found")' in body and "| source\\_layer | 1 |" in body
    assert "| radius | 2.0 |" in body and "objective, last" in body and "Learned on 2 prompts" in body
    rows = re.findall(r"^\| \d+ \| (.+) \|$", body, re.M)
    assert len(rows) == 2 and all(row.startswith("2 | ") for row in rows)


def test_the_card_of_chosen_rows_has_their_figures(learned):
    value = learned["vectors"]
    known = ml.SteeringVectors(
        *(value.values, 1, value.history),
        {**value.provenance, "effects": [0.125, 0.375], "sinks": [1], "minus": {"effects": [0.5, 0.75], "sinks": []}},
    )
    assert re.search(r"\| 0 \|.*\| 0.375 \| 0.75 \|\n\| 1 \|.*\| 0.125 \| 0.5 \|", card(known[::-1], "user/found"))
    assert "attention sink, whose effect is no behaviour: 0." in card(known[::-1], "user/found")
    assert "attention sink, whose effect is no behaviour: minus 0." in card(-known[::-1], "user/found")
    for one in (known[0], 2 * known):
        assert "attention sink" not in card(one, "user/found")
    assert "effect (change" not in card(2 * known, "user/found")  # a longer vector has another effect


def test_a_folder_with_a_slash_is_no_repository(directories, tmp_path, monkeypatch):
    folder = tmp_path / "m" / "llama"
    shutil.copytree(directories("llama"), folder)
    monkeypatch.chdir(tmp_path)
    model = ml.ModelKey("m/llama").load()
    value = ml.noise_vectors(model, PROMPTS, 1, 3, n_vectors=1, radius=1.0)
    assert value.provenance["model"] == str(folder.resolve())
    assert "base_model" not in card(value, "user/found")


def test_a_card_that_is_there_is_left_unless_it_is_to_be_replaced(learned, world, tmp_path):
    hub, run = world
    hub.files["user/found"] = {"README.md": b"mine"}
    learned["vectors"].save(tmp_path / "value")
    assert run(PUSH, tmp_path / "value").returncode == 0
    assert hub.files["user/found"]["README.md"] == b"mine" and len(hub.files["user/found"]) == 2
    assert run(PUSH.replace("private=True", "overwrite_card=True"), tmp_path / "value").returncode == 0
    assert b"SteeringVectors" in hub.files["user/found"]["README.md"]


BOMB = b"\x80\x02cbuiltins\nexec\nU\x1copen('ran', 'w').write('yes')\x85R."


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (BOMB, "truncated or no safetensors file"),
        (b"", "truncated or no safetensors file"),
        (b"\xff" * 100, "truncated or no safetensors file"),
    ],
)
def test_a_file_that_is_no_value_is_refused_and_runs_nothing(world, tmp_path, data, said):
    hub, run = world
    hub.files["user/found"] = {"perturbation.safetensors": data}
    done = run(f"import os; os.chdir({str(tmp_path)!r})\n{PULL}", tmp_path / "back")
    assert done.returncode == 1 and "ValueError" in done.stderr and said in done.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "back").exists()


def test_a_value_of_another_kind_is_refused_by_name(learned, world, tmp_path):
    hub, run = world
    learned["adapters"].save(tmp_path / "value")
    hub.files["user/found"] = {"perturbation.safetensors": (tmp_path / "value").read_bytes()}
    done = run("ml.SteeringVectors.from_pretrained('user/found')")
    assert done.returncode == 1 and "holds 'SteeringAdapters', not 'SteeringVectors'" in done.stderr


def outside(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "home" not in path.parts)


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"ETag": '"../../../../../../escaped"'}, "answers with etag"),
        ({"ETag": '"a/b"'}, "answers with etag"),
        ({"X_Repo_Commit": "../../../../escaped"}, "answers with commit"),
        ({"X_Linked_Size": str(10**15)}, "may have at most"),
    ],
)
def test_names_from_the_server_cannot_leave_the_cache(learned, world, tmp_path, headers, said):
    hub, run = world
    learned["vectors"].save(tmp_path / "value")
    hub.files["user/found"] = {"perturbation.safetensors": (tmp_path / "value").read_bytes()}
    hub.headers = headers
    before = outside(tmp_path)
    done = run(PULL, tmp_path / "back")
    assert done.returncode == 1 and "ValueError" in done.stderr and said in done.stderr, done.stderr
    assert outside(tmp_path) == before
    assert not [asked for asked in hub.asked if asked.startswith("GET")]  # refused before the file is downloaded


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"filename": "../x.safetensors"}, "filename='../x.safetensors' must be the plain name"),
        ({"filename": "a/b"}, "filename='a/b'"),
        ({"filename": ".."}, r"filename='\.\.'"),
        ({"revision": "../main"}, "revision='../main'"),
        ({"revision": "a/../../b"}, "revision="),
    ],
)
def test_names_from_the_caller_cannot_leave_the_cache(settings, said):
    with pytest.raises(ValueError, match=said):
        ml.from_pretrained("user/found", **settings)


def test_a_missing_repository_is_an_error_of_the_client(world):
    _, run = world
    done = run("ml.from_pretrained('user/nothing')")
    assert done.returncode == 1 and "NotFoundError" in done.stderr


def test_without_the_client_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
        ml.from_pretrained("user/found")


def test_texts_in_a_card_stay_texts():
    value = ml.SteeringVectors(
        torch.ones(100, 4),
        1,
        provenance={
            "method": "# [x](http://y) <script>",
            "model": "org/model-1.5",
            "prompts": ["```\n# not a heading", "<script>"] * 50,
            "status": "ended | here",
            "derived": ["negated"],
            "seed": 0,
        },
    )
    text = card(value, "user/found")
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.S).groups()
    assert yaml.safe_load(head)["base_model"] == "org/model-1.5"
    outside_fences = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.M | re.S)
    assert not re.search(r"(?<!\\)<|(?<!\\)\]\(|not a heading", outside_fences)
    assert "ended \\| here" in body and "negated" in body and "and 36 more." in body
    control = ml.random_vectors(value)
    assert "are themselves a control" in card(control, "user/found")
    made = ml.SteeringVectors.from_tensor(torch.ones(1, 4), 1)
    assert "No prompts are recorded" in card(made, "a/b") and "made elsewhere" in card(made, "a/b")


def test_only_the_last_part_of_a_models_folder_is_kept():
    said = {"model": "/home/someone/models/tiny", "parts": [{"model": "/a/b"}, {"model": "org/name"}], "seed": 0}
    assert client.without_places(said) == {"model": "tiny", "parts": [{"model": "b"}, {"model": "org/name"}], "seed": 0}


def test_a_file_of_the_hub_is_that_of_save(learned, world, tmp_path):
    hub, run = world
    learned["vectors"].save(tmp_path / "value")
    assert run(PUSH, tmp_path / "value").returncode == 0
    (tmp_path / "got").write_bytes(hub.files["user/found"]["perturbation.safetensors"])
    tensors, _ = files.read(tmp_path / "got", "SteeringVectors")
    assert torch.equal(tensors["values"], learned["vectors"].values)
