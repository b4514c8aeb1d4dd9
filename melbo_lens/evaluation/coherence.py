"""How natural does the unsteered model find a completion?  The mean log-probability of its tokens tells."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.arguments import public
from melbo_lens.generation.completions import Completions
from melbo_lens.memory import in_batches
from melbo_lens.models import hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.host import Host
from melbo_lens.models.reading import END, log_probs_after, read_at_once
from melbo_lens.prompts import tokenize


@public
def coherence(model: Model, completions: Completions) -> Float[Tensor, " completion"]:
    """How natural the unsteered model finds each completion: the mean log-probability of its new tokens.

    Args:
        model: the model that wrote the completions; it is left as it was.
        completions: the completions, as `generate` returns them.

    Returns:
        One number in nats for each completion; NaN for an empty one.

    Raises:
        FloatingPointError: the logits hold NaN or infinity.
    """
    means = [row.mean() for row in token_log_probs(model, completions)]  # the mean of no token is NaN
    return torch.stack(means) if means else torch.zeros(0, dtype=torch.float32, device="cpu")


def token_log_probs(model: Model, completions: Completions, with_end: bool = False) -> list[Float[Tensor, " new"]]:
    """Computes the log-probability, in nats, that the unsteered model gives to each token of each completion.

    Equal completions are read once, and so is each prompt.

    Args:
        model: the model that wrote the completions.
        completions: the completions.
        with_end: whether a completion that ended by itself has a last entry for its end, which is no token of it.

    Raises:
        FloatingPointError: a log-probability is NaN or infinite.
    """
    host = host_of(model)
    found = [torch.zeros(0, dtype=torch.float32, device="cpu")] * len(completions)
    same: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}  # prompt -> new tokens -> completions
    longest = _longest(host, completions) if with_end else 0
    for i, (prompt, new) in enumerate(zip(_prompt_rows(host, completions), completions.table.tokens, strict=True)):
        read = (*new, END) if len(new) < longest else tuple(new)
        if read:
            same.setdefault(tuple(prompt), {}).setdefault(read, []).append(i)
    cached = True

    def log_probs(prompt: Sequence[int], rows: Sequence[Sequence[int]]) -> tuple[list[Float[Tensor, " new"]], bool]:
        return log_probs_after(host, prompt, rows, cached)

    with hooks.frozen(host), torch.no_grad():
        for prompt, continuations in same.items():
            texts = sorted(continuations, key=len)
            at_once = read_at_once(host, len(texts[-1]))
            for chunk, (known, trusted) in in_batches(texts, at_once, partial(log_probs, prompt)):
                cached = trusted
                for text, row in zip(chunk, known, strict=True):
                    hooks.check_finite(host, row[None], ["the unsteered model"], "the log-probabilities")
                    for i in continuations[text]:
                        found[i] = row.cpu()
    return found


def _longest(host: Host, completions: Completions) -> int:
    """The number of tokens below which a completion ended by itself; 0 if that can't be told."""
    settings = completions.settings
    if settings.get("stop") or not hooks.end_tokens(host):
        return 0
    return int(settings.get("max_new_tokens") or 0)


def _prompt_rows(host: Host, completions: Completions) -> Sequence[list[int]]:
    """The ids of each row's prompt; if the completions don't know them, the prompt's text is tokenized again."""
    if completions.prompt_tokens is not None:
        return [list(ids) for ids in completions.prompt_tokens]
    known = {text: tokenize(host, text).rows()[0] for text in completions.table.prompt_text.drop_duplicates()}
    return [known[text] for text in completions.table.prompt_text]
