"""Does a plain Hugging Face model, steered without TransformerLens, do what our steered bridge does?"""

import ast
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import melbo_lens as ml
from melbo_lens.exports import standalone
from melbo_lens.models.access import host_of

NAMES = ["llama", "qwen3", "neox", "gemma2", "mixtral", "gpt2"]
TOKENS = torch.tensor([[1, 5, 6, 7, 9], [1, 8, 9, 4, 30]])
D_MODEL, LAYER = 32, 1


def a_vector(site="mlp_out", layer=LAYER, seed=0):
    values = 3 * torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return ml.SteeringVectors.from_tensor(values, layer, site)


def an_adapter(model, site, layers=LAYER):
    settings = {"n_adapters": 2, "rank": 2, "n_steps": 2, "optimizer": "power", "scale": 3.0, "progress": False}
    return ml.fit_adapters(model, TOKENS, layers, 4, site=site, **settings)[1]


@pytest.fixture
def plain(directories):
    """A fresh Hugging Face model, which TransformerLens has never seen."""
    return lambda name: AutoModelForCausalLM.from_pretrained(directories(name), dtype=torch.float32).eval()


def logits_of(network):
    with torch.no_grad():
        return network(TOKENS).logits


def bridge_logits(model, perturbation):
    with torch.no_grad(), ml.steer(model, perturbation):
        return host_of(model).forward(TOKENS)


def check(network, model, perturbation):
    clean = logits_of(network)
    for scale in (1.0, -2.0):
        with ml.on_transformers(network, perturbation, scale) as steered:
            assert steered is network
            found = logits_of(network)
        torch.testing.assert_close(found, bridge_logits(model, scale * perturbation), atol=1e-4, rtol=1e-4)
        assert (found - clean).abs().max() > 0.05
    assert torch.equal(logits_of(network), clean)


@pytest.mark.parametrize("site", ["mlp_out", "resid_post", "attn_out"])
@pytest.mark.parametrize("name", NAMES)
def test_a_vector_gives_the_logits_of_the_steered_bridge(build, plain, name, site):
    check(plain(name), build(name, "bridge"), a_vector(site))


@pytest.mark.parametrize("site", ["mlp", "attn"])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_gives_the_logits_of_the_steered_bridge(build, plain, name, site):
    model = build(name, "bridge")
    if (name, site) == ("mixtral", "mlp"):
        adapter = ml.SteeringAdapters.from_factors(torch.ones(1, 2, 48), torch.ones(1, D_MODEL, 2), LAYER)
        with (
            pytest.raises(ValueError, match=r"layer 1 .* has none of the mlp_weights"),
            ml.on_transformers(plain(name), adapter),
        ):
            pass
        return
    check(plain(name), model, an_adapter(model, site))


def test_an_adapter_of_several_layers(build, plain):
    model = build("llama", "bridge")
    check(plain("llama"), model, an_adapter(model, "mlp", [0, 1, 2]))


@pytest.fixture
def baked(plain):
    """A llama whose weights do what the vector and the adapter do, so that no hook is needed."""

    def model(vector, adapter):
        network = plain("llama")
        with torch.no_grad():
            network.model.layers[LAYER].mlp.down_proj.bias = nn.Parameter(vector.values[0].clone())
            update = adapter.scales[0] * adapter.B[0] @ adapter.A[0]
            network.model.layers[LAYER].self_attn.o_proj.weight += update
        return network

    return model


GENERATIONS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_generation_writes_what_a_model_with_the_change_in_its_weights_writes(build, plain, baked, name):
    vector, adapter = a_vector(), an_adapter(build("llama", "bridge"), "attn")
    network, settings = plain("llama"), {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 49}
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])  # padded on the left

    def written(model):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return model.generate(TOKENS, attention_mask=mask, **settings, **GENERATIONS[name])

    clean = written(network)
    with ml.on_transformers(network, vector), ml.on_transformers(network, adapter):
        found = written(network)
    assert torch.equal(found, written(baked(vector, adapter)))
    assert not torch.equal(found, clean) and torch.equal(written(network), clean)


def hooks_of(network):
    return [handle for module in network.modules() for handle in module._forward_hooks.values()]


def test_nothing_is_left_after_an_exception_and_blocks_nest(plain):
    network, one, other = plain("llama"), a_vector(), a_vector(layer=2, seed=1)
    clean, flags = logits_of(network), [p.requires_grad for p in network.parameters()]
    with ml.on_transformers(network, one):
        alone = logits_of(network)
        with suppress(KeyboardInterrupt), ml.on_transformers(network, other):
            both = logits_of(network)
            raise KeyboardInterrupt
        assert torch.equal(logits_of(network), alone) and not torch.equal(both, alone)
        with ml.on_transformers(network, one), ml.on_transformers(network, one, -1.0):
            torch.testing.assert_close(logits_of(network), alone, atol=1e-4, rtol=1e-4)
    assert not hooks_of(network) and torch.equal(logits_of(network), clean)
    assert [p.requires_grad for p in network.parameters()] == flags


def test_half_precision_is_rounded_once(plain):
    network, vector = plain("llama").to(torch.bfloat16), a_vector()
    seen = []
    handle = network.model.layers[LAYER].register_forward_hook(lambda module, args, output: seen.append(output))
    with ml.on_transformers(network, vector):
        assert logits_of(network).dtype == torch.bfloat16
    handle.remove()
    after = []
    with ml.on_transformers(network, vector):
        handle = network.model.layers[LAYER].register_forward_hook(lambda module, args, output: after.append(output))
        logits_of(network)
        handle.remove()
    assert torch.equal(after[0], (seen[0].float() + vector.values[0]).bfloat16())


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (ml.SteeringVectors.from_tensor(torch.ones(2, D_MODEL), 1), ValueError, r"one vector .* 2 were given"),
        (ml.SteeringVectors.from_tensor(torch.ones(1, D_MODEL), 9), ValueError, "layer 9 .* layers 0 to 3"),
        (ml.SteeringVectors.from_tensor(torch.ones(1, 16), 1), ValueError, "d_model 16, this model 32"),
        (
            ml.SteeringAdapters.from_factors(torch.ones(1, 2, 47), torch.ones(1, D_MODEL, 2), 1),
            ValueError,
            "reads 47 numbers, its mlp_weights 48",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_attached(plain, value, error, said):
    network = plain("llama")
    with pytest.raises(error, match=said), ml.on_transformers(network, value):
        pass
    assert not hooks_of(network)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), True])
def test_a_scale_must_be_a_finite_number(plain, scale):
    with (
        pytest.raises(ValueError, match="must be a finite number"),
        ml.on_transformers(plain("llama"), a_vector(), scale),
    ):
        pass
    if scale is not True:
        with (
            pytest.raises(ValueError, match="must be a finite number"),
            standalone.steered(plain("llama"), [standalone.Edit("layer_output", 1, (torch.ones(D_MODEL),))], scale),
        ):
            pass


def test_only_a_model_of_transformers_is_taken(build, directories):
    for thing, said in (
        (AutoTokenizer.from_pretrained(directories("llama")), "a .*Tokenizer.* was given"),
        (build("llama", "bridge"), "a model of TransformerLens was given"),
        (nn.Linear(2, 2), "a Linear was given"),
    ):
        with pytest.raises(TypeError, match=said), ml.on_transformers(thing, a_vector()):
            pass


class Toy(nn.Module):
    """Two layers, each with a list of two experts; optionally a second stack of two layers."""

    def __init__(self, stacks=1, **settings):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=2, hidden_size=D_MODEL, **settings)

        def layers():
            experts = [nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}) for _ in range(2)]
            return nn.ModuleList(experts)

        self.stacks = nn.ModuleDict({f"stack{i}": layers() for i in range(stacks)})


def test_the_stack_of_layers_is_found_or_the_model_refused():
    toy = Toy()
    assert standalone.decoder_layers(toy) is toy.stacks["stack0"]
    for other, said in (
        (Toy(2), "Toy has 2 stacks of 2 layers"),
        (Toy(0), "Toy has no stacks of 2 layers"),
        (Toy(1, is_encoder_decoder=True), "only a decoder"),
    ):
        with pytest.raises(ValueError, match=said):
            standalone.decoder_layers(other)


def test_a_layer_whose_output_is_no_stream_is_refused_when_it_runs(plain):
    network = plain("llama")
    layers = standalone.decoder_layers(network)
    layers[LAYER].register_forward_hook(lambda module, arguments, output: output[None])  # as if of several streams
    with pytest.raises(ValueError, match=r"not \[batch pos d_model\]"), ml.on_transformers(network, a_vector()):
        logits_of(network)


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


WITHOUT_TRANSFORMER_LENS = """
import sys
sys.modules["transformer_lens"] = None  # any import of it fails
import torch, melbo_lens as ml
from transformers import AutoModelForCausalLM
network = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad(), ml.on_transformers(network, ml.load(sys.argv[2])):
    torch.save(network(torch.tensor(eval(sys.argv[3]))).logits, sys.argv[4])
assert not [name for name in sys.modules if name.startswith("plotly") or name.startswith("sklearn")]
"""


def test_a_value_loads_and_steers_where_there_is_no_transformer_lens(build, directories, tmp_path):
    adapter, model = an_adapter(build("llama", "bridge"), "mlp"), build("llama", "bridge")
    adapter.save(tmp_path / "a.safetensors")
    arguments = (directories("llama"), tmp_path / "a.safetensors", TOKENS.tolist(), tmp_path / "logits")
    done = run(WITHOUT_TRANSFORMER_LENS, *arguments)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "logits", weights_only=True)
    torch.testing.assert_close(found, bridge_logits(model, adapter), atol=1e-4, rtol=1e-4)


ALONE = """
import sys
for name in ("transformer_lens", "melbo_lens", "pandas", "jaxtyping", "peft"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[2])
import torch
from steer import load, steered
from transformers import AutoModelForCausalLM
network = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
edits = load(sys.argv[2] + "/steering.safetensors")
with torch.no_grad(), steered(network, edits, scale=2.0):
    torch.save(network(torch.tensor(eval(sys.argv[3]))).logits, sys.argv[4])
"""


@pytest.mark.parametrize("kind", ["vector", "adapter"])
def test_the_exported_code_steers_with_torch_and_safetensors_alone(build, directories, tmp_path, kind):
    model = build("gemma2", "bridge")
    value = a_vector("attn_out") if kind == "vector" else an_adapter(model, "mlp", [0, 1])
    folder = ml.export(value, "transformers", tmp_path / "out", model=model)
    assert sorted(path.name for path in folder.iterdir()) == ["steer.py", "steering.safetensors"]
    done = run(ALONE, directories("gemma2"), folder, TOKENS.tolist(), tmp_path / "logits")
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "logits", weights_only=True)
    torch.testing.assert_close(found, bridge_logits(model, 2 * value), atol=1e-4, rtol=1e-4)


def test_the_exported_code_imports_nothing_else():
    tree = ast.parse(Path(standalone.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"torch", "safetensors"}


def test_an_export_for_another_model_or_of_several_vectors_is_refused(build, directories, tmp_path):
    model, other = build("llama", "bridge"), build("qwen2", "bridge")
    learned = ml.fit_vectors(model, TOKENS, 1, 3, n_vectors=2, radius=1.0, n_steps=1, progress=False)
    for value, where, said in (
        (learned, model, "2 were given"),
        (learned[0], other, "with other weights than those of this model"),
        (ml.SteeringVectors.from_tensor(torch.ones(1, 16), 1), model, "d_model 16"),
    ):
        with pytest.raises(ValueError, match=said):
            ml.export(value, "transformers", tmp_path / "out", model=where)
    assert not (tmp_path / "out").exists()


def test_a_wrong_edit_is_noticed_before_anything_is_written(build, tmp_path, monkeypatch):
    """The export compares: here its code is broken, so that it adds twice the vector."""
    model, right = build("llama", "bridge"), standalone._adding_vector
    monkeypatch.setattr(standalone, "_adding_vector", lambda vector, scale: right(vector, 2 * scale))
    with pytest.raises(ValueError, match="differ by"):
        ml.export(a_vector(), "transformers", tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["x"], "holds 'x'"),
        (["layer_output.one.vector"], "holds 'layer_output.one.vector'"),
        (["head.1.vector"], "holds 'head.1.vector'"),
        (["mlp_weights.1.A"], r"holds \['A'\] for mlp_weights of layer 1, not \['A', 'B'\]"),
        (["layer_output.1.A", "layer_output.1.vector"], r"holds \['A', 'vector'\]"),
    ],
)
def test_the_exported_code_refuses_a_file_that_no_export_wrote(tmp_path, names, said):
    save_file({name: torch.ones(2) for name in names}, tmp_path / "steering.safetensors")
    with pytest.raises(ValueError, match=said):
        standalone.load(tmp_path / "steering.safetensors")


@pytest.mark.parametrize(
    "shapes",
    [
        {"layer_output.1.vector": ()},
        {"attention_output.1.vector": (32, 32)},
        {"layer_output.1.vector": (1, 32)},
        {"layer_output.1.vector": (0,)},
        {"mlp_weights.1.A": (48,), "mlp_weights.1.B": (32,)},
        {"mlp_weights.1.A": (2, 48), "mlp_weights.1.B": (32, 3)},
        {"attention_weights.1.A": (1, 2, 32), "attention_weights.1.B": (1, 32, 2)},
        {"attention_weights.1.A": (0, 32), "attention_weights.1.B": (32, 0)},
    ],
    ids=str,
)
def test_the_exported_code_refuses_tensors_of_other_shapes(tmp_path, shapes):
    """Some of these would be broadcast, and steer in silence."""
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "steering.safetensors")
    with pytest.raises(ValueError, match=r"of layer 1: a vector must be \[d_model\]"):
        standalone.load(tmp_path / "steering.safetensors")


def test_without_a_model_an_export_says_that_it_was_not_compared(tmp_path):
    with pytest.warns(UserWarning, match="not compared"):
        ml.export(a_vector(), "transformers", tmp_path / "out")
    (edit,) = standalone.load(tmp_path / "out" / "steering.safetensors")
    assert edit.place == "layer_output" and edit.layer == LAYER
    assert torch.equal(edit.tensors[0], a_vector().values[0])


def test_importing_takes_less_than_a_second_and_no_library():
    began = time.monotonic()
    done = run("import sys, melbo_lens; print({'torch', 'transformer_lens', 'transformers'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr
    assert time.monotonic() - began < 1
