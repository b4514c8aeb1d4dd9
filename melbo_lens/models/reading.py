"""How probable does a model find what others wrote?  It reads many continuations of a prompt at once."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_lens.memory import is_out_of_memory
from melbo_lens.models.hooks import end_tokens
from melbo_lens.models.host import Host
from melbo_lens.models.passes import CACHE_ERRORS, closeness

READ_AT_ONCE, READING_BYTES = 64, 2**30
END = -1  # in a row of ids, whichever token ends a text


def read_at_once(host: Host, n_tokens: int) -> int:
    """How many rows of so many tokens are read together: 64, or as many as have 1 GiB of logits and logarithms."""
    of_row = 3 * 4 * n_tokens * host.cfg.d_vocab  # the logits, their copy in float32 and their logarithms
    return max(1, min(READ_AT_ONCE, READING_BYTES // of_row))


def log_probs_after(
    host: Host, prompt: Sequence[int], rows: Sequence[Sequence[int]], cached: bool = True
) -> tuple[list[Float[Tensor, " new"]], bool]:
    """Computes how probable the unsteered model finds each token of several continuations of one prompt.

    The prompt runs once, and its cache serves all rows. The longest row is compared with a pass without a cache; if the
    two differ, or if the cache holds recurrent states, every row runs as a whole.

    Args:
        host: the opened model, which the caller has frozen.
        prompt: the ids of the prompt.
        rows: the ids of the continuations, none of them empty; a last id may be `END`, which stands for any end token.
        cached: whether a cache may be used.

    Returns:
        The log-probabilities of each row's tokens, and whether the cache can be trusted.
    """
    whole = [[*prompt, *row] for row in rows]
    if not cached or len(rows) == 1 or host.turning_length is not None:
        return _alone(host, whole, len(prompt)), cached
    # a row of one token again and again tells nothing of a cache: whatever is attended to is the same
    telling = [i for i, row in enumerate(whole) if len({*row[:-1]}) > 1]
    found = _after_cached(host, prompt, rows) if telling else None
    if found is not None:
        longest = max(telling, key=lambda i: len(rows[i]))
        alone = _alone(host, [whole[longest]], len(prompt))[0]
        if bool(((found[longest] - alone).abs() <= closeness(host.dtype) * alone.abs().clamp(min=1.0)).all()):
            return found, True
    return _alone(host, whole, len(prompt)), not telling


def _after_cached(host: Host, prompt: Sequence[int], rows: Sequence[Sequence[int]]) -> list[Tensor] | None:
    """The log-probabilities with the prompt's cache; None if the model has no cache that can be shared."""
    width = max(map(len, rows))
    new = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in rows], dtype=torch.long, device=host.device)
    mask = torch.ones(1, len(prompt), dtype=torch.bool, device=host.device)
    tokens = torch.tensor([list(prompt)], dtype=torch.long, device=host.device)
    try:
        logits, cache = host.cached_logits(tokens, mask, host.start_cache(1))
        same = torch.zeros(len(rows), dtype=torch.long, device=host.device)
        if not host.only_attends(cache) or not host.drop_rows(cache, same):
            return None
        known = logits[:, -1:].to(host.device).float().log_softmax(-1).expand(len(rows), -1, -1)
        if width > 1:
            # padding is on the right, where no token before it sees it
            mask = torch.ones(len(rows), len(prompt) + width - 1, dtype=torch.bool, device=host.device)
            logits, _ = host.cached_logits(new[:, :-1].clamp(min=0), mask, cache)
            known = torch.cat([known, logits.to(host.device).float().log_softmax(-1)], dim=1)
    except CACHE_ERRORS as error:
        if is_out_of_memory(error):
            raise
        return None
    return [row[: len(ids)] for row, ids in zip(_of_tokens(host, known, new), rows, strict=True)]


def _alone(host: Host, rows: Sequence[Sequence[int]], length: int) -> list[Tensor]:
    """The log-probabilities of what stands after the first `length` tokens of each row, in one pass without a cache."""
    width = max(map(len, rows))
    at_once = read_at_once(host, width)
    if len(rows) > at_once:
        parts = [rows[first : first + at_once] for first in range(0, len(rows), at_once)]
        return [found for some in parts for found in _alone(host, some, length)]
    tokens = torch.tensor(
        [[*row, *[row[0]] * (width - len(row))] for row in rows], dtype=torch.long, device=host.device
    )
    known = host.forward(tokens.clamp(min=0))[:, length - 1 : -1].float().log_softmax(-1)
    of_tokens = _of_tokens(host, known, tokens[:, length:])
    return [row[: len(ids) - length] for row, ids in zip(of_tokens, rows, strict=True)]


def _of_tokens(
    host: Host, known: Float[Tensor, "row new d_vocab"], tokens: Int[Tensor, "row new"]
) -> Float[Tensor, "row new"]:
    """The log-probability of each of these tokens; that of `END` is of all end tokens together."""
    found = known.gather(-1, tokens.clamp(min=0)[:, :, None])[:, :, 0]
    if not bool((tokens == END).any()):
        return found
    ends = torch.tensor(sorted(end_tokens(host)), dtype=torch.long, device=known.device)
    return torch.where(tokens == END, known[..., ends].logsumexp(-1), found)
