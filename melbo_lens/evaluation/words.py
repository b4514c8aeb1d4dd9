"""Which texts say the same?  Those with similar counts of words."""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence, Set

import pandas as pd
import regex
import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.arguments import public
from melbo_lens.generation.completions import Completions
from melbo_lens.measures.ranking import cluster

# Scripts that are written without spaces. Each two of their characters that stand side by side count as a word.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
RUN = regex.compile(rf"[{UNSPACED}]+")
PIECE = regex.compile(rf"[{UNSPACED}]+|[^\s{UNSPACED}]+")  # between spaces, with its punctuation
WORD = regex.compile(rf"[{UNSPACED}]+|(?:(?![{UNSPACED}])[\p{{L}}\p{{N}}_]\p{{M}}*)+")
NUMBERED = regex.compile(r"^[^\S\n]*(\d{1,2})[.)](?!\S)", regex.MULTILINE)  # a line that may be one of a list
BEGINNINGS = tuple("{[<`")  # of JSON, of a tag and of code
CAPITALS = "\0capitals"
JAPANESE = {"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}  # which is written with Chinese characters, too
FEW = 8  # letters
SHORT = 3  # words of so many letters are mostly grammar, and every text has them
FAINT = 0.3  # how much a word counts that every answer to a prompt may have


@public
def cluster_by_words(completions: Completions, threshold: float = 0.3) -> pd.DataFrame:
    """Clusters vectors and signs by the words of their steered completions.

    A vector and sign is described by its word counts over all its completions. Clusters are joined as long as the
    average cosine distance between them is below `threshold`.

    Args:
        completions: from `generate`.
        threshold: the cosine distance, from 0 to 2, below which clusters are joined; a larger one makes fewer and
            larger clusters.

    Returns:
        One row for each vector and sign: vector, sign, cluster (a label).
    """
    steered = completions.table[completions.table.kind == "steered"]
    joined = steered.groupby(["vector", "sign"]).text.agg(" ".join).reset_index()
    return joined[["vector", "sign"]].assign(cluster=cluster(word_counts(joined.text.tolist()), threshold))


def words(text: str) -> set[str]:
    """The different words of a text, without punctuation; in lower case, except for long ones in capitals."""
    return {word if word.isupper() and len(word) > SHORT else word.lower() for word in _parts(WORD.findall(text))}


def telling_words(text: str) -> set[str]:
    """Those words of a text that may say something: numbers, and words of more than a few letters, if there are any.

    What is written without spaces is telling, too; the numbers of a list's lines are not.
    """
    mine, numbers = words(text), NUMBERED.findall(text)
    if len(numbers) > 1:
        mine -= set(numbers)
    return {word for word in mine if len(word) > SHORT or any(map(str.isdigit, word)) or RUN.match(word)} or mine


def forms(text: str) -> set[str]:
    """What is seen of a text without reading it: the script of its letters, capitals, a bracket that it begins with.

    A form begins with a zero byte, so that it is no word. A text of few letters has no script and no capitals.
    """
    found = {f"\0{text.lstrip()[:1]}"} if text.lstrip()[:1] in BEGINNINGS else set()
    letters = [letter for letter in text if letter.isalpha()]
    if len(letters) < FEW:
        return found
    named = (unicodedata.name(letter, "unknown").split()[0] for letter in letters)
    (script, _), *_ = Counter("CJK" if name in JAPANESE else name for name in named).most_common(1)
    shouts = 2 * sum(map(str.isupper, letters)) > len(letters)
    return found | {f"\0{script}"} | ({CAPITALS} if shouts else set())


def ordinary_in(answers: Set[str], prompts: Set[str]) -> set[str]:
    """The words, signs and forms that say nothing of what is special about a text, since others have them, too.

    Args:
        answers: unsteered completions. The forms are theirs alone, since a chat's prompt is also its template.
        prompts: what they answer. If the answers are too short to have a script, that of the prompts is taken.
    """
    found = {form for text in answers for form in forms(text)}
    if not any(map(_is_script, found)):
        found |= {form for text in prompts for form in forms(text) if form[1:] not in BEGINNINGS}
    signs = {piece for text in answers | prompts for piece in PIECE.findall(text) if not words(piece)}
    return found | signs | {word for text in answers | prompts for word in words(text)}


def pieces(text: str, ordinary: Set[str] = frozenset()) -> list[str]:
    """What stands between the spaces of a text, in order; of a text without any, an empty piece.

    Where it is known in which script ordinary texts are, another form is worth as much as all words together.
    """
    found = list(_parts(PIECE.findall(text))) or [""]
    return found + len(found) * (sorted(forms(text) - ordinary) if any(map(_is_script, ordinary)) else [])


def weights(vocabulary: Sequence[str], ordinary: Set[str] = frozenset()) -> Float[Tensor, " piece"]:
    """How much each piece counts where texts are compared: less if it is an ordinary sign, or of ordinary words."""
    faint = [piece in ordinary or (not _is_form(piece) and set() < words(piece) <= ordinary) for piece in vocabulary]
    return torch.tensor([FAINT if one else 1.0 for one in faint], dtype=torch.float32, device="cpu")


def _parts(found: Sequence[str]) -> Iterator[str]:
    """What was found; of a run that is written without spaces, each two characters side by side."""
    for one in found:
        if len(one) > 2 and RUN.match(one):
            yield from (one[i : i + 2] for i in range(len(one) - 1))
        else:
            yield one


def _is_form(piece: str) -> bool:
    return piece.startswith("\0")


def _is_script(piece: str) -> bool:
    return _is_form(piece) and piece[1:].isupper()


def word_counts(texts: Sequence[str], ordinary: Set[str] = frozenset()) -> Float[Tensor, "text piece"]:
    """How often each piece occurs in each text, times its weight.

    Args:
        texts: the texts.
        ordinary: what says nothing of what is special about a text, as from `ordinary_in`.
    """
    split = [pieces(text, ordinary) for text in texts]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(piece for some in split for piece in some))}
    counts = torch.zeros(len(texts), max(len(vocabulary), 1), dtype=torch.float32, device="cpu")
    for row, some in zip(counts, split, strict=True):
        for piece in some:
            row[vocabulary[piece]] += 1
    return counts if not vocabulary else counts * weights(list(vocabulary), ordinary)
