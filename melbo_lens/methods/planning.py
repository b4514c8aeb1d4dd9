"""Will it fit?  Bytes for a fit and for writing are measured with one row, before they are spent on many."""

from dataclasses import dataclass

import pandas as pd
import torch

from melbo_lens import tables
from melbo_lens.arguments import counts, public
from melbo_lens.methods.problem import CHUNK_BYTES
from melbo_lens.models import blocks, hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.passes import bytes_of_writing, rows_at_once
from melbo_lens.models.slicing import KEPT_BYTES
from melbo_lens.models.tally import Unknown, stored_bytes, weights_of
from melbo_lens.models.targets import target_of

STATE = 8  # copies of all vectors that an ascent holds: the point, the best seen, gradients and moments


@dataclass(frozen=True, repr=False)
class MemoryPlan:
    """What a fit and the writing after it will hold, in bytes.

    Attributes:
        weights: of the model, with its buffers.
        slice_weights: of these, the blocks from the source to the target; with `trim=True`, a fit holds no others on
            the accelerator.
        kept_per_row: what one row (a vector on a prompt) keeps for the backward pass.
        fit_rows: the rows in one forward pass of the fit.
        fit: the most that the fit holds beside the weights.
        cache_per_row: keys, values and states of one completion at its full length.
        written_rows: the completions that are written at once.
        writing: the most that writing holds beside the weights.
        recomputed: whether blocks are computed again in the backward pass, because one row would keep too much.
    """

    weights: int
    slice_weights: int
    kept_per_row: int
    fit_rows: int
    fit: int
    cache_per_row: int
    written_rows: int
    writing: int
    recomputed: bool

    @property
    def peak(self) -> int:
        """The most that a fit, or the writing after it, holds with the weights."""
        return self.weights + max(self.fit, self.writing)

    @property
    def table(self) -> pd.DataFrame:
        """The same as rows of a table, in GiB."""
        rows = [
            ("weights", self.weights, ""),
            ("weights of the slice", self.slice_weights, "all that a fit with trim=True leaves on the accelerator"),
            ("fit", self.fit, f"{self.fit_rows} rows of {in_words(self.kept_per_row)}"),
            ("writing", self.writing, f"{self.written_rows} rows with caches of {in_words(self.cache_per_row)}"),
            ("peak", self.peak, "weights and the larger of the two"),
        ]
        return pd.DataFrame(
            [(what, size / 2**30, note) for what, size, note in rows], columns=["what", "GiB", "because"]
        )

    def _repr_html_(self) -> str:
        return tables.html(repr(self), self.table)

    def __repr__(self) -> str:
        again = ", blocks computed again in the backward pass" if self.recomputed else ""
        return (
            f"MemoryPlan({in_words(self.peak)}: weights {in_words(self.weights)}, a fit {in_words(self.fit)} more "
            f"({self.fit_rows} rows at once{again}), writing {in_words(self.writing)} more "
            f"({self.written_rows} completions at once))"
        )


@public
def plan_memory(
    model: Model,
    n_tokens: int,
    source_layer: int,
    target_layer: int,
    *,
    n_vectors: int = 32,
    n_prompts: int = 1,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    written_at_once: int | None = None,
) -> MemoryPlan:
    """Predicts the memory of a fit and of writing under its vectors.

    One row of tokens runs through the model; what it keeps in each block is counted, and grows with the rows. The
    model may lie on the "meta" device, where a model of any size has shapes and no numbers:

        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, which is left as it was.
        n_tokens: the length of the prompts, in tokens.
        source_layer, target_layer: those of the fit.
        n_vectors: the number of vectors that are learned.
        n_prompts: the number of prompts.
        max_new_tokens: the length of the completions.
        batch_size: the rows (vector x prompt) in one forward pass of the fit; None takes about 1 GiB, as the fits do.
        written_at_once: the `batch_size` of `generate`; None means its default. Both signs of all vectors on all
            prompts are fewer rows if that is less.

    Returns:
        The plan, in bytes. Libraries and what the allocator keeps in reserve come on top: some hundred MiB. Writing
        takes somewhat less where rows of one prompt share the blocks before the source.

    Raises:
        ValueError: a number is not positive, or the layers don't fit the model.
    """
    counts(
        n_tokens=n_tokens,
        n_vectors=n_vectors,
        n_prompts=n_prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        written_at_once=written_at_once,
    )
    host = host_of(model)
    last, _ = target_of(host, source_layer, target_layer, None)
    n_ctx = getattr(host.cfg, "n_ctx", None)
    if n_ctx and n_tokens + max_new_tokens > n_ctx:
        raise ValueError(
            f"n_tokens={n_tokens} and max_new_tokens={max_new_tokens} are more than the model's context "
            f"n_ctx={n_ctx}: ask for fewer."
        )
    with hooks.frozen(host), Unknown():
        tokens = torch.zeros(1, n_tokens, dtype=torch.long, device=host.device)
        recording = blocks.record(host, tokens, source_layer + 1, last)
        kept, most = blocks.bytes_of_row(host, recording.calls, recording.streams, 1)
        recomputed = kept > KEPT_BYTES
        if recomputed:
            kept, most = blocks.bytes_of_row(host, recording.calls, recording.streams, 1, True)
        first, step, cache = bytes_of_writing(host, n_tokens)
        written = min(
            written_at_once or rows_at_once(host, 2 * n_vectors * n_prompts, n_tokens, max_new_tokens),
            2 * n_vectors * n_prompts,
        )
    stream = recording.streams[0].numel() * recording.streams[0].element_size()
    rows = min(batch_size or max(1, CHUNK_BYTES // max(1, kept)), n_vectors * n_prompts)
    # the clean streams of every block, the target in float32, and an entering stream for each row
    clean = n_prompts * (stream * (len(recording.calls) + 2) + 2 * 4 * recording.streams[0].numel())
    state = STATE * 4 * n_vectors * host.d_model
    full = cache * (n_tokens + max_new_tokens)
    return MemoryPlan(
        weights=stored_bytes(x for network in host.networks for x in weights_of(network)),
        slice_weights=stored_bytes(x for block in host.blocks[source_layer:last] for x in weights_of(block)),
        kept_per_row=kept,
        fit_rows=rows,
        fit=clean + state + rows * (most + 3 * stream),
        cache_per_row=full,
        written_rows=written,
        writing=written * max(first, full + step),
        recomputed=recomputed,
    )


def in_words(n_bytes: int) -> str:
    """Writes a number of bytes in the unit that suits it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= 0.98 * size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes} bytes"
