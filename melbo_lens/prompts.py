"""How does a user's prompt become tokens?  Text, chats or token ids are made into one right-padded `PromptBatch`."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from melbo_lens.texts import decoded

Chat: TypeAlias = list[dict[str, Any]]
Positions: TypeAlias = slice | Sequence[int]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of different lengths as one right-padded batch.

    Attributes:
        tokens: ids, padded on the right; the padding is never read, since attention is causal.
        lengths: the number of tokens of each prompt, with BOS and without padding.
        target_mask: True at the positions whose change counts.
        texts: the text of each prompt, for tables and provenance.
        positions: the target positions as they were asked for.
    """

    tokens: Int[Tensor, "prompt pos"]
    lengths: Int[Tensor, " prompt"]
    target_mask: Bool[Tensor, "prompt pos"]
    texts: tuple[str, ...]
    positions: Positions = field(default_factory=lambda: slice(None))

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def own(self) -> Bool[Tensor, "prompt pos"]:
        """A mask that is True at each prompt's own positions and False in the padding."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    def rows(self) -> list[list[int]]:
        """Returns each prompt's token ids without padding."""
        return [ids[:n] for ids, n in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]


@runtime_checkable
class AsPrompts(Protocol):
    """Something that can stand for prompts: completions, which keep the token ids of each prompt and its answer."""

    def as_prompts(self) -> PromptBatch: ...


Prompts: TypeAlias = str | list[str] | Chat | list[Chat] | Tensor | PromptBatch | AsPrompts


def tokenize(
    host: Any,
    prompts: Prompts,
    target_positions: Positions = slice(None),
    n_new_tokens: int = 0,
    add_generation_prompt: bool = True,
) -> PromptBatch:
    """Turns prompts into tokens as the model's own tokenizer does.

    A string gets BOS if `model.cfg.default_prepend_bos` says so; a string that already begins with BOS gets no second
    one. A list of dicts with `role` and `content` is one chat. It is rendered by the tokenizer's chat template, which
    alone decides about BOS. A chat that ends with a message of the assistant is left open there, so that the message
    goes on. A token tensor is taken as it is, and every column of it counts. The tokens of an existing batch, and those
    of completions (each prompt and its answer), are taken as they are, too.

    Args:
        host: the opened model, whose tokenizer, `cfg.n_ctx` and `cfg.d_vocab` are used.
        prompts: one prompt or many.
        target_positions: a slice or a list of indices into each prompt's own tokens (BOS included, padding never).
        n_new_tokens: how many tokens must stay free in the context.
        add_generation_prompt: whether a chat ends with the header of the assistant's answer.

    Returns:
        The batch, on the device of the model's embedding.

    Raises:
        TypeError: the prompts have none of the forms above.
        ValueError: there is no prompt, a prompt is empty or too long, ids are outside the vocabulary, text was given
            without a tokenizer, the template refuses a chat, or the positions select nothing.

    Warns:
        UserWarning: a text already begins with the begin-of-sequence token.
    """
    if isinstance(prompts, AsPrompts):
        prompts = prompts.as_prompts()
    if isinstance(prompts, PromptBatch):
        rows, texts = prompts.rows(), prompts.texts
        _check_ids(host, rows)
    elif isinstance(prompts, Tensor):
        rows, texts = _token_rows(host, prompts)
    else:
        listed = as_list(prompts)
        texts = tuple(_text(host, prompt, i, add_generation_prompt) for i, prompt in enumerate(listed))
        rows = [
            _chat_ids(host, text) if isinstance(prompt, list) else _text_ids(host, text, i)
            for i, (text, prompt) in enumerate(zip(texts, listed, strict=True))
        ]
        _check_ids(host, rows)
    n_ctx = getattr(host.cfg, "n_ctx", None)
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompts[{i}] is empty: it has no tokens. Give at least one word or token id.")
        if n_ctx and len(row) + n_new_tokens > n_ctx:
            room = (
                f"; {max(n_ctx - len(row), 0)} tokens remain for new ones, {n_new_tokens} were asked for"
                if n_new_tokens
                else ""
            )
            raise ValueError(
                f"prompts[{i}] has {len(row)} tokens, the model's context n_ctx holds {n_ctx}{room}. "
                + ("Ask for fewer new tokens, or shorten it." if n_new_tokens else "Shorten it.")
            )
    return pad(rows, texts, target_positions, host.device)


def pad(
    rows: list[list[int]], texts: Sequence[str], target_positions: Positions = slice(None), device: Any = None
) -> PromptBatch:
    """Makes one right-padded batch of the token ids of each prompt, on the CPU unless a device is given."""
    if not rows:
        raise ValueError("there are no prompts: give at least one (these completions have no row).")
    device = torch.device("cpu") if device is None else device
    width = max(map(len, rows))
    filler = rows[0][0]  # any id of the vocabulary will do, since earlier positions can't see later ones
    chosen = [_select(len(row), target_positions, i) + [False] * (width - len(row)) for i, row in enumerate(rows)]
    tokens = torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.long, device=device)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long, device=device)
    mask = torch.tensor(chosen, dtype=torch.bool, device=device)
    return PromptBatch(tokens, lengths, mask, tuple(texts), target_positions)


def as_list(prompts: Prompts) -> list[Any]:
    """Lists the prompts: a string or a chat is one prompt, and a list of either is many."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(
            "prompts must be text, chat messages, a list of either, or a tensor of token ids; "
            f"got {type(prompts).__name__}."
        )
    if not prompts:
        raise ValueError("prompts is an empty list: give at least one prompt.")
    return [list(prompts)] if isinstance(prompts[0], dict) else list(prompts)


def outside_the_template(host: Any, prompts: Prompts) -> list[int]:
    """Returns the numbers of the texts to which the tokenizer's chat template would have added something.

    A text that holds what the template writes after a user's words was rendered by it, and isn't among them.
    """
    if isinstance(prompts, Tensor | PromptBatch | AsPrompts) or not getattr(host.tokenizer, "chat_template", None):
        return []
    try:
        after = _render(host.tokenizer, [{"role": "user", "content": "melbo"}], 0, True).rpartition("melbo")[2].strip()
    except ValueError:  # the template wants another kind of chat, so nothing is known of the text around it
        return []
    return [i for i, prompt in enumerate(as_list(prompts)) if isinstance(prompt, str) and after not in prompt]


def one_prompt(batch: PromptBatch) -> None:
    """Refuses more than one prompt."""
    if len(batch) != 1:
        raise ValueError(f"{len(batch)} prompts were given, this looks at the tokens of one: call it for each.")


def _check_ids(host: Any, rows: Sequence[Sequence[int]]) -> None:
    d_vocab = getattr(host.cfg, "d_vocab", None) or 0
    for i, row in enumerate(rows):
        outside = [token for token in row if token < 0 or (0 < d_vocab <= token)]
        if outside:
            raise ValueError(
                f"prompts[{i}] holds the token ids {outside[:5]}, the model's vocabulary has 0 to {d_vocab - 1}: "
                "use ids within it."
            )


def _token_rows(host: Any, tokens: Tensor) -> tuple[list[list[int]], tuple[str, ...]]:
    if tokens.ndim not in (1, 2) or tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.numel() == 0:
        raise ValueError(
            "a tensor of prompts must hold integer token ids, [prompt pos] or [pos], at least one; "
            f"got {tuple(tokens.shape)} {tokens.dtype}."
        )
    rows = (tokens if tokens.ndim == 2 else tokens[None]).tolist()
    _check_ids(host, rows)
    return rows, tuple(decoded(host, row) for row in rows)


def _text(host: Any, prompt: Any, i: int, add_generation_prompt: bool) -> str:
    if host.tokenizer is None:
        raise ValueError(
            "the prompt is text but model.tokenizer is None: set a tokenizer, or pass token ids as a tensor."
        )
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"prompts[{i}] is empty: it has no text. Give at least one word.")
        return prompt
    if not (isinstance(prompt, list) and prompt and all(map(_is_message, prompt))):
        raise TypeError(
            f"prompts[{i}] must be text or a list of messages with the keys 'role' and 'content'; got {prompt!r}."
        )
    if not getattr(host.tokenizer, "chat_template", None):
        raise ValueError(
            f"prompts[{i}] is a chat but the tokenizer has no chat template: set tokenizer.chat_template, or pass text."
        )
    return _render(host.tokenizer, prompt, i, add_generation_prompt)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and "role" in message and ("content" in message or "tool_calls" in message)


def is_open(chat: Chat) -> bool:
    """Whether a chat ends with words of the assistant, which go on; after a tool call, somebody else speaks next."""
    last = chat[-1]
    return last["role"] == "assistant" and isinstance(last.get("content"), str | list) and not last.get("tool_calls")


def _said(content: str | list[dict[str, Any]]) -> bool:
    """Whether a message's content, which is a text or a list of parts, holds any words."""
    return bool(content) and (isinstance(content, str) or any(part.get("text") for part in content))


def _render(tokenizer: Any, chat: Chat, i: int, add_generation_prompt: bool) -> str:
    """Renders the chat by its template, and leaves a final message of the assistant open."""
    keywords = {"add_generation_prompt": add_generation_prompt}
    opened = add_generation_prompt and is_open(chat)
    if opened and len(chat) > 1 and not _said(chat[-1]["content"]):
        chat = chat[:-1]  # an empty answer is one that is still to be generated
    elif opened:
        keywords = {"continue_final_message": True}
    remedy = (
        "end the chat with a message of the user, or pass the text itself"
        if opened
        else "change the chat, or pass the text itself"
    )
    try:
        # the copy protects the messages, into which some versions write
        return tokenizer.apply_chat_template(copy.deepcopy(chat), tokenize=False, **keywords)
    except Exception as error:  # a template can raise anything: an error of Jinja, or of Python code within it
        what = (
            "ends with a message of the assistant, with which this chat template can't go on"
            if opened
            else "is refused by the chat template"
        )
        raise ValueError(
            f"prompts[{i}] {what} ({type(error).__name__}: {' '.join(str(error).split())}): {remedy}."
        ) from error


def _chat_ids(host: Any, text: str) -> list[int]:
    # the tokenizer's own apply_chat_template does the same: the template has written all special tokens already
    return list(host.tokenizer(text, add_special_tokens=False)["input_ids"])


def _text_ids(host: Any, text: str, i: int) -> list[int]:
    begin, keywords = getattr(host.tokenizer, "bos_token", None), {}
    if begin and text.lstrip().startswith(begin) and host.cfg.default_prepend_bos:
        warnings.warn(
            f"prompts[{i}] begins with the tokenizer's begin token {begin!r} already, so no second one is put before it"
            ". A chat or a completion can be given as it is: messages, or rows of Completions.",
            stacklevel=2,
        )
        keywords = {"prepend_bos": False}
    if getattr(host.tokenizer, "pad_token", None) is None:  # `to_tokens` pads, though one text needs no padding
        begins = host.cfg.default_prepend_bos and not keywords
        ids = _chat_ids(host, text)
        return [host.tokenizer.bos_token_id, *ids] if begins and host.tokenizer.bos_token_id is not None else ids
    # truncate=False, since a prompt that is too long must be refused, not silently shortened
    return host.to_tokens(text, truncate=False, **keywords)[0].tolist()


def _select(length: int, positions: Positions, i: int) -> list[bool]:
    if not isinstance(positions, slice):
        if not isinstance(positions, Sequence) or any(isinstance(t, bool) or not isinstance(t, int) for t in positions):
            raise ValueError(
                f"target_positions={positions} must be a slice or a list of positions, such as slice(-3, None) or [-1]."
            )
        outside = [t for t in positions if not -length <= t < length]
        if outside:
            raise ValueError(
                f"target_positions {outside} lie outside prompts[{i}], which has {length} tokens. "
                "Use positions within it."
            )
        chosen = {t % length for t in positions}
    else:
        chosen = set(range(length)[positions])
    if not chosen:
        raise ValueError(
            f"target_positions={positions} selects no token of prompts[{i}], which has {length}. Widen the selection."
        )
    return [t in chosen for t in range(length)]
