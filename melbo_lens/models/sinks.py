"""Which positions are attention sinks?  Those where a layer's stream has a norm beyond all proportion."""

from jaxtyping import Bool
from torch import Tensor

from melbo_lens.models import blocks
from melbo_lens.models.host import Host
from melbo_lens.models.targets import stream_name
from melbo_lens.perturbations.sites import Hook
from melbo_lens.prompts import PromptBatch

# A position whose norm, or its change, is so many times the usual norm of a layer is an attention sink. In clean text
# sinks have over a hundred times the usual norm, and changes of behaviour have about once of it.
SINK = 10.0


def ordinary_positions(host: Host, batch: PromptBatch) -> Bool[Tensor, "prompt pos"]:
    """The prompts' own positions that are no attention sink at any layer, in one pass of the unsteered model.

    All layers are asked, since the stream of a sink is large at some of them only: in SmolLM2-135M the first position
    has 8 times the usual norm at layer 7, and 160 times at layer 16. Means over positions leave sinks out; their
    keys, queries and updates are unlike those of all other positions.
    """
    ordinary = batch.own.clone()

    def look(stream: Tensor) -> None:
        norms = stream.detach().to(ordinary.device).float().norm(dim=-1)
        ordinary.logical_and_(norms <= SINK * norms[batch.own].median())

    reads: list[Hook] = [
        (stream_name(layer, host.n_layers), lambda stream, hook: look(stream)) for layer in range(1, host.n_layers)
    ]
    last = blocks.record(host, batch.tokens, host.n_layers, host.n_layers, reads).streams[-1]  # no unembedding
    look(last)
    return ordinary
