"""Where do I look in a model that I know nothing of?  A scan of layer pairs, and a search within a time budget that groups what it finds."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from melbo_lens import tables
from melbo_lens.access import host_of
from melbo_lens.adapters import SteeringAdapters
from melbo_lens.arguments import plain_fields, public
from melbo_lens.calibration import solve_radius
from melbo_lens.completions import Completions
from melbo_lens.evaluation import Behavior, shows
from melbo_lens.methods.adapters import fit_adapters
from melbo_lens.methods.melbo import fit_vectors
from melbo_lens.output_effects import cluster, word_counts
from melbo_lens.perturbation import Perturbation, concatenate
from melbo_lens.perturbations import SteeringVectors
from melbo_lens.prompts import Positions, Prompts
from melbo_lens.sliced_model import slice_model
from melbo_lens.steering import generate

FRACTIONS = (0.5, 0.75, 0.4, 1.0, 0.6, 0.55, 0.3, 1.5)  # radii as fractions of the source stream's norm, most promising first
COLUMNS = "group behavior example source_layer target_layer radius vector sign rate heldout_rate random_rate n_vectors".split()
ALIKE = 0.5  # completions whose token counts have a smaller average cosine distance form a group
SHARE_FOR_HELDOUT = 0.25


@plain_fields
@dataclass(frozen=True)
class Trial:
    """One fit of a plan: which layers, which radius, how many vectors, orthogonal or free."""

    source_layer: int
    target_layer: int
    radius: float
    n_vectors: int
    orthogonal: bool
    seed: int

    def fit(self, model: Any, prompts: Prompts, target_positions: Positions) -> SteeringVectors:
        return fit_vectors(model, prompts, **asdict(self), target_positions=target_positions, progress=False)


@plain_fields
@dataclass(frozen=True)
class AdapterTrial:
    """One fit of adapters: which layers, the mean norm of their updates, how many, of which rank."""

    source_layer: int
    target_layer: int
    radius: float
    n_adapters: int
    rank: int
    seed: int
    diversity: float = 0.0

    def fit(self, model: Any, prompts: Prompts, target_positions: Positions) -> SteeringAdapters:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a collapse shows in the table
            return fit_adapters(model, prompts, **asdict(self), optimizer="power", target_positions=target_positions, progress=False)


@dataclass(frozen=True, eq=False, repr=False)
class Discovery:
    """What a search found.

    Attributes:
        table: one row for each group of completions that differ from the unsteered ones, ranked by how many vectors elicit it beyond the random
            controls: group, behavior (its name, if behaviours were given), example, source_layer, target_layer, radius, vector (its number in that
            trial), sign, rate (of that vector on the prompts), heldout_rate, random_rate, n_vectors (how many elicit it).
        plan: the trials that were completed; `discover(..., plan=found.plan)` repeats them exactly.
        vectors: the vectors, or adapters, of each trial.
        completions: those of each trial.
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
        """All vectors of the trials at one source layer (and target, if given), and their completions with the vectors numbered accordingly."""
        chosen = [i for i, t in enumerate(self.plan) if t.source_layer == source_layer and target_layer in (None, t.target_layer)]
        if not chosen:
            pairs = sorted({(trial.source_layer, trial.target_layer) for trial in self.plan})
            raise ValueError(f"no trial was at source_layer={source_layer}, target_layer={target_layer}: choose from the pairs {pairs}.")
        longest = max(len(self.vectors[i].history) for i in chosen)
        tables, known, first = [], [], 0
        for i in chosen:
            # every trial completes the prompts unsteered too; once is enough
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
    model: Any,
    prompts: Prompts,
    budget: float = 60.0,
    behaviors: Mapping[str, Behavior] | None = None,
    heldout: Prompts | None = None,
    target_positions: Positions = slice(-1, None),
    max_new_tokens: int = 24,
    seed: int = 0,
    plan: Sequence[Trial | AdapterTrial] | None = None,
    progress: bool = True,
) -> Discovery:
    """Searches a model that one knows nothing of, from a prompt or a few.

    Tries layer pairs and radii, learns free and orthogonal vectors, generates with both signs and with norm-matched random vectors, and groups
    the completions that differ from the unsteered ones.

    Args:
        model: left as it was.
        prompts: one is enough.
        budget: seconds. A trial is begun only if it is expected to end in time; the first always runs.
        behaviors: names for groups: name -> regular expression or function of the text. Completions that show none are grouped by their words.
        heldout: prompts on which the vectors of the table are scored.
        target_positions: where a change counts; the last position, where the answer's style is decided, by default.
        max_new_tokens: length of the completions.
        seed: of the starts and the controls.
        plan: trials to run instead, all of them, of vectors (`Trial`) or adapters (`AdapterTrial`); the budget is ignored.
        progress: whether to show a bar with the seconds.

    Returns:
        The ranked groups with their vectors, and the plan that was completed.
    """
    if plan is None and not 0 < budget < float("inf"):
        raise ValueError(f"budget={budget} must be a positive number of seconds.")
    host = host_of(model)
    began = time.monotonic()
    trials = list(plan) if plan is not None else make_plan(host, prompts, seed)
    allowed = float("inf") if plan is not None else budget * (1 - (SHARE_FOR_HELDOUT if heldout is not None else 0.05))
    done, fitted, written, longest = [], [], [], 0.0
    with tqdm(total=None if plan is not None else round(budget), desc="discover", unit="s", disable=not progress) as bar:
        for trial in trials:
            start = time.monotonic()
            if done and start - began + longest > allowed:
                break
            try:
                vectors = trial.fit(host, prompts, target_positions)
                completions = generate(host, prompts, vectors, max_new_tokens=max_new_tokens, seed=trial.seed, progress=False)
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
        raise FloatingPointError("no trial could be completed, see the warnings: use smaller radii, or load the model in bfloat16 or float32.")
    table = _group(done, written, behaviors or {})
    if heldout is not None and len(table):
        table["heldout_rate"] = [
            _heldout(host, heldout, fitted[row.trial][row.vector], row, behaviors or {}, max_new_tokens, seed) for row in table.itertuples()
        ]
    settings = {"budget": budget, "seed": seed, "seconds": round(time.monotonic() - began, 1), "max_new_tokens": max_new_tokens}
    return Discovery(table, tuple(done), tuple(fitted), tuple(written), settings)


@public
def make_plan(model: Any, prompts: Prompts, seed: int = 0) -> list[Trial]:
    """Layer pairs from early to the last layer, at radii around the stream's own norm: free vectors first, orthogonal ones after."""
    host = host_of(model)
    n_layers = host.n_layers
    sources = sorted({0, n_layers // 4, n_layers // 3})
    pairs = [(source, n_layers) for source in sources if source + 1 < n_layers]
    pairs += [(source, 3 * n_layers // 4) for source in sources if source + 1 < 3 * n_layers // 4]
    norms = {source: solve_radius(slice_model(host, prompts, source, n_layers), "fraction", 1.0).radius for source, _ in pairs}
    plan = []
    for (source, target), orthogonal in [*((pair, False) for pair in pairs), *((pair, True) for pair in pairs)]:
        for fraction in FRACTIONS:
            n_vectors = min(host.d_model, 16) if orthogonal else 64
            plan.append(Trial(source, target, fraction * norms[source], n_vectors, orthogonal, seed * 1000 + len(plan)))
    return plan


def _lengthened(vectors: Perturbation, n_rows: int) -> Perturbation:
    """Repeats the last row of a history that settled early, so that histories can stand side by side."""
    history = torch.cat([vectors.history, vectors.history[-1:].expand(n_rows - len(vectors.history), -1)])
    return replace(vectors, history=history)


def _group(done: Sequence[Trial | AdapterTrial], written: Sequence[Completions], behaviors: Mapping[str, Behavior]) -> pd.DataFrame:
    """Groups of completions that differ from the unsteered ones of their prompt, best first."""
    parts = []
    for number, completions in enumerate(written):
        table = completions.table.assign(trial=number)
        plain = table[table.kind == "unsteered"].set_index("prompt").text
        parts.append(table[table.kind != "unsteered"].assign(differs=lambda rows, plain=plain: rows.text != rows.prompt.map(plain)))
    rows = pd.concat(parts, ignore_index=True)
    changed = rows[rows.differs].copy()
    changed["behavior"] = ""
    for name, behavior in behaviors.items():
        changed.loc[shows(changed.text, behavior) & (changed.behavior == ""), "behavior"] = name
    unnamed = changed.text[changed.behavior == ""].drop_duplicates().tolist()
    labels = dict(zip(unnamed, cluster(word_counts(unnamed), ALIKE), strict=True))
    changed["group"] = [behavior or f"words {labels[text]}" for behavior, text in zip(changed.behavior, changed.text, strict=True)]
    n_each = rows.groupby("kind").size()
    found = []
    for group, members in changed.groupby("group"):
        steered, random = members[members.kind == "steered"], members[members.kind == "random"]
        if steered.empty:
            continue
        hits = steered.groupby(["trial", "vector", "sign"]).size().reset_index(name="hits")
        hits["radius"] = [done[trial].radius for trial in hits.trial]
        best = hits.sort_values(["hits", "radius"], ascending=[False, True]).iloc[0]
        mine = rows[(rows.kind == "steered") & (rows.trial == best.trial) & (rows.vector == best.vector) & (rows.sign == best.sign)]
        example = steered[(steered.trial == best.trial) & (steered.vector == best.vector) & (steered.sign == best.sign)].text.iloc[0]
        trial = done[int(best.trial)]
        random_rate = len(random) / max(int(n_each.get("random", 0)), 1)
        excess = len(steered) / int(n_each["steered"]) - random_rate
        found.append(
            {
                "group": group,
                "behavior": steered.behavior.iloc[0],
                "example": example,
                "source_layer": trial.source_layer,
                "target_layer": trial.target_layer,
                "radius": trial.radius,
                "vector": int(best.vector),
                "sign": int(best.sign),
                "rate": best.hits / len(mine),
                "heldout_rate": float("nan"),
                "random_rate": random_rate,
                "n_vectors": len(hits.drop_duplicates(["trial", "vector"])),
                "trial": int(best.trial),
                "score": excess * variety(example),
            }
        )
    table = pd.DataFrame(found, columns=[*COLUMNS, "trial", "score"])
    return table.sort_values("score", ascending=False).drop(columns="score").reset_index(drop=True)


def _heldout(
    model: Any,
    prompts: Prompts,
    vectors: Perturbation,
    row: Any,
    behaviors: Mapping[str, Behavior],
    max_new_tokens: int,
    seed: int,
) -> float:
    """The share of held-out prompts whose completion belongs to the row's group."""
    completions = generate(
        model, prompts, vectors, max_new_tokens, signs=(row.sign,), include_unsteered=False, include_random=False, seed=seed, progress=False
    )
    texts = completions.table.text
    if row.behavior:
        return float(shows(texts, behaviors[row.behavior]).mean())
    counts = word_counts([row.example, *texts])
    similar = torch.cosine_similarity(counts[:1], counts[1:])
    return float((similar > 1 - ALIKE).float().mean())


def variety(text: str) -> float:
    """The share of different words in a text: low for one that repeats itself."""
    words = text.split()
    return len(set(words)) / len(words) if words else 0.0
