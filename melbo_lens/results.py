"""How is a run kept in a folder, so that its page can be written again without the model?"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from melbo_lens import files
from melbo_lens.completions import Completions
from melbo_lens.differences import ActivationChanges, TargetEffects
from melbo_lens.evaluation import Behavior, shows
from melbo_lens.page import report
from melbo_lens.serialization import load


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
) -> Path:
    """Writes vectors, completions, measurements and the page that shows them to a folder, which is made if missing.

    Args:
        directory: where to write.
        vectors, completions, behaviors, title, changes, effects, control, ranked: as in `report`. Of the behaviours those texts are kept that
            show them, since a function can't be.

    Returns:
        The page.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    vectors.save(folder / "vectors.safetensors")
    completions.table.to_csv(folder / "completions.csv", index=False)
    texts = completions.table.text.drop_duplicates()
    shown = {name: texts[shows(texts, behavior).to_numpy(dtype=bool)].tolist() for name, behavior in (behaviors or {}).items()}
    about = {
        "title": title,
        "texts_that_show": shown,
        "settings": {key: value for key, value in completions.settings.items() if key != "perturbations"},
        "control": None if control is None else [float(value) for value in control],
    }
    files.write_atomically(folder / "about.json", json.dumps(about, indent=1).encode())
    for name, measured in (("changes", changes), ("effects", effects)):
        if measured is not None:
            measured.save(folder / f"{name}.safetensors")
    if ranked is not None:
        ranked.to_csv(folder / "ranking.csv", index=False)
    return report_directory(folder)


def report_directory(directory: str | os.PathLike[str], behaviors: Mapping[str, Behavior] | None = None, path: Any = None) -> Path:
    """Writes the page of a folder again, from the files in it.

    Args:
        directory: a folder with `vectors.safetensors` and `completions.csv`, as `melbo-lens fit` or `save_results` leave it.
        behaviors: other behaviours to count instead of those of the run.
        path: the page; `report.html` in the folder by default.

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: a file is damaged.
    """
    folder = Path(directory)
    for name in ("vectors.safetensors", "completions.csv"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: give a folder that `melbo-lens fit` or `save_results` wrote.")
    about = json.loads((folder / "about.json").read_text()) if (folder / "about.json").is_file() else {}
    kept = {name: frozenset(texts).__contains__ for name, texts in about.get("texts_that_show", {}).items()}
    return report(
        load(folder / "vectors.safetensors"),
        Completions(_table(folder / "completions.csv"), about.get("settings", {})),
        behaviors or kept,
        folder / "report.html" if path is None else path,
        about.get("title", "What the vectors elicit"),
        changes=ActivationChanges.load(folder / "changes.safetensors") if (folder / "changes.safetensors").is_file() else None,
        effects=TargetEffects.load(folder / "effects.safetensors") if (folder / "effects.safetensors").is_file() else None,
        control=about.get("control"),
        ranked=pd.read_csv(folder / "ranking.csv") if (folder / "ranking.csv").is_file() else None,
    )


def _table(path: Path) -> pd.DataFrame:
    """Completions as they were before they became a CSV file."""
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype={"text": str, "prompt_text": str}, na_values={"vector": [""]})
        return table.astype({"vector": "Int64"}).assign(tokens=table.tokens.map(json.loads), log_probs=table.log_probs.map(json.loads))
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is damaged, it holds no table of completions ({error}).") from error
