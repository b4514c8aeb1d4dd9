"""What do vectors and rates look like?  Figures of the fit and of its evaluation."""

import numpy as np
import plotly.graph_objects as go

from melbo_lens.calibration import Calibration
from melbo_lens.evaluation import Evaluation
from melbo_lens.layer_scan import LayerScan
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
    """Cosines between the vectors: blue alike, red opposite (plotly's RdBu, midpoint 0)."""
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


def radius_curve(calibration: Calibration) -> go.Figure:
    """The curve on which a radius was solved, with the target and the solution."""
    radii, values = zip(*calibration.curve, strict=True)
    hover = f"radius %{{x:.4g}}: {calibration.rule} %{{y:.4g}}<extra></extra>"
    figure = go.Figure(go.Scatter(x=radii, y=values, mode="lines+markers", marker_color=STEERED, hovertemplate=hover))
    figure.add_hline(y=calibration.target, line_dash="dot", annotation_text=f"target {calibration.target:g}")
    figure.add_vline(x=calibration.radius, line_dash="dot", annotation_text=f"radius {calibration.radius:.3g}")
    figure.update_layout(title="Calibration of the radius", xaxis_title="radius", yaxis_title=calibration.rule)
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    return figure


def layer_map(scan: LayerScan, value: str = "gain") -> go.Figure:
    """One value for every pair of layers, the larger of the two signs.

    Args:
        scan: from `scan_layers`.
        value: "gain" (objective over that of random vectors), or one of the table's columns: "objective", "kl", "entropy", "radius".
    """
    table = scan.table.assign(gain=scan.table.objective / scan.table.random_objective)
    if value not in ("gain", "objective", "kl", "entropy", "radius"):
        raise ValueError(f"value={value!r} must be one of gain, objective, kl, entropy, radius.")
    grid = table.pivot_table(index="source_layer", columns="target_layer", values=value, aggfunc="max")
    hover = f"source %{{y}}, target %{{x}}: {value} %{{z:.4g}}<extra></extra>"
    heatmap = go.Heatmap(z=grid.to_numpy(), x=grid.columns, y=grid.index, colorscale="Viridis", colorbar_title=value, hovertemplate=hover)
    figure = go.Figure(heatmap)
    figure.update_layout(title=f"Pairs of layers: {value}", xaxis_title="target layer", yaxis_title="source layer")
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(dtick=1)
    return figure
