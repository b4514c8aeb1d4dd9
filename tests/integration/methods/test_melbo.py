"""Does `fit_vectors` find what theory and the textbook say, and is it repeatable?"""

from importlib.metadata import version

import pytest
import torch
from torch import nn

import melbo_lens as ml
from melbo_lens.ascent.constraints import OrderedRows
from melbo_lens.ascent.fixed_point import fixed_point
from melbo_lens.models.blocks import BlockCall
from melbo_lens.models.slices import SlicedModel
from melbo_lens.prompts import PromptBatch
from tests import models
from tests.builders import of_vectors, vector_problem
from tests.oracles.textbook import Textbook

PROMPTS = ["w1 w2 w3 w4", "w5 w6 w7"]


def linear_slice(n_prompts=1, pos=4, d=10, seed=0):
    """A slice that mixes positions and coordinates by a matrix for each prompt; changes are linear in the vector."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(n_prompts, pos, d, d, generator=generator)

    class Linear(nn.Module):
        def forward(self, stream, weights):
            return torch.einsum("rtde,rte->rtd", weights, stream)

    tokens = torch.zeros(n_prompts, pos, dtype=torch.long)
    lengths = torch.full((n_prompts,), pos)
    batch = PromptBatch(tokens, lengths, torch.ones(n_prompts, pos, dtype=torch.bool), tuple("p" * n_prompts))
    resid = torch.randn(n_prompts, pos, d, generator=generator)
    call = BlockCall(Linear(), (maps,), {}, ((0,), {}))
    target = call(resid, torch.arange(n_prompts), n_prompts)
    return maps, SlicedModel(models.NoModel(), batch, 0, 2, "source", "target", (call,), resid, target)


def test_on_a_linear_slice_the_vectors_are_the_right_singular_vectors_in_order():
    maps, sliced = linear_slice()
    stacked = maps[0].flatten(0, 1)  # [pos d_target, d_model]
    _, singular, right = torch.linalg.svd(stacked)
    start = torch.randn(1, 3, 10, generator=torch.Generator().manual_seed(1))
    *_, climb = fixed_point(vector_problem(sliced), (start,), OrderedRows(torch.full((3,), 2.0)), 4000, tolerance=1e-8)
    (values,) = climb.point
    torch.testing.assert_close((values / 2 * right[:3]).sum(1).abs(), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(of_vectors(sliced)(values)[0], (2 * singular[:3]) ** 2, rtol=1e-4, atol=0)


def test_over_many_prompts_it_is_the_top_eigenvector_of_the_summed_gram_matrix():
    maps, sliced = linear_slice(n_prompts=5)
    gram = torch.einsum("itde,itdf->ef", maps, maps)
    values, vectors = torch.linalg.eigh(gram)
    start = torch.randn(1, 1, 10, generator=torch.Generator().manual_seed(1))
    *_, climb = fixed_point(
        vector_problem(sliced, batch_size=3), (start,), OrderedRows(torch.ones(1)), 4000, tolerance=1e-8
    )
    (found,) = climb.point
    torch.testing.assert_close((found[0] @ vectors[:, -1]).abs(), torch.tensor(1.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(of_vectors(sliced)(found)[0], values[-1:], rtol=1e-4, atol=0)


def test_the_gradient_is_that_of_finite_differences():
    _, sliced = linear_slice(n_prompts=2)
    evaluate = of_vectors(sliced, 3, 1.5, 3)
    theta = torch.randn(2, 10, generator=torch.Generator().manual_seed(3))
    _, gradient = evaluate(theta)
    direction = torch.randn(2, 10, generator=torch.Generator().manual_seed(4))
    step = 1e-2
    difference = (evaluate(theta + step * direction)[0] - evaluate(theta - step * direction)[0]) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(1), difference, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize(("p", "q"), [(2, 1), (4, 4)])
def test_adamw_follows_the_textbook_step_by_step(any_model, orthogonal, p, q):
    init = torch.randn(3, models.D_MODEL, generator=torch.Generator().manual_seed(7))
    vectors = ml.fit_vectors(
        any_model, PROMPTS, 1, 3, n_vectors=3, radius=2.0, p=p, q=q, target_positions=slice(-2, None),
        orthogonal=orthogonal, optimizer="adamw", n_steps=12, lr=0.02, init=init, progress=False,
    )  # fmt: skip
    tokens = [any_model.to_tokens(prompt) for prompt in PROMPTS]
    flags = [parameter.requires_grad for parameter in nn.Module.parameters(any_model)]
    book = Textbook(any_model, tokens, 1, 3, [[t.shape[1] - 2, t.shape[1] - 1] for t in tokens], p, q)
    history = torch.zeros(13, 3)
    values = book.learn(
        init, 2.0, 12, 0.02, orthogonal, watch=lambda k, step, value: history.__setitem__((step, k), value)
    )
    for parameter, flag in zip(nn.Module.parameters(any_model), flags, strict=True):
        parameter.requires_grad_(flag)
    torch.testing.assert_close(vectors.history, history, rtol=1e-3, atol=0)
    assert (vectors.values - values).abs().max() < 2e-3


@pytest.mark.parametrize("optimizer", ["power", "adamw"])
def test_orthogonal_vectors_are_orthogonal_and_have_the_radius(any_model, optimizer):
    vectors = ml.fit_vectors(
        any_model, PROMPTS, 0, 3, n_vectors=20, radius=3.0, optimizer=optimizer, n_steps=5, progress=False
    )
    assert vectors.cosine_similarity().fill_diagonal_(0).abs().max() < 1e-4
    assert (vectors.radii - 3.0).abs().max() < 3e-5
    assert len(vectors) == 20 and vectors.provenance["radius"] == 3.0


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("optimizer", ["power", "adamw"])
def test_the_last_row_of_the_history_is_the_objective_of_the_values(any_model, optimizer, orthogonal):
    lr = 0.1 if optimizer == "adamw" else None
    vectors = ml.fit_vectors(
        any_model,
        PROMPTS,
        1,
        3,
        n_vectors=3,
        radius=2.0,
        optimizer=optimizer,
        lr=lr,
        orthogonal=orthogonal,
        n_steps=15,
        progress=False,
    )
    sliced = ml.slice_model(any_model, PROMPTS, 1, 3)
    value, _ = of_vectors(sliced, 2, 1, 2)(vectors.values)
    torch.testing.assert_close(vectors.history[-1], value, rtol=1e-4, atol=0)
    control = ml.random_vectors(like=vectors, seed=1)
    assert value.sum() > 1.2 * of_vectors(sliced, 2, 1, 9)(control.values)[0].sum()


def test_vectors_that_repel_each_other_climb_stay_apart_and_may_be_more_than_d_model(any_model):
    def fit(orthogonal, **settings):
        return ml.fit_vectors(
            any_model, PROMPTS, 1, 3, radius=3.0, orthogonal=orthogonal, seed=4, progress=False, **settings
        )  # fmt: skip

    def likeness(vectors):
        return vectors.cosine_similarity().fill_diagonal_(0).abs().mean()

    soft, free = (fit(how, n_vectors=models.D_MODEL + 8, n_steps=12) for how in ("soft", False))
    assert likeness(soft) < 0.5 * likeness(free)
    assert (soft.radii - 3.0).abs().max() < 3e-5 and soft.provenance["orthogonal"] == "soft"
    value, _ = of_vectors(ml.slice_model(any_model, PROMPTS, 1, 3), 2, 1, 2)(soft.values)
    torch.testing.assert_close(soft.history[-1], value, rtol=1e-4, atol=0)
    assert soft.history[-1].sum() > 1.1 * soft.history[0].sum()
    # whatever the number of rows in a pass, and after an interruption
    torch.testing.assert_close(fit("soft", n_vectors=6, n_steps=3, batch_size=4).values,
                               fit("soft", n_vectors=6, n_steps=3).values, atol=1e-4, rtol=1e-3)  # fmt: skip


def test_a_one_for_true_is_as_true(model):
    with pytest.raises((ValueError, TypeError), match="orthogonal"):
        ml.fit_vectors(model, PROMPTS, 1, 3, orthogonal=1, radius=1.0, n_vectors=models.D_MODEL + 1)


@pytest.mark.parametrize("how", ["qr", 2, None])
def test_an_unknown_way_of_keeping_vectors_apart_is_refused(model, how):
    with pytest.raises((ValueError, TypeError), match="orthogonal"):
        ml.fit_vectors(model, PROMPTS, 1, 3, orthogonal=how, radius=1.0)


def test_the_published_recipe_knows_no_repulsion(model):
    with pytest.raises(ValueError, match='orthogonal="soft" needs optimizer="power"'):
        ml.fit_vectors(model, PROMPTS, 1, 3, orthogonal="soft", radius=1.0, optimizer="adamw")


def test_one_step_does_not_depend_on_the_batch_size(model):
    def fit(batch_size):
        return ml.fit_vectors(
            model,
            PROMPTS,
            1,
            3,
            n_vectors=5,
            radius=2.0,
            optimizer="adamw",
            orthogonal=False,
            n_steps=1,
            batch_size=batch_size,
            progress=False,
        )

    reference = fit(None)
    for batch_size in (1, 3, 10):
        assert (fit(batch_size).values - reference.values).norm() < 1e-5 * reference.values.norm()
        torch.testing.assert_close(fit(batch_size).history, reference.history, rtol=1e-5, atol=0)


def test_the_same_seed_gives_identical_vectors_and_another_seed_others(any_model):
    def fit(seed, n_vectors=3):
        return ml.fit_vectors(
            any_model, PROMPTS, 1, 3, n_vectors=n_vectors, radius=2.0, n_steps=4, seed=seed, progress=False
        )

    assert torch.equal(fit(0).values, fit(0).values)
    assert not torch.equal(fit(0).values, fit(1).values)
    torch.testing.assert_close(
        fit(0, 3).history[0, :2], fit(0, 2).history[0], rtol=1e-4, atol=0
    )  # row k's start depends on (seed, k)


def test_prompt_order_and_padding_do_not_matter(any_model):
    def objective(prompts):
        sliced = ml.slice_model(any_model, prompts, 1, 3, target_positions=slice(-2, None))
        return of_vectors(sliced, 2, 1, 4)(torch.ones(2, models.D_MODEL))

    together, reverse = objective(PROMPTS), objective(PROMPTS[::-1])
    apart = [objective(prompt) for prompt in PROMPTS]
    for i in range(2):
        torch.testing.assert_close(together[i], reverse[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[i], apart[0][i] + apart[1][i], rtol=1e-4, atol=1e-4)


def test_restarts_help_or_do_no_harm_to_the_first_vector(model):
    def first(restarts):
        fitted = ml.fit_vectors(
            model, PROMPTS, 1, 4, n_vectors=2, radius=8.0, restarts=restarts, n_steps=30, progress=False
        )
        return fitted.history[-1, 0]

    assert first(4) >= first(1) * 0.999


def test_token_tensors_and_chats_are_prompts_too(any_model):
    tokens = any_model.to_tokens("w1 w2 w3")
    arguments = {"n_vectors": 2, "radius": 2.0, "n_steps": 3, "progress": False}
    a, b = (
        ml.fit_vectors(any_model, tokens, 1, 3, **arguments),
        ml.fit_vectors(any_model, "w1 w2 w3", 1, 3, **arguments),
    )
    assert torch.equal(a.values, b.values)
    chat = ml.fit_vectors(any_model, [{"role": "user", "content": "w1 w2"}], 1, 3, **arguments)
    assert chat.provenance["prompt_tokens"] == [[1, 5, 6, 4]]  # one BOS, the words, and the generation prompt


def test_the_provenance_names_every_resolved_setting(any_model):
    provenance = ml.fit_vectors(any_model, PROMPTS, 1, 3, n_vectors=2, radius=2.0, n_steps=3, progress=False).provenance
    expected = {
        "source_layer": 1,
        "target_layer": 3,
        "radius": 2.0,
        "p": 2,
        "q": 1,
        "optimizer": "power",
        "n_steps": 3,
        "seed": 0,
        "restarts": 1,
    }
    assert {key: provenance[key] for key in expected} == expected
    assert provenance["prompts"] == PROMPTS and provenance["versions"]["torch"] == version("torch")
    assert (
        "hook" in provenance["source_hook"]
        and provenance["batch_size"] >= 1
        and "stopped after 3 steps" in provenance["status"]
    )


def test_the_radius_can_be_calibrated(model):
    vectors = ml.fit_vectors(model, PROMPTS, 1, 3, n_vectors=2, n_steps=3, progress=False)
    edge = ml.calibrate_radius(model, PROMPTS, 1, 3)
    assert edge.rule == "readable" and vectors.provenance["radius_rule"] == "readable 0.75, 0.65 of its radius"
    assert vectors.provenance["radius"] == pytest.approx(0.65 * edge.radius)
    assert vectors.provenance["relative_radius"] == pytest.approx(0.65 * edge.relative, rel=1e-3)
    torch.testing.assert_close(vectors.radii, torch.full((2,), vectors.provenance["radius"]), rtol=1e-5, atol=0)
