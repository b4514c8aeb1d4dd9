"""Does what surrounds a call (default dtype and device, autocast, inference mode) leave its results alone?"""

import ast
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

import melbo_lens as ml
from tests import models
from tests.integration.generation.test_generate import PROMPTS

PACKAGE = Path(ml.__file__).parent
FACTORIES = set("arange empty eye full linspace ones rand randint randn randperm tensor zeros".split())


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    """ "meta" computes nothing, so a tensor that is made on the default device shows at once; no GPU is needed."""
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def everything(model):
    """Results of calls that draw, allocate and compute."""
    settings = {"n_vectors": 3, "n_steps": 3, "progress": False}
    fitted = {
        optimizer: ml.fit_vectors(model, PROMPTS, 1, 3, optimizer=optimizer, **settings)
        for optimizer in ("power", "adamw")
    }
    adapters = ml.fit_adapters(model, PROMPTS, 1, 3, n_adapters=2, rank=2, n_steps=2, diversity=0.2, progress=False)
    written = ml.generate(model, PROMPTS, fitted["power"], 4, temperature=1.0, n_samples=2, progress=False)
    scan = ml.scan_layers(model, PROMPTS, [0, 1], [3], n_vectors=2, n_steps=2, progress=False)
    return {
        "power": fitted["power"].values,
        "adamw": fitted["adamw"].values,
        "A": adapters.A,
        "B": adapters.B,
        "random": ml.random_vectors(fitted["power"]).values,
        "random adapters": ml.random_adapters(adapters, model).scales,
        "tokens": torch.tensor([sum(tokens) for tokens in written.table.tokens], dtype=torch.float32, device="cpu"),
        "coherence": ml.coherence(model, written).nan_to_num(),
        "scan": torch.tensor(scan.table.to_numpy(dtype=float), dtype=torch.float32, device="cpu"),
        "effects": torch.tensor(
            ml.output_effects(model, PROMPTS, fitted["power"]).table.kl.tolist(), dtype=torch.float32, device="cpu"
        ),
        "target": ml.target_effects(model, PROMPTS, fitted["power"]).values,
        "changes": ml.activation_changes(model, PROMPTS[0], adapters).change,
        "nearest": ml.nearest_vectors(adapters, model, PROMPTS).values,
        "cosine": fitted["power"].cosine_similarity(),
        "closest": torch.tensor(
            ml.closest_directions(fitted["power"], model.W_U.T).cosine.tolist(), dtype=torch.float32, device="cpu"
        ),
        "activating": torch.tensor(
            ml.max_activating(model, fitted["power"], PROMPTS).cosine.tolist(), dtype=torch.float32, device="cpu"
        ),
        "clusters": torch.tensor(ml.cluster_by_words(written).cluster.tolist(), dtype=torch.float32, device="cpu"),
    }


@pytest.fixture(scope="module")
def usual(build):
    made = {}

    def results(kind):
        if kind not in made:
            made[kind] = everything(build("gpt2", kind))
        return made[kind]

    return results


SURROUNDINGS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_results_are_those_without(build, usual, kind, name):
    model, expected = build("gpt2", kind), usual(kind)
    with SURROUNDINGS[name]():
        found = everything(model)
    for key, values in expected.items():
        assert found[key].dtype == torch.float32 and found[key].shape == values.shape, key
        torch.testing.assert_close(
            found[key].clone(), values, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_nothing_is_made_on_the_default_device(model):
    prompts = model.to_tokens(
        PROMPTS[0]
    )  # as ids: TransformerLens itself puts the tokens of a text on the default device first
    with default_device("meta"):
        fitted = ml.fit_vectors(model, prompts, 1, 3, n_vectors=2, n_steps=2, progress=False)
        ml.fit_vectors(model, prompts, 1, 3, n_vectors=2, n_steps=2, optimizer="adamw", progress=False)
        ml.fit_adapters(model, prompts, 1, 3, n_adapters=2, rank=2, n_steps=2, progress=False)
        written = ml.generate(model, prompts, fitted, 4, temperature=1.0, progress=False)
        assert fitted.values.device.type == "cpu" and len(ml.coherence(model, written)) == len(written)
        ml.scan_layers(model, prompts, [0], [3], n_vectors=2, n_steps=2, progress=False)


def made_by_default(path):
    """Calls of torch's factories that don't name dtype and device."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
            named = {keyword.arg for keyword in node.keywords}
            wanted = {"device"} if node.func.attr == "arange" else {"dtype", "device"}  # integers have one dtype
            if ast.unparse(node.func.value) == "torch" and not wanted <= named:
                yield f"{path.name}:{node.lineno} {ast.unparse(node)}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_tensor_is_made_with_a_dtype_and_a_device(path):
    assert list(made_by_default(path)) == []


def test_a_model_made_in_inference_mode_is_refused_or_works_and_is_left_as_it_was(directories):
    """TransformerLens 3 then makes inference tensors, which no derivative passes; version 4 makes ordinary ones."""
    with torch.inference_mode():
        model = models.bridge(directories("llama"))
    before = [parameter.requires_grad for parameter in model.parameters()]
    frozen_for_ever = any(parameter.is_inference() for parameter in model.parameters())
    calls = (
        lambda: ml.fit_vectors(model, "w1 w2", 1, 3, n_vectors=1, n_steps=2, progress=False),
        lambda: ml.generate(model, "w1 w2", None, 2, progress=False),
    )
    for call in calls:
        with (
            pytest.raises(ValueError, match=r"loaded inside torch\.inference_mode")
            if frozen_for_ever
            else nullcontext()
        ):
            call()
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_autocast_is_as_it_was_afterwards(model):
    with torch.autocast("cpu", dtype=torch.bfloat16), nullcontext():
        ml.generate(model, "w1", None, 2, progress=False)
        assert torch.is_autocast_enabled("cpu")
