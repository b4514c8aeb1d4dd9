"""How is text of a model shown?  Blanks made visible, and nothing in it taken for markup."""

import html
import textwrap

MARKS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u200d": "\u200d"}  # the last joins emoji


def visible(token: str) -> str:
    """A token with its spaces, newlines and control characters made visible; an empty one is ∅."""
    return "".join(MARKS.get(c, _printable(c)) for c in token) or "∅"


def for_plotly(text: str, most: int = 400, width: int = 70) -> str:
    """Text for a label or a hover box: plotly reads a few tags there, so `<` and `&` are escaped; long text is wrapped and cut.

    Control characters are spelled out: one of them in an SVG, and the whole figure can't be made a picture.
    """
    cut = text if len(text) <= most else text[: most - 1] + "…"
    lines = [line for part in cut.split("\n") for line in (textwrap.wrap(part, width) or [""])]
    return "<br>".join(html.escape("".join(map(_printable, line)), quote=False) for line in lines)


def _printable(character: str) -> str:
    return character if character.isprintable() or character == "\u200d" else f"\\u{ord(character):04x}"
