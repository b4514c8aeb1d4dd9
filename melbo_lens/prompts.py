"""How does a user's prompt become tokens?  Text, chats or token ids in, one right-padded `PromptBatch` out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Chat: TypeAlias = list[dict[str, str]]
Positions: TypeAlias = slice | list[int]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of different lengths as one right-padded batch.

    Attributes:
        tokens: ids, padded on the right; what stands in the padding is never read, since attention is causal.
        lengths: the number of own tokens of each prompt, BOS included.
        target_mask: True at the positions whose change counts.
        texts: what each prompt says, for tables and provenance.
    """

    tokens: Int[Tensor, "prompt pos"]
    lengths: Int[Tensor, " prompt"]
    target_mask: Bool[Tensor, "prompt pos"]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self) -> list[list[int]]:
        """Each prompt's own token ids, without padding."""
        return [ids[:n] for ids, n in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]


Prompts: TypeAlias = str | list[str] | Chat | list[Chat] | Tensor | PromptBatch


def tokenize(
    model: Any,
    prompts: Prompts,
    target_positions: Positions = slice(None),
    n_new_tokens: int = 0,
    add_generation_prompt: bool = True,
) -> PromptBatch:
    """Turns prompts into tokens as the model's own tokenizer does.

    A string gets BOS as `model.cfg.default_prepend_bos` says. A list of dicts with `role` and `content` is one chat, rendered by the
    tokenizer's chat template, which alone decides about BOS. A token tensor is taken as it is, every column counts. So are the tokens of a
    batch made before.

    Args:
        model: its tokenizer and `cfg.n_ctx` are used.
        prompts: one prompt or many.
        target_positions: a slice or a list of indices into each prompt's own tokens (BOS included, padding never).
        n_new_tokens: room that must stay free in the context.
        add_generation_prompt: whether a chat ends with the header of the assistant's answer.

    Returns:
        The batch, on the device of the model's embedding.

    Raises:
        TypeError: prompts are none of the forms above.
        ValueError: no prompt, an empty prompt, one that is too long, no tokenizer, or positions that select nothing.
    """
    if isinstance(prompts, PromptBatch):
        rows, texts = prompts.rows(), prompts.texts
    elif isinstance(prompts, Tensor):
        rows, texts = _token_rows(model, prompts)
    else:
        listed = as_list(prompts)
        texts = tuple(_text(model, prompt, i, add_generation_prompt) for i, prompt in enumerate(listed))
        rows = [_ids(model, text, isinstance(prompt, list)) for text, prompt in zip(texts, listed, strict=True)]
    n_ctx = getattr(model.cfg, "n_ctx", None)
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompts[{i}] is empty: it has no tokens. Give at least one word or token id.")
        if n_ctx and len(row) + n_new_tokens > n_ctx:
            room = f"; {max(n_ctx - len(row), 0)} tokens remain for new ones, {n_new_tokens} were asked for" if n_new_tokens else ""
            raise ValueError(f"prompts[{i}] has {len(row)} tokens, the model's context n_ctx holds {n_ctx}{room}. Shorten it.")
    return pad(rows, texts, target_positions, next(model.parameters()).device)


def pad(rows: list[list[int]], texts: Sequence[str], target_positions: Positions = slice(None), device: Any = None) -> PromptBatch:
    """Token ids of each prompt as one right-padded batch."""
    width = max(map(len, rows))
    filler = rows[0][0]  # any id in the vocabulary will do: later positions can't be seen by earlier ones
    tokens = torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([_select(len(row), target_positions, i) + [False] * (width - len(row)) for i, row in enumerate(rows)], device=device)
    return PromptBatch(tokens, torch.tensor([len(row) for row in rows], device=device), mask, tuple(texts))


def as_list(prompts: Prompts) -> list[Any]:
    """The prompts one by one: a string or a chat is one prompt, a list of either is many."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be text, chat messages, a list of either, or a tensor of token ids; got {type(prompts).__name__}.")
    if not prompts:
        raise ValueError("prompts is an empty list: give at least one prompt.")
    return [list(prompts)] if isinstance(prompts[0], dict) else list(prompts)


def _token_rows(model: Any, tokens: Tensor) -> tuple[list[list[int]], tuple[str, ...]]:
    if tokens.ndim not in (1, 2) or tokens.is_floating_point() or tokens.numel() == 0:
        raise ValueError(
            f"a tensor of prompts must hold integer token ids, [prompt pos] or [pos], at least one; got {tuple(tokens.shape)} {tokens.dtype}."
        )
    rows = (tokens if tokens.ndim == 2 else tokens[None]).tolist()
    tokenizer = model.tokenizer
    texts = tuple(tokenizer.decode(row) if tokenizer is not None else " ".join(map(str, row)) for row in rows)
    return rows, texts


def _text(model: Any, prompt: Any, i: int, add_generation_prompt: bool) -> str:
    if model.tokenizer is None:
        raise ValueError("the prompt is text but model.tokenizer is None: set a tokenizer, or pass token ids as a tensor.")
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"prompts[{i}] is empty: it has no text. Give at least one word.")
        return prompt
    if not (isinstance(prompt, list) and prompt and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt)):
        raise TypeError(f"prompts[{i}] must be text or a list of messages with the keys 'role' and 'content'; got {prompt!r}.")
    if not getattr(model.tokenizer, "chat_template", None):
        raise ValueError(f"prompts[{i}] is a chat but the tokenizer has no chat template: set tokenizer.chat_template, or pass text.")
    return model.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=add_generation_prompt)


def _ids(model: Any, text: str, is_chat: bool) -> list[int]:
    # truncate=False: a prompt that is too long must be refused, not shortened in silence
    return model.to_tokens(text, truncate=False, **({"prepend_bos": False} if is_chat else {}))[0].tolist()


def _select(length: int, positions: Positions, i: int) -> list[bool]:
    if not isinstance(positions, slice):
        outside = [t for t in positions if not -length <= t < length]
        if outside:
            raise ValueError(f"target_positions {outside} lie outside prompts[{i}], which has {length} tokens. Use positions within it.")
        chosen = {t % length for t in positions}
    else:
        chosen = set(range(length)[positions])
    if not chosen:
        raise ValueError(f"target_positions={positions} selects no token of prompts[{i}], which has {length}. Widen the selection.")
    return [t in chosen for t in range(length)]
