"""Which texts say the same?  Those with similar counts of words."""

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from melbo_lens.arguments import public
from melbo_lens.generation.completions import Completions
from melbo_lens.measures.ranking import cluster


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


def word_counts(texts: Sequence[str]) -> Tensor:
    """How often each word occurs in each text, [text word]; a text without words counts one empty word."""
    split = [text.split() or [""] for text in texts]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(word for words in split for word in words))}
    counts = torch.zeros(len(texts), max(len(vocabulary), 1), dtype=torch.float32, device="cpu")
    for row, words in zip(counts, split, strict=True):
        for word in words:
            row[vocabulary[word]] += 1
    return counts
