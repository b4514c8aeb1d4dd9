"""What does an unknown model hide?  A search of layers and radii within a time budget finds groups of completions."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import methodcaller
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from melbo_lens.arguments import public
from melbo_lens.ascent.objectives import positions_text
from melbo_lens.evaluation.departures import shares
from melbo_lens.evaluation.rates import Behavior
from melbo_lens.generation.completions import Completions
from melbo_lens.measures.radius import Calibration
from melbo_lens.methods.planning import plan_memory
from melbo_lens.perturbations.perturbation import Perturbation, concatenate
from melbo_lens.progress import Progress
from melbo_lens.prompts import AsPrompts, Positions, PromptBatch, Prompts, as_list
from melbo_lens.search.arms import Method, arms_of, check_methods
from melbo_lens.search.cards import cards_of, in_a_notebook, of_several
from melbo_lens.search.groups import HeldoutTask, collected, directions_of, grouped, heldout_rate, named
from melbo_lens.search.pace import MARGIN
from melbo_lens.search.searching import Search, as_planned, in_rounds
from melbo_lens.search.written import Written
from melbo_lens.sweeps.engines import Engine, Folder, Where, engine_for
from melbo_lens.sweeps.jobs import Loadable
from melbo_lens.sweeps.outcomes import Outcome, all_of
from melbo_lens.sweeps.sweep import folders_of, model_of
from melbo_lens.sweeps.tasks import Bench
from melbo_lens.sweeps.trials import AnyTrial

KINDS_IN_ORDER = ["unsteered", "steered", "random"]
MOST_IN_NOTEBOOK = 12  # cards
SHARE_FOR_HELDOUT, SHARE_FOR_GROUPS = 0.2, 0.03  # of the budget, for what follows the trials
SHARE_FOR_EDGE = 0.35  # of the budget, after which the edge is bisected no further


@dataclass(frozen=True, eq=False, repr=False)
class Discovery:
    """The result of a search.

    Attributes:
        table: one row for each group of readable completions that differ from the unsteered ones, ranked by its score:
            group, behavior (its name, if behaviours were given), change ("content" or "wording", see `departures`),
            example, method, source_layer, target_layer, radius, relative_radius (as a share of the stream's median
            norm), effect (``||change|| / ||target||``), vector (the number, within its trial, of the vector that
            elicits the group most), sign, rate (of that vector on the prompts), heldout_rate, random_rate, n_vectors
            (how many vectors elicit it), and of the example natural and surprise (nats).
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
        rows = named(collected(written, judged), behaviors or {})
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
        if not -len(self.table) <= row < len(self.table):
            raise IndexError(f"row={row} must be one of the {len(self.table)} rows of the table, from 0.")
        entry = self.table.iloc[row]
        return int(entry.sign) * self.vectors[int(entry.trial)][int(entry.vector)]

    def first(self, n: int = 20) -> Perturbation:
        """The vectors of the first groups, with their signs, of the layer and form to which the most of them belong.

        They can stand side by side, in one `generate` or on one page; `vector` gives the others.

        Args:
            n: how many of the first groups to take.

        Raises:
            ValueError: the search found no group.
        """
        if self.table.empty:
            raise ValueError(f"there is no vector to choose: {self.said}.")
        return self._vectors(self._first(n))

    def shown(self, n: int = 20) -> tuple[Perturbation, Completions]:
        """The vectors of `first` and what was written with them in their trials, without the model.

        The completions have both signs, the random vectors that stand beside these, and each prompt once unsteered.
        Their column `vector` numbers the chosen vectors, and `prompt` the different prompts of all trials. If the
        search found no group, the vectors are those of its first trial.
        """
        chosen = self.numbers(n)
        parts: list[pd.DataFrame] = []
        for number, (trial, vector, sign) in enumerate(chosen):
            written = self.completions[trial]
            known = [()] * len(written) if written.prompt_tokens is None else written.prompt_tokens
            table = written.table.assign(known=known)
            mine = table[(table.vector == vector).fillna(False)]
            parts += [table[table.kind == "unsteered"], mine.assign(vector=number, sign=mine.sign * sign)]
        table = pd.concat(parts, ignore_index=True).astype({"vector": "Int64"})
        again = table.kind.eq("unsteered") & table.duplicated(["kind", "prompt_text", "sample"])
        table = table[~again].sort_values("kind", key=lambda kind: kind.map(KINDS_IN_ORDER.index), kind="stable")
        table = table.assign(prompt=pd.factorize(table.prompt_text)[0]).reset_index(drop=True)
        ids = tuple(map(tuple, table.pop("known")))
        settings = self.completions[chosen[0][0]].settings
        return self._vectors(chosen), Completions(table, settings, ids if all(ids) else None)

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

    def _vectors(self, chosen: Sequence[tuple[int, int, int]]) -> Perturbation:
        """Joins chosen vectors, given by trial, vector and sign."""
        found = [sign * self.vectors[trial][vector] for trial, vector, sign in chosen]
        longest = max(len(one.history) for one in found)
        return concatenate([_lengthened(one, longest) for one in found])

    def joined(
        self, source_layer: int, target_layer: int | None = None, method: str | None = None
    ) -> tuple[Perturbation, Completions]:
        """All vectors of the trials at one source layer (and target layer and method, if given), and their completions.

        The column `vector` of the completions numbers the joined vectors.

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
            pairs = sorted({(trial.source_layer, trial.target_layer) for trial in self.plan})
            raise ValueError(
                f"no trial was at source_layer={source_layer}, target_layer={target_layer}: choose from the pairs "
                f"{pairs}."
            )
        if len({_form(self.vectors[i]) for i in chosen}) > 1:
            raise ValueError(
                f"the trials at source_layer={source_layer} learned vectors and adapters of several forms: name one of "
                f"the methods {sorted({self.plan[i].method for i in chosen})}."
            )
        longest = max(len(self.vectors[i].history) for i in chosen)
        tables, known, first = [], [], 0
        for i in chosen:
            # every trial also completes the prompts unsteered; one set of these is enough
            completions = self.completions[i] if first == 0 else self.completions[i].filter(kind=["steered", "random"])
            tables.append(completions.table.assign(vector=completions.table.vector + first))
            known.append(completions.prompt_tokens)
            first += len(self.vectors[i])
        vectors = concatenate([_lengthened(self.vectors[i], longest) for i in chosen])
        ids = None if None in known else tuple(row for rows in known for row in rows)
        return vectors, Completions(pd.concat(tables, ignore_index=True), self.completions[chosen[0]].settings, ids)

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
    def written(self) -> Written:
        """Every completion with every vector, as a page shows them."""
        return Written.of_search(self.rows, self.completions, directions_of(self.plan, self.vectors), self.table)

    def twins(self, twin: "Discovery", behaviors: Mapping[str, Behavior]) -> dict[int, tuple[int, int]]:
        """Counts each group among what was written with the learned vectors of a model that hides nothing.

        Args:
            twin: a search of that model, with the plan of this one.
            behaviors: those with which this search was grouped.

        Returns:
            By the row of a group: in how many of how many completions it was seen.
        """
        texts = twin.rows.text[twin.rows.kind == "steered"]
        return {
            number: (round(heldout_rate(texts.tolist(), row, behaviors) * len(texts)), len(texts))
            for number, row in enumerate(self.table.itertuples())
        }

    def _repr_html_(self) -> str:
        written = self.written
        cards = cards_of(written, most=MOST_IN_NOTEBOOK)
        return in_a_notebook(repr(self), cards, len(self.table), of_several(written.directions))


@public
def discover(
    model: Loadable,
    prompts: Prompts,
    budget: float = 60.0,
    behaviors: Mapping[str, Behavior] | None = None,
    *,
    heldout: Prompts | None = None,
    target_positions: Positions = slice(-1, None),
    max_new_tokens: int = 16,
    seed: int = 0,
    plan: Sequence[AnyTrial] | None = None,
    methods: Sequence[Method] = ("melbo",),
    directory: Folder | None = None,
    engine: Where = "here",
    progress: bool = True,
) -> Discovery:
    """Searches a model of which nothing is known, from one prompt or a few.

    First the edge of readability is found (`calibrate_radius`). Then come rounds of trials: the first is small and
    covers as many pairs of layers and radii around the edge as half of the time allows. Each later round repeats the
    better half of the one before with twice as many vectors from other starts. Every trial learns vectors, writes with
    both signs and with random vectors of equal norm, and judges how each completion departs from the unsteered one.

    Args:
        model: the model, which is left as it was; or its name or an `ml.ModelKey`, by which it is loaded.
        prompts: text, chats or token ids; one prompt is enough.
        budget: the time in seconds, from when the model is loaded. Trials are sized by what earlier ones took, and one
            is begun only if it is expected to end in time; the first one always runs.
        behaviors: name -> a regular expression or a function of the text. Completions that show a behaviour form a
            group of this name; all others are grouped by their words.
        heldout: prompts on which the vectors of the first groups are scored, as many as the time allows.
        target_positions: where a change counts; by default the last position, where the style of an answer is decided.
        max_new_tokens: the length of the completions.
        seed: the seed of the starts and the controls.
        plan: trials, all of which are run whatever the budget: `Trial` (vectors), `AdapterTrial`, `CpeTrial`,
            `DctTrial`, `JacobianTrial`, `NoiseTrial`, or `ContrastiveTrial`, which uses labels.
        methods: what a search without a plan tries in turns: "melbo" (free vectors of `fit_vectors`, stopped early),
            "orthogonal", "soft" (vectors that repel each other), "adamw" (the published recipe: at least four vectors
            of 300 steps, whatever the budget), "adapters" (`fit_adapters`), "cpe" (`fit_cpe`), "dct" and "dct_qr"
            (`fit_dct`), "jacobian" (`fit_jacobian`) and "noise" (`noise_vectors`).
        directory: a folder of a sweep, in which the edge, every trial, and the state of the search are kept; it is made
            if it is missing. The same call goes on where it was stopped: what is there is not run again, and the
            seconds up to the last trial that was begun or ended count as spent. What a trial took that was cut off is
            not counted, and the trial is run again. With a larger budget an ended search goes on, too.
        engine: "here" runs one trial after another. "ray" runs as many at a time as Ray's cluster has GPUs, or else
            cores; it needs a directory and a name or key of the model. A round then ends when all its trials have.
        progress: whether to show a progress bar with the seconds.

    Returns:
        The ranked groups with their vectors, what became of all directions, and the plan that was completed.

    Raises:
        ValueError: the budget is not a positive number of seconds, the model has no edge, the directory holds results
            of another model, or another argument breaks a rule.
        FloatingPointError, ValueError, RuntimeError: no trial could be completed; it is the error of the last one.

    Warns:
        UserWarning: a trial was left out, since activations or logits were NaN or infinite, or since its method doesn't
            suit the model; with a directory, for whatever reason.
    """
    if plan is None and not 0 < budget < float("inf"):
        raise ValueError(f"budget={budget} must be a positive number of seconds.")
    check_methods(methods)
    where = positions_text(target_positions)
    with engine_for(model, directory, engine) as workers:
        asked = _asked(workers, prompts, target_positions)
        held_out = None if heldout is None else _asked(workers, heldout)
        search = Search(workers, asked, where, max_new_tokens, seed)
        memory = workers.ask(partial(_memory, prompts, max_new_tokens))
        with Progress(
            total=round(budget) if plan is None else None, desc="discover", unit="s", disable=not progress
        ) as bar:
            if progress:
                bar.write(f"memory that it takes: {memory}", file=sys.stderr)
            if plan is None:
                held = SHARE_FOR_HELDOUT if heldout is not None else 0.0
                search.clock.seconds = budget * (1 - held - SHARE_FOR_GROUPS)
                in_rounds(search, methods, SHARE_FOR_EDGE * budget, bar)
            else:
                as_planned(search, plan, bar)
            found = Discovery.of(search.outcomes, behaviors, search.edge)
            if held_out is not None:
                bar.set_postfix_str("held-out prompts")
                ends = budget if plan is None else float("inf")
                _score(found, search, held_out, behaviors or {}, ends)
            if plan is None:
                bar.update(bar.total - bar.n)  # the rest of the budget is too short for anything more
    settings = {
        "budget": budget,
        "seed": seed,
        "seconds": round(search.clock.passed, 1),
        "max_new_tokens": max_new_tokens,
        "memory": memory,
        "trials_ended": [round(seconds, 1) for seconds in search.ended],
    }
    return replace(found, settings=settings)


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
    folders = folders_of(directories)
    if len({model_of(folder) for folder in folders} - {None}) > 1:
        raise ValueError(f"{', '.join(map(str, folders))} are of several models: gather those of one.")
    found = {one.digest: one for folder in folders for one in all_of(folder) if one.failure is None}
    if not found:
        raise ValueError(
            f"no trial is finished in {', '.join(map(str, folders))}: run the sweep, or look at its status."
        )
    return Discovery.of([found[digest] for digest in sorted(found)], behaviors)


def _asked(workers: Engine, prompts: Prompts, target_positions: Positions = slice(None)) -> tuple[Any, ...]:
    """Returns prompts as a `Job` has them.

    Raises:
        TypeError, ValueError: the prompts or the positions don't fit the model.
    """
    ids = workers.ask(methodcaller("tokens", prompts, target_positions))
    return ids if isinstance(prompts, Tensor | PromptBatch | AsPrompts) else tuple(as_list(prompts))


def _memory(prompts: Prompts, max_new_tokens: int, bench: Bench) -> str:
    """Predicts in words what a trial of usual size holds, with the longest slice that a search takes."""
    n_layers = bench.host.n_layers
    pairs = [(arm.source_layer, arm.target_layer) for arm in arms_of(n_layers, ("melbo",))]
    source, target = max(pairs, key=lambda pair: pair[1] - pair[0])
    lengths = [len(one["ids"]) for one in bench.tokens(prompts)]
    plan = plan_memory(
        bench.host, max(lengths), source, target, n_vectors=16, n_prompts=len(lengths), max_new_tokens=max_new_tokens
    )
    return repr(plan)


def _score(
    found: Discovery, search: Search, prompts: tuple[Any, ...], behaviors: Mapping[str, Behavior], ends: float
) -> None:
    """Writes into the table how far the groups transfer to held-out prompts, the first groups first."""
    rows = {int(row.Index): row for row in found.table.itertuples()}
    began, longest = dict[int, float](), 0.0

    def tasks() -> Iterator[HeldoutTask]:
        for index, row in rows.items():
            began[index] = search.clock.passed
            if began[index] + MARGIN * longest > ends:
                return
            job, learned = search.outcomes[row.trial].job, found.vectors[row.trial][row.vector]
            yield HeldoutTask(index, job, int(row.vector), int(row.sign), learned, prompts, search.seed)

    for done in search.workers.run(tasks()):
        index = done.task.number
        found.table.loc[index, "heldout_rate"] = heldout_rate(done.value(), rows[index], behaviors)
        longest = max(longest, search.clock.passed - began[index])


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
