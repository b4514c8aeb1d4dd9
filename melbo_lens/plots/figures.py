"""Which figures are there?  Values in, plotly figures out; nothing is shown by itself.

Each is drawn from the arrays that the function of the same name in `plots.numbers` returns: look there for exact numbers.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from melbo_lens.evaluation.rates import Behavior, Evaluation
from melbo_lens.generation.completions import Completions
from melbo_lens.measures.changes import ActivationChanges, TargetEffects
from melbo_lens.measures.radius import Calibration
from melbo_lens.plots import drawing, numbers
from melbo_lens.search.layers import LayerScan


def token_heatmap(
    changes: ActivationChanges, layer: int | None = None, relative: bool = False, completions: Completions | None = None
) -> go.Figure:
    """How far each perturbation moves the stream at each token, as vector x token.

    Args:
        changes: from `activation_changes`.
        layer: the stream that enters it; the last measured by default.
        relative: as a share of the clean stream's norm.
        completions: what the vectors write, beside the rows and on hovering.

    Raises:
        ValueError: nothing to draw, or a layer that was not measured.
    """
    return drawing.draw_matrix(numbers.token_heatmap(changes, layer, relative, completions))


def layer_heatmap(changes: ActivationChanges, vector: int = 0, relative: bool = True) -> go.Figure:
    """How far one perturbation moves the stream at each token, as layer x token.

    Args:
        changes: from `activation_changes`.
        vector: which one.
        relative: as a share of the clean stream's norm, since norms grow with the layer.

    Raises:
        ValueError: there is no such vector.
    """
    return drawing.draw_matrix(numbers.layer_heatmap(changes, vector, relative))


def cosine_similarity(of: Any, completions: Completions | None = None) -> go.Figure:
    """Cosines between vectors, or between effects at the target, in the order of a clustering and with its tree.

    Blue is alike, red opposite (plotly's RdBu, midpoint 0). Leaves that join low in the tree are near-duplicates.

    Args:
        of: `SteeringVectors`, anything else with `cosine_similarity()`, or `TargetEffects`.
        completions: what the vectors write, on hovering.
    """
    return drawing.draw_clustered(numbers.cosine_similarity(of, completions))


def objective_history(vectors: Any, control: Any = None, completions: Completions | None = None) -> go.Figure:
    """The objective of each perturbation against the step, with the level that random ones reach.

    Args:
        vectors: what was fitted.
        control: objectives of norm-matched random perturbations, as from `objective`; without it the level is that of the random starts.
        completions: what the vectors write, on hovering.

    Raises:
        ValueError: the vectors have no history (derived ones, or joined ones whose histories differ in length).
    """
    return drawing.draw_lines(numbers.objective_history(vectors, control, completions))


def ranking(table: pd.DataFrame, completions: Completions | None = None) -> go.Figure:
    """Vectors and signs in the order of a table, with each of its measures as a panel of bars.

    Args:
        table: as from `rank`: vector, sign, and numeric columns, such as kl, objective, or rates of behaviours.
        completions: what the vectors write, beside the rows and on hovering.

    Raises:
        ValueError: no row or no measure.
    """
    return drawing.draw_panels(numbers.ranking(table, completions))


def radius_curve(calibration: Calibration) -> go.Figure:
    """The curve on which a radius was solved, with the target and the solution."""
    return drawing.draw_lines(numbers.radius_curve(calibration))


def layer_map(scan: LayerScan, value: str = "gain") -> go.Figure:
    """One value for every pair of layers, the larger of the two signs.

    Args:
        scan: from `scan_layers`.
        value: "gain" (objective over that of random vectors), or one of the table's columns: "objective", "kl", "entropy", "radius".

    Raises:
        ValueError: no pair, or an unknown value.
    """
    return drawing.draw_matrix(numbers.layer_map(scan, value))


def effect_scatter(
    changes: TargetEffects, completions: Completions | None = None, behaviors: Mapping[str, Behavior] | None = None
) -> go.Figure:
    """Each perturbation's effect at the target as a point: the first two principal components.

    Args:
        changes: from `target_effects`.
        completions: what the vectors write, on hovering.
        behaviors: colours: the behaviour that most completions of a vector and sign show.

    Raises:
        ValueError: nothing to draw.
    """
    return drawing.draw_points(numbers.effect_scatter(changes, completions, behaviors))


def behavior_rates(evaluation: Evaluation) -> go.Figure:
    """The rate of each behaviour over all steered completions beside random and unsteered ones, with 95 % intervals."""
    return drawing.draw_bars(numbers.behavior_rates(evaluation))


def scale_sweep(completions: Completions, behaviors: Mapping[str, Behavior], coherence: Any = None) -> go.Figure:
    """Above: the rate of each behaviour against multiples of the vectors, with intervals; below: how coherent the text is.

    Args:
        completions: from `generate(..., scales=(0.5, 1, 2))`.
        behaviors: name -> regular expression or function of the text.
        coherence: for each completion its mean log-probability under the unsteered model, as from `coherence`; without it the share of
            different words is shown, which falls where a text repeats itself.
    """
    return drawing.draw_stacked(*numbers.scale_sweep(completions, behaviors, coherence))
