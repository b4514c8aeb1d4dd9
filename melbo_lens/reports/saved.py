"""How are parts of findings kept in a folder, and read again?  In JSON's types, also as version 0.1.0 wrote them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from melbo_lens.arguments import plain_json
from melbo_lens.evaluation.judges import KeptVerdicts
from melbo_lens.generation.completions import Completions
from melbo_lens.search.layers import LayerScan
from melbo_lens.search.written import Written

SCAN_COLUMNS_0_1_0 = "source_layer target_layer sign radius objective random_objective kl entropy".split()


def plain_rows(table: pd.DataFrame) -> list[list[Any]]:
    """Returns the cells of a table as plain Python values, with None for missing ones."""
    return plain_json(table.astype(object).where(table.notna(), None).to_numpy().tolist(), "a table")


def texts(completions: Completions, written: Written | None) -> pd.Series:
    """Every text once."""
    every = pd.concat([completions.table.text, *([] if written is None else [written.rows.text])])
    return every.drop_duplicates().reset_index(drop=True)


def behaviors(about: Mapping[str, Any], completions: Completions, written: Written | None) -> dict[str, KeptVerdicts]:
    """The verdicts of the run: what it wrote and its file doesn't name didn't show the behaviour."""
    everything, unknown = frozenset(texts(completions, written)), about.get("texts_without_verdict", {})
    return {
        name: KeptVerdicts(frozenset(shown), everything - {*shown, *unknown.get(name, [])})
        for name, shown in about.get("texts_that_show", {}).items()
    }


def completions(lines: Path, sheet: Path, settings: Mapping[str, Any]) -> Completions:
    """Reads completions, also from the CSV file of version 0.1.0."""
    if not lines.is_file():
        return Completions(table(sheet), settings)
    try:
        return Completions.from_lines(lines.read_text(encoding="utf-8"), settings)
    except ValueError as error:
        raise ValueError(f"{lines} is damaged: {error}.") from error


def numbers(values: list[float | None] | None) -> list[float] | None:
    """Turns None, which is how JSON keeps NaN, back into NaN."""
    return None if values is None else [math.nan if value is None else value for value in values]


def ranking(kept: dict[str, Any] | None, sheet: Path) -> pd.DataFrame | None:
    """The table of `rank`, or None."""
    if kept is not None:
        return pd.DataFrame([numbers(row) for row in kept["rows"]], columns=kept["columns"])
    return pd.read_csv(sheet) if sheet.is_file() else None  # version 0.1.0


def groups(kept: dict[str, Any] | None) -> dict[str, Any]:
    """The groups and what was said of them, as fields of `Findings`."""
    if kept is None:
        return {}
    table = pd.DataFrame(kept["rows"], columns=kept["columns"])
    return {"groups": table.fillna(float("nan")), "said": kept["said"]}


def trials(kept: dict[str, Any] | None) -> pd.DataFrame | None:
    """The table of trials, or None."""
    return None if kept is None else pd.DataFrame(kept["rows"], columns=kept["columns"])


def scan(kept: dict[str, Any] | None) -> LayerScan | None:
    """The scan of layers, or None."""
    if kept is None:
        return None
    columns = kept.get("columns", SCAN_COLUMNS_0_1_0)
    return LayerScan(pd.DataFrame([numbers(row) for row in kept["rows"]], columns=columns), kept["settings"])


def table(path: Path) -> pd.DataFrame:
    """Reads completions from a CSV file, as version 0.1.0 wrote it."""
    try:
        table = pd.read_csv(
            path, keep_default_na=False, dtype={"text": str, "prompt_text": str}, na_values={"vector": [""]}
        )
        return table.astype({"vector": "Int64"}).assign(
            tokens=table.tokens.map(json.loads), log_probs=table.log_probs.map(json.loads)
        )
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, it holds no table of completions ({error}).") from error
