"""What does MkDocs not know of these pages?  How a block of code says that it isn't run, which readers needn't see."""

import re
from typing import Any

# `tests/acceptance/test_docs.py` runs the blocks, except those with one of these words after their language
RUN = re.compile(r"^(```\w+) (?:no-run|real)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Takes the words away, with which MkDocs would not see a block of code."""
    return RUN.sub(r"\1", markdown)
