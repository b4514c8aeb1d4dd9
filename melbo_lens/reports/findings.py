"""What did one run find?  `Findings` holds the perturbations, the completions under them, and every measure of them.

It is saved as one folder. The JSON and safetensors files in it are read again; the CSV files are for people.
"""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from melbo_lens import files
from melbo_lens.arguments import as_list, plain_json, public
from melbo_lens.ascent.objectives import Objective
from melbo_lens.evaluation.rates import Behavior, shows
from melbo_lens.generation.completions import Completions
from melbo_lens.generation.generate import generate
from melbo_lens.measures.changes import ActivationChanges, TargetEffects, activation_changes, objective, target_effects
from melbo_lens.measures.controls import random_like
from melbo_lens.measures.output import output_effects
from melbo_lens.measures.radius import Calibration
from melbo_lens.measures.ranking import rank
from melbo_lens.models.access import Model, host_of
from melbo_lens.perturbations.loading import load
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.plots import TokenView
from melbo_lens.prompts import Prompts, tokenize
from melbo_lens.search.discovery import Discovery, gather
from melbo_lens.search.layers import LayerScan
from melbo_lens.sweeps.engines import PLANS, Folder
from melbo_lens.sweeps.sweep import merge

MEASURES = {"changes": ActivationChanges, "effects": TargetEffects}
TITLE = "What the vectors elicit"
SCAN_COLUMNS_0_1_0 = "source_layer target_layer sign radius objective random_objective kl entropy".split()


@dataclass(frozen=True, eq=False, repr=False)
class Findings:
    """What one run found: `report` shows it and `save` writes it to a folder. A measure that was not taken is None.

    Attributes:
        vectors: the learned perturbations.
        completions: from `generate`.
        behaviors: name -> regular expression or function of the text.
        title: the heading of the page.
        changes: from `activation_changes`; they show where on the prompt the vectors act.
        effects: from `target_effects`; they show which vectors do the same.
        control: the objectives of random vectors of the same norms, from `objective`.
        ranked: from `rank`; it has the KL divergence of each vector and sign.
        calibration, scan: how the radius and the layers were chosen.
        coherence: one number for each completion, from `coherence`; it is shown if there are several scales.
        views: more token views, as from `plots.token_log_probs`.
        groups, said: the table of a search, and what it says of all its directions.
        trials: from `merge`; what each trial of a sweep gave, or why it failed.
    """

    vectors: Perturbation
    completions: Completions
    behaviors: Mapping[str, Behavior] = field(default_factory=dict)
    title: str = TITLE
    changes: ActivationChanges | None = None
    effects: TargetEffects | None = None
    control: Sequence[float] | Tensor | None = None
    ranked: pd.DataFrame | None = None
    calibration: Calibration | None = None
    scan: LayerScan | None = None
    coherence: Sequence[float] | Tensor | None = None
    views: TokenView | None = None
    groups: pd.DataFrame | None = None
    said: str = ""
    trials: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        for name in ("control", "coherence"):
            values = as_list(getattr(self, name))
            object.__setattr__(self, name, None if values is None else [float(value) for value in values])
        object.__setattr__(self, "behaviors", dict(self.behaviors or {}))

    def __repr__(self) -> str:
        optional = "changes effects control ranked calibration scan coherence views groups trials".split()
        measured = [name for name in optional if getattr(self, name) is not None]
        return f"Findings({self.vectors!r}, {self.completions!r}, with {', '.join(measured) or 'no measures'})"

    @classmethod
    @public
    def measured(
        cls,
        model: Model,
        prompts: Prompts,
        vectors: Perturbation,
        completions: Completions,
        behaviors: Mapping[str, Behavior] | None = None,
        title: str = TITLE,
    ) -> "Findings":
        """Takes the four measures that a page begins with and returns the findings.

        The measures are the changes on the first prompt, the effects of both signs, the objective of random controls,
        and the ranking.

        Args:
            model, prompts: those with which the vectors were learned.
            vectors, completions, behaviors, title: the fields of `Findings`.
        """
        host = host_of(model)
        batch = tokenize(host, prompts, (vectors.objective or Objective()).target_positions)
        first = batch.tokens[:1, : int(batch.lengths[0])]
        return cls(
            vectors,
            completions,
            behaviors or {},
            title,
            activation_changes(host, first, vectors),
            target_effects(host, batch, vectors, target_positions=batch.positions, signs=(1, -1)),
            objective(host, batch, random_like(vectors, host, batch)),
            rank(vectors, output_effects(host, batch, vectors)),
        )

    @classmethod
    @public
    def of_discovery(
        cls,
        model: Model,
        prompts: Prompts,
        found: Discovery,
        behaviors: Mapping[str, Behavior] | None = None,
        title: str = TITLE,
    ) -> "Findings":
        """Takes the measures of a page of the vectors of a search's first groups (`Discovery.first`).

        The model writes under them again, with both signs, random vectors of equal norms, and unsteered.

        Args:
            model, prompts: those of the search.
            found: the search.
            behaviors, title: the fields of `Findings`.
        """
        host = host_of(model)
        vectors = found.first()
        completions = generate(
            host, prompts, vectors, found.settings.get("max_new_tokens", 24), seed=found.settings.get("seed", 0)
        )
        measured = cls.measured(host, prompts, vectors, completions, behaviors, title)
        return replace(measured, groups=found.table, said=found.said, calibration=found.edge)

    @classmethod
    @public
    def of_trials(
        cls, found: Discovery, behaviors: Mapping[str, Behavior] | None = None, title: str = TITLE
    ) -> "Findings":
        """Takes what a search or a sweep kept of the vectors of its first groups (`Discovery.shown`); no model runs.

        Args:
            found: from `discover` or `gather`.
            behaviors, title: the fields of `Findings`.
        """
        vectors, completions = found.shown()
        return cls(
            vectors, completions, behaviors or {}, title, calibration=found.edge, groups=found.table, said=found.said
        )

    @classmethod
    @public
    def of_sweep(
        cls,
        directories: Folder | Sequence[Folder],
        behaviors: Mapping[str, Behavior] | None = None,
        title: str = TITLE,
    ) -> "Findings":
        """Reads what the trials of sweeps found (`gather`), with the table of all of them (`merge`); no model runs.

        Args:
            directories: the folder of a sweep or a search, or several folders of one model.
            behaviors, title: the fields of `Findings`.

        Raises:
            ValueError: no trial is finished, or the folders are of several models.
        """
        return replace(cls.of_trials(gather(directories, behaviors), behaviors, title), trials=merge(directories))

    @public
    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes a folder, which is made if it is missing; each file is written whole or not at all.

        A function can't be saved, so for each behaviour the folder keeps the texts that show it.

        Args:
            directory: the folder.
        """
        folder, completions = Path(directory), self.completions
        folder.mkdir(parents=True, exist_ok=True)
        self.vectors.save(folder / "vectors.safetensors")
        files.write_text(folder / "completions.jsonl", completions.to_lines())
        # texts are quoted, so that a lone carriage return in one of them doesn't end the row
        files.write_text(
            folder / "completions.csv", completions.table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC)
        )
        texts = completions.table.text.drop_duplicates()
        about = {
            "title": self.title,
            "texts_that_show": {
                name: texts[shows(texts, how).to_numpy(dtype=bool)].tolist() for name, how in self.behaviors.items()
            },
            "settings": {key: value for key, value in completions.settings.items() if key != "perturbations"},
            "control": self.control,
            "coherence": self.coherence,
            "calibration": None if self.calibration is None else vars(self.calibration),
            "scan": None
            if self.scan is None
            else {
                "columns": list(self.scan.table.columns),
                "rows": _plain_rows(self.scan.table),
                "settings": dict(self.scan.settings),
            },
            "ranking": None
            if self.ranked is None
            else {"columns": list(self.ranked.columns), "rows": _plain_rows(self.ranked)},
            "groups": None
            if self.groups is None
            else {"columns": list(self.groups.columns), "rows": _plain_rows(self.groups), "said": self.said},
            "trials": None
            if self.trials is None
            else {"columns": list(self.trials.columns), "rows": _plain_rows(self.trials)},
            "views": None if self.views is None else self.views.to_json(),
        }
        files.write_json(folder / "about.json", about)
        for name in MEASURES:
            if (value := getattr(self, name)) is not None:
                value.save(folder / f"{name}.safetensors")
        for name, table in (
            ("ranking", self.ranked),
            ("scan", None if self.scan is None else self.scan.table),
            ("groups", self.groups),
            ("trials", self.trials),
        ):
            if table is not None:
                files.write_text(folder / f"{name}.csv", table.to_csv(index=False))

    @classmethod
    @public
    def load(cls, directory: str | os.PathLike[str], behaviors: Mapping[str, Behavior] | None = None) -> "Findings":
        """Reads a folder that `save` wrote, also one of version 0.1.0, or the folder of a sweep or a search.

        Args:
            directory: a folder with `vectors.safetensors` and `completions.jsonl` (or `completions.csv`, in 0.1.0), or
                a folder that `sweep` or `discover` kept its trials in (see `of_sweep`).
            behaviors: replaces the behaviours of the run.

        Raises:
            FileNotFoundError: the folder lacks one of the two files.
            ValueError: a file is damaged, or no trial of a sweep is finished.
        """
        folder = Path(directory)
        if (folder / PLANS).is_dir() and not (folder / "vectors.safetensors").is_file():
            return cls.of_sweep(folder, behaviors, f"What the trials in {folder.name} found")
        lines, sheet = folder / "completions.jsonl", folder / "completions.csv"
        for name, there in (
            ("vectors.safetensors", (folder / "vectors.safetensors").is_file()),
            (lines.name, lines.is_file() or sheet.is_file()),
        ):
            if not there:
                raise FileNotFoundError(
                    f"{folder} has no {name}: give a folder that `melbo-lens fit` or `save_results` wrote."
                )
        about = files.read_json(folder / "about.json") if (folder / "about.json").is_file() else {}
        try:
            kept = {name: frozenset(texts).__contains__ for name, texts in about.get("texts_that_show", {}).items()}
            return cls(
                load(folder / "vectors.safetensors"),
                _completions(lines, sheet, about.get("settings", {})),
                behaviors or kept,
                about.get("title", TITLE),
                control=_numbers(about.get("control")),
                coherence=_numbers(about.get("coherence")),
                ranked=_ranking(about.get("ranking"), folder / "ranking.csv"),
                calibration=None if about.get("calibration") is None else Calibration.of_json(about["calibration"]),
                scan=_scan(about.get("scan")),
                **_groups(about.get("groups")),
                trials=_trials(about.get("trials")),
                views=None if about.get("views") is None else TokenView.from_json(about["views"]),
                **{
                    name: kind.load(path)
                    for name, kind in MEASURES.items()
                    if (path := folder / f"{name}.safetensors").is_file()
                },
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder / 'about.json'} is damaged: its parts are not what a run leaves ({error!r})."
            ) from error


def _plain_rows(table: pd.DataFrame) -> list[list[Any]]:
    """Returns the cells of a table as plain Python values, with None for missing ones."""
    return plain_json(table.astype(object).where(table.notna(), None).to_numpy().tolist(), "a table")


def _completions(lines: Path, sheet: Path, settings: Mapping[str, Any]) -> Completions:
    if not lines.is_file():
        return Completions(_table(sheet), settings)
    try:
        return Completions.from_lines(lines.read_text(encoding="utf-8"), settings)
    except ValueError as error:
        raise ValueError(f"{lines} is damaged: {error}.") from error


def _numbers(values: list[float | None] | None) -> list[float] | None:
    """Turns None, which is how JSON keeps NaN, back into NaN."""
    return None if values is None else [math.nan if value is None else value for value in values]


def _ranking(kept: dict[str, Any] | None, sheet: Path) -> pd.DataFrame | None:
    if kept is not None:
        return pd.DataFrame([_numbers(row) for row in kept["rows"]], columns=kept["columns"])
    return pd.read_csv(sheet) if sheet.is_file() else None  # version 0.1.0


def _groups(kept: dict[str, Any] | None) -> dict[str, Any]:
    if kept is None:
        return {}
    table = pd.DataFrame(kept["rows"], columns=kept["columns"])
    return {"groups": table.fillna(float("nan")), "said": kept["said"]}


def _trials(kept: dict[str, Any] | None) -> pd.DataFrame | None:
    return None if kept is None else pd.DataFrame(kept["rows"], columns=kept["columns"])


def _scan(kept: dict[str, Any] | None) -> LayerScan | None:
    if kept is None:
        return None
    columns = kept.get("columns", SCAN_COLUMNS_0_1_0)
    return LayerScan(pd.DataFrame([_numbers(row) for row in kept["rows"]], columns=columns), kept["settings"])


def _table(path: Path) -> pd.DataFrame:
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
