"""What did one run find?  `Findings` holds the perturbations, the completions under them, and every measure of them.

`saved` keeps it in one folder.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from melbo_lens.arguments import as_list, public
from melbo_lens.evaluation.departures import departures
from melbo_lens.evaluation.rates import Behavior, check_kinds
from melbo_lens.generation.completions import Completions
from melbo_lens.measures.changes import ActivationChanges, TargetEffects
from melbo_lens.measures.radius import Calibration
from melbo_lens.models.access import Model, host_of
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

TITLE = "What the vectors elicit"
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
        behaviors = {} if self.behaviors is None else self.behaviors
        check_kinds(behaviors)
        object.__setattr__(self, "behaviors", dict(behaviors))
        for name, kind in saved.MEASURES.items():
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
        check_kinds(behaviors or {})
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

        Files that an earlier `save` left there and these findings don't have are removed. A function can't be saved,
        so for each behaviour the folder keeps the texts that show it, and those on which a judge gave no verdict.

        Args:
            directory: the folder.
        """
        saved.write(vars(self), Path(directory))

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
        parts = saved.read(folder)
        return cls(**{**parts, "behaviors": parts["behaviors"] if behaviors is None else behaviors})
