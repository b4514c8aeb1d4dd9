"""How is a model's text shown?  Its white space is made visible, and nothing in it is taken for markup."""

import html
import textwrap

# the last one joins emoji and stays as it is
MARKS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u200d": "\u200d"}


def visible(token: str) -> str:
    """Returns a token with its spaces, newlines and control characters made visible; an empty token becomes ∅."""
    return "".join(MARKS.get(c, _printable(c)) for c in token) or "∅"


def for_plotly(text: str, most: int = 400, width: int = 70) -> str:
    """Returns text for a label or a hover box; long text is wrapped and cut.

    Plotly reads a few HTML tags there, so `<` and `&` are escaped. Control characters are spelled out, because a single
    one in the SVG keeps the whole figure from being exported as an image.
    """
    cut = text if len(text) <= most else text[: most - 1] + "…"
    lines = [line for part in cut.split("\n") for line in (textwrap.wrap(part, width) or [""])]
    return "<br>".join(html.escape("".join(map(_printable, line)), quote=False) for line in lines)


def _printable(character: str) -> str:
    return character if character.isprintable() or character == "\u200d" else f"\\u{ord(character):04x}"
