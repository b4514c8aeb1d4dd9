"""Do models that place their tokens by the length of the whole batch give each prompt what it has alone?

Phi-3's "longrope" and dynamic RoPE do so.
"""

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import melbo_lens as ml
from melbo_lens.models.access import host_of
from tests import architectures
from tests.architectures import CLEAR, GQA, SOURCE, TARGET, D, Plain

LONG, SHORT = " ".join(f"w{i}" for i in range(1, 11)), "w3 w1 w4 w1 w9 w9 w2 w6"
ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12, "short_factor": [1.0] * 4}
ROPE |= {"long_factor": [1.0, 2.0, 4.0, 8.0]}


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    settings = {**GQA, "sliding_window": None, "original_max_position_embeddings": 12, "rope_parameters": ROPE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.ARCHITECTURES, "longrope", ("Phi3Config", settings))
        directory = architectures.save("longrope", tmp_path_factory.mktemp("longrope"))
    model = TransformerBridge.boot_transformers(directory, device="cpu", dtype=torch.float32)
    return model, Plain(directory, model)


def test_the_length_at_which_a_model_turns_is_known(longrope, model):
    assert host_of(longrope[0]).turning_length == 12 and host_of(model).turning_length is None


@pytest.mark.parametrize("prompts", [[LONG, SHORT], [LONG + " " + LONG, SHORT]])
def test_each_row_is_written_as_if_it_were_alone(longrope, prompts):
    model, plain = longrope
    with pytest.warns(UserWarning, match="without a cache"):
        completions = ml.generate(model, prompts, None, max_new_tokens=8, progress=False)
    compared = 0
    for row, ids in zip(completions.table.itertuples(), completions.prompt_tokens, strict=True):
        expected, gaps = plain.greedy(list(ids), torch.zeros(D))
        clear = next((i for i, gap in enumerate(gaps) if gap <= CLEAR), len(gaps))
        assert row.tokens[:clear] == expected[:clear]
        compared += clear
        if row.tokens == expected[: len(row.tokens)]:
            steps = [
                plain([*ids, *row.tokens[:i]], torch.zeros(D))[0][-1].log_softmax(-1) for i in range(len(row.tokens))
            ]
            said = [float(step[token]) for step, token in zip(steps, row.tokens, strict=True)]
            assert row.log_probs == pytest.approx(said, abs=3e-4)
    assert compared >= 10


def test_a_slice_of_prompts_that_change_each_other_is_refused(longrope):
    model, plain = longrope
    with pytest.raises(RuntimeError, match=r"prompt 1 beside longer prompts differ .* give prompts of one length"):
        ml.slice_model(model, [LONG + " " + LONG, SHORT], SOURCE, TARGET)
    sliced = ml.slice_model(model, SHORT, SOURCE, TARGET)
    expected = plain(sliced.batch.rows()[0], torch.zeros(D))[1]
    torch.testing.assert_close(sliced.target[0], expected, rtol=1e-4, atol=1e-5)
