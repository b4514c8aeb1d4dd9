"""What does a model expect next, and how natural does it find what was written?  Log-probabilities, steered and unsteered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_lens import hooks
from melbo_lens.access import host_of
from melbo_lens.arguments import public
from melbo_lens.completions import Completions
from melbo_lens.differences import ROWS_AT_ONCE
from melbo_lens.host import Host
from melbo_lens.prompts import Prompts, one_prompt, token_texts, tokenize


@dataclass(frozen=True, eq=False, repr=False)
class NextTokens:
    """What a model expects after each token of a text, under several conditions.

    Attributes:
        tokens: text of each token.
        log_probs: of the token that does follow, the last token has none.
        ranks: how many tokens are more likely than that one.
        top_tokens: for each condition and position, the k most likely next tokens.
        top_log_probs: the log-probabilities of `top_tokens`.
        conditions: "unsteered" and the perturbations.
    """

    tokens: tuple[str, ...]
    log_probs: Float[Tensor, "condition pos_minus_1"]
    ranks: Int[Tensor, "condition pos_minus_1"]
    top_tokens: tuple[tuple[tuple[str, ...], ...], ...]
    top_log_probs: Float[Tensor, "condition pos k"]
    conditions: tuple[str, ...]

    def __repr__(self) -> str:
        return f"NextTokens({len(self.tokens)} tokens; {', '.join(self.conditions)})"


@public
def next_tokens(model: Any, prompt: Prompts, perturbations: Any = None, k: int = 10) -> NextTokens:
    """The next-token log-probabilities at each position of one text, unsteered and under each perturbation.

    Args:
        model: left as it was.
        prompt: one text, chat or row of token ids, or one completion (`completions[3]`: its prompt and what was written, as the ids they were).
        perturbations: None: unsteered only.
        k: how many of the most likely tokens to keep.
    """
    host = host_of(model)
    batch = tokenize(host, prompt)
    one_prompt(batch)
    if not 1 <= k <= host.cfg.d_vocab:
        raise ValueError(f"k={k} must be from 1 to d_vocab = {host.cfg.d_vocab}.")
    following = batch.tokens[:, 1:, None]
    log_probs, ranks, best, values = [], [], [], []
    runs = [None, *(perturbations[[i]].on(host) for i in range(len(perturbations)))] if perturbations is not None else [None]
    with hooks.frozen(host), torch.no_grad():
        for i, run in enumerate(runs):
            with hooks.attached(host, [] if run is None else run.hooks()):
                logits = host.forward(batch.tokens).float()
            hooks.check_finite(host, logits, ["the unsteered model" if run is None else f"vector {i - 1}"], "the logits")
            logits = logits.log_softmax(-1)
            followed = logits[:, :-1].gather(-1, following)
            log_probs.append(followed[0, :, 0].cpu())
            ranks.append((logits[:, :-1] > followed).sum(-1)[0].cpu())
            top = logits[0].topk(k)
            values.append(top.values.cpu())
            best.append(tuple(tuple(token_texts(host, row)) for row in top.indices.tolist()))
    conditions = ("unsteered", *(f"vector {i}" for i in range(len(runs) - 1)))
    tokens = tuple(token_texts(host, batch.rows()[0]))
    return NextTokens(tokens, torch.stack(log_probs), torch.stack(ranks), tuple(best), torch.stack(values), conditions)


@public
def coherence(model: Any, completions: Completions) -> Float[Tensor, " completion"]:
    """How natural the unsteered model finds each completion: its mean log-probability per new token, NaN for an empty one.

    Args:
        model: the one that completed; left as it was.
        completions: from `generate`.
    """
    host = host_of(model)
    found = torch.full((len(completions),), float("nan"), dtype=torch.float32, device="cpu")
    prompts = _prompt_rows(host, completions)
    rows = [(i, prompts[i], list(new)) for i, new in enumerate(completions.table.tokens) if len(new)]
    rows = sorted(rows, key=lambda row: len(row[1]) + len(row[2]))
    device = host.device
    with hooks.frozen(host), torch.no_grad():
        for first in range(0, len(rows), ROWS_AT_ONCE):
            chunk = rows[first : first + ROWS_AT_ONCE]
            width = max(len(prompt) + len(new) for _, prompt, new in chunk)
            tokens = torch.tensor([(prompt + new + [prompt[0]] * width)[:width] for _, prompt, new in chunk], dtype=torch.long, device=device)
            logits = host.forward(tokens)[:, :-1].float()
            hooks.check_finite(host, logits, ["the unsteered model"] * len(chunk), "the logits")
            log_probs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[:, :, 0]
            for row, (i, prompt, new) in zip(log_probs, chunk, strict=True):
                found[i] = row[len(prompt) - 1 : len(prompt) + len(new) - 1].mean()
    return found


def _prompt_rows(host: Host, completions: Completions) -> Sequence[list[int]]:
    """The ids of each row's prompt: those that were used, or, of completions that don't know them, those that its text has."""
    if completions.prompt_tokens is not None:
        return [list(ids) for ids in completions.prompt_tokens]
    known = {text: tokenize(host, text).rows()[0] for text in completions.table.prompt_text.drop_duplicates()}
    return [known[text] for text in completions.table.prompt_text]
