"""How does a picture look?  This file turns labelled arrays into plotly figures.

It is the only one that decides on sizes, colours and hover boxes.
"""

import textwrap
from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from melbo_lens.plots.arrays import Bars, Clustered, Lines, Matrix, Panels, Points
from melbo_lens.plots.paper import Figure
from melbo_lens.plots.text import for_plotly

# These can be read on white and on black, and colour-blind readers can tell them apart (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6bbe", "#b07d2b")
STEERED, CONTROL, UNSTEERED = COLORS[0], "#8c8c8c", COLORS[4]
BAND = "rgba(128,128,128,0.22)"
MARKED = COLORS[4]  # neither blue nor red nor grey, which heat maps have
GAP = 0.12  # the least distance between two ticks of a logarithmic axis, as a share of the axis
WIDEST = 0.5  # of the intervals that are drawn
NARROW = 290  # pixels between the axes on a telephone
# Dragging zooms, dragging with the shift key pans, and a double click shows all again, so their buttons only hide the
# title. Plotly's newer versions have one that sends the figure's data to their host, which nothing here may do.
REMOVED = "zoom pan select lasso zoomin zoomout autoscale sendcharttocloud sendChartToCloud".split()
LABEL = 26  # characters in the short label beside a row


def draw_matrix(matrix: Matrix) -> Figure:
    """Draws a heat map; the colours are RdBu around 0 for signed quantities and begin at white for others."""
    figure = Figure(_heatmaps(matrix))
    _matrix_axes(figure, matrix)
    figure.update_layout(plot_bgcolor="rgba(128,128,128,0.15)")  # cells that were not measured are grey
    height = len(matrix.rows) * (16 if len(matrix.rows) > 8 else 26)
    return _styled(figure, matrix.title, matrix.note, max(320, height + 190))


def draw_clustered(clustered: Clustered) -> Figure:
    """Draws a heat map with the tree of its clustering above it."""
    matrix, n = clustered.matrix, len(clustered.order)
    figure = make_subplots(figure=Figure(), rows=2, cols=1, row_heights=[0.18, 0.82], vertical_spacing=0.01)
    figure.add_traces(_heatmaps(matrix), rows=2, cols=1)
    if len(clustered.joins):
        # NaN between the joins interrupts the line, so one trace draws the whole tree
        gaps = np.full((len(clustered.joins), 1, 2), np.nan)
        x, y = np.concatenate([clustered.joins, gaps], axis=1).reshape(-1, 2).T
        distances = np.repeat(clustered.joins[:, :, 1].max(1), 5)
        look = {"mode": "lines", "line": {"color": CONTROL, "width": 1}, "showlegend": False}
        hover = "joined at distance %{customdata:.3g}<extra></extra>"
        figure.add_scatter(x=x, y=y, customdata=distances, hovertemplate=hover, **look, row=1, col=1)
    _matrix_axes(figure, matrix, row=2)
    # the tree has a numeric axis: on a categorical one, a position between two categories would add a category
    figure.update_xaxes(visible=False, range=[-0.5, n - 0.5], row=1, col=1)
    # in two lines, since the tree is too low for one
    title = {"text": "1 −<br>cosine", "font": {"size": 11}}
    figure.update_yaxes(showgrid=False, zeroline=False, nticks=3, title=title, row=1, col=1)
    return _styled(figure, matrix.title, matrix.note, int(np.clip(n * 13 + 230, 440, 1100)))


def draw_lines(lines: Lines) -> Figure:
    """Draws curves with their intervals, and the level and the mark if there are any."""
    figure = Figure()
    _add_lines(figure, lines)
    _line_axes(figure, lines)
    return _styled(figure, lines.title, lines.note, 400)


def draw_stacked(above: Lines, below: Lines) -> Figure:
    """Draws two sets of curves, one above the other, over the same axis."""
    figure = make_subplots(figure=Figure(), rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for row, lines in enumerate((above, below), start=1):
        _add_lines(figure, lines, row=row)
        _line_axes(figure, lines, row=row)
    figure.update_xaxes(title="", row=1, col=1)
    return _styled(figure, above.title, above.note, 560)


def draw_bars(bars: Bars) -> Figure:
    """Draws groups of bars with intervals."""
    figure = Figure()
    for group, color, values, low, high in zip(
        bars.groups, (STEERED, CONTROL, UNSTEERED), bars.values, bars.low, bars.high, strict=True
    ):
        spans = [f"{a:.2%} to {b:.2%}" if np.isfinite(a) else "not known" for a, b in zip(low, high, strict=True)]
        figure.add_bar(
            x=[for_plotly(name) for name in bars.names],
            y=values,
            error_y=_whiskers(values, low, high),
            name=group,
            marker_color=color,
            customdata=spans,
            hovertemplate="%{x}: %{y:.3%}<br>95 % interval %{customdata}<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(barmode="group")
    figure.update_yaxes(title=bars.quantity, tickformat=".0%", rangemode="tozero")
    hidden = " An interval wider than half the scale is not drawn; hovering shows it."
    return _styled(figure, bars.title, bars.note + (hidden if (bars.high - bars.low > WIDEST).any() else ""), 400)


def draw_panels(panels: Panels) -> Figure:
    """Draws horizontal bars, in one panel for each measure."""
    figure = make_subplots(
        figure=Figure(), rows=1, cols=len(panels.measures), shared_yaxes=True, horizontal_spacing=0.02
    )
    names, short = _row_labels(panels.rows, panels.texts)
    n_vectors = len(panels.rows) - panels.n_summaries
    for column, (measure, values) in enumerate(zip(panels.measures, panels.values, strict=True), start=1):
        hover = f"{for_plotly(measure)} %{{x:.6g}}<br>%{{y}}<extra></extra>"
        figure.add_bar(
            x=values,
            y=names,
            orientation="h",
            marker_color=[COLORS[(column - 1) % len(COLORS)]] * n_vectors + [CONTROL] * panels.n_summaries,
            hovertemplate=hover,
            row=1,
            col=column,
        )
        title = "<br>".join(textwrap.wrap(for_plotly(measure.replace("_", " ")), 10, break_long_words=False))
        figure.update_xaxes(title=title, nticks=3, title_font_size=11, tickfont_size=10, row=1, col=column)
    _row_ticks(figure, names, short, upward=False)
    figure.update_layout(showlegend=False, bargap=0.25)
    return _styled(figure, panels.title, panels.note, max(300, 17 * len(panels.rows) + 170))


def draw_points(points: Points) -> Figure:
    """Draws points coloured by group, the largest group first; points of the group "none" are grey."""
    figure = Figure()
    groups = sorted(set(points.groups), key=lambda group: (group == "none", -points.groups.count(group), group))
    for i, group in enumerate(groups):
        mine = [k for k, other in enumerate(points.groups) if other == group]
        color = CONTROL if group == "none" else COLORS[i % len(COLORS)]
        figure.add_scatter(
            x=points.x[mine],
            y=points.y[mine],
            mode="markers",
            name=for_plotly(group),
            marker={"color": color, **({"size": 6, "opacity": 0.5} if points.named else {"size": 9, "opacity": 0.8})},
            customdata=[[for_plotly(points.labels[k]), for_plotly(points.texts[k])] for k in mine],
            hovertemplate="%{customdata[0]} (%{x:.5g}, %{y:.5g})<br>%{customdata[1]}<extra>%{fullData.name}</extra>",
        )
    for k in points.named:
        figure.add_annotation(
            x=points.x[k], y=points.y[k], text=for_plotly(points.labels[k]), showarrow=False, yshift=10
        )
    figure.update_layout(showlegend=True)
    figure.update_xaxes(title=points.x_axis)
    figure.update_yaxes(title=points.y_axis)
    return _styled(figure, points.title, points.note, 460)


def _heatmaps(matrix: Matrix) -> list[go.Heatmap]:
    """Returns a heat map, and another one of the marked cells, if there are any."""
    values = np.where(np.isfinite(matrix.values), matrix.values, np.nan)
    marked = np.zeros(values.shape, bool) if matrix.marked is None else matrix.marked
    finite = values[np.isfinite(values) & ~marked]
    bound = matrix.bound or (float(np.abs(finite).max()) if finite.size else 0.0) or 1.0
    names, _ = _row_labels(matrix.rows, matrix.texts)
    scale = (
        {"colorscale": "RdBu", "zmid": 0, "zmin": -bound, "zmax": bound}
        if matrix.signed
        else {"colorscale": "Blues", "zmin": 0, "zmax": bound}
    )
    if not matrix.signed and finite.size and finite.min() < 0:
        scale["zmin"] = float(finite.min())
    place = f"{matrix.column_axis} %{{x}}<br>{matrix.quantity} %{{VALUE:.6g}}<br>{matrix.row_axis} %{{y}}"
    cells = {"x": [for_plotly(name) for name in matrix.columns], "y": names, "hoverongaps": False}
    main = go.Heatmap(
        z=np.where(marked, np.nan, values).astype(np.float32),  # halves the size of the page
        # beside the bar, a short title would stand on the ticks; a long one has no room above it
        colorbar={
            "title": {"text": matrix.quantity, "side": "top" if len(matrix.quantity) < 12 else "right"},
            "thickness": 12,
        },
        hovertemplate=place.replace("VALUE", "z") + "<extra></extra>",
        **cells,
        **scale,
    )
    if not marked.any():
        return [main]
    mark = go.Heatmap(
        z=np.where(marked, 1.0, np.nan).astype(np.float32),
        customdata=np.where(marked, values, np.nan).astype(np.float32),
        colorscale=[[0, MARKED], [1, MARKED]],
        showscale=False,
        showlegend=True,
        name=f"{matrix.mark}, left out of the scale",
        hovertemplate=place.replace("VALUE", "customdata") + f"<br>{matrix.mark}<extra></extra>",
        **cells,
    )
    return [main, mark]


def _matrix_axes(figure: Figure, matrix: Matrix, row: int = 1) -> None:
    where = {} if row == 1 else {"row": row, "col": 1}
    figure.update_xaxes(title=matrix.column_axis, type="category", showgrid=False, automargin=True, **where)
    figure.update_yaxes(title=matrix.row_axis, type="category", showgrid=False, automargin=True, **where)
    names, short = _row_labels(matrix.rows, matrix.texts)
    _row_ticks(figure, names, short, matrix.upward, **where)


def _row_labels(rows: tuple[str, ...], texts: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Returns the whole label of each row, which is shown on hovering, and a short one for the axis."""
    whole = [
        f"{for_plotly(row)}<br>{for_plotly(text)}" if text else for_plotly(row)
        for row, text in zip(rows, texts or [""] * len(rows), strict=True)
    ]
    firsts = [text.split("\n")[0] for text in texts] or [""] * len(rows)
    short = [for_plotly(f"{row}  {text}".rstrip(), LABEL, 10**6) for row, text in zip(rows, firsts, strict=True)]
    return whole, short


def _row_ticks(figure: Figure, names: list[str], short: list[str], upward: bool, **where: int) -> None:
    step = 1 if len(names) <= 100 else 2
    size = 11 if len(names) <= 40 else 9
    # ticks are a little off the categories: exactly on them, hovering would show the short label, not the whole one
    ticks = (
        {"tickvals": [i + 0.03 for i in range(0, len(names), step)], "ticktext": short[::step]}
        if names != short
        else {}
    )
    order = {} if upward else {"autorange": "reversed"}
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=names, tickfont_size=size, **ticks, **order, **where
    )


def _add_lines(figure: Figure, lines: Lines, row: int | None = None) -> None:
    where = {} if row is None else {"row": row, "col": 1}
    many = len(lines.lines) > len(COLORS)
    for band in lines.bands:
        edge = {"mode": "lines", "line": {"width": 0, "color": CONTROL}, "x": band.x, "hoverinfo": "skip"}
        figure.add_scatter(y=band.low, showlegend=False, **edge, **where)
        figure.add_scatter(y=band.high, fill="tonexty", fillcolor=BAND, name=for_plotly(band.name), **edge, **where)
    for i, line in enumerate(lines.lines):
        color = line.color or (CONTROL if line.control else COLORS[0] if many else COLORS[i % len(COLORS)])
        value = "%{y:.3%}" if lines.percent else "%{y:.6g}"
        between = (
            []
            if line.low is None or line.high is None
            else [f"95 % interval {a:.2%} to {b:.2%}" for a, b in zip(line.low, line.high, strict=True)]
        )
        rest = "%{customdata}" if between else for_plotly(line.text)
        hover = f"{for_plotly(line.name)}<br>{lines.x_axis} %{{x:.6g}}: {value}<br>{rest}<extra></extra>"
        figure.add_scatter(
            x=line.x,
            y=line.y,
            mode="lines" if many or len(line.x) > 20 else "lines+markers",
            line={"width": 1 if many else 2, "color": color, "dash": "dot" if line.control else "solid"},
            opacity=0.6 if many else 1,
            name=for_plotly(line.name),
            error_y=_whiskers(line.y, line.low, line.high, color),
            showlegend=not many and (len(lines.lines) > 1) and row in (None, 1),
            customdata=between or None,
            hovertemplate=hover,
            **where,
        )
    style = {"line_dash": "dot", "line_color": COLORS[1]}
    said = {"showarrow": False, "font": {"color": COLORS[1]}}
    if lines.level is not None:
        name, value = lines.level
        figure.add_hline(y=value, **style)
        # on a logarithmic axis, plotly places a line by its value, but a text by the logarithm of its value
        y = float(np.log10(value)) if lines.log_y else value
        figure.add_annotation(
            x=1,
            xref="paper",
            xanchor="right",
            y=y,
            yanchor="bottom",
            text=f"{name}: {100 * value:g} %" if lines.percent else f"{name}: {value:.4g}",
            **said,
        )
    if lines.mark is not None:
        name, value = lines.mark
        figure.add_vline(x=value, **style)
        x = float(np.log10(value)) if lines.log_x else value
        figure.add_annotation(x=x, xanchor="left", xshift=4, y=0, yref="paper", yanchor="bottom", text=name, **said)


def _whiskers(
    values: np.ndarray, low: np.ndarray | None, high: np.ndarray | None, color: str = "#7a7a7a"
) -> dict[str, object]:
    """Returns error bars, except those wider than `WIDEST` (from few completions), which would hide the rest.

    These are NaN, for which nothing is drawn: a bar of no length would look exact.
    """
    if low is None or high is None:
        return {}
    known = np.isfinite(low) & (high - low <= WIDEST)
    above, below = (np.where(known, part, np.nan) for part in (high - values, values - low))
    return {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "thickness": 1,
        "width": 3,
        "color": color,
    }


def _line_axes(figure: Figure, lines: Lines, row: int | None = None) -> None:
    where = {} if row is None else {"row": row, "col": 1}
    xs, ys = [line.x for line in lines.lines], [line.y for line in lines.lines]
    ys += [edge for band in lines.bands for edge in (band.low, band.high)]
    xs += [[value] for value in [lines.mark and lines.mark[1]] if value is not None]
    ys += [[value] for value in [lines.level and lines.level[1]] if value is not None]
    figure.update_xaxes(title=lines.x_axis, **(log_axis(np.concatenate(xs)) if lines.log_x else {}), **where)
    figure.update_yaxes(title=lines.y_axis, **(log_axis(np.concatenate(ys)) if lines.log_y else {}), **where)
    if all(np.issubdtype(line.x.dtype, np.integer) and line.x.max() <= 10 for line in lines.lines):
        figure.update_xaxes(dtick=1, **where)  # there is nothing between two steps
    if lines.percent:
        figure.update_yaxes(tickformat=".0%", rangemode="tozero", **where)


def log_axis(values: np.ndarray) -> dict[str, object]:
    """Returns the settings of a logarithmic axis with as many ticks as can be read, at round numbers."""
    known = values[np.isfinite(values) & (values > 0)]
    if not known.size:
        return {"type": "log"}
    low, high = known.min() / 1.1, known.max() * 1.1  # plotly leaves about so much room at the ends
    for ticks in _round_numbers(low, high):
        inside = np.log10(ticks[(ticks >= low) & (ticks <= high)])
        if len(inside) > 1 and np.diff(inside).min() >= GAP * np.log10(high / low):
            break
    return {"type": "log", "tickvals": ticks.tolist(), "ticktext": [_number(tick) for tick in ticks]}


def _round_numbers(low: float, high: float) -> Iterator[np.ndarray]:
    """Yields ever fewer round numbers from a little below `low` to a little above `high`."""
    if high < 4 * low:  # equal steps, since powers of ten are too far apart
        finest = 10.0 ** np.floor(np.log10((high - low) / 20))
        for step in np.outer(10.0 ** np.arange(3), (1, 2, 5)).ravel() * finest:
            yield step * np.arange(max(np.floor(low / step), 1), np.ceil(high / step) + 1)
    first, last = np.floor(np.log10(low)), np.ceil(np.log10(high))
    powers = 10.0 ** np.arange(first, last + 1)
    for digits in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        yield np.outer(powers, digits).ravel()
    for every in range(2, int(last - first) + 2):
        yield powers[::every]


def _number(value: float) -> str:
    """Returns a number for a tick: plain where that is short, and otherwise with a power of ten."""
    if 1e-3 <= value < 1e6:
        return f"{value:.6g}"
    digits, power = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else f"{value:.2e}".split("e")
    digits = f"{float(digits):g}"
    return ("" if digits == "1" else f"{digits}×") + f"10<sup>{int(power)}</sup>"


def _styled(figure: Figure, title: str, note: str, height: int) -> Figure:
    """Sets the title, the note below it, and the margins and fonts that all figures share."""
    wrapped = textwrap.wrap(for_plotly(note, 10**6, 10**6), 58)
    legend = 20 * _legend_rows(figure)
    above = 52 + 15 * len(wrapped) + legend
    figure.update_layout(
        template="plotly_white",
        title={
            "text": for_plotly(title),
            "font": {"size": 14},
            "x": 0,
            "xref": "container",
            "y": 1,
            "yref": "container",
            "pad": {"t": 14, "l": 12},
            "yanchor": "top",
        },
        font={"family": "system-ui, -apple-system, Segoe UI, sans-serif", "size": 12},
        margin={"l": 60, "r": 20, "t": above, "b": 50},
        meta={"legend": legend},  # a page that knows its own width corrects these pixels
        height=height + above - 52,
        legend={
            "orientation": "h",
            "y": 1.0,
            "yanchor": "bottom",
            "x": 0,
            "xanchor": "left",
            "font": {"size": 11},
        },
        hoverlabel={"align": "left", "font": {"size": 12}},
        plot_bgcolor=figure.layout.plot_bgcolor or "rgba(0,0,0,0)",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#8c8c8c", "activecolor": COLORS[0], "remove": REMOVED},
    )
    # this grey can be seen on a white page and on a black one
    figure.update_xaxes(gridcolor="rgba(128,128,128,0.2)", zerolinecolor="rgba(128,128,128,0.35)")
    figure.update_yaxes(gridcolor="rgba(128,128,128,0.2)", zerolinecolor="rgba(128,128,128,0.35)")
    if wrapped:
        figure.update_layout(title_subtitle={"text": "<br>".join(wrapped), "font": {"size": 12}})
    return figure


def _legend_rows(figure: Figure) -> int:
    """Returns how many rows the legend has on a narrow page, where entries stand in columns of equal widths."""
    maps = [trace for trace in figure.data if trace.type == "heatmap"]  # they have no entry unless they ask for one
    shown = [trace for trace in figure.data if (trace.showlegend if trace in maps else trace.showlegend is not False)]
    if figure.layout.showlegend is False or not shown or (len(shown) < 2 and not maps and not figure.layout.showlegend):
        return 0
    widest = max(45 + 6 * len(trace.name or "") for trace in shown)
    return -(-len(shown) // max(NARROW // widest, 1))
