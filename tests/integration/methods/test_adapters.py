"""Do adapters do to every kind of model what an edit of W_out does, and does the fit follow the textbook?"""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import melbo_lens as ml
from melbo_lens.ascent.constraints import NORMALIZATIONS
from melbo_lens.ascent.objectives import Objective, penalized
from melbo_lens.measures.ranking import target_changes
from melbo_lens.methods import adapters as adapters_module
from melbo_lens.methods.automatic import SHARE_OF_EDGE
from melbo_lens.methods.low_rank import LowRank, digest_of_factors
from melbo_lens.methods.problem import Problem
from melbo_lens.models import hooks
from melbo_lens.models.access import host_of
from melbo_lens.models.slices import SlicedModel
from melbo_lens.models.slicing import slice_model
from tests import models
from tests.oracles.textbook_adapters import TextbookAdapters

PROMPTS = ["w1 w2 w3 w4", "w5 w6 w7"]
FROBENIUS = NORMALIZATIONS["frobenius"]
DENSE = [name for name in models.CONFIGS if name != "mixtral"]
CASES = [(name, kind) for name in DENSE for kind in ("bridge", "compatible")]
TOKENS = torch.tensor([[1, 5, 9, 7, 12, 30]])
OUTPUT = {"gpt2": "transformer.h.{}.mlp.c_proj", "neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h"}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapters_for(model, n=2, layer=1, rank=3, scale=0.4, seed=0):
    d_mlp, d_model = host_of(model).widths(layer, "mlp")
    return ml.SteeringAdapters.from_factors(
        gaussian(n, rank, d_mlp, seed=seed), gaussian(n, d_model, rank, seed=seed + 1), layer, scale
    )


def output_weight(network, name, layer=1):
    return network.get_submodule(OUTPUT.get(name, "model.layers.{}.mlp.down_proj").format(layer)).weight


def edited(directory, name, adapter, layer=1):
    """A fresh Hugging Face model whose W_out is updated by one adapter."""
    network = AutoModelForCausalLM.from_pretrained(directory).eval()
    a, b = adapter.factors[layer]
    update = adapter.scale * b[0] @ a[0]
    with torch.no_grad():
        output_weight(network, name, layer).add_(update.T if name == "gpt2" else update)
    return network


def log_probs(logits):
    return logits.detach().log_softmax(-1)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_steering_is_an_edit_of_the_output_weights(build, directories, name, kind):
    """Gated and ungated MLPs, parallel blocks, and a norm after the MLP."""
    model = build(name, kind)
    adapters = adapters_for(model)
    clean = log_probs(host_of(model).forward(TOKENS))
    with ml.steer(model, adapters), torch.no_grad():
        together = log_probs(host_of(model).forward(TOKENS.expand(2, -1)))
    for k in range(2):
        with torch.no_grad():
            expected = log_probs(edited(directories(name), name, adapters[k])(TOKENS).logits)
        torch.testing.assert_close(together[k : k + 1], expected, atol=2e-5, rtol=1e-4)
        assert (expected - clean).abs().max() > 0.02  # the update matters
    assert torch.equal(log_probs(host_of(model).forward(TOKENS)), clean)  # and leaves no trace


@pytest.mark.parametrize("settings", [{}, {"gated_mlp": True}, {"parallel_attn_mlp": True}], ids=str)
def test_steering_a_hooked_transformer_is_an_edit_too(directories, settings):
    if not models.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    check_edit_of_hooked(models.hooked(directories("gpt2"), **settings))


def test_the_update_passes_through_the_norm_of_a_hooked_sandwich_block(directories):
    if not models.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    sandwich = {"normalization_type": "RMS", "use_normalization_before_and_after": True, "gated_mlp": True}
    model = models.hooked(directories("gpt2"), **sandwich)
    with torch.no_grad():
        model.blocks[1].ln2_post.w.copy_(gaussian(models.D_MODEL, seed=9))
    check_edit_of_hooked(model)


def check_edit_of_hooked(model):
    adapter = adapters_for(model, n=1)
    with ml.steer(model, adapter), torch.no_grad():
        steered = model(TOKENS)
    weight = model.blocks[1].mlp.W_out
    before = weight.detach().clone()
    with torch.no_grad():
        clean = model(TOKENS)
        weight.add_((adapter.scale * adapter.B[0] @ adapter.A[0]).T)
        expected = model(TOKENS)
        weight.copy_(before)
    torch.testing.assert_close(steered, expected, atol=1e-4, rtol=1e-4)
    assert (clean - expected).abs().max() > 0.02


def test_a_norm_other_than_rms_after_the_mlp_is_refused(directories):
    if not models.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    model = models.hooked(directories("gpt2"), normalization_type="RMS", use_normalization_before_and_after=True)
    model.blocks[1].ln2_post = torch.nn.LayerNorm(models.D_MODEL)
    with pytest.raises(ValueError, match=r"ln2_post, is a LayerNorm: only RMS norms"):
        host_of(model).weight_site(1, "mlp")


def test_mixtures_of_experts_are_refused_by_name(build):
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.out\.hook_in.*mixture of experts"):
        ml.fit_adapters(build("mixtral", "bridge"), PROMPTS, 1, 3, n_adapters=1, rank=2, progress=False)


def test_adapters_of_another_model_are_refused(build):
    adapters = adapters_for(build("gpt2", "bridge"))
    with pytest.raises(ValueError, match=r"d_mlp 128 and d_model 32; this model has d_mlp 48 and d_model 32"):
        ml.generate(build("llama", "bridge"), PROMPTS, adapters, max_new_tokens=2, progress=False)
    deep = ml.SteeringAdapters({7: adapters.factors[1]}, adapters.scales)
    with (
        pytest.raises(ValueError, match=r"layer 7 .* no such layer \(4 layers\)"),
        ml.steer(build("gpt2", "bridge"), deep),
    ):
        pass


# the fit


@pytest.mark.parametrize(("name", "kind"), [("llama", "bridge"), ("gemma2", "compatible"), ("neox", "bridge")])
@pytest.mark.parametrize("how", ["column", "frobenius", "spectral"])
def test_adamw_follows_the_textbook(build, directories, name, kind, how):
    model = build(name, kind)
    fitted = ml.fit_adapters(
        model,
        PROMPTS,
        1,
        3,
        n_adapters=2,
        rank=3,
        scale=0.7,
        normalization=how,
        n_steps=6,
        lr=0.02,
        target_positions=slice(-2, None),
        progress=False,
    )
    start = ml.fit_adapters(
        model, PROMPTS, 1, 3, n_adapters=2, rank=3, scale=0.7, normalization=how, n_steps=1, lr=1e-12, progress=False
    )
    network = AutoModelForCausalLM.from_pretrained(directories(name)).eval()
    rows = slice_model(model, PROMPTS, 1, 3).batch.rows()
    names = [next(n for n, p in network.named_parameters() if p is output_weight(network, name))]
    book = TextbookAdapters(
        network, names, [torch.tensor([row]) for row in rows], 3, [range(len(row) - 2, len(row)) for row in rows]
    )
    starts = [[(start.A[k], start.B[k])] for k in range(2)]
    found, history = book.learn(starts, 0.7, how, 6, 0.02)
    torch.testing.assert_close(fitted.history, history, rtol=2e-4, atol=0)
    for k in range(2):
        torch.testing.assert_close(fitted.A[k], found[k][0][0], atol=2e-3, rtol=0)
        torch.testing.assert_close(fitted.B[k], found[k][0][1], atol=2e-3, rtol=0)
    assert (fitted.history[-1] > 1.02 * fitted.history[0]).all()


def test_several_source_layers_follow_the_textbook(build, directories):
    model = build("llama", "bridge")
    settings = {"n_adapters": 2, "rank": 2, "scale": 0.5, "target_positions": slice(-2, None), "progress": False}
    fitted = ml.fit_adapters(model, PROMPTS, [0, 1], 4, n_steps=5, lr=0.02, **settings)
    start = ml.fit_adapters(model, PROMPTS, [0, 1], 4, n_steps=1, lr=1e-12, **settings)
    assert fitted.source_layers == (0, 1)
    network = AutoModelForCausalLM.from_pretrained(directories("llama")).eval()
    rows = slice_model(model, PROMPTS, 0, 4).batch.rows()
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    # hidden_states[4] is normed by Hugging Face, so read the stream before the norm
    seen = []
    network.model.norm.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))

    class Unnormed(TextbookAdapters):
        def read(self, changed, tokens):
            super().read(changed, tokens)
            return seen.pop()[0]

    book = Unnormed(
        network, names, [torch.tensor([row]) for row in rows], 4, [range(len(row) - 2, len(row)) for row in rows]
    )
    starts = [[tuple(factor[k] for factor in start.factors[layer]) for layer in (0, 1)] for k in range(2)]
    _, history = book.learn(starts, 0.5, "column", 5, 0.02)
    torch.testing.assert_close(fitted.history, history, rtol=2e-4, atol=0)
    with pytest.raises(ValueError, match="act at layers"):
        _ = fitted.A


def objective(model, diversity=0.0, batch_size=64, layers=(1,), scale=0.6):
    sliced = slice_model(model, PROMPTS, layers[0], 4, slice(-2, None))
    act = LowRank(sliced, [host_of(model).weight_site(layer, "mlp") for layer in layers], [], scale)
    problem = Problem(sliced, act, Objective(p=3, q=1.5).value, batch_size, diversity)

    def evaluate(point):
        seen = problem(tuple(x[None] for x in point))
        return seen.value[0], seen.score[0], tuple(x[0] for x in seen.gradient)

    return evaluate


def random_point(model, layers=(1,), n=3, rank=2):
    point = []
    for i, layer in enumerate(layers):
        d_mlp, d_model = host_of(model).widths(layer, "mlp")
        point += [
            FROBENIUS.normalize(gaussian(n, rank, d_mlp, seed=i)),
            FROBENIUS.normalize(gaussian(n, d_model, rank, seed=i + 9)),
        ]
    return tuple(point)


@pytest.mark.parametrize(("layers", "diversity"), [((1,), 0.0), ((0, 2), 0.0), ((1,), 0.7)])
def test_the_gradient_is_that_of_finite_differences(build, layers, diversity):
    model = build("gemma2", "bridge")
    evaluate, point = objective(model, diversity, layers=layers), random_point(model, layers)
    with hooks.frozen(host_of(model)):
        _, _, gradients = evaluate(point)
        for i, factor in enumerate(point):
            direction = FROBENIUS.normalize(gaussian(*factor.shape, seed=20 + i))
            direction[:2] = 0  # the penalty holds earlier adapters fixed, so move the last one only
            moved = [
                tuple(other + sign * 5e-3 * direction if j == i else other for j, other in enumerate(point))
                for sign in (1, -1)
            ]
            difference = (evaluate(moved[0])[1] - evaluate(moved[1])[1])[2] / 1e-2
            torch.testing.assert_close((gradients[i] * direction).sum(), difference, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("diversity", [0.0, 0.7])
def test_the_batch_size_changes_rounding_only(build, diversity):
    model = build("llama", "bridge")
    point = random_point(model)
    with hooks.frozen(host_of(model)):
        whole = objective(model, diversity, 64)(point)
        for batch_size in (1, 2, 3):
            parts = objective(model, diversity, batch_size)(point)
            for one, other in zip((*whole[:2], *whole[2]), (*parts[:2], *parts[2]), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_no_pass_has_more_rows_than_the_batch_size(build, monkeypatch):
    rows = []
    original = SlicedModel.change_under
    monkeypatch.setattr(
        SlicedModel,
        "change_under",
        lambda self, added, prompts: rows.append(len(prompts)) or original(self, added, prompts),
    )
    model = build("llama", "bridge")
    with hooks.frozen(host_of(model)):
        for batch_size, most in ((64, 6), (4, 4), (3, 2), (1, 1)):  # three adapters on two prompts
            rows.clear()
            objective(model, 0.5, batch_size)(random_point(model))
            assert max(rows) == most and sum(rows) == 12  # changes, then gradients


def test_the_penalty_is_its_equation_and_spares_the_first():
    values, changes = torch.tensor([2.0, 3.0, 5.0]), gaussian(3, 7)
    cosine = torch.nn.functional.cosine_similarity(changes[:, None], changes[None], dim=-1)
    expected = [2.0, 3 / (1 + 0.5 * cosine[1, 0] ** 4), 5 / (1 + 0.5 * (cosine[2, 0] ** 4 + cosine[2, 1] ** 4))]
    torch.testing.assert_close(penalized(values, changes, 0.5), torch.tensor([float(x) for x in expected]))


def test_diversity_turns_effects_apart_and_a_collapse_is_announced(model):
    """So small an update sees a linear model, whose top singular direction every adapter of rank 1 finds."""
    settings = {
        "n_adapters": 2,
        "rank": 1,
        "normalization": "frobenius",
        "scale": 0.01,
        "optimizer": "power",
        "target_positions": [-1],
        "progress": False,
    }
    with pytest.warns(UserWarning, match=r"mean \|cosine\| between their effects is (0\.9|1)"):
        plain = ml.fit_adapters(model, PROMPTS[0], 1, 3, **settings)
    diverse = ml.fit_adapters(model, PROMPTS[0], 1, 3, diversity=100.0, **settings)
    assert diverse.provenance["effect_cosine"] < 0.6 < 0.9 < plain.provenance["effect_cosine"]
    torch.testing.assert_close(diverse.A[0], plain.A[0], atol=0.05, rtol=0)  # the first is not bent


@pytest.mark.parametrize("optimizer", ["adamw", "power"])
def test_the_history_ends_with_the_objective_of_what_is_returned(any_model, optimizer):
    fitted = ml.fit_adapters(
        any_model, PROMPTS, 1, 3, n_adapters=2, rank=2, optimizer=optimizer, n_steps=8, progress=False
    )
    sliced = slice_model(any_model, PROMPTS, 1, 3, slice(-3, None))
    changes = target_changes(sliced, fitted)
    per_prompt = (
        changes.unflatten(1, (-1, models.D_MODEL)).square().sum(-1)
    )  # 3 positions of the first prompt, then of the second
    expected = per_prompt[:, :3].sum(1).sqrt() + per_prompt[:, 3:].sum(1).sqrt()
    torch.testing.assert_close(fitted.history[-1], expected, rtol=1e-4, atol=0)


def test_auto_gives_every_update_the_radius_of_the_vectors(any_model):
    fitted = ml.fit_adapters(any_model, PROMPTS, 1, 3, n_adapters=3, rank=2, n_steps=5, lr=0.05, progress=False)
    radius = ml.calibrate_radius(any_model, PROMPTS, 1, 3, target_positions=slice(-3, None)).radius
    assert fitted.provenance["scale_rule"].startswith("readable 0.75, 0.65 of its radius")
    radius *= SHARE_OF_EDGE
    assert fitted.provenance["radius"] == pytest.approx(radius)
    torch.testing.assert_close(
        ml.source_effects(fitted, any_model, PROMPTS).norms(), torch.full((3,), radius), rtol=1e-3, atol=0
    )


def test_auto_is_halved_where_a_norm_bounds_updates(build, monkeypatch):
    model = build("gemma2", "bridge")
    settings = {"n_adapters": 2, "rank": 2, "n_steps": 1, "lr": 1e-9, "progress": False}
    usual = ml.fit_adapters(model, PROMPTS, 1, 3, **settings).provenance
    monkeypatch.setattr(adapters_module, "resumed_or_automatic", lambda *_: (64 * usual["radius"], "readable 0.75"))
    found = ml.fit_adapters(model, PROMPTS, 1, 3, **settings)
    times = re.search(r"halved (\d) times", found.provenance["scale_rule"])
    assert times and found.provenance["radius"] == pytest.approx(64 * usual["radius"] / 2 ** int(times[1]))
    norms = ml.source_effects(found, model, PROMPTS).norms()
    assert float(norms.mean()) == pytest.approx(found.provenance["radius"], rel=0.25)
    with pytest.raises(ValueError, match="the norm after the MLP bounds it"):
        ml.fit_adapters(model, PROMPTS, 1, 3, radius=1e4, **settings)


def test_auto_reaches_the_radius_through_a_norm_at_the_start(build):
    model = build("gemma2", "bridge")
    fitted = ml.fit_adapters(model, PROMPTS, 1, 3, n_adapters=4, rank=2, n_steps=1, lr=1e-9, progress=False)
    assert float(ml.source_effects(fitted, model, PROMPTS).norms().mean()) == pytest.approx(
        fitted.provenance["radius"], rel=0.1
    )


def test_scale_and_alpha_are_resolved_in_the_provenance(model):
    one = ml.fit_adapters(model, PROMPTS, 1, 3, n_adapters=1, rank=4, alpha=2.0, n_steps=1, progress=False)
    assert (
        one.scale == pytest.approx(0.5)
        and one.provenance["scale"] == 0.5
        and one.provenance["scale_rule"] == "alpha / rank"
    )
    assert one.provenance["normalization"] == "column" and one.provenance["source_hook"] == [
        ["blocks.1.mlp.out.hook_in", "blocks.1.mlp.out.hook_out"]
    ]
    torch.testing.assert_close(one.A.norm(dim=1), torch.ones(1, 128))
    torch.testing.assert_close(one.B.norm(dim=1), torch.ones(1, 4))


def test_the_start_of_an_adapter_depends_on_its_number_alone(model):
    few, many = (
        ml.fit_adapters(model, PROMPTS, 1, 3, n_adapters=n, rank=2, scale=1.0, n_steps=2, progress=False)
        for n in (1, 3)
    )
    torch.testing.assert_close(few.A[0], many.A[0], atol=1e-5, rtol=0)


def test_a_checkpoint_goes_on_and_refuses_other_settings(model, tmp_path, monkeypatch):
    settings = {"n_adapters": 2, "rank": 2, "n_steps": 6, "lr": 0.02, "radius": 1.0, "progress": False}
    whole = ml.fit_adapters(model, PROMPTS, 1, 3, **settings)
    calls = []
    original = Problem.__call__

    def interrupted(self, point, first):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, point, first)

    path = tmp_path / "fit.checkpoint"
    monkeypatch.setattr(Problem, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ml.fit_adapters(model, PROMPTS, 1, 3, checkpoint=path, **settings)
    resumed = ml.fit_adapters(model, PROMPTS, 1, 3, checkpoint=path, **settings)
    assert len(calls) == 4 + 4  # three of the seven evaluations were kept
    torch.testing.assert_close(resumed.A, whole.A, atol=1e-6, rtol=0)
    torch.testing.assert_close(resumed.history, whole.history)
    with pytest.raises(ValueError, match="another fit"):
        ml.fit_adapters(model, PROMPTS, 1, 3, checkpoint=path, **{**settings, "rank": 3})


def test_nothing_of_the_model_or_of_chance_is_changed(any_model):
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in any_model.parameters()]
    state = torch.get_rng_state()
    adapters = ml.fit_adapters(any_model, PROMPTS, 1, 3, n_adapters=2, rank=2, n_steps=2, progress=False)
    ml.generate(any_model, PROMPTS, adapters, max_new_tokens=2, progress=False)
    ml.nearest_vectors(adapters, any_model, PROMPTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())
    assert [parameter.requires_grad for parameter in any_model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(point.fwd_hooks for point in any_model.hook_dict.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_fits(directories, dtype):
    model = models.bridge(directories("llama"), dtype=dtype)
    fitted = ml.fit_adapters(model, PROMPTS, 1, 3, n_adapters=2, rank=2, scale=0.5, n_steps=4, lr=0.02, progress=False)
    exact = ml.fit_adapters(
        models.bridge(directories("llama")),
        PROMPTS,
        1,
        3,
        n_adapters=2,
        rank=2,
        scale=0.5,
        n_steps=4,
        lr=0.02,
        progress=False,
    )
    torch.testing.assert_close(fitted.history, exact.history, rtol=0.1, atol=0)


BAD = [
    ({"rank": 0}, "rank=0 must be an integer of at least 1"),
    ({"rank": 33}, "rank=33 must be from 1 to 32, the smaller side of the mlp output weights"),
    ({"scale": 1.0, "alpha": 1.0}, "give one of them"),
    ({"scale": -1.0}, "scale=-1.0 must be a positive"),
    ({"alpha": 0.0}, "alpha=0.0 must be a positive"),
    ({"radius": -1.0}, "radius=-1.0 must be a positive"),
    ({"radius": 2.0, "scale": 1.0}, "leave one of them out"),
    ({"diversity": -1.0}, "diversity=-1.0 must be 0"),
    ({"n_adapters": 0}, "n_adapters=0 must be an integer"),
    ({"optimizer": "power", "lr": 0.1}, "lr=0.1 has no meaning"),
    ({"lr": -1.0}, "lr=-1.0 must be a positive"),
    ({"source_layer": 9}, "source_layer=9 must be an integer from 0 to 3"),
    ({"source_layer": [0, 2], "target_layer": 3}, "source layer 2 must lie at least two before target_layer=3"),
    ({"source_layer": []}, "no source layer was named"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_settings_are_refused_with_the_rule(model, settings, message):
    with pytest.raises(ValueError, match=message):
        ml.fit_adapters(
            model,
            PROMPTS,
            **{"source_layer": 1, "target_layer": 3, "n_adapters": 2, "rank": 2, "progress": False, **settings},
        )


def test_an_unknown_normalization_is_refused():
    from melbo_lens.methods.adapters import _check_settings

    with pytest.raises(ValueError, match='"column" \\(as published\\), "frobenius" or "spectral"'):
        _check_settings(2, 2, None, None, None, "nuclear")


@pytest.mark.parametrize("layers", [[1, 2], [0, 3]])
def test_several_source_layers_must_lie_before_the_hook_that_is_read(model, layers):
    with pytest.raises(
        ValueError,
        match=rf"source layer {layers[1]} must lie before the block of target_hook='blocks.2.hook_resid_mid'",
    ):
        ml.fit_adapters(
            model, PROMPTS, layers, target_hook="blocks.2.hook_resid_mid", n_adapters=1, rank=1, progress=False
        )
    settings = {"n_adapters": 1, "rank": 1, "radius": 1.0, "n_steps": 2, "progress": False}
    fitted = ml.fit_adapters(model, PROMPTS, [0, 1], target_hook="blocks.2.hook_resid_mid", **settings)
    assert fitted.source_layers == (0, 1) and (fitted.history[-1] > 0).all()


def test_a_fit_from_negated_adapters_begins_with_them(build):
    model = build("llama", "bridge")
    settings = {"n_adapters": 2, "rank": 2, "scale": 0.5, "n_steps": 1, "optimizer": "power", "progress": False}
    one = ml.fit_adapters(model, PROMPTS, 1, 3, **settings)
    for start in (one, -one):
        again = ml.fit_adapters(model, PROMPTS, 1, 3, init=start, **settings)
        torch.testing.assert_close(again.history[0], ml.objective(model, PROMPTS, start), rtol=1e-4, atol=1e-4)
    assert digest_of_factors(one) != digest_of_factors(-one)


def test_the_radius_is_a_mean_over_all_positions_but_sinks(model):
    """A first position that is a sink at a later layer, as in many models, doesn't count in the radius or its control.

    The other positions keep the radius, whatever an update does to the first one.
    """

    def sinks(stream, hook):
        stream = stream.clone()
        stream[:, 0] *= 1000
        return stream

    settings = {"n_adapters": 3, "rank": 2, "n_steps": 20, "lr": 0.05, "radius": 5.0, "progress": False}
    with model.hooks(fwd_hooks=[("blocks.3.hook_resid_post", sinks)]):
        fitted = ml.fit_adapters(model, PROMPTS, 1, 3, **settings)
        for adapters in (fitted, ml.random_adapters(fitted, model)):
            effect = ml.source_effects(adapters, model, PROMPTS)
            assert effect.mask.tolist() == [[False, True, True, True, True], [False, True, True, True, False]]
            norms = effect.values.norm(dim=-1)  # [adapter prompt pos]
            others = torch.cat([norms[:, 0, 1:5], norms[:, 1, 1:4]], dim=1).mean(1)
            torch.testing.assert_close(others, torch.full((3,), 5.0), rtol=1e-3, atol=0)
            assert (norms[:, :, 0] - 5.0).abs().max() > 0.05  # with it, the mean would be another
    unembedded: list[torch.Tensor] = []
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda logits, hook: unembedded.append(logits))]):
        usual = ml.source_effects(fitted, model, PROMPTS)
    assert not unembedded  # logits of all positions would take more memory than all else
    assert usual.mask.tolist() == [[True] * 5, [True, True, True, True, False]]
