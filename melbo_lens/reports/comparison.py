"""What did two runs, or two methods, find beside each other?  Their groups are matched and stand in one table."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melbo_lens.evaluation.words import word_counts
from melbo_lens.files import write_text
from melbo_lens.measures.ranking import cluster
from melbo_lens.plots import embed
from melbo_lens.plots.drawing import draw_stacked
from melbo_lens.reports import ladder
from melbo_lens.reports.findings import Findings
from melbo_lens.reports.page import file_of, lead, rendered
from melbo_lens.search.cards import Card, cards_of, html, of_several, words
from melbo_lens.search.groups import ALIKE

MOST_COMPARED = 40  # groups of each run
MOST_CARDS = 12


@dataclass(frozen=True)
class Run:
    """One of the runs: its name, what is said of it, its shares of directions, and its cards."""

    name: str
    lead: str
    shares: dict[str, float]
    cards: list[Card]
    html: str
    figure: str = ""


def compare(several: Sequence[Findings], path: str | os.PathLike[str], title: str) -> Path:
    """Writes the page that puts runs side by side, and returns its path."""
    everything = [findings.everything for findings in several]
    curves = [ladder.figure(ladder.ladder(written), written) for written in everything]
    drawn = iter(embed([draw_stacked(*pair) for pair in curves if pair is not None]))
    runs = []
    for number, (findings, written) in enumerate(zip(several, everything, strict=True)):
        cards = cards_of(written, findings.looks, findings.twins, MOST_COMPARED)
        name = findings.title if len({one.title for one in several}) == len(several) else f"run {number + 1}"
        figure = next(drawn) if curves[number] is not None else ""
        shown = html(cards[:MOST_CARDS], linked=False, prefix=f"run-{number}-")
        runs.append(Run(name, lead(written), written.shares, cards, shown, figure))
    page = rendered(
        "comparison",
        title=title,
        runs=runs,
        rows=matched([run.cards for run in runs]),
        alike=1 - ALIKE,
        most=MOST_COMPARED,
        words=words(any(of_several(written.directions) for written in everything)),
        later=file_of("later.js"),
    )
    write_text(path, page)
    return Path(path)


def matched(runs: Sequence[Sequence[Card]]) -> list[dict[str, Any]]:
    """Puts groups of one behaviour, or of similar words, of several runs into one row.

    Returns:
        A row for each such group, those that stand first in any run first: a title, and for each run its card, or None
        if it has no such group.
    """
    unnamed = list(dict.fromkeys(card.example for cards in runs for card in cards if not card.name))
    labels = dict(zip(unnamed, cluster(word_counts(unnamed), ALIKE), strict=True))
    rows: dict[Any, dict[str, Any]] = {}
    for i, cards in enumerate(runs):
        for card in cards:
            key = card.name or labels[card.example]
            row = rows.setdefault(key, {"title": card.title, "cards": [None] * len(runs), "first": card.number})
            row["first"] = min(row["first"], card.number)
            if row["cards"][i] is None:  # the first of a run that has several
                row["cards"][i] = card
    return sorted(rows.values(), key=lambda row: (row["first"], -sum(card is not None for card in row["cards"])))
