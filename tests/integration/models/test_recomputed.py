"""Do long prompts fit, and is what blocks compute again in the backward pass the same as what they would keep?"""

import pytest
import torch

import melbo_lens as ml
from melbo_lens.methods import derivatives
from melbo_lens.models import hooks, slicing
from melbo_lens.models.tally import Tally

PROMPTS = ["w1 w2 w3 w4 w5", "w6 w7 w8"]
NAMES = ["gpt2", "llama", "gemma2"]


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(slicing, "KEPT_BYTES", 1)


def gradient(sliced, seed=0):
    start = torch.randn(2, sliced.d_model, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    with torch.enable_grad():
        change = sliced.change(start, sliced.everyone)
        return torch.autograd.grad(change.square().sum(), start)[0]


@pytest.mark.parametrize("site", ["mlp_out", "attn_out"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same(build, name, site, little_memory):
    again = ml.slice_model(build(name), PROMPTS, 1, 4, site=site)
    slicing.KEPT_BYTES = 2**30
    once = ml.slice_model(build(name), PROMPTS, 1, 4, site=site)
    assert again.recomputed and not once.recomputed
    torch.testing.assert_close(gradient(again), gradient(once), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_second_derivatives_are_the_same(build, name, little_memory):
    again = ml.slice_model(build(name), PROMPTS, 1, 4)
    slicing.KEPT_BYTES = 2**30
    once = ml.slice_model(build(name), PROMPTS, 1, 4)
    v = torch.randn(2, again.d_model, generator=torch.Generator().manual_seed(1))
    u = torch.randn(2, again.d_model, generator=torch.Generator().manual_seed(2))
    for measure in (lambda s: derivatives.products(s, v, 4), lambda s: derivatives.second(s, v, u, 4)):
        for found, expected in zip(measure(again), measure(once), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_every_fit_finds_the_same(model, little_memory):
    fits = [
        lambda: ml.fit_vectors(model, PROMPTS, 1, 4, n_vectors=2, radius=2.0, n_steps=3, progress=False).values,
        lambda: (
            ml.fit_vectors(
                model,
                PROMPTS,
                1,
                target_hook="blocks.3.attn.hook_z",
                n_vectors=2,
                radius=2.0,
                n_steps=3,
                progress=False,
            ).values
        ),
        lambda: ml.fit_adapters(
            model, PROMPTS, [0, 1], 4, n_adapters=2, rank=1, radius=1.0, n_steps=3, progress=False
        ).factors[1][0],
        lambda: ml.fit_cpe(model, PROMPTS, [0, 1], 4, n_factors=3, n_steps=2, progress=False).factors[1][0],
    ]
    again = [fit() for fit in fits]
    slicing.KEPT_BYTES = 2**30
    for found, fit in zip(again, fits, strict=True):
        torch.testing.assert_close(found, fit(), rtol=1e-4, atol=1e-5)


def test_much_less_is_held(build):
    model = build("llama")
    long = " ".join(f"w{1 + i % 9}" for i in range(60))
    once = ml.slice_model(model, long, 0, model.cfg.n_layers)
    held = []
    for sliced in (once, slicing.replace(once, recomputed=True)):
        with hooks.frozen(sliced.host), Tally() as tally:
            gradient_of = torch.zeros(1, sliced.d_model).requires_grad_()
            with torch.enable_grad():
                torch.autograd.grad(sliced.change(gradient_of, sliced.everyone).sum(), gradient_of)
        held.append(tally.peak)
        assert tally.peak == pytest.approx(sliced.kept[1], rel=0.3)
    assert held[1] < 0.6 * held[0]
