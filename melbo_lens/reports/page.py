"""How are findings shown on one page?  `report` writes a single HTML file that opens offline.

The page escapes all text that a model wrote.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from jinja2 import Environment, PackageLoader

from melbo_lens import plots
from melbo_lens.arguments import public
from melbo_lens.evaluation.rates import Behavior, Evaluation, evaluate, shows
from melbo_lens.files import write_text
from melbo_lens.generation.completions import Completions
from melbo_lens.measures.changes import ActivationChanges
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.plots.labels import examples
from melbo_lens.reports.findings import TITLE, Findings
from melbo_lens.search.discovery import Discovery

HIDDEN_SETTINGS = ("prompt_tokens", "parts", "prompts", "rows", "matched_to")
MOST_SECTIONS, MOST_ROWS, MOST_GROUPS, MOST_TRIALS = 300, 20_000, 40, 1000
WHOLE, SHARE = "{:.0f}", "{:.0%}"
TRIAL_CELLS = {
    "method": "{}",
    "failure": "{}",
    "radius": "{:.3g}",
    "seconds": "{:.1f}",
    **dict.fromkeys("source_layer target_layer seed n_vectors n_adapters n_factors".split(), WHOLE),
    **dict.fromkeys("readable nothing wording content noise".split(), SHARE),
}
SIGNS = {1: "+", -1: "−", 0: ""}
T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """A figure of the page with its caption, or the reason why it is missing."""

    anchor: str
    caption: str
    html: str = ""
    reason: str = ""


@public
def report(
    findings: Findings | Discovery | Perturbation,
    completions: Completions | None = None,
    behaviors: Mapping[str, Behavior] | None = None,
    path: str | os.PathLike[str] = "report.html",
    title: str = TITLE,
    **measured: Any,
) -> Path:
    """Writes one self-contained page.

    It has rates, the ranking, figures, a section for each vector, a table of completions with filters, and settings.
    What is not given is left out of the page; no model runs here.

    Args:
        findings: the findings of a run; or what a search or a sweep found (`discover`, `gather`), of which the first
            vectors are shown; or vectors alone, with the other fields of `Findings` after them.
        completions, behaviors, title, measured: the other fields of `Findings` (changes, effects, control, ...), to be
            given only with vectors; behaviours and a title also with what a search or a sweep found.
        path: the file to write; its folder must exist.

    Returns:
        The path written.

    Raises:
        TypeError: vectors are given without completions, or findings together with one of their own fields.
    """
    if isinstance(findings, Discovery):
        if completions is not None or measured:
            raise TypeError("a search knows its completions and measures itself: give it, behaviours, path and title.")
        return _written(Findings.of_trials(findings, behaviors, title), path)
    if isinstance(findings, Findings):
        if completions is not None or behaviors is not None or measured or title != TITLE:
            raise TypeError(
                "findings say their completions, behaviours, title and measures themselves: "
                "give the findings and a path alone."
            )
        return _written(findings, path)
    if completions is None:
        raise TypeError(
            "completions is missing: give them beside the vectors, or in place of both Findings, or what ml.gather "
            "makes of the folder of a sweep."
        )
    return _written(Findings(findings, completions, behaviors or {}, title, **measured), path)


@public
def save_results(
    directory: str | os.PathLike[str],
    vectors: Perturbation,
    completions: Completions,
    behaviors: Mapping[str, Behavior] | None = None,
    title: str = TITLE,
    **measured: Any,
) -> Path:
    """Writes vectors, completions, measures and the page that shows them to a folder, which is made if it is missing.

    Args:
        directory: the folder to write to. Each file is written whole or not at all.
        vectors, completions, behaviors, title, measured: the fields of `Findings`.

    Returns:
        The path of the page.
    """
    Findings(vectors, completions, behaviors or {}, title, **measured).save(directory)
    return report_directory(directory)


@public
def report_directory(
    directory: str | os.PathLike[str],
    behaviors: Mapping[str, Behavior] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes the page of a folder again from the files in it.

    Args:
        directory: a folder that `Findings.save`, `save_results`, `melbo-lens fit` or a sweep wrote.
        behaviors: replaces the behaviours of the run.
        path: the page to write; `report.html` in the folder by default.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the folder lacks one of its files.
        ValueError: a file is damaged.
    """
    return _written(Findings.load(directory, behaviors), Path(directory) / "report.html" if path is None else path)


def _written(findings: Findings, path: str | os.PathLike[str]) -> Path:
    vectors, completions, behaviors = findings.vectors, findings.completions, findings.behaviors
    table = completions.table.reset_index(drop=True)
    evaluation = evaluate(completions, behaviors) if behaviors and (table.kind == "steered").any() else None
    shown = pd.DataFrame(
        {name: shows(table.text, behavior).to_numpy(dtype=bool) for name, behavior in behaviors.items()},
        index=table.index,
    )
    ranking = _ranking(vectors, table, shown, findings.ranked)
    best = int(ranking.vector.iloc[0]) if len(ranking) else 0
    figures = list(_figures(findings, evaluation, ranking, best))
    tokens = _token_views(findings.changes, findings.views)
    environment = Environment(
        loader=PackageLoader("melbo_lens.reports", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html.jinja").render(
        title=findings.title,
        groups=[] if findings.groups is None else findings.groups.head(MOST_GROUPS).to_dict("records"),
        n_groups=0 if findings.groups is None else len(findings.groups),
        said=findings.said,
        trials=[] if findings.trials is None else _trial_rows(findings.trials.head(MOST_TRIALS)),
        n_trials=0 if findings.trials is None else len(findings.trials),
        summary=[repr(vectors), repr(completions)],
        rates=[] if evaluation is None else evaluation.summary.to_dict("records"),
        note="" if evaluation is None else evaluation.note,
        measures=[name for name in ranking.columns if name not in ("vector", "sign")],
        ranking=ranking.head(MOST_SECTIONS).to_dict("records"),
        examples=examples(completions, by_sign=True),
        pictures=figures,
        tokens=tokens.html() if tokens else "",
        behaviors=list(behaviors),
        sections=list(_sections(vectors, table, shown)),
        n_vectors=len(vectors),
        n_sections=min(len(vectors), MOST_SECTIONS),
        rows=_rows(table.head(MOST_ROWS), shown),
        n_rows=len(table),
        prompts=table.drop_duplicates("prompt").sort_values("prompt")[["prompt", "prompt_text"]].to_dict("records"),
        plain=_plain(table),
        vectors=sorted({int(vector) for vector in table.vector.dropna()}),
        settings=[(key, value) for key, value in vectors.provenance.items() if key not in HIDDEN_SETTINGS],
        generation=[(key, value) for key, value in completions.settings.items() if key != "perturbations"],
        signs=SIGNS,
    )
    write_text(path, page)
    return Path(path)


def _ranking(
    vectors: Perturbation, table: pd.DataFrame, shown: pd.DataFrame, ranked: pd.DataFrame | None
) -> pd.DataFrame:
    """Returns vectors and signs with their measures; those that change most come first."""
    plain = table[table.kind == "unsteered"].drop_duplicates(["prompt", "sample"]).set_index(["prompt", "sample"]).text
    joined = table.join(plain.rename("plain"), on=["prompt", "sample"])
    hits = [f"rate of {name}" for name in shown]
    rows = joined.assign(changed=(joined.text != joined.plain).astype(float)).join(
        shown.astype(float).rename(columns=lambda name: f"rate of {name}")
    )
    rows = rows[rows.kind == "steered"]
    if rows.empty:
        return pd.DataFrame(columns=["vector", "sign", "changed"])
    means = rows.groupby(["vector", "sign"])[["changed", *hits]].mean()
    found = means.reset_index().astype({"vector": int, "sign": int})
    history = vectors.history
    if len(history):
        # the objective was measured for the vector as it was learned, not for its negative
        found.insert(
            2,
            "objective",
            [
                float(history[-1][k]) if sign > 0 and k < len(vectors) else float("nan")
                for k, sign in zip(found.vector, found.sign, strict=True)
            ],
        )
    if ranked is not None:
        wanted = [name for name in ("kl", "entropy_change") if name in ranked]
        found = found.merge(ranked[["vector", "sign", *wanted]], on=["vector", "sign"], how="left")
    order = [name for name in ("kl", "changed", "objective") if name in found]
    return found.sort_values(order, ascending=False, kind="stable", na_position="last").reset_index(drop=True)


def _figures(findings: Findings, evaluation: Evaluation | None, ranking: pd.DataFrame, best: int) -> Iterator[Picture]:
    """Draws every figure whose values are there, in the order of the page."""
    vectors, completions, behaviors = findings.vectors, findings.completions, findings.behaviors
    changes, effects, calibration, scan = findings.changes, findings.effects, findings.calibration, findings.scan
    several = completions.table.scale[completions.table.scale > 0].nunique() > 1
    planned: list[tuple[str, str, Callable[[], Any] | None]] = [
        (
            "rates",
            "Bars with 95 % Wilson intervals; grey and yellow are the controls.",
            _if_given(evaluation, plots.behavior_rates),
        ),
        (
            "ranked",
            "Each row is a vector with a sign. A blank means not measured.",
            lambda: plots.ranking(ranking, completions),
        ),
        (
            "objective",
            "A curve for each vector. The dotted line is what random vectors of the same norm reach.",
            lambda: plots.objective_history(vectors, findings.control, completions),
        ),
        (
            "cosines",
            "Blue alike, red opposite. Branches that join low are near-duplicates.",
            _if_given(
                vectors if isinstance(vectors, SteeringVectors) else None,
                lambda vectors: plots.cosine_similarity(vectors, completions),
            ),
        ),
        (
            "effect-cosines",
            "The same for what the vectors change at the target: different vectors may do the same.",
            _if_given(effects, lambda effects: plots.cosine_similarity(effects, completions)),
        ),
        (
            "effects",
            "Each point is a vector with a sign; near points change the target alike.",
            _if_given(effects, lambda effects: plots.effect_scatter(effects, completions, behaviors)),
        ),
        (
            "changes",
            "How far each vector moves the residual stream at each token of the prompt.",
            _if_given(changes, lambda changes: plots.token_heatmap(changes, completions=completions)),
        ),
        (
            "layers",
            "The vector that is ranked first, as a share of the clean stream's norm.",
            _if_given(changes, lambda changes: plots.layer_heatmap(changes, best if best < len(changes) else 0)),
        ),
        (
            "scales",
            "Above: how often each behaviour is seen at multiples of the vectors. Below: how coherent the text is.",
            (lambda: plots.scale_sweep(completions, behaviors, findings.coherence)) if several and behaviors else None,
        ),
        (
            "radius",
            "The rule's value at each radius that was tried.",
            _if_given(calibration, plots.radius_curve),
        ),
        (
            "layer-map",
            "Objective of a few vectors over that of random ones, the larger sign.",
            _if_given(scan, plots.layer_map),
        ),
    ]
    drawn: list[tuple[str, str, Any, str]] = []  # a figure, or None with the reason
    for anchor, caption, draw in planned:
        if draw is not None:
            try:
                drawn.append((anchor, caption, draw(), ""))
            except ValueError as error:
                drawn.append((anchor, caption, None, str(error)))
    embedded = iter(plots.embed([figure for _, _, figure, _ in drawn if figure is not None]))
    for anchor, caption, figure, reason in drawn:
        yield Picture(anchor, caption, next(embedded) if figure is not None else "", reason)


def _if_given(value: T | None, draw: Callable[[T], Any]) -> Callable[[], Any] | None:
    """Returns a function that draws the value, or None if there is no value."""
    return None if value is None else lambda: draw(value)


def _token_views(changes: ActivationChanges | None, views: plots.TokenView | None) -> plots.TokenView | None:
    own = (
        [plots.colored_tokens_multi(changes), plots.text_neuron_activations(changes)]
        if changes is not None and len(changes)
        else []
    )
    chosen = [view for view in (*own, views) if view is not None]
    return plots.TokenView(tuple(element for view in chosen for element in view.elements)) if chosen else None


def _sections(vectors: Perturbation, table: pd.DataFrame, shown: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yields for each vector its completions beside the unsteered ones, in a row for each prompt, sample and scale."""
    labels = _labels(shown, len(table))
    plain = {(row.prompt, row.sample): row.text for row in table[table.kind == "unsteered"].itertuples()}
    measures, history = vectors.measures(), vectors.history
    columns = (table[name].tolist() for name in ("kind", "vector", "prompt", "sample", "scale", "sign", "text"))
    written: dict[int, dict[tuple[int, int, float], dict[int, Any]]] = {}
    for (kind, k, prompt, sample, scale, sign, text), names in zip(zip(*columns, strict=True), labels, strict=True):
        if kind == "steered":
            written.setdefault(int(k), {}).setdefault((prompt, sample, scale), {})[int(sign)] = (text, names)
    for k in range(min(len(vectors), MOST_SECTIONS)):
        facts = [(name, f"{values[k]:.4g}") for name, values in measures.items()]
        if len(history):
            facts.append(
                ("objective", f"{float(history[0][k]):.4g} at the start, {float(history[-1][k]):.4g} at the end")
            )
        rows = [
            {
                "prompt": prompt,
                "sample": sample,
                "scale": f"{scale:g}",
                "plain": plain.get((prompt, sample)),
                "texts": texts,
            }
            for (prompt, sample, scale), texts in sorted(written.get(k, {}).items())
        ]
        signs = [sign for sign in (1, -1) if any(sign in row["texts"] for row in rows)]
        seen = sorted({name for row in rows for _, names in row["texts"].values() for name in names})
        yield {"vector": k, "facts": facts, "rows": rows, "signs": signs, "seen": seen}


def _rows(table: pd.DataFrame, shown: pd.DataFrame) -> list[dict[str, Any]]:
    labels = _labels(shown, len(table))
    return [
        {
            "prompt": row.prompt,
            "kind": row.kind,
            "vector": "" if pd.isna(row.vector) else int(row.vector),
            "sign": int(row.sign),
            "scale": f"{row.scale:g}" if row.scale else "",
            "sample": row.sample,
            "names": names,
            "text": row.text,
        }
        for row, names in zip(table.itertuples(), labels, strict=True)
    ]


def _labels(shown: pd.DataFrame, n: int) -> list[list[str]]:
    """Returns for each row the behaviours that it shows."""
    return [
        [name for name in shown if hits[name][i]]
        for hits in [{name: shown[name].to_numpy() for name in shown}]
        for i in range(n)
    ]


def _trial_rows(trials: pd.DataFrame) -> list[dict[str, str]]:
    """Returns the cells of each trial as texts; a cell that says nothing of this kind of trial is empty."""

    def row_of(trial: dict[str, Any]) -> dict[str, str]:
        known = {name: value for name, value in trial.items() if value == value and value is not None}
        texts = {name: form.format(known[name]) for name, form in TRIAL_CELLS.items() if name in known}
        layers = " to ".join(texts[name] for name in ("source_layer", "target_layer") if name in texts)
        n = next((texts[name] for name in ("n_vectors", "n_adapters", "n_factors") if name in texts), "")
        return {**dict.fromkeys(TRIAL_CELLS, ""), **texts, "layers": layers, "n": n}

    return list(map(row_of, trials.to_dict("records")))


def _plain(table: pd.DataFrame) -> dict[str, str]:
    """Returns the unsteered texts by prompt and sample, for the column beside the steered ones."""
    return {f"{row.prompt} {row.sample}": row.text for row in table[table.kind == "unsteered"].itertuples()}
