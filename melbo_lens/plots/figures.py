"""What do vectors and rates look like?  Figures of the fit and of its evaluation."""

import numpy as np
import plotly.graph_objects as go

from melbo_lens.evaluation import Evaluation
from melbo_lens.perturbations import SteeringVectors

STEERED, CONTROL, UNSTEERED = "#2166ac", "#999999", "#1b1b1b"


def objective_history(vectors: SteeringVectors) -> go.Figure:
    """The objective of each vector against the step, on a logarithmic axis.

    Raises:
        ValueError: the vectors have no history (derived ones, or joined ones whose histories differ in length).
    """
    if not vectors.history.shape[0]:
        raise ValueError("these vectors have no history: plot the fitted ones, before arithmetic and joining.")
    figure = go.Figure()
    steps = np.arange(vectors.history.shape[0])
    for k, column in enumerate(vectors.history.T.tolist()):
        label = f"vector {k}"
        hover = f"{label}, step %{{x}}: %{{y:.5g}}<extra></extra>"
        figure.add_scatter(x=steps, y=column, mode="lines", line={"width": 1}, opacity=0.7, name=label, hovertemplate=hover)
    figure.update_layout(title="Objective against step", xaxis_title="step", yaxis_title="objective (all prompts summed)", showlegend=False)
    figure.update_yaxes(type="log")
    return figure


def cosine_similarity(vectors: SteeringVectors, labels: list[str] | None = None) -> go.Figure:
    """Cosines between the vectors: red alike, blue opposite (by the convention of the field, RdBu with midpoint 0)."""
    values = vectors.cosine_similarity().cpu().numpy()
    names = labels or [str(k) for k in range(len(vectors))]
    heatmap = go.Heatmap(
        z=values, x=names, y=names, colorscale="RdBu", zmid=0, zmin=-1, zmax=1, hovertemplate="%{y} and %{x}: %{z:.3f}<extra></extra>"
    )
    figure = go.Figure(heatmap)
    figure.update_layout(title="Cosine similarity of the vectors", xaxis_title="vector", yaxis_title="vector")
    figure.update_xaxes(type="category", nticks=20)
    figure.update_yaxes(type="category", autorange="reversed", nticks=20)
    return figure


def behavior_rates(evaluation: Evaluation) -> go.Figure:
    """The rate of each behaviour over all steered completions with its 95 % interval, beside the random and the unsteered one."""
    rows = evaluation.summary
    figure = go.Figure()
    error = {"type": "data", "symmetric": False, "array": rows.high - rows.rate, "arrayminus": rows.rate - rows.low}
    hover = "%{x}: %{y:.3%}<extra>%{fullData.name}</extra>"
    figure.add_bar(x=rows.behavior, y=rows.rate, error_y=error, name="steered", marker_color=STEERED, hovertemplate=hover)
    figure.add_bar(x=rows.behavior, y=rows.random, name="random, same norms", marker_color=CONTROL, hovertemplate=hover)
    figure.add_bar(x=rows.behavior, y=rows.unsteered, name="unsteered", marker_color=UNSTEERED, hovertemplate=hover)
    figure.update_layout(
        title="How often completions show each behaviour", yaxis_title="share of completions", yaxis_tickformat=".0%", barmode="group"
    )
    return figure
