"""Which texts say the same?  Those with similar counts of words."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence, Set

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.arguments import public
from melbo_lens.generation.completions import Completions
from melbo_lens.measures.ranking import cluster

# Scripts that are written without spaces; each of their characters counts as a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
PIECE = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")  # between spaces, with its punctuation
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
BEGINNINGS = tuple("{[<`")  # of JSON, of a tag and of code
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
    return {word if word.isupper() and len(word) > SHORT else word.lower() for word in WORD.findall(text)}


def forms(text: str) -> set[str]:
    """What is seen of a text without reading it: the script of its letters, capitals, a bracket that it begins with.

    A form begins with a zero byte, so that it is no word. A text of few letters has no script and no capitals.
    """
    found = {f"\0{text.lstrip()[:1]}"} if text.lstrip()[:1] in BEGINNINGS else set()
    letters = [letter for letter in text if letter.isalpha()]
    if len(letters) < FEW:
        return found
    (script, _), *_ = Counter(unicodedata.name(letter, "unknown").split()[0] for letter in letters).most_common(1)
    shouts = 2 * sum(map(str.isupper, letters)) > len(letters)
    return found | {f"\0{script}"} | ({"\0capitals"} if shouts else set())


def pieces(text: str, ordinary: Set[str] = frozenset()) -> list[str]:
    """What stands between the spaces of a text, in order; of a text without any, an empty piece.

    Where ordinary forms are known, another one is worth as much as all words together.
    """
    found = PIECE.findall(text) or [""]
    known = any(word.startswith("\0") for word in ordinary)
    return found + len(found) * (sorted(forms(text) - ordinary) if known else [])


def weights(vocabulary: Sequence[str], ordinary: Set[str] = frozenset()) -> Float[Tensor, " piece"]:
    """How much each piece counts where texts are compared: less if its words are ordinary ones."""
    faint = [bool(words(piece)) and words(piece) <= ordinary for piece in vocabulary]
    return torch.tensor([FAINT if one else 1.0 for one in faint], dtype=torch.float32, device="cpu")


def word_counts(texts: Sequence[str], ordinary: Set[str] = frozenset()) -> Float[Tensor, "text piece"]:
    """How often each piece occurs in each text, times its weight.

    Args:
        texts: the texts.
        ordinary: words and forms that say nothing of what is special about a text, as from `words` and `forms`.
    """
    split = [pieces(text, ordinary) for text in texts]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(piece for some in split for piece in some))}
    counts = torch.zeros(len(texts), max(len(vocabulary), 1), dtype=torch.float32, device="cpu")
    for row, some in zip(counts, split, strict=True):
        for piece in some:
            row[vocabulary[piece]] += 1
    return counts if not vocabulary else counts * weights(list(vocabulary), ordinary)
