"""Does what the README says still hold?"""

import os
import re
import subprocess
import sys

import pytest

import melbo_lens as ml
from tests import readme

TEXT = readme.README.read_text()


def test_the_block_runs_and_shows_what_the_readme_shows():
    ((code, shown),) = readme.BLOCK.findall(TEXT)
    printed = readme.run(code)
    behaviors = ml.organisms.load("modes").behaviors

    def kinds(output):  # exact counts depend on the machine's arithmetic
        return {name for name, behavior in behaviors.items() if any(map(behavior, output.splitlines()))}

    assert len(kinds(shown)) >= 2 and kinds(printed) & kinds(shown)


def test_every_other_block_at_least_compiles_and_names_what_exists():
    blocks = re.findall(r"```python no-run\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
        for name in re.findall(r"\bml\.(\w+)", block):
            assert hasattr(ml, name)


def test_the_numbers_are_those_of_the_last_benchmark():
    assert readme.benchmark() in TEXT


def test_the_table_of_the_post_s_results_is_that_of_the_last_run():
    assert readme.reproduction() in TEXT and readme.reproduction(readme.REPRODUCTION_REAL) in TEXT


def test_the_table_of_architectures_is_that_of_the_tests():
    assert readme.architectures() in TEXT


def test_the_comparison_of_methods_is_that_of_the_last_run():
    assert readme.discovery() in TEXT


@pytest.mark.parametrize("target", ["demo", "test", "bench", "newest"])
def test_make_has_the_commands(target):
    assert re.search(rf"^{target}:", (readme.ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_file_that_is_named_exists():
    for name in re.findall(r"\]\(((?!http)[^)]+)\)", TEXT):
        assert (readme.ROOT / name).exists(), name
    for name in re.findall(
        r"^\| (.*?) \| .*\|$", TEXT[TEXT.index("## The map") : TEXT.index("## How it relates")], re.MULTILINE
    ):
        for file in re.findall(r"`([\w/]+\.py)`", name):
            assert (readme.ROOT / "melbo_lens" / file).exists(), file


@pytest.mark.timeout(300)
def test_the_blocks_of_the_how_to_on_sweeps_run_as_they_stand(tmp_path):
    """One after another, in one folder, as a person would paste them."""
    text = (readme.ROOT / "docs" / "sweeps.md").read_text()
    blocks = re.findall(r"```(\w+)(?: (no-run))?\n(.*?)```", text, re.DOTALL)
    assert [language for language, _, _ in blocks].count("bash") >= 6
    command = f'melbo-lens() {{ "{sys.executable}" -m melbo_lens "$@"; }}\nset -e\n'
    environment = {**os.environ, "PYTHONPATH": str(readme.ROOT), "OMP_NUM_THREADS": "1"}
    for language, kept, block in blocks:
        if kept:
            continue
        run = [sys.executable, "-c", block] if language == "python" else ["bash", "-c", command + block]
        done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (block, done.stdout, done.stderr)
    assert {"report.html", "trials.csv"} <= {path.name for path in (tmp_path / "runs").iterdir()}
    assert (tmp_path / "found.html").is_file()
    for name in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (readme.ROOT / "docs" / name).exists(), name
