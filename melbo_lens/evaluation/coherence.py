"""How natural does the unsteered model find a completion?  The mean log-probability of its tokens tells."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.arguments import public
from melbo_lens.generation.completions import Completions
from melbo_lens.measures.changes import ROWS_AT_ONCE
from melbo_lens.models import hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.host import Host
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
            tokens = torch.tensor(
                [(prompt + new + [prompt[0]] * width)[:width] for _, prompt, new in chunk],
                dtype=torch.long,
                device=device,
            )
            logits = host.forward(tokens)[:, :-1].float()
            hooks.check_finite(host, logits, ["the unsteered model"] * len(chunk), "the logits")
            log_probs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[:, :, 0]
            for row, (i, prompt, new) in zip(log_probs, chunk, strict=True):
                found[i] = row[len(prompt) - 1 : len(prompt) + len(new) - 1].mean()
    return found


def _prompt_rows(host: Host, completions: Completions) -> Sequence[list[int]]:
    """The ids of each row's prompt; if the completions don't know them, the prompt's text is tokenized again."""
    if completions.prompt_tokens is not None:
        return [list(ids) for ids in completions.prompt_tokens]
    known = {text: tokenize(host, text).rows()[0] for text in completions.table.prompt_text.drop_duplicates()}
    return [known[text] for text in completions.table.prompt_text]
