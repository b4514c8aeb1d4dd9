"""What did a search find?  Groups of completions, each with the vectors that wrote it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch

from melbo_lens.arguments import count, plain, public
from melbo_lens.evaluation.departures import shares
from melbo_lens.evaluation.rates import Behavior, check_behaviors, shows
from melbo_lens.generation.completions import Completions
from melbo_lens.measures.radius import Calibration
from melbo_lens.perturbations.perturbation import Perturbation, concatenate
from melbo_lens.search.cards import cards_of, in_a_notebook, of_several
from melbo_lens.search.groups import alike, collected, directions_of, grouped, named, ordinary_words
from melbo_lens.search.written import Written
from melbo_lens.sweeps.engines import Folder
from melbo_lens.sweeps.outcomes import Outcome, all_of
from melbo_lens.sweeps.sweep import folders_of, model_of
from melbo_lens.sweeps.trials import AnyTrial

KINDS_IN_ORDER = ["unsteered", "steered", "random"]
MOST_IN_NOTEBOOK = 12  # cards


@dataclass(frozen=True, eq=False, repr=False)
class Discovery:
    """The result of a search.

    Attributes:
        table: one row for each group of readable completions that differ from the unsteered ones, ranked by its score:
            group, behavior (its name, if behaviours were given), change ("content" or "wording", see `departures`),
            example, method, source_layer, target_layer, radius, relative_radius (as a share of the stream's median
            norm), effect (``||change|| / ||target||`` of the vector with its sign, at the fit), vector (the number,
            within its trial, of the vector that elicits the group most), sign, rate (of that vector on the prompts),
            heldout_rate, random_rate, n_vectors (how many vectors elicit it), of the example natural and surprise
            (nats), score, and trial (the number of its trial in `plan`, `vectors` and `completions`).
        shares: the share of all directions, vectors with a sign, that do nothing (no completion changed), and of those
            that change the wording, the content, or write noise.
        rows: every completion but the unsteered ones, with the number of its trial, how it departs, and its group,
            which is a row of the table (NA: none).
        plan: the trials that were completed; `discover(..., plan=found.plan)` repeats them exactly.
        vectors: the vectors or adapters of each trial.
        completions: the completions of each trial.
        settings: the settings of the search, the seconds that it took, and for each trial those after which it ended;
            and "memory", what a trial was predicted to hold.
        edge: the edge of readability around which the radii lie; None if a plan was given.
    """

    table: pd.DataFrame
    shares: Mapping[str, float]
    rows: pd.DataFrame
    plan: tuple[AnyTrial, ...]
    vectors: tuple[Perturbation, ...]
    completions: tuple[Completions, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    edge: Calibration | None = None

    @classmethod
    def of(
        cls,
        outcomes: Sequence[Outcome],
        behaviors: Mapping[str, Behavior] | None = None,
        edge: Calibration | None = None,
    ) -> "Discovery":
        """Groups what trials found.

        Args:
            outcomes: the outcomes of trials that succeeded, at least one.
            behaviors: as in `discover`.
            edge: the edge around which the radii lie, if there is one.
        """
        done = [one.job.trial for one in outcomes]
        fitted, written, judged = (
            [getattr(one, name) for one in outcomes] for name in ("learned", "completions", "judged")
        )
        rows = named(collected(written, judged), behaviors or {}, ordinary_words(one.table for one in written))
        table = grouped(directions_of(done, fitted), rows)
        numbers = {name: number for number, name in enumerate(table.group)}
        rows = rows.drop(columns="behavior").assign(group=rows.group.map(numbers).astype("Int64"))
        return cls(table, shares(rows), rows, tuple(done), tuple(fitted), tuple(written), {}, edge)

    def vector(self, row: int) -> Perturbation:
        """The vector or adapter of a row of the table, with its sign, ready to steer with.

        Args:
            row: the number of the row, from 0.

        Raises:
            IndexError: the table has no such row.
        """
        row = plain(row)
        if isinstance(row, bool) or not isinstance(row, int) or not -len(self.table) <= row < len(self.table):
            raise IndexError(f"row={row} must be one of the {len(self.table)} rows of the table, from 0.")
        entry = self.table.iloc[row]
        return self._direction(int(entry.trial), int(entry.vector), int(entry.sign))

    def first(self, n: int = 20) -> Perturbation:
        """The vectors of the first groups, with their signs, of the layer and form to which the most of them belong.

        They can stand side by side, in one `generate` or on one page; `vector` gives the others.

        Args:
            n: how many of the first groups to take.

        Raises:
            ValueError: the search found no group.
        """
        count("n", n)
        if self.table.empty:
            raise ValueError(f"there is no vector to choose: {self.said}.")
        return self._vectors(self._first(n))

    def shown(self, n: int = 20) -> tuple[Perturbation, Completions]:
        """The vectors of `first` and what was written with them in their trials, without the model.

        The completions have both signs, the random vectors that stand beside these, and each prompt once unsteered.
        Their column `vector` numbers the chosen vectors, and `prompt` the different prompts of all trials. If the
        search found no group, the vectors are those of its first trial.
        """
        count("n", n)
        chosen = self.numbers(n)
        parts: list[pd.DataFrame] = []
        for number, (trial, vector, sign) in enumerate(chosen):
            table = _with_ids(self.completions[trial])
            mine = table[(table.vector == vector).fillna(False)]
            parts += [table[table.kind == "unsteered"], mine.assign(vector=number, sign=mine.sign * sign)]
        return self._vectors(chosen), _side_by_side(parts, self.completions[chosen[0][0]].settings)

    def numbers(self, n: int = 20) -> list[tuple[int, int, int]]:
        """The trial, vector and sign of each of the vectors of `shown`."""
        return [(0, vector, 1) for vector in range(len(self.vectors[0]))] if self.table.empty else self._first(n)

    def directions(self, n: int = 20) -> list[tuple[int, int, int]]:
        """The trial, vector and sign that wrote the example of each of the first groups, in their order, each once."""
        rows = self.table.head(n).itertuples()
        return list(dict.fromkeys((int(row.trial), int(row.vector), int(row.sign)) for row in rows))

    def _first(self, n: int) -> list[tuple[int, int, int]]:
        """The trial, vector and sign of the first groups whose vectors have the commonest form among them."""
        rows = [(int(row.trial), int(row.vector), int(row.sign)) for row in self.table.head(n).itertuples()]
        return [rows[place] for place in max(self._by_form(rows), key=len)]

    def together(self, chosen: Sequence[tuple[int, int, int]]) -> Iterator[tuple[list[int], Perturbation]]:
        """Joins chosen directions as far as they can stand side by side, so that each form needs one pass.

        Args:
            chosen: a trial, a vector and a sign each.

        Yields:
            For each form the places of its directions among the chosen, and these, joined in that order.
        """
        for places in self._by_form(chosen):
            yield places, self._vectors([chosen[place] for place in places])

    def _by_form(self, chosen: Sequence[tuple[int, int, int]]) -> list[list[int]]:
        """The places of chosen directions, apart by form, in the order in which the forms come."""
        found: dict[tuple[Any, ...], list[int]] = {}
        for place, (trial, vector, _) in enumerate(chosen):
            found.setdefault(_form(self.vectors[trial][vector]), []).append(place)
        return list(found.values())

    def _direction(self, trial: int, vector: int, sign: int) -> Perturbation:
        found = self.vectors[trial][vector]
        return found if sign > 0 else -found  # as it was learned, it keeps its history

    def _vectors(self, chosen: Sequence[tuple[int, int, int]]) -> Perturbation:
        """Joins chosen vectors, given by trial, vector and sign."""
        found = [self._direction(*one) for one in chosen]
        longest = max(len(one.history) for one in found)
        return concatenate([_lengthened(one, longest) for one in found])

    def joined(
        self, source_layer: int, target_layer: int | None = None, method: str | None = None
    ) -> tuple[Perturbation, Completions]:
        """All vectors of the trials at one source layer (and target layer and method, if given), and their completions.

        The column `vector` of the completions numbers the joined vectors, and `prompt` the different prompts.

        Args:
            source_layer: where the vectors act.
            target_layer: the target of the trials; None takes all.
            method: the method of the trials, as in the column; None takes all.

        Returns:
            The vectors, and the completions that were written with them.

        Raises:
            ValueError: no trial was at these layers, or vectors and adapters of several forms were.
        """
        chosen = [
            i
            for i, t in enumerate(self.plan)
            if t.source_layer == source_layer and target_layer in (None, t.target_layer) and method in (None, t.method)
        ]
        if not chosen:
            rows = sorted({(trial.source_layer, trial.target_layer, trial.method) for trial in self.plan})
            raise ValueError(
                f"no trial has source_layer={source_layer}, target_layer={target_layer}, method={method!r}: choose "
                f"from {rows}."
            )
        if len({_form(self.vectors[i]) for i in chosen}) > 1:
            raise ValueError(
                f"the trials at source_layer={source_layer} learned vectors and adapters of several forms: name one of "
                f"the methods {sorted({self.plan[i].method for i in chosen})}."
            )
        longest = max(len(self.vectors[i].history) for i in chosen)
        tables, first = list[pd.DataFrame](), 0
        for i in chosen:
            table = _with_ids(self.completions[i])
            tables.append(table.assign(vector=table.vector + first))
            first += len(self.vectors[i])
        vectors = concatenate([_lengthened(self.vectors[i], longest) for i in chosen])
        return vectors, _side_by_side(tables, self.completions[chosen[0]].settings)

    def __repr__(self) -> str:
        return f"Discovery({len(self.table)} groups from {len(self.plan)} trials; {self.said})"

    @property
    def said(self) -> str:
        """What the directions do, in a sentence."""
        parts = {name: f"{share:.0%}" for name, share in self.shares.items()}
        return (
            f"of the directions {parts['nothing']} do nothing, {parts['wording']} change the wording, "
            f"{parts['content']} the content, and {parts['noise']} write noise"
        )

    @property
    def ordinary(self) -> set[str]:
        """The words that counted less when completions were grouped."""
        return ordinary_words(one.table for one in self.completions)

    @property
    def written(self) -> Written:
        """Every completion with every vector, as a page shows them."""
        return Written.of_search(self.rows, self.completions, directions_of(self.plan, self.vectors), self.table)

    def twins(self, twin: "Discovery", behaviors: Mapping[str, Behavior]) -> dict[int, tuple[int, int]]:
        """Counts each group among what was written with the learned vectors of a model that hides nothing.

        As in the search itself, a text that no vector changed is of no group, and noise is of none that has no name.

        Args:
            twin: a search of that model, with the plan of this one.
            behaviors: those with which this search was grouped.

        Returns:
            By the row of a group: in how many of how many completions it was seen.

        Raises:
            ValueError: a behaviour of this search is missing.
        """
        missing = sorted({*self.table.behavior} - {"", *behaviors})
        if missing:
            raise ValueError(f"groups of this search show {missing}: give the behaviours with which it was made.")
        steered = twin.rows[twin.rows.kind == "steered"]
        changed, by_name = steered[steered.change != "same"], dict[str, int]()
        for name, behavior in behaviors.items():
            shown = shows(changed.text, behavior)
            by_name[name], changed = int(shown.sum()), changed[~shown]
        counts = changed.text[changed.change != "noise"].value_counts()
        by_words = alike(self.table.example.tolist(), counts.index.tolist(), self.ordinary)
        seen = (by_words.double() @ torch.tensor(counts.to_numpy(), dtype=torch.float64, device="cpu")).tolist()
        return {
            number: (by_name[name] if name else int(seen[number]), len(steered))
            for number, name in enumerate(self.table.behavior)
        }

    def _repr_html_(self) -> str:
        written = self.written
        cards = cards_of(written, most=MOST_IN_NOTEBOOK)
        return in_a_notebook(repr(self), cards, len(self.table), of_several(written.directions))


@public
def gather(directories: Folder | Sequence[Folder], behaviors: Mapping[str, Behavior] | None = None) -> Discovery:
    """Groups what the trials of sweeps found, together, without the model.

    Args:
        directories: the folder of a sweep, a search or both, or several folders of one model.
        behaviors: as in `discover`.

    Returns:
        The groups with their vectors, ranked as those of a search. A trial that is in several folders counts once.

    Raises:
        ValueError: no trial is finished, or the folders are of several models.

    Warns:
        UserWarning: a file is damaged; it is left out.
    """
    check_behaviors(behaviors or {})
    folders = folders_of(directories)
    if len({model_of(folder) for folder in folders} - {None}) > 1:
        raise ValueError(f"{', '.join(map(str, folders))} are of several models: gather those of one.")
    found = {one.digest: one for folder in folders for one in all_of(folder) if one.failure is None}
    if not found:
        raise ValueError(
            f"no trial is finished in {', '.join(map(str, folders))}: run the sweep, or look at its status."
        )
    outcomes = [found[digest] for digest in sorted(found)]
    asked = [{name: getattr(one.job, name) for name in ("target_positions", "max_new_tokens")} for one in outcomes]
    agreed = {name: value for name, value in asked[0].items() if all(one[name] == value for one in asked)}
    return replace(Discovery.of(outcomes, behaviors), settings=agreed)


def _with_ids(written: Completions) -> pd.DataFrame:
    """The table of completions, with the ids of each prompt in a column."""
    known = [()] * len(written) if written.prompt_tokens is None else written.prompt_tokens
    return written.table.assign(known=known)


def _side_by_side(parts: Sequence[pd.DataFrame], settings: Mapping[str, Any]) -> Completions:
    """Joins completions of several trials, whose prompts may differ; each prompt is there once unsteered."""
    table = pd.concat(parts, ignore_index=True).astype({"vector": "Int64"})
    again = table.kind.eq("unsteered") & table.duplicated(["kind", "prompt_text", "sample"])
    table = table[~again].sort_values("kind", key=lambda kind: kind.map(KINDS_IN_ORDER.index), kind="stable")
    table = table.assign(prompt=pd.factorize(table.prompt_text)[0]).reset_index(drop=True)
    ids = tuple(map(tuple, table.pop("known")))
    return Completions(table, settings, ids if all(ids) else None)


def _form(vectors: Perturbation) -> tuple[Any, ...]:
    """Returns what vectors or adapters must have in common to stand side by side."""
    tensors, _ = vectors.parts()
    shapes = [(name, tuple(x.shape[1:])) for name, x in sorted(tensors.items()) if name not in ("history", "targets")]
    return type(vectors).__name__, getattr(vectors, "site", None), vectors.source_layers, tuple(shapes)


def _lengthened(vectors: Perturbation, n_rows: int) -> Perturbation:
    """Repeats the last row of a history that settled early, so that histories can stand side by side."""
    last = vectors.history[-1:] if len(vectors.history) else vectors.history.new_full((1, len(vectors)), float("nan"))
    history = torch.cat([vectors.history, last.expand(n_rows - len(vectors.history), -1)])
    tensors, header = vectors.parts()
    return type(vectors).of_parts({**tensors, "history": history}, header, vectors.provenance)
