"""What was written, and with which directions?  One table of completions, one of vectors and one of groups.

A search and a single run have the same tables, so that one page shows both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from melbo_lens.arguments import plain_json
from melbo_lens.evaluation.departures import in_words, shares
from melbo_lens.evaluation.rates import Behavior
from melbo_lens.generation.completions import Completions
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.perturbations.rows import at_the_fit
from melbo_lens.search.groups import grouped, named, ordinary_words

ROWS = "kind trial vector sign scale sample prompt prompt_text text change new_words surprise natural group".split()
PLACES = "trial vector sign x y".split()
UNSTEERED = {"trial": 0, "change": "same", "new_words": 0.0, "surprise": math.nan, "natural": math.nan}


@dataclass(frozen=True, eq=False, repr=False)
class Written:
    """Everything that was written in a search or a run.

    Attributes:
        rows: every completion, those without steering first: kind, trial, vector (NA: unsteered), sign, scale, sample,
            prompt (a number for each different text of a prompt), prompt_text, text, how it departs (change, new_words,
            surprise, natural; see `departures`), and group, a row of `groups` (NA: none).
        directions: every vector: trial, vector, method, source_layer, target_layer, radius, relative_radius, effect,
            and minus_effect, that of minus the vector. What is not known is NaN.
        groups: the table of groups, as `Discovery.table` is one.
        places: of vectors and signs, the point that stands for what each changes in the model: trial, vector, sign, x
            and y; None if that was not measured.
    """

    rows: pd.DataFrame
    directions: pd.DataFrame
    groups: pd.DataFrame
    places: pd.DataFrame | None = None

    @classmethod
    def of_search(
        cls, rows: pd.DataFrame, written: Sequence[Completions], directions: pd.DataFrame, groups: pd.DataFrame
    ) -> "Written":
        """Puts the rows of a search beside its unsteered completions, of which each prompt has one for each sample."""
        plain = pd.concat([one.table[one.table.kind == "unsteered"] for one in written], ignore_index=True)
        plain = plain.drop_duplicates(["prompt_text", "sample"]).assign(**UNSTEERED, group=pd.NA)
        return cls(_tidied(pd.concat([plain[ROWS], rows[ROWS]], ignore_index=True)), directions, groups)

    @classmethod
    def of_run(
        cls,
        vectors: Perturbation,
        completions: Completions,
        behaviors: Mapping[str, Behavior],
        judged: pd.DataFrame | None = None,
        natural: Sequence[float] | None = None,
    ) -> "Written":
        """Groups what was written with the vectors of one run, as a search groups what its trials wrote.

        Args:
            vectors, completions, behaviors: those of the run.
            judged: from `departures`; without it, words alone tell what changed, and nothing is called noise.
            natural: one number for each completion, as from `coherence`, by which noise is told if `judged` is missing.
        """
        table = completions.table.reset_index(drop=True)
        if judged is None:
            judged = in_words(table, None if natural is None else pd.Series(list(natural), index=table.index))
        facts: pd.DataFrame = judged
        rows = table.assign(trial=0).join(facts.reset_index(drop=True))
        steered = rows.kind != "unsteered"
        known, directions = named(rows[steered], behaviors, ordinary_words([table])), _directions(vectors, rows)
        groups = grouped(directions, known)
        numbers = {name: number for number, name in enumerate(groups.group)}
        rows = rows.assign(group=known.group.map(numbers).reindex(rows.index))
        rows.loc[known.index, "change"] = known.change
        rows = rows.sort_values("kind", key=lambda kind: kind != "unsteered", kind="stable")
        return cls(_tidied(rows), directions, groups)

    @property
    def steered(self) -> pd.DataFrame:
        """The completions under learned vectors."""
        return self.rows[self.rows.kind == "steered"]

    @property
    def plain(self) -> dict[tuple[int, int], str]:
        """The unsteered texts by prompt and sample."""
        rows = self.rows[self.rows.kind == "unsteered"]
        return {(row.prompt, row.sample): row.text for row in rows.itertuples()}

    @property
    def judged(self) -> bool:
        """Whether a model judged the texts, so that noise can be told."""
        return bool(self.steered.natural.notna().any())

    @property
    def shares(self) -> dict[str, float]:
        """The share of directions that do nothing, change the wording, the content, or write noise."""
        return shares(self.rows)

    def as_json(self) -> dict[str, Any]:
        """Describes the tables in JSON's types, column by column; `of_json` makes them again."""
        tables = {"rows": self.rows, "directions": self.directions, "groups": self.groups, "places": self.places}
        return {name: None if table is None else _columns(table) for name, table in tables.items()}

    @classmethod
    def of_json(cls, said: Mapping[str, Any]) -> "Written":
        """Makes what `as_json` described.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        tables = {name: _table(said[name]) for name in ("rows", "directions", "groups")}
        places = None if said["places"] is None else _table(said["places"])[PLACES]
        directions = tables["directions"]
        if "minus_effect" not in directions:  # a page of before these were measured
            directions["minus_effect"] = math.nan
        return cls(_tidied(tables["rows"]), directions, tables["groups"], places)


def _tidied(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows[ROWS].astype({"vector": "Int64", "group": "Int64", "trial": int, "sign": int, "sample": int})
    return rows.assign(prompt=pd.factorize(rows.prompt_text)[0]).reset_index(drop=True)


def _directions(vectors: Perturbation, rows: pd.DataFrame) -> pd.DataFrame:
    """The facts of the vectors of a run, as far as their provenance knows them."""
    known, n = vectors.provenance, len(vectors)
    numbers = max(n, int(rows.vector.max(skipna=True)) + 1 if rows.vector.notna().any() else 0)
    radii = vectors.measures().get("radius", [math.nan] * n)
    objective = vectors.objective
    target = math.nan if objective is None or objective.target_layer is None else objective.target_layer
    table = pd.DataFrame(index=range(numbers))
    table["trial"], table["vector"] = 0, range(numbers)
    table["method"] = str(known.get("method", type(vectors).__name__))
    table["source_layer"], table["target_layer"] = min(vectors.source_layers), target
    table["radius"] = pd.Series(radii, dtype=float)
    table["relative_radius"] = table.radius / float(known.get("stream_norm") or math.nan)
    for name, sign in (("effect", 1), ("minus_effect", -1)):
        table[name] = pd.Series(at_the_fit(known, n, sign)[0], dtype=float)
    return table


def _columns(table: pd.DataFrame) -> dict[str, list[Any]]:
    found = {}
    for name, column in table.items():
        values = column.astype(object).where(column.notna(), None)
        found[str(name)] = plain_json(values.tolist(), "a table")
    return found


def _table(columns: Mapping[str, list[Any]]) -> pd.DataFrame:
    return pd.DataFrame(dict(columns)).replace({None: np.nan}).infer_objects()
