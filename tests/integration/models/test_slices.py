"""Does the slice equal the model?  Values and gradients against whole hooked runs, on real architectures."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

import melbo_lens as ml
from melbo_lens.models import blocks, fidelity, hooks
from melbo_lens.models.access import host_of
from melbo_lens.perturbations.sites import SITES
from tests import architectures, models
from tests.oracles.textbook import target_activation

SOURCE, TARGET = 1, 3
CASES = [(name, kind) for name in models.CONFIGS for kind in ("bridge", "compatible")] + [("gpt2", "hooked")]
PROMPTS = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w3 w1"]


def whole_run(model, tokens, source, target, vector):
    """The stream entering the target layer in an ordinary run with TransformerLens' own hooks."""
    seen = {}
    name = f"blocks.{target}.hook_resid_pre" if target < len(model.blocks) else f"blocks.{target - 1}.hook_resid_post"

    def add(activation, hook):
        return activation + vector

    def read(activation, hook):
        seen["z"] = activation

    model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{source}.hook_mlp_out", add), (name, read)])
    return seen["z"]


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("target", [TARGET, models.N_LAYERS])
def test_replay_equals_the_whole_hooked_run_in_values_and_gradients(build, name, kind, target):
    model = build(name, kind)
    sliced = ml.slice_model(model, PROMPTS, SOURCE, target)
    vectors = 0.5 * torch.randn(2, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    rows = [(v, i) for v in range(2) for i in range(len(PROMPTS))]
    leaf = torch.stack([vectors[v] for v, _ in rows]).requires_grad_()
    weights = torch.randn(sliced.target.shape[1:], generator=torch.Generator().manual_seed(1))
    change = sliced.change(leaf, torch.tensor([i for _, i in rows]))
    for row, (v, i) in enumerate(rows):
        # alone, without padding, through the whole model
        tokens = torch.tensor([sliced.batch.rows()[i]])
        length = tokens.shape[1]
        alone = vectors[v].clone().requires_grad_()
        expected = (
            whole_run(model, tokens, SOURCE, target, alone)[0]
            - whole_run(model, tokens, SOURCE, target, torch.zeros(models.D_MODEL))[0]
        )
        scale = expected.detach().abs().max()
        assert (change[row, :length] - expected).abs().max() < 2e-5 * scale + 1e-5
        (gradient,) = torch.autograd.grad((change[row, :length] * weights[:length]).sum(), leaf, retain_graph=True)
        (expected_gradient,) = torch.autograd.grad((expected * weights[:length]).sum(), alone)
        assert (gradient[row] - expected_gradient).abs().max() < 1e-4 * expected_gradient.abs().max()
        assert gradient.abs().sum() == gradient[row].abs().sum()  # rows don't see each other


@pytest.mark.parametrize("kind", ["bridge", "compatible", "hooked"])
def test_any_activation_between_can_be_the_target(build, kind):
    model = build("gpt2", kind)
    name = "blocks.2.attn.hook_z"
    sliced = ml.slice_model(model, PROMPTS[:1], SOURCE, target_hook=name)
    vector = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(0))
    seen = {}
    model.run_with_hooks(
        torch.tensor(sliced.batch.rows()),
        fwd_hooks=[("blocks.1.hook_mlp_out", lambda a, hook: a + vector), (name, lambda a, hook: seen.update(z=a))],
    )
    expected = seen["z"].flatten(2)
    assert sliced.target.shape == expected.shape
    torch.testing.assert_close(
        sliced.change(vector[None], torch.tensor([0])) + sliced.target, expected, atol=1e-5, rtol=1e-4
    )


def test_only_the_blocks_between_run(model):
    sliced = ml.slice_model(model, "w1 w2", SOURCE, TARGET)
    ran = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(model.blocks)
    ]
    handles.append(model.unembed.register_forward_hook(lambda *_: ran.append("unembed")))
    try:
        sliced.change(torch.ones(1, models.D_MODEL), torch.tensor([0]))
        assert ran == [2]
        ran.clear()
        ml.slice_model(model, "w1 w2", SOURCE, TARGET)
        assert 3 not in ran and "unembed" not in ran
    finally:
        for handle in handles:
            handle.remove()


def test_target_positions_count_each_prompts_own_tokens(model):
    batch = ml.slice_model(model, PROMPTS, SOURCE, TARGET, target_positions=slice(-2, None)).batch
    lengths = batch.lengths.tolist()
    assert lengths == [len(prompt.split()) + bool(model.cfg.default_prepend_bos) for prompt in PROMPTS]
    for row, length in enumerate(lengths):
        assert batch.target_mask[row].nonzero().flatten().tolist() == [length - 2, length - 1]
    batch = ml.slice_model(model, PROMPTS, SOURCE, TARGET, target_positions=[0, -1]).batch
    assert [row.nonzero().flatten().tolist() for row in batch.target_mask] == [[0, length - 1] for length in lengths]


class Forgetful(nn.Module):
    """A block that depends on how often it ran: it can't be replayed."""

    def __init__(self, block):
        super().__init__()
        self.block, self.calls = block, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.block(*args, **kwargs) * (1 + 0.01 * self.calls)


def test_a_block_that_does_not_replay_is_refused_by_name(directories):
    model = models.bridge(directories("gpt2"))
    recording = blocks.record(host_of(model), torch.tensor([[1, 5, 6]]), 2, 4)
    bad = Forgetful(recording.calls[1].block)
    recording.calls[1] = replace(recording.calls[1], block=bad)
    with pytest.raises(RuntimeError, match="block 3"):
        fidelity.check_replay(host_of(model), recording, torch.tensor([0]), 1)


def test_a_block_that_rescales_the_perturbation_is_run_too(directories):
    model = models.bridge(directories("gpt2"))
    # a residual multiplier: what the MLP hook sees is not what is added to the stream
    handle = model.blocks[1].register_forward_hook(lambda module, args, output: output * 1.5)
    point = hooks.hook_point(host_of(model), "blocks.1.hook_mlp_out")
    halve = point.register_forward_hook(lambda module, args, output: output * 0.5)
    vector = torch.randn(models.D_MODEL, generator=torch.Generator().manual_seed(0))
    try:
        sliced = ml.slice_model(model, "w1 w2 w3", SOURCE, TARGET)
        found = sliced.change(vector[None], torch.tensor([0]))
        tokens = model.to_tokens("w1 w2 w3")
        clean, steered = (target_activation(model, tokens, SOURCE, TARGET, v) for v in (0 * vector, vector))
        torch.testing.assert_close(found[0], steered - clean, rtol=1e-3, atol=1e-4)
        with pytest.raises(RuntimeError, match="rescale the perturbation"):  # it isn't what the stream would gain
            fidelity.check_hooked_run(replace(sliced, site=replace(sliced.site, after_block=True)), TARGET)
        fitted = ml.fit_vectors(sliced, n_vectors=2, radius=2.0, n_steps=3, progress=False)
        assert fitted.site == "mlp_out" and not sliced.site.after_block
    finally:
        handle.remove()
        halve.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_vectors_and_objective_in_float32(directories, dtype):
    model = models.bridge(directories("llama"), dtype=dtype)
    exact = models.bridge(directories("llama"))
    arguments = {"n_vectors": 2, "radius": 4.0, "n_steps": 4, "progress": False}
    vectors = ml.fit_vectors(model, "w1 w2 w3", 0, 3, **arguments)
    reference = ml.fit_vectors(exact, "w1 w2 w3", 0, 3, **arguments)
    assert (
        vectors.values.dtype == vectors.history.dtype == torch.float32 and vectors.provenance["dtype"] == str(dtype)[6:]
    )
    torch.testing.assert_close(vectors.history[0], reference.history[0], rtol=0.1, atol=0)
    assert all(parameter.dtype == dtype for parameter in nn.Module.parameters(model))


@pytest.mark.parametrize("name", ["mpt", "bloom", "falcon_rw"])
@pytest.mark.parametrize("n_prompts", [1, 2, 4])  # 4: as many as heads
def test_rows_follow_their_prompts_where_heads_and_rows_share_an_axis(tmp_path, name, n_prompts):
    model = TransformerBridge.boot_transformers(architectures.save(name, tmp_path), device="cpu", dtype=torch.float32)
    prompts = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w3 w1", "w7 w7 w7 w7"][:n_prompts]
    sliced = ml.slice_model(model, prompts, SOURCE, models.N_LAYERS)
    vectors = torch.randn(5, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    rows = [(k, (k + 1) % n_prompts) for k in range(5)]
    with torch.no_grad():
        found = sliced.change(vectors, torch.tensor([i for _, i in rows]))
        for row, (k, i) in zip(found, rows, strict=True):
            tokens = torch.tensor([sliced.batch.rows()[i]])
            clean, steered = (
                whole_run(model, tokens, SOURCE, models.N_LAYERS, scale * vectors[k])[0] for scale in (0, 1)
            )
            torch.testing.assert_close(row[: tokens.shape[1]], steered - clean, rtol=1e-3, atol=1e-4)


def test_arguments_whose_rows_cannot_be_told_are_refused():
    with pytest.raises(RuntimeError, match=r"shape \(3, 8\) for 3 prompts and \(1, 7\) for 1"):
        blocks._row_axes((torch.zeros(3, 8),), (torch.zeros(1, 7),), 3, 1)


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory):
    """Blocks with a scaled sum and inputs of their own, of which the later half share keys and values with earlier."""
    settings = {
        **architectures.GQA,
        "num_hidden_layers": 8,
        "head_dim": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": architectures.VOCAB,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "sliding_window": 16,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.ARCHITECTURES, "gemma4", ("Gemma4TextConfig", settings))
        directory = architectures.save("gemma4", tmp_path_factory.mktemp("gemma4"))
    return directory, TransformerBridge.boot_transformers(directory, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("site", ["mlp_out", "resid_post", "attn_out"])
@pytest.mark.parametrize("source", [1, 5])  # before and among the blocks that read shared keys and values
@pytest.mark.parametrize("prompts", [["w1 w2 w3"], ["w1 w2 w3", "w4 w5 w6 w7 w8"]])
def test_blocks_that_share_keys_and_values_follow_their_rows(gemma4, site, source, prompts):
    model, target = gemma4[1], 7
    sliced = ml.slice_model(model, prompts, source, target, site=site)
    rows = torch.arange(len(prompts)).repeat(3).flip(0)  # more rows than prompts, in another order
    vectors = torch.randn(len(rows), models.D_MODEL, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # what one pass shares doesn't reach the next one
        found = sliced.change(vectors, rows)
        for row, vector, prompt in zip(found, vectors, rows.tolist(), strict=True):
            ids = sliced.batch.rows()[prompt]
            streams = []
            for v in (0 * vector, vector):
                add = (SITES[site].hook_name(source), lambda x, hook, v=v: x + v)
                read = (f"blocks.{target}.hook_in", lambda x, hook, streams=streams: streams.append(x[0]))
                model.run_with_hooks(torch.tensor([ids]), fwd_hooks=[add, read])
            change = streams[1] - streams[0]
            torch.testing.assert_close(row[: len(ids)], change, rtol=1e-3, atol=1e-4 * float(change.norm()))


def test_shared_keys_and_values_stay_shared_in_float32(gemma4):
    half = TransformerBridge.boot_transformers(gemma4[0], device="cpu", dtype=torch.bfloat16)
    prompts, rows = ["w1 w2 w3", "w4 w5 w6 w7 w8"], torch.tensor([1, 0, 1])
    vectors = torch.randn(3, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    whole, rounded = (ml.slice_model(model, prompts, 1, 7, site="resid_post") for model in (gemma4[1], half))
    found, expected = rounded.in_float32().change(vectors, rows), whole.change(vectors, rows)
    assert float((found - expected).norm() / expected.norm()) < 0.1  # the weights were rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", [1, 5])
def test_a_block_that_changes_what_is_added_is_told_from_rounding(gemma4, dtype, source):
    """The change is held against what was added: a tenth of the stream would drown in the stream's own rounding."""
    half = TransformerBridge.boot_transformers(gemma4[0], device="cpu", dtype=dtype)
    for prompt in ("w1 w2 w3", "w4 w5 w6 w7", "w9", "w2 w2 w8"):
        assert not ml.slice_model(half, prompt, source, 7).site.after_block
        assert ml.slice_model(half, prompt, source, 7, site="resid_post").site.after_block


def test_a_vector_that_its_block_changes_is_not_added_to_the_output_of_a_layer(gemma4, tmp_path):
    directory, model = gemma4
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    fitted = ml.fit_vectors(model, "w1 w2 w3", 1, 7, n_vectors=2, radius=2.0, n_steps=2, progress=False)
    assert fitted.provenance["within_block"] and not fitted.reaches_stream
    joined = ml.concatenate([fitted, ml.random_vectors(fitted)])
    adapters = ml.fit_adapters(
        model, "w1 w2 w3", 1, 7, n_adapters=1, rank=2, n_steps=1, optimizer="power", radius=1.0, progress=False
    )
    others = [
        ml.nearest_vectors(adapters, model, "w1 w2 w3")[0],
        ml.fit_contrastive(model, ["w1 w2"], ["w3 w4"], 1, site="mlp_out")[0],
        ml.SteeringVectors(torch.ones(1, models.D_MODEL), 1) + fitted[0],
    ]
    for one in (fitted[0], -2.0 * fitted[1], ml.random_vectors(fitted)[0], joined[3], *others):
        with (
            pytest.raises(ValueError, match="the block scales or normalises it first"),
            ml.on_transformers(network, one),
        ):
            pass
        with pytest.raises(ValueError, match="passes through the rest of its block first"):
            ml.export(one, "gguf", tmp_path / "vector.gguf")
    of_stream = ml.fit_contrastive(model, ["w1 w2"], ["w3 w4"], 1, site="resid_post")
    assert of_stream.reaches_stream and "within_block" not in of_stream.provenance
    ordinary = ml.fit_vectors(
        model, "w1 w2 w3", 1, 7, n_vectors=1, radius=2.0, n_steps=2, site="resid_post", progress=False
    )
    assert "within_block" not in ordinary.provenance and ordinary.reaches_stream
    ids = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad(), ml.on_transformers(network, ordinary[0]):
        found = network(ids, use_cache=False).logits
    with torch.no_grad(), ml.steer(model, ordinary[0]):
        torch.testing.assert_close(found, model(ids, use_cache=False), rtol=1e-4, atol=1e-4)
