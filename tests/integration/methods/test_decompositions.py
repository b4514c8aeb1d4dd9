"""Are CPE, DCT, power steering and the difference of means what their equations say, on real architectures?

The oracle runs the whole model with TransformerLens' own hooks, one row and one prompt at a time.
"""

import functools
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

import melbo_lens as ml
from melbo_lens.ascent.objectives import Objective
from melbo_lens.methods import derivatives
from melbo_lens.methods.jacobian import top
from melbo_lens.methods.low_rank import LowRank, weight_sites
from melbo_lens.methods.mean_change import MeanChange
from melbo_lens.methods.problem import Problem, bias
from melbo_lens.models.access import host_of
from melbo_lens.models.blocks import BlockCall
from tests import architectures, models
from tests.integration.methods.test_melbo import linear_slice
from tests.oracles.textbook import target_activation

PROMPTS = ["w1 w2 w3 w4", "w5 w6 w7"]
D = models.D_MODEL
LAST = slice(-2, None)


def mean_change(model, theta, prompts=PROMPTS, source=1, target=3):
    """The mean over prompts of the mean over the last two positions of what the target changes by."""
    parts = []
    for prompt in prompts:
        tokens = model.to_tokens(prompt)
        clean = target_activation(model, tokens, source, target, torch.zeros(D))
        parts.append((target_activation(model, tokens, source, target, theta) - clean.detach())[-2:].mean(0))
    return torch.stack(parts).mean(0)


def jacobian(model, stacked):
    """The Jacobian at 0, of the mean change or of the last two positions of all prompts, one above the other."""

    def function(theta):
        if not stacked:
            return mean_change(model, theta)
        return torch.cat([target_activation(model, model.to_tokens(p), 1, 3, theta)[-2:].flatten() for p in PROMPTS])

    return torch.autograd.functional.jacobian(function, torch.zeros(D))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_mean_changes_and_gradients_are_those_of_the_whole_model(any_model, batch_size):
    sliced = ml.slice_model(any_model, PROMPTS, 1, 3, LAST)
    theta = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    targets = torch.nn.functional.normalize(torch.randn(3, D, generator=torch.Generator().manual_seed(1)), dim=1)
    changes = MeanChange(Problem(sliced, bias(sliced), Objective().value, batch_size))
    for given in (targets, None):
        means, (gradient,) = changes((theta,), given)
        for k in range(3):
            leaf = theta[k].clone().requires_grad_()
            mean = mean_change(any_model, leaf)
            along = targets[k] if given is not None else mean.detach() / mean.detach().norm()
            (expected,) = torch.autograd.grad(mean @ along, leaf)
            torch.testing.assert_close(means[k], mean.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gradient[k], expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(changes.means((theta,)), means)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_with_a_direction_for_each_prompt_it_is_the_gradient_of_the_mean_norm(model, batch_size):
    sliced = ml.slice_model(model, PROMPTS, 1, 3, LAST)
    theta = torch.randn(1, D, generator=torch.Generator().manual_seed(0))
    changes = MeanChange(Problem(sliced, bias(sliced), Objective().value, batch_size), per_prompt=True)
    leaf = theta[0].clone().requires_grad_()
    value = sum(mean_change(model, leaf, [prompt]).norm() for prompt in PROMPTS) / 2
    (expected,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(changes((theta,), None)[1][0][0], expected, rtol=1e-3, atol=1e-5)


def test_one_step_of_cpe_is_the_gradient_through_edited_weights(build, directories):
    """Of a plain Hugging Face Llama with grouped queries: its own autograd, with the factors added to o_proj.weight."""
    model = build("llama", "bridge")
    network = AutoModelForCausalLM.from_pretrained(directories("llama"), dtype=torch.float32)
    sliced = ml.slice_model(model, PROMPTS[0], 0, 3, LAST)
    sites = weight_sites(host_of(model), [0, 1], "attn", 1, 3, None)
    generator = torch.Generator().manual_seed(0)
    point = tuple(torch.randn(1, *shape, generator=generator) for shape in [(1, 32), (D, 1)] * 2)
    targets = torch.randn(1, D, generator=generator)
    act = LowRank(sliced, sites, [], 0.5)
    means, gradients = MeanChange(Problem(sliced, act, Objective().value, 8))(point, targets)

    tokens, weights = model.to_tokens(PROMPTS[0]), dict(network.named_parameters())
    leaves = [x[0].clone().requires_grad_() for x in point]

    def hidden(edited):
        settings = {"output_hidden_states": True, "use_cache": False}
        return torch.func.functional_call(network, weights | edited, (tokens,), settings).hidden_states[3][0, -2:]

    names = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)]
    edited = {name: weights[name] + 0.5 * leaves[2 * i + 1] @ leaves[2 * i] for i, name in enumerate(names)}
    mean = (hidden(edited) - hidden({}).detach()).mean(0)
    expected = torch.autograd.grad(mean @ targets[0], leaves)
    torch.testing.assert_close(means[0], mean.detach(), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine[0], theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["direction", "norm"])
@pytest.mark.parametrize("norm", ["unit", "torus"])
def test_cpe_learns_unit_factors_whatever_the_batch(build, objective, norm):
    model = build("llama", "bridge")
    settings = {"source_layers": [0, 1], "target_layer": 3, "n_factors": 4, "n_steps": 2}
    settings |= {"norm": norm, "objective": objective}
    found = ml.fit_cpe(model, PROMPTS, progress=False, **settings)
    assert found.site == "attn" and found.source_layers == (0, 1) and len(found) == 4
    for a, b in found.factors.values():
        torch.testing.assert_close(a.norm(dim=-1)[:, 0], torch.ones(4))
        torch.testing.assert_close(b.norm(dim=-2)[:, 0], torch.ones(4))
    assert torch.equal(found.scales, torch.ones(4))
    alone = ml.fit_cpe(model, PROMPTS, batch_size=1, progress=False, **settings)
    torch.testing.assert_close(alone.history, found.history, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", ["direction", "norm"])
def test_without_repulsion_the_factors_of_cpe_climb(build, objective):
    settings = {"n_factors": 4, "n_steps": 15, "n_iterations": 0, "objective": objective, "progress": False}
    found = ml.fit_cpe(build("llama", "bridge"), PROMPTS, [0, 1], 3, **settings)
    assert float(found.history[-1].median()) > 1.05 * float(found.history[1].median())


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "neox", "gemma2", "mixtral"])
def test_the_history_of_cpe_ends_with_the_mean_change_of_its_factors(build, name):
    """Also with grouped queries, a norm after the attention, and experts in place of one MLP."""
    model = build(name, "bridge")
    settings = {"n_factors": 2, "n_steps": 3, "objective": "norm", "target_positions": LAST, "progress": False}
    found = ml.fit_cpe(model, PROMPTS[0], [0, 1], 3, **settings)
    clean, changed = [], []
    for k in (None, 0, 1):
        with ml.steer(model, found[k]) if k is not None else torch.no_grad():
            tokens = model.to_tokens(PROMPTS[0])
            _, cache = model.run_with_cache(tokens, names_filter=lambda hook: hook == "blocks.3.hook_in")
            seen = next(iter(cache.values()))[0, -2:].mean(0)
        (clean if k is None else changed).append(seen)
    expected = torch.stack([(one - clean[0]).norm() for one in changed])
    torch.testing.assert_close(found.history[-1], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fit", [ml.fit_cpe, ml.fit_dct, ml.fit_jacobian], ids=["cpe", "dct", "jacobian"])
def test_in_half_precision_what_is_learned_is_finite(directories, fit):
    model = models.bridge(directories("llama"), dtype=torch.bfloat16)
    number = {"n_vectors": 2} if fit is ml.fit_jacobian else {"n_factors": 2, "n_steps": 2}
    found = fit(model, PROMPTS, [1] if fit is ml.fit_cpe else 1, 3, progress=False, **number)
    assert all(torch.isfinite(tensor).all() for tensor in found.parts()[0].values()) and len(found) == 2


def test_cpe_goes_on_from_its_checkpoint(build, tmp_path):
    model = build("llama", "bridge")
    settings = {"source_layers": [0], "target_layer": 3, "n_factors": 3, "n_steps": 5, "progress": False}
    whole = ml.fit_cpe(model, PROMPTS, **settings)
    file = tmp_path / "cpe"

    class Stop(Exception):
        pass

    calls, act = [], LowRank.__call__

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) > 3:
            raise Stop
        return act(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRank, "__call__", interrupted)
        with pytest.raises(Stop):
            ml.fit_cpe(model, PROMPTS, checkpoint=file, **settings)
    resumed = ml.fit_cpe(model, PROMPTS, checkpoint=file, **settings)
    torch.testing.assert_close(resumed.history, whole.history)
    with pytest.raises(ValueError, match="belongs to another fit"):
        ml.fit_cpe(model, PROMPTS, checkpoint=file, **{**settings, "temperature": 0.5})


def test_linear_factors_are_the_singular_vectors_of_the_jacobian(any_model):
    found = ml.fit_dct(
        any_model, PROMPTS, 1, 3, kind="linear", n_factors=5, radius=2.0, target_positions=LAST, progress=False
    )
    left, values, right = np.linalg.svd(jacobian(any_model, stacked=False).double().numpy())
    np.testing.assert_allclose(found.provenance["alpha"], values[:5], rtol=1e-4)
    np.testing.assert_allclose(np.abs((found.values.numpy() / 2 * right[:5]).sum(1)), 1, atol=1e-4)
    np.testing.assert_allclose(np.abs((found.targets.numpy() * left[:, :5].T).sum(1)), 1, atol=1e-4)
    # the signs of u and v go together
    np.testing.assert_allclose(
        (found.targets.numpy() @ left * (found.values.numpy() / 2 @ right.T)).sum(1), 1, atol=1e-3
    )


def test_power_steering_finds_the_singular_vectors_of_the_stacked_jacobian(any_model):
    found = ml.fit_jacobian(
        any_model,
        PROMPTS,
        1,
        3,
        n_vectors=4,
        radius=1.0,
        target_positions=LAST,
        n_steps=200,
        tolerance=1e-7,
        progress=False,
    )
    _, values, right = np.linalg.svd(jacobian(any_model, stacked=True).double().numpy())
    np.testing.assert_allclose(found.provenance["singular_values"], values[:4], rtol=1e-4)
    np.testing.assert_allclose(found.provenance["gaps"], 1 - values[1:5] / values[:4], atol=1e-3)
    clear = [k for k in range(4) if values[k] / values[k + 1] > 1.02 and (k == 0 or values[k - 1] / values[k] > 1.02)]
    assert clear
    for k in clear:
        assert abs(found.values[k].double().numpy() @ right[k]) > 1 - 1e-4


def test_on_a_linear_slice_the_first_singular_vector_is_what_the_ascent_finds():
    maps, sliced = linear_slice()
    _, singular, right = np.linalg.svd(maps[0].flatten(0, 1).double().numpy())
    start = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    v, along, values, _ = top(sliced, start, 2, 300, 1e-9, 4, False)
    np.testing.assert_allclose(values[:2], singular[:2], rtol=1e-5)
    np.testing.assert_allclose(np.abs((v.numpy() * right[:2]).sum(1)), 1, atol=1e-5)
    torch.testing.assert_close(along[:, 0], torch.einsum("tde,ve->vtd", maps[0], v), rtol=1e-4, atol=1e-4)


def test_equal_singular_values_are_said_to_be_degenerate(model, monkeypatch):
    real = derivatives.products

    def isotropic(sliced, v, batch_size):
        along, _ = real(sliced, v, batch_size)
        flat = along.new_zeros(len(v), along[0].numel())
        flat[:, :D] = v
        return flat.view_as(along), v

    monkeypatch.setattr(derivatives, "products", isotropic)
    found = ml.fit_jacobian(model, PROMPTS, 1, 3, n_vectors=3, radius=1.0, target_positions=LAST, progress=False)
    assert found.provenance["degenerate"] == [[0, 1, 2]]


def test_on_a_quadratic_map_the_quadratic_factors_are_those_that_were_planted():
    generator = torch.Generator().manual_seed(0)
    v, u, start = (torch.linalg.qr(torch.randn(10, 3, generator=generator))[0].T for _ in range(3))
    alpha = torch.tensor([4.0, 2.0, 1.0])

    class Quadratic(nn.Module):
        def forward(self, stream, _):
            return ((stream @ v.T) ** 2 * alpha) @ u

    maps, linear = linear_slice()
    resid = torch.zeros_like(linear.resid)
    call = BlockCall(Quadratic(), (maps,), {}, ((0,), {}))
    sliced = replace(linear, calls=(call,), resid=resid, target=torch.zeros_like(linear.target))
    found, targets, strength = derivatives.quadratic(sliced, start, 60, 64, False)
    cosines = (found @ v.T).abs()
    order = cosines.argmax(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    torch.testing.assert_close(cosines.amax(1), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(strength, 2 * alpha[order], rtol=1e-2, atol=0)  # H is twice the coefficient of a square
    torch.testing.assert_close((targets * u[order]).sum(1), torch.ones(3), atol=1e-3, rtol=0)


def test_second_derivatives_are_those_of_the_whole_model(any_model):
    sliced = ml.slice_model(any_model, PROMPTS, 1, 3, LAST)
    v, u = (torch.randn(1, D, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    both, hessian = derivatives.second(sliced, v, u, 1)
    with derivatives.twice_differentiable():
        dense = torch.autograd.functional.hessian(lambda theta: mean_change(any_model, theta) @ u[0], torch.zeros(D))
    scale = float((dense @ v[0]).abs().max())
    torch.testing.assert_close(hessian[0], dense @ v[0], rtol=1e-3, atol=1e-3 * scale)
    assert float(both[0] @ u[0]) == pytest.approx(float(v[0] @ dense @ v[0]), rel=1e-2)


def test_the_published_radius_is_where_the_mean_change_departs_from_its_linear_part(model):
    """The published ratio: of the mean over positions and prompts, whose parts cancel, unlike those of all changes."""
    settings = {"n_factors": 2, "n_steps": 1, "target_positions": LAST, "progress": False}
    radius = ml.fit_dct(model, PROMPTS, 1, 3, radius="nonlinearity", **settings).provenance["radius"]
    derivative = jacobian(model, stacked=False)
    squares = []
    for v in torch.randn(100, D, generator=torch.Generator().manual_seed(7)):
        linear = radius * (derivative @ (v / v.norm()))
        squares.append(float((mean_change(model, radius * v / v.norm()).detach() - linear).norm() / linear.norm()) ** 2)
    assert (sum(squares) / len(squares)) ** 0.5 == pytest.approx(0.5, rel=0.15)  # other directions than the library's
    every = ml.calibrate_radius(model, PROMPTS, 1, 3, rule="nonlinearity", target_positions=LAST).radius
    assert every != pytest.approx(radius, rel=0.1)


def test_the_automatic_radius_is_that_of_every_fit_and_no_checkpoint_mixes_the_rules(model, tmp_path):
    settings = {"n_steps": 1, "target_positions": LAST, "progress": False, "seed": 3}
    usual = ml.fit_vectors(model, PROMPTS, 1, 3, n_vectors=2, **settings).provenance
    path = tmp_path / "state"
    found = ml.fit_dct(model, PROMPTS, 1, 3, n_factors=2, checkpoint=path, **settings).provenance
    assert (found["radius"], found["radius_rule"]) == (usual["radius"], usual["radius_rule"])
    with pytest.raises(ValueError, match=r"belongs to another fit .*radius"):
        ml.fit_dct(model, PROMPTS, 1, 3, n_factors=2, radius="nonlinearity", checkpoint=path, **settings)
    other = tmp_path / "other"
    for _ in range(2):  # a second call goes on
        ml.fit_dct(model, PROMPTS, 1, 3, n_factors=2, radius="nonlinearity", checkpoint=other, **settings)
    with pytest.raises(ValueError, match=r"belongs to another fit .*radius"):
        ml.fit_dct(model, PROMPTS, 1, 3, n_factors=2, checkpoint=other, **settings)
    with pytest.raises(ValueError, match=r'radius=-1\.0 .*"nonlinearity"'):
        ml.fit_dct(model, PROMPTS, 1, 3, n_factors=2, radius=-1.0)


@pytest.mark.parametrize("orthogonalize", ["qr", "soft"])
def test_exponential_factors_change_more_than_random_vectors_and_keep_their_norm(model, orthogonalize):
    n = 6 if orthogonalize == "qr" else 40
    found = ml.fit_dct(
        model,
        PROMPTS,
        1,
        3,
        n_factors=n,
        radius=2.0,
        orthogonalize=orthogonalize,
        target_positions=LAST,
        progress=False,
    )
    torch.testing.assert_close(found.radii, torch.full((n,), 2.0))
    assert found.provenance["alpha"] == sorted(found.provenance["alpha"], reverse=True)
    assert float(found.history[-1].median()) > 1.2 * float(found.history[0].median())
    for k in (0, n - 1):
        mean = mean_change(model, found.values[k]).detach()
        torch.testing.assert_close(found.targets[k], mean / mean.norm(), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(found.history[-1, k], mean.norm(), rtol=1e-3, atol=1e-5)
    if orthogonalize == "qr":
        torch.testing.assert_close(found.cosine_similarity(), torch.eye(n), atol=1e-4, rtol=0)


@pytest.mark.parametrize("fit", [ml.fit_cpe, ml.fit_dct, ml.fit_jacobian], ids=["cpe", "dct", "jacobian"])
def test_a_slice_stands_for_its_model_prompts_and_layers(model, fit):
    number = {"n_vectors": 2, "radius": 1.0} if fit is ml.fit_jacobian else {"n_factors": 2, "n_steps": 2}
    where = [1] if fit is ml.fit_cpe else 1
    whole = fit(model, PROMPTS, where, 3, target_positions=LAST, progress=False, **number)
    sliced = fit(ml.slice_model(model, PROMPTS, 1, 3, LAST), progress=False, **number)
    for name, tensor in whole.parts()[0].items():
        torch.testing.assert_close(sliced.parts()[0][name], tensor)
    with pytest.raises(TypeError, match="a slice was given"):
        fit(ml.slice_model(model, PROMPTS, 1, 3, LAST), PROMPTS, progress=False, **number)


def test_targets_follow_rows_files_and_joins(model, tmp_path):
    found = ml.fit_dct(model, PROMPTS, 1, 3, kind="linear", n_factors=3, radius=1.0, progress=False)
    assert torch.equal(found[[2, 0]].targets, found.targets[[2, 0]])
    found.save(tmp_path / "dct.safetensors")
    assert torch.equal(ml.load(tmp_path / "dct.safetensors").targets, found.targets)
    assert torch.equal(ml.concatenate([found, found[1]]).targets, torch.cat([found.targets, found.targets[1:2]]))
    plain = ml.SteeringVectors.from_tensor(found.values, 1)
    assert ml.concatenate([found, plain]).targets is None and (-found).targets is None


@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_the_contrastive_vector_is_the_difference_of_means(any_model, site):
    others = ["w8 w9", "w3 w2 w1 w0 w4"]
    name = "blocks.2.hook_mlp_out" if site == "mlp_out" else "blocks.2.hook_resid_post"
    means = []
    for prompts in (PROMPTS, others):
        rows = []
        for prompt in prompts:
            _, cache = any_model.run_with_cache(any_model.to_tokens(prompt), names_filter=lambda hook: hook == name)
            rows.append(cache[name][0, -1])
        means.append(torch.stack(rows).mean(0))
    found = ml.fit_contrastive(any_model, PROMPTS, others, 2, site=site)
    torch.testing.assert_close(found.values[0], means[0] - means[1], rtol=1e-4, atol=1e-5)
    assert found.site == site and found.source_layer == 2
    torch.testing.assert_close(
        ml.fit_contrastive(any_model, PROMPTS, others, 2, site=site, radius=3.0).radii, torch.tensor([3.0])
    )


BAD = {
    "a band past the target": (lambda m: ml.fit_cpe(m, PROMPTS, [1, 2], 3), "source layer 2 must lie"),
    "a temperature of nothing": (lambda m: ml.fit_cpe(m, PROMPTS, [0], 3, temperature=0.0), "temperature=0.0"),
    "a negative scale": (lambda m: ml.fit_cpe(m, PROMPTS, [0], 3, scale=-1.0), "scale=-1.0"),
    "negative iterations": (lambda m: ml.fit_cpe(m, PROMPTS, [0], 3, n_iterations=-1), "n_iterations=-1"),
    "no factor": (lambda m: ml.fit_cpe(m, PROMPTS, [0], 3, n_factors=0), "n_factors"),
    "no layer": (lambda m: ml.fit_cpe(m, PROMPTS, [9], 3), "source_layer=9"),
    "more factors than dimensions": (lambda m: ml.fit_dct(m, PROMPTS, 1, 3, n_factors=D + 1), "can't be orthogonal"),
    "also of the linear kind": (
        lambda m: ml.fit_dct(m, PROMPTS, 1, 3, kind="linear", orthogonalize="soft", n_factors=D + 1),
        "can't be orthogonal",
    ),
    "no step": (lambda m: ml.fit_dct(m, PROMPTS, 1, 3, n_steps=0), "n_steps"),
    "a radius of nothing": (lambda m: ml.fit_dct(m, PROMPTS, 1, 3, radius=0.0), "radius=0.0"),
    "more singular vectors than there are": (
        lambda m: ml.fit_jacobian(m, PROMPTS, 1, 3, n_vectors=D + 1),
        "don't exist",
    ),
    "a shared prompt": (lambda m: ml.fit_contrastive(m, PROMPTS, PROMPTS[1:], 2), "both the positive and the negative"),
    "a layer that isn't there": (lambda m: ml.fit_contrastive(m, PROMPTS, ["w9"], 99), "source_layer=99"),
    "a layer before the first": (lambda m: ml.fit_contrastive(m, PROMPTS, ["w9"], -1), "source_layer=-1"),
    "a checkpoint of no ascent": (
        lambda m: ml.fit_dct(m, PROMPTS, 1, 3, kind="quadratic", checkpoint="x"),
        "checkpoint='x' has no meaning",
    ),
    "letters as prompts": (lambda m: ml.ContrastiveTrial(0, 3, 1.0, "w1", ("w2",)), "sets of prompts"),
    "an empty set": (lambda m: ml.fit_contrastive(m, PROMPTS, [], 2), "prompt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_computed(model, case, monkeypatch):
    call, message = BAD[case]
    monkeypatch.setattr(type(host_of(model)), "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_band_past_the_target_of_a_slice_is_refused(model):
    sliced = ml.slice_model(model, PROMPTS, 0, 3)
    with pytest.raises(ValueError, match="target_layer=3"):
        ml.fit_cpe(sliced, source_layers=[2])
    with pytest.raises(ValueError, match="before layer 1"):
        ml.fit_cpe(ml.slice_model(model, PROMPTS, 1, 4), source_layers=[0])


def test_derivatives_run_so_many_rows_at_once_and_no_more(model):
    """A row is a vector and a prompt; what they find doesn't depend on it, nor on the default dtype."""
    sliced = ml.slice_model(model, [*PROMPTS, "w1 w9 w3"], 1, 3, LAST)
    v = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    u = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    sizes = []

    class Watched(type(sliced)):
        def change(self, rows, prompts):
            sizes.append(len(prompts))
            return super().change(rows, prompts)

    watched = Watched(**{name: getattr(sliced, name) for name in sliced.__dataclass_fields__})
    whole = (*derivatives.products(sliced, v, 99), *derivatives.second(sliced, v, u, 99))
    try:
        torch.set_default_dtype(torch.float64)
        for most in (1, 2, 4):
            sizes.clear()
            found = (*derivatives.products(watched, v, most), *derivatives.second(watched, v, u, most))
            assert max(sizes) <= most
            for one, expected in zip(found, whole, strict=True):
                torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_cpe_takes_one_layer_and_its_control_has_unit_factors_too(model):
    found = ml.fit_cpe(model, PROMPTS, 1, 3, n_factors=3, n_steps=None, progress=False)
    assert found.source_layers == (1,) and found.provenance["n_steps"] == 30
    for factor in ml.random_adapters(found, model, PROMPTS).factors[1]:
        torch.testing.assert_close(factor.flatten(1).norm(dim=1), torch.ones(3))
        assert factor.abs().flatten(1).std(dim=1).min() > 0.05  # no vector of signs


def test_settings_without_a_meaning_are_not_said_to_have_been_used(model):
    settings = {"radius": 1.0, "n_factors": 2, "progress": False}
    for kind in ("linear", "quadratic"):
        said = ml.fit_dct(model, PROMPTS, 1, 3, kind=kind, orthogonalize="soft", **settings).provenance
        assert said["orthogonalize"] is said["temperature"] is said["prompt_reduction"] is None
    assert ml.fit_dct(model, PROMPTS, 1, 3, n_steps=1, **settings).provenance["orthogonalize"] == "qr"


def test_a_checkpoint_of_another_method_is_refused_in_a_sentence(model, tmp_path):
    path = tmp_path / "state"
    ml.fit_dct(model, PROMPTS, 1, 3, n_factors=2, n_steps=1, checkpoint=path, progress=False)
    for fit, settings in ((ml.fit_vectors, {}), (ml.fit_adapters, {"rank": 2})):
        with pytest.raises(ValueError, match="checkpoint"):
            fit(model, PROMPTS, 1, 3, checkpoint=path, progress=False, **settings)


def test_in_a_hybrid_cpe_updates_full_attention_only_and_says_so(tmp_path):
    architectures.save("olmo_hybrid", tmp_path)  # linear attention in the even blocks
    model = models.bridge(str(tmp_path))
    settings = {"n_factors": 2, "n_steps": 1, "progress": False}
    assert ml.fit_cpe(model, PROMPTS, target_layer=4, **settings).source_layers == (1,)
    with pytest.raises(ValueError, match=r"The layers that have one are \[1, 3\]"):
        ml.fit_cpe(model, PROMPTS, [0, 1], 4, **settings)
    trial = ml.CpeTrial(0, 4, 2, 0, n_layers=2, n_steps=1)
    assert trial.fit(ml.slice_model(model, PROMPTS, 0, 4)).source_layers == (1,)


def test_where_the_usual_band_is_without_attention_the_next_block_with_it_is_taken(tmp_path, monkeypatch):
    kind, settings = architectures.ARCHITECTURES["olmo_hybrid"]
    settings = {**settings, "num_hidden_layers": 8, "layer_types": ["full_attention", "linear_attention"] * 4}
    monkeypatch.setitem(architectures.ARCHITECTURES, "olmo_hybrid", (kind, settings))
    architectures.save("olmo_hybrid", tmp_path)
    found = ml.fit_cpe(models.bridge(str(tmp_path)), PROMPTS, target_layer=6, n_factors=3, n_steps=1, progress=False)
    assert found.source_layers == (2,)


def test_heads_may_be_wider_than_the_stream(tmp_path):
    """Four heads of 16 read a stream of 32; the factors are those of the weights, as edited weights show."""
    config = Qwen3Config(num_key_value_heads=2, **{**models._wide, "head_dim": 16})
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    network.save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    model = models.bridge(str(tmp_path))
    found = ml.fit_cpe(model, PROMPTS[0], [0, 1], 3, n_factors=2, n_steps=2, progress=False)
    assert found.factors[0][0].shape == (2, 1, 64) and found.factors[0][1].shape == (2, 32, 1)
    tokens = model.to_tokens(PROMPTS[0])
    network = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        for layer, (a, b) in found.factors.items():
            network.model.layers[layer].self_attn.o_proj.weight += b[1] @ a[1]
        expected = network(tokens).logits
        with ml.steer(model, found[1]):
            torch.testing.assert_close(host_of(model).forward(tokens), expected, atol=1e-4, rtol=1e-4)


def test_a_target_has_as_many_linear_factors_as_dimensions(build):
    model = build("llama", "bridge")
    name = "blocks.3.attn.k.hook_out"
    width = ml.slice_model(model, PROMPTS, 1, target_hook=name).target.shape[-1]
    assert width < models.D_MODEL
    with pytest.raises(ValueError, match=f"a target of {width} dimensions has {width} singular vectors"):
        ml.fit_dct(model, PROMPTS, 1, n_factors=width + 1, radius=2.0, kind="linear", target_hook=name, progress=False)


def test_a_hook_of_the_user_that_can_not_be_copied_is_shared_by_a_copy_in_float32(directories):
    """Derivatives of a half-precision model run on copies of its blocks."""
    seen = SimpleNamespace(lock=threading.Lock(), n=0)

    def counted(activation, hook, store):
        store.n += 1

    model = models.bridge(directories("llama"), dtype=torch.bfloat16)
    model.add_hook("blocks.2.hook_resid_post", functools.partial(counted, store=seen))
    ml.fit_jacobian(model, PROMPTS, 1, 4, n_vectors=2, radius=1.0, progress=False)
    assert seen.n > 0


class Part(nn.Linear):
    """A part that a user put into a block, one of whose methods hangs on a hook."""

    def act(self, module, arguments, output):
        self(self.weight.new_zeros(1, self.in_features, dtype=output.dtype if torch.is_tensor(output) else None))


def test_a_method_of_a_part_of_a_block_that_hangs_on_a_hook_is_copied_with_it(directories):
    model = models.bridge(directories("llama"), dtype=torch.bfloat16)
    part = Part(models.D_MODEL, models.D_MODEL, dtype=torch.bfloat16)
    model.blocks[2].mlp.add_module("added", part)
    model.blocks[2].mlp.register_forward_hook(part.act)
    ml.fit_jacobian(model, PROMPTS, 1, 4, n_vectors=1, radius=1.0, progress=False)
