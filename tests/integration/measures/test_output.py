"""Are effects what one gets by running the steered model and computing them by hand?"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.generation.completions import COLUMNS
from melbo_lens.measures.ranking import cluster
from melbo_lens.models.access import host_of
from tests import models

PROMPTS = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9"]


def vectors(n=3):
    return ml.SteeringVectors(torch.randn(n, models.D_MODEL, generator=torch.Generator().manual_seed(3)), 1).rescaled(
        5.0
    )


def logits_of(model, prompt, vector=None):
    tokens = model.to_tokens(prompt)
    with torch.no_grad():
        if vector is None:
            return host_of(model).forward(tokens)[0, -1]
        with ml.steer(model, vector):
            return host_of(model).forward(tokens)[0, -1]


def test_distributions_and_logit_differences_are_those_of_the_steered_model(any_model):
    steering = vectors()
    table = ml.output_effects(any_model, PROMPTS, steering, tokens=(5, 7)).table
    assert len(table) == 2 * 3 * 2
    for row in table.itertuples():
        clean, steered = (
            logits_of(any_model, PROMPTS[row.prompt]),
            logits_of(any_model, PROMPTS[row.prompt], row.sign * steering[row.vector]),
        )
        p, q = torch.distributions.Categorical(logits=clean), torch.distributions.Categorical(logits=steered)
        assert row.kl == pytest.approx(float(torch.distributions.kl_divergence(p, q)), rel=1e-3, abs=1e-5)
        assert (row.entropy, row.entropy_unsteered) == pytest.approx(
            (float(q.entropy()), float(p.entropy())), rel=1e-3, abs=1e-5
        )
        assert row.logit_difference == pytest.approx(float(steered[5] - steered[7]), rel=1e-3, abs=1e-4)
    assert table.kl.max() > 0.02


def test_norm_changes_are_located_by_layer_and_position(any_model):
    change = ml.output_effects(any_model, PROMPTS, vectors(1), signs=(1,)).norm_change
    assert change.shape[:2] == (2, models.N_LAYERS)
    assert change[:, 0].nan_to_num().abs().max() < 1e-5  # nothing before the source layer
    length = any_model.to_tokens(PROMPTS[0]).shape[1]
    assert change[0, 1:, :length].abs().min() > 0 and change[0, :, length:].isnan().all()
    seen = {}
    with ml.steer(any_model, vectors(1)):
        any_model.run_with_hooks(
            any_model.to_tokens(PROMPTS[1]),
            fwd_hooks=[("blocks.2.hook_resid_post", lambda a, hook: seen.update(z=a.detach()))],
        )
    steered = seen["z"].norm(dim=-1)
    any_model.run_with_hooks(
        any_model.to_tokens(PROMPTS[1]),
        fwd_hooks=[("blocks.2.hook_resid_post", lambda a, hook: seen.update(z=a.detach()))],
    )
    torch.testing.assert_close(change[1, 2], (steered / seen["z"].norm(dim=-1) - 1)[0], atol=1e-4, rtol=1e-3)


def test_top_tokens_by_both_routes(any_model):
    steering = vectors(2)
    table = ml.top_tokens(any_model, steering, k=4, prompts=PROMPTS)
    assert table.route.tolist() == ["direct", "steered"] * 2
    change = torch.stack(
        [logits_of(any_model, prompt, steering[1]) - logits_of(any_model, prompt) for prompt in PROMPTS]
    ).mean(0)
    promoted, suppressed = table.iloc[3].promoted, table.iloc[3].suppressed
    assert promoted[0] == (models.WORDS[int(change.argmax())], pytest.approx(float(change.max()), rel=1e-3))
    assert suppressed[0] == (models.WORDS[int(change.argmin())], pytest.approx(float(change.min()), rel=1e-3))


def test_the_direct_path_leads_through_the_final_norm(any_model):
    """The oracle is the derivative of the logits at a stream to which the vector is at a right angle."""
    norm, steering = any_model.ln_final, vectors(2)
    weights = [weight for name, weight in norm.named_parameters() if name.endswith(("weight", ".w")) or name == "w"]
    before = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(8)
    try:
        for weight in weights:
            weight.data = torch.randn(weight.shape, generator=generator)  # some are negative, as in real models
        table = ml.top_tokens(any_model, steering, k=4)
        for row, vector in enumerate(steering.values):
            v, ones = vector, torch.ones_like(vector) / models.D_MODEL**0.5
            stream = torch.randn(models.D_MODEL, generator=generator)
            basis = torch.linalg.qr(torch.stack([ones, v], 1)).Q
            stream = 50 * (stream - basis @ (basis.T @ stream))

            def logits(x):
                return any_model.unembed(any_model.ln_final(x[None, None]))[0, 0]

            step = 1e-2
            change = (logits(stream + step * v) - logits(stream - step * v)).detach() / (2 * step)
            change = change * stream.square().mean().sqrt()
            best = change.topk(4)
            assert [token for token, _ in table.promoted[row]] == [models.WORDS[i] for i in best.indices.tolist()]
            assert [float(x) for _, x in table.promoted[row]] == pytest.approx(best.values.tolist(), rel=2e-2)
    finally:
        for weight, was in zip(weights, before, strict=True):
            weight.data = was
    assert len(ml.top_tokens(any_model, steering, k=10**6).promoted[0]) == any_model.W_U.shape[1]
    for refused in (
        {"k": 0},
        {"vectors": ml.SteeringVectors(torch.ones(1, 3), 1)},
        {"vectors": replace(vectors(1), source_layer=9)},
    ):
        with pytest.raises(ValueError, match=r"k=0|d_model|layer"):
            ml.top_tokens(any_model, **{"vectors": steering, **refused})


def test_the_position_whose_stream_is_the_vector_activates_it_most(any_model):
    seen = {}
    tokens = any_model.to_tokens(PROMPTS[1])
    any_model.run_with_hooks(
        tokens, fwd_hooks=[("blocks.1.hook_resid_post", lambda a, hook: seen.update(z=a.detach()))]
    )
    planted = ml.SteeringVectors(seen["z"][0, [2, 4]], 1)
    table = ml.max_activating(any_model, planted, PROMPTS, k=2)
    best = table[table["rank"] == 0]
    assert (
        best.text.tolist() == [1, 1]
        and best.position.tolist() == [2, 4]
        and best.cosine.tolist() == pytest.approx([1, 1], abs=1e-4)
    )
    assert best.token.tolist() == [models.WORDS[int(tokens[0, i])] for i in (2, 4)]


def test_closest_directions_are_named(any_model):
    steering = vectors(2)
    matrix = torch.randn(6, models.D_MODEL, generator=torch.Generator().manual_seed(1))
    matrix[4] = -3 * steering.values[1]
    table = ml.closest_directions(steering, matrix, names=list("abcdef"), k=2)
    row = table[(table.vector == 1) & (table["rank"] == 0)].iloc[0]
    assert (row.direction, row["name"], row.cosine) == (4, "e", pytest.approx(-1.0))
    with pytest.raises(ValueError, match=r"shape \[2, 3\]"):
        ml.closest_directions(steering, torch.ones(2, 3))
    with pytest.raises(ValueError, match="1 names"):
        ml.closest_directions(steering, matrix, names=["a"])


def test_clusters_are_by_direction_in_order_of_appearance():
    features = torch.tensor([[1.0, 0], [0, 1], [2, 0.1], [0.05, 3], [-1, 0]])
    assert cluster(features, 0.3) == [0, 1, 0, 1, 2]
    assert cluster(features[:1], 0.3) == [0]


def test_vectors_with_one_effect_share_a_cluster(any_model):
    sliced = ml.slice_model(any_model, PROMPTS, 1, 3)
    one = vectors(2)
    assert ml.cluster_by_effect(sliced, ml.concatenate([one, 1.01 * one])) == [0, 1, 0, 1]


def test_the_ranking_keeps_the_best_of_each_cluster_and_gives_its_reasons(model):
    steering = vectors(3)
    measured = ml.output_effects(model, PROMPTS, steering)
    table = ml.rank(steering, measured, clusters=[0, 1, 0])
    assert " ".join(table.columns) == "vector sign kl entropy_change objective effect sink cluster near_duplicates"
    assert len(table) == 4 and table.kl.is_monotonic_decreasing and sorted(table.near_duplicates) == [0, 0, 1, 1]
    means = measured.table.groupby(["vector", "sign"]).kl.mean()
    for row in table.itertuples():
        rivals = [means[vector, row.sign] for vector in ((0, 2) if row.cluster == 0 else (1,))]
        assert row.kl == pytest.approx(max(rivals))
    assert len(ml.rank(steering, measured)) == 6
    with pytest.raises(ValueError, match="1 cluster labels"):
        ml.rank(steering, measured, clusters=[0])


def test_vectors_with_the_same_words_share_a_cluster():
    texts = {(0, 1): "it is red .", (0, -1): "a resposta é azul .", (1, 1): "it is blue .", (1, -1): "it is red ."}
    rows = [(0, "p", "steered", vector, sign, 1.0, 0, text, [], []) for (vector, sign), text in texts.items()]
    table = (
        ml.cluster_by_words(ml.Completions(pd.DataFrame(rows, columns=COLUMNS))).set_index(["vector", "sign"]).cluster
    )
    assert table[0, 1] == table[1, 1] == table[1, -1] != table[0, -1]


def test_top_tokens_at_another_position(model):
    steering = vectors(1)
    table = ml.top_tokens(model, steering, k=1, prompts=PROMPTS[1], position=2)
    tokens = model.to_tokens(PROMPTS[1])
    with torch.no_grad():
        clean = host_of(model).forward(tokens)[0, 2]
        with ml.steer(model, steering):
            change = host_of(model).forward(tokens)[0, 2] - clean
    assert table.iloc[1].promoted[0] == (
        models.WORDS[int(change.argmax())],
        pytest.approx(float(change.max()), rel=1e-3),
    )


def test_a_masked_token_counts_nothing(directories):
    """Some models give tokens that must not come a logit of -inf; that is no overflow, and no entropy."""
    model = models.bridge(directories("llama"))
    bias = torch.zeros(len(models.WORDS))
    bias[3] = -torch.inf
    model.original_model.lm_head.register_forward_hook(lambda module, arguments, output: output + bias)
    steering = vectors(2)
    measured = ml.output_effects(model, PROMPTS, steering)
    assert measured.table.notna().all().all() and (measured.table.kl > 0).all()
    tokens = model.to_tokens(PROMPTS[0])
    with torch.no_grad():
        p = model(tokens)[0, -1].softmax(-1)
        with ml.steer(model, steering[1]):
            q = model(tokens)[0, -1].softmax(-1)
    kept = torch.arange(len(p)) != 3
    row = measured.table[(measured.table.vector == 1) & (measured.table.sign == 1) & (measured.table.prompt == 0)].iloc[
        0
    ]
    assert row.kl == pytest.approx(float((p[kept] * (p[kept] / q[kept]).log()).sum()), rel=1e-3)
    assert row.entropy == pytest.approx(float(-(q[kept] * q[kept].log()).sum()), rel=1e-3)
    promoted = ml.top_tokens(model, steering, k=3, prompts=PROMPTS).promoted
    assert all(token != "<unk>" and value == value for row in promoted for token, value in row)
    assert ml.generate(model, PROMPTS, steering, 3, progress=False).table.log_probs.map(len).min() >= 0


def test_changes_that_overflow_are_an_error_for_clusters_and_tokens_too(directories):
    model = models.bridge(directories("llama"), dtype=torch.float16)
    loud = ml.SteeringVectors(torch.full((2, models.D_MODEL), 7e4), 1)
    with pytest.raises(FloatingPointError, match="vector 0 makes the target NaN or infinite in float16"):
        ml.cluster_by_effect(ml.slice_model(model, PROMPTS, 1, 3), loud)
    with pytest.raises(FloatingPointError, match="vector 0 makes the logits NaN or infinite in float16"):
        ml.top_tokens(model, loud, prompts=PROMPTS)


def test_calls_from_several_threads_take_turns(model):
    """Without turns, one thread would see the hooks of the other, and keep the flags that it had switched off."""
    several = [ml.SteeringVectors.from_tensor(3 * torch.randn(1, models.D_MODEL), 1) for _ in range(2)]
    expected = [ml.output_effects(model, PROMPTS, one).table for one in several]
    needed = [parameter.requires_grad for parameter in model.parameters()]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda k: ml.output_effects(model, PROMPTS, several[k % 2]).table, range(16)))
    for k, table in enumerate(found):
        pd.testing.assert_frame_equal(table, expected[k % 2])
    assert [parameter.requires_grad for parameter in model.parameters()] == needed and any(needed)


def test_a_ranking_shows_the_effects_of_the_fit_and_puts_rows_in_sinks_last(model):
    fitted = ml.fit_vectors(model, PROMPTS, 1, 3, n_vectors=3, radius=2.0, n_steps=2, progress=False)
    effects = fitted.provenance["effects"]
    measured = ml.output_effects(model, PROMPTS, fitted)
    loudest = int(ml.rank(fitted, measured).vector[0])
    minus = fitted.provenance["minus"]
    both = {**fitted.provenance, "sinks": [loudest], "minus": {**minus, "sinks": [loudest]}}
    marked = replace(fitted, provenance=both)
    table = ml.rank(marked, measured)
    learned = table[table.sign > 0]
    assert learned.effect.tolist() == [effects[k] for k in learned.vector]
    assert learned.objective.tolist() == [float(fitted.history[-1][k]) for k in learned.vector]
    # minus a vector is another one: the fit didn't maximise its objective, and measured its effect apart
    others = table[table.sign < 0]
    assert others.effect.tolist() == [minus["effects"][k] for k in others.vector]
    assert others.objective.isna().all() and len(learned) == len(others) == 3
    assert not table.sink[:4].any() and table.vector[4:].tolist() == [loudest] * 2 and table.sink[4:].all()
    # through rows and joins; what was derived has another effect
    some = ml.concatenate([marked[[2, 0]], marked[1]])[[1, 2]]
    table = ml.rank(some, ml.output_effects(model, PROMPTS, some))
    learned = table[table.sign > 0]
    assert {int(k): e for k, e in zip(learned.vector, learned.effect, strict=True)} == {0: effects[0], 1: effects[1]}
    assert {int(k): bool(s) for k, s in zip(table.vector, table.sink, strict=True)} == {k: k == loudest for k in (0, 1)}
    assert ml.rank(2 * marked, measured).effect.isna().all() and not ml.rank(2 * marked, measured).sink.any()
