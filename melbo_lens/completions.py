"""What did the model write?  `Completions`: one table row for each prompt, perturbation, sign, scale and sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import pandas as pd

COLUMNS = ["prompt", "prompt_text", "kind", "vector", "sign", "scale", "sample", "text", "tokens", "log_probs"]
SHOWN = ["prompt", "kind", "vector", "sign", "scale", "text"]


@dataclass(frozen=True, eq=False, repr=False)
class Completions:
    """Completions of steered, control and unsteered runs.

    Attributes:
        table: prompt (index), prompt_text, kind ("steered", "random" or "unsteered"), vector (index; for a random row that of the vector it is
            matched to; NA for unsteered), sign, scale, sample, text (new text only), tokens (new ids without the end token), log_probs (of those
            tokens, under the steered model at temperature 1).
        settings: how they were generated, with the provenance of the perturbations.
    """

    table: pd.DataFrame
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [column for column in COLUMNS if column not in self.table.columns]
        if missing:
            raise ValueError(f"a table of completions needs the columns {missing}.")

    def __len__(self) -> int:
        return len(self.table)

    def filter(self, **columns: Any) -> "Completions":
        """The rows whose columns have the given value, or one of the values of a list: `completions.filter(kind="steered", vector=[0, 3])`."""
        table = self.table
        for column, wanted in columns.items():
            if column not in table.columns:
                raise ValueError(f"there is no column {column!r} to filter by: choose from {list(table.columns)}.")
            allowed = wanted if isinstance(wanted, list | tuple | set | range) else [wanted]
            table = table[table[column].isin(list(allowed))]
        return Completions(table.reset_index(drop=True), self.settings)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.table["kind"].value_counts().items())
        return f"Completions({len(self)} rows: {counts or 'none'}; {self.table['prompt'].nunique()} prompts)"

    def _repr_html_(self) -> str:
        rows = self.table[SHOWN].head(60)
        note = f"<p>the first {len(rows)} of {len(self)} rows</p>" if len(rows) < len(self) else ""
        return f"<p>{escape(repr(self))}</p>{rows.to_html(index=False, na_rep='', escape=True)}{note}"
