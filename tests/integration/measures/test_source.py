"""Do looks inside adapters, their controls, files and completions say what is true?"""

import pytest
import torch

import melbo_lens as ml
from melbo_lens.models import hooks
from melbo_lens.models.access import host_of
from tests import models
from tests.integration.methods.test_adapters import DENSE, adapters_for, gaussian

PROMPTS = ["w1 w2 w3", "w4 w5 w6 w7 w8 w9", "w3 w1"]
CASES = [(name, kind) for name in DENSE for kind in ("bridge", "compatible")] + [("gpt2", "hooked")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_effect_is_what_the_stream_gains_at_each_position(build, name, kind):
    model, prompt = build(name, kind), torch.tensor([[1, 5, 9, 7]])
    adapters = adapters_for(model)
    effect = ml.source_effects(adapters, model, prompt)
    assert effect.values.shape == (2, 1, 4, models.D_MODEL) and bool(effect.mask.all()) and effect.layer == 1
    streams = {}
    for k in (None, 0, 1):
        read = ("blocks.1.hook_resid_post", lambda stream, hook, k=k: streams.update({k: stream.clone()}))
        with (
            torch.no_grad(),
            hooks.attached(host_of(model), [*([] if k is None else adapters[k].on(host_of(model)).hooks()), read]),
        ):
            host_of(model).forward(prompt)
    for k in (0, 1):
        torch.testing.assert_close(effect.values[k], streams[k] - streams[None], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(effect.norms(), effect.values.norm(dim=-1).mean((1, 2)))


def test_padding_has_no_effect_and_singular_values_are_those_of_the_biases(model):
    effect = ml.source_effects(adapters_for(model), model, PROMPTS)
    assert not effect.values[:, ~effect.mask].any() and effect.values[:, effect.mask].any()
    values, vectors = effect.singular(1)
    biases = effect.values[1][effect.mask]
    torch.testing.assert_close(values[0], torch.linalg.matrix_norm(biases, ord=2))
    torch.testing.assert_close((biases @ vectors[0]).norm(), values[0])


def test_each_layer_of_several_has_its_own_share(model):
    one, other = adapters_for(model, n=1, layer=0, rank=3, seed=1), adapters_for(model, n=1, layer=2, rank=3, seed=4)
    both = ml.SteeringAdapters({0: one.factors[0], 2: other.factors[2]}, torch.tensor([0.3]))
    with pytest.raises(ValueError, match="act at layers"):
        ml.source_effects(both, model, PROMPTS)
    with pytest.raises(ValueError, match="layer=1 is no source layer"):
        ml.source_effects(both, model, PROMPTS, layer=1)
    # the later update sees a stream that the earlier one has changed
    later = ml.source_effects(both, model, PROMPTS, layer=2)
    alone = ml.source_effects(ml.SteeringAdapters({2: other.factors[2]}, torch.tensor([0.3])), model, PROMPTS)
    assert (later.values - alone.values).norm() > 0.05 * alone.values.norm()
    first = ml.source_effects(both, model, PROMPTS, layer=0)
    torch.testing.assert_close(
        first.values,
        ml.source_effects(ml.SteeringAdapters({0: one.factors[0]}, torch.tensor([0.3])), model, PROMPTS).values,
    )


def test_no_vector_is_nearer_to_the_biases_than_that_of_to_vectors(model):
    adapters = adapters_for(model)
    vectors = ml.nearest_vectors(adapters, model, PROMPTS)
    effect = ml.source_effects(adapters, model, PROMPTS)
    biases = effect.values[:, effect.mask]
    error = (biases - vectors.values[:, None]).square().sum((1, 2))
    for seed in range(20):
        other = vectors.values + 0.05 * gaussian(*vectors.values.shape, seed=seed)
        assert ((biases - other[:, None]).square().sum((1, 2)) > error).all()
    shares = 1 - error / biases.square().sum((1, 2))
    assert vectors.provenance["explained"] == pytest.approx(shares.tolist(), abs=1e-5)
    assert all(
        one >= share
        for one, share in zip(
            vectors.provenance["explained_by_direction"], vectors.provenance["explained"], strict=True
        )
    )
    assert vectors.source_layer == 1 and 0 < min(vectors.provenance["explained"]) < 1


def test_a_constant_effect_is_a_vector_wholly(model):
    """An update that reads a direction on which the hidden activation is constant by construction: explained is 1."""
    hidden = []
    with (
        torch.no_grad(),
        hooks.attached(host_of(model), [("blocks.1.mlp.out.hook_in", lambda a, hook: hidden.append(a.clone()))]),
    ):
        host_of(model).forward(torch.tensor([[1, 5, 9, 7]]))
    solution = torch.linalg.lstsq(hidden[0][0], torch.ones(4, 1)).solution.T  # a . x = 1 at every position
    adapter = ml.SteeringAdapters.from_factors(solution[None], gaussian(1, models.D_MODEL, 1), 1)
    vector = ml.nearest_vectors(adapter, model, torch.tensor([[1, 5, 9, 7]]))
    torch.testing.assert_close(vector.values, adapter.B[:, :, 0], atol=1e-4, rtol=1e-4)
    assert vector.provenance["explained"][0] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "kind", "how"),
    [
        ("llama", "bridge", "column"),
        ("gemma2", "bridge", "column"),
        ("gpt2", "hooked", "column"),
        ("llama", "bridge", "spectral"),
    ],
)
def test_the_random_control_has_the_update_norms_rank_and_normalisation(build, name, kind, how):
    model = build(name, kind)
    fitted = ml.fit_adapters(
        model,
        PROMPTS,
        1,
        3,
        n_adapters=3,
        rank=2,
        normalization=how,
        n_steps=4,
        lr=0.1,
        target_positions=[-1],
        progress=False,
    )
    fitted = fitted * torch.tensor([1.0, -0.5, 0.7])
    control = ml.random_adapters(like=fitted, model=model, prompts=PROMPTS, seed=3)
    torch.testing.assert_close(
        ml.source_effects(control, model, PROMPTS).norms(),
        ml.source_effects(fitted, model, PROMPTS).norms(),
        rtol=1e-3,
        atol=0,
    )
    norms = control.A.norm(dim=1) if how == "column" else torch.linalg.svdvals(control.A)[:, 0]
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert control.A.shape == fitted.A.shape and (control.scales.sign() == fitted.scales.sign()).all()
    # equal norms of the factors alone would be no control: aligned factors do more
    assert (control.scales / fitted.scales).mean() > 1.2
    again, longer = (ml.random_adapters(like, model, seed=3) for like in (fitted, ml.concatenate([fitted[:2], fitted])))
    assert torch.equal(again.A, control.A) and torch.equal(longer.A[:2], control.A[:2])
    assert not torch.equal(ml.random_adapters(fitted, model, seed=4).A, control.A)


def test_a_control_of_adapters_without_prompts_must_be_given_some(model):
    with pytest.raises(ValueError, match="give prompts="):
        ml.random_adapters(adapters_for(model), model)


GENERATION = [(name, kind, "all") for name, kind in [("gemma2", "bridge"), ("neox", "compatible"), ("llama", "bridge")]]
GENERATION += [("gpt2", kind, positions) for kind in ("bridge", "hooked") for positions in ("prompt", "generated")]


@pytest.mark.parametrize(("name", "kind", "positions"), GENERATION)
def test_batched_cached_generation_equals_one_by_one(build, name, kind, positions):
    model = build(name, kind)
    adapters = adapters_for(model, scale=0.3)
    table = ml.generate(
        model, PROMPTS, adapters, max_new_tokens=6, batch_size=7, positions=positions, scales=(1.0, 0.5), progress=False
    ).table
    assert table.kind.value_counts().to_dict() == {"steered": 24, "random": 24, "unsteered": 3}
    rows = ml.slice_model(model, PROMPTS, 1, 3).batch.rows()
    compared = 0
    for row in table[table.kind == "steered"].iloc[::2].itertuples():
        one = row.sign * row.scale * adapters[row.vector].on(host_of(model))
        ids, new, ends = list(rows[row.prompt]), [], hooks.end_tokens(host_of(model))
        start = len(ids)
        for step in range(6):
            if positions == "all":
                steering = one.hooks()
            else:  # zero the update where it does not act
                site = one.sites[1]

                def update(hidden, one=one, start=start):
                    where = torch.arange(hidden.shape[1])[None, :, None]
                    active = where < start if positions == "prompt" else where >= start
                    return active * one.scale * (hidden @ one.A[0].T @ one.B[0].T)

                steering = site.hooks(update)
            with torch.no_grad(), hooks.attached(host_of(model), steering):
                best = host_of(model).forward(torch.tensor([ids]))[0, -1].topk(2)
            if float(best.values[0] - best.values[1]) < 1e-4 or int(best.indices[0]) in ends:
                break
            assert row.tokens[step] == int(best.indices[0])
            compared += 1
            new.append(int(best.indices[0]))
            ids.append(new[-1])
    assert compared > 30
    assert table[table.kind == "steered"].text.nunique() > 3


def test_signs_factors_and_subsets_scale_the_update(model):
    adapters = adapters_for(model, n=3)
    effect = ml.source_effects(adapters, model, PROMPTS).values
    torch.testing.assert_close(ml.source_effects(-adapters, model, PROMPTS).values, -effect, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        ml.source_effects(2 * adapters[[2, 0]], model, PROMPTS).values, 2 * effect[[2, 0]], atol=1e-5, rtol=1e-4
    )
    alone = torch.tensor([[1, 5, 9]])  # one adapter on one row takes a way of its own
    torch.testing.assert_close(
        ml.source_effects((-adapters[0]), model, alone).values,
        -ml.source_effects(adapters[0], model, alone).values,
        atol=1e-5,
        rtol=1e-4,
    )
    assert adapters[[2, 0]].provenance["rows"] == [2, 0] and adapters[-1].provenance["rows"] == [2]
    assert len(ml.concatenate([adapters, adapters[1]])) == 4
    with pytest.raises(ValueError, match="have scales from"):
        _ = (adapters * torch.tensor([1.0, 2.0, 3.0])).scale
    with pytest.raises(ValueError, match="can't be joined"):
        ml.concatenate([adapters, adapters_for(model, layer=2)])
    with pytest.raises(ValueError, match="SteeringAdapters and SteeringVectors can't be joined"):
        ml.concatenate([adapters, ml.SteeringVectors(torch.ones(1, 32), 1)])
    with pytest.raises(IndexError, match="adapter 3 was asked for"):
        adapters[3]


def test_a_batch_needs_one_row_for_each_adapter(model):
    with (
        pytest.raises(ValueError, match="3 steering adapters can't be applied to a batch of 2 rows"),
        ml.steer(model, adapters_for(model, n=3)),
    ):
        host_of(model).forward(torch.tensor([[1, 2], [1, 3]]))


def test_raw_hooks_work_in_transformer_lens_own_contexts(any_model):
    adapters = adapters_for(any_model, n=1)
    with ml.steer(any_model, adapters), torch.no_grad():
        expected = any_model(torch.tensor([[1, 5, 9]]))
    with torch.no_grad():
        got = any_model.run_with_hooks(torch.tensor([[1, 5, 9]]), fwd_hooks=adapters.hooks())
    torch.testing.assert_close(got, expected)


def test_files_hold_everything_and_damage_is_told(model, tmp_path):
    fitted = ml.fit_adapters(model, PROMPTS, [0, 1], 4, n_adapters=2, rank=2, n_steps=2, progress=False)
    fitted.save(tmp_path / "a.safetensors")
    loaded = ml.load(tmp_path / "a.safetensors")
    assert (
        isinstance(loaded, ml.SteeringAdapters)
        and loaded.provenance == fitted.provenance
        and loaded.sites == fitted.sites
    )
    for layer in (0, 1):
        assert all(
            torch.equal(one, other) for one, other in zip(loaded.factors[layer], fitted.factors[layer], strict=True)
        )
    assert torch.equal(loaded.scales, fitted.scales) and torch.equal(loaded.history, fitted.history)
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(data.replace(b'"B.1"', b'"C.1"'))
    with pytest.raises(ValueError, match="is damaged: it holds"):
        ml.load(tmp_path / "b.safetensors")


def test_an_adapter_is_immutable(model):
    a, b = gaussian(1, 2, host_of(model).widths(1, "mlp")[0]), gaussian(1, 32, 2)
    adapters = ml.SteeringAdapters.from_factors(a, b, 1)
    before = adapters.A.clone()
    a.zero_()
    assert torch.equal(adapters.A, before)
    with pytest.raises(TypeError):
        adapters.factors[1] = (a, b)


def test_effects_of_adapters_are_measured_like_those_of_vectors(model):
    adapters = adapters_for(model)
    table = ml.output_effects(model, PROMPTS[:1], adapters, signs=(1,)).table
    with ml.steer(model, adapters[1]), torch.no_grad():
        steered = host_of(model).forward(model.to_tokens(PROMPTS[0]))[0, -1].log_softmax(-1)
    with torch.no_grad():
        clean = host_of(model).forward(model.to_tokens(PROMPTS[0]))[0, -1].log_softmax(-1)
    assert table.kl[1] == pytest.approx(float((clean.exp() * (clean - steered)).sum()), rel=1e-3)


def test_discover_reports_on_adapters_too(model, tmp_path):
    plan = [
        ml.AdapterTrial(1, 3, 20.0, n_adapters=3, rank=2, seed=0),
        ml.AdapterTrial(1, 3, 30.0, n_adapters=3, rank=2, seed=1, diversity=1.0),
    ]
    found = ml.discover(model, PROMPTS[0], plan=plan, max_new_tokens=4, progress=False)
    assert len(found.plan) == 2 and len(found.table) > 0
    best = found.vector(0)
    assert isinstance(best, ml.SteeringAdapters) and len(best) == 1
    joined, completions = found.joined(1)
    assert len(joined) == 6 and completions.table.vector.max() == 5


CONTRACT = [
    ({1: (torch.ones(2, 3, 4), torch.ones(2, 5, 3))}, torch.ones(2), None),
    ({1: (torch.ones(2, 3, 4), torch.ones(2, 5, 2))}, torch.ones(2), "A \\[adapter rank d_mlp\\]"),
    ({1: (torch.ones(2, 3, 4), torch.ones(1, 5, 3))}, torch.ones(2), "A \\[adapter rank d_mlp\\]"),
    ({1: (torch.ones(2, 3, 4) / 0, torch.ones(2, 5, 3))}, torch.ones(2), "NaN or infinity"),
    ({1: (torch.ones(2, 3, 4), torch.ones(2, 5, 3))}, torch.ones(3), "scales must be 2 finite numbers"),
    ({-1: (torch.ones(2, 3, 4), torch.ones(2, 5, 3))}, torch.ones(2), "must not be negative"),
    ({}, torch.ones(2), "factors is empty"),
]


@pytest.mark.parametrize(("factors", "scales", "message"), CONTRACT, ids=lambda value: str(value)[-30:])
def test_malformed_adapters_are_refused(factors, scales, message):
    if message is None:
        assert "2 x rank 3, d_mlp 4, d_model 5, source_layer=1, scale 1" in repr(ml.SteeringAdapters(factors, scales))
    else:
        with pytest.raises(ValueError, match=message):
            ml.SteeringAdapters(factors, scales)


def test_an_open_gate_writes_b_at_the_gain_with_the_sign_of_the_mean_input(model):
    one, other = adapters_for(model, n=3, layer=0, rank=1, seed=1), adapters_for(model, n=3, layer=2, rank=1, seed=4)
    both = ml.SteeringAdapters({0: one.factors[0], 2: other.factors[2]}, torch.tensor([0.3, -0.2, 0.5]))
    vectors = [ml.nearest_vectors(both, model, PROMPTS, layer, mode="gain", gain=4.0) for layer in (0, 2)]
    host = host_of(model)
    for vector in vectors:
        layer = vector.source_layer
        site = both.on(host).sites[layer]
        for k, scale in enumerate((0.3, -0.2, 0.5)):
            means = []
            for prompt in map(model.to_tokens, PROMPTS):
                seen = []
                read = (site.hidden_hook, lambda activation, hook, seen=seen: seen.append(activation.clone()))
                with torch.no_grad(), ml.steer(model, both[k]), hooks.attached(host, [read]):
                    host.forward(prompt)
                means.append(seen[0][0].flatten(1) @ both.factors[layer][0][k, 0])
            sign = 1.0 if torch.cat(means).mean() > 0 else -1.0
            wanted = 4.0 * sign * scale * both.factors[layer][1][k, :, 0]
            torch.testing.assert_close(vector.values[k], wanted, atol=1e-5, rtol=1e-4)
    with ml.steer(model, [vectors[0][0], vectors[1][0]]):  # a vector for each layer replaces the adapter
        steered = host.forward(model.to_tokens(PROMPTS[0]))
    assert (steered - host.forward(model.to_tokens(PROMPTS[0]))).abs().max() > 1e-3


def test_a_gate_is_opened_in_half_precision_too(directories):
    model = models.bridge(directories("llama"), dtype=torch.bfloat16)
    adapters = adapters_for(model, n=2, layer=1, rank=1)
    found = ml.nearest_vectors(adapters, model, PROMPTS, mode="gain", gain=3.0)
    written = adapters.scales[:, None] * adapters.B[:, :, 0]
    torch.testing.assert_close(found.values.abs(), (3.0 * written).abs(), atol=1e-3, rtol=1e-2)


def test_a_gate_is_opened_of_rank_one_only_and_of_a_named_layer(model, build):
    several = adapters_for(model, n=2, rank=3)
    with pytest.raises(ValueError, match="rank 1, and these have 3"):
        ml.nearest_vectors(several, model, PROMPTS, mode="gain")
    with pytest.raises(ValueError, match="gain=0"):
        ml.nearest_vectors(several, model, PROMPTS, mode="gain", gain=0)
    gemma = build("gemma2", "bridge")
    with pytest.raises(ValueError, match="a norm follows"):
        ml.nearest_vectors(adapters_for(gemma, n=1, rank=1), gemma, PROMPTS, mode="gain")
