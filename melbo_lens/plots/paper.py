"""How does a figure become one of a paper?  It gets a column's width, readable serif letters and no title."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plotly.graph_objects as go

from melbo_lens.arguments import one_of
from melbo_lens.files import write_atomically

WIDTHS = {1: 3.25, 2: 6.75}  # inches of one column and of both, as in most two-column styles
PIXELS = 96  # in an inch; a point of type is 4/3 of a pixel
TEXT = 9.5  # pixels, which are 7.1 points
ROW = 11  # pixels between the labels of two rows
LESS = {1: 0.6, 2: 0.8}  # the height of the axes, as a share of what it is on a page
SERIF = "Times New Roman, Times, Liberation Serif, DejaVu Serif, serif"
FORMATS = (".pdf", ".svg")
NO_MARGINS = "<style>@page { margin: 0 }</style>"


class Figure(go.Figure):
    """A figure of plotly that can be made one of a paper."""

    def to_paper(self, path: str | os.PathLike[str] | None = None, columns: int = 1) -> "Figure":
        """Makes this a figure of a paper, and writes it as vector graphics.

        Its letters are serif and 7 points high. Title and note are left out: their place is the caption. Labels beside
        the rows need room, so figures with completions, and rankings of several measures, want two columns.

        Args:
            path: the file to write, which ends in .pdf (its letters are embedded) or .svg. Nothing is written if it is
                None.
            columns: 1 makes the figure 3.25 inches wide, 2 makes it 6.75.

        Returns:
            A new figure; this one stays as it is.

        Raises:
            ValueError: the path ends in something else, or `columns` is neither 1 nor 2.
            ModuleNotFoundError: kaleido, which writes the file, is not installed.
            RuntimeError: kaleido found neither Chrome nor Chromium.
        """
        one_of("columns", columns, WIDTHS)
        if path is not None and Path(path).suffix.lower() not in FORMATS:
            raise ValueError(f"path={str(path)!r} must end in .pdf or .svg, the vector formats of papers.")
        figure = _restyled(self, columns)
        if path is not None:
            write_atomically(path, _drawn(figure, Path(path).suffix.lower()[1:]))
        return figure


def _restyled(figure: Figure, columns: int) -> Figure:
    found, margin = Figure(figure), figure.layout.margin
    area = ((figure.layout.height or 450) - (margin.t or 0) - (margin.b or 0)) * LESS[columns]
    for axis in found.select_yaxes():
        low, high = axis.domain or (0, 1)
        area = max(area, ROW * len(axis.categoryarray or ()) / (high - low))
    color = "black"
    found.update_layout(
        title=None,
        width=round(WIDTHS[columns] * PIXELS),
        height=round(area + 60),
        font={"family": SERIF, "size": TEXT, "color": color},
        margin={"l": 5, "r": 5, "t": 20, "b": 5, "autoexpand": True},
        legend={"font": {"size": TEXT}, "tracegroupgap": 0},
        paper_bgcolor="white",
    )
    axes = {"title": {"font": {"size": TEXT}, "standoff": 4}, "tickfont": {"size": TEXT, "color": color}}
    found.update_xaxes(**axes, automargin=True)
    found.update_yaxes(**axes, automargin=True)
    found.update_annotations(font_size=TEXT)
    found.update_traces({"colorbar": {"thickness": 7, "tickfont": {"size": TEXT}}}, selector={"type": "heatmap"})
    found.update_traces({"colorbar": {"title": {"font": {"size": TEXT}}}}, selector={"type": "heatmap"})
    found.update_traces({"marker": {"size": 4}, "line": {"width": 1}}, selector={"type": "scatter"})
    return found


def _drawn(figure: Figure, form: str) -> bytes:
    """Returns the figure as a file of this format, which kaleido draws in a browser without asking any host."""
    try:
        import kaleido
        from kaleido.errors import ChromeNotFoundError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "kaleido, which writes figures as files, is not installed: pip install 'melbo-lens[paper]'."
        ) from error
    # kaleido leaves margins on the page of a PDF, shrinks the figure into them and cuts its foot off
    page = kaleido.PageGenerator(mathjax=False).generate_index().replace("</head>", f"{NO_MARGINS}</head>")
    size: dict[str, Any] = {"format": form, "width": figure.layout.width, "height": figure.layout.height, "scale": 1}
    try:
        return kaleido.calc_fig_sync(
            figure.to_dict(), opts=size, kopts={"page_generator": SimpleNamespace(generate_index=lambda: page)}
        )
    except ChromeNotFoundError as error:
        raise RuntimeError(
            "kaleido draws figures in Chrome or Chromium and found neither: install one (on Debian, apt install "
            "chromium), or name it in the environment variable BROWSER_PATH."
        ) from error
