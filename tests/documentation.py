"""Which blocks of code are on the pages of docs/, and how are they run?"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from melbo_lens.cli import app
from tests.readme import ROOT

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(python|bash)(?: (no-run|real))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = f'melbo-lens() {{ "{sys.executable}" -m melbo_lens "$@"; }}\nset -e\n'


def blocks(page: Path, wanted: str = "") -> list[tuple[str, str]]:
    """The language and the code of the blocks of a page that are marked so; those without a mark run by default."""
    return [(language, code) for language, mark, code in BLOCK.findall(page.read_text()) if mark == wanted]


def pages(wanted: str = "") -> list[str]:
    """The pages that have such blocks."""
    return [str(page.relative_to(DOCS)) for page in sorted(DOCS.rglob("*.md")) if blocks(page, wanted)]


def run(page: str, folder: Path, wanted: str = "") -> dict[str, Any]:
    """Runs the blocks of a page as a person would who pastes one after another, and returns the names of the session.

    The folder must be the present one.
    """
    names: dict[str, Any] = {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for language, code in blocks(DOCS / page, wanted):
        if language == "python":
            exec(compile(code, f"docs/{page}", "exec"), names)
            continue
        lines = [list(shlex.shlex(line, posix=True, punctuation_chars=True)) for line in code.splitlines()]
        if all(
            words[0] == "melbo-lens" and not any(re.fullmatch("[&|<>;]+", word) for word in words) for words in lines
        ):
            for words in lines:  # within this process, which has torch loaded
                said = CliRunner().invoke(app, words[1:])
                assert said.exit_code == 0, (words, said.output)
            continue
        done = subprocess.run(
            ["bash", "-c", COMMAND + code], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (code, done.stdout, done.stderr)
    return names
