"""Can everything that a user gets be pickled, copied and given to torch.save, and is it the same afterwards?"""

import copy
import io
import pickle

import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.evaluation.rates import Evaluation
from tests.integration.generation.test_generate import PROMPTS


@pytest.fixture(scope="module")
def results(build):
    model = build("gpt2", "bridge")
    vectors = ml.fit_vectors(model, PROMPTS, 1, 3, n_vectors=2, radius=2.0, n_steps=2, progress=False)
    adapters = ml.fit_adapters(model, PROMPTS, 1, 3, n_adapters=2, rank=2, n_steps=2, radius=1.0, progress=False)
    chat = ml.generate(model, [{"role": "user", "content": "w1 w2"}], vectors, 3, progress=False)
    plan = [ml.Trial(1, 3, 2.0, 2, False, 0), ml.AdapterTrial(1, 3, 2.0, 2, 2, 0)]
    changes = ml.activation_changes(model, PROMPTS[0], vectors)
    return {
        "vectors": vectors,
        "adapters": adapters,
        "several layers": ml.fit_adapters(
            model, PROMPTS, [0, 1], 3, n_adapters=1, rank=2, n_steps=2, radius=1.0, progress=False
        ),
        "random adapters": ml.random_adapters(adapters, model),
        "completions of chats": chat,
        "evaluation": ml.evaluate(chat, {"w": "w"}),
        "calibration": ml.calibrate_radius(model, PROMPTS, 1, 3),
        "scan": ml.scan_layers(model, PROMPTS, [0], [3], n_vectors=2, n_steps=2, progress=False),
        "discovery": ml.discover(model, PROMPTS[0], plan=plan, max_new_tokens=2, progress=False),
        "effects": ml.output_effects(model, PROMPTS, vectors),
        "changes": changes,
        "target effects": ml.target_effects(model, PROMPTS, vectors),
        "adapter effect": ml.source_effects(adapters, model, PROMPTS),
        "next tokens": ml.next_tokens(model, PROMPTS[0], vectors),
        "view": ml.plots.colored_tokens(changes),
    }


NAMES = (
    "vectors,adapters,several layers,random adapters,completions of chats,evaluation,calibration,scan,discovery,"
    "effects,changes,target effects,adapter effect,next tokens,view"
).split(",")


def torch_saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def same(one, other):
    """Whether two values hold the same, all the way down."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(-7.0), other.nan_to_num(-7.0))
    if isinstance(one, pd.DataFrame):
        return one.equals(other)
    if isinstance(one, ml.SteeringVectors | ml.SteeringAdapters | ml.Completions | Evaluation) or hasattr(
        one, "__dataclass_fields__"
    ):
        fields = [name for name in one.__dataclass_fields__ if name not in ("continuation", "fitted_on")]
        return type(one) is type(other) and all(same(getattr(one, name), getattr(other, name)) for name in fields)
    if hasattr(one, "items"):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or one != one


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "way", [lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy, copy.copy, torch_saved]
)
def test_a_value_comes_back_as_it_was(results, name, way):
    assert set(NAMES) == set(results)
    again = way(results[name])
    assert same(results[name], again) and repr(again) == repr(results[name])


def test_adapters_that_came_back_act_as_before_and_stay_read_only(results, build):
    model, adapters = build("gpt2", "bridge"), results["adapters"]
    again = pickle.loads(pickle.dumps(adapters))
    with pytest.raises(TypeError):
        again.factors[7] = again.factors[1]
    tokens = torch.tensor([[1, 5, 6]])
    outputs = []
    for one in (adapters, again):
        with torch.no_grad(), ml.steer(model, one[0]):
            outputs.append(model(tokens))
    assert torch.equal(*outputs)
