"""How is a run kept in a folder, so that its page can be written again without the model?

JSON lines and safetensors are read again; the CSV files beside them are for people.
"""

import csv
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from melbo_lens import files
from melbo_lens.arguments import plain_json, public
from melbo_lens.calibration import Calibration
from melbo_lens.completions import Completions
from melbo_lens.differences import ActivationChanges, TargetEffects
from melbo_lens.evaluation import Behavior, shows
from melbo_lens.layer_scan import COLUMNS as SCAN_COLUMNS
from melbo_lens.layer_scan import LayerScan
from melbo_lens.page import report
from melbo_lens.perturbation import load
from melbo_lens.plots import TokenView

MEASURES = {"changes": ActivationChanges, "effects": TargetEffects}


@public
def save_results(
    directory: str | os.PathLike[str],
    vectors: Any,
    completions: Completions,
    behaviors: Mapping[str, Behavior] | None = None,
    title: str = "What the vectors elicit",
    changes: ActivationChanges | None = None,
    effects: TargetEffects | None = None,
    control: Any = None,
    ranked: pd.DataFrame | None = None,
    calibration: Calibration | None = None,
    scan: LayerScan | None = None,
    coherence: Any = None,
    views: TokenView | None = None,
) -> Path:
    """Writes vectors, completions, measurements and the page that shows them to a folder, which is made if missing.

    Args:
        directory: where to write. Each file is written whole or not at all.
        vectors, completions, behaviors, title, changes, effects, control, ranked, calibration, scan, coherence, views: as in `report`. Of the
            behaviours those texts are kept that show them, since a function can't be.

    Returns:
        The page.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    vectors.save(folder / "vectors.safetensors")
    files.write_text(folder / "completions.jsonl", completions.to_lines())
    # quoted, so that a lone carriage return in a text ends no row
    files.write_text(folder / "completions.csv", completions.table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC))
    texts = completions.table.text.drop_duplicates()
    about = {
        "title": title,
        "texts_that_show": {name: texts[shows(texts, behavior).to_numpy(dtype=bool)].tolist() for name, behavior in (behaviors or {}).items()},
        "settings": {key: value for key, value in completions.settings.items() if key != "perturbations"},
        "control": None if control is None else [float(value) for value in control],
        "coherence": None if coherence is None else [float(value) for value in coherence],
        "calibration": None if calibration is None else vars(calibration),
        "scan": None if scan is None else {"rows": _plain_rows(scan.table[SCAN_COLUMNS]), "settings": dict(scan.settings)},
        "ranking": None if ranked is None else {"columns": list(ranked.columns), "rows": _plain_rows(ranked)},
        "views": None if views is None else views.to_json(),
    }
    files.write_json(folder / "about.json", about)
    for name, measured in (("changes", changes), ("effects", effects)):
        if measured is not None:
            measured.save(folder / f"{name}.safetensors")
    for name, table in (("ranking", ranked), ("scan", None if scan is None else scan.table)):
        if table is not None:
            files.write_text(folder / f"{name}.csv", table.to_csv(index=False))
    return report_directory(folder)


@public
def report_directory(directory: str | os.PathLike[str], behaviors: Mapping[str, Behavior] | None = None, path: Any = None) -> Path:
    """Writes the page of a folder again, from the files in it.

    Args:
        directory: a folder with `vectors.safetensors` and `completions.jsonl` (or the `completions.csv` of version 0.1.0), as `melbo-lens fit` or
            `save_results` leave it.
        behaviors: other behaviours to count instead of those of the run.
        path: the page; `report.html` in the folder by default.

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: a file is damaged.
    """
    folder = Path(directory)
    lines, sheet = folder / "completions.jsonl", folder / "completions.csv"
    for name, there in (("vectors.safetensors", (folder / "vectors.safetensors").is_file()), (lines.name, lines.is_file() or sheet.is_file())):
        if not there:
            raise FileNotFoundError(f"{folder} has no {name}: give a folder that `melbo-lens fit` or `save_results` wrote.")
    about = files.read_json(folder / "about.json") if (folder / "about.json").is_file() else {}
    kept = {name: frozenset(texts).__contains__ for name, texts in about.get("texts_that_show", {}).items()}
    measured = {name: kind.load(folder / f"{name}.safetensors") for name, kind in MEASURES.items() if (folder / f"{name}.safetensors").is_file()}
    try:
        return report(
            load(folder / "vectors.safetensors"),
            _completions(lines, sheet, about.get("settings", {})),
            behaviors or kept,
            folder / "report.html" if path is None else path,
            about.get("title", "What the vectors elicit"),
            control=_numbers(about.get("control")),
            coherence=_numbers(about.get("coherence")),
            ranked=_ranking(about.get("ranking"), folder / "ranking.csv"),
            calibration=_calibration(about.get("calibration")),
            scan=_scan(about.get("scan")),
            views=None if about.get("views") is None else TokenView.from_json(about["views"]),
            **measured,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'about.json'} is damaged: its parts are not what a run leaves ({error!r}).") from error


def _plain_rows(table: pd.DataFrame) -> list[list[Any]]:
    """The cells of a table as Python's, with None for what is missing."""
    return plain_json(table.astype(object).where(table.notna(), None).to_numpy().tolist(), "a table")


def _completions(lines: Path, sheet: Path, settings: Mapping[str, Any]) -> Completions:
    if not lines.is_file():
        return Completions(_table(sheet), settings)
    try:
        return Completions.from_lines(lines.read_text(encoding="utf-8"), settings)
    except ValueError as error:
        raise ValueError(f"{lines} is damaged: {error}.") from error


def _numbers(values: list[float | None] | None) -> list[float] | None:
    """Numbers whose NaN became null."""
    return None if values is None else [math.nan if value is None else value for value in values]


def _ranking(kept: dict[str, Any] | None, sheet: Path) -> pd.DataFrame | None:
    if kept is not None:
        return pd.DataFrame([_numbers(row) for row in kept["rows"]], columns=kept["columns"])
    return pd.read_csv(sheet) if sheet.is_file() else None  # version 0.1.0


def _calibration(kept: dict[str, Any] | None) -> Calibration | None:
    return None if kept is None else Calibration(kept["radius"], tuple(map(tuple, kept["curve"])), kept["rule"], kept["target"])


def _scan(kept: dict[str, Any] | None) -> LayerScan | None:
    return None if kept is None else LayerScan(pd.DataFrame([_numbers(row) for row in kept["rows"]], columns=SCAN_COLUMNS), kept["settings"])


def _table(path: Path) -> pd.DataFrame:
    """Completions of a CSV file, as version 0.1.0 kept them."""
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype={"text": str, "prompt_text": str}, na_values={"vector": [""]})
        return table.astype({"vector": "Int64"}).assign(tokens=table.tokens.map(json.loads), log_probs=table.log_probs.map(json.loads))
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, it holds no table of completions ({error}).") from error
