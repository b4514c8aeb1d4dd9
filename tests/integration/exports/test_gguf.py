"""Do llama.cpp's files hold what they should, by the `gguf` package's reader, and do they steer the plain model alike?

The plain model is a fresh one of `transformers`, to which the test adds what the file says, by llama.cpp's rules.
"""

import os
import sys
import warnings

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import melbo_lens as ml
from melbo_lens.exports import layer_outputs
from melbo_lens.exports.gguf_files import ARCHITECTURES
from melbo_lens.exports.gguf_vectors import write_control_vector
from melbo_lens.imports.gguf import read_all
from melbo_lens.models.access import host_of
from tests import architectures, models
from tests.integration.methods.test_adapters import TOKENS, adapters_for, gaussian

NAMES = ["llama", "qwen2", "neox", "gpt2", "gemma2"]
BLOCKS = {"gpt2": "transformer.h", "bloom": "transformer.h", "neox": "gpt_neox.layers"}
# llama.cpp's name of a weight -> the module of the Hugging Face model, written down by hand
MODULES = {
    "gpt2": {"ffn_down": "mlp.c_proj", "attn_output": "attn.c_proj"},
    "neox": {"ffn_down": "mlp.dense_4h_to_h", "attn_output": "attention.dense"},
}
LLAMAS = {"ffn_down": "mlp.down_proj", "attn_output": "self_attn.o_proj"}
GENERAL = {"neox": "gptneox", "mixtral": "llama"}  # the others are called alike


def vector(layer, site="mlp_out", seed=0, scale=1.0):
    return ml.SteeringVectors(scale * gaussian(1, models.D_MODEL, seed=seed + layer), layer, site=site)


def fields(file):
    return {name: file.get_field(name).contents() for name in file.fields if not name.startswith("GGUF.")}


def log_probs(network):
    with torch.no_grad():
        return network(TOKENS).logits.log_softmax(-1)


def steered(model, perturbation):
    with ml.steer(model, perturbation), torch.no_grad():
        return host_of(model).forward(TOKENS).log_softmax(-1)


def layers_of(network, name):
    return network.get_submodule(BLOCKS.get(name, "model.layers"))


def under_control(path, directory, name):
    """The plain model, to whose layer N each tensor `direction.N` is added."""
    network = AutoModelForCausalLM.from_pretrained(directory).eval()

    def adding(direction):
        def add(module, arguments, output):
            return (output[0] + direction, *output[1:]) if isinstance(output, tuple) else output + direction

        return add

    for tensor in gguf.GGUFReader(path).tensors:
        word, number = tensor.name.split(".")
        assert word == "direction"
        layers_of(network, name)[int(number)].register_forward_hook(adding(torch.tensor(tensor.data)))
    return log_probs(network)


@pytest.mark.parametrize("kind", ["bridge", "compatible"])
@pytest.mark.parametrize("name", NAMES)
def test_directions_added_to_the_plain_models_layers_give_the_steered_logits(build, directories, tmp_path, name, kind):
    model = build(name, kind)
    several = [vector(3, "resid_post"), -vector(1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has compared itself with the Hugging Face model
        ml.export(several, "gguf", tmp_path / "v.gguf", model=model)
    expected = steered(model, several)
    torch.testing.assert_close(under_control(tmp_path / "v.gguf", directories(name), name), expected, atol=1e-4, rtol=0)
    assert (expected - host_of(model).forward(TOKENS).log_softmax(-1)).abs().max() > 0.05


def test_layers_that_return_tuples_are_compared_too(tmp_path):
    """In transformers 5, those of Bloom do."""
    directory = architectures.save("bloom", tmp_path / "model")
    model = models.bridge(directory)
    ml.export(vector(1), "gguf", tmp_path / "v.gguf", model=model)
    found = under_control(tmp_path / "v.gguf", directory, "bloom")
    torch.testing.assert_close(found, steered(model, vector(1)), atol=1e-4, rtol=0)


def test_the_file_holds_one_float32_tensor_for_each_layer_and_says_what_it_is(build, tmp_path):
    model = build("llama", "bridge")
    several = [vector(layer) for layer in (2, 3, 1)]
    assert ml.export(several, "gguf", tmp_path / "v.gguf", model=model) == tmp_path / "v.gguf"
    file = gguf.GGUFReader(tmp_path / "v.gguf")
    assert [tensor.name for tensor in file.tensors] == ["direction.1", "direction.2", "direction.3"]
    for tensor in file.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.shape.tolist() == [models.D_MODEL]
        assert tensor.data.tolist() == vector(int(tensor.name[-1])).values[0].tolist()
    assert fields(file) == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.method": "unknown",
        "controlvector.layer_count": 3,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]


def test_a_fitted_vector_comes_back_as_the_same_perturbation(build, tmp_path):
    model = build("llama", "bridge")
    fitted = ml.fit_vectors(
        model, torch.tensor([[1, 5, 6, 7]]), 1, 4, n_vectors=2, radius=2.0, n_steps=3, progress=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.export(fitted[1], "gguf", tmp_path / "v.gguf", model=model)
    (loaded,) = read_all(tmp_path / "v.gguf")
    assert torch.equal(loaded.values, fitted[1].values) and loaded.source_layer == 1
    assert loaded.provenance["method"] == fitted.provenance["method"] and loaded.provenance["model_hint"] == "llama"
    torch.testing.assert_close(steered(model, loaded), steered(model, fitted[1]), atol=1e-5, rtol=0)


def test_without_a_model_it_says_that_it_was_not_compared(build, tmp_path):
    with pytest.warns(UserWarning, match=r"were not compared .* Pass model= to compare"):
        ml.export(vector(1), "gguf", tmp_path / "v.gguf")
    assert fields(gguf.GGUFReader(tmp_path / "v.gguf"))["controlvector.model_hint"] == "unknown"
    if models.HAS_HOOKED:
        with pytest.warns(UserWarning, match=r"were not compared .* Pass hf_model= to compare"):
            ml.export(vector(1), "gguf", tmp_path / "v.gguf", model=build("gpt2", "hooked"))


def test_a_hooked_transformer_is_compared_with_the_network_that_it_was_made_from(tmp_path):
    if not models.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    organism = ml.organisms.load("modes", "hooked")
    network = AutoModelForCausalLM.from_pretrained(organism.directory, dtype=torch.float32)
    one = ml.SteeringVectors(gaussian(1, organism.model.cfg.d_model), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.export(one, "gguf", tmp_path / "v.gguf", model=organism.model, hf_model=network)


REFUSED = [
    ([vector(0)], r"can't hold a vector of layer 0: .* blocks 1 and later"),
    ([vector(2), vector(0, "resid_post")], "can't hold a vector of layer 0"),
    ([vector(1), vector(2), vector(1, "resid_post", seed=5)], r"several of layers \[1\] were given: add them first"),
    ([vector(1, "attn_out")], r"a vector at site='attn_out' passes through the rest of its block"),
    ([ml.SteeringVectors(torch.ones(3, models.D_MODEL), 1)], r"one vector for each layer, 3 of layer 1 were given"),
    ([], "was given nothing to export"),
    ([vector(1), ml.SteeringVectors(torch.ones(1, 9), 2)], r"widths \[9, 32\] were given"),
    ([vector(4)], "belongs to layer 4 of a model"),
    ([ml.SteeringVectors(torch.ones(1, 9), 2)], "with d_model 9"),
]


@pytest.mark.parametrize(("several", "said"), REFUSED, ids=[said[:30] for _, said in REFUSED])
def test_what_llama_cpp_can_not_express_is_refused_and_nothing_is_written(build, tmp_path, several, said):
    with pytest.raises(ValueError, match=said):
        ml.export(several, "gguf", tmp_path / "v.gguf", model=build("llama", "bridge"))
    assert not list(tmp_path.iterdir())


def test_each_format_refuses_the_others_kind(build, tmp_path):
    model = build("llama", "bridge")
    with pytest.raises(ValueError, match="gguf holds vectors, and SteeringAdapters were given"):
        ml.export(adapters_for(model, n=1), "gguf", tmp_path / "x", model=model)
    with pytest.raises(ValueError, match="gguf-lora holds updates of weights, and SteeringVectors were given"):
        ml.export(vector(1), "gguf-lora", tmp_path / "x", model=model)
    with pytest.raises(ValueError, match=r"peft holds updates of weights, and list were given"):
        ml.export([adapters_for(model, n=1)], "peft", tmp_path / "x", model=model)
    with pytest.raises(ValueError, match=r'gguf-lora holds one adapter, 2 were given: .*adapters\[0\], "gguf-lora"'):
        ml.export(adapters_for(model), "gguf-lora", tmp_path / "x", model=model, prompts="w1 w2")
    assert not list(tmp_path.iterdir())


def test_a_vector_that_acts_elsewhere_in_the_plain_model_is_refused(build, tmp_path, monkeypatch):
    """As it would be in a model whose MLP is not written straight to the stream, or if layers were counted from 1."""
    model = build("llama", "bridge")
    right = layer_outputs.layer_name
    monkeypatch.setattr(layer_outputs, "layer_name", lambda host, layer: right(host, layer + 1))
    with pytest.raises(ValueError, match=r"output of layers \[1\] differ by .* does not reach the stream .* unchanged"):
        ml.export(vector(1), "gguf", tmp_path / "v.gguf", model=model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["gguf", "gguf-lora"])
def test_another_network_is_refused(build, tmp_path, format):
    model = build("llama", "bridge")
    other = AutoModelForCausalLM.from_pretrained(models.save("llama", tmp_path / "other", seed=5))
    one = vector(1) if format == "gguf" else adapters_for(model, n=1)
    with pytest.raises(ValueError, match=r"without any perturbation, the log-probabilities .* differ"):
        ml.export(one, format, tmp_path / "out", model=model, hf_model=other, prompts="w1 w2 w3")
    assert not (tmp_path / "out").exists()


def test_the_model_is_left_as_it_was(build, tmp_path):
    model = build("llama", "bridge")
    network, before = host_of(model).networks[-1], {}
    before |= {name: tensor.clone() for name, tensor in network.state_dict().items()}
    flags = [parameter.requires_grad for parameter in network.parameters()]
    ml.export(vector(1), "gguf", tmp_path / "v.gguf", model=model)
    ml.export(adapters_for(model, n=1), "gguf-lora", tmp_path / "a.gguf", model=model, prompts="w1 w2 w3")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in network.parameters()]
    assert not any(module._forward_hooks for name, module in network.named_modules() if name.endswith("layers.1"))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(build, tmp_path, monkeypatch):
    model, path = build("llama", "bridge"), tmp_path / "v.gguf"
    ml.export(vector(1), "gguf", path, model=model)
    old = path.read_bytes()

    def broken(*_, **__):
        raise OSError("the disk is full")

    for owner, name in ((gguf.GGUFWriter, "write_tensors_to_file"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            with pytest.raises(OSError, match="the disk is full"):
                ml.export(vector(2), "gguf", path, model=model)
    assert path.read_bytes() == old and [one.name for one in tmp_path.iterdir()] == ["v.gguf"]
    with pytest.raises(OSError, match="can't be written"):
        ml.export(vector(2), "gguf", tmp_path / "no such folder" / "v.gguf", model=model)


@pytest.mark.parametrize("format", ["gguf", "gguf-lora"])
def test_without_the_package_the_command_to_install_it_is_named(build, tmp_path, monkeypatch, format):
    model = build("llama", "bridge")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(type(host_of(model)), "forward", None)  # nothing may be computed before
    one = vector(1) if format == "gguf" else adapters_for(model, n=1)
    with pytest.raises(ModuleNotFoundError, match=r"pip install melbo-lens\[export\]"):
        ml.export(one, format, tmp_path / "x", model=model)


def test_the_bare_writer_takes_any_layer(tmp_path):
    write_control_vector(tmp_path / "v.gguf", {3: torch.ones(4), 0: torch.zeros(4).half()}, "contrastive", "qwen2")
    assert [one.source_layer for one in read_all(tmp_path / "v.gguf")] == [0, 3]
    file = gguf.GGUFReader(tmp_path / "v.gguf")
    assert [tensor.name for tensor in file.tensors] == ["direction.0", "direction.3"]
    found = fields(file)
    assert (found["controlvector.method"], found["controlvector.model_hint"]) == ("contrastive", "qwen2")


def with_lora(path, directory, name):
    """The plain model with ``W + alpha / rank * B A``, by llama.cpp's formula and names."""
    file = gguf.GGUFReader(path)
    told = fields(file)
    network = AutoModelForCausalLM.from_pretrained(directory).eval()
    tensors = {tensor.name: tensor for tensor in file.tensors}
    assert len(tensors) == len(file.tensors)
    weights = {tensor_name.rsplit(".", 1)[0] for tensor_name in tensors}
    for weight_name in weights:
        block, number, part, word = weight_name.split(".")
        assert (block, word) == ("blk", "weight")
        a, b = (tensors[f"{weight_name}.lora_{letter}"] for letter in "ab")
        assert a.tensor_type == b.tensor_type == gguf.GGMLQuantizationType.F32
        module = layers_of(network, name)[int(number)].get_submodule(MODULES.get(name, LLAMAS)[part])
        weight = module.weight.T if name == "gpt2" else module.weight  # [out in], as llama.cpp has it
        rank = int(b.shape[0])  # llama.cpp: ne[0] of B
        assert (int(a.shape[0]), int(b.shape[1]), int(a.shape[1])) == (weight.shape[1], weight.shape[0], rank)
        with torch.no_grad():
            weight.add_(told["adapter.lora.alpha"] / rank * torch.tensor(b.data) @ torch.tensor(a.data))
    return told, weights, log_probs(network)


def attention_adapters(model, layers=(0, 2), ranks=(1, 1)):
    host = host_of(model)
    sites = {layer: host.weight_site(layer, "attn") for layer in layers}
    factors = {}
    for layer, rank in zip(layers, ranks, strict=True):
        d_in, d_model = host.widths(layer, "attn")
        factors[layer] = gaussian(1, rank, d_in, seed=layer), gaussian(1, d_model, rank, seed=layer + 9)
    return ml.SteeringAdapters(factors, torch.tensor([-0.3]), sites=sites)


@pytest.mark.parametrize("kind", ["bridge", "compatible"])
@pytest.mark.parametrize("name", NAMES)
def test_a_lora_of_the_mlp_updates_the_plain_model_alike(build, directories, tmp_path, name, kind):
    model = build(name, kind)
    adapter = -adapters_for(model, n=1, layer=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ml.export(adapter, "gguf-lora", tmp_path / "a.gguf", model=model, prompts="w1 w2 w3 w4")
    told, weights, found = with_lora(tmp_path / "a.gguf", directories(name), name)
    expected = steered(model, adapter)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - host_of(model).forward(TOKENS).log_softmax(-1)).abs().max() > 0.05
    assert weights == {"blk.0.ffn_down.weight"}
    assert told == {
        "general.architecture": GENERAL.get(name, name),
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 3.0,
    }


@pytest.mark.parametrize("name", [*NAMES, "mixtral"])
def test_a_lora_of_the_attention_in_several_layers_updates_the_plain_model_alike(build, directories, tmp_path, name):
    model = build(name, "bridge")
    adapter = attention_adapters(model)
    ml.export(adapter, "gguf-lora", tmp_path / "a.gguf", model=model, prompts="w1 w2 w3 w4")
    told, weights, found = with_lora(tmp_path / "a.gguf", directories(name), name)
    expected = steered(model, adapter)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - host_of(model).forward(TOKENS).log_softmax(-1)).abs().max() > 0.05
    assert weights == {"blk.0.attn_output.weight", "blk.2.attn_output.weight"}
    assert told["general.architecture"] == GENERAL.get(name, name) and told["adapter.lora.alpha"] == 1.0


@pytest.mark.parametrize("ranks", [(1, 3), (3, 1)], ids=str)
def test_layers_of_different_ranks_update_the_plain_model_alike(build, directories, tmp_path, ranks):
    """llama.cpp divides the one alpha by the rank of each tensor."""
    model = build("llama", "bridge")
    adapter = attention_adapters(model, ranks=ranks)
    ml.export(adapter, "gguf-lora", tmp_path / "a.gguf", model=model, prompts="w1 w2 w3 w4")
    *_, found = with_lora(tmp_path / "a.gguf", directories("llama"), "llama")
    torch.testing.assert_close(found, steered(model, adapter), atol=1e-4, rtol=0)


def test_an_architecture_that_llama_cpp_names_otherwise_is_asked_for_before_anything_is_computed(
    build, tmp_path, monkeypatch
):
    model = build("llama", "bridge")
    adapter = adapters_for(model, n=1)
    with monkeypatch.context() as patch:
        patch.setattr(type(host_of(model)), "forward", None)
        for wrong in ("llamma", "mamba"):  # no name, and one without these modules
            with pytest.raises(ValueError, match=f"architecture='{wrong}' .* pass architecture="):
                ml.export(adapter, "gguf-lora", tmp_path / "a.gguf", model=model, architecture=wrong, prompts="w1 w2")
        patch.delitem(ARCHITECTURES, "LlamaForCausalLM")
        with pytest.raises(ValueError, match=r"architecture='unknown' .* of LlamaForCausalLM: pass architecture="):
            ml.export(adapter, "gguf-lora", tmp_path / "a.gguf", model=model, prompts="w1 w2")
    assert not list(tmp_path.iterdir())
    ml.export(adapter, "gguf-lora", tmp_path / "a.gguf", model=model, architecture="smollm3", prompts="w1 w2")
    assert fields(gguf.GGUFReader(tmp_path / "a.gguf"))["general.architecture"] == "smollm3"


def test_every_known_architecture_is_one_of_llama_cpps():
    assert set(ARCHITECTURES.values()) <= set(gguf.MODEL_ARCH_NAMES.values())
