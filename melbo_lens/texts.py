"""How do tokens become text again?  Each by itself, or as what can stand after the text before them."""

import re
from collections.abc import Sequence
from typing import Any

SPACE_MARK = "\u2581"  # SentencePiece writes this for a space that belongs to a token
UNDECODED = "\ufffd"  # what decoding writes for bytes that are no character
BYTE_FALLBACK = re.compile("<0x[0-9A-Fa-f]{2}>")  # SentencePiece's name of a byte
# byte-level tokenizers write a byte as the Latin-1 character of its number if that has ink, the rest as 256, 257, ...
_INK = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in _INK} | {chr(256 + n): b for n, b in enumerate(sorted({*range(256)} - {*_INK}))}


def decoded(host: Any, ids: Sequence[int]) -> str:
    """Decodes the ids to text, or lists them as numbers if the model has no tokenizer."""
    return host.tokenizer.decode(list(ids)) if host.tokenizer is not None else " ".join(map(str, ids))


def token_texts(host: Any, ids: Sequence[int]) -> list[str]:
    """Decodes each token by itself.

    A token that holds a part of a character's bytes shows them, as `\\xe6`. The space that a SentencePiece tokenizer
    drops at the beginning of a text is kept.
    """
    return [spelled(host, i)[0] for i in ids]


def spelled(host: Any, i: int) -> tuple[str, bytes | None]:
    """Returns a token's text, as in `token_texts`, and the bytes that it stands for; None where they are not known."""
    text = decoded(host, [i])
    if host.tokenizer is None:
        return text, None
    piece = str(host.tokenizer.convert_ids_to_tokens(i))
    if UNDECODED not in text or UNDECODED in piece:
        text = f" {text}" if piece.startswith(SPACE_MARK) and not text.startswith(" ") else text
        return text, text.encode("utf-8", "surrogatepass")
    if BYTE_FALLBACK.fullmatch(piece):
        held = bytes([int(piece[3:5], 16)])
    elif set(piece) <= BYTES.keys():
        held = bytes(BYTES[c] for c in piece)
    else:
        return text, None
    return held.decode("utf-8", "backslashreplace"), held


def text_after(host: Any, before: Sequence[int], new: Sequence[int]) -> str:
    """Decodes the new ids to a text that can stand right after the text of the earlier ids.

    A SentencePiece tokenizer drops the space of a token that begins a text. Here the token doesn't begin the text, so
    the space is put back.
    """
    alone = decoded(host, new)
    if (
        host.tokenizer is None
        or not new
        or not str(host.tokenizer.convert_ids_to_tokens(new[0])).startswith(SPACE_MARK)
    ):
        return alone
    start, whole = decoded(host, before), decoded(host, [*before, *new])
    return whole[len(start) :] if whole.startswith(start) else alone


def space_between(host: Any, before: Sequence[int], new: Sequence[int]) -> str:
    """Returns what the tokenizer writes between the text of the earlier ids and the `text_after` of the new ones.

    A tokenizer of words writes a space there, for instance.
    """
    whole, start, text = decoded(host, [*before, *new]), decoded(host, before), text_after(host, before, new)
    return whole[len(start) : len(whole) - len(text)] if whole.startswith(start) and whole.endswith(text) else ""
