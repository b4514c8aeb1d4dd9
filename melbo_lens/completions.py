"""What did the model write?  `Completions`: one table row for each prompt, perturbation, sign, scale and sample."""

import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from melbo_lens import files, tables

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
        continuation: how `continue_with` goes on, if the prompts were chats.
    """

    table: pd.DataFrame
    settings: Mapping[str, Any] = field(default_factory=dict)
    continuation: Callable[[str], "Completions"] | None = None

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

    def continue_with(self, message: str) -> "Completions":
        """Adds each completion and then this user message to its own chat, and completes again under the same perturbation.

        Raises:
            ValueError: the prompts were no chats, or these completions were filtered or loaded and so belong to no model.
        """
        if self.continuation is None:
            raise ValueError("only completions of chats, as generate returns them, can be continued: give prompts as messages, or chat=True.")
        return self.continuation(message)

    def distinct(self, n: int = 2) -> pd.DataFrame:
        """How varied the completions of each kind, vector and sign are.

        Returns:
            kind, vector, sign; n_texts, n_distinct (different texts), and distinct_n (different word n-grams by all of them: near 0 where a
            text repeats itself).
        """
        rows = []
        for key, texts in self.table.groupby(["kind", "vector", "sign"], dropna=False).text:
            grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
            rows.append((*key, len(texts), texts.nunique(), len(set(grams)) / len(grams) if grams else float("nan")))
        return pd.DataFrame(rows, columns=["kind", "vector", "sign", "n_texts", "n_distinct", f"distinct_{n}"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes table and settings as one parquet file, atomically. Needs pyarrow: `pip install melbo-lens[parquet]`."""
        import pyarrow as pa
        import pyarrow.parquet

        arrow = pa.Table.from_pandas(self.table)
        arrow = arrow.replace_schema_metadata({**arrow.schema.metadata, b"melbo_lens": json.dumps(dict(self.settings)).encode()})
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(arrow, buffer)
        files.write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Completions":
        """Reads what `save` wrote."""
        import pyarrow.parquet

        arrow = pyarrow.parquet.read_table(path)
        settings = (arrow.schema.metadata or {}).get(b"melbo_lens")
        if settings is None:
            raise ValueError(f"{path} holds no completions of melbo_lens.")
        table = arrow.to_pandas()
        return cls(table.assign(tokens=table.tokens.map(list), log_probs=table.log_probs.map(list)), json.loads(settings))

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.table["kind"].value_counts().items())
        prompts = self.table["prompt"].nunique()
        return f"Completions({len(self)} rows: {counts or 'none'}; {prompts} prompt{'s' if prompts != 1 else ''})"

    def _repr_html_(self) -> str:
        return tables.html(repr(self), self.table[SHOWN])
