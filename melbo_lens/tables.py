"""How does a value look in a notebook?  It is a sentence above a table, in which every text is HTML-escaped."""

import unicodedata
from collections.abc import Mapping, Sequence
from html import escape

import pandas as pd
from torch import Tensor

# control and format characters (bidirectional and zero-width ones are among them), separators of lines, lone
# surrogates, private ones; and fillers, which count as letters or marks and show nothing
HIDDEN, FILLERS = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co"}, set("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
JOINER = "\u200d"


def seen(text: str) -> str:
    """Returns a text in which every character can be seen: hidden ones are spelled out, as in ⟨U+202E⟩.

    A joiner between two characters beyond ASCII stays, since it makes one emoji or one ligature of them.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if _is_seen(text, i) else f"⟨U+{ord(character):04X}⟩" for i, character in enumerate(text))


def _is_seen(text: str, place: int) -> bool:
    character = text[place]
    if character in "\n\t" or character == JOINER:
        return character != JOINER or not any(
            map(_plain_or_none, (text[place - 1 : place], text[place + 1 : place + 2]))
        )
    return unicodedata.category(character) not in HIDDEN and character not in FILLERS


def _plain_or_none(beside: str) -> bool:
    return beside.isascii() or unicodedata.category(beside) == "Cf"


def html(sentence: object, table: pd.DataFrame | None = None, most: int = 60, note: str = "") -> str:
    """Puts the sentence above the first rows of the table, and says how many rows there are if some are left out.

    Args:
        sentence: the text above the table; like everything in the table, it is escaped.
        table: the rows to show, if any.
        most: how many rows are shown at most.
        note: a text below the table.
    """
    parts = [f"<p>{escape(str(sentence))}</p>"]
    if table is not None and len(table):
        with pd.option_context("display.max_colwidth", None, "display.precision", 4, "display.html.use_mathjax", False):
            shown = table.head(most).to_html(index=False, na_rep="", escape=True, border=0)
        parts.append(f'<div style="overflow-x:auto">{shown}</div>')
    if table is not None and len(table) > most:
        parts.append(f"<p>the first {most} of {len(table)} rows</p>")
    return "".join([*parts, f"<p>{escape(note)}</p>" if note else ""])


def rows_html(sentence: object, history: Tensor, measures: Mapping[str, Sequence[float]], what: str) -> str:
    """Puts the sentence above a table with one row for each perturbation.

    A row shows the perturbation's number, its measures, and the objective before the first step and after the last.
    """
    return html(sentence, _rows(history, measures, what))


def _rows(history: Tensor, measures: Mapping[str, Sequence[float]], what: str) -> pd.DataFrame:
    ends = {"objective_at_start": history[0].tolist(), "objective": history[-1].tolist()} if len(history) else {}
    columns: dict[str, Sequence[float]] = {**measures, **ends}
    return pd.DataFrame({what: range(len(next(iter(columns.values())))), **columns})
