"""Which numbers does each picture show?  Each function turns measured values or completions into labelled arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from melbo_lens.evaluation.rates import Behavior
from melbo_lens.generation.completions import Completions
from melbo_lens.measures.changes import ActivationChanges, TargetEffects
from melbo_lens.measures.radius import Calibration
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.perturbation import Numbers, Perturbation
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.plots.arrays import (
    MOST_ROWS,
    QUANTILES,
    Band,
    Clustered,
    Line,
    Lines,
    Matrix,
    Panels,
    Points,
    left_out,
    without_numbers,
)
from melbo_lens.plots.labels import SIGNS, examples, examples_of_rows, names_of, shown_behaviors, some
from melbo_lens.plots.text import visible
from melbo_lens.plots.trees import clusters, tree
from melbo_lens.search.layers import LayerScan

N_NAMED = {"rows": 10, "lines": 3, "points": 5}  # how many are shown one by one where there are too many for that
MOST_CLUSTERED = 2000  # their tree takes a second, and that of 5,000 four
LABEL = 20  # characters of a token below its column
UNITS = {"kl": "KL, nats", "entropy_change": "entropy change, nats"}


def token_heatmap(
    changes: ActivationChanges,
    layer: int | None = None,
    relative: bool = True,
    completions: Completions | None = None,
    names: Sequence[str] | None = None,
) -> Matrix:
    """Returns the changes at one layer (the last measured one by default), [vector token].

    Of over sixty vectors, the rows are those that change most and the quantiles of all, at each token.
    """
    n = len(changes)
    some(n, "perturbations")
    at = _layer_index(changes, layer)
    values, sinks = _changes(changes, relative)[:, at], changes.sinks[:, at].numpy()
    texts, rows = examples_of_rows(completions, names), list(range(n))
    called = names_of(n, names)
    note = without_numbers(values, "vectors", called)
    if n > MOST_ROWS:
        ordinary = np.where(sinks, np.nan, values)
        rows = _first(_means(ordinary), N_NAMED["rows"])
        values, sinks = (
            np.concatenate([values[rows], _quantiles(ordinary)]),
            np.concatenate([sinks[rows], np.repeat(sinks.all(axis=0, keepdims=True), len(QUANTILES), axis=0)]),
        )
        called = [*(called[k] for k in rows), *QUANTILES.values()]
        note = f"The {len(rows)} of {n:,} vectors that change most on average, and the quantiles of all. {note}".strip()
    shown = [texts.get(k, "") for k in rows]
    return Matrix(
        values,
        tuple(called),
        _columns(changes.tokens),
        "vector",
        "token",
        "change / clean norm" if relative else "norm of the change",
        f"Change at each token, entering layer {changes.layers[at]}",
        texts=(*shown, *[""] * (len(called) - len(shown))) if texts else (),
        note=note,
        bound=_bound(values, sinks),
        marked=sinks,
    )


def _target(effects: TargetEffects) -> str:
    return effects.target_hook if effects.target_layer is None else f"layer {effects.target_layer}"


def layer_heatmap(
    changes: ActivationChanges, vector: int = 0, relative: bool = True, name: str | None = None
) -> Matrix:
    """Returns the changes of one vector, [layer token]."""
    _one_of(vector, len(changes), "vector")
    values, sinks = _changes(changes, relative)[vector], changes.sinks[vector].numpy()
    return Matrix(
        values,
        tuple(map(str, changes.layers)),
        _columns(changes.tokens),
        "layer entered",
        "token",
        "change / clean norm" if relative else "norm of the change",
        f"Change by layer and token, vector {vector if name is None else name}",
        upward=True,
        note=without_numbers(values, "layers", changes.layers),
        bound=_bound(values, sinks),
        marked=sinks,
    )


def cosine_similarity(
    of: Perturbation | TargetEffects, completions: Completions | None = None, names: Sequence[str] | None = None
) -> Clustered:
    """Returns cosines of vectors or of rows of `TargetEffects`, in the order of average linkage on 1 - cosine.

    Over sixty are joined to sixty clusters: a cell is then the mean cosine between the members of two clusters, and a
    cluster has the name and the text of the member that is most like the others.
    """
    if isinstance(of, SteeringAdapters):
        raise TypeError(
            f"{type(of).__name__} have no cosines of their own: compare what they do, "
            "plots.cosine_similarity(ml.target_effects(...))."
        )
    n = len(of)
    some(n, "vectors")
    kept = min(n, MOST_CLUSTERED)
    if isinstance(of, TargetEffects):
        keys = list(zip(of.vectors[:kept], of.signs[:kept], strict=True))
        both = len({sign for _, sign in keys}) > 1
        numbers, what = [f"{k}{SIGNS[s] if both else ''}" for k, s in keys], f"effects at {_target(of)}"
        shown = of
        if kept < n:
            shown = replace(of, values=of.values[:kept], vectors=of.vectors[:kept], signs=of.signs[:kept])
    else:
        keys, numbers, what = list(range(kept)), list(map(str, range(kept))), "vectors"
        shown = cast(SteeringVectors, of)  # or another kind that has cosines
        if kept < n:
            shown = shown[list(range(kept))]
    called = numbers if names is None else names_of(n, names)[:kept]
    cosines = shown.cosine_similarity().cpu().double().numpy()
    notes = [
        left_out(n, "vectors", MOST_CLUSTERED),
        without_numbers(np.diagonal(cosines)[:, None], "rows", called),
    ]
    title, quantity = f"Cosine similarity of {what}", "cosine"
    if kept > MOST_ROWS:
        cosines, firsts, sizes = clusters(cosines, MOST_ROWS)
        keys, called = (
            [keys[k] for k in firsts],
            [_cluster_name(called[k], m) for k, m in zip(firsts, sizes, strict=True)],
        )
        quantity = "mean cosine"
        notes.insert(0, f"{kept:,} rows in {len(sizes)} clusters, each named by its most typical row, with its size.")
    order, joins = tree(cosines)
    of_effects = isinstance(of, TargetEffects)
    texts: dict[Any, str] = examples(completions, True) if of_effects else examples_of_rows(completions, names)
    labels = tuple(called[i] for i in order)
    matrix = Matrix(
        cosines[np.ix_(order, order)],
        labels,
        labels,
        "vector",
        "vector",
        quantity,
        title,
        signed=True,
        bound=1.0,
        texts=tuple(texts.get(keys[i], "") for i in order) if texts else (),
        note=" ".join(filter(None, notes)),
    )
    return Clustered(matrix, tuple(order), joins)


def objective_history(
    vectors: Perturbation, control: Numbers | None = None, completions: Completions | None = None
) -> Lines:
    """Returns a curve over the steps for each vector; the level is the mean objective of norm-matched vectors.

    Of over sixty vectors, it returns the curves of those that end highest, the median, and bands between quantiles.
    """
    history = vectors.history.cpu().numpy()
    if not history.shape[0]:
        raise ValueError("these vectors have no history: plot the fitted ones, before arithmetic and joining.")
    texts, steps, n = examples(completions), np.arange(len(history)), history.shape[1]
    rows, rest, bands, note = list(range(n)), (), (), ""
    if n > MOST_ROWS:
        rows = _first(history[-1], N_NAMED["lines"])
        low, quarter, median, three_quarters, high = np.nanquantile(history, sorted(QUANTILES), axis=1)
        rest = (Line(f"median of {n:,}", steps, median, control=True),)
        bands = (Band("middle 90 %", steps, low, high), Band("middle 50 %", steps, quarter, three_quarters))
        note = f"The {len(rows)} of {n:,} vectors that end highest, and the quantiles of all at each step."
    lines = tuple(Line(f"vector {k}", steps, history[:, k], text=texts.get(k, "")) for k in rows)
    level = None
    if control is not None:
        level = ("random vectors, mean", float(np.mean(np.asarray(control, dtype=float))))
    elif vectors.provenance.get("init") is None:
        level = ("at the start, mean", float(np.nanmean(history[0])))
    positive = bool((history[np.isfinite(history)] > 0).all())
    title = "Objective against step"
    return Lines(lines + rest, "step", "objective", title, log_y=positive, level=level, note=note, bands=bands)


def ranking(table: pd.DataFrame, completions: Completions | None = None, names: Sequence[str] | None = None) -> Panels:
    """Returns the measures of each vector and sign in the order of the table; every numeric column is a measure.

    Of over sixty rows, it returns the first ones and the quantiles of each measure over all.
    """
    n = len(table)
    some(n, "rows")
    skipped = {"vector", "sign", "cluster", "near_duplicates", "scale", "prompt"}
    numeric = [
        name for name in table.select_dtypes("number").columns if name not in skipped and table[name].notna().any()
    ]
    if not numeric:
        raise ValueError(f"the table has no measure to show, only {list(table.columns)}: give one as `rank` makes it.")
    many = n > MOST_ROWS
    shown, texts = table.head(2 * N_NAMED["rows"] if many else n), examples(completions, by_sign=True)
    keys = [(int(row.vector), int(row.sign)) for row in shown.itertuples()]
    # a vector may have several rows, and two of one name would share a bar
    of_row = [str(name) for name in ("behavior", "scale", "prompt") if name in table and table[name].nunique() > 1]
    more = ["".join(f" {name}" for name in row) for row in shown[of_row].astype(str).to_numpy()]
    called = [f"{k} {SIGNS[s]}" for k, s in keys] if names is None else names_of(n, names)[: len(keys)]
    called = [name + what for name, what in zip(called, more, strict=True)]
    values, rest = shown[numeric].to_numpy(dtype=float), list(QUANTILES.values()) if many else []
    if many:
        values = np.concatenate([values, _quantiles(table[numeric].to_numpy(dtype=float))])
    return Panels(
        values.T,
        (*called, *rest),
        tuple(UNITS.get(str(name), str(name)) for name in numeric),
        f"Vectors, {_in_order(table, numeric)}",
        (*(texts.get(key, "") for key in keys), *[""] * len(rest)) if texts else (),
        f"The first {len(shown)} of {n:,} rows, and the quantiles of each measure over all." if many else "",
        len(rest),
    )


def radius_curve(calibration: Calibration) -> Lines:
    """Returns the curve on which a radius was solved, with the target and the solution."""
    radii, values = (np.array(column, dtype=float) for column in zip(*calibration.curve, strict=True))
    share = calibration.rule == "readable"  # it can be 0, which no logarithmic axis has
    return Lines(
        (Line(calibration.rule, radii, values),),
        "radius",
        "readable completions" if share else calibration.rule,
        "Calibration of the radius",
        log_x=True,
        log_y=not share,
        percent=share,
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
    """Returns two principal components of the effects; a row's group is the behaviour its completions show most.

    Of over sixty rows, those farthest from the middle are named in the picture, and the others on hovering.
    """
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
        f"Effects at {_target(changes)}",
        without_numbers(
            values, "rows", [f"{k}{SIGNS[s]}" for k, s in zip(changes.vectors, changes.signs, strict=True)]
        ),
        named=_far_apart(places, N_NAMED["points"]) if len(fine) > MOST_ROWS else (),
    )


def _cluster_name(name: str, size: int) -> str:
    return name if size == 1 else f"{name} ×{size}"


def _changes(changes: ActivationChanges, relative: bool) -> np.ndarray:
    return (changes.relative if relative else changes.change).numpy()


def _bound(values: np.ndarray, left_out: np.ndarray) -> float | None:
    """Returns the largest value that is not left out; None if there is none."""
    kept = values[np.isfinite(values) & ~left_out]
    return float(kept.max()) if kept.size else None


def _means(values: np.ndarray) -> np.ndarray:
    """Returns the mean of each row without its NaN; NaN for a row that has nothing else."""
    known = np.isfinite(values)
    return np.where(known, values, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)


def _quantiles(values: np.ndarray) -> np.ndarray:
    """Returns the `QUANTILES` of each column without its NaN, [quantile column]."""
    found = np.full((len(QUANTILES), values.shape[1]), np.nan)
    known = np.isfinite(values).any(0)
    found[:, known] = np.nanquantile(np.where(np.isfinite(values), values, np.nan)[:, known], list(QUANTILES), axis=0)
    return found


def _first(values: np.ndarray, n: int) -> list[int]:
    """Returns where the n largest values are, the largest first and NaN last."""
    return np.argsort(-np.where(np.isfinite(values), values, -np.inf), kind="stable")[:n].tolist()


def _in_order(table: pd.DataFrame, measures: Sequence[str]) -> str:
    """Says by which measure a table is ordered; rows that ran into a sink come last whatever theirs is."""
    ordinary = table[~table.sink.astype(bool)] if "sink" in table else table
    by = next((name for name in measures if len(table) > 1 and ordinary[name].is_monotonic_decreasing), None)
    return "in the order of the table" if by is None else f"the largest {UNITS.get(by, by).split(',')[0]} first"


def _far_apart(places: np.ndarray, n: int) -> tuple[int, ...]:
    """Returns n points far from the middle, of which no two are so near that their names would overlap."""
    span, chosen = np.ptp(places, axis=0).max() or 1.0, list[int]()
    for k in _first(np.hypot(*places.T), len(places)):
        if len(chosen) < n and all(np.abs(places[k] - places[other]).max() > 0.2 * span for other in chosen):
            chosen.append(k)
    return tuple(chosen)


def _columns(tokens: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{i} {visible(token, LABEL)}" for i, token in enumerate(tokens))


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
