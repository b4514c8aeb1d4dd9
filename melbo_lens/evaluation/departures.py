"""How does a completion depart from the unsteered one?  Not at all, in wording, in content, or into noise.

A hidden behaviour has a mark that needs no label. The unsteered model finds one of its tokens improbable, the one that
departs, and the text around it natural. Another wording has no improbable token, and in noise most are.
"""

from collections.abc import Set
from typing import Literal, TypeAlias

import pandas as pd

from melbo_lens.evaluation.coherence import token_log_probs
from melbo_lens.evaluation.words import telling_words, words
from melbo_lens.generation.completions import Completions
from melbo_lens.models.access import Model

Kind: TypeAlias = Literal["same", "wording", "content", "noise"]
KINDS = ("same", "wording", "content", "noise")
COLUMNS = ["change", "new_words", "surprise", "natural"]
NATURAL = -3.0  # nats per token: text that the unsteered model finds less probable than this is noise to it
NEW = 0.5  # the share of new words from which on a change is one of content


def departures(model: Model, completions: Completions) -> pd.DataFrame:
    """Says of each completion how it departs from the unsteered completions of its prompt.

    Args:
        model: the model that wrote the completions.
        completions: completions as `generate` returns them, with the unsteered ones.

    Returns:
        A row for each completion, with the index of the completions' table:
        - change: "same" (an unsteered text), "noise" (`natural` is below -3), "content" (at least half of its
          different telling words are neither in the unsteered completion nor in the prompt) or "wording".
        - new_words: that share. Words of more than three letters and numbers are telling; one in capitals is another
          word.
        - surprise: minus the log-probability, in nats, that the unsteered model gives to the least probable token, of
          which the end of a completion is one.
        - natural: the mean log-probability of the other tokens, in nats per token; of one token that does not end, its
          own; of an empty completion 0.
    """
    table = completions.table
    plain, known = _unsteered(table)
    columns = []
    for row, log_probs in zip(table.itertuples(), token_log_probs(model, completions, True), strict=True):
        new = new_words(row.text, known[row.prompt])
        n = len(log_probs)
        surprise = -float(log_probs.min()) if n else 0.0
        natural = (float(log_probs.sum()) + surprise) / (n - 1) if n > 1 else -surprise if row.text else 0.0
        columns.append((_change(row.text, plain[row.prompt], new, natural), new, surprise, natural))
    return pd.DataFrame(columns, columns=COLUMNS, index=table.index)


def in_words(table: pd.DataFrame, natural: pd.Series | None = None) -> pd.DataFrame:
    """Says the same of a table of completions as far as texts alone can tell, without a model.

    Args:
        table: the table of `Completions`.
        natural: the mean log-probability of each completion, as from `coherence`, by which noise is told; without it
            nothing is called noise.

    Returns:
        The columns of `departures`; surprise is NaN, and so is natural if it was not given. A completion whose prompt
        has no unsteered one is compared with the empty text.
    """
    plain, known = _unsteered(table)
    judged = pd.Series(float("nan") if natural is None else natural, index=table.index)
    columns = []
    for text, prompt, mean in zip(table.text, table.prompt, judged, strict=True):
        new = new_words(text, known[prompt])
        columns.append((_change(text, plain[prompt], new, mean), new, float("nan"), mean))
    return pd.DataFrame(columns, columns=COLUMNS, index=table.index)


def _unsteered(table: pd.DataFrame) -> tuple[dict[int, set[str]], dict[int, set[str]]]:
    """By prompt: the unsteered texts, of which there may be several samples, and the words of these and of the prompt.

    A prompt that has none is compared with the empty text.
    """
    texts: dict[int, set[str]] = table[table.kind == "unsteered"].groupby("prompt").text.agg(set).to_dict()
    asked = table.drop_duplicates("prompt").set_index("prompt").prompt_text
    plain = {prompt: texts.get(prompt, {""}) for prompt in asked.index}
    return plain, {prompt: words(text).union(*map(words, plain[prompt])) for prompt, text in asked.items()}


def _change(text: str, before: Set[str], new: float, natural: float) -> Kind:
    """How a text departs from the unsteered ones; what no model judged, whose `natural` is NaN, is not called noise."""
    if text in before:
        return "same"
    if natural < NATURAL:
        return "noise"
    return "content" if new >= NEW else "wording"


def new_words(text: str, known: Set[str]) -> float:
    """Returns the share of the different telling words of a text that are not known."""
    telling = telling_words(text)
    return len(telling - known) / len(telling) if telling else 0.0


def shares(rows: pd.DataFrame) -> dict[str, float]:
    """Says which share of the directions does what; a direction is a vector of a trial with a sign.

    "nothing" means that no completion changed. Otherwise it is "noise" if most of the changed completions are, else
    "content" if one of them is, else "wording".
    """
    kinds = kinds_of(rows)
    return {kind: float((kinds == kind).sum()) / max(len(kinds), 1) for kind in ("nothing", *KINDS[1:])}


def kinds_of(rows: pd.DataFrame) -> pd.Series:
    """Says what each direction does, as `shares` counts it; the index is trial, vector and sign."""
    steered = rows[rows.kind == "steered"]
    keys = [steered.trial, steered.vector, steered.sign]
    counts = pd.crosstab(keys, steered.change).reindex(columns=list(KINDS), fill_value=0)
    changed = counts[list(KINDS[1:])].sum(axis=1)
    kinds = pd.Series("wording", index=counts.index)
    kinds[counts.content > 0] = "content"
    kinds[2 * counts.noise > changed] = "noise"
    kinds[changed == 0] = "nothing"
    return kinds
