"""Are changes, effects and log-probabilities those of a run with TransformerLens' own hooks?

This is tried for vectors and adapters on each class of model.
"""

import pytest
import torch

import melbo_lens as ml
from melbo_lens.models.access import host_of
from tests.models import D_MODEL

PROMPT = "w1 w2 w3 w4"


def vectors(n=3, seed=0):
    torch.manual_seed(seed)
    return ml.SteeringVectors(torch.randn(n, D_MODEL), 1, provenance={"target_layer": 3})


def adapters(model, n=3):
    torch.manual_seed(0)
    d_mlp = model.blocks[1].mlp.W_out.shape[0] if hasattr(model.blocks[1].mlp, "W_out") else model.cfg.d_mlp
    return ml.SteeringAdapters.from_factors(torch.randn(n, 2, d_mlp), torch.randn(n, D_MODEL, 2), 1, 0.5).on(
        host_of(model)
    )


def by_hand(model, prompt, perturbation, layer):
    """Stream that enters a layer, and logits, one perturbation at a time, by the library's own `run_with_hooks`."""
    seen = []
    read = (f"blocks.{layer - 1}.hook_resid_post", lambda stream, hook: seen.append(stream.detach().clone()))
    with torch.no_grad():
        logits = model.run_with_hooks(
            model.to_tokens(prompt), fwd_hooks=[*(perturbation.hooks() if perturbation is not None else []), read]
        )
    return seen[0][0], logits[0].log_softmax(-1)


@pytest.fixture(params=["vectors", "adapters"])
def perturbations(request, any_model):
    return vectors() if request.param == "vectors" else adapters(any_model)


def test_changes_by_token_and_layer_are_those_of_single_runs(any_model, perturbations):
    measured = ml.activation_changes(any_model, PROMPT, perturbations)
    assert measured.layers == (2, 3, 4) and measured.tokens[-4:] == ("w1", "w2", "w3", "w4") and len(measured) == 3
    for i, layer in enumerate(measured.layers):
        clean, _ = by_hand(any_model, PROMPT, None, layer)
        torch.testing.assert_close(measured.clean[i], clean.norm(dim=-1), rtol=1e-4, atol=1e-4)
        for k in range(3):
            steered, _ = by_hand(any_model, PROMPT, perturbations[[k]], layer)
            torch.testing.assert_close(measured.change[k, i], (steered - clean).norm(dim=-1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(measured.relative, measured.change / measured.clean)


@pytest.mark.parametrize("make", [lambda model: vectors(), adapters], ids=["vectors", "adapters"])
def test_effects_at_the_target_are_those_of_single_runs_with_their_signs(model, make):
    perturbations = make(model)
    effects = ml.target_effects(
        model, [PROMPT, "w5 w6"], perturbations, target_layer=3, target_positions=slice(-2, None), signs=(1, -1)
    )
    assert effects.vectors == (0, 1, 2) * 2 and effects.signs == (1, 1, 1, -1, -1, -1) and effects.target_layer == 3
    for row, (k, sign) in enumerate(zip(effects.vectors, effects.signs, strict=True)):
        one = perturbations[[k]] if sign > 0 else -perturbations[[k]]
        parts = [
            (by_hand(model, p, one, 3)[0] - by_hand(model, p, None, 3)[0])[-2:].flatten() for p in (PROMPT, "w5 w6")
        ]
        torch.testing.assert_close(effects.values[row], torch.cat(parts), rtol=1e-3, atol=1e-3)


def test_one_sign_needs_no_list(model):
    effects = ml.target_effects(model, "w1 w2", vectors(), 2, signs=-1)
    torch.testing.assert_close(effects.values, ml.target_effects(model, "w1 w2", vectors(), 2, signs=[-1]).values)
    assert set(ml.output_effects(model, "w1 w2", vectors(), signs=1).table.sign) == {1}


def test_the_target_layer_is_that_of_the_fit_unless_another_is_given(model):
    assert ml.target_effects(model, PROMPT, vectors()).target_layer == 3
    assert ml.target_effects(model, PROMPT, vectors(), target_layer=2).target_layer == 2
    assert (
        ml.target_effects(model, PROMPT, ml.random_vectors(vectors())).target_layer == 3
    )  # a control is read where what it controls is
    with pytest.raises(ValueError, match="give target_layer, from 1 to n_layers = 4, or target_hook"):
        ml.target_effects(model, PROMPT, ml.SteeringVectors.from_tensor(torch.ones(1, D_MODEL), 1))


def test_a_fit_to_a_hook_and_its_control_are_measured_at_that_hook(model):
    hook = "blocks.3.hook_resid_mid"
    fitted = ml.fit_vectors(model, PROMPT, 1, target_hook=hook, n_vectors=2, radius=2.0, n_steps=3, progress=False)
    torch.testing.assert_close(ml.objective(model, PROMPT, fitted), fitted.history[-1], rtol=1e-3, atol=1e-4)
    random = ml.random_vectors(fitted)
    effects = ml.target_effects(model, PROMPT, random, target_positions=slice(None))
    assert effects.target_layer is None and effects.target_hook == fitted.provenance["target_hook"]
    seen = []
    for bias in (random.values[0], torch.zeros(D_MODEL)):
        hooks = [
            ("blocks.1.hook_mlp_out", lambda x, hook, bias=bias: x + bias),
            (hook, lambda x, hook: seen.append(x[0])),
        ]
        with torch.no_grad():
            model.run_with_hooks(model.to_tokens(PROMPT), fwd_hooks=hooks)
    torch.testing.assert_close(effects.values[0], (seen[0] - seen[1]).flatten(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("p", "q", "token_norm"), [(2, 1, "d_model"), (4, 4, "pos")])
def test_the_objective_is_the_one_that_was_maximised(model, p, q, token_norm):
    settings = {"target_positions": slice(-2, None), "p": p, "q": q, "token_norm": token_norm}
    fitted = ml.fit_vectors(
        model, [PROMPT, "w5 w6"], 1, 3, n_vectors=3, radius=2.0, n_steps=3, progress=False, **settings
    )
    found = ml.objective(model, [PROMPT, "w5 w6"], fitted, **settings)
    torch.testing.assert_close(found, fitted.history[-1], rtol=1e-3, atol=1e-4)
    assert (ml.objective(model, [PROMPT, "w5 w6"], ml.random_vectors(fitted), 3, **settings) < found).all()


@pytest.mark.parametrize("make", [lambda model: vectors(), adapters], ids=["vectors", "adapters"])
def test_next_tokens_are_those_of_single_runs(model, make):
    perturbations = make(model)
    expected = ml.next_tokens(model, PROMPT, perturbations, k=4)
    ids = model.to_tokens(PROMPT)[0]
    assert expected.conditions == ("unsteered", *(f"{perturbations.word} {k}" for k in range(3)))
    assert len(expected.tokens) == len(ids) and perturbations.word == ("vector" if make is not adapters else "adapter")
    for i, one in enumerate([None, *(perturbations[[k]] for k in range(3))]):
        _, log_probs = by_hand(model, PROMPT, one, 3)
        followed = log_probs[:-1].gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(expected.log_probs[i], followed, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(expected.top_log_probs[i], log_probs.topk(4).values, rtol=1e-3, atol=1e-3)
        assert expected.top_tokens[i][-1][0] == model.tokenizer.decode([int(log_probs[-1].argmax())])
        assert expected.ranks[i].tolist() == [
            int((row > value).sum()) for row, value in zip(log_probs[:-1], followed, strict=True)
        ]


def test_coherence_of_unsteered_text_is_the_log_probability_that_generate_reports(model):
    completions = ml.generate(model, [PROMPT, "w5"], vectors(), max_new_tokens=5, progress=False)
    found = ml.coherence(model, completions)
    table = completions.table
    unsteered = torch.tensor((table.kind == "unsteered").tolist())
    means = torch.tensor([sum(row) / len(row) if row else float("nan") for row in table.log_probs])
    torch.testing.assert_close(found[unsteered], means[unsteered], rtol=1e-3, atol=1e-3, equal_nan=True)
    steered = torch.tensor((table.kind == "steered").tolist())
    assert (found[steered] - means[steered]).abs().max() > 0.1  # under the unsteered model, not under the steered one


def test_coherence_knows_that_a_chat_has_its_begin_token(model):
    chat = [{"role": "user", "content": "w1 w2"}]
    completions = ml.generate(model, chat, None, max_new_tokens=4, progress=False)
    row = completions.table.iloc[0]
    assert float(ml.coherence(model, completions)[0]) == pytest.approx(
        sum(row.log_probs) / len(row.log_probs), abs=1e-3
    )


def test_many_vectors_are_measured_in_parts(model, monkeypatch):
    whole = ml.activation_changes(model, PROMPT, vectors(5))
    monkeypatch.setattr("melbo_lens.measures.changes.ROWS_AT_ONCE", 2)
    torch.testing.assert_close(
        ml.activation_changes(model, PROMPT, vectors(5)).change, whole.change, rtol=1e-4, atol=1e-5
    )


def test_measurements_can_be_kept(model, tmp_path):
    measured, effects = (
        ml.activation_changes(model, PROMPT, vectors()),
        ml.target_effects(model, PROMPT, vectors(), signs=(1, -1)),
    )
    measured.save(tmp_path / "changes.safetensors")
    effects.save(tmp_path / "effects.safetensors")
    again = ml.ActivationChanges.load(tmp_path / "changes.safetensors")
    assert torch.equal(again.change, measured.change) and (again.tokens, again.layers) == (
        measured.tokens,
        measured.layers,
    )
    again = ml.TargetEffects.load(tmp_path / "effects.safetensors")
    assert torch.equal(again.values, effects.values) and (again.vectors, again.signs) == (
        effects.vectors,
        effects.signs,
    )
    with pytest.raises(ValueError, match="holds 'ActivationChanges', not 'TargetEffects'"):
        ml.TargetEffects.load(tmp_path / "changes.safetensors")


def test_the_model_is_left_as_it_was(any_model):
    any_model.train()
    state = torch.random.get_rng_state()
    ml.activation_changes(any_model, PROMPT, vectors())
    ml.next_tokens(any_model, PROMPT, vectors())
    assert any_model.training and torch.equal(state, torch.random.get_rng_state())
    assert all(not point.fwd_hooks for point in any_model.hook_dict.values()) and all(
        p.requires_grad for p in any_model.parameters()
    )
    any_model.eval()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda model: ml.activation_changes(model, ["w1", "w2"], vectors()),
            "2 prompts were given, this looks at the tokens of one",
        ),
        (
            lambda model: ml.activation_changes(model, "w1", vectors(), layers=[9]),
            r"layers=\[9\] must hold layers from 1 to n_layers = 4",
        ),
        (
            lambda model: ml.target_effects(model, "w1", vectors(), target_layer=9),
            "target_layer=9 must lie from 1 to n_layers = 4",
        ),
        (
            lambda model: ml.target_effects(model, "w1", vectors(), 2, signs=(2,)),
            r"signs=\(2,\) must hold \+1, -1 or both",
        ),
        (lambda model: ml.output_effects(model, "w1", vectors(), signs=(1, 1)), r"signs=\(1, 1\) repeat a value"),
        (lambda model: ml.output_effects(model, "w1", vectors(), tokens=[1, 50]), "must be two token ids from 0 to 49"),
        (
            lambda model: ml.target_effects(model, "w1", ml.SteeringVectors(torch.ones(1, 32), 1)),
            "don't know where their effect is to be read",
        ),
        (lambda model: ml.next_tokens(model, "w1", k=0), "k=0 must be an integer of at least 1"),
        (lambda model: ml.activation_changes(model, "w1", ml.SteeringVectors(torch.ones(1, 7), 1)), "d_model 7"),
        (lambda model: ml.objective(model, "w1", vectors(), p=0.5), "p=0.5 must be"),
    ],
)
def test_mistakes_are_said(model, call, said):
    with pytest.raises(ValueError, match=said):
        call(model)


@pytest.mark.parametrize("prompt", ["w1 w2 w3", "w1 w2 w3 w4"])
def test_scores_of_pairs_of_positions_are_no_target(build, prompt):
    """With four heads and four tokens, their shape is that of an activation [row pos ...]."""
    model, given = build("llama", "bridge"), {"target_hook": "blocks.3.attn.hook_pattern"}
    assert given["target_hook"] in host_of(model).points
    for call in (
        lambda: ml.slice_model(model, prompt, 1, **given),
        lambda: ml.target_effects(model, prompt, vectors(), **given),
        lambda: ml.objective(model, prompt, vectors(), **given),
    ):
        with pytest.raises(ValueError, match="scores of pairs of positions"):
            call()


def test_an_activation_without_positions_is_no_target(build):
    model = build("mixtral", "bridge")  # its router sees all positions of all rows as one axis
    with pytest.raises(ValueError, match=r"must have an activation \[row pos"):
        ml.target_effects(model, PROMPT, vectors(), target_hook="blocks.3.mlp.gate.hook_out")
