"""Is the edge of readability where text stops being natural, on models that can write and on those that can't?"""

from types import SimpleNamespace

import pytest
import torch

import melbo_lens as ml
from melbo_lens.measures.radius import NoRadius
from melbo_lens.methods import readable
from melbo_lens.methods.readable import Rung, edge_of_effect, edge_of_readability

PROMPTS = ["w1 w2 w3 w4", "w5 w6 w7"]


def test_the_edge_is_bracketed_and_bisected_from_above_and_from_below(model, monkeypatch):
    sliced = ml.slice_model(model, PROMPTS, 1, 3)
    norm = float(sliced.resid.norm(dim=-1)[sliced.batch.own].median())
    monkeypatch.setattr(readable, "coherence", lambda host, completions: torch.zeros(len(completions)))
    for edge in (0.013 * norm, 0.1 * norm, 3.3 * norm):
        tried = []

        def rung(self, radius, write, edge=edge, tried=tried):
            tried.append(radius)
            return Rung(radius, float(radius < edge), radius, 0.0)

        monkeypatch.setattr(readable._Climber, "rung", rung)
        found = edge_of_readability(sliced)
        assert found.radius == pytest.approx(edge, rel=0.2)  # two bisections of a factor of two
        assert found.norm == pytest.approx(norm) and found.relative == pytest.approx(found.radius / norm)
        assert len(set(tried)) == len(tried) and [radius for radius, _ in found.curve] == sorted(tried)
        assert edge_of_effect(sliced, target=edge).radius == pytest.approx(edge, rel=0.2)
    monkeypatch.setattr(readable._Climber, "rung", lambda self, radius, write: Rung(radius, 1.0, 0.0, 0.0))
    with pytest.raises(NoRadius, match="no edge is found"):
        edge_of_readability(sliced)


@pytest.mark.parametrize(
    ("edge", "found_at"),  # shares of the stream's norm: it is looked for far below, far above, and near the first one
    [(1e-4, 0.0125), (1e4, 0.4), (0.15, 0.168)],
)
def test_when_the_time_is_over_the_edge_is_looked_for_no_further(model, monkeypatch, edge, found_at):
    sliced, now = ml.slice_model(model, PROMPTS, 1, 3), [0.0]
    norm = float(sliced.resid.norm(dim=-1)[sliced.batch.own].median())

    def rung(self, radius, write):
        now[0] += 10.0
        return Rung(radius, float(radius < edge * norm), radius, 0.0)

    monkeypatch.setattr(readable, "coherence", lambda host, completions: torch.zeros(len(completions)))
    monkeypatch.setattr(readable._Climber, "rung", rung)
    monkeypatch.setattr(readable, "time", SimpleNamespace(monotonic=lambda: now[0]))
    found = edge_of_readability(sliced, seconds=25.0)
    assert now[0] == 30.0 and len(found.curve) == 3
    assert found.radius == pytest.approx(found_at * norm, rel=0.01)  # the outermost readable one; half of the least


def test_the_effect_is_that_of_learned_vectors_and_grows_beyond_random_ones(any_model):
    found = ml.calibrate_radius(any_model, PROMPTS, 1, 3, rule="effect")
    below = max(radius for radius, effect in found.curve if effect < 1.0)
    above = min(radius for radius, effect in found.curve if effect >= 1.0)
    assert below < found.radius < above <= 1.2 * below
    effects = torch.tensor(found.effects)
    assert (effects[:, 1] > effects[:, 2]).all()  # learned ones change more than random ones at every radius
    # the random effect by the public measures
    sliced = ml.slice_model(any_model, PROMPTS, 1, 3)
    radius = found.effects[0][0]
    climber = readable._Climber(sliced, 0)
    vectors = ml.SteeringVectors(radius * climber.control, 1)
    changes = ml.target_effects(any_model, PROMPTS, vectors, 3, target_positions=slice(None)).values.norm(dim=1)
    expected = changes.median() / sliced.target[sliced.batch.target_mask].norm()
    assert found.effects[0][2] == pytest.approx(float(expected), rel=1e-3)


def test_a_model_that_can_not_write_is_told_so(model, monkeypatch):
    monkeypatch.setattr(readable, "coherence", lambda host, completions: torch.full((len(completions),), -4.0))
    with pytest.raises(NoRadius, match=r'no readable text to lose: .* rule="effect"'):
        ml.calibrate_radius(model, PROMPTS, 1, 3, rule="readable")


def test_a_model_that_writes_nothing_is_told_so(model, monkeypatch):
    monkeypatch.setattr(readable, "coherence", lambda host, completions: torch.full((len(completions),), float("nan")))
    with pytest.raises(NoRadius, match="the unsteered model writes nothing, so there is no readable text"):
        edge_of_readability(ml.slice_model(model, PROMPTS, 1, 3))


def test_on_a_trained_model_text_is_natural_below_the_edge_and_noise_beyond():
    organism = ml.organisms.load("modes")
    prompt = organism.prompts["clean"][3]
    found = ml.calibrate_radius(organism.model, prompt, 0, 4, rule="readable", target_positions=slice(-1, None))
    shares = dict(found.curve)
    assert min(shares.values()) < 0.75 <= max(shares.values()) and 0.2 < found.relative < 1.0
    vectors = ml.SteeringVectors(torch.randn(20, organism.model.cfg.d_model), 0)
    for factor, natural in ((0.2, True), (8.0, False)):
        written = ml.generate(organism.model, prompt, vectors.rescaled(factor * found.radius), 10, progress=False)
        steered = ml.coherence(organism.model, written)[torch.tensor((written.table.kind == "steered").to_numpy())]
        assert (float((steered > readable.NATURAL).float().mean()) > 0.9) == natural
    assert repr(found).startswith("Calibration(radius") and "of the stream's norm: readable 0.75" in repr(found)


def test_a_slice_can_be_calibrated_as_it_can_be_fitted(model):
    expected = ml.calibrate_radius(model, PROMPTS, 1, 3, rule="effect", target_positions=slice(-1, None))
    found = ml.calibrate_radius(ml.slice_model(model, PROMPTS, 1, 3, slice(-1, None)), rule="effect")
    assert found.radius == pytest.approx(expected.radius) and found.layers == expected.layers == (1, 3)
    with pytest.raises(TypeError, match="prompts is missing"):
        ml.calibrate_radius(model)


def test_an_unknown_rule_and_a_senseless_target_are_refused(model):
    with pytest.raises(ValueError, match=r"target=-1 must be a positive, finite number"):
        ml.calibrate_radius(model, PROMPTS, 1, 3, rule="readable", target=-1)
