"""What did one run find?  `Findings` holds the perturbations, the completions under them, and every measure of them.

It is saved as one folder. The JSON and safetensors files in it are read again; the CSV files are for people.
"""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from melbo_lens import files
from melbo_lens.arguments import as_list, plain_json, public
from melbo_lens.evaluation.departures import departures
from melbo_lens.evaluation.rates import Behavior, verdicts
from melbo_lens.generation.completions import Completions
from melbo_lens.measures.changes import ActivationChanges, TargetEffects
from melbo_lens.measures.radius import Calibration
from melbo_lens.models.access import Model, host_of
from melbo_lens.perturbations.loading import load
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.plots import TokenView
from melbo_lens.prompts import Prompts
from melbo_lens.reports import measuring, saved
from melbo_lens.search.discovery import Discovery, gather
from melbo_lens.search.layers import LayerScan
from melbo_lens.search.looks import Look, look
from melbo_lens.search.written import Written
from melbo_lens.sweeps.engines import PLANS, Folder
from melbo_lens.sweeps.sweep import merge
from melbo_lens.sweeps.trials import trial_as

MEASURES = {"changes": ActivationChanges, "effects": TargetEffects}
TITLE = "What the vectors elicit"
WRITTEN = "written.json"
JUDGED = {"change": str, "new_words": float, "surprise": float, "natural": float}
MOST_LOOKS = 12  # groups whose first token and place on the prompt are measured
MOST_DRAWN = 20  # groups whose vectors are in the figures


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
        judged: from `departures`; how each completion departs from the unsteered one.
        written: everything that was written in a search, whose first vectors are `vectors`.
        looks: by the row of a group, how the vector of its example begins and where it acts.
        twins: by the row of a group, in how many of how many completions of a twin it was seen (`Discovery.twins`).
        search: the settings of a search and its plan, in JSON's types; and by trial, vector and sign, which of its
            directions `vectors` are ("shown"), and which were measured ("measured").
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
    judged: pd.DataFrame | None = None
    written: Written | None = None
    looks: Mapping[int, Look] = field(default_factory=dict)
    twins: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("control", "coherence"):
            values = as_list(getattr(self, name))
            object.__setattr__(self, name, None if values is None else [float(value) for value in values])
        object.__setattr__(self, "behaviors", dict(self.behaviors or {}))
        for name, kind in MEASURES.items():
            if not isinstance(getattr(self, name), kind | None):
                raise TypeError(
                    f"{name} is of type {type(getattr(self, name)).__name__}, and a page shows {kind.__name__} there: "
                    f"give what ml.{'target_effects' if name == 'effects' else 'activation_changes'} returns."
                )

    def __repr__(self) -> str:
        optional = "changes effects control ranked calibration scan coherence views groups trials judged".split()
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
        """Takes the measures that a page begins with and returns the findings.

        The measures are the changes on the first prompt, the effects of both signs, the objective of random controls,
        the ranking, how each completion departs from the unsteered one, and a look at the vectors of the first groups.

        Args:
            model, prompts: those with which the vectors were learned.
            vectors, completions, behaviors, title: the fields of `Findings`.
        """
        host = host_of(model)
        judged = departures(host, completions) if (completions.table.kind == "unsteered").any() else None
        measures = measuring.measures(host, prompts, vectors)
        found = cls(vectors, completions, behaviors or {}, title, judged=judged, **measures)
        layer = measures["effects"].target_layer
        looks = {
            number: look(host, measuring.first_of(host, prompts), int(row.sign) * vectors[int(row.vector)], layer)
            for number, row in enumerate(found.everything.groups.head(MOST_LOOKS).itertuples())
        }
        return replace(found, looks=looks)

    @classmethod
    @public
    def of_discovery(
        cls,
        model: Model,
        prompts: Prompts,
        found: Discovery,
        behaviors: Mapping[str, Behavior] | None = None,
        title: str = TITLE,
        twin: Discovery | None = None,
    ) -> "Findings":
        """Takes the measures of a page of a search: of the vectors of its first groups, and the places of all on a map.

        The completions are those of the search. What the vectors change is measured on its first prompt.

        Args:
            model, prompts: those of the search.
            found: the search.
            behaviors, title: the fields of `Findings`.
            twin: a search of a model that hides nothing, with the same plan; the cards show how often each group was
                seen there.
        """
        host = host_of(model)
        first = measuring.first_of(host, prompts)
        kept = cls.of_trials(found, behaviors, title, twin)
        looks = {
            number: look(host, first, found.vector(number), int(row.target_layer))
            for number, row in enumerate(found.table.head(MOST_LOOKS).itertuples())
        }
        written = replace(kept.everything, places=measuring.places(host, first, found))
        chosen = found.directions(MOST_DRAWN) or found.numbers()
        measures = measuring.measures_of_directions(host, prompts, found, chosen)
        return replace(kept, looks=looks, written=written, search={**kept.search, "measured": chosen}, **measures)

    @classmethod
    @public
    def of_trials(
        cls,
        found: Discovery,
        behaviors: Mapping[str, Behavior] | None = None,
        title: str = TITLE,
        twin: Discovery | None = None,
    ) -> "Findings":
        """Takes what a search or a sweep kept: all that was written, and its first vectors (`Discovery.shown`).

        No model runs.

        Args:
            found: from `discover` or `gather`.
            behaviors, title: the fields of `Findings`.
            twin: a search of a model that hides nothing, with the same plan.
        """
        vectors, completions = found.shown(MOST_DRAWN)
        return cls(
            vectors,
            completions,
            behaviors or {},
            title,
            calibration=found.edge,
            groups=found.table,
            said=found.said,
            written=found.written,
            twins={} if twin is None else found.twins(twin, behaviors or {}),
            search={
                "settings": dict(found.settings),
                "plan": [trial_as(trial) for trial in found.plan],
                "shown": found.numbers(MOST_DRAWN),
            },
        )

    @property
    def everything(self) -> Written:
        """All that was written: in the search, or with the vectors alone."""
        if self.written is not None:
            return self.written
        return Written.of_run(self.vectors, self.completions, self.behaviors, self.judged, as_list(self.coherence))

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

        A function can't be saved, so for each behaviour the folder keeps the texts that show it, and those on which a
        judge gave no verdict.

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
        texts = saved.texts(completions, self.written)
        found = {name: verdicts(texts, how) for name, how in self.behaviors.items()}
        about = {
            "title": self.title,
            "texts_that_show": {name: texts[verdict == 1].tolist() for name, verdict in found.items()},
            "texts_without_verdict": {name: texts[verdict.isna()].tolist() for name, verdict in found.items()},
            "settings": {key: value for key, value in completions.settings.items() if key != "perturbations"},
            "control": self.control,
            "coherence": self.coherence,
            "calibration": None if self.calibration is None else vars(self.calibration),
            "scan": None
            if self.scan is None
            else {
                "columns": list(self.scan.table.columns),
                "rows": saved.plain_rows(self.scan.table),
                "settings": dict(self.scan.settings),
            },
            "ranking": None
            if self.ranked is None
            else {"columns": list(self.ranked.columns), "rows": saved.plain_rows(self.ranked)},
            "groups": None
            if self.groups is None
            else {"columns": list(self.groups.columns), "rows": saved.plain_rows(self.groups), "said": self.said},
            "trials": None
            if self.trials is None
            else {"columns": list(self.trials.columns), "rows": saved.plain_rows(self.trials)},
            "views": None if self.views is None else self.views.to_json(),
            "judged": None if self.judged is None else plain_json(self.judged.to_dict("list"), "judged"),
            "looks": [[number, one.as_json()] for number, one in self.looks.items()],
            "twins": [[number, *counts] for number, counts in self.twins.items()],
            "search": plain_json(self.search, "search"),
        }
        files.write_json(folder / "about.json", about)
        if self.written is not None:
            files.write_text(folder / WRITTEN, json.dumps(self.written.as_json(), allow_nan=False))
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
            completions = saved.completions(lines, sheet, about.get("settings", {}))
            written = Written.of_json(files.read_json(folder / WRITTEN)) if (folder / WRITTEN).is_file() else None
            return cls(
                load(folder / "vectors.safetensors"),
                completions,
                behaviors or saved.behaviors(about, completions, written),
                about.get("title", TITLE),
                control=saved.numbers(about.get("control")),
                coherence=saved.numbers(about.get("coherence")),
                ranked=saved.ranking(about.get("ranking"), folder / "ranking.csv"),
                calibration=None if about.get("calibration") is None else Calibration.of_json(about["calibration"]),
                scan=saved.scan(about.get("scan")),
                **saved.groups(about.get("groups")),
                trials=saved.trials(about.get("trials")),
                views=None if about.get("views") is None else TokenView.from_json(about["views"]),
                judged=None if about.get("judged") is None else pd.DataFrame(about["judged"]).astype(JUDGED),
                written=written,
                looks={int(number): Look.of_json(one) for number, one in about.get("looks", [])},
                twins={int(number): (int(k), int(n)) for number, k, n in about.get("twins", [])},
                search=about.get("search", {}),
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
