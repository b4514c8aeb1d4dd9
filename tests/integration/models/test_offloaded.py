"""Does a model whose weights are offloaded, and loaded only while their module runs, give what it gives otherwise?"""

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import melbo_lens as ml
from melbo_lens.models.access import has_hooked, host_of

PROMPTS = ["w1 w2 w3 w4 w5", "w6 w7 w8"]


@pytest.fixture
def both(directories, tmp_path):
    if has_hooked():
        pytest.skip("TransformerLens 3 refuses offloaded weights")
    directory = directories("llama")
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{i}": "disk" if i in (0, 2, 5) else "cpu" for i in range(6)}
    return tuple(
        TransformerBridge.boot_transformers(directory, device=None if place else "cpu", dtype=torch.float32, **place)
        for place in ({"device_map": where, "offload_folder": str(tmp_path)}, {})
    )


def test_fits_measures_and_writing_are_the_same(both):
    offloaded, plain = both
    assert "meta" in {x.device.type for x in offloaded.parameters()} and host_of(offloaded).device.type == "cpu"
    fits = [
        lambda m: ml.fit_vectors(m, PROMPTS, 1, 4, n_vectors=2, radius=2.0, n_steps=3, progress=False).values,
        lambda m: ml.fit_adapters(
            m, PROMPTS, 1, 4, n_adapters=2, rank=1, radius=1.0, n_steps=3, progress=False
        ).factors[1][1],
        lambda m: ml.fit_cpe(m, PROMPTS, [0, 1], 4, n_factors=3, n_steps=2, progress=False).factors[0][0],
    ]
    for fit in fits:
        torch.testing.assert_close(fit(offloaded), fit(plain), rtol=1e-5, atol=1e-5)
    vectors = fits[0](plain)
    bank = ml.SteeringVectors.from_tensor(vectors, 1)
    written = [ml.generate(model, PROMPTS, bank, 6, progress=False).table.tokens.tolist() for model in both]
    assert written[0] == written[1]
    torch.testing.assert_close(
        ml.activation_changes(offloaded, PROMPTS[0], bank).change, ml.activation_changes(plain, PROMPTS[0], bank).change
    )
    assert "meta" in {x.device.type for x in offloaded.parameters()}
