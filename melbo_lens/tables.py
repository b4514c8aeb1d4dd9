"""How does a value look in a notebook?  A sentence, and a table whose texts can't be markup."""

from html import escape

import pandas as pd


def html(sentence: object, table: pd.DataFrame | None = None, most: int = 60, note: str = "") -> str:
    """The sentence above the first rows of the table, with a word on those left out.

    Args:
        sentence: its text; escaped, as everything in the table is.
        table: what to show.
        most: how many rows.
        note: said below.
    """
    parts = [f"<p>{escape(str(sentence))}</p>"]
    if table is not None and len(table):
        with pd.option_context("display.max_colwidth", None, "display.precision", 4):
            shown = table.head(most).to_html(index=False, na_rep="", escape=True, border=0)
        parts.append(f'<div style="overflow-x:auto">{shown}</div>')
    if table is not None and len(table) > most:
        parts.append(f"<p>the first {most} of {len(table)} rows</p>")
    return "".join([*parts, f"<p>{escape(note)}</p>" if note else ""])


def rows(history: object, measures: dict[str, object], what: str) -> pd.DataFrame:
    """One row for each perturbation: its number, measures, and the objective before the first step and after the last."""
    ends = {"objective_at_start": history[0].tolist(), "objective": history[-1].tolist()} if len(history) else {}
    columns = {**measures, **ends}
    return pd.DataFrame({what: range(len(next(iter(columns.values())))), **columns})
