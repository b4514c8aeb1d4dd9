"""How do figures get into a page that opens offline?"""

from collections.abc import Sequence

import plotly.graph_objects as go


def embed(figures: Sequence[go.Figure]) -> list[str]:
    """Each figure as HTML; the first one brings plotly.js along, once for all. Plotly escapes `<`, `>` and `&` in what it writes."""
    return [
        figure.to_html(full_html=False, include_plotlyjs=i == 0, config={"responsive": True, "displaylogo": False}, default_height="28rem")
        for i, figure in enumerate(figures)
    ]
