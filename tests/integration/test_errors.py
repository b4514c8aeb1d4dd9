"""Is bad input refused before any optimisation step, with the argument, the rule and the remedy?"""

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BertConfig, T5Config

import melbo_lens as ml
from melbo_lens.methods import melbo
from tests import models

GOOD = {"source_layer": 1, "target_layer": 3, "n_vectors": 2, "radius": 2.0, "n_steps": 2, "progress": False}
BAD = [
    ({"source_layer": 4}, "source_layer=4 .* 0 to 3"),
    ({"source_layer": -1}, "source_layer=-1"),
    ({"target_layer": 5}, r"target_layer=5 .* n_layers = 4"),
    ({"target_layer": 2}, r"source_layer \+ 2 = 3"),
    ({"target_layer": None}, "either target_layer or target_hook"),
    ({"target_hook": "blocks.3.hook_resid_mid"}, "not both"),
    ({"target_layer": None, "target_hook": "blocks.1.hook_resid_mid"}, "after source_layer=1"),
    ({"target_layer": None, "target_hook": "blocks.3.hook_resid_middle"}, "no hook 'blocks.3.hook_resid_middle'"),
    ({"radius": 0.0}, "radius=0.0 must be a positive"),
    ({"radius": -1.0}, "radius=-1.0"),
    ({"radius": float("nan")}, "radius=nan"),
    ({"radius": float("inf")}, "radius=inf"),
    ({"p": 0.5}, "p=0.5"),
    ({"q": 0.0}, "q=0.0"),
    ({"n_vectors": 33}, "n_vectors=33 .* d_model=32"),
    ({"n_vectors": 0}, "n_vectors=0"),
    ({"n_steps": 0}, "n_steps=0"),
    ({"restarts": 0}, "restarts=0"),
    ({"restarts": 2, "optimizer": "adamw"}, "restarts=2"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"lr": 0.1}, "lr=0.1 has no meaning"),
    ({"lr": -1.0, "optimizer": "adamw"}, "lr=-1.0"),
    ({"prompts": ""}, r"prompts\[0\] is empty"),
    ({"prompts": []}, "empty list"),
    ({"prompts": ["w1", ""]}, r"prompts\[1\] is empty"),
    ({"prompts": "w1 " * 80}, r"n_ctx holds 64"),
    ({"prompts": torch.zeros(1, 0, dtype=torch.long)}, "token ids"),
    ({"target_positions": slice(20, None)}, "selects no token"),
    ({"target_positions": []}, "selects no token"),
    ({"target_positions": [30]}, r"\[30\] lie outside"),
    ({"init": torch.ones(3, models.D_MODEL)}, r"init has shape \(3, 32\)"),
    ({"init": torch.zeros(2, models.D_MODEL)}, "none of them zero"),
]


@pytest.fixture
def no_steps(monkeypatch):
    """Fails the test if an optimisation step is begun."""

    def forbidden(*_, **__):
        raise AssertionError("an optimisation step was begun")

    monkeypatch.setattr(melbo, "fit", forbidden)


@pytest.mark.parametrize(("bad", "said"), BAD, ids=lambda value: None if isinstance(value, dict) else value)
def test_bad_arguments_are_refused_before_any_step(model, no_steps, bad, said):
    arguments = {"prompts": "w1 w2 w3", **GOOD, **bad}
    with pytest.raises(ValueError, match=said):
        ml.fit_vectors(model, arguments.pop("prompts"), **arguments)


def test_text_needs_a_tokenizer(directories, no_steps):
    model = models.bridge(directories("gpt2"))
    model.tokenizer = None
    with pytest.raises(ValueError, match=r"tokenizer is None: set a tokenizer, or pass token ids"):
        ml.fit_vectors(model, "w1 w2", **GOOD)


def test_a_chat_needs_a_template(directories, no_steps):
    model = models.bridge(directories("gpt2"))
    model.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ml.fit_vectors(model, [{"role": "user", "content": "w1"}], **GOOD)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_located(directories, no_steps, value):
    model = models.bridge(directories("llama"))
    with torch.no_grad():
        model.blocks[2].mlp.original_component.down_proj.weight.fill_(value)
    with pytest.raises(FloatingPointError, match="leave block 2"):
        ml.fit_vectors(model, "w1 w2 w3", **GOOD)


def test_attention_only_models_are_refused(directories, no_steps):
    if not models.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no attention-only HookedTransformer")
    model = models.hooked(directories("gpt2"), attn_only=True)
    with pytest.raises(ValueError, match=r"'blocks.1.hook_mlp_out' fired 0 times.*attention-only"):
        ml.fit_vectors(model, "w1 w2 w3", **GOOD)


def test_encoders_are_refused(tmp_path, no_steps):
    config = BertConfig(
        vocab_size=len(models.WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    model = TransformerBridge.boot_transformers(str(tmp_path), device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="encoder"):
        ml.fit_vectors(model, "w1 w2 w3", **GOOD)


def test_an_encoder_with_a_decoder_is_refused_as_what_it_is(tmp_path, no_steps):
    config = T5Config(
        vocab_size=len(models.WORDS), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    model = TransformerBridge.boot_transformers(str(tmp_path), device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="encoder with a decoder"):
        ml.fit_vectors(model, "w1 w2 w3", **GOOD)


def test_what_is_no_transformer_lens_model_is_refused(model, no_steps):
    with pytest.raises(TypeError, match=r"got Linear\. Load it with TransformerLens"):
        ml.fit_vectors(torch.nn.Linear(2, 2), "w1", **GOOD)
    with pytest.raises(TypeError, match="HookedTransformer or a TransformerBridge; got GPT2LMHeadModel"):
        ml.fit_vectors(model.original_model, "w1", **GOOD)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 62}, "62 were asked for"),
        ({"signs": (2,)}, r"signs=\(2,\)"),
        ({"signs": ()}, "signs"),
        ({"scales": (0.0,)}, "scales"),
        ({"scales": (1.0, 1.0)}, "repeat"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"n_samples": 3}, "n_samples=3"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_generate_refuses_bad_settings(model, bad, said):
    vectors = ml.SteeringVectors(torch.ones(1, models.D_MODEL), 1)
    with pytest.raises(ValueError, match=said):
        ml.generate(model, "w1 w2 w3", vectors, **{"max_new_tokens": 2, "progress": False, **bad})


def test_vectors_of_another_model_are_refused(model):
    for vectors in (ml.SteeringVectors(torch.ones(1, 16), 1), ml.SteeringVectors(torch.ones(1, models.D_MODEL), 9)):
        with pytest.raises(ValueError, match="Use the model that it was learned on"), ml.steer(model, vectors):
            pass
        with pytest.raises(ValueError, match="Use the model that it was learned on"):
            ml.generate(model, "w1", vectors, max_new_tokens=1)


def test_too_many_rows_for_a_batch_is_an_error_and_leaves_no_hook(model):
    vectors = ml.SteeringVectors(torch.ones(3, models.D_MODEL), 1)
    with pytest.raises(ValueError, match=r"3 steering vectors .* batch of 1 rows"), ml.steer(model, vectors):
        model(model.to_tokens("w1 w2"))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
