"""How do the notebooks get their outputs?  `python -m demos.build [NAME ...]` runs them and writes them back.

It adds a still picture beside each view. The notebooks in demos/ run on the bundled organisms. Those in demos/public/
are for public checkpoints, which MELBO_MODEL names; without one they run on a tiny model of the same architecture with
random weights, and say so.
"""

import argparse
import base64
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests import browser, qwen

DEMOS = Path(__file__).parent
MOST_BYTES = 2_000_000
# plotly leaves its figure as data and a picture, never its library; bars and warnings are no results
SETTINGS = {
    "PLOTLY_RENDERER": "plotly_mimetype+png",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def notebooks() -> list[Path]:
    """All of them, in order."""
    return [*sorted(DEMOS.glob("*.ipynb")), *sorted((DEMOS / "public").glob("*.ipynb"))]


def run(path: Path, scratch: Path, seconds: int = 240) -> tuple[nbformat.NotebookNode, float]:
    """The notebook with the outputs of a run, which takes place in a scratch folder, and how long it took.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    settings = SETTINGS | {"PYTHONPATH": os.pathsep.join([str(DEMOS.parent), os.environ.get("PYTHONPATH", "")])}
    if path.parent.name == "public" and "MELBO_MODEL" not in os.environ:
        settings |= {"MELBO_MODEL": qwen.save(scratch / "tiny-random-qwen2").name, "MELBO_QUICK": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    began = time.monotonic()
    try:
        NotebookClient(
            notebook,
            timeout=seconds,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": str(scratch)}},
        ).execute()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    took = time.monotonic() - began
    for cell in notebook.cells:
        cell.pop("id", None)
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "version": python},
    }
    return notebook, took


def add_stills(notebook: nbformat.NotebookNode) -> None:
    """Puts a picture after each token view, which GitHub does not draw."""
    shown = [
        (cell, output)
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "CircuitsVis" in _html(output)
    ]
    if not shown:
        return
    with browser.browse() as page, tempfile.TemporaryDirectory() as folder:
        page.resize(900, 100)  # a picture is at least as high as the window
        for cell, output in shown:
            (Path(folder) / "view.html").write_text(
                f"<!doctype html><meta charset='utf-8'><body>{_html(output)}</body>", encoding="utf-8"
            )
            page.open(Path(folder) / "view.html").wait("document.querySelectorAll('.tokens span').length > 0")
            picture = base64.b64encode(page.screenshot(Path(folder) / "view.png", whole=True).read_bytes()).decode()
            still = nbformat.v4.new_output(
                "display_data", {"image/png": picture, "text/plain": "a still of the view above"}
            )
            cell.outputs.insert(cell.outputs.index(output) + 1, still)


def _html(output: nbformat.NotebookNode) -> str:
    return output.get("data", {}).get("text/html", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; default: all")
    names = parser.parse_args().names
    for path in notebooks():
        if names and not any(re.search(name, str(path.relative_to(DEMOS))) for name in names):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            notebook, took = run(path, Path(scratch))
        add_stills(notebook)
        text = nbformat.writes(notebook)
        if len(text.encode()) >= MOST_BYTES:
            raise SystemExit(
                f"{path.name} has {len(text.encode()):,} bytes, at most {MOST_BYTES:,} are allowed: "
                "show fewer or smaller figures."
            )
        path.write_text(text + "\n", encoding="utf-8")
        print(f"{path.relative_to(DEMOS)}: {took:.0f} s, {len(text.encode()) / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
