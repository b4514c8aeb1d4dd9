"""What did the model write?  `Completions` has a table row for each prompt, perturbation, sign, scale and sample."""

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from melbo_lens import files, tables
from melbo_lens.arguments import as_list, plain_json, public
from melbo_lens.perturbations.perturbation import Index, chosen_rows
from melbo_lens.prompts import PromptBatch, pad

COLUMNS = ["prompt", "prompt_text", "kind", "vector", "sign", "scale", "sample", "text", "tokens", "log_probs"]
PROMPT_TOKENS = "prompt_tokens"  # a further column, which only files have
SHOWN = ["prompt", "kind", "vector", "sign", "scale", "text"]


@dataclass(frozen=True, eq=False, repr=False)
class Completions:
    """Completions of steered, control and unsteered runs.

    `completions[3]`, `completions[2:5]` and `filter` give completions again. Every measure takes completions as its
    prompts: each row then stands for the exact ids of its prompt and of what was written.

    Attributes:
        table: prompt (index), prompt_text, kind ("steered", "random" or "unsteered"), vector (index; a random row has
            the index of the vector that it is matched to, an unsteered row has NA), sign, scale, sample, text (the new
            text only), tokens (the new ids without the end token), and log_probs (the log-probabilities of those tokens
            under the steered model at temperature 1, in nats).
        settings: the settings of the generation, with the provenance of the perturbations.
        prompt_tokens: the ids of each row's prompt; None for completions that were saved by an earlier version.
        continuation: the function behind `continue_with`; None unless the prompts were chats.
    """

    table: pd.DataFrame
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompt_tokens: tuple[tuple[int, ...], ...] | None = None
    continuation: Callable[[Sequence[str]], "Completions"] | None = None

    def __post_init__(self) -> None:
        missing = [column for column in COLUMNS if column not in self.table.columns]
        if missing:
            raise ValueError(f"a table of completions needs the columns {missing}.")
        if self.prompt_tokens is not None and len(self.prompt_tokens) != len(self.table):
            raise ValueError(
                f"prompt_tokens has {len(self.prompt_tokens)} rows, the table {len(self.table)}: give one for each."
            )
        object.__setattr__(self, "settings", plain_json(self.settings, "settings"))

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator["Completions"]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Index) -> "Completions":
        return self._rows(chosen_rows(index, len(self), "completion").tolist())

    def __getstate__(self) -> dict[str, Any]:
        """The state of a pickle or a copy, which like a file holds everything except the link to the model."""
        return {**vars(self), "continuation": None}

    def as_prompts(self) -> PromptBatch:
        """The ids of each row's prompt and completion.

        Raises:
            ValueError: these completions don't know their prompts' ids.
        """
        if self.prompt_tokens is None:
            raise ValueError(
                "these completions, which an earlier version kept, don't know the ids of their prompts: give the "
                "text instead."
            )
        rows = [[*before, *new] for before, new in zip(self.prompt_tokens, self.table.tokens, strict=True)]
        return pad(rows, [before + new for before, new in zip(self.table.prompt_text, self.table.text, strict=True)])

    @public
    def filter(self, **columns: Any) -> "Completions":
        """The rows whose columns have the given value, or one of the values of a list.

        An example is `completions.filter(kind="steered", vector=[0, 3])`. None stands for no value, as the `vector` of
        unsteered ones.

        Args:
            columns: column=value or column=[values].

        Returns:
            The completions for which all columns agree, numbered anew from 0.

        Raises:
            ValueError: the table has no such column.
        """
        kept = pd.Series(True, index=self.table.index)
        for column, wanted in columns.items():
            if column not in self.table.columns:
                raise ValueError(f"there is no column {column!r} to filter by: choose from {list(self.table.columns)}.")
            wanted = as_list(wanted)
            values = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Iterable) else list(wanted)
            # None is what files have where the table has NA
            kept &= self.table[column].isin(values) | (self.table[column].isna() & (None in values))
        return self._rows(kept.to_numpy().nonzero()[0].tolist())

    def _rows(self, places: Sequence[int]) -> "Completions":
        known = None if self.prompt_tokens is None else tuple(self.prompt_tokens[place] for place in places)
        return Completions(self.table.iloc[list(places)].reset_index(drop=True), self.settings, known)

    def continue_with(self, message: str | Sequence[str]) -> "Completions":
        """Adds each completion and then a user message to its chat, and completes again under the same perturbation.

        Args:
            message: what the user says next: the same in every chat, or a message for each row.

        Returns:
            The next answers: a row for each row here, in the same order.

        Raises:
            ValueError: the prompts were not chats, these completions were filtered or loaded, so they have no model, or
                there is not a message for each row.
        """
        if self.continuation is None:
            raise ValueError(
                "only completions of chats, as generate returns them, can be continued: give prompts as messages, or "
                "chat=True."
            )
        messages = [message] * len(self) if isinstance(message, str) else list(message)
        if len(messages) != len(self):
            raise ValueError(f"{len(messages)} messages were given for {len(self)} chats: give one for each, or one.")
        return self.continuation(messages)

    def distinct(self, n: int = 2) -> pd.DataFrame:
        """How varied the completions of each kind, vector and sign are.

        Args:
            n: the number of words in an n-gram.

        Returns:
            kind, vector, sign, n_texts, n_distinct (different texts), and distinct_n (the number of different word
            n-grams divided by the number of all n-grams; near 0 for texts that repeat themselves).
        """
        rows = []
        for key, texts in self.table.groupby(["kind", "vector", "sign"], dropna=False).text:
            grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
            rows.append((*key, len(texts), texts.nunique(), len(set(grams)) / len(grams) if grams else float("nan")))
        return pd.DataFrame(rows, columns=["kind", "vector", "sign", "n_texts", "n_distinct", f"distinct_{n}"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes table and settings as one parquet file, atomically.

        This needs pyarrow: `pip install melbo-lens[parquet]`.

        Args:
            path: the file, which usually ends in .parquet.

        Raises:
            ModuleNotFoundError: pyarrow is not installed.
        """
        import pyarrow as pa
        import pyarrow.parquet

        known = {} if self.prompt_tokens is None else {PROMPT_TOKENS: [list(ids) for ids in self.prompt_tokens]}
        arrow = pa.Table.from_pandas(self.table.assign(**known))
        arrow = arrow.replace_schema_metadata(
            {**arrow.schema.metadata, b"melbo_lens": json.dumps(dict(self.settings)).encode()}
        )
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(arrow, buffer)
        files.write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Completions":
        """Reads what `save` wrote.

        Args:
            path: the file.

        Returns:
            The completions; they can't be continued, since they know no model.

        Raises:
            ModuleNotFoundError: pyarrow is not installed.
            ValueError: the file holds no completions of melbo_lens.
        """
        import pyarrow.parquet

        arrow = pyarrow.parquet.read_table(path)
        settings = (arrow.schema.metadata or {}).get(b"melbo_lens")
        if settings is None:
            raise ValueError(f"{path} holds no completions of melbo_lens.")
        table = arrow.to_pandas()
        known = tuple(tuple(map(int, ids)) for ids in table.pop(PROMPT_TOKENS)) if PROMPT_TOKENS in table else None
        return cls(
            table.assign(tokens=table.tokens.map(_plain_list), log_probs=table.log_probs.map(_plain_list)),
            json.loads(settings),
            known,
        )

    def to_lines(self) -> str:
        """The completions as one JSON object per line, in ASCII, with null for NaN; `from_lines` reads them."""
        known = [
            {} if self.prompt_tokens is None else {PROMPT_TOKENS: list(ids)}
            for ids in self.prompt_tokens or [()] * len(self)
        ]
        records = zip(self.table.to_dict("records"), known, strict=True)
        return "".join(json.dumps(_as_json({**row, **ids}), allow_nan=False) + "\n" for row, ids in records)

    @classmethod
    def from_lines(cls, lines: str, settings: Mapping[str, Any]) -> "Completions":
        """Completions from what `to_lines` wrote.

        Raises:
            ValueError: a line holds no such object; the message says which line.
        """
        rows, known = [], []
        for number, line in enumerate(lines.removesuffix("\n").split("\n") if lines else [], 1):
            try:
                row = json.loads(line)
                if not isinstance(row["text"], str):
                    raise TypeError(f"text is {row['text']!r}")
                row["log_probs"] = [math.nan if value is None else float(value) for value in row["log_probs"]]
                known.append(row.pop(PROMPT_TOKENS, None))
                # every column must be there, and columns that a user added are kept
                rows.append({**{column: row[column] for column in COLUMNS}, **row})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} holds no completion ({error!r})") from error
        table = pd.DataFrame(rows, columns=list(rows[0]) if rows else COLUMNS).astype({"vector": "Int64"})
        return cls(table, settings, None if None in known else tuple(map(tuple, known)))

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.table["kind"].value_counts().items())
        prompts = self.table["prompt"].nunique()
        return f"Completions({len(self)} rows: {counts or 'none'}; {prompts} prompt{'s' if prompts != 1 else ''})"

    def _repr_html_(self) -> str:
        return tables.html(repr(self), self.table[SHOWN])


def _as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row in JSON's types, with null for NaN and for a missing vector."""
    log_probs = [
        None if math.isnan(value) else float(value) if math.isfinite(value) else str(value)
        for value in row["log_probs"]
    ]
    row = {str(key): None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
    return plain_json(
        {**row, "vector": None if pd.isna(row["vector"]) else int(row["vector"]), "log_probs": log_probs},
        "a completion",
    )


def _plain_list(values: Any) -> list[Any]:
    return plain_json(list(values), "a completion")
