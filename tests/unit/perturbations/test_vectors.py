"""Are steering vectors the immutable values that they promise to be?"""

import copy
import math
import pickle

import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.ascent.objectives import Objective
from melbo_lens.perturbations.card import card
from melbo_lens.perturbations.rows import at_the_fit


def make(n=4, d=6, layer=2, history=True):
    values = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
    return ml.SteeringVectors(
        values, layer, torch.rand(3, n) if history else torch.zeros(0, 0), {"method": "test", "seed": 5}
    )


def test_indexing_keeps_two_axes_history_and_says_which_rows():
    vectors = make()
    for index, rows in ((1, [1]), (-1, [3]), ([1, 3], [1, 3]), (slice(1, 3), [1, 2]), (torch.tensor([2]), [2])):
        chosen = vectors[index]
        assert torch.equal(chosen.values, vectors.values[rows]) and torch.equal(
            chosen.history, vectors.history[:, rows]
        )
        assert chosen.provenance["rows"] == rows
    assert vectors[[1, 3]][1].provenance["rows"] == [3]
    assert len(list(vectors)) == 4 and list(vectors)[2].values.shape == (1, 6)


@pytest.mark.parametrize("index", [4, -5, [7], slice(9, 12)])
def test_an_index_outside_is_refused(index):
    with pytest.raises(IndexError) as refused:
        make()[index]
    assert not isinstance(index, slice) or str(index) in str(refused.value)


def test_arithmetic_is_that_of_the_values_and_is_recorded():
    vectors = make()
    for derived, values in (
        (-vectors, -vectors.values),
        (2.0 * vectors[3], 2 * vectors.values[3:]),
        (vectors * torch.tensor([1.0, 0, 2, 3]), vectors.values * torch.tensor([1.0, 0, 2, 3])[:, None]),
        (vectors[1] - vectors[2], vectors.values[1:2] - vectors.values[2:3]),
        (vectors + vectors[0], vectors.values + vectors.values[:1]),
        (vectors / 4, vectors.values / 4),
        (vectors.mean(), vectors.values.mean(0, keepdim=True)),
    ):
        torch.testing.assert_close(derived.values, values)
        assert derived.provenance["derived"] and derived.history.shape[0] == 0
    torch.testing.assert_close(vectors.rescaled(3.0).radii, torch.full((4,), 3.0))


def test_arithmetic_across_layers_or_counts_is_refused():
    with pytest.raises(ValueError, match=r"layers \[1, 2\]"):
        make(layer=1) + make(layer=2)
    with pytest.raises(ValueError, match="3 plus 4 vectors"):
        make(3) + make(4)
    with pytest.raises(ValueError, match=r"layers \[1, 2\]"):
        ml.concatenate([make(layer=1), make(layer=2)])
    with pytest.raises(ValueError, match="nothing to join"):
        ml.concatenate([])
    with pytest.raises(TypeError):
        make() + 1.0


def test_nothing_that_the_caller_does_later_changes_a_value():
    values, provenance = torch.ones(2, 3), {"seed": 1}
    vectors = ml.SteeringVectors(values, 0, provenance=provenance)
    values.zero_()
    provenance["seed"] = 2
    assert vectors.values.sum() == 6 and vectors.provenance["seed"] == 1
    with pytest.raises(AttributeError):
        vectors.values = values
    for copied in (copy.deepcopy(vectors), pickle.loads(pickle.dumps(vectors))):
        assert torch.equal(copied.values, vectors.values) and copied.provenance == vectors.provenance


def test_concatenate_keeps_radii_histories_and_what_all_agree_on():
    a, b = make(2), make(3).rescaled(7.0)
    joined = ml.concatenate([a, b, a])
    torch.testing.assert_close(joined.radii, torch.cat([a.radii, b.radii, a.radii]))
    assert joined.history.shape[0] == 0 and joined.provenance["seed"] == 5 and len(joined.provenance["parts"]) == 3
    assert torch.equal(ml.concatenate([a, a]).history, torch.cat([a.history, a.history], dim=1))


def test_what_was_learned_for_several_targets_has_none_when_it_is_joined():
    def learned(positions):
        objective = Objective(p=2, q=2, target_positions=positions, target_layer=3)
        provenance = {"target_layer": 3, "p": 2, "q": 2}
        return ml.SteeringVectors(make().values, 2, provenance=provenance, objective=objective)

    one, other = learned(slice(-1, None)), learned(slice(-2, None))
    joined = ml.concatenate([one, other])
    assert joined.objective is None and ml.concatenate([one, one]).objective == one.objective
    assert joined.provenance["p"] == 2 and "target_layer" not in joined.provenance


def test_rows_of_what_was_derived_from_another_number_of_rows():
    vectors = make()
    spread = vectors[1] - vectors
    assert [float(one.values.norm()) for one in spread] == pytest.approx(spread.radii.tolist())
    mean = vectors[[1, 3]].mean()
    assert "rows" not in mean.provenance and mean[0].provenance["rows"] == [0]
    assert (2 * vectors[[1, 3]]).provenance["rows"] == [1, 3]
    assert torch.equal(vectors[::-1].values, vectors.values.flip(0))
    # an earlier version kept the row of the one vector
    assert len(list(ml.SteeringVectors(vectors.values, 2, provenance={"rows": [1]}))) == 4


@pytest.mark.parametrize("provenance", [[1], {"derived": 5}])
def test_a_provenance_that_can_not_be_read_again_is_refused(provenance):
    with pytest.raises((ValueError, TypeError), match="provenance"):
        ml.SteeringVectors(make().values, 2, provenance=provenance)


@pytest.mark.parametrize(
    "mine",
    [
        {"rows": 3},
        {"effects": "polite"},
        {"effects": [1.0] * 4, "sinks": "<img>"},
        {"parts": [{"effects": 5}]},
        {"parts": [1]},
        {"effects": ["a"] * 4},
    ],
)
def test_what_a_user_keeps_under_a_name_of_ours_is_no_figure_of_a_fit(mine):
    vectors = ml.SteeringVectors(make().values, 2, provenance=mine)
    assert all(map(math.isnan, at_the_fit(vectors.provenance, 4)[0]))
    assert len(list(vectors)) == 4 and "attention sink" not in card(vectors, "user/found")


def test_joined_rows_that_are_joined_again_keep_their_effects():
    fit = {"effects": [0.0, 0.1, 0.2, 0.3], "sinks": [3]}
    vectors = ml.SteeringVectors(make().values, 2, provenance=fit)
    joined = ml.concatenate([ml.concatenate([vectors[[3, 2]], vectors[[1]]])[[2, 0]], vectors[[0]], vectors[[3, 1]]])
    effects, sunk = at_the_fit(joined[[3, 0, 1, 2]].provenance, 4)
    assert effects == [0.3, 0.1, 0.3, 0.0] and sunk == [True, False, True, False]
    for changed in (2 * joined, ml.concatenate([joined, 2 * vectors])):
        assert all(map(math.isnan, at_the_fit(changed.provenance, len(changed))[0]))


def test_numbers_that_overflow_where_they_are_kept_are_refused():
    large = torch.tensor([[1e300, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="NaN or infinity"):
        ml.SteeringVectors.from_tensor(large, 1)
    with pytest.raises(ValueError, match="NaN or infinity"):
        ml.SteeringAdapters.from_factors(large[None], torch.ones(1, 2, 1, dtype=torch.float64), 1)


@pytest.mark.parametrize("layer", [-1, 1.5, True])
def test_a_layer_to_ablate_is_a_number_of_a_block(layer):
    with pytest.raises((ValueError, TypeError)):
        make().ablation_hooks([layer])


def test_one_vector_broadcasts_and_n_vectors_need_n_rows():
    vectors, activation = make(3), torch.zeros(3, 5, 6)
    ((name, function),) = vectors.hooks()
    assert name == "blocks.2.hook_mlp_out"
    torch.testing.assert_close(function(activation, hook=None), vectors.values[:, None].expand(3, 5, 6))
    ((_, single),) = vectors[1].hooks()
    torch.testing.assert_close(single(activation, hook=None), vectors.values[1].expand(3, 5, 6))
    with pytest.raises(ValueError, match=r"3 steering vectors .* batch of 2 rows"):
        function(activation[:2], hook=None)
    half = function(activation.bfloat16(), hook=None)
    assert half.dtype == torch.bfloat16


def test_random_vectors_have_the_norms_and_no_more_in_common():
    vectors = make(8, 64)
    control = ml.random_vectors(like=vectors, seed=3)
    torch.testing.assert_close(control.radii, vectors.radii)
    assert control.source_layer == vectors.source_layer and vectors.cosine_similarity(control).abs().max() < 0.6
    assert torch.equal(
        ml.random_vectors(like=vectors[:2], seed=3).values, control.values[:2]
    )  # row k depends on (seed, k)
    assert not torch.equal(ml.random_vectors(like=vectors, seed=4).values, control.values)


def test_cosines_are_those_of_the_definition():
    vectors = make(3)
    v = vectors.values
    expected = torch.stack([torch.stack([a @ b / a.norm() / b.norm() for b in v]) for a in v])
    torch.testing.assert_close(vectors.cosine_similarity(), expected)
    assert torch.isfinite((0.0 * vectors).cosine_similarity()).all()


@pytest.mark.parametrize(
    ("values", "layer", "said"),
    [
        (torch.full((1, 3), float("nan")), 0, "NaN"),
        (torch.ones(0, 3), 0, "empty"),
        (torch.ones(1, 3), -1, "source_layer=-1"),
    ],
)
def test_values_that_make_no_sense_are_refused(values, layer, said):
    with pytest.raises(ValueError, match=said):
        ml.SteeringVectors(values, layer)


def test_the_representation_is_one_line_that_says_what_it_is():
    text = repr(make().rescaled(2.0))
    assert "\n" not in text and "4 x d_model 6" in text and "radius 2" in text and "source_layer=2" in text


def test_the_top_singular_vector_is_that_of_the_svd():
    base = torch.zeros(5, 6)
    base[:, 2] = torch.tensor([3.0, 2.0, 2.5, 3.0, -0.5])
    base += 0.01 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    vectors = ml.SteeringVectors(base, 0)
    top = vectors.top_singular()
    assert torch.cosine_similarity(top.values[0], torch.eye(6)[2], dim=0) > 0.999
    torch.testing.assert_close(top.radii, vectors.radii.mean()[None])
    for seed in range(8):
        drawn = make(5).derived({"values": torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))}, "drawn")
        assert (drawn.values @ drawn.top_singular().values[0]).sum() > 0  # its sign is theirs
    _, singular, _ = torch.linalg.svd(base)
    assert f"{float(singular[0] ** 2 / singular.square().sum()):.3f}" in top.provenance["derived"][0]


def test_ablation_removes_the_direction_and_nothing_else():
    vectors, activation = make(3), torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))
    hooks = vectors.ablation_hooks(layers=[0, 2])
    assert [name for name, _ in hooks] == ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre"]
    left = hooks[0][1](activation, hook=None)
    torch.testing.assert_close(torch.einsum("bpd,bd->bp", left, vectors.values), torch.zeros(3, 5), atol=1e-5, rtol=0)
    removed = activation - left
    parallel = (
        torch.einsum("bpd,bd->bp", removed, vectors.values)[..., None]
        * vectors.values[:, None]
        / vectors.radii[:, None, None] ** 2
    )
    torch.testing.assert_close(removed, parallel, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vectors[0].ablation_hooks([1])[0][1](left, hook=None)[0], left[0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="batch of 2 rows"):
        hooks[0][1](activation[:2], hook=None)
    with pytest.raises(ValueError, match="layers is empty"):
        vectors.ablation_hooks([])


def test_numbers_from_a_table_scale_as_others_do():
    vectors, adapters = (
        ml.SteeringVectors(torch.eye(3), 0),
        ml.SteeringAdapters.from_factors(torch.ones(2, 1, 3), torch.ones(2, 4, 1), 0),
    )
    row = pd.DataFrame({"sign": [-1], "scale": [1.5]}).iloc[0]
    torch.testing.assert_close((row.sign * row.scale * vectors).values, -1.5 * torch.eye(3))
    torch.testing.assert_close((row.sign * row.scale * adapters).scales, torch.full((2,), -1.5))
