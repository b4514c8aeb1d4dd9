"""What of a model is not needed for a while?  Weights outside some blocks, which leave the accelerator meanwhile."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from melbo_lens.models.host import Host
from melbo_lens.models.tally import weights_of


@contextmanager
def trimmed(host: Host, needed: Sequence[nn.Module]) -> Iterator[None]:
    """Moves every weight that none of the needed blocks has to the CPU inside the `with` block, and back afterwards.

    Weights that lie on the CPU, or are offloaded, stay where they are, so on the CPU alone this frees nothing. Only
    the needed blocks can be run inside.

    Args:
        host: the opened model.
        needed: the blocks that will be run.
    """
    kept = {id(x) for block in needed for x in weights_of(block)}
    moved: list[tuple[Tensor, torch.device]] = []
    try:
        for x in dict.fromkeys(x for network in host.networks for x in weights_of(network)):
            if id(x) not in kept and x.device.type not in ("cpu", "meta"):
                moved.append((x, x.device))
                x.data = x.data.cpu()
        yield
    finally:
        for x, device in moved:
            x.data = x.data.to(device)
