"""How do changes look on the text itself?  These token views open offline: circuitsvis elements and a token table."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from melbo_lens.measures.changes import ActivationChanges
from melbo_lens.measures.next_tokens import NextTokens
from melbo_lens.plots.arrays import left_out
from melbo_lens.plots.embedding import Element, TokenView
from melbo_lens.plots.labels import names_of
from melbo_lens.plots.text import visible

MOST_VECTORS = 60  # each of them has a button or an entry in a menu
MOST_NUMBERS = 40_000  # they take a third of a megabyte on a page
BOUNDS = (
    "A token is the bluer, the nearer its number is to the positive bound, which is the largest one unless you write "
    "another. Negative numbers would be red, down to the negative bound; a change has none."
)


def colored_tokens(
    changes: ActivationChanges, vector: int = 0, layer: int | None = None, relative: bool = True
) -> TokenView:
    """Shows the text with each token coloured by how far one perturbation moves the stream there.

    Args:
        changes: from `activation_changes`.
        vector: the index of the perturbation.
        layer: shows the stream that enters this layer; the last measured layer by default.
        relative: shows the change as a share of the clean stream's norm at that token; False shows its norm. Attention
            sinks are left out either way.

    Returns:
        The view, which shows itself in a notebook; `save` writes it as a file that opens offline.

    Raises:
        ValueError: there is no such vector or layer.
    """
    at = _layer(changes, layer)
    if not 0 <= vector < len(changes):
        raise ValueError(f"vector={vector} was asked for, there are {len(changes)}: use 0 to {len(changes) - 1}.")
    numbers, note = _changes(changes, relative, vector, at)
    heading = f"Change at each token, vector {vector}, entering layer {changes.layers[at]}"
    tokens = _tokens(changes.tokens)
    bound = float(numbers.max()) or 1.0
    properties = {
        "tokens": tokens,
        "values": _short(numbers),
        "minValue": 0,
        "maxValue": bound,
        "positiveColor": "#2166ac",
        "negativeColor": "#b2182b",
    }
    return TokenView((Element(heading, "ColoredTokens", properties, _still(tokens, numbers), note),))


def colored_tokens_multi(
    changes: ActivationChanges,
    layer: int | None = None,
    relative: bool = True,
    names: Sequence[str] | None = None,
) -> TokenView:
    """Shows the text with one button for each perturbation, which colours the tokens by that perturbation's change.

    Args:
        changes, layer, relative: as in `colored_tokens`.
        names: what the perturbations are called, one for each; their numbers by default.

    Returns:
        The view, which shows itself in a notebook; `save` writes it as a file that opens offline.

    Raises:
        ValueError: there is nothing to draw, or there is not one name for each perturbation.
    """
    _some(changes)
    at = _layer(changes, layer)
    numbers, note = _changes(changes, relative, slice(MOST_VECTORS), at)
    labels = [f"vector {name}" for name in names_of(len(changes), names)[: len(numbers)]]
    tokens = _tokens(changes.tokens)
    properties = {"tokens": tokens, "values": _short(numbers.T), "labels": labels}
    note = " ".join(filter(None, [BOUNDS, left_out(len(changes), "vectors", MOST_VECTORS), note]))
    heading = f"Change at each token, entering layer {changes.layers[at]}"
    return TokenView((Element(heading, "ColoredTokensMulti", properties, _still(tokens, numbers[0]), note),))


def text_neuron_activations(
    changes: ActivationChanges, relative: bool = True, names: Sequence[str] | None = None
) -> TokenView:
    """Shows the text with menus for the layer and the perturbation; tokens are coloured by the change.

    Args:
        changes, relative: as in `colored_tokens`.
        names: what the perturbations are called, one for each; their numbers by default.

    Returns:
        The view, which shows itself in a notebook; `save` writes it as a file that opens offline.

    Raises:
        ValueError: there is nothing to draw, or there is not one name for each perturbation.
    """
    _some(changes)
    most = max(1, min(MOST_VECTORS, MOST_NUMBERS // changes.clean.numel()))
    numbers, note = _changes(changes, relative, slice(most))
    tokens = _tokens(changes.tokens)
    properties = {
        "tokens": tokens,
        "activations": _short(numbers.transpose(2, 1, 0)),
        "firstDimensionName": "Layer entered",
        "secondDimensionName": "Vector",
        "firstDimensionLabels": [str(layer) for layer in changes.layers],
        "secondDimensionLabels": names_of(len(changes), names)[: len(numbers)],
    }
    note = " ".join(filter(None, [left_out(len(changes), "vectors", most), note]))
    return TokenView(
        (
            Element(
                "Change by vector and layer", "TextNeuronActivations", properties, _still(tokens, numbers[0, 0]), note
            ),
        )
    )


def token_log_probs(expected: NextTokens, conditions: Iterable[int] | None = None) -> TokenView:
    """Shows the text once for each condition, with tokens coloured by log-probability.

    Hovering over a token shows the tokens that were most likely there.

    Args:
        expected: from `next_tokens`.
        conditions: indices of the conditions to show; the first four by default, of which the first is unsteered.

    Returns:
        The view, which shows itself in a notebook; `save` writes it as a file that opens offline.

    Raises:
        ValueError: the text has one token only, so nothing predicts it, or there is no such condition.
    """
    if len(expected.tokens) < 2:
        raise ValueError(
            "the text has one token, so no next token is known: give a longer text, as the prompt with a completion."
        )
    chosen = list(range(min(4, len(expected.conditions))) if conditions is None else conditions)
    if not chosen or any(not 0 <= i < len(expected.conditions) for i in chosen):
        raise ValueError(f"conditions={chosen} must hold numbers from 0 to {len(expected.conditions) - 1}.")
    rest = (
        ""
        if conditions is not None
        else left_out(len(expected.conditions), "conditions", 4, "choose others with conditions=[...]")
    )
    tokens, elements = _tokens(expected.tokens), []
    for i in chosen:
        followed, note = _numbers(expected.log_probs[i].numpy())
        top, top_note = _numbers(expected.top_log_probs[i, :-1].numpy())
        properties = {
            "prompt": tokens,
            "topKLogProbs": _short(top),
            "topKTokens": [_tokens(row) for row in expected.top_tokens[i][:-1]],
            "correctTokenRank": expected.ranks[i].tolist(),
            "correctTokenLogProb": _short(followed),
        }
        note = " ".join(filter(None, [note or top_note, rest if i == chosen[0] else ""]))
        heading = f"How likely each token is after those before it (red: likely), {expected.conditions[i]}"
        elements.append(Element(heading, "TokenLogProbs", properties, _still(tokens[1:], np.exp(followed)), note))
    return TokenView(tuple(elements))


def top_tokens(table: pd.DataFrame, most: int = MOST_VECTORS) -> TokenView:
    """Shows the tokens that vectors promote and suppress, in a table that needs no script.

    Args:
        table: from `melbo_lens.top_tokens`.
        most: how many rows to show.

    Returns:
        The view, which shows itself in a notebook; `save` writes it as a file that opens offline.

    Raises:
        ValueError: the table has no row.
    """
    if not len(table):
        raise ValueError("there are no vectors to draw: the table is empty.")
    rows = []
    for row in table.head(most).itertuples():
        cells = "".join(f"<td>{_chips(tokens)}</td>" for tokens in (row.promoted, row.suppressed))
        rows.append(
            f"<tr><th scope='row'>{html.escape(str(row.vector))}</th><td>{html.escape(str(row.route))}</td>{cells}</tr>"
        )
    head = "<tr><th>vector</th><th>route</th><th>promoted</th><th>suppressed</th></tr>"
    still = f'<div style="overflow-x:auto"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    note = left_out(len(table), "rows", most, "choose others in the table")
    return TokenView((Element("Tokens promoted and suppressed", None, {}, still, note),))


def _chips(tokens: list[tuple[str, float]]) -> str:
    """Returns tokens, coloured by the change of their logits."""
    bound = max((abs(value) for _, value in tokens if np.isfinite(value)), default=1.0) or 1.0
    return " ".join(_chip(visible(token), value / bound, f"{value:+.4g}") for token, value in tokens)


def _still(tokens: list[str], values: np.ndarray) -> str:
    """Returns the coloured text as static HTML, which is seen where scripts don't run."""
    bound = float(np.abs(values).max()) if values.size else 0.0
    return (
        '<div style="line-height:2">'
        + "".join(
            _chip(token, value / (bound or 1.0), f"{value:.4g}")
            for token, value in zip(tokens, values.tolist(), strict=True)
        )
        + "</div>"
    )


def _chip(text: str, share: float, title: str) -> str:
    color = "33,102,172" if share >= 0 else "178,24,43"
    strength = min(abs(share), 1.0) if np.isfinite(share) else 0.0
    style = (
        f"background:rgba({color},{0.5 * strength:.2f});padding:1px 3px;"
        "border-radius:3px;font-family:monospace;white-space:pre-wrap;unicode-bidi:isolate"
    )
    return f'<span style="{style}" title="{html.escape(title)}">{html.escape(text)}</span>'


def _tokens(tokens: Iterable[str]) -> list[str]:
    return [visible(token) for token in tokens]


def _changes(changes: ActivationChanges, relative: bool, *where: int | slice) -> tuple[np.ndarray, str]:
    """Returns the changes there with attention sinks as 0, and a sentence about what is drawn as 0."""
    sinks = changes.sinks[where].numpy()
    values = (changes.relative if relative else changes.change)[where].numpy()
    numbers, note = _numbers(np.where(sinks, 0.0, values))
    places = np.flatnonzero(sinks.reshape(-1, sinks.shape[-1]).any(0)).tolist()
    named = ", ".join(map(str, places[:8])) + ("…" if len(places) > 8 else "")
    said = f"Attention sinks are left out and drawn as 0: token {named}." if places else ""
    return numbers, " ".join(filter(None, [said, note]))


def _numbers(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Replaces NaN and infinity, which JSON lacks, by 0, and returns a sentence if there were any."""
    bad = ~np.isfinite(values)
    return np.where(
        bad, 0.0, values
    ), f"{int(bad.sum())} of {bad.size} values are NaN or infinite and drawn as 0." if bad.any() else ""


def _short(values: np.ndarray) -> Any:
    """Returns nested lists of numbers with four significant digits, which keeps a page small."""
    return (
        np.vectorize(lambda value: float(f"{value:.4g}"), otypes=[float])(values).tolist()
        if values.size
        else values.tolist()
    )


def _layer(changes: ActivationChanges, layer: int | None) -> int:
    if layer is not None and layer not in changes.layers:
        raise ValueError(f"layer={layer} was not measured: choose from {list(changes.layers)}.")
    return len(changes.layers) - 1 if layer is None else changes.layers.index(layer)


def _some(changes: ActivationChanges) -> None:
    if not len(changes):
        raise ValueError("there are no perturbations to draw.")
