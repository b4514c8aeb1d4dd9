"""Which figures are there?  Each function takes measured values and returns a plotly figure; it displays nothing.

It is one of plotly with one method more: `to_paper` makes it a figure of a paper. It is drawn from the arrays that the
function of the same name in `plots.numbers` or `plots.rates` returns; use that one for exact numbers.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from melbo_lens.evaluation.rates import Behavior, Evaluation
from melbo_lens.generation.completions import Completions
from melbo_lens.measures.changes import ActivationChanges, TargetEffects
from melbo_lens.measures.radius import Calibration
from melbo_lens.perturbations.perturbation import Numbers, Perturbation
from melbo_lens.plots import drawing, numbers, rates
from melbo_lens.plots.paper import Figure
from melbo_lens.search.layers import LayerScan


def token_heatmap(
    changes: ActivationChanges,
    layer: int | None = None,
    relative: bool = True,
    completions: Completions | None = None,
    names: Sequence[str] | None = None,
) -> Figure:
    """Shows how far each perturbation moves the stream at each token, as a heat map of vectors and tokens.

    Attention sinks, whose changes can be thousands of times larger than all others, have a colour of their own and are
    left out of the scale. Of over sixty perturbations, those that change most and the quantiles of all are shown.

    Args:
        changes: from `activation_changes`.
        layer: shows the stream that enters this layer; the last measured layer by default.
        relative: shows the change as a share of the clean stream's norm at that token; False shows its norm.
        completions: shows what the vectors write, beside the rows and on hovering.
        names: what the vectors are called, one for each; their numbers by default. A name stands for the vector as it
            was measured, so that only what its sign + writes is shown beside it.

    Returns:
        The figure, which is not shown by itself.

    Raises:
        ValueError: there is nothing to draw, the layer was not measured, or there is not one name for each vector.
    """
    return drawing.draw_matrix(numbers.token_heatmap(changes, layer, relative, completions, names))


def layer_heatmap(
    changes: ActivationChanges, vector: int = 0, relative: bool = True, name: str | None = None
) -> Figure:
    """Shows how far one perturbation moves the stream at each token, as a heat map of layers and tokens.

    Attention sinks have a colour of their own and are left out of the scale.

    Args:
        changes: from `activation_changes`.
        vector: the index of the perturbation.
        relative: shows the change as a share of the clean stream's norm at that place, which grows with the layer;
            False shows its norm.
        name: what the perturbation is called in the title; its index by default.

    Returns:
        The figure, which is not shown by itself.

    Raises:
        ValueError: there is no such vector.
    """
    return drawing.draw_matrix(numbers.layer_heatmap(changes, vector, relative, name))


def cosine_similarity(
    of: Perturbation | TargetEffects, completions: Completions | None = None, names: Sequence[str] | None = None
) -> Figure:
    """Shows the cosines between vectors, or between effects at the target, in the order of a clustering with its tree.

    Blue means alike and red opposite (plotly's RdBu with midpoint 0). Leaves that join low in the tree are
    near-duplicates. Over sixty are joined to sixty clusters, of which the mean cosines are shown.

    Args:
        of: `SteeringVectors`, another perturbation with `cosine_similarity()`, or `TargetEffects`.
        completions: shows what the vectors write, on hovering.
        names: what the rows are called, one for each; their numbers by default. The name of a vector stands for it as
            it is, so that only what its sign + writes is shown beside it.

    Returns:
        The figure, which is not shown by itself.

    Raises:
        TypeError: the perturbations have no cosines, as adapters have none.
        ValueError: there is nothing to draw, or there is not one name for each row.
    """
    return drawing.draw_clustered(numbers.cosine_similarity(of, completions, names))


def objective_history(
    vectors: Perturbation, control: Numbers | None = None, completions: Completions | None = None
) -> Figure:
    """Shows the objective of each perturbation against the step, with the level that random perturbations reach.

    Of over sixty perturbations, those that end highest, the median and bands between quantiles are shown.

    Args:
        vectors: the fitted perturbations.
        control: objectives of norm-matched random perturbations, as from `objective`; without it, the level is that of
            the starts.
        completions: shows what the vectors write, on hovering.

    Returns:
        The figure, which is not shown by itself.

    Raises:
        ValueError: the vectors have no history, because they were derived, or were joined from histories of different
            lengths.
    """
    return drawing.draw_lines(numbers.objective_history(vectors, control, completions))


def ranking(table: pd.DataFrame, completions: Completions | None = None, names: Sequence[str] | None = None) -> Figure:
    """Shows vectors and signs in the order of a table, with a panel of bars for each of its measures.

    Of over sixty rows, the first twenty and the quantiles of each measure are shown.

    Args:
        table: as from `rank`, with columns for vector and sign and numeric ones such as kl, objective, or rates of
            behaviours.
        completions: shows what the vectors write, beside the rows and on hovering.
        names: what the rows are called, one for each; their numbers with their signs by default.

    Returns:
        The figure, which is not shown by itself.

    Raises:
        ValueError: the table has no row or no measure, or there is not one name for each row.
    """
    return drawing.draw_panels(numbers.ranking(table, completions, names))


def radius_curve(calibration: Calibration) -> Figure:
    """Shows the curve on which a radius was solved, with the target and the solution.

    Args:
        calibration: from `calibrate_radius`, or the `edge` of a search.

    Returns:
        The figure, which is not shown by itself.
    """
    return drawing.draw_lines(numbers.radius_curve(calibration))


def layer_map(scan: LayerScan, value: str = "gain") -> Figure:
    """Shows one value for every pair of layers: the larger one of the two signs.

    Args:
        scan: from `scan_layers`.
        value: "gain" (the objective divided by that of random vectors), or one of the table's columns: "objective",
            "kl", "entropy", "radius".

    Returns:
        The figure, which is not shown by itself.

    Raises:
        ValueError: there is no pair, or the value is unknown.
    """
    return drawing.draw_matrix(numbers.layer_map(scan, value))


def effect_scatter(
    changes: TargetEffects, completions: Completions | None = None, behaviors: Mapping[str, Behavior] | None = None
) -> Figure:
    """Shows each perturbation's effect at the target as a point, given by its first two principal components.

    Args:
        changes: from `target_effects`.
        completions: shows what the vectors write, on hovering.
        behaviors: colours each point by the behaviour that most completions of that vector and sign show.

    Returns:
        The figure, which is not shown by itself.

    Raises:
        ValueError: there is nothing to draw.
    """
    return drawing.draw_points(numbers.effect_scatter(changes, completions, behaviors))


def behavior_rates(evaluation: Evaluation) -> Figure:
    """Shows the rate of each behaviour in steered, random and unsteered completions, with 95 % intervals.

    Args:
        evaluation: from `evaluate`.

    Returns:
        The figure, which is not shown by itself.
    """
    return drawing.draw_bars(rates.behavior_rates(evaluation))


def scale_sweep(
    completions: Completions, behaviors: Mapping[str, Behavior], coherence: Numbers | None = None
) -> Figure:
    """Shows the rate of each behaviour against multiples of the vectors, and below it how coherent the text is.

    Args:
        completions: from `generate(..., scales=(0.5, 1, 2))`.
        behaviors: name -> regular expression or function of the text.
        coherence: the mean log-probability of each completion under the unsteered model, as from `coherence`. Without
            it, the share of different words is shown, which falls where a text repeats itself.

    Returns:
        The figure, which is not shown by itself.
    """
    return drawing.draw_stacked(*rates.scale_sweep(completions, behaviors, coherence))
