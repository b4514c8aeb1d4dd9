"""Does what the README says still hold?  Its tables and links are looked at with those of the pages (test_docs.py)."""

import re

import pytest

import melbo_lens as ml
from tests import readme

TEXT = readme.README.read_text()


def test_the_block_runs_and_shows_what_the_readme_shows():
    (code, shown), *_ = ((block["code"], block["shown"]) for block in readme.BLOCK.finditer(TEXT) if block["shown"])
    printed = readme.run(code)
    behaviors = ml.organisms.load("modes").behaviors

    def kinds(output):  # exact counts depend on the machine's arithmetic
        return {name for name, behavior in behaviors.items() if any(map(behavior, output.splitlines()))}

    assert kinds(printed) == kinds(shown) == {*behaviors}  # with other seeds as well


def test_every_other_block_at_least_compiles_and_names_what_exists():
    blocks = re.findall(r"```python no-run\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
        for name in re.findall(r"\bml\.(\w+)", block):
            assert hasattr(ml, name)


@pytest.mark.parametrize("target", ["demo", "real", "test", "docs"])
def test_make_has_the_commands(target):
    assert re.search(rf"^{target}:", (readme.ROOT / "Makefile").read_text(), re.MULTILINE)
