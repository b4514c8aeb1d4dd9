"""Which figures does a page have?  Each with its caption, and with the names by which the page calls its vectors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import pandas as pd

from melbo_lens import plots
from melbo_lens.evaluation.rates import Evaluation
from melbo_lens.generation.completions import COLUMNS, Completions
from melbo_lens.measures.radius import Calibration
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.plots.drawing import draw_stacked
from melbo_lens.reports import ladder
from melbo_lens.reports.findings import MOST_DRAWN, Findings
from melbo_lens.search.cards import Card, namer
from melbo_lens.search.written import Written

FIGURES: Any = "rates ladder scales radius layer-map layers changes cosines effect-cosines ranked objective".split()
RULES = {
    "readable": "the share of completions that are readable falls through {target:.0%}",
    "effect": "the change at the target layer is {target:.3g} of the norm of what is there unsteered",
    "nonlinearity": "the change at the target layer departs by {target:.3g} of its size from a linear one",
    "fraction": "the radius is {target:.3g} of the norm of the activation to which vectors are added",
    "stream": "the radius is {target:.3g} of the stream's norm",
    "kl": "random vectors move the next token's distribution by {target:.3g} nats",
}
Direction: TypeAlias = tuple[int, int, int]  # a trial, a vector of it, and a sign
T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """A figure of the page with its caption, or the reason why it is missing."""

    anchor: str
    caption: str
    html: str = ""
    reason: str = ""

    @property
    def broad(self) -> bool:
        """Whether it has a column for each token or vector, so that a narrow page has to scroll it."""
        return self.anchor in ("layer-map", "layers", "changes", "cosines", "effect-cosines")


class Rows:
    """The vectors that were measured: what the page calls them, and what is written with them."""

    def __init__(self, findings: Findings, written: Written) -> None:
        search = findings.search
        # an earlier version measured the vectors that it shows, of a single form
        said = search.get("measured", search.get("shown", []))
        self.directions: list[Direction] = [(int(trial), int(vector), int(sign)) for trial, vector, sign in said]
        self.call = namer(written.directions)
        self.completions = completions_of(written, self.directions) if said else findings.completions

    def direction(self, number: int, sign: int = 1) -> Direction:
        """The trial, vector and sign of a measured row to which a sign was given."""
        trial, vector, own = self.directions[number] if number < len(self.directions) else (0, number, 1)
        return trial, vector, own * sign

    def name(self, number: int, sign: int = 1) -> str:
        return in_figures(self.call(*self.direction(number, sign)))

    def names(self, n: int) -> list[str]:
        return [self.name(number) for number in range(n)]


def in_figures(name: str) -> str:
    """The name of a direction with a plain space, since figures spell out all others."""
    return name.replace("\u202f", " ")


def completions_of(written: Written, directions: Sequence[Direction]) -> Completions:
    """What was written with some directions, numbered in their order; of a group, its example comes first."""
    steered, groups = written.steered, written.groups
    parts = [written.rows[written.rows.kind == "unsteered"]]
    for number, (trial, vector, sign) in enumerate(directions):
        mine = steered[(steered.trial == trial) & (steered.vector == vector) & (steered.sign == sign)]
        of = groups[(groups.trial == trial) & (groups.vector == vector) & (groups.sign == sign)].head(1)
        mine = mine.sort_values("text", key=lambda texts, of=of: ~texts.isin(of.example), kind="stable")
        parts.append(mine.assign(vector=number, sign=1))
    rows = pd.concat(parts, ignore_index=True).astype({"vector": "Int64"})
    return Completions(rows.assign(tokens=None, log_probs=None)[COLUMNS])


def as_completions(written: Written) -> Completions:
    """The rows as completions, with one number for each vector of each trial."""
    keys = pd.MultiIndex.from_frame(written.directions[["trial", "vector"]].astype(int))
    rows = written.rows.copy()
    known = rows.vector.notna()
    mine = pd.MultiIndex.from_arrays([rows.trial[known], rows.vector[known].astype(int)])
    rows.loc[known, "vector"] = keys.get_indexer(mine)
    return Completions(rows.assign(tokens=None, log_probs=None)[COLUMNS])


def figures(
    findings: Findings,
    written: Written,
    evaluation: Evaluation | None,
    rungs: pd.DataFrame,
    cards: Sequence[Card],
) -> Iterator[Picture]:
    """Draws every figure whose values are there, in the order of the page.

    Args:
        findings, written: what the page shows.
        evaluation: the rates of behaviours; None if none are named.
        rungs: from `ladder`.
        cards: those of the page, in its order.
    """
    vectors, completions, behaviors = findings.vectors, findings.completions, findings.behaviors
    changes, effects, ranked = findings.changes, findings.effects, findings.ranked
    several = completions.table.scale[completions.table.scale > 0].nunique() > 1
    curves = ladder.figure(rungs, written) if len(rungs) else None
    rows = Rows(findings, written)
    row, of = _first_measured(rows, cards, 0 if changes is None else len(changes))
    own, missing = _of_one_layer(findings, written)
    planned: list[tuple[str, str, Callable[[], Any] | None]] = [
        (
            "rates",
            "Bars with 95 % Wilson intervals; grey and yellow are the controls.",
            # its note stands below the table
            _if_given(evaluation, lambda evaluation: plots.behavior_rates(replace(evaluation, note=""))),
        ),
        (
            "ranked",
            "Each row is a vector with a sign. The KL divergence says how far it moves the distribution of the next "
            "token after the prompts, not whether what it writes makes sense. A blank means not measured.",
            _if_given(
                ranked,
                lambda ranked: plots.ranking(
                    ranked,
                    rows.completions,
                    [rows.name(k, s) for k, s in zip(ranked.vector.astype(int), ranked.sign.astype(int), strict=True)],
                ),
            ),
        ),
        (
            "objective",
            "A curve for each vector. The dotted line is what random vectors of the same norm reach.",
            # vectors of several trials have none
            (lambda: plots.objective_history(vectors, findings.control, completions))
            if findings.written is None or len(vectors.history)
            else None,
        ),
        (
            "cosines",
            f"Blue alike, red opposite. Branches that join low are near-duplicates. {missing}".strip(),
            _if_given(
                vectors if isinstance(vectors, SteeringVectors) else None,
                lambda vectors: plots.cosine_similarity(
                    vectors[list(own)] if own else vectors,
                    completions_of(written, list(own.values())) if own else completions,
                    [in_figures(rows.call(*one)) for one in own.values()] if own else rows.names(len(vectors)),
                ),
            ),
        ),
        (
            "effect-cosines",
            "The same for what the vectors change at the target: different vectors may do the same.",
            _if_given(
                effects,
                lambda effects: plots.cosine_similarity(
                    effects,
                    rows.completions,
                    [rows.name(k, s) for k, s in zip(effects.vectors, effects.signs, strict=True)],
                ),
            ),
        ),
        (
            "changes",
            "How far each vector moves the residual stream at each token of the first prompt.",
            _if_given(
                changes,
                lambda changes: plots.token_heatmap(
                    changes, completions=rows.completions, names=rows.names(len(changes))
                ),
            ),
        ),
        (
            "layers",
            f"{of}: how far it moves the stream at each token of the first prompt, entering each layer, as a share of "
            "the clean stream's norm there. Up to the layer where it is added, nothing changes.",
            _if_given(changes, lambda changes: plots.layer_heatmap(changes, row, name=rows.name(row))),
        ),
        (
            "ladder",
            "Above: the shares of completions that are readable, and that belong to the first groups, with 95 % "
            "intervals. Below: the median effect. The axis of the radius is logarithmic.",
            _if_given(curves, lambda curves: draw_stacked(*curves)),
        ),
        (
            "scales",
            "Above: how often each behaviour is seen at multiples of the vectors. Below: how coherent the text is.",
            (lambda: plots.scale_sweep(completions, behaviors, findings.coherence)) if several and behaviors else None,
        ),
        (
            "radius",
            "" if findings.calibration is None else how_found(findings.calibration),
            _if_given(findings.calibration, plots.radius_curve),
        ),
        (
            "layer-map",
            "Objective of a few vectors over that of random ones, the larger sign.",
            _if_given(findings.scan, plots.layer_map),
        ),
    ]
    drawn: list[tuple[str, str, Any, str]] = []  # a figure, or None with the reason
    planned.sort(key=lambda one: FIGURES.index(one[0]))  # the library stands before the first figure of the page
    for place, caption, draw in planned:
        if draw is not None:
            try:
                drawn.append((place, caption, draw(), ""))
            except ValueError as error:
                drawn.append((place, caption, None, str(error)))
    embedded = iter(plots.embed([figure for _, _, figure, _ in drawn if figure is not None]))
    for place, caption, figure, reason in drawn:
        yield Picture(place, caption, next(embedded) if figure is not None else "", reason)


def token_views(findings: Findings, written: Written) -> plots.TokenView | None:
    """The token views of the page; None if there are none."""
    changes, own = findings.changes, []
    if changes is not None and len(changes):
        names = Rows(findings, written).names(len(changes))
        own = [plots.colored_tokens_multi(changes, names=names), plots.text_neuron_activations(changes, names=names)]
    chosen = [view for view in (*own, findings.views) if view is not None]
    return plots.TokenView(tuple(element for view in chosen for element in view.elements)) if chosen else None


def which_rows(findings: Findings) -> str:
    """Says whose vectors the figures of a search have."""
    if "measured" not in findings.search or findings.groups is None or not len(findings.groups):
        return ""
    n = len(findings.groups)
    which = f"the first {MOST_DRAWN} of {n} groups" if n > MOST_DRAWN else f"all {n} groups" if n > 1 else "the group"
    return (
        f"The vectors here, each with its sign, wrote the examples of {which}, and have the names that cards give them."
    )


def how_found(calibration: Calibration) -> str:
    """Says by which rule a radius was found, and how it follows from the curve."""
    where = "" if calibration.layers is None else " of layers {} to {}".format(*calibration.layers)
    learned = "learned vectors" if calibration.rule in ("readable", "effect") else "vectors"
    rule = RULES.get(calibration.rule, f"{calibration.rule} is {{target:.3g}}").format(target=calibration.target)
    edge = calibration.radius / calibration.share
    tried = [radius for radius, _ in calibration.curve]
    below, above = max((r for r in tried if r < edge), default=edge), min((r for r in tried if r > edge), default=edge)
    text = f"At which norm should {learned}{where} be? The rule: {rule}. Each point is a radius that was tried."
    if below < edge < above:
        text += (
            f" The target is passed between {below:.3g} and {above:.3g}, and the middle of the two by ratio is taken, "
            f"{edge:.3g}, so that the dotted lines need not meet on the curve."
        )
    if calibration.share != 1:
        text += f" The radius is {calibration.share:g} of it."
    return text + (
        " The axis of the radius is logarithmic." if calibration.rule == "readable" else " Both axes are logarithmic."
    )


def _first_measured(rows: Rows, cards: Sequence[Card], n: int) -> tuple[int, str]:
    """The row of the first card whose direction was measured, and what the caption calls it."""
    number = {rows.name(k): k for k in reversed(range(n))}
    for card in cards:
        if (name := in_figures(card.direction)) in number:
            return number[name], f"Vector {card.direction}, of card {card.number + 1} (“{card.title}”)"
    return 0, f"Vector {rows.name(0)}"


def _of_one_layer(findings: Findings, written: Written) -> tuple[dict[int, Direction], str]:
    """Which of the vectors of a search are compared, each once whatever its sign, and which groups are missing."""
    first: dict[tuple[int, int], tuple[int, Direction]] = {}
    for number, (trial, vector, sign) in enumerate(findings.search.get("shown", [])):
        first.setdefault((int(trial), int(vector)), (number, (int(trial), int(vector), int(sign))))
    groups = written.groups.head(MOST_DRAWN)
    others = [n + 1 for n, row in enumerate(groups.itertuples()) if (int(row.trial), int(row.vector)) not in first]
    if not first or not others:
        return dict(first.values()), ""
    listed = f"{', '.join(map(str, others[:-1]))} and {others[-1]}" if len(others) > 1 else str(others[0])
    (layer,) = findings.vectors.source_layers[:1]
    return dict(first.values()), (
        f"These vectors are added at layer {layer}. Group{'s' if len(others) > 1 else ''} {listed} "
        f"{'are' if len(others) > 1 else 'is'} missing: the vectors of the examples are of another layer or kind, and "
        "their angle with these says little. What they change can be compared."
    )


def _if_given(value: T | None, draw: Callable[[T], Any]) -> Callable[[], Any] | None:
    """Returns a function that draws the value, or None if there is no value."""
    return None if value is None else lambda: draw(value)
