"""Do all methods share one ascent, one problem and one conductor, so that a new one is a page?"""

import pytest
import torch

import melbo_lens as ml
from melbo_lens.ascent.constraints import Sphere
from melbo_lens.methods.fitting import Run, fit, measured, objective_at, settings_of
from melbo_lens.methods.problem import Problem
from melbo_lens.models import access, hooks
from melbo_lens.perturbations.rows import at_the_fit
from melbo_lens.randomness import gaussian_rows
from tests import models
from tests.builders import vector_problem

PROMPTS = ["w1 w2 w3 w4", "w5 w6 w7"]
VECTORS = {"n_vectors": 4, "radius": 2.0, "n_steps": 12, "orthogonal": False, "progress": False}
ADAPTERS = {"n_adapters": 3, "rank": 2, "radius": 1.0, "n_steps": 30, "optimizer": "power", "progress": False}


def fit_last_position(
    model, prompts, source_layer, target_layer, *, n_vectors=4, radius=2.0, checkpoint=None, progress=False
):
    """A method that the package doesn't have: vectors that act on each prompt's last position alone."""
    sliced = ml.slice_model(model, prompts, source_layer, target_layer, slice(-1, None))
    run, objective = (
        Run("power", checkpoint=checkpoint, progress=progress).resolved(sliced, {"power": 20}),
        objective_at(sliced),
    )

    def act(rows, chosen):
        here = sliced.batch.target_mask[chosen].to(rows[0].dtype).repeat(len(rows[0]), 1)
        return sliced.change(
            rows[0].repeat_interleave(len(chosen), 0)[:, None] * here[..., None], chosen.repeat(len(rows[0]))
        )

    with hooks.frozen(sliced.host):
        starts = gaussian_rows(n_vectors, sliced.d_model, "fit_last_position", 0)[None].to(sliced.device)
        problem = Problem(sliced, act, objective.value, run.batch_size)
        settings = settings_of("fit_last_position", sliced, objective, run) | {"radius": radius}
        found = fit(problem, (starts,), Sphere(starts.new_full((n_vectors,), radius)), run, settings, "last position")
    return ml.SteeringVectors(found.point[0], source_layer, found.history, found.provenance, objective=objective)


def test_a_method_of_thirty_lines_is_a_method_like_the_others(any_model, tmp_path):
    found = fit_last_position(any_model, PROMPTS, 1, 3, checkpoint=tmp_path / "state")
    assert found.provenance["status"].startswith(("settled", "stopped")) and found.provenance["prompts"] == PROMPTS
    torch.testing.assert_close(found.radii, torch.full((4,), 2.0))
    assert (found.history[-1] >= found.history[0]).all() and found.history[-1].sum() > 1.1 * found.history[0].sum()
    again = fit_last_position(
        any_model, PROMPTS, 1, 3, checkpoint=tmp_path / "state"
    )  # goes on from its checkpoint, which is the end
    assert torch.equal(again.values, found.values)
    by_hand = []  # the objective by whole runs of the model: the vector added at the last position only
    for row in found.values:
        total = 0.0
        for prompt in PROMPTS:
            tokens, change = any_model.to_tokens(prompt), []
            for scale in (0, 1):

                def add(activation, hook, scale=scale, row=row):
                    activation[:, -1] += scale * row
                    return activation

                seen = []
                with any_model.hooks(
                    [
                        ("blocks.1.hook_mlp_out", add),
                        ("blocks.2.hook_resid_post", lambda x, hook, seen=seen: seen.append(x.clone())),
                    ]
                ):
                    any_model(tokens)
                change.append(seen[0][0, -1].detach())
            total += float((change[1] - change[0]).square().sum())
        by_hand.append(total)
    torch.testing.assert_close(found.history[-1], torch.tensor(by_hand), rtol=1e-3, atol=1e-4)
    assert len(ml.load(_saved(found, tmp_path))) == 4


def _saved(found, folder):
    found.save(folder / "found.safetensors")
    return folder / "found.safetensors"


@pytest.mark.parametrize("kind", ["vectors", "adapters"])
def test_restarts_find_no_less_and_are_the_single_start_first(model, kind):
    fit_kind, settings = (ml.fit_vectors, VECTORS) if kind == "vectors" else (ml.fit_adapters, ADAPTERS)
    one, three = (fit_kind(model, PROMPTS, 1, 3, restarts=n, **settings) for n in (1, 3))
    ends = [found.history[-1] for found in (one, three)]
    assert one.provenance["restarts"] == 1 and three.provenance["restarts"] == 3
    # settling waits for every restart, so the first one may end a little later than alone; it never ends lower
    assert (ends[1] >= ends[0] * (1 - 1e-3)).all() and ends[1].sum() > ends[0].sum()
    with pytest.raises(ValueError, match='restarts=3 needs optimizer="power"'):
        fit_kind(model, PROMPTS, 1, 3, restarts=3, **{**settings, "optimizer": "adamw"})


@pytest.mark.parametrize("optimizer", ["power", "adamw"])
@pytest.mark.parametrize("kind", ["vectors", "adapters"])
def test_a_fit_can_begin_where_another_ended(model, kind, optimizer):
    fit_kind, settings = (ml.fit_vectors, VECTORS) if kind == "vectors" else (ml.fit_adapters, ADAPTERS)
    settings = {**settings, "optimizer": optimizer}
    found = fit_kind(model, PROMPTS, 1, 3, **settings)
    further = fit_kind(model, PROMPTS, 1, 3, init=found, **settings)
    torch.testing.assert_close(further.history[0], found.history[-1], rtol=1e-4, atol=0)
    assert found.provenance["init"] is None and len(further.provenance["init"]) == 16
    with pytest.raises(ValueError, match="init "):
        fit_kind(model, PROMPTS, 1, 3, init=found[:2], **settings)


@pytest.mark.parametrize("optimizer", ["power", "adamw"])
def test_diversity_turns_what_vectors_change_apart(model, optimizer):
    lr = {"lr": 0.05} if optimizer == "adamw" else {}

    def alike(diversity):
        settings = {**VECTORS, "optimizer": optimizer, **lr}
        vectors = ml.fit_vectors(model, PROMPTS, 1, 3, diversity=diversity, **settings)
        cosines = ml.target_effects(model, PROMPTS, vectors, target_positions=slice(None)).cosine_similarity()
        return vectors, float(cosines.abs().fill_diagonal_(0).sum() / 12)

    (free, before), (apart, after) = alike(0.0), alike(3.0)
    assert after < before - 0.02
    torch.testing.assert_close(apart.values[0], free.values[0], rtol=1e-3, atol=1e-3)  # the first is never bent
    # the history is the objective, without the penalty
    torch.testing.assert_close(ml.objective(model, PROMPTS, apart), apart.history[-1], rtol=1e-3, atol=0)
    assert apart.objective.diversity == 3.0


def test_a_slice_serves_many_fits(any_model, monkeypatch):
    sliced = ml.slice_model(any_model, PROMPTS, 1, 3, slice(-2, None), site="resid_post")
    apart = ml.fit_vectors(any_model, PROMPTS, 1, 3, target_positions=slice(-2, None), site="resid_post", **VECTORS)
    adapters_apart = ml.fit_adapters(any_model, PROMPTS, 1, 3, target_positions=slice(-2, None), **ADAPTERS)
    monkeypatch.setattr("melbo_lens.models.slicing.slice_model", None)  # it is not called again
    vectors, adapters = ml.fit_vectors(sliced, **VECTORS), ml.fit_adapters(sliced, **ADAPTERS)
    torch.testing.assert_close(vectors.values, apart.values)
    torch.testing.assert_close(adapters.A, adapters_apart.A)
    same = ("site", "target_positions", "source_layer", "prompt_tokens")
    assert {key: vectors.provenance[key] for key in same} == {key: apart.provenance[key] for key in same}
    assert vectors.objective == apart.objective and vectors.site == "resid_post"
    with pytest.raises(
        TypeError, match="a slice was given, which says prompts and target_layer itself: leave them out"
    ):
        ml.fit_vectors(sliced, PROMPTS, target_layer=3)
    with pytest.raises(ValueError, match="source_layer=2 must begin at layer 1"):
        ml.fit_adapters(sliced, source_layer=2, **ADAPTERS)
    with pytest.raises(TypeError, match="source_layer is missing"):
        ml.fit_vectors(any_model, PROMPTS)
    with pytest.raises(TypeError, match="prompts is missing"):
        ml.fit_adapters(any_model, source_layer=1, rank=2)


@pytest.mark.parametrize("diversity", [0.0, 0.7])
def test_rows_that_stand_still_cost_nothing_but_their_penalty(model, diversity):
    """In the orthogonal ascents the rows found are no longer evaluated, and still keep the later ones apart."""
    sliced = ml.slice_model(model, PROMPTS, 1, 3)
    problem = vector_problem(sliced, diversity=diversity)
    point = (gaussian_rows(6, models.D_MODEL, "point").view(2, 3, -1),)
    whole, rest = problem(point), problem(point, 1)
    for name in ("value", "score"):
        torch.testing.assert_close(getattr(rest, name), getattr(whole, name)[:, 1:])
    torch.testing.assert_close(rest.gradient[0], whole.gradient[0][:, 1:])
    assert (whole.score[:, 0] == whole.value[:, 0]).all() and bool((whole.score[:, 1:] < whole.value[:, 1:]).all()) == (
        diversity > 0
    )


CALLS = {
    "fit_vectors": lambda model, given: ml.fit_vectors(model, PROMPTS, 1, 3, **VECTORS),
    "fit_adapters": lambda model, given: ml.fit_adapters(model, PROMPTS, 1, 3, **{**ADAPTERS, "radius": "auto"}),
    "generate": lambda model, given: ml.generate(model, PROMPTS, given, max_new_tokens=2, progress=False),
    "random_adapters": lambda model, given: ml.random_adapters(given, model),
    "calibrate_radius": lambda model, given: ml.calibrate_radius(model, PROMPTS, 1, 3),
    "scan_layers": lambda model, given: ml.scan_layers(
        model, PROMPTS, [0, 1], [3], radius=1.0, n_steps=1, progress=False
    ),
    "discover": lambda model, given: ml.discover(
        model, PROMPTS, max_new_tokens=2, plan=[ml.Trial(1, 3, 1.0, 2, False, 0)], progress=False
    ),
    "target_effects": lambda model, given: ml.target_effects(model, PROMPTS, given),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_public_call_opens_the_model_once(model, name, monkeypatch):
    given = ml.fit_adapters(model, PROMPTS, 1, 3, **ADAPTERS)
    opened, check = [], access._check
    monkeypatch.setattr(access, "_check", lambda found: opened.append(found) or check(found))
    CALLS[name](model, given)
    assert opened == [model]


FITS = {
    "vectors": lambda model, **settings: ml.fit_vectors(model, PROMPTS, 1, 3, **VECTORS, **settings),
    "adapters": lambda model, **settings: ml.fit_adapters(model, PROMPTS, [1, 2], 4, **ADAPTERS, **settings),
    "cpe": lambda model, **settings: ml.fit_cpe(
        model, PROMPTS, [1, 2], 4, n_factors=3, n_steps=3, scale=3.0, progress=False, **settings
    ),
    "dct": lambda model, **settings: ml.fit_dct(
        model, PROMPTS, 1, 3, radius=2.0, n_factors=3, n_steps=3, progress=False, **settings
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_a_fit_knows_what_each_row_and_minus_each_row_does(any_model, name):
    found = FITS[name](any_model, target_positions=slice(-2, None))
    expected, target = {}, found.provenance["target_hook"]
    for sign, one in ((sign, one) for one in found for sign in (1, -1)):
        changes, cleans = [], []
        for prompt in PROMPTS:  # by whole runs of the model
            tokens, seen = any_model.to_tokens(prompt), []
            for hooked in ([], (sign * one).hooks()):
                read = (target, lambda activation, hook, seen=seen: seen.append(activation[0, -2:].detach()))
                with torch.no_grad():
                    any_model.run_with_hooks(tokens, fwd_hooks=[*hooked, read])
            changes.append(seen[1] - seen[0])
            cleans.append(seen[0])
        expected.setdefault(sign, []).append(float(torch.cat(changes).norm() / torch.cat(cleans).norm()))
    for sign in (1, -1):
        effects, sunk = at_the_fit(found.provenance, len(found), sign)
        assert effects == pytest.approx(expected[sign], rel=2e-3) and not any(sunk)
        assert at_the_fit((-found).provenance, len(found), -sign) == (effects, sunk)  # minus minus a row is the row
        some = ml.concatenate([-found[:1], found[1:]])
        assert at_the_fit(some.provenance, len(found), sign)[0] == pytest.approx(
            [expected[-sign][0], *expected[sign][1:]], rel=2e-3
        )
    assert expected[1] != pytest.approx(expected[-1], rel=1e-2)  # or else the wrong sign would pass


def test_a_sink_of_minus_a_row_is_said_of_minus_the_row(model, monkeypatch):
    sliced = ml.slice_model(model, PROMPTS, 1, 3)
    rows = torch.eye(sliced.d_model)[:3]
    problem = vector_problem(sliced)
    monkeypatch.setattr(
        Problem, "effects", lambda self, point: (point[0].sum(1), (point[0] < 0).any(1) & (point[0][:, 1] != 0))
    )
    found = measured(problem, (rows,), 1.0, "as given")
    assert found["status"] == "as given" and found["sinks"] == [] and found["minus"]["sinks"] == [1]
    value = ml.SteeringVectors(rows, 1, provenance=found)
    assert at_the_fit(value[[1, 0]].provenance, 2, -1) == ([-1.0, -1.0], [True, False])
    table = ml.rank(value, ml.output_effects(model, PROMPTS, value))
    assert [(row.vector, row.sign) for row in table.itertuples() if row.sink] == [(1, -1)] and table.sink.iloc[-1]
    assert table.effect.tolist() == [float(row.sign) for row in table.itertuples()]


def test_a_control_is_measured_as_what_it_controls(model):
    vectors = ml.fit_vectors(model, PROMPTS, 1, 3, p=4, q=2, target_positions=[-1], **VECTORS)
    control = ml.random_vectors(vectors)
    assert control.objective == vectors.objective == ml.random_vectors(control).objective
    torch.testing.assert_close(ml.objective(model, PROMPTS, vectors), vectors.history[-1], rtol=1e-3, atol=0)
    said = ml.objective(model, PROMPTS, control, target_layer=3, target_positions=[-1], p=4, q=2)
    torch.testing.assert_close(ml.objective(model, PROMPTS, control), said)
    assert not torch.allclose(said, ml.objective(model, PROMPTS, control, p=2))
    adapters = ml.fit_adapters(model, PROMPTS, 1, 3, p=3, q=3, **ADAPTERS)
    torch.testing.assert_close(ml.objective(model, PROMPTS, adapters), adapters.history[-1], rtol=1e-3, atol=0)
    assert ml.random_adapters(adapters, model).objective == adapters.objective
    assert (vectors[:1] + vectors[1:2]).objective == vectors.objective
    other = ml.fit_vectors(model, PROMPTS, 1, 4, **VECTORS)
    assert (vectors + other).objective is None and models.N_LAYERS == 4
