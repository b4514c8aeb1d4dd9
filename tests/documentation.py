"""What do the pages of docs/ hold that must stay true?  Blocks of code that run, links, and what the reference names."""

import os
import re
import subprocess
import sys
from pathlib import Path

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


def run(page: str, folder: Path, wanted: str = "") -> None:
    """Runs the blocks of a page as a person would who pastes one after another, in one folder and one session."""
    names: dict[str, object] = {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for language, code in blocks(DOCS / page, wanted):
        if language == "python":
            exec(compile(code, f"docs/{page}", "exec"), names)
            continue
        done = subprocess.run(
            ["bash", "-c", COMMAND + code], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (code, done.stdout, done.stderr)
