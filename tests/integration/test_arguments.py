"""Does every public call take the numbers of NumPy, pandas and torch for Python numbers, down to the file?"""

import inspect
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import melbo_lens as ml
from melbo_lens.arguments import _as_tensor, check_tensor, plain, plain_json, public
from melbo_lens.evaluation.rates import _check_level
from melbo_lens.generation.generate import stops_of
from melbo_lens.generation.steer import steer
from melbo_lens.prompts import pad
from tests.integration.generation.test_generate import PROMPTS

INTEGERS = [int, np.int64, np.int32, np.uint8, np.array, torch.tensor, lambda x: pd.Series([x])[0]]
NUMBERS = [float, np.float64, np.float32, np.array, torch.tensor, lambda x: pd.Series([x])[0]]
SEQUENCES = [list, tuple, np.array, torch.tensor, pd.Series, pd.Index]
integers, numbers, sequences = st.sampled_from(INTEGERS), st.sampled_from(NUMBERS), st.sampled_from(SEQUENCES)
some = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def is_json(value):
    """Whether a value is made of exactly JSON's types: a NumPy number that looks like one is none."""
    if isinstance(value, dict):
        return all(type(key) is str and is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(is_json, value))
    return value is None or type(value) in (bool, int, float, str)


@pytest.fixture(scope="module")
def model(build):
    return build("gpt2", "bridge")


@pytest.fixture(scope="module")
def fitted(model):
    return ml.fit_vectors(model, PROMPTS, 1, 3, n_vectors=2, radius=2.0, n_steps=2, progress=False)


@settings(some, max_examples=4)  # seconds each
@given(i=integers, x=numbers, many=sequences)
def test_fits(model, i, x, many):
    settings = {"n_steps": 2, "optimizer": "adamw", "lr": 0.001, "batch_size": 4, "seed": 3, "progress": False}
    plainly = ml.fit_vectors(
        model, PROMPTS, 1, 3, n_vectors=2, radius=2.0, p=2, q=1, target_positions=[-2, -1], **settings
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, path = Path(folder) / "c", Path(folder) / "v.safetensors"
        vectors = ml.fit_vectors(
            *(model, PROMPTS, i(1), i(3)),
            n_vectors=i(2),
            radius=x(2.0),
            p=i(2),
            q=i(1),
            target_positions=many([-2, -1]),
            n_steps=i(2),
            optimizer="adamw",
            lr=x(0.001),
            batch_size=i(4),
            seed=i(3),
            checkpoint=checkpoint,
            progress=False,
        )
        vectors.save(path)
        assert is_json(vectors.provenance) and ml.load(path).provenance == vectors.provenance and checkpoint.exists()
    torch.testing.assert_close(vectors.values, plainly.values, rtol=1e-4, atol=1e-6)
    adapters = ml.fit_adapters(
        *(model, PROMPTS, many([0, 1]), i(3)),
        n_adapters=i(2),
        rank=i(2),
        alpha=x(2.0),
        diversity=x(0.25),
        n_steps=i(2),
        seed=i(1),
        progress=False,
    )
    assert is_json(adapters.provenance) and is_json(ml.random_adapters(adapters, model, seed=i(2)).provenance)
    single = ml.fit_adapters(
        model, PROMPTS, i(1), i(3), n_adapters=i(1), rank=i(2), scale=x(0.5), n_steps=i(2), progress=False
    )
    assert single.source_layers == (1,) and type(single.source_layer) is int
    assert type(ml.calibrate_radius(model, PROMPTS, i(1), i(3), target=x(0.5), seed=i(0)).target) is float


@some
@given(i=integers, x=numbers, many=sequences)
def test_generation_and_evaluation(model, fitted, i, x, many):
    settings = {"signs": [1, -1], "scales": [0.5, 1.0], "temperature": 1.0, "n_samples": 2, "seed": 3}
    plainly = ml.generate(model, PROMPTS, fitted, 3, **settings, progress=False)
    written = ml.generate(
        *(model, PROMPTS, fitted, i(3)),
        signs=many([1, -1]),
        scales=many([0.5, 1.0]),
        temperature=x(1.0),
        n_samples=i(2),
        batch_size=i(7),
        seed=i(3),
        progress=False,
    )
    assert (
        written.table.equals(plainly.table) and is_json(written.settings) and written.to_lines() == plainly.to_lines()
    )
    assert len(written.filter(vector=i(1), sign=many([1]))) == len(plainly.filter(vector=1, sign=1)) > 0
    assert len(written[i(2)]) == 1 and len(written[np.array([0, 1])]) == 2
    assert ml.evaluate(written, {"w": "w"}, level=x(0.05)).table.equals(ml.evaluate(plainly, {"w": "w"}).table)


@some
@given(i=integers, x=numbers, many=sequences)
def test_measures_and_searches(model, fitted, i, x, many):
    scan = ml.scan_layers(model, PROMPTS, many([0, 1]), many([3]), x(2.0), i(2), i(2), seed=i(1), progress=False)
    row = scan.table.iloc[1]
    assert is_json(dict(scan.settings))
    ml.slice_model(model, PROMPTS, scan.table.source_layer[1], scan.table.target_layer[1])
    trial = ml.Trial(
        scan.table.source_layer[2], scan.table.target_layer[2], scan.table.radius[2], i(2), np.bool_(False), i(4), i(3)
    )
    assert all(type(value) in (int, float, bool, str) for value in vars(trial).values())
    found = ml.discover(model, PROMPTS[0], plan=[trial], max_new_tokens=i(2), seed=i(0), budget=x(5.0), progress=False)
    assert is_json(dict(found.settings)) and row.radius == 2.0
    assert ml.target_effects(model, PROMPTS, fitted, i(3), many([-1]), many([1, -1])).signs == (1, 1, -1, -1)
    assert len(ml.objective(model, PROMPTS, fitted, i(3), p=i(2), q=x(1.0))) == 2
    assert ml.activation_changes(model, PROMPTS[0], fitted, many([2, 3])).layers == (2, 3)
    assert len(ml.output_effects(model, PROMPTS, fitted, many([1]), many([4, 5])).table) == 6
    assert ml.next_tokens(model, PROMPTS[0], fitted, i(3)).top_log_probs.shape[-1] == 3
    assert (
        len(ml.top_tokens(model, fitted, i(3)).promoted[0]) == 3
        and len(ml.max_activating(model, fitted, PROMPTS, i(1))) == 2
    )
    assert len(ml.closest_directions(fitted, torch.eye(32), k=i(2))) == 4
    assert len(ml.rank(fitted, ml.output_effects(model, PROMPTS, fitted), many([0, 0]))) == 2
    assert len(ml.cluster_by_effect(ml.slice_model(model, PROMPTS, 1, 3), fitted, x(0.25))) == 2
    assert is_json(ml.random_vectors(fitted, i(3)).provenance)


@some
@given(i=integers, x=numbers)
def test_values(fitted, i, x):
    made = ml.SteeringVectors(
        torch.ones(1, 4), i(2), provenance={"seed": i(3), "many": [x(0.5)], "deep": {"a": (i(1),)}}
    )
    assert type(made.source_layer) is int and is_json(made.provenance) and made.provenance["deep"] == {"a": [1]}
    assert is_json((x(2.0) * fitted).provenance) and torch.equal((fitted * x(2.0)).values, 2 * fitted.values)
    assert torch.equal(fitted.rescaled(x(4.0)).values, fitted.rescaled(4.0).values) and torch.equal(
        fitted[i(1)].values, fitted[1].values
    )
    adapters = ml.SteeringAdapters.from_factors(torch.ones(2, 1, 4), torch.ones(2, 3, 1), i(1), x(0.5))
    assert (
        adapters.source_layers == (1,)
        and torch.equal((adapters * x(2.0)).scales, torch.ones(2))
        and is_json(adapters.provenance)
    )


@pytest.mark.parametrize("seed", [1.0, "1", None, True, np.float64(2.0)])
def test_a_seed_that_is_no_integer_is_refused(model, fitted, seed):
    for call in (
        lambda: ml.fit_vectors(model, PROMPTS, 1, 3, seed=seed),
        lambda: ml.fit_adapters(model, PROMPTS, 1, 3, seed=seed),
        lambda: ml.generate(model, PROMPTS, fitted, seed=seed),
        lambda: ml.scan_layers(model, PROMPTS, seed=seed),
        lambda: ml.random_vectors(fitted, seed),
        lambda: ml.calibrate_radius(model, PROMPTS, 1, 3, seed=seed),
        lambda: ml.discover(model, PROMPTS, seed=seed),
    ):
        with pytest.raises(ValueError, match=r"seed=.* must be an integer"):
            call()


def test_every_public_function_is_marked_as_a_public_call():
    unmarked = [
        name
        for name in ml.__all__
        if inspect.isfunction(getattr(ml, name)) and not hasattr(getattr(ml, name), "is_public")
    ]
    assert unmarked == ["concatenate", "on_transformers", "steer"]  # blocks, and what takes no number


def test_what_no_file_can_keep_is_refused_when_it_enters():
    with pytest.raises(TypeError, match=r"provenance\['when'\] holds .* which a file can't keep"):
        ml.SteeringVectors(torch.ones(1, 4), 0, provenance={"when": object()})


def test_a_batch_of_prompts_can_be_scanned(model, tmp_path):
    batch = pad([[1, 5, 6], [1, 7]], ["a", "b"])
    tables = [
        ml.scan_layers(model, batch, [0], [3], 2.0, 2, 2, directory=folder, progress=False).table
        for folder in (None, tmp_path, tmp_path)
    ]
    assert tables[0].equals(tables[1]) and tables[1].equals(tables[2])


def test_plain_leaves_what_has_axes():
    array = np.ones((2, 2))
    assert plain(array) is array and plain({"a": (np.int64(1), [np.float32(0.5)])}) == {"a": (1, [0.5])}
    assert (
        plain(slice(np.int64(-3), None)) == slice(-3, None)
        and json.dumps(plain_json({"a": np.arange(3), 4: {1}}, "x")) == '{"a": [0, 1, 2], "4": [1]}'
    )


def test_an_array_is_taken_where_a_tensor_is_asked_for(model):
    array = np.random.default_rng(0).standard_normal((2, model.cfg.d_model))
    settings = {"n_vectors": 2, "radius": 2.0, "n_steps": 2, "progress": False}
    fits = [ml.fit_vectors(model, PROMPTS, 1, 3, init=x, **settings).values for x in (array, torch.tensor(array))]
    assert torch.equal(*fits)
    wrapped = ml.SteeringVectors.from_tensor(array, 1).values
    assert torch.equal(wrapped, torch.tensor(array).float())
    adapters = ml.SteeringAdapters.from_factors(np.ones((1, 1, 3)), np.ones((1, 4, 1)), 1)
    assert adapters.A.shape == (1, 1, 3) and adapters.B.shape == (1, 4, 1)


@pytest.mark.parametrize(
    "array",
    [
        np.array([3.0, 2.0, 1.0])[::-1],
        np.array([1.0, 2.0, 3.0], dtype=">f8"),
        np.array([1, 2, 3]),
        np.array([1.0, 2.0, 3.0], dtype=np.longdouble),
    ],
    ids=["backwards", "big endian", "integers", "long"],
)
def test_an_array_may_lie_in_memory_as_it_likes(array):
    rows = ml.SteeringVectors(torch.ones(3, 4), 1)
    expected = torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 4)
    assert torch.equal((rows * array).values, expected) and torch.equal((rows / array).values, 1 / expected)
    matrix = np.stack([array, array])
    if matrix.dtype.kind == "f":
        assert torch.equal(ml.SteeringVectors.from_tensor(matrix, 1).values, expected[:, 0].expand(2, 3))
    assert np.array_equal(array, [1, 2, 3])


def test_an_array_of_texts_is_left_for_the_call_to_refuse():
    for array in (np.array(["w1 w2", "w3"]), np.array([{}, None], dtype=object)):
        assert _as_tensor(array) is array


@pytest.mark.parametrize(
    ("call", "error", "said"),
    {
        "a list": (
            lambda m: inspect.unwrap(check_tensor)("values", [[1.0]]),
            TypeError,
            "values must be a tensor, not l",
        ),
        "an array": (lambda m: inspect.unwrap(check_tensor)("b", np.ones(2)), TypeError, "b must be a tensor, not nd"),
        "what can't be joined": (lambda m: inspect.unwrap(ml.concatenate)([1, 2]), TypeError, "was given int"),
        "a budget in words": (
            lambda m: inspect.unwrap(ml.discover)(m, "w1", budget="5"),
            ValueError,
            "budget='5' must be a positive number of seconds",
        ),
        "no budget": (
            lambda m: ml.discover(m, "w1", budget=0.0),
            ValueError,
            "budget=0.0 must be a positive number of seconds",
        ),
        "a folder that isn't there": (lambda m: ml.merge("nowhere"), FileNotFoundError, "no folder 'nowhere' to merge"),
    }.values(),
)
def test_what_is_of_another_kind_is_refused_by_its_name(model, call, error, said):
    with pytest.raises(error, match=said):
        call(model)


def test_what_is_no_tensor_is_refused_without_the_types_that_tests_check(model):
    """In a process of its own, as a user's: this one checks every annotation, before the library can say a word."""
    program = """
import melbo_lens as ml
for make in (
    lambda: ml.SteeringVectors.from_tensor([[1.0, 2.0]], 1),
    lambda: ml.SteeringVectors([[1.0, 2.0]], 1),
    lambda: ml.SteeringAdapters.from_factors([[1.0]], [[1.0]], 1),
    lambda: ml.fit_vectors(None, "w1", 1, 3, init=[[1.0]]),
):
    try:
        make()
    except TypeError as error:
        print(error)
"""
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.split(",")[0] for line in said] == [
        f"{name} must be a tensor" for name in ("values", "values", "a", "init")
    ]


OF_ANOTHER_KIND = {
    "generate": lambda m, v, a: ml.generate(m, PROMPTS, v.values),
    "several": lambda m, v, a: ml.generate(m, PROMPTS, [v, v]),
    "output_effects": lambda m, v, a: ml.output_effects(m, PROMPTS, v.values),
    "target_effects": lambda m, v, a: ml.target_effects(m, PROMPTS, v.values),
    "activation_changes": lambda m, v, a: ml.activation_changes(m, PROMPTS[0], v.values),
    "next_tokens": lambda m, v, a: ml.next_tokens(m, PROMPTS[0], v.values),
    "top_tokens": lambda m, v, a: ml.top_tokens(m, a),
    "max_activating": lambda m, v, a: ml.max_activating(m, a, PROMPTS),
    "closest_directions": lambda m, v, a: ml.closest_directions(a, torch.eye(v.d_model)),
    "random_vectors": lambda m, v, a: ml.random_vectors(a),
    "source_effects": lambda m, v, a: ml.source_effects(v, m, PROMPTS),
    "nearest_vectors": lambda m, v, a: ml.nearest_vectors(v, m, PROMPTS),
    "random_adapters": lambda m, v, a: ml.random_adapters(v, m),
    "none": lambda m, v, a: ml.output_effects(m, PROMPTS, None),
    "steer": lambda m, v, a: next(inspect.unwrap(steer)(m, v.values)),
}
REMEDIES = {
    **dict.fromkeys(("top_tokens", "max_activating", "closest_directions", "random_vectors"), "ml.nearest_vectors"),
    **dict.fromkeys(("source_effects", "nearest_vectors", "random_adapters"), "must be SteeringAdapters, not Steering"),
    "several": "must be vectors or adapters, not list: ml.concatenate makes one value",
}


@pytest.mark.parametrize("name", OF_ANOTHER_KIND)
def test_what_is_no_perturbation_or_one_of_another_kind_is_refused_with_what_to_do(model, fitted, name):
    adapters = ml.SteeringAdapters.from_factors(torch.ones(1, 1, 128), torch.ones(1, fitted.d_model, 1), 1)
    with pytest.raises(TypeError, match=REMEDIES.get(name, r"must be vectors or adapters, not .*: .*from_tensor")):
        OF_ANOTHER_KIND[name](model, fitted, adapters)


REFUSED = {
    "a stop that is no text": (lambda m, v: inspect.unwrap(stops_of)([1]), r"stop=\[1\] must be a text"),
    "a flag in words": (lambda m, v: _plainly(ml.generate)(m, PROMPTS, v, include_unsteered="no"), "must be True or F"),
    "a chat in words": (lambda m, v: _plainly(ml.generate)(m, PROMPTS, v, chat="no"), "chat='no' must be True or"),
    "one and a half controls": (lambda m, v: _plainly(ml.generate)(m, PROMPTS, v, include_random=1.5), "how many"),
    "controls in words": (lambda m, v: _plainly(ml.generate)(m, PROMPTS, v, include_random="no"), "how many controls"),
    "another measurement": (lambda m, v: ml.rank(v[:1], ml.output_effects(m, PROMPTS, v)), "2 vectors were measured"),
    "a measurement of fewer": (
        lambda m, v: ml.rank(ml.concatenate([v, v]), ml.output_effects(m, PROMPTS, v)), "and 4 are to be ranked"
    ),
    "a slice that begins later": (
        lambda m, v: ml.cluster_by_effect(ml.slice_model(m, PROMPTS, 2, 4), v), r"layers \[1\], .* source_layer=1\."
    ),
    "a slice that ends before": (
        lambda m, v: ml.cluster_by_effect(ml.slice_model(m, PROMPTS, 0, 2), replace(v, source_layer=3)),
        r"layers \[3\], .* target_layer above 3\.",
    ),
    "a negative distance": (
        lambda m, v: ml.cluster_by_effect(ml.slice_model(m, PROMPTS, 1, 3), v, -1.0), "must be a cosine distance"
    ),
    "a target before the source": (lambda m, v: ml.target_effects(m, PROMPTS, v, 1), "target_layer=1 must lie above 1"),
    "an objective before the source": (lambda m, v: ml.objective(m, PROMPTS, v, 1), "target_layer=1 must lie above 1"),
    "half a layer": (
        lambda m, v: _plainly(ml.activation_changes)(m, PROMPTS[0], v, layers=[2.0]), r"layers=\[2\.0\] must hold"
    ),
    "one layer": (lambda m, v: _plainly(ml.activation_changes)(m, PROMPTS[0], v, layers=3), "layers=3 must hold"),
    "no neighbours": (lambda m, v: ml.closest_directions(v, torch.eye(v.d_model), k=0), "k=0 must be an integer"),
    "NaN directions": (
        lambda m, v: ml.closest_directions(v, torch.full((2, v.d_model), torch.nan)), "matrix holds NaN or infinity"
    ),
    "a level in words": (lambda m, v: inspect.unwrap(_check_level)("x"), "level='x' must be a finite number"),
    "an expression that is none": (
        lambda m, v: ml.Findings.measured(None, PROMPTS, v, ml.generate(m, PROMPTS, v, 1), {"a": "("}), "regular exp"
    ),
    "a page of one that is none": (
        lambda m, v: ml.report(v, ml.generate(m, PROMPTS, v, 1), {"a": "("}), "is no regular expression"
    ),
}  # fmt: skip


def _plainly(call):
    """The call without the check of types by which only these tests would refuse the value."""
    return public(inspect.unwrap(call))


@pytest.mark.parametrize("name", REFUSED)
def test_what_breaks_a_rule_is_refused_in_a_sentence(model, fitted, name):
    call, said = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=said):
        call(model, fitted)


def test_perturbations_are_joined_one_by_one(fitted):
    joined = ml.concatenate(factor * fitted for factor in (1, 2))
    torch.testing.assert_close(joined.values, torch.cat([fitted.values, 2 * fitted.values]))
