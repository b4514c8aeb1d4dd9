"""Is the calibrated radius the one that closed forms give?"""

import dataclasses

import pytest
import torch
from torch import nn

import melbo_lens as ml
from melbo_lens.ascent.manifolds import to_sphere, unit
from melbo_lens.measures import radius as calibration
from melbo_lens.measures.radius import N_DIRECTIONS, solve_radius
from melbo_lens.models.blocks import BlockCall
from melbo_lens.models.slices import SlicedModel
from melbo_lens.prompts import PromptBatch
from melbo_lens.randomness import gaussian_rows
from tests import models

D, POS = 6, 3


class Quadratic(nn.Module):
    """z -> A z + bend * (z * z) at each position; around resid = 0 the change of a bias is exactly that."""

    def __init__(self, bend):
        super().__init__()
        self.a, self.bend = torch.randn(D, D, generator=torch.Generator().manual_seed(0)), bend

    def forward(self, stream):
        return stream @ self.a.T + self.bend * stream.square()


def toy(bend):
    block = Quadratic(bend)
    batch = PromptBatch(
        torch.zeros(1, POS, dtype=torch.long), torch.tensor([POS]), torch.ones(1, POS, dtype=torch.bool), ("p",)
    )
    resid = torch.zeros(1, POS, D)
    return block, SlicedModel(
        models.NoModel(), batch, 0, 2, "source", "target", (BlockCall(block, (), {}),), resid, block(resid)
    )


@pytest.mark.parametrize("bend", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("target", [0.5, 0.1])
def test_on_a_quadratic_map_the_radius_is_the_closed_form(bend, target):
    block, sliced = toy(bend)
    directions = to_sphere(gaussian_rows(N_DIRECTIONS, D, 0, "calibration"), torch.ones(N_DIRECTIONS))
    # D(Rv) = R A v + bend R^2 v*v, so the nonlinearity is R * bend * rms(||v*v|| / ||A v||)
    slope = bend * (directions.square().norm(dim=1) / (directions @ block.a.T).norm(dim=1)).square().mean().sqrt()
    solved = solve_radius(sliced, target=target)
    assert solved.radius == pytest.approx(float(target / slope), rel=0.02)
    for radius, value in solved.curve:
        assert value == pytest.approx(float(slope) * radius, rel=1e-3)
    assert solved.rule == "nonlinearity" and solved.target == target


def test_on_a_linear_slice_no_finite_radius_qualifies():
    with pytest.raises(ValueError, match="no finite radius"):
        solve_radius(toy(0.0)[1])


@pytest.mark.parametrize("site", ["mlp_out", "resid_post", "attn_out"])
def test_the_fraction_is_of_the_activation_that_is_steered_and_the_stream_has_a_rule_of_its_own(any_model, site):
    """By one ordinary run of the model, without padding."""
    prompts = ["w1 w2 w3", "w4"]
    sliced = ml.slice_model(any_model, prompts, 1, 3, site=site)
    names = {"fraction": f"blocks.1.hook_{site}", "stream": "blocks.1.hook_resid_post"}
    for rule, name in names.items():
        norms = [any_model.run_with_cache(any_model.to_tokens(text))[1][name][0].norm(dim=-1) for text in prompts]
        expected = 0.35 * float(torch.cat(norms).median())
        assert solve_radius(sliced, rule, 0.35).radius == pytest.approx(expected, rel=1e-4)


def test_norms_leave_sinks_out(model):
    """A first position of a thousand times the norm, as many models have, does not move a radius."""
    sliced = ml.slice_model(model, ["w1 w2 w3 w4 w5"], 1, 3)
    resid = sliced.resid.clone()
    resid[:, 0] *= 1000
    assert solve_radius(dataclasses.replace(sliced, resid=resid), "stream").radius == pytest.approx(
        solve_radius(sliced, "stream").radius, rel=0.3
    )


@pytest.mark.parametrize(
    ("rule", "target", "said"),
    [("median", None, "rule='median'"), ("fraction", 0.0, "target=0.0"), ("fraction", -1.0, "target=-1")],
)
def test_rules_and_targets_without_meaning_are_refused(rule, target, said):
    with pytest.raises(ValueError, match=said):
        solve_radius.__wrapped__(toy(1.0)[1], rule, target)


@pytest.mark.parametrize("kind", ["bridge", "compatible", "hooked"])
def test_half_precision_models_are_calibrated_in_float32(directories, kind):
    if kind == "hooked" and not models.HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")

    def radius(dtype):
        model = (
            models.hooked(directories("llama"), dtype=dtype)
            if kind == "hooked"
            else models.bridge(directories("llama"), kind == "compatible", dtype)
        )
        before = [(parameter.dtype, parameter.data_ptr()) for parameter in nn.Module.parameters(model)]
        calibration = ml.calibrate_radius(
            model, "w1 w2 w3", 1, 4, "nonlinearity", target=0.02
        )  # below what half precision can tell
        assert before == [
            (parameter.dtype, parameter.data_ptr()) for parameter in nn.Module.parameters(model)
        ] and dtype in dict(before)
        return calibration.radius

    assert radius(torch.bfloat16) == pytest.approx(radius(torch.float32), rel=0.1)


def test_the_kl_rule_reaches_its_divergence(any_model):
    solved = ml.calibrate_radius(any_model, ["w1 w2 w3", "w4"], 1, 3, rule="kl", target=0.05)
    vectors = ml.SteeringVectors(
        to_sphere(gaussian_rows(N_DIRECTIONS, models.D_MODEL, 0, "calibration"), torch.ones(N_DIRECTIONS)), 1
    )
    measured = ml.output_effects(any_model, ["w1 w2 w3", "w4"], solved.radius * vectors, signs=(1,)).table.kl.mean()
    assert measured == pytest.approx(0.05, rel=0.1)


class Mixed(nn.Module):
    """A block that bends, and that jumps where a coordinate passes a threshold, as a change of experts does."""

    def __init__(self, jump, near):
        super().__init__()
        self.jump, self.near = jump, near

    def forward(self, stream):
        jumped = (stream[..., :1] > self.near).float() * self.jump
        return stream + torch.tanh(stream.roll(1, -1)) + jumped


def by_blocks(block, d=8, seed=0):
    resid = torch.randn(1, 3, d, generator=torch.Generator().manual_seed(seed))
    batch = PromptBatch(
        torch.zeros(1, 3, dtype=torch.long), torch.tensor([3]), torch.ones(1, 3, dtype=torch.bool), ("p",)
    )
    return SlicedModel(
        models.NoModel(), batch, 0, 2, "source", "target", (BlockCall(block, (), {}),), resid, block(resid)
    )


def no_forward_derivative(*_, **__):
    raise NotImplementedError("Trying to use forward AD with _grouped_mm that does not support it")


def test_without_forward_differentiation_differences_give_the_same_derivative(monkeypatch):
    sliced = by_blocks(Mixed(0.0, 9.0))
    directions = unit(gaussian_rows(8, 8, 0, "calibration"))
    change = calibration._change_of(sliced, "every")
    exact = calibration._directional_derivatives(sliced, change, directions)
    closed = torch.stack(
        [(v + (1 - torch.tanh(sliced.resid.roll(1, -1)) ** 2) * v.roll(1)).flatten() for v in directions]
    )  # by hand
    torch.testing.assert_close(exact, closed, rtol=1e-4, atol=1e-5)
    radius = calibration.solve_radius(sliced).radius
    monkeypatch.setattr(torch.func, "jvp", no_forward_derivative)
    differences = calibration._directional_derivatives(sliced, change, directions)
    torch.testing.assert_close(differences, closed, rtol=2e-2, atol=2e-2)
    assert calibration.solve_radius(sliced).radius == pytest.approx(radius, rel=0.02)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")])
def test_memory_that_runs_out_is_not_taken_for_a_missing_derivative(monkeypatch, error):
    def short(*_, **__):
        raise error

    monkeypatch.setattr(torch.func, "jvp", short)
    with pytest.raises(type(error)):
        calibration.solve_radius(by_blocks(Mixed(0.0, 9.0)))


def test_a_derivative_that_differences_do_not_agree_on_is_refused(monkeypatch):
    class Noisy(nn.Module):
        def forward(self, stream):
            return stream + torch.sin(1e6 * stream)

    monkeypatch.setattr(torch.func, "jvp", no_forward_derivative)
    with pytest.raises(calibration.NoRadius, match=r"no forward derivative .*_grouped_mm.* give a radius"):
        calibration.solve_radius(by_blocks(Noisy()))


def test_where_blocks_jump_at_tiny_radii_the_last_rise_counts():
    """A token that changes its expert at once doesn't end linearity: without jumps nearly the same radius is found."""
    sliced = by_blocks(Mixed(0.0, 9.0))
    smooth = calibration.solve_radius(sliced).radius
    near = float(sliced.resid[0, 0, 0]) + 1e-4
    found = calibration.solve_radius(by_blocks(Mixed(1.0, near)))
    assert max(value for radius, value in found.curve if radius < smooth / 5) > 0.6  # it does jump
    assert found.radius == pytest.approx(smooth, rel=0.5)


def test_a_curve_that_levels_off_below_the_default_target_has_a_radius_at_half_its_level():
    class Weak(nn.Module):
        def forward(self, stream):
            return stream + 0.3 * torch.tanh(stream.roll(1, -1))

    found = calibration.solve_radius(by_blocks(Weak()))
    assert found.target == pytest.approx(max(value for _, value in found.curve) / 2, rel=0.05) and found.target < 0.25
    value = dict(found.curve)[min(dict(found.curve), key=lambda radius: abs(radius - found.radius))]
    assert value == pytest.approx(found.target, rel=0.2)
    with pytest.raises(calibration.NoRadius, match=r"no finite radius reaches nonlinearity 0\.5"):
        calibration.solve_radius(by_blocks(Weak()), target=0.5)
