"""What does a model expect after each token of a text?  Log-probabilities, steered and unsteered."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_lens.arguments import count, public
from melbo_lens.models import hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Prompts, one_prompt, tokenize
from melbo_lens.texts import token_texts


@dataclass(frozen=True, eq=False, repr=False)
class NextTokens:
    """What a model expects after each token of a text, under several conditions.

    Attributes:
        tokens: the text of each token.
        log_probs: the log-probability (nats) of the token that does follow; the last token has no such token.
        ranks: how many tokens are more likely than the one that follows.
        top_tokens: the k most likely next tokens at each condition and position, most likely first.
        top_log_probs: the log-probabilities of `top_tokens`.
        conditions: "unsteered" and the names of the perturbations.
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
def next_tokens(model: Model, prompt: Prompts, perturbations: Perturbation | None = None, k: int = 10) -> NextTokens:
    """The next-token log-probabilities at each position of one text, unsteered and under each perturbation.

    Args:
        model: the model, which is left as it was.
        prompt: one text, chat or row of token ids, or one completion (`completions[3]` stands for the ids of its prompt
            and of what was written).
        perturbations: vectors or adapters; each acts by itself. None measures the unsteered model only.
        k: how many of the most likely tokens to keep.

    Returns:
        The most probable tokens, with and without each perturbation.

    Raises:
        ValueError: there are several prompts, or k exceeds the vocabulary.
        FloatingPointError: the logits hold NaN or infinity.
    """
    host = host_of(model)
    batch = tokenize(host, prompt)
    one_prompt(batch)
    count("k", k)
    if k > host.cfg.d_vocab:
        raise ValueError(f"k={k} must be from 1 to d_vocab = {host.cfg.d_vocab}.")
    names = [] if perturbations is None else [f"{perturbations.word} {i}" for i in range(len(perturbations))]
    following = batch.tokens[:, 1:, None]
    log_probs, ranks, best, values = [], [], [], []
    runs = (
        [None, *(perturbations[[i]].on(host) for i in range(len(perturbations)))]
        if perturbations is not None
        else [None]
    )
    with hooks.frozen(host), torch.no_grad():
        for i, run in enumerate(runs):
            with hooks.attached(host, [] if run is None else run.hooks()):
                logits = host.forward(batch.tokens).float()
            hooks.check_finite(host, logits, [["the unsteered model", *names][i]], "the logits")
            logits = logits.log_softmax(-1)
            followed = logits[:, :-1].gather(-1, following)
            log_probs.append(followed[0, :, 0].cpu())
            ranks.append((logits[:, :-1] > followed).sum(-1)[0].cpu())
            top = logits[0].topk(k)
            values.append(top.values.cpu())
            best.append(tuple(tuple(token_texts(host, row)) for row in top.indices.tolist()))
    tokens = tuple(token_texts(host, batch.rows()[0]))
    return NextTokens(
        tokens, torch.stack(log_probs), torch.stack(ranks), tuple(best), torch.stack(values), ("unsteered", *names)
    )
