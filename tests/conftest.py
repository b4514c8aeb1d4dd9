"""What do the tests share?  Tiny models, built once, offline."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from melbo_lens.models.access import has_hooked
from tests import models

KINDS = ["bridge", "compatible", "hooked"]


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """Name of an architecture -> a local Hugging Face directory, made on first use."""
    made = {}

    def directory(name: str) -> str:
        if name not in made:
            made[name] = models.save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return directory


@pytest.fixture(scope="session")
def build(directories):
    """(architecture, kind) -> model; "hooked" is HookedTransformer's own GPT-2-like architecture."""
    made = {}

    def model(name: str = "gpt2", kind: str = "bridge"):
        if kind == "hooked" and not has_hooked():
            pytest.skip("TransformerLens 4 has no HookedTransformer")
        if (name, kind) not in made:
            directory = directories(name)
            made[name, kind] = (
                models.hooked(directory) if kind == "hooked" else models.bridge(directory, kind == "compatible")
            )
        return made[name, kind]

    return model


@pytest.fixture(params=KINDS)
def any_model(request, build):
    """A GPT-2 as each class of model that TransformerLens has."""
    return build("gpt2", request.param)


@pytest.fixture
def model(build):
    """A model for tests where the class does not matter."""
    return build("gpt2", "bridge")
