"""Does `peft` load what `to_peft` wrote, with the logits of the steered model?"""

import json
import math
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import melbo_lens as ml
from melbo_lens.exports import comparison
from melbo_lens.exports.weights import Lora
from melbo_lens.models.access import host_of
from tests import models
from tests.integration.methods.test_adapters import TOKENS, adapters_for

ARCHITECTURES = ["llama", "qwen2", "qwen3", "neox", "gpt2", "gemma2"]


def fitted_on(model, layers=1):
    return ml.fit_adapters(
        model,
        torch.tensor([[1, 5, 6, 7], [1, 8, 9, 4]]),
        layers,
        4,
        n_adapters=2,
        rank=3,
        optimizer="power",
        n_steps=4,
        progress=False,
    )


def peft_log_probs(folder, directory):
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), folder).eval()
    with torch.no_grad():
        return network(TOKENS).logits.log_softmax(-1)


def check_equal(model, adapter, folder, directory):
    with ml.steer(model, adapter), torch.no_grad():
        steered = host_of(model).forward(TOKENS).log_softmax(-1)
    with torch.no_grad():
        clean = host_of(model).forward(TOKENS).log_softmax(-1)
    loaded = peft_log_probs(folder, directory)
    torch.testing.assert_close(loaded, steered, atol=1e-4, rtol=0)
    assert (steered - clean).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["bridge", "compatible"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_gives_the_logits_of_the_steered_bridge(build, directories, tmp_path, name, kind):
    model = build(name, kind)
    adapter = -fitted_on(model)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has compared itself with the Hugging Face model
        ml.export(adapter, "peft", tmp_path / "adapter", model=model)
    check_equal(model, adapter, tmp_path / "adapter", directories(name))


def test_several_layers_are_exported_together(build, directories, tmp_path):
    model = build("llama", "bridge")
    adapter = fitted_on(model, [0, 1])[0]
    ml.export(adapter, "peft", tmp_path, model=model)
    check_equal(model, adapter, tmp_path, directories("llama"))
    assert len(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == 2


def of_ranks(model, ranks):
    """An adapter of random factors, whose layers have these ranks."""
    host, generator = host_of(model), torch.Generator().manual_seed(0)
    sites = {layer: host.weight_site(layer, "mlp") for layer in ranks}
    factors = {}
    for layer, rank in ranks.items():
        d_in, d_model = host.widths(layer, "mlp")
        a, b = (torch.randn(shape, generator=generator) for shape in ((1, rank, d_in), (1, d_model, rank)))
        factors[layer] = a, b
    return ml.SteeringAdapters(factors, torch.tensor([-0.3]), sites=sites)


@pytest.mark.parametrize("ranks", [{0: 1, 2: 3}, {0: 3, 2: 1}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers_of_different_ranks_are_exported_together(build, directories, tmp_path, name, ranks):
    model = build(name, "bridge")
    adapter = of_ranks(model, ranks)
    assert adapter.rank == 3
    ml.export(adapter, "peft", tmp_path, model=model, prompts="w1 w2 w3")
    check_equal(model, adapter, tmp_path, directories(name))
    torch.testing.assert_close(bridge_with(model, ml.load(tmp_path)), bridge_with(model, adapter), atol=1e-5, rtol=0)


def bridge_with(model, adapter):
    with ml.steer(model, adapter), torch.no_grad():
        return host_of(model).forward(TOKENS).log_softmax(-1)


@pytest.mark.parametrize("format", ["peft", "gguf-lora"])
@pytest.mark.parametrize("wrong", ["alpha", "factors"])
def test_the_check_sees_what_readers_compute(build, tmp_path, monkeypatch, format, wrong):
    """An alpha that is not the rank, or NaN in a factor, is as wrong as other factors."""
    if format == "gguf-lora":
        pytest.importorskip("gguf")
    right = getattr(Lora, wrong).fget
    spoiled = {
        "alpha": lambda self: 2 * right(self),
        "factors": lambda self: {name: (torch.nan * a, b) for name, (a, b) in right(self).items()},
    }
    model = build("llama", "bridge")
    adapter = of_ranks(model, {1: 2})
    monkeypatch.setattr(Lora, wrong, property(spoiled[wrong]))
    with pytest.raises(ValueError, match="with the exported update differ by"):
        ml.export(adapter, format, tmp_path / "out", model=model, prompts="w1 w2 w3")
    assert not list(tmp_path.iterdir())


def test_nan_on_any_prompt_is_the_largest_difference():
    """`max` would return whichever comes first."""
    rows = [torch.zeros(1, 1, 3), torch.full((1, 1, 3), math.nan)]
    for order in (rows, rows[::-1]):
        assert math.isnan(comparison.difference(lambda row: row, torch.zeros_like, order))
    assert math.isnan(comparison.largest([0.0, math.nan, 1.0]))


OFFICIAL = {"neox": "EleutherAI/pythia-70m", "qwen2": "Qwen/Qwen2-0.5B"}


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_default_processed_hooked_transformer_exports(tmp_path, monkeypatch, name):
    """Folded norms, centred weights and unembedding: what `from_pretrained` does unless told otherwise."""
    if not models.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    from transformer_lens import HookedTransformer

    monkeypatch.chdir(tmp_path)  # its loader wants an official name, and offline a folder of that name
    directory = models.save(name, tmp_path / OFFICIAL[name])
    network = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = HookedTransformer.from_pretrained(
        OFFICIAL[name], hf_model=network, tokenizer=tokenizer, device="cpu"
    ).eval()
    assert name == "qwen2" or float(model.blocks[1].mlp.W_out.mean(1).abs().max()) < 1e-6  # centred, where norms centre
    adapter = fitted_on(model)[0]
    ml.export(
        adapter, "peft", tmp_path / "adapter", model=model, hf_model=AutoModelForCausalLM.from_pretrained(directory)
    )
    check_equal(model, adapter, tmp_path / "adapter", directory)


def test_a_hooked_transformer_without_files_says_that_it_was_not_compared(tmp_path):
    if not models.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    organism = ml.organisms.load("modes", "hooked")
    adapter = ml.fit_adapters(
        organism.model, organism.prompts["clean"][0], 0, 3, n_adapters=1, rank=2, n_steps=1, progress=False
    )
    with pytest.warns(UserWarning, match="was not compared with a Hugging Face model"):
        ml.export(adapter, "peft", tmp_path, model=organism.model)
    network = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(organism.directory, dtype=torch.float32), tmp_path
    ).eval()
    ids = organism.model.to_tokens(organism.prompts["test"][0])
    with ml.steer(organism.model, adapter), torch.no_grad():
        expected = host_of(organism.model).forward(ids).log_softmax(-1)
        torch.testing.assert_close(network(ids).logits.log_softmax(-1), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("format", ["peft", "transformers", "vllm-lens"])
def test_a_processed_model_that_its_own_files_do_not_make_is_noticed(directories, tmp_path, format):
    """Without hf_model=, it is compared with its files, and these may be of other weights."""
    model = models.bridge(directories("llama"), compatible=True)
    with torch.no_grad():
        model.unembed.original_component.weight[3].mul_(-2)
    value = ml.SteeringVectors.from_tensor(torch.ones(1, 32), 1) if format == "vllm-lens" else fitted_on(model)[0]
    with pytest.warns(UserWarning, match=r"not compared .* give other log-probabilities"):
        ml.export(value, format, tmp_path / "out", model=model)
    network = AutoModelForCausalLM.from_pretrained(directories("llama"))
    with pytest.raises(ValueError, match=r"without any perturbation, the log-probabilities .* differ"):
        ml.export(value, format, tmp_path / "other", model=model, hf_model=network)


def test_a_loaded_adapter_needs_its_model(build, tmp_path):
    model = build("llama", "bridge")
    fitted_on(model).save(tmp_path / "a.safetensors")
    loaded = ml.load(tmp_path / "a.safetensors")[0]
    with pytest.raises(ValueError, match="pass model="):
        ml.export(loaded, "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ml.export(loaded, "peft", tmp_path / "out", model=model)


def test_a_model_of_other_weights_is_refused_and_one_of_another_dtype_is_not_compared(build, directories, tmp_path):
    model = build("llama", "bridge")
    adapter, other = fitted_on(model)[0], models.bridge(models.save("llama", tmp_path / "other", seed=5))
    with pytest.raises(ValueError, match="with other weights than those of this model"):
        ml.export(adapter, "peft", tmp_path / "out", model=other)
    assert not (tmp_path / "out").exists()
    with torch.no_grad():
        for half in (models.bridge(directories("llama"), dtype=torch.bfloat16), models.bridge(directories("llama"))):
            ml.export(adapter, "peft", tmp_path / f"{next(half.parameters()).dtype}", model=half)


def test_one_adapter_at_a_time(build, tmp_path):
    model = build("llama", "bridge")
    with pytest.raises(ValueError, match=r"holds one adapter, 2 were given"):
        ml.export(fitted_on(model), "peft", tmp_path, model=model)
    with pytest.raises(ValueError, match=r"peft holds updates of weights, and SteeringVectors were given"):
        ml.export(ml.SteeringVectors(torch.ones(1, 32), 1), "peft", tmp_path, model=model)
    with pytest.raises(ValueError, match=r"format='pfet' must be one of \['easysteer', 'gguf', .*'vllm-lens'\]"):
        ml.export(fitted_on(model)[0], "pfet", tmp_path, model=model)
    assert not list(tmp_path.iterdir())


def test_another_network_is_refused(build, tmp_path):
    model = build("llama", "bridge")
    other = AutoModelForCausalLM.from_pretrained(models.save("llama", tmp_path / "other", seed=5))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"without any perturbation, the log-probabilities .* differ"):
        ml.export(fitted_on(model)[0], "peft", tmp_path / "out", model=model, hf_model=other)
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_centred_weights_in_a_model_that_does_not_centre_are_refused_by_name(directories, tmp_path):
    if not models.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    model = models.hooked(directories("gpt2"), normalization_type="RMS")
    model.cfg.original_architecture = "LlamaForCausalLM"
    with torch.no_grad():
        weight = model.blocks[1].mlp.W_out
        weight.sub_(weight.mean(1, keepdim=True))
    with pytest.raises(ValueError, match="center_writing_weights has centred"):
        ml.export(adapters_for(model, n=1), "peft", tmp_path / "out", model=model, prompts="w1 w2")


def test_processing_that_changes_the_hidden_activation_is_refused(build, directories, tmp_path):
    """Doubling W_in's half of a gated MLP and halving W_out is harmless to the model and changes what A reads."""
    model = models.bridge(directories("llama"))
    mlp = model.blocks[1].mlp
    with torch.no_grad():
        getattr(mlp, "in").original_component.weight.mul_(2)
        mlp.out.original_component.weight.div_(2)
    network = AutoModelForCausalLM.from_pretrained(directories("llama"))
    with pytest.raises(ValueError, match="what enters them is another activation"):
        ml.export(fitted_on(model)[0], "peft", tmp_path / "out", model=model, hf_model=network)


def test_a_model_without_a_counterpart_is_refused(directories, tmp_path):
    if not models.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    model = models.hooked(directories("gpt2"))
    with pytest.raises(ValueError, match="no Hugging Face counterpart"):
        ml.export(adapters_for(model, n=1), "peft", tmp_path / "out", model=model, prompts="w1 w2")


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "bridge") for name in ("llama", "qwen2", "neox", "gpt2", "mixtral", "gemma2")]
    + [(name, "compatible") for name in ("mixtral", "gemma2")],
)
def test_factors_of_cpe_are_loaded_by_peft_alone_and_composed(build, directories, tmp_path, name, kind):
    model = build(name, kind)
    found = ml.fit_cpe(
        model, torch.tensor([[1, 5, 6, 7], [1, 8, 9, 4]]), [0, 1], 4, n_factors=3, n_steps=3, scale=3.0, progress=False
    )
    ml.export(found[1], "peft", tmp_path / "one", model=model)
    check_equal(model, found[1], tmp_path / "one", directories(name))
    several = ml.concatenate([found[0], -2.0 * found[2]])
    composed = several.composed()
    assert len(composed) == 1 and composed.rank == 2 and composed.source_layers == (0, 1)
    ml.export(composed, "peft", tmp_path / "both", model=model)
    check_equal(model, composed, tmp_path / "both", directories(name))
    with torch.no_grad(), ml.steer(model, [found[0], -2.0 * found[2]]):
        together = host_of(model).forward(TOKENS)
    with torch.no_grad(), ml.steer(model, composed):
        torch.testing.assert_close(host_of(model).forward(TOKENS), together, atol=1e-4, rtol=1e-4)
