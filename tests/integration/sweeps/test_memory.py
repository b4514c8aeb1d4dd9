"""Does a trial come to its end where memory has room for a few rows only, with the result that it has elsewhere?

Memory runs out artificially: a pass over more rows than there is room for raises torch's error.
"""

import warnings
from functools import partial

import pytest
import torch

import melbo_lens as ml
from melbo_lens.measures.output import output_effects
from melbo_lens.models.bridge import BridgeHost
from melbo_lens.models.slices import SlicedModel
from melbo_lens.sweeps.running import perform
from tests.integration.search.test_methods import PLAN

PROMPTS = ["w1 w2 w3 w4", "w5 w6"]
CONTRASTIVE = ml.ContrastiveTrial(0, 4, 2.0, ("w1 w2", "w3", "w4"), ("w5", "w6", "w7"))


@pytest.fixture
def room(monkeypatch):
    """Limits the rows of a pass, over a slice's blocks and over the whole model; returns the sizes that were tried."""
    tried = {"slice": [], "model": []}

    def limit(slice_rows, model_rows):
        def limited(kind, most, real, self, *arguments):
            rows = len(arguments[-1] if kind == "slice" else arguments[0])
            tried[kind].append(rows)
            if rows > most:
                raise torch.OutOfMemoryError(f"CUDA out of memory: {rows} rows")
            return real(self, *arguments)

        for kind, most, cls, name in (
            ("slice", slice_rows, SlicedModel, "_target"),  # the last argument are the prompts of the rows
            ("model", model_rows, BridgeHost, "logits"),
            ("model", model_rows, BridgeHost, "cached_logits"),
        ):
            wrapped = partial(limited, kind, most, getattr(cls, name))
            monkeypatch.setattr(cls, name, lambda *a, wrapped=wrapped: wrapped(*a))
        return tried

    return limit


@pytest.mark.parametrize("trial", [*PLAN, CONTRASTIVE], ids=lambda trial: trial.method)
def test_a_trial_of_any_method_ends_with_what_it_gives_elsewhere(trial, model, room):
    sliced = ml.slice_model(model, PROMPTS, 0, 4, slice(-1, None))
    plain = perform(trial, sliced, PROMPTS, 3)
    rows = min(2, 2 * trial.n_vectors - 1)  # of each prompt one, or fewer
    tried = room(rows, 3)
    found = perform(trial, sliced, PROMPTS, 3)
    assert max(tried["slice"]) > rows and max(tried["model"]) > 3 and found.completions.table.shape[0] > 3
    for name, tensor in found.learned.parts()[0].items():
        torch.testing.assert_close(tensor, plain.learned.parts()[0][name], rtol=1e-3, atol=1e-4, equal_nan=True)
    assert found.completions.table.text.tolist() == plain.completions.table.text.tolist()
    assert found.judged.change.tolist() == plain.judged.change.tolist()


def test_a_fit_that_succeeded_is_not_repeated_where_memory_is_short_for_writing(model, room, monkeypatch):
    sliced = ml.slice_model(model, PROMPTS, 0, 4, slice(-1, None))
    fits, real = [], ml.Trial.fit
    monkeypatch.setattr(ml.Trial, "fit", lambda self, *a: fits.append(a) or real(self, *a))
    room(99, 2)
    assert len(perform(PLAN[0], sliced, PROMPTS, 3).completions) == 2 * (1 + 2 * (3 + 2)) and len(fits) == 1


def test_a_sweep_and_a_search_go_on_where_memory_is_short(model, room, tmp_path):
    jobs = ml.plan_jobs("somewhere", PLAN[:1], PROMPTS, together=True, max_new_tokens=3)
    (plain,) = ml.sweep(jobs, tmp_path / "plain", model=model, progress=False)
    room(3, 3)  # a slice that checks itself takes three rows
    (found,) = ml.sweep(jobs, tmp_path / "short", model=model, progress=False)
    assert found.failure is None
    assert found.completions.table.text.tolist() == plain.completions.table.text.tolist()
    search = ml.discover(model, PROMPTS, plan=PLAN[:1], max_new_tokens=3, progress=False)
    assert search.completions[0].table.text.tolist() == plain.completions.table.text.tolist()


def test_without_room_for_one_row_the_trial_fails_with_its_reason_and_the_next_is_run(model, tmp_path, room):
    jobs = ml.plan_jobs("somewhere", PLAN[:2], ["w1 w2"], max_new_tokens=3)
    room(99, 0)
    found = list(ml.sweep(jobs, tmp_path, model=model, progress=False))
    assert [one.failure.split(":")[0] for one in found] == ["OutOfMemoryError"] * 2


def test_generation_writes_the_same_with_less_room(model, room):
    vectors = ml.random_vectors(ml.SteeringVectors.from_tensor(torch.ones(5, 32), 1), 3)
    ask = {"temperature": 1.0, "n_samples": 2, "progress": False}
    plain = ml.generate(model, PROMPTS, vectors, 4, **ask)
    effects = output_effects(model, PROMPTS, vectors).table
    tried = room(99, 4)
    assert ml.generate(model, PROMPTS, vectors, 4, **ask).table.text.tolist() == plain.table.text.tolist()
    # halves of what was asked for, and then never more than there is room for
    sizes = [n for n in tried["model"] if n > 1]
    assert max(sizes) == len(plain) and [n for n in sizes if n > 4] == [84, 42, 21, 10, 5]
    torch.testing.assert_close(
        torch.tensor(output_effects(model, PROMPTS, vectors).table.kl), torch.tensor(effects.kl), rtol=1e-4, atol=1e-5
    )


def test_memory_that_runs_out_in_a_step_is_not_taken_for_a_broken_cache(model, monkeypatch):
    """The machine's own error is a RuntimeError, as those of models whose cache fails."""
    real, calls = BridgeHost.cached_logits, []

    def short(self, tokens, mask, cache):
        calls.append(len(tokens))
        if cache is not None and len(tokens) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(self, tokens, mask, cache)

    monkeypatch.setattr(BridgeHost, "cached_logits", short)
    vectors = ml.SteeringVectors.from_tensor(torch.ones(3, 32), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = ml.generate(model, "w1 w2", vectors, 3, include_random=False, progress=False)
    assert len(written) == 7 and 7 in calls and set(calls[-3:]) == {1}
