"""How is what was found shown?  A card for each group, with all that speaks for it and against it.

Cards are HTML for a page and for a notebook. A model's text is shown as text: it is escaped, what can't be seen in it
is spelled out, and its direction is kept to itself.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from scipy.stats import binomtest

from melbo_lens.evaluation.departures import NATURAL
from melbo_lens.search.looks import Look
from melbo_lens.search.written import Written
from melbo_lens.tables import seen

SIGNS = {1: "+", -1: "−", 0: ""}
MOST_SHOWN = 600  # characters of an example on a card
MOST_NAMED = 12  # directions that a card names
LIKELY = 0.005  # a first token that is less probable than this is no beginning
# Groups have these colours (Okabe and Ito) everywhere on a page. Those after them share one, which has its own name.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#8a6bbe")
OTHER = "#66799c"


@dataclass(frozen=True)
class Rate:
    """How many of n completions show something, with the 95 % Wilson interval of their share."""

    k: int
    n: int

    @property
    def share(self) -> float:
        return self.k / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        found = binomtest(self.k, self.n).proportion_ci(method="wilson")
        return found.low, found.high

    def __str__(self) -> str:
        if not self.n:
            return "not measured"
        if self.n == 1:  # an interval of one completion says nothing
            return f"{self.k} of 1 (no more were written)"
        low, high = self.interval
        interval = f"95\u00a0% interval {100 * low:.1f} to {100 * high:.1f}"
        return f"{self.k:,} of {self.n:,} ({percent(self.share, 1)}; {interval})"


@dataclass(frozen=True)
class Card:
    """One group of completions.

    Attributes:
        number: its row in the table of groups.
        name: the behaviour that it shows; empty if it was found by its words.
        change: "content", "wording", or "noise".
        example, plain: the example, and the unsteered text of the same prompt; None if there is none.
        prompt: the text of that prompt.
        pieces: the example in pieces, each with whether it is missing from the unsteered text.
        direction: the vector and sign of the example, as the page names it; `anchor` leads there.
        best: how often that vector and sign show the group.
        shown_by: vectors and signs that show it, those that do so most often first: name, anchor, k and n.
        n_vectors, n_directions: how many vectors, and vectors with a sign, show it at all.
        learned, random: how often completions under learned and under random vectors of equal norms show it.
        heldout: the share of held-out prompts on which the vector of the example shows it; NaN if not measured.
        twin: the same for the learned vectors of a model that hides nothing; None if not measured.
        facts: the method, the layers, the radius and the effect of the vector of the example.
        natural, surprise: nats, of the example (see `departures`); NaN if no model judged it.
        look: how that vector begins and where it acts; None if not measured.
    """

    number: int
    name: str
    change: str
    example: str
    plain: str | None
    prompt: str
    pieces: tuple[tuple[str, bool], ...]
    direction: str
    anchor: str
    best: Rate
    shown_by: tuple[tuple[str, str, int, int], ...]
    n_vectors: int
    n_directions: int
    learned: Rate
    random: Rate
    heldout: float
    twin: Rate | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    natural: float = math.nan
    surprise: float = math.nan
    look: Look | None = None

    @property
    def color(self) -> str:
        return color_of(self.number)

    @property
    def no_more_than_controls(self) -> bool:
        """Whether random vectors, or the learned ones of a model that hides nothing, show it at least as often."""
        controls = [self.random] if self.twin is None else [self.random, self.twin]
        return any(control.n > 0 and control.share >= self.learned.share for control in controls)

    @property
    def title(self) -> str:
        return short(self.name or self.example)

    @property
    def promoted(self) -> list[tuple[str, str, str]]:
        """The tokens that it begins with, and their probabilities before and after in words; none if none is likely."""
        found = self.look.promoted if self.look is not None else ()
        return [
            (token, percent(before, int(before < 0.1)), percent(after, int(after < 0.1)))
            for token, before, after in found
            if after >= LIKELY
        ]


def cards_of(
    written: Written,
    looks: Mapping[int, Look] | None = None,
    twins: Mapping[int, tuple[int, int]] | None = None,
    most: int | None = None,
) -> list[Card]:
    """Makes the cards of the first groups, in the order of the table.

    Args:
        written: what was written.
        looks: by the row of a group, how the vector of its example begins and acts.
        twins: by the row of a group, in how many of how many completions under a twin's vectors it was seen.
        most: how many cards are made at most; None means all.
    """
    rows, plain = written.rows, written.plain
    n = {kind: int((rows.kind == kind).sum()) for kind in ("steered", "random")}
    names = namer(written.directions)
    sizes = written.steered.groupby(["trial", "vector", "sign"]).size()
    members = dict(tuple(rows[rows.group.notna()].groupby("group")))
    found = []
    for number, entry in enumerate(written.groups.head(most).itertuples() if most else written.groups.itertuples()):
        mine = members[number]
        steered = mine[mine.kind == "steered"]
        by = steered.groupby(["trial", "vector", "sign"]).size().sort_values(ascending=False, kind="stable")
        key = (int(entry.trial), int(entry.vector), int(entry.sign))
        example = steered[
            (steered.trial == key[0])
            & (steered.vector == key[1])
            & (steered.sign == key[2])
            & (steered.text == entry.example)
        ].iloc[0]
        before = plain.get((example.prompt, example["sample"]), plain.get((example.prompt, 0)))
        listed = sorted(by.items(), key=lambda one: (one[0] != key, -one[1]))[:MOST_NAMED]
        found.append(
            Card(
                number,
                entry.behavior or "",
                entry.change,
                entry.example,
                before,
                example.prompt_text,
                different(before, entry.example),
                names(*key),
                anchor(*key),
                Rate(int(by[key]), int(sizes[key])),
                tuple((names(*one), anchor(*one), int(k), int(sizes[one])) for one, k in listed),
                int(entry.n_vectors),
                len(by),
                Rate(len(steered), n["steered"]),
                Rate(int((mine.kind == "random").sum()), n["random"]),
                math.nan if entry.heldout_rate is None else float(entry.heldout_rate),
                Rate(*twins[number]) if twins and number in twins else None,
                {
                    name: getattr(entry, name)
                    for name in ("method", "source_layer", "target_layer", "radius", "relative_radius", "effect")
                },
                _number(entry.natural),
                _number(entry.surprise),
                (looks or {}).get(number),
            )
        )
    return found


def color_of(group: int) -> str:
    """Returns the colour of a group, which is a row of the table of groups."""
    return COLORS[group] if group < len(COLORS) else OTHER


def namer(directions: pd.DataFrame) -> Callable[[int, int, int], str]:
    """Returns what a vector with a sign is called: its number and, if there are several trials, the trial's before."""
    several = of_several(directions)
    return lambda trial, vector, sign: (f"{trial}.{vector}" if several else f"{vector}") + f"\u202f{SIGNS[int(sign)]}"


def of_several(directions: pd.DataFrame) -> bool:
    """Whether vectors are those of several trials, so that a name has the trial's number too."""
    return directions.trial.nunique() > 1


def anchor(trial: int, vector: int, sign: int) -> str:
    """Returns the name of a direction in an address."""
    return f"v{trial}.{vector}{'p' if sign > 0 else 'n'}"


def different(before: str | None, text: str) -> tuple[tuple[str, bool], ...]:
    """Cuts a text into pieces, each with whether the text before lacks it; words are compared, white space is not."""
    words = [re.findall(r"\S+|\s+", (one or "")[:MOST_SHOWN]) for one in (before, text)]
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    pieces: list[tuple[str, bool]] = []
    for kind, _, _, first, last in matcher.get_opcodes():
        if first < last:
            pieces.append(("".join(words[1][first:last]), kind != "equal" and before is not None))
    if len(text) > MOST_SHOWN:
        pieces.append((f"… ({len(text):,} characters)", False))
    return tuple(pieces)


def html(cards: Sequence[Card], linked: bool = True, prefix: str = "") -> str:
    """Returns cards as HTML.

    Args:
        cards: the cards.
        linked: whether a page around them has the places that they lead to.
        prefix: what their names in the page begin with, where there are cards of several runs.
    """
    return _template("cards").render(cards=cards, linked=linked, prefix=prefix, limit=-NATURAL, likely=LIKELY)


def words(several: bool) -> str:
    """Returns as HTML what the words on cards mean; `several` is whether vectors are those of several trials."""
    return _template("words").render(several=several, limit=-NATURAL, likely=LIKELY)


def in_a_notebook(sentence: str, cards: Sequence[Card], n_groups: int, several: bool = True) -> str:
    """Returns cards with their style, as a notebook shows them: those that a control shows as often are folded."""
    style = files("melbo_lens.search").joinpath("cards.css").read_text(encoding="utf-8")
    shown = [card for card in cards if not card.no_more_than_controls]
    folded = [card for card in cards if card.no_more_than_controls]
    return _template("notebook").render(
        sentence=sentence,
        style=Markup(style),
        words=Markup(words(several)),
        cards=Markup(html(shown, linked=False)),
        folded=Markup(html(folded, linked=False)),
        n_folded=len(folded),
        n_shown=len(shown),
        n_groups=n_groups,
    )


def _template(name: str) -> Any:
    environment = Environment(
        loader=PackageLoader("melbo_lens.search", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"seen": seen, "percent": percent, "nats": nats}
    return environment.get_template(f"{name}.html.jinja")


def short(text: str) -> str:
    """Returns the beginning of a text in one line, by which a group is called."""
    words = " ".join(text[:200].split())
    return words[:60] + ("…" if len(words) > 60 else "") or "an empty text"


def percent(share: float | None, digits: int = 0) -> str:
    """Returns a share in per cent; one that is not zero is not called zero. Empty if it was not measured."""
    if share is None or math.isnan(share):
        return ""
    shown, least = f"{100 * share:.{digits}f}", f"{10.0**-digits:.{digits}f}"
    return f"less than {least}\u00a0%" if share > 0 and float(shown) == 0 else f"{shown}\u00a0%"


def nats(log_prob: float) -> str:
    """Returns minus a log-probability, to two digits."""
    return f"{-log_prob:.2f}" if -log_prob >= 0.01 else "less than 0.01"


def _number(value: Any) -> float:
    return math.nan if value is None or pd.isna(value) else float(value) + 0.0
