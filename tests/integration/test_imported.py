"""Do values of other tools do here what they do there, and do they get our controls, evaluation and page?"""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import melbo_lens as ml
from melbo_lens.imports import peft as peft_files
from melbo_lens.models.access import host_of

TOKENS = torch.tensor([[1, 5, 6, 7, 9], [1, 8, 9, 4, 30]])
WEIGHTS = {
    "llama": ("o_proj", "down_proj"),
    "neox": ("attention.dense", "dense_4h_to_h"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
}


@pytest.fixture
def saved(directories, tmp_path):
    """A folder that peft writes, whose factors are random, and the log-probabilities of its model."""

    def make(name, **settings):
        network = AutoModelForCausalLM.from_pretrained(directories(name), dtype=torch.float32)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adapted = get_peft_model(
                network, LoraConfig(**{"r": 3, "lora_alpha": 6, "init_lora_weights": False, **settings})
            ).eval()
        adapted.save_pretrained(tmp_path / "lora")
        with torch.no_grad():
            return tmp_path / "lora", adapted(TOKENS).logits.log_softmax(-1)

    return make


def steered(model, perturbation):
    with torch.no_grad(), ml.steer(model, perturbation):
        return host_of(model).forward(TOKENS).log_softmax(-1)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_lora_does_what_it_does_in_peft(build, saved, name, place):
    folder, expected = saved(name, target_modules=f".*\\.{WEIGHTS[name][place]}")
    adapter = ml.load(folder)
    assert len(adapter) == 1 and adapter.source_layers == (0, 1, 2, 3) and adapter.site == ("attn", "mlp")[place]
    assert adapter.rank == 3 and adapter.provenance["source"] == "peft" and adapter.provenance["model"]
    for kind in ("bridge", "compatible"):
        torch.testing.assert_close(steered(build(name, kind), adapter), expected, atol=2e-4, rtol=0)
    assert (expected - steered(build(name, "bridge"), 0.0 * adapter)).abs().max() > 0.05


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [2]},
        {"layers_to_transform": [0, 3], "use_rslora": True},
        {"alpha_pattern": {"model.layers.1.self_attn.o_proj": 30}, "rank_pattern": {"layers.2.self_attn.o_proj": 1}},
    ],
)
def test_scales_and_patterns_are_those_of_peft(build, saved, settings):
    folder, expected = saved("llama", target_modules=["o_proj"], **settings)
    torch.testing.assert_close(steered(build("llama", "bridge"), ml.load(folder)), expected, atol=2e-4, rtol=0)


def test_our_own_folder_comes_back_and_steers_as_before(build, tmp_path):
    model = build("llama", "bridge")
    learned = ml.fit_cpe(model, TOKENS, [0, 1], 4, n_factors=2, n_steps=2, scale=3.0, progress=False)[1]
    ml.export(learned, "peft", tmp_path / "lora", model=model)
    again = ml.load(tmp_path / "lora", model="mine")
    torch.testing.assert_close(steered(model, again), steered(model, learned), atol=1e-5, rtol=0)
    assert again.provenance["model"] == "mine"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["q_proj"]}, "updates .*q_proj"),
        ({"target_modules": ["o_proj", "down_proj"]}, "updates two modules of layer"),
        ({"target_modules": r".*(0\.self_attn\.o_proj|1\.mlp\.down_proj)"}, "both the attention and the MLP"),
        ({"target_modules": ["o_proj"], "use_dora": True}, "lora_magnitude_vector|use_dora"),
        ({"target_modules": ["o_proj"], "bias": "lora_only"}, "bias=lora_only"),
        ({"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        (
            {"target_modules": ["o_proj"], "alpha_pattern": {r"layers\.[01].*": 3}},
            "a regular expression is not followed",
        ),
    ],
)
def test_what_an_adapter_cannot_express_is_refused(saved, settings, said):
    folder, _ = saved("llama", **settings)
    with pytest.raises(ValueError, match=said):
        ml.load(folder)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_lora_that_began_with_a_part_of_the_base_weights_is_refused(saved, start):
    """peft takes this part out of the base model, which the factors alone don't say."""
    folder, _ = saved("llama", target_modules=["o_proj"], init_lora_weights=start)
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}', which may have changed the base model's own"):
        ml.load(folder)


@pytest.mark.parametrize(
    ("start", "taken"),
    [(start, True) for start in (True, False, None, "gaussian", "eva", "orthogonal", "mica")]
    + [(start, False) for start in ("pissa_niter_4", "PISSA", "OLoRA", "corda", "loftq", "lora_ga", "newer", 7, ["a"])],
)
def test_only_beginnings_that_leave_the_base_weights_alone_are_taken(saved, start, taken):
    folder, _ = saved("llama", target_modules=["o_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": start}))
    if taken:
        assert ml.load(folder).rank == 3
    else:
        with pytest.raises(ValueError, match="init_lora_weights="):
            ml.load(folder)


def test_damaged_and_hostile_folders_are_refused(saved, tmp_path, monkeypatch):
    folder, _ = saved("llama", target_modules=["o_proj"])
    config, weights = (folder / "adapter_config.json").read_text(), load_file(folder / "adapter_model.safetensors")

    def refused(said, new=None, tensors=None):
        (folder / "adapter_config.json").write_text(config if new is None else new)
        save_file(weights if tensors is None else tensors, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=said):
            ml.load(folder)

    first = next(name for name in weights if "lora_A" in name)
    refused("no JSON", "{")
    refused("no JSON", "[" * 100_000)
    refused("is a None adapter", "[]")
    refused("is a IA3 adapter", json.dumps({"peft_type": "IA3"}))
    refused("lora_alpha='8'", json.dumps({"peft_type": "LORA", "lora_alpha": "8"}))
    refused("alpha_pattern must be", json.dumps({"peft_type": "LORA", "alpha_pattern": [1]}))
    refused("no factor of a LoRA", None, {**weights, "x.weight": torch.ones(2)})
    refused("must have lora_A", None, {name: t for name, t in weights.items() if name != first})
    refused("must have lora_A", None, {**weights, first: torch.ones(3, 32, 1)})
    refused("must have lora_A", None, {**weights, first: torch.ones(3, 32, dtype=torch.long)})
    refused("have ranks 2 and 3", None, {**weights, first: torch.ones(2, 32)})
    refused("NaN or infinity", None, {**weights, first: torch.full((3, 32), torch.nan)})
    refused("updates nothing", None, {})
    monkeypatch.setattr(peft_files, "MAX_CONFIG", 10)
    refused("more than a configuration needs")
    monkeypatch.undo()
    monkeypatch.setattr(peft_files, "MAX_BYTES", 10)
    refused("may have at most 10")
    monkeypatch.undo()
    whole = (folder / "adapter_model.safetensors").read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        (folder / "adapter_model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            ml.load(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin, which is not read"):
        ml.load(folder)
    with pytest.raises(ValueError, match="is no adapter of peft"):
        ml.load(tmp_path)
    with pytest.raises(ValueError, match=r"\['layer'\] can't be chosen"):
        ml.load(folder, layer=3)


def test_a_loaded_lora_is_what_peft_loads(build, saved, directories):
    """The fixture's own model against a fresh one, so that the expectation is that of the folder."""
    folder, expected = saved("llama", target_modules=["o_proj"])
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directories("llama")), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(network(TOKENS).logits.log_softmax(-1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["pt", "gguf", "peft"])
def test_an_imported_value_gets_controls_evaluation_and_a_page(build, saved, tmp_path, kind):
    model, prompts = build("llama", "bridge"), ["w1 w2 w3", "w4 w5"]
    if kind == "peft":
        value = ml.load(saved("llama", target_modules=["o_proj"], layers_to_transform=[1])[0])
    elif kind == "pt":
        torch.save(3 * torch.randn(2, 32), tmp_path / "v.pt")
        value = ml.load(tmp_path / "v.pt", layer=1)
    else:
        ml.export(ml.SteeringVectors.from_tensor(torch.ones(1, 32), 1), "gguf", tmp_path / "v.gguf", model=model)
        value = ml.load(tmp_path / "v.gguf", model="llama")
        assert value.provenance["model"] == "llama"
    control = ml.random_like(value, model, prompts)
    assert type(control) is type(value) and len(control) == len(value)
    if kind != "peft":
        torch.testing.assert_close(control.radii, value.radii)
    written = ml.generate(model, prompts, value, 4, progress=False)
    assert set(written.table.kind) == {"steered", "random", "unsteered"}
    rates = ml.evaluate(written, {"a word": r"w\d+"})
    assert set(rates.table.vector) == set(range(len(value))) and rates.table.rate.between(0, 1).all()
    changes = ml.activation_changes(model, prompts[0], value)
    assert changes.change.isfinite().all()
    findings = ml.Findings(value, written, {"a word": r"w\d+"}, "Imported", changes=changes)
    page = ml.report(findings, path=tmp_path / "page.html")
    assert "Imported" in page.read_text() and page.stat().st_size > 10_000
