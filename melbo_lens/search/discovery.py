"""What does an unknown model hide?  A search of layers and radii within a time budget finds groups of completions."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from melbo_lens import tables
from melbo_lens.arguments import public
from melbo_lens.evaluation.rates import Behavior
from melbo_lens.generation.completions import Completions
from melbo_lens.generation.generate import generate
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.slices import SlicedModel, slice_model
from melbo_lens.perturbations.perturbation import Perturbation, concatenate
from melbo_lens.prompts import Positions, Prompts, tokenize
from melbo_lens.search.groups import grouped, heldout_rate
from melbo_lens.search.trials import AdapterTrial, Trial, make_plan

SHARE_FOR_HELDOUT = 0.25


@dataclass(frozen=True, eq=False, repr=False)
class Discovery:
    """The result of a search.

    Attributes:
        table: one row for each group of completions that differ from the unsteered ones, ranked by how far the share of
            such completions exceeds that of the random controls: group, behavior (its name, if behaviours were given),
            example, source_layer, target_layer, radius, vector (the number, within its trial, of the vector that
            elicits the group most), sign, rate (of that vector on the prompts), heldout_rate, random_rate, and
            n_vectors (how many vectors elicit it).
        plan: the trials that were completed; `discover(..., plan=found.plan)` repeats them exactly.
        vectors: the vectors or adapters of each trial.
        completions: the completions of each trial.
        settings: the settings of the search, and the seconds that it took.
    """

    table: pd.DataFrame
    plan: tuple[Trial | AdapterTrial, ...]
    vectors: tuple[Perturbation, ...]
    completions: tuple[Completions, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def vector(self, row: int) -> Perturbation:
        """The vector or adapter of a row of the table, with its sign, ready to steer with."""
        entry = self.table.iloc[row]
        return int(entry.sign) * self.vectors[int(entry.trial)][int(entry.vector)]

    def joined(self, source_layer: int, target_layer: int | None = None) -> tuple[Perturbation, Completions]:
        """All vectors of the trials at one source layer (and target layer, if given), and their completions.

        The column `vector` of the completions numbers the joined vectors.

        Raises:
            ValueError: no trial was at these layers.
        """
        chosen = [
            i
            for i, t in enumerate(self.plan)
            if t.source_layer == source_layer and target_layer in (None, t.target_layer)
        ]
        if not chosen:
            pairs = sorted({(trial.source_layer, trial.target_layer) for trial in self.plan})
            raise ValueError(
                f"no trial was at source_layer={source_layer}, target_layer={target_layer}: choose from the pairs "
                f"{pairs}."
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
        return f"Discovery({len(self.table)} groups from {len(self.plan)} trials)"

    def _repr_html_(self) -> str:
        return tables.html(repr(self), self.table.drop(columns="trial"))


@public
def discover(
    model: Model,
    prompts: Prompts,
    budget: float = 60.0,
    behaviors: Mapping[str, Behavior] | None = None,
    *,
    heldout: Prompts | None = None,
    target_positions: Positions = slice(-1, None),
    max_new_tokens: int = 24,
    seed: int = 0,
    plan: Sequence[Trial | AdapterTrial] | None = None,
    progress: bool = True,
) -> Discovery:
    """Searches a model of which nothing is known, from one prompt or a few.

    The search tries layer pairs and radii, learns free and orthogonal vectors, generates with both signs and with
    norm-matched random vectors, and groups the completions that differ from the unsteered ones.

    Args:
        model: the model, which is left as it was.
        prompts: text, chats or token ids; one prompt is enough.
        budget: the time in seconds. A trial is begun only if it is expected to end in time; the first one always runs.
        behaviors: name -> a regular expression or a function of the text. Completions that show a behaviour form a
            group of this name; all others are grouped by their words.
        heldout: prompts on which the vectors of the table are scored.
        target_positions: where a change counts; by default the last position, where the style of an answer is decided.
        max_new_tokens: the length of the completions.
        seed: the seed of the starts and the controls.
        plan: trials of vectors (`Trial`) or adapters (`AdapterTrial`), all of which are run whatever the budget.
        progress: whether to show a progress bar with the seconds.

    Returns:
        The ranked groups with their vectors, and the plan that was completed.

    Raises:
        ValueError: the budget is not a positive number of seconds, or another argument breaks a rule.
        FloatingPointError: no trial could be completed.

    Warns:
        UserWarning: a trial was left out, since activations or logits were NaN or infinite.
    """
    if plan is None and not 0 < budget < float("inf"):
        raise ValueError(f"budget={budget} must be a positive number of seconds.")
    host = host_of(model)
    began = time.monotonic()
    trials = list(plan) if plan is not None else make_plan(host, prompts, seed)
    allowed = float("inf") if plan is not None else budget * (1 - (SHARE_FOR_HELDOUT if heldout is not None else 0.05))
    batch = tokenize(host, prompts, target_positions)
    slices: dict[tuple[int, int], SlicedModel] = {}
    done, fitted, written, longest = [], [], [], 0.0
    with tqdm(
        total=None if plan is not None else round(budget), desc="discover", unit="s", disable=not progress
    ) as bar:
        for trial in trials:
            start = time.monotonic()
            if done and start - began + longest > allowed:
                break
            try:
                between = (trial.source_layer, trial.target_layer)
                if between not in slices:
                    slices[between] = slice_model(host, batch, *between, target_positions)
                vectors = trial.fit(slices[between])
                completions = generate(
                    host, prompts, vectors, max_new_tokens=max_new_tokens, seed=trial.seed, progress=False
                )
            except FloatingPointError as error:
                warnings.warn(f"{trial} is left out: {error}", stacklevel=2)
                continue
            written.append(completions)
            fitted.append(vectors)
            done.append(trial)
            longest = max(longest, time.monotonic() - start)
            bar.set_postfix_str(f"{len(done)} trials", refresh=False)
            bar.update(round(time.monotonic() - began) - bar.n)
    if not done:
        raise FloatingPointError(
            "no trial could be completed, see the warnings: use smaller radii, or load the model in bfloat16 or "
            "float32."
        )
    table = grouped(done, written, behaviors or {})
    if heldout is not None and len(table):
        table["heldout_rate"] = [
            heldout_rate(host, heldout, fitted[row.trial][row.vector], row, behaviors or {}, max_new_tokens, seed)
            for row in table.itertuples()
        ]
    settings = {
        "budget": budget,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "max_new_tokens": max_new_tokens,
    }
    return Discovery(table, tuple(done), tuple(fitted), tuple(written), settings)


def _lengthened(vectors: Perturbation, n_rows: int) -> Perturbation:
    """Repeats the last row of a history that settled early, so that histories can stand side by side."""
    history = torch.cat([vectors.history, vectors.history[-1:].expand(n_rows - len(vectors.history), -1)])
    tensors, header = vectors.parts()
    return type(vectors).of_parts({**tensors, "history": history}, header, vectors.provenance)
