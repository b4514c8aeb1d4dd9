"""Does a model whose blocks lie on several devices give what it gives on one?

Where there is a GPU, half of the blocks lie on it and half on the CPU, in both orders. Everywhere, two devices are
played by `fake_devices`, which refuse to mix as real ones do.
"""

from contextlib import nullcontext

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

import melbo_lens as ml
from melbo_lens.methods.problem import Problem
from melbo_lens.models.blocks import BlockCall
from tests import fake_devices

FAKE = (str(fake_devices.FIRST), str(fake_devices.SECOND))
PAIRS = [FAKE, FAKE[::-1]]
if torch.cuda.is_available():
    PAIRS += [("cpu", "cuda:0"), ("cuda:0", "cpu")]
PROMPTS = ["w1 w2 w3 w4 w5", "w6 w7 w8"]
SOURCE, TARGET = 1, 4


def split(directory, first, second):
    """The same network with its embeddings and first blocks on one device, and all that follows on another."""
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inner = network.model
    half = len(inner.layers) // 2
    places = [(inner.embed_tokens, first), (inner.rotary_emb, first)]
    places += [(layer, first if i < half else second) for i, layer in enumerate(inner.layers)]
    places += [(inner.norm, second), (network.lm_head, second)]
    for module, device in places:
        module.to(device)
        # what accelerate does for a device_map: the inputs follow the module
        add_hook_to_module(module, AlignDevicesHook(execution_device=torch.device(device)))
    return network


@pytest.fixture(scope="module", params=PAIRS, ids=" then ".join)
def both(request, directories):
    """The model on one device, and on two."""
    directory = directories("llama")
    with fake_devices.devices() if request.param[0] in FAKE else nullcontext() as watch:
        one = TransformerBridge.boot_transformers(directory, device="cpu", dtype=torch.float32)
        two = TransformerBridge.boot_transformers(
            directory, hf_model=split(directory, *request.param), tokenizer=AutoTokenizer.from_pretrained(directory)
        )
        places = {str(parameter.device) for parameter in two.parameters()}
        assert places == set(request.param)
        yield one, two, watch


def same(found, expected, tolerance=1e-5):
    found = found.detach().cpu()
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def fits(model):
    common = {"progress": False, "seed": 3}
    yield "vectors", ml.fit_vectors(model, PROMPTS, SOURCE, TARGET, n_vectors=3, radius=2.0, n_steps=4, **common).values
    yield (
        "adamw",
        ml.fit_vectors(
            model, PROMPTS, SOURCE, TARGET, n_vectors=2, radius=2.0, n_steps=3, optimizer="adamw", lr=0.1, **common
        ).values,
    )
    yield (
        "attention",
        ml.fit_vectors(
            model,
            PROMPTS,
            2,  # on the second device
            target_hook="blocks.3.attn.hook_z",
            n_vectors=2,
            radius=2.0,
            n_steps=3,
            site="attn_out",
            **common,
        ).values,
    )
    adapters = ml.fit_adapters(
        model, PROMPTS, [SOURCE, 2], TARGET, n_adapters=2, rank=1, radius=1.0, n_steps=3, **common
    )
    yield "adapters", adapters.factors[2][0]
    cpe = ml.fit_cpe(model, PROMPTS, (0, 1, 2), TARGET, n_factors=3, n_steps=3, **common)
    yield "cpe", cpe.factors[2][1]
    for kind in ("exponential", "linear"):
        yield (
            kind,
            ml.fit_dct(model, PROMPTS, SOURCE, TARGET, n_factors=3, kind=kind, radius=1.0, **common).values.abs(),
        )
    yield "jacobian", ml.fit_jacobian(model, PROMPTS, SOURCE, TARGET, n_vectors=2, radius=1.0, **common).values.abs()
    yield "contrastive", ml.fit_contrastive(model, ["w1 w2"], ["w3 w4"], SOURCE).values


def measures(model):
    vectors = ml.fit_vectors(model, PROMPTS, SOURCE, TARGET, n_vectors=2, radius=3.0, n_steps=2, progress=False)
    adapters = ml.fit_adapters(
        model, PROMPTS, SOURCE, TARGET, n_adapters=2, rank=1, radius=1.0, n_steps=2, progress=False
    )
    for name, bank in (("vectors", vectors), ("adapters", adapters)):
        yield f"objective of {name}", ml.objective(model, PROMPTS, bank)
        yield f"changes of {name}", ml.activation_changes(model, PROMPTS[0], bank).change
        yield f"targets of {name}", ml.target_effects(model, PROMPTS, bank).values
        yield f"output of {name}", torch.tensor(ml.output_effects(model, PROMPTS, bank).table.kl)
        yield f"next tokens of {name}", ml.next_tokens(model, PROMPTS[0], bank).log_probs
        written = ml.generate(model, PROMPTS, bank, 6, progress=False).table
        yield f"ids of {name}", torch.tensor([[*row, *[-1] * (6 - len(row))] for row in written.tokens])
        with torch.no_grad(), ml.steer(model, bank[0]):
            logits = model(torch.tensor([[5, 6, 7]]).to(next(model.parameters()).device)).cpu()
        yield f"logits under {name}", logits  # not within the block, which another generator would end
    yield "effects at the source", ml.source_effects(adapters, model, PROMPTS).values
    yield "nearest", ml.nearest_vectors(adapters, model, PROMPTS).values
    yield "controls", ml.random_adapters(adapters, model, PROMPTS).scales
    table = ml.top_tokens(model, vectors, k=3, prompts=PROMPTS)
    yield "tokens", torch.tensor([[change for _, change in row] for row in table.promoted])
    yield "texts", torch.tensor(ml.max_activating(model, vectors, PROMPTS, k=2).cosine)


def check(found, expected):
    seen = set()
    for (name, value), (_, other) in zip(found, expected, strict=True):
        assert isinstance(value, Tensor), name
        try:
            same(value, other)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        seen.add(name)
    return seen


@pytest.mark.long
def test_every_method_learns_the_same(both):
    one, two, _ = both
    assert len(check(fits(two), fits(one))) == 9


@pytest.mark.long
def test_every_measure_and_all_writing_are_the_same(both):
    one, two, _ = both
    assert len(check(measures(two), measures(one))) >= 15


def places(model):
    return {name: str(x.device) for name, x in model.named_parameters()}


def test_a_trimmed_fit_holds_its_slice_only_and_puts_the_rest_back(both, monkeypatch):
    _, two, _ = both
    before, bits = places(two), {name: x.detach().cpu().clone() for name, x in two.named_parameters()}
    seen = []
    real = Problem.__call__

    def watched(self, *arguments):
        seen.append(places(two))
        return real(self, *arguments)

    monkeypatch.setattr(Problem, "__call__", watched)
    settings = {"n_vectors": 2, "radius": 2.0, "n_steps": 2, "progress": False}
    expected = ml.fit_vectors(two, PROMPTS, SOURCE, TARGET, **settings).values.cpu()
    untouched, seen[:] = seen[-1], []
    found = ml.fit_vectors(two, PROMPTS, SOURCE, TARGET, trim=True, **settings).values.cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert untouched == before and places(two) == before
    assert all(torch.equal(x.detach().cpu(), bits[name]) for name, x in two.named_parameters())
    during = seen[-1]
    for name, device in before.items():
        inside = any(f"blocks.{i}." in name or f"layers.{i}." in name for i in range(SOURCE, TARGET))
        assert during[name] == (device if inside else "cpu"), name


def test_an_interrupted_fit_puts_the_rest_back_too(both, monkeypatch):
    _, two, _ = both
    before = places(two)

    def broken(self, *arguments):
        assert places(two) != before
        raise KeyboardInterrupt

    monkeypatch.setattr(Problem, "__call__", broken)
    with pytest.raises(KeyboardInterrupt):
        ml.fit_vectors(two, PROMPTS, SOURCE, TARGET, n_vectors=2, radius=2.0, trim=True, progress=False)
    assert places(two) == before


def test_moves_are_few(both):
    """A pass moves the stream where the device changes, and not for every block or vector."""
    _, two, watch = both
    if watch is None:
        pytest.skip("moves are counted on fake devices only")
    sliced = ml.slice_model(two, PROMPTS, SOURCE, TARGET)
    watch.moves.clear()
    with torch.no_grad():
        sliced.change(torch.zeros(2, sliced.d_model).to(sliced.device), sliced.everyone)
    assert 1 <= sum(watch.moves.values()) <= 6 * (TARGET - SOURCE - 1)


def test_a_block_gets_the_stream_where_the_model_hands_it_over():
    """As a `HookedTransformer` on several devices does, whose blocks move nothing themselves."""
    seen = []

    class Block(torch.nn.Module):
        def forward(self, stream):
            seen.append(str(stream.device))
            return stream

    with fake_devices.devices():
        call = BlockCall(Block(), (), {}, device=fake_devices.SECOND)
        first = torch.arange(1).to(fake_devices.FIRST)
        call(torch.zeros(1, 2, 3).to(fake_devices.FIRST), first, 1)
    assert seen == [str(fake_devices.SECOND)]
