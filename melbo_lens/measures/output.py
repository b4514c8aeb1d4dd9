"""What do perturbations change at the output?  The next-token distribution, and the stream's norms on the way there."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens import tables
from melbo_lens.arguments import public, signs_of
from melbo_lens.measures.radius import divergence
from melbo_lens.memory import in_batches
from melbo_lens.models import hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.host import Host
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.perturbations.sites import Hook
from melbo_lens.prompts import Prompts, tokenize

ROWS_AT_ONCE = 128


@dataclass(frozen=True, eq=False, repr=False)
class Effects:
    """Changes after each prompt.

    Attributes:
        table: vector, sign, prompt, kl (``KL(clean || steered)`` of the next-token distributions, nats), entropy and
            entropy_unsteered (nats), logit_difference and logit_difference_unsteered (between the two tokens asked for;
            absent if none were).
        norm_change: the relative change of the norm of the residual stream that leaves each layer, with a row for each
            row of the table; NaN in the padding.
    """

    table: pd.DataFrame
    norm_change: Float[Tensor, "row layer pos"]

    def __repr__(self) -> str:
        kl = self.table.kl
        return (
            f"Effects({len(self.table)} rows, KL {kl.min():.3g} to {kl.max():.3g} nats; norm_change "
            f"{list(self.norm_change.shape)})"
        )

    def _repr_html_(self) -> str:
        return tables.html(repr(self), self.table)


@public
def output_effects(
    model: Model,
    prompts: Prompts,
    vectors: Perturbation,
    signs: int | Sequence[int] = (+1, -1),
    tokens: Sequence[int] | None = None,
) -> Effects:
    """What each vector or adapter changes in the next-token distribution and in the norms of the stream.

    Args:
        model: the model, which is left as it was.
        prompts: text, chats or token ids.
        vectors: vectors or adapters; each acts by itself.
        signs: +1, -1 or both.
        tokens: two token ids whose logit difference is wanted.

    Returns:
        The changes, a row for each vector, sign and prompt.

    Raises:
        ValueError: a sign is neither +1 nor -1, or tokens are not two ids of the vocabulary.
        FloatingPointError: the steered logits hold NaN or infinity.
    """
    host = host_of(model)
    vectors = vectors.on(host)
    batch = tokenize(host, prompts)
    runs = list(product(range(len(batch)), range(len(vectors)), signs_of(signs)))
    if tokens is not None:
        _check_pair(host, tokens)
    with hooks.frozen(host), torch.no_grad():
        clean_logits, clean_norms = run_to_the_end(host, batch.tokens, batch.lengths, [])

        def steered_run(some: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
            prompt, vector, sign = (list(column) for column in zip(*some, strict=True))
            steering = vectors.row_hooks(vector, torch.tensor(sign, dtype=torch.float32, device="cpu"))
            return run_to_the_end(host, batch.tokens[prompt], batch.lengths[prompt], steering)

        parts = []
        for some, part in in_batches(runs, ROWS_AT_ONCE, steered_run):
            names = [f"{vectors.word} {k} with sign {sign:+d}, on prompt {i}," for i, k, sign in some]
            hooks.check_finite(host, part[0], names, "the logits")
            parts.append(part)
    logits, norms = (torch.cat(column) for column in zip(*parts, strict=True))
    which = [prompt for prompt, _, _ in runs]
    clean, steered = clean_logits.log_softmax(-1)[which], logits.log_softmax(-1)
    table = pd.DataFrame(
        [(vector, sign, prompt) for prompt, vector, sign in runs], columns=["vector", "sign", "prompt"]
    )
    table["kl"] = divergence(clean, steered).clamp(min=0).tolist()
    table["entropy"] = torch.special.entr(steered.exp()).sum(-1).tolist()
    table["entropy_unsteered"] = torch.special.entr(clean.exp()).sum(-1).tolist()
    if tokens is not None:
        table["logit_difference"] = (logits[:, tokens[0]] - logits[:, tokens[1]]).tolist()
        table["logit_difference_unsteered"] = (
            clean_logits[which][:, tokens[0]] - clean_logits[which][:, tokens[1]]
        ).tolist()
    return Effects(table, norms / clean_norms[which] - 1)


def _check_pair(host: Host, tokens: Sequence[int]) -> None:
    d_vocab = host.cfg.d_vocab
    if len(tokens) != 2 or any(
        isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < d_vocab for one in tokens
    ):
        raise ValueError(
            f"tokens={list(tokens)!r} must be two token ids from 0 to {d_vocab - 1}: model.to_single_token gives the "
            "id of a text."
        )


def run_to_the_end(
    host: Host, tokens: Tensor, lengths: Tensor, steering: list[Hook]
) -> tuple[Float[Tensor, "row d_vocab"], Tensor]:
    """The logits after the first `lengths` tokens of each row, and the stream's norms [row layer pos].

    The norms are NaN in the padding.
    """
    norms: list[Tensor] = []
    readers = [
        (f"blocks.{i}.hook_resid_post", lambda stream, hook: norms.append(stream.float().norm(dim=-1).to(host.device)))
        for i in range(host.n_layers)
    ]
    with hooks.attached(host, [*steering, *readers]):
        logits = host.forward(tokens)
    own = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    stacked = torch.stack(norms, dim=1).masked_fill(~own[:, None], float("nan"))
    return logits[torch.arange(len(tokens), device=tokens.device), lengths - 1].float(), stacked
