"""Which numbers does each picture show?  Each function turns measured values or completions into labelled arrays."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform
from sklearn.decomposition import PCA

from melbo_lens.evaluation.rates import Behavior, Evaluation, verdicts
from melbo_lens.generation.completions import Completions
from melbo_lens.measures.changes import ActivationChanges, TargetEffects
from melbo_lens.measures.radius import Calibration
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.perturbation import Numbers, Perturbation
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.plots.arrays import (
    MOST_ROWS,
    Bars,
    Clustered,
    Line,
    Lines,
    Matrix,
    Panels,
    Points,
    left_out,
    without_numbers,
)
from melbo_lens.plots.labels import SIGNS, examples, shown_behaviors, some, wilson
from melbo_lens.plots.text import visible
from melbo_lens.search.layers import LayerScan

MOST_RANKED = 60


def token_heatmap(
    changes: ActivationChanges, layer: int | None = None, relative: bool = False, completions: Completions | None = None
) -> Matrix:
    """Returns the changes at one layer (the last measured one by default), [vector token]."""
    some(len(changes), "perturbations")
    at = _layer_index(changes, layer)
    values = (changes.relative if relative else changes.change)[:, at].numpy()
    texts = examples(completions)
    return Matrix(
        values[:MOST_ROWS],
        tuple(str(k) for k in range(min(len(values), MOST_ROWS))),
        _columns(changes.tokens),
        "vector",
        "token",
        "change / clean norm" if relative else "norm of the change",
        f"Change at each token, entering layer {changes.layers[at]}",
        texts=tuple(texts.get(k, "") for k in range(min(len(values), MOST_ROWS))) if texts else (),
        note=" ".join(filter(None, [left_out(len(values), "vectors"), without_numbers(values, "vectors")])),
    )


def layer_heatmap(changes: ActivationChanges, vector: int = 0, relative: bool = True) -> Matrix:
    """Returns the changes of one vector, [layer token]."""
    _one_of(vector, len(changes), "vector")
    values = (changes.relative if relative else changes.change)[vector].numpy()
    return Matrix(
        values,
        tuple(map(str, changes.layers)),
        _columns(changes.tokens),
        "layer entered",
        "token",
        "change / clean norm" if relative else "norm of the change",
        f"Change by layer and token, vector {vector}",
        upward=True,
        note=without_numbers(values, "layers", changes.layers),
    )


def cosine_similarity(of: Perturbation | TargetEffects, completions: Completions | None = None) -> Clustered:
    """Returns cosines of vectors or of rows of `TargetEffects`, in the order of average linkage on 1 - cosine."""
    if isinstance(of, SteeringAdapters):
        raise TypeError(
            f"{type(of).__name__} have no cosines of their own: compare what they do, "
            "plots.cosine_similarity(ml.target_effects(...))."
        )
    n = len(of)
    some(n, "vectors")
    kept = min(n, MOST_ROWS)
    if isinstance(of, TargetEffects):
        keys = list(zip(of.vectors[:kept], of.signs[:kept], strict=True))
        both = len({sign for _, sign in keys}) > 1
        names, what = [f"{k}{SIGNS[s] if both else ''}" for k, s in keys], f"effects at layer {of.target_layer}"
        shown = of
        if kept < n:
            shown = replace(of, values=of.values[:kept], vectors=of.vectors[:kept], signs=of.signs[:kept])
    else:
        keys = names = list(range(kept))
        what = "vectors"
        shown = cast(SteeringVectors, of)  # or another kind that has cosines
        if kept < n:
            shown = shown[list(range(kept))]
    cosines = shown.cosine_similarity().cpu().double().numpy()
    order, joins = _tree(cosines)
    texts = examples(completions, by_sign=isinstance(of, TargetEffects))
    labels = tuple(str(names[i]) for i in order)
    matrix = Matrix(
        cosines[np.ix_(order, order)],
        labels,
        labels,
        "vector",
        "vector",
        "cosine",
        f"Cosine similarity of {what}",
        signed=True,
        bound=1.0,
        texts=tuple(texts.get(keys[i], "") for i in order) if texts else (),
        note=" ".join(
            filter(None, [left_out(n, "vectors"), without_numbers(np.diagonal(cosines)[:, None], "rows", names)])
        ),
    )
    return Clustered(matrix, tuple(order), joins)


def objective_history(
    vectors: Perturbation, control: Numbers | None = None, completions: Completions | None = None
) -> Lines:
    """Returns a curve over the steps for each vector; the level is the mean objective of norm-matched vectors."""
    history = vectors.history.cpu().numpy()
    if not history.shape[0]:
        raise ValueError("these vectors have no history: plot the fitted ones, before arithmetic and joining.")
    texts, steps = examples(completions), np.arange(len(history))
    lines = tuple(
        Line(f"vector {k}", steps, column, text=texts.get(k, "")) for k, column in enumerate(history.T[:MOST_ROWS])
    )
    level = None
    if control is not None:
        level = ("random vectors, mean", float(np.mean(np.asarray(control, dtype=float))))
    elif vectors.provenance.get("init") is None:
        level = ("random starts, mean", float(np.nanmean(history[0])))
    note = left_out(history.shape[1], "vectors")
    positive = bool((history[np.isfinite(history)] > 0).all())
    return Lines(lines, "step", "objective", "Objective against step", log_y=positive, level=level, note=note)


def ranking(table: pd.DataFrame, completions: Completions | None = None) -> Panels:
    """Returns the measures of each vector and sign in the order of the table; every numeric column is a measure."""
    some(len(table), "rows")
    skipped = {"vector", "sign", "cluster", "near_duplicates", "scale", "prompt"}
    numeric = [
        name for name in table.select_dtypes("number").columns if name not in skipped and table[name].notna().any()
    ]
    if not numeric:
        raise ValueError(f"the table has no measure to show, only {list(table.columns)}: give one as `rank` makes it.")
    shown, texts = table.head(MOST_RANKED), examples(completions, by_sign=True)
    keys = [(int(row.vector), int(row.sign)) for row in shown.itertuples()]
    note = left_out(len(table), "rows", MOST_RANKED, "sort or filter the table to see others")
    return Panels(
        shown[numeric].to_numpy(dtype=float).T,
        tuple(f"{k} {SIGNS[s]}" for k, s in keys),
        tuple(numeric),
        "Vectors, best first",
        tuple(texts.get(key, "") for key in keys) if texts else (),
        note,
    )


def radius_curve(calibration: Calibration) -> Lines:
    """Returns the curve on which a radius was solved, with the target and the solution."""
    radii, values = (np.array(column, dtype=float) for column in zip(*calibration.curve, strict=True))
    return Lines(
        (Line(calibration.rule, radii, values),),
        "radius",
        calibration.rule,
        "Calibration of the radius",
        log_x=True,
        log_y=True,
        level=("target", calibration.target),
        mark=(f"radius {calibration.radius:.3g}", calibration.radius),
    )


def layer_map(scan: LayerScan, value: str = "gain") -> Matrix:
    """Returns the larger value of the two signs, [source target]; pairs that were not tried are NaN."""
    if value not in ("gain", "objective", "kl", "entropy", "radius"):
        raise ValueError(f"value={value!r} must be one of gain, objective, kl, entropy, radius.")
    some(len(scan.table), "pairs of layers")
    table = scan.table.assign(gain=scan.table.objective / scan.table.random_objective)
    grid = table.pivot_table(index="source_layer", columns="target_layer", values=value, aggfunc="max")
    names = {"gain": "objective / that of random vectors", "kl": "KL, nats", "entropy": "entropy, nats"}
    return Matrix(
        grid.to_numpy(),
        tuple(map(str, grid.index)),
        tuple(map(str, grid.columns)),
        "source layer",
        "target layer",
        names.get(value, value),
        f"Pairs of layers: {value}",
        upward=True,
    )


def effect_scatter(
    changes: TargetEffects, completions: Completions | None = None, behaviors: Mapping[str, Behavior] | None = None
) -> Points:
    """Returns two principal components of the effects; a row's group is the behaviour its completions show most."""
    some(len(changes), "perturbations")
    values = changes.values.double().numpy()
    fine = np.flatnonzero(np.isfinite(values).all(1))
    some(len(fine), "rows without NaN")
    if len(fine) > 1 and values.shape[1] > 1:
        pca = PCA(2, random_state=0).fit(values[fine])
        places, shares = pca.transform(values[fine]), pca.explained_variance_ratio_
    else:
        places, shares = np.zeros((len(fine), 2)), np.full(2, np.nan)
    texts, groups = examples(completions, by_sign=True), shown_behaviors(completions, behaviors)
    keys = [(changes.vectors[i], changes.signs[i]) for i in fine]
    axes = [
        f"component {i + 1}" + (f", {share:.0%} of the variance" if np.isfinite(share) else "")
        for i, share in enumerate(shares)
    ]
    return Points(
        places[:, 0],
        places[:, 1],
        tuple(groups.get(key, "none") for key in keys),
        tuple(f"vector {k} {SIGNS[s]}" for k, s in keys),
        tuple(texts.get(key, "") for key in keys),
        axes[0],
        axes[1],
        f"Effects at layer {changes.target_layer}",
        without_numbers(
            values, "rows", [f"{k}{SIGNS[s]}" for k, s in zip(changes.vectors, changes.signs, strict=True)]
        ),
    )


def behavior_rates(evaluation: Evaluation) -> Bars:
    """Returns the rate of each behaviour in all steered completions and in the controls, with 95 % Wilson intervals."""
    summary = evaluation.summary
    some(len(summary), "behaviours")
    rows: list[tuple[Iterable[float], ...]] = [(summary.rate, summary.low, summary.high)]
    for name in ("random", "unsteered"):
        counts = summary.get(f"n_{name}", pd.Series(0, index=summary.index))
        rows.append(
            (
                summary[name],
                *zip(*[wilson(rate, n) for rate, n in zip(summary[name], counts, strict=True)], strict=True),
            ),
        )
    values, low, high = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    groups = ("steered", "random, same norms", "unsteered")
    return Bars(
        values,
        low,
        high,
        tuple(summary.behavior),
        groups,
        "share of completions",
        "How often completions show each behaviour",
        evaluation.note,
    )


def scale_sweep(
    completions: Completions, behaviors: Mapping[str, Behavior], coherence: Numbers | None = None
) -> tuple[Lines, Lines]:
    """Returns rates, and coherence, against signed multiples of the vectors; multiple 0 is unsteered.

    `coherence` has one number for each completion, as from `coherence`; without it, the share of different words is
    used instead.
    """
    table = completions.table
    some(len(table), "completions")
    if not behaviors:
        raise ValueError("behaviors is empty: name at least one, as {'portuguese': r'\\ba resposta'}.")
    if coherence is None:
        measure, quantity = (
            table.text.map(lambda text: len(set(text.split())) / max(len(text.split()), 1)),
            "share of different words",
        )
    else:
        measure, quantity = (
            pd.Series(np.asarray(coherence, dtype=float), index=table.index),
            "log-probability per token, unsteered",
        )
    rows = table.assign(multiple=table.sign * table.scale, coherence=measure)
    rates, means = [], []
    for kind in ("steered", "random"):
        part = rows[rows.kind.isin([kind, "unsteered"])]
        if not (part.kind == kind).any():
            continue
        groups = part.groupby("multiple")
        for name, behavior in behaviors.items():
            if kind == "random" and len(behaviors) > 1:
                continue
            shown = verdicts(part.text, behavior).groupby(part.multiple)
            hits = shown.mean()
            bounds = np.array([wilson(rate, n) for rate, n in zip(hits, shown.count(), strict=True)])
            label = name if kind == "steered" else f"{name}, random"
            rates.append(
                Line(
                    label,
                    hits.index.to_numpy(float),
                    hits.to_numpy(),
                    bounds[:, 0],
                    bounds[:, 1],
                    control=kind == "random",
                )
            )
        if kind == "random" and len(behaviors) > 1:
            each = pd.DataFrame({name: verdicts(part.text, behavior) for name, behavior in behaviors.items()})
            known = each.notna().all(axis=1) | each.eq(1).any(axis=1)  # else an error might have been the one
            shown = each.eq(1).any(axis=1).astype(float).where(known).groupby(part.multiple)
            hits = shown.mean()
            bounds = np.array([wilson(rate, n) for rate, n in zip(hits, shown.count(), strict=True)])
            rates.append(
                Line(
                    "any, random", hits.index.to_numpy(float), hits.to_numpy(), bounds[:, 0], bounds[:, 1], control=True
                )
            )
        mean = groups.coherence.mean()
        means.append(Line(kind, mean.index.to_numpy(float), mean.to_numpy(), control=kind == "random"))
    axis = "multiple of the vector (0: unsteered)"
    return (
        Lines(tuple(rates), axis, "share of completions", "Behaviour and coherence against scale", percent=True),
        Lines(tuple(means), axis, quantity, "Coherence"),
    )


def _tree(cosines: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Returns the order and the joins; rows with NaN come last and are in no join."""
    fine = np.flatnonzero(np.isfinite(np.diagonal(cosines)))
    rest = [int(i) for i in np.flatnonzero(~np.isfinite(np.diagonal(cosines)))]
    if len(fine) < 2:
        return [*map(int, fine), *rest], np.zeros((0, 4, 2))
    distances = np.clip(1 - cosines[np.ix_(fine, fine)], 0, 2)
    np.fill_diagonal(distances, 0)
    links = linkage(squareform((distances + distances.T) / 2, checks=False), "average", optimal_ordering=True)
    tree = dendrogram(links, no_plot=True)
    places = (np.array(tree["icoord"]) - 5) / 10  # scipy places leaf i at 10 i + 5
    return [*(int(fine[i]) for i in tree["leaves"]), *rest], np.stack([places, np.array(tree["dcoord"])], axis=-1)


def _columns(tokens: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{i} {visible(token)}" for i, token in enumerate(tokens))


def _layer_index(changes: ActivationChanges, layer: int | None) -> int:
    if layer is None:
        return len(changes.layers) - 1
    if layer not in changes.layers:
        raise ValueError(f"layer={layer} was not measured: choose from {list(changes.layers)}.")
    return changes.layers.index(layer)


def _one_of(index: int, n: int, what: str) -> None:
    some(n, f"{what}s")
    if not 0 <= index < n:
        raise ValueError(f"{what}={index} was asked for, there are {n}: use 0 to {n - 1}.")
