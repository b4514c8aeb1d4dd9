"""Is the memory of a fit and of writing known before it is spent?"""

from dataclasses import replace

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import melbo_lens as ml
from melbo_lens.methods.planning import in_words
from melbo_lens.models import passes, slicing
from melbo_lens.models.tally import Tally

LONG = " ".join(f"w{1 + i % 9}" for i in range(50))
N = 51  # with the begin token


def measured(work):
    with Tally() as tally:
        work()
    return tally.peak


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
@pytest.mark.parametrize("keep", [2**30, 1], ids=["kept", "recomputed"])
def test_a_fit_holds_what_was_predicted(build, name, keep, monkeypatch):
    model = build(name)
    monkeypatch.setattr(slicing, "KEPT_BYTES", keep)
    monkeypatch.setattr("melbo_lens.methods.planning.KEPT_BYTES", keep)
    plan = ml.plan_memory(model, N, 1, 4, n_vectors=64, max_new_tokens=4, batch_size=40)
    assert plan.fit_rows == 40 and plan.recomputed == (keep == 1)
    sliced = ml.slice_model(model, LONG, 1, 4)
    found = measured(
        lambda: ml.fit_vectors(
            sliced, n_vectors=64, orthogonal=False, radius=1.0, batch_size=40, n_steps=2, progress=False
        )
    )
    assert plan.fit == pytest.approx(found, rel=0.25)


def test_writing_holds_what_was_predicted(any_model):
    plan = ml.plan_memory(any_model, N, 1, 4, n_vectors=30, max_new_tokens=8, written_at_once=50)
    vectors = ml.SteeringVectors.from_tensor(torch.randn(30, any_model.cfg.d_model), 1)
    found = measured(
        lambda: ml.generate(
            any_model, LONG, vectors, 8, batch_size=50, include_random=False, include_unsteered=False, progress=False
        )
    )
    assert plan.written_rows == 50
    # the blocks before the source are shared by all rows, which the plan doesn't count on
    assert 0.75 * plan.writing < found < 1.05 * plan.writing


@pytest.mark.parametrize("room", [2**21, 6 * 2**20])
def test_long_prompts_are_written_in_batches_that_hold_a_bounded_number_of_bytes(any_model, room, monkeypatch):
    vectors = ml.SteeringVectors.from_tensor(torch.randn(20, any_model.cfg.d_model), 1)
    settings = {"include_random": False, "include_unsteered": False, "progress": False}
    together = ml.generate(any_model, LONG, vectors, 4, **settings)
    monkeypatch.setattr(passes, "WRITTEN_TOKENS", 200)
    monkeypatch.setattr(passes, "WRITING_BYTES", room)
    apart = []
    found = measured(lambda: apart.append(ml.generate(any_model, LONG, vectors, 4, **settings)))
    plan = ml.plan_memory(any_model, N, 1, 4, n_vectors=20, max_new_tokens=4)
    assert 0.5 * room < found < 1.1 * room
    assert 1 < plan.written_rows < 40 and plan.writing <= room
    assert apart[0].table.text.tolist() == together.table.text.tolist()


def test_a_model_without_numbers_can_be_planned(directories):
    directory = directories("llama")
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    empty = TransformerBridge.boot_transformers(directory, hf_model=network, tokenizer=tokenizer)
    real = TransformerBridge.boot_transformers(directory, device="cpu", dtype=torch.float32)
    plans = [ml.plan_memory(model, N, 1, 4, max_new_tokens=8) for model in (empty, real)]
    # what an operation needs for itself for a moment may differ between devices
    assert plans[0].writing == pytest.approx(plans[1].writing, rel=0.1)
    assert replace(plans[0], writing=0) == replace(plans[1], writing=0)
    assert plans[1].weights == sum(x.nbytes for x in [*network.parameters(), *network.buffers()])


def test_half_of_the_weights_take_half_of_the_bytes(directories):
    directory = directories("llama")
    plans = [
        ml.plan_memory(
            TransformerBridge.boot_transformers(directory, device="cpu", dtype=dtype), N, 1, 4, max_new_tokens=8
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert plans[1].weights == pytest.approx(plans[0].weights / 2, rel=0.1)
    assert plans[1].cache_per_row == pytest.approx(plans[0].cache_per_row / 2, rel=0.1)


def test_the_plan_reads_well(model):
    plan = ml.plan_memory(model, N, 1, 4, max_new_tokens=8)
    assert plan.peak == plan.weights + max(plan.fit, plan.writing)
    assert "rows at once" in repr(plan) and "trim=True" in plan._repr_html_()
    assert plan.slice_weights < plan.weights
    assert [in_words(n) for n in (3, 2048, 3 * 2**20, 5 * 2**29)] == ["3 bytes", "2 KiB", "3 MiB", "2.5 GiB"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_tokens": 0}, "n_tokens"),
        ({"n_vectors": 0}, "n_vectors"),
        ({"target_layer": 2}, "target_layer=2"),
        ({"max_new_tokens": 10**6}, "more than the model's context"),
    ],
)
def test_what_makes_no_sense_is_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        ml.plan_memory(model, **{"n_tokens": N, "source_layer": 1, "target_layer": 4, "max_new_tokens": 8, **settings})


@pytest.mark.parametrize("chunk", [2 * 2**20, 8 * 2**20])
def test_as_many_rows_run_at_once_as_the_memory_of_a_chunk_allows(model, chunk, monkeypatch):
    monkeypatch.setattr("melbo_lens.methods.problem.CHUNK_BYTES", chunk)
    sliced = ml.slice_model(model, LONG, 1, 4)
    settings = {"orthogonal": False, "radius": 1.0, "n_steps": 1, "progress": False}
    found = measured(lambda: ml.fit_vectors(sliced, n_vectors=100, **settings))
    assert 0.7 * chunk < found < 1.7 * chunk
