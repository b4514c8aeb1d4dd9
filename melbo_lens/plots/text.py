"""How is a model's text shown?  What can't be seen in it is spelled out, and nothing in it is taken for markup."""

import html
import textwrap
import unicodedata

MARKS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
JOINER, EMOJI_STYLE = "\u200d", "\ufe0f"
# letters, marks and a symbol that Unicode counts as printable and that leave no ink
INKLESS = {*map(chr, (0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800, 0x3164, 0xFFA0))}
INKLESS |= {*map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))}
LEFT_TO_RIGHT, END = "\u2066", "\u2069"  # an isolated run of text


def visible(token: str, most: int | None = None) -> str:
    """Returns a token with its spaces, newlines and control characters made visible; an empty token becomes ∅.

    Args:
        token: the text of one token.
        most: a longer result is cut after so many characters.
    """
    shown = "".join(MARKS.get(c, c) for c in spelled(token, kept="\n\t\r\u00a0")) or "∅"
    return shown if most is None or len(shown) <= most else shown[: most - 1] + "…"


def spelled(text: str, kept: str = "") -> str:
    """Returns text in which every character can be seen.

    Control characters, those that turn the direction of writing, and those without ink or width are written as their
    numbers, except the characters in `kept` and the joiners within an emoji. A mark that would combine with what stands
    before the text gets a circle to stand on.
    """
    found = [
        c if c in kept or _has_ink(c) or _within_emoji(text, i) else _number(c) for i, c in enumerate(text)
    ]  # fmt: skip
    return ("◌" if text and unicodedata.combining(text[0]) else "") + "".join(found)


def for_plotly(text: str, most: int = 400, width: int = 70) -> str:
    """Returns text for a label or a hover box; long text is wrapped and cut.

    Plotly reads a few HTML tags there, formulas between dollars, and templates, so what begins them is escaped. Control
    characters are spelled out, because a single one in the SVG keeps the whole figure from being exported as an image.
    A line with letters that are written from right to left can't reorder what stands beside it.
    """
    cut = text if len(text) <= most else text[: most - 1] + "…"
    lines = [line for part in cut.split("\n") for line in (textwrap.wrap(part, width) or [""])]
    return "<br>".join(_isolated(_escaped(spelled(line))) for line in lines)


def for_html(text: str) -> str:
    """Returns text for an HTML page, escaped, with newlines and tabs as they are."""
    return html.escape(spelled(text, kept="\n\t"))


def _escaped(line: str) -> str:
    return html.escape(line, quote=False).replace("$", "&#36;").replace("%{", "&#37;{")


def _isolated(line: str) -> str:
    turned = any(unicodedata.bidirectional(c) in ("R", "AL") for c in line)
    return f"{LEFT_TO_RIGHT}{line}{END}" if turned else line


def _has_ink(character: str) -> bool:
    return character.isprintable() and character not in INKLESS


def _within_emoji(text: str, i: int) -> bool:
    """Whether the character joins the symbols beside it to one emoji, or asks for the symbol before it in colour."""
    before = i > 0 and (text[i - 1] == EMOJI_STYLE or unicodedata.category(text[i - 1]) in ("So", "Sk"))
    after = i + 1 < len(text) and unicodedata.category(text[i + 1]) == "So"
    return before and (text[i] == EMOJI_STYLE or (text[i] == JOINER and after))


def _number(character: str) -> str:
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
