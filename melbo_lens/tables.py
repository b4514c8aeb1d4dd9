"""How does a value look in a notebook?  It is a sentence above a table, in which every text is HTML-escaped."""

from collections.abc import Mapping, Sequence
from html import escape

import pandas as pd
from torch import Tensor


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
        with pd.option_context("display.max_colwidth", None, "display.precision", 4):
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
