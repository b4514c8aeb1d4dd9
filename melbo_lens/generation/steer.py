"""How is a model steered for the length of a block?  `steer` attaches perturbations and removes them afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from melbo_lens.models import hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.host import Host
from melbo_lens.perturbations.perturbation import Perturbation


@contextmanager
def steer(model: Model, perturbation: Perturbation | Sequence[Perturbation]) -> Iterator[Model]:
    """Steers whatever the model runs inside the block; afterwards the model is as before, even after an exception.

    One vector or adapter steers every row of a batch; n of them need batches of exactly n rows. A sequence of
    perturbations steers with all its members at once.

    Args:
        model: the model to steer; the block gets it back as the value of `with`.
        perturbation: vectors or adapters, or a sequence of such values.

    Raises:
        TypeError: a perturbation is something else.
        ValueError: a perturbation doesn't fit the model.
    """
    several = list(perturbation) if isinstance(perturbation, Sequence) else [perturbation]
    for one in several:
        Perturbation.check_argument("perturbation", one)
    host = host_of(model)
    several = [fitting(host, one) for one in several]
    with hooks.attached(host, [hook for one in several for hook in one.hooks()]):
        yield model


def fitting(host: Host, perturbation: Perturbation) -> Perturbation:
    """The perturbation with its hooks where this model has them.

    Raises:
        ValueError: the perturbation doesn't fit the model.
    """
    fitting = perturbation.on(host)
    for name, _ in fitting.hooks():
        hooks.hook_point(host, name)
    return fitting
