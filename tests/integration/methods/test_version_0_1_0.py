"""Do files and checkpoints of version 0.1.0 still load, and do the same seeds still give the same vectors?

tests/data/version-0.1.0 was written by that version, on the tiny GPT-2 of the tests.
"""

import shutil
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens import files
from melbo_lens.ascent.constraints import INERTIA, Sphere
from melbo_lens.ascent.fixed_point import Climb, fixed_point
from melbo_lens.methods import checkpoints, version_0_1_0
from tests import models
from tests.builders import as_evaluate

KEPT = Path(__file__).parents[2] / "data" / "version-0.1.0"
PROMPTS = ["w1 w2 w3", "w4 w5 w6 w7"]
VECTORS = {"n_vectors": 3, "radius": 2.0, "n_steps": 8, "seed": 5}
ADAPTERS = {"n_adapters": 2, "rank": 2, "radius": 1.0, "n_steps": 6, "seed": 5}
FITS = {
    "vectors": (ml.fit_vectors, VECTORS, "power"),
    "vectors-adamw": (ml.fit_vectors, {**VECTORS, "n_steps": 3, "optimizer": "adamw", "lr": 0.05}, "adamw"),
    "adapters": (ml.fit_adapters, ADAPTERS, "adapters-adamw"),
    "adapters-power": (ml.fit_adapters, {**ADAPTERS, "optimizer": "power"}, "adapters-power"),
}


@pytest.fixture(scope="module")
def model(directories):
    made = models.bridge(directories("gpt2"))
    made.cfg.model_name = "tiny-gpt2"  # as it was called then
    return made


def tensors(found):
    return [found.values] if isinstance(found, ml.SteeringVectors) else [found.A, found.B, found.scales]


@pytest.mark.parametrize("name", FITS)
def test_a_file_loads_and_the_same_call_gives_the_same_numbers(model, name):
    fit, settings, _ = FITS[name]
    old, new = ml.load(KEPT / f"{name}.safetensors"), fit(model, PROMPTS, 1, 3, progress=False, **settings)
    for before, after in zip([*tensors(old), old.history], [*tensors(new), new.history], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)  # what another number of threads changes
    assert {key: old.provenance[key] for key in ("seed", "prompts", "target_layer")} == {
        "seed": 5,
        "prompts": PROMPTS,
        "target_layer": 3,
    }
    assert old.site in ("mlp_out", "mlp") and len(old[1]) == 1
    with ml.steer(model, old[0]), torch.no_grad():
        model(torch.tensor([[1, 5, 6]]))


@pytest.mark.parametrize("name", FITS)
def test_an_interrupted_fit_goes_on(model, tmp_path, name):
    fit, settings, checkpoint = FITS[name]
    path = tmp_path / checkpoint
    shutil.copy(KEPT / f"{checkpoint}.checkpoint", path)
    _, saved = files.read(path, checkpoints.KIND)
    whole = fit(model, PROMPTS, 1, 3, batch_size=64, progress=False, **settings)
    assert saved["versions"]["melbo_lens"] == "0.1.0" != whole.provenance["versions"]["melbo_lens"]
    if {**saved["versions"], "melbo_lens": version("melbo_lens")} != whole.provenance["versions"]:
        with pytest.raises(ValueError, match=r"belongs to another fit .*versions"):
            fit(model, PROMPTS, 1, 3, batch_size=64, checkpoint=path, progress=False, **settings)
        return
    resumed = fit(model, PROMPTS, 1, 3, batch_size=64, checkpoint=path, progress=False, **settings)
    for before, after in zip([*tensors(whole), whole.history], [*tensors(resumed), resumed.history], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)  # what another number of threads changes


def test_a_state_from_before_rows_were_slowed_goes_on():
    starts = torch.eye(3)[None]
    *_, climb = fixed_point(as_evaluate(lambda rows: (rows[:, 0], rows)), (starts,), Sphere(torch.ones(3)), 2)
    kept = {name: tensor for name, tensor in climb.tensors().items() if name != "inertia"}
    again = Climb.of(version_0_1_0.translated(kept, {}))
    assert torch.equal(again.inertia, torch.full((1, 3), INERTIA)) and torch.equal(again.moving[0], climb.moving[0])


def test_what_a_checkpoint_of_before_does_not_say_is_taken_from_now():
    now = {"method": "fit_vectors", "stream_norm": 2.0, "fingerprint": "abc", "seed": 0}
    assert version_0_1_0.unsaid({"method": "fit_vectors", "seed": 0}, now) == {
        "site": "mlp_out",
        "diversity": 0.0,
        "stream_norm": 2.0,
        "fingerprint": "abc",
    }


def test_completions_and_a_runs_folder_are_read(tmp_path):
    written = ml.Completions.load(KEPT / "completions.parquet")
    shutil.copytree(KEPT / "run", tmp_path / "run")
    page = ml.report_directory(tmp_path / "run")
    assert written.prompt_tokens is None and written.table.text[0] in page.read_text()
    assert pd.read_csv(KEPT / "run" / "completions.csv").shape[0] == len(written)
