"""How are findings kept in a folder, and read again?

The JSON and safetensors files of the folder are read again; the CSV files are for people. What version 0.1.0 wrote can
be read as well.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from melbo_lens import files
from melbo_lens.arguments import plain_json
from melbo_lens.evaluation.judges import KeptVerdicts
from melbo_lens.evaluation.rates import verdicts
from melbo_lens.generation.completions import Completions
from melbo_lens.measures.changes import ActivationChanges, TargetEffects
from melbo_lens.measures.radius import Calibration
from melbo_lens.perturbations.loading import load
from melbo_lens.plots import TokenView
from melbo_lens.search.discovery import Discovery
from melbo_lens.search.layers import LayerScan
from melbo_lens.search.looks import Look
from melbo_lens.search.written import Written

MEASURES = {"changes": ActivationChanges, "effects": TargetEffects}
TABLES = ("ranking", "scan", "groups", "trials")
VECTORS, LINES, SHEET = "vectors.safetensors", "completions.jsonl", "completions.csv"
ABOUT, WRITTEN = "about.json", "written.json"
FILES = [VECTORS, LINES, SHEET, ABOUT, WRITTEN, *(f"{name}.safetensors" for name in MEASURES)]
PAGE, GROUP_FILES, MOST_GROUP_FILES = "report.html", "group_files", 20
JUDGED = {"change": str, "new_words": float, "surprise": float, "natural": float}
SCAN_COLUMNS_0_1_0 = "source_layer target_layer sign radius objective random_objective kl entropy".split()


def forget(folder: Path) -> None:
    """Removes the files of an earlier run, its page and the vectors of its groups from a folder, and no others."""
    for name in left_by_a_run(folder):
        (folder / name).unlink(missing_ok=True)


def left_by_a_run(folder: Path) -> list[str]:
    """The names of the files that an earlier run wrote into a folder; what it says nothing of is the user's own."""
    try:
        said = files.read_json(folder / ABOUT)
        tables = [f"{name}.csv" for name in TABLES if said.get(name) is not None]
        return [*FILES, PAGE, *tables, *map(_group_file, range(1, 1 + int(said.get(GROUP_FILES, 0))))]
    except (OSError, ValueError, AttributeError, TypeError):  # no run wrote here, or none that can be read
        return []


def write_groups(found: Discovery, folder: Path) -> None:
    """Writes the vectors of a search's first groups into its folder, numbered as the page numbers its cards."""
    vectors = [found.vector(row) for row in range(min(len(found.table), MOST_GROUP_FILES))]
    files.write_json(folder / ABOUT, {**files.read_json(folder / ABOUT), GROUP_FILES: len(vectors)})
    for number, vector in enumerate(vectors, 1):
        vector.save(folder / _group_file(number))


def _group_file(number: int) -> str:
    return f"group-{number}.safetensors"


def write(parts: Mapping[str, Any], folder: Path) -> None:
    """Writes a folder, which is made if it is missing; each file is written whole or not at all.

    Nothing is written before all that can be refused was computed. What an earlier run left and this one doesn't have
    is removed.

    Args:
        parts: the fields of `Findings` by name.
        folder: the folder.
    """
    completions, written, calibration, views = (
        parts[name] for name in ("completions", "written", "calibration", "views")
    )
    scanned, judged = parts["scan"], parts["judged"]
    every = _texts(completions, written)
    shown = {name: verdicts(every, how) for name, how in parts["behaviors"].items()}
    tables = {
        "ranking": parts["ranked"],
        "scan": None if scanned is None else scanned.table,
        "groups": parts["groups"],
        "trials": parts["trials"],
    }
    kept = {name: _as_json(table) for name, table in tables.items() if table is not None}
    if scanned is not None:
        kept["scan"]["settings"] = dict(scanned.settings)
    if "groups" in kept:
        kept["groups"]["said"] = parts["said"]
    about = {
        "title": parts["title"],
        "texts_that_show": {name: every[verdict == 1].tolist() for name, verdict in shown.items()},
        "texts_without_verdict": {name: every[verdict.isna()].tolist() for name, verdict in shown.items()},
        "settings": {key: value for key, value in completions.settings.items() if key != "perturbations"},
        "control": parts["control"],
        "coherence": parts["coherence"],
        "calibration": None if calibration is None else vars(calibration),
        **dict.fromkeys(tables),
        **kept,
        "views": None if views is None else views.to_json(),
        "judged": None if judged is None else plain_json(judged.to_dict("list"), "judged"),
        "looks": [[number, one.as_json()] for number, one in parts["looks"].items()],
        "twins": [[number, *counts] for number, counts in parts["twins"].items()],
        "search": plain_json(parts["search"], "search"),
    }
    texts = {
        LINES: completions.to_lines(),
        # texts are quoted, so that a lone carriage return in one of them doesn't end the row
        SHEET: completions.table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC),
        ABOUT: files.json_bytes(about).decode(),
        **({} if written is None else {WRITTEN: json.dumps(written.as_json(), allow_nan=False)}),
        **{f"{name}.csv": table.to_csv(index=False) for name, table in tables.items() if table is not None},
    }
    measured = {f"{name}.safetensors": parts[name] for name in MEASURES if parts[name] is not None}
    files.make_folder(folder)
    for name in {*left_by_a_run(folder)} - {VECTORS, PAGE, *texts, *measured}:
        (folder / name).unlink(missing_ok=True)
    for name, value in {VECTORS: parts["vectors"], **measured}.items():
        value.save(folder / name)
    for name, text in texts.items():
        files.write_text(folder / name, text)


def read(folder: Path) -> dict[str, Any]:
    """Reads the fields of `Findings` from a folder.

    Raises:
        FileNotFoundError: the folder has no vectors or no completions.
        ValueError: a file is damaged.
    """
    lines, sheet = folder / LINES, folder / SHEET
    for name, there in ((VECTORS, (folder / VECTORS).is_file()), (LINES, lines.is_file() or sheet.is_file())):
        if not there:
            raise FileNotFoundError(
                f"{folder} has no {name}: give a folder that `melbo-lens fit` or `save_results` wrote."
            )
    about: Any = files.read_json(folder / ABOUT) if (folder / ABOUT).is_file() else {}
    with _damaged(folder / ABOUT):
        settings = dict(about.get("settings", {}))
    completions, written = _completions(lines, sheet, settings), None
    if (folder / WRITTEN).is_file():
        said = files.read_json(folder / WRITTEN)
        with _damaged(folder / WRITTEN):
            written = Written.of_json(said)
    parts = {
        "vectors": load(folder / VECTORS),
        "completions": completions,
        "written": written,
        **{
            name: kind.load(path)
            for name, kind in MEASURES.items()
            if (path := folder / f"{name}.safetensors").is_file()
        },
    }
    with _damaged(folder / ABOUT):
        return parts | {
            **({"title": str(about["title"])} if "title" in about else {}),
            "behaviors": _behaviors(about, completions, written),
            "control": _numbers(about.get("control")),
            "coherence": _numbers(about.get("coherence")),
            "ranked": _ranking(about, folder / "ranking.csv"),
            "calibration": None if about.get("calibration") is None else Calibration.of_json(about["calibration"]),
            "scan": _scan(about.get("scan")),
            **_groups(about.get("groups")),
            "trials": _trials(about.get("trials")),
            "views": None if about.get("views") is None else TokenView.from_json(about["views"]),
            "judged": None if about.get("judged") is None else pd.DataFrame(about["judged"]).astype(JUDGED),
            "looks": {int(number): Look.of_json(one) for number, one in about.get("looks", [])},
            "twins": {int(number): (int(k), int(n)) for number, k, n in about.get("twins", [])},
            "search": dict(about.get("search", {})),
        }


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Says of every error in what was read that the file is damaged."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its parts are not what a run leaves ({error!r}).") from error


def _as_json(table: pd.DataFrame) -> dict[str, Any]:
    """A table as plain Python values, with None for missing ones."""
    rows = table.astype(object).where(table.notna(), None).to_numpy().tolist()
    return {"columns": list(table.columns), "rows": plain_json(rows, "a table")}


def _texts(completions: Completions, written: Written | None) -> pd.Series:
    """Every text once."""
    every = pd.concat([completions.table.text, *([] if written is None else [written.rows.text])])
    return every.drop_duplicates().reset_index(drop=True)


def _behaviors(about: Mapping[str, Any], completions: Completions, written: Written | None) -> dict[str, KeptVerdicts]:
    """The verdicts of the run: what it wrote and its file doesn't name didn't show the behaviour."""
    everything, unknown = frozenset(_texts(completions, written)), about.get("texts_without_verdict", {})
    return {
        name: KeptVerdicts(frozenset(shown), everything - {*shown, *unknown.get(name, [])})
        for name, shown in about.get("texts_that_show", {}).items()
    }


def _completions(lines: Path, sheet: Path, settings: Mapping[str, Any]) -> Completions:
    """Reads completions, also from the CSV file of version 0.1.0."""
    if not lines.is_file():
        return Completions(table(sheet), settings)
    try:
        return Completions.from_lines(lines.read_text(encoding="utf-8"), settings)
    except ValueError as error:
        raise ValueError(f"{lines} is damaged: {error}.") from error


def _numbers(values: list[float | None] | None) -> list[float] | None:
    return None if values is None else [float(value) for value in _cells(values)]


def _cells(row: list[Any]) -> list[Any]:
    """Turns None, which is how JSON keeps NaN, back into NaN."""
    return [math.nan if value is None else value for value in row]


def _ranking(about: Mapping[str, Any], sheet: Path) -> pd.DataFrame | None:
    if "ranking" not in about:  # version 0.1.0
        return pd.read_csv(sheet) if sheet.is_file() else None
    kept = about["ranking"]
    return None if kept is None else pd.DataFrame([_cells(row) for row in kept["rows"]], columns=kept["columns"])


def _groups(kept: dict[str, Any] | None) -> dict[str, Any]:
    """The groups and what was said of them, as fields of `Findings`."""
    if kept is None:
        return {}
    table = pd.DataFrame(kept["rows"], columns=kept["columns"])
    return {"groups": table.fillna(float("nan")), "said": kept["said"]}


def _trials(kept: dict[str, Any] | None) -> pd.DataFrame | None:
    """The table of trials, or None."""
    return None if kept is None else pd.DataFrame(kept["rows"], columns=kept["columns"])


def _scan(kept: dict[str, Any] | None) -> LayerScan | None:
    """The scan of layers, or None."""
    if kept is None:
        return None
    columns = kept.get("columns", SCAN_COLUMNS_0_1_0)
    return LayerScan(pd.DataFrame([_cells(row) for row in kept["rows"]], columns=columns), kept["settings"])


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
