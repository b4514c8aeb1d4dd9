"""Do models with quantised weights work as the same weights do in float32?"""

import pytest
import torch
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import melbo_lens as ml
from melbo_lens.models import blocks
from melbo_lens.models.host import Host

torchao = pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
PROMPTS = ["w1 w2 w3 w4 w5", "w6 w7 w8"]
SOURCE, TARGET = 1, 4


def int8(network):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(
        network, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, torch.nn.Linear) and "layers" in name
    )
    return network


def with_bitsandbytes(make):
    def quantise(network):
        for block in network.model.layers:
            for parent in list(block.modules()):
                for name, child in list(parent.named_children()):
                    if type(child) is torch.nn.Linear:
                        made = make(child)
                        setattr(parent, name, made)
        return network

    return quantise


def eight_bits(linear):
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=0.0
    )
    made.load_state_dict(linear.state_dict())
    return made.to("cpu").requires_grad_(False)


def four_bits(linear):
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
    )
    made.load_state_dict(linear.state_dict())
    made.support_avx512bf16_for_cpu = False  # its kernel there has no gradient
    return made.to("cpu").requires_grad_(False)


def dequantised(network, reference):
    """Plain float32 weights that give what the quantised ones give: each linear map applied to the unit matrix."""
    plain = dict(reference.named_modules())
    for name, module in network.named_modules():
        if "layers" in name and hasattr(module, "in_features"):
            with torch.no_grad():
                bias = 0 if module.bias is None else module.bias.float()
                plain[name].weight.copy_((module(torch.eye(module.in_features)) - bias).T)
    return reference


def wide(directory, folder):
    """The tiny model with 64 dimensions, the least that four bits are packed in."""
    config = AutoConfig.from_pretrained(directory)
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5)
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(directory).save_pretrained(folder)
    return str(folder)


QUANTISED = {
    "torchao int8": int8,
    "bitsandbytes 8 bits": with_bitsandbytes(eight_bits),
    "bitsandbytes 4 bits": with_bitsandbytes(four_bits),
}


@pytest.fixture(scope="module", params=QUANTISED)
def both(request, directories, tmp_path_factory):
    """The quantised model, and the same weights in float32."""
    directory = wide(directories("llama"), tmp_path_factory.mktemp("wide"))
    load = lambda: AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)  # noqa: E731
    network = QUANTISED[request.param](load())
    reference = dequantised(network, load())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return tuple(
        TransformerBridge.boot_transformers(directory, hf_model=one, tokenizer=tokenizer)
        for one in (network, reference)
    )


def level(model, found):
    return float(ml.objective(model, PROMPTS, found).sum())


FITS = {
    "vectors": lambda model: ml.fit_vectors(model, PROMPTS, SOURCE, TARGET, n_vectors=3, radius=2.0, progress=False),
    "cpe": lambda model: ml.fit_cpe(model, PROMPTS, [0, 1, 2], TARGET, n_factors=3, n_steps=10, progress=False),
    "dct": lambda model: ml.fit_dct(model, PROMPTS, SOURCE, TARGET, n_factors=3, radius=2.0, progress=False),
    "adapters": lambda model: ml.fit_adapters(
        model, PROMPTS, SOURCE, TARGET, n_adapters=2, rank=2, radius=1.0, n_steps=5, progress=False
    ),
    "jacobian": lambda model: ml.fit_jacobian(model, PROMPTS, SOURCE, TARGET, n_vectors=2, radius=1.0, progress=False),
}


@pytest.mark.parametrize("fit", FITS)
def test_the_objective_is_that_of_the_same_weights(both, fit):
    quantised, plain = both
    found, expected = (FITS[fit](model) for model in both)
    if fit == "cpe":  # its few steps are not the end of a climb: kernels that round end elsewhere
        assert level(quantised, found) >= 0.98 * level(plain, expected)
    else:
        assert level(quantised, found) == pytest.approx(level(plain, expected), rel=0.02)
    # what was learned on one acts on the other in the same way
    assert level(plain, found) == pytest.approx(level(quantised, found), rel=0.02)


@pytest.mark.parametrize("rule", ["nonlinearity", "stream", "kl"])
def test_a_radius_is_found(both, rule):
    found, expected = (ml.calibrate_radius(model, PROMPTS, SOURCE, TARGET, rule=rule).radius for model in both)
    assert found == pytest.approx(expected, rel=0.1)


def test_writing_and_steering(both):
    vectors = ml.SteeringVectors.from_tensor(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), SOURCE)
    tables = [ml.generate(model, PROMPTS, vectors, 5, progress=False).table for model in both]
    equal = [a == b for a, b in zip(tables[0].tokens, tables[1].tokens, strict=True)]
    assert sum(equal) >= 0.8 * len(equal)


def test_an_exported_adapter_is_checked_without_reading_weights(both, tmp_path):
    quantised = both[0]
    adapters = FITS["adapters"](quantised)
    folder = ml.export(adapters[0], "peft", tmp_path / "adapter", model=quantised)
    held = load_file(folder / "adapter_model.safetensors")
    update = next(x for name, x in held.items() if "lora_B" in name) @ next(
        x for name, x in held.items() if "lora_A" in name
    )
    a, b = adapters.factors[SOURCE]
    torch.testing.assert_close(update, adapters.scales[0] * b[0] @ a[0])


def test_a_plan_counts_packed_weights(both):
    plans = [ml.plan_memory(model, 8, SOURCE, TARGET, max_new_tokens=4) for model in both]
    assert plans[0].slice_weights < 0.5 * plans[1].slice_weights


def test_a_kernel_without_a_gradient_is_seen_before_anything_is_learned(build, monkeypatch):
    """As bitsandbytes' four bits are on some CPUs: the forward pass is right, and nothing comes back."""
    real = blocks.BlockCall.__call__

    def forwards_only(call, stream, prompts, n_prompts, shared=None):
        return stream + (real(call, stream, prompts, n_prompts, shared) - stream).detach()

    monkeypatch.setattr(blocks.BlockCall, "__call__", forwards_only)
    monkeypatch.setattr(Host, "quantised", True)
    with pytest.raises(RuntimeError, match="pass on no gradient"):
        ml.slice_model(build("llama"), PROMPTS, SOURCE, TARGET)
