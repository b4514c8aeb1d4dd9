"""Does what is added at a site reach the stream as it is?  Some blocks scale or normalise their sum afterwards."""

from typing import Any

import torch
from torch import Tensor

from melbo_lens.models import blocks, hooks
from melbo_lens.models.host import Host
from melbo_lens.perturbations.sites import Hook, Site
from melbo_lens.prompts import PromptBatch
from melbo_lens.randomness import gaussian

# By how much of what is added the stream may be off. Rounding the stream takes .5 % of it in bfloat16 (measured on six
# architectures), .06 % in float16.
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
ANYTHING_ELSE = 2e-2


def reaches_stream(host: Host, batch: PromptBatch, layer: int, hook: str) -> bool:
    """Whether the stream that leaves a block gains what is added at a hook in it, and nothing else.

    A random vector of the stream's median norm is added, and the change is compared with it at the median position. A
    shorter vector would drown in the rounding of the stream.
    """

    def leaving(added: list[Hook]) -> Tensor:
        return blocks.record(host, batch.tokens, layer, layer + 1, added).streams[-1].to(host.device).float()

    with hooks.frozen(host), torch.no_grad():
        clean = leaving([])
        noise = gaussian((clean.shape[-1],), "slice check").to(clean.device)
        length = clean.norm(dim=-1)[batch.own].median()
        vector = (length if length > 0 else 1.0) * noise / noise.norm()
        add: Hook = (hook, lambda activation, hook: (activation + vector.to(activation)).to(activation.dtype))
        off = (leaving([add]) - clean - vector).norm(dim=-1)[batch.own].median() / vector.norm()
    return bool(off <= (ANYTHING_ELSE if host.quantised else TOLERANCES.get(host.dtype, ANYTHING_ELSE)))


def said_of(host: Host, batch: PromptBatch, layer: int, site: Site) -> dict[str, Any]:
    """What a provenance says of a site from which what is added usually reaches the stream, where it doesn't."""
    if not site.after_block or reaches_stream(host, batch, layer, hooks.source_hook(host, site, layer)):
        return {}
    return {"within_block": True}
