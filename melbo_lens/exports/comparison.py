"""Does the plain Hugging Face model do the same?  An export is compared with it before anything is written."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from melbo_lens.measures.controls import fitting_prompts
from melbo_lens.models import hooks
from melbo_lens.models.counterparts import from_files
from melbo_lens.models.fidelity import TOLERANCES
from melbo_lens.models.host import Host
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.perturbations.sites import WeightSite
from melbo_lens.prompts import Prompts, tokenize

N_PROBES = 4
N_TOKENS = 16  # of a probe for perturbations that know no prompts


class Differences(NamedTuple):
    """The largest differences of log-probabilities between our model and the Hugging Face model.

    Attributes:
        steered: between the two, each under the perturbation.
        unsteered: between the two, without it.
        allowed: how much of the first is rounding: the tolerance of the model's dtype, times the largest change of
            log-probabilities by the perturbation where that is above one.
    """

    steered: float
    unsteered: float
    allowed: float


def probes(host: Host, prompts: Prompts) -> list[Tensor]:
    """Returns the first few prompts as rows of tokens [1 pos], on which both models are run."""
    return [
        torch.tensor([row], dtype=torch.long, device=host.device) for row in tokenize(host, prompts).rows()[:N_PROBES]
    ]


def tolerance(host: Host) -> float:
    """The largest difference of log-probabilities that rounding in the model's dtype explains."""
    return TOLERANCES.get(host.dtype, 1e-4)


def network_of(
    host: Host, hf_model: nn.Module | None, sites: Sequence[WeightSite] = (), names: Mapping[int, str] | None = None
) -> tuple[nn.Module | None, dict[int, Tensor]]:
    """Finds the Hugging Face model to compare with, and its weights at the sites.

    Args:
        host: the model that is steered.
        hf_model: the user's own choice. By default it is the model inside a bridge or, where TransformerLens processed
            the weights, the one in the model's own files.
        sites: the weights that are asked for.
        names: the layer of each site -> the name of its Hugging Face module.

    Returns:
        The model, and the weights by layer; (None, {}) if there is no model to compare with.
    """
    own = host.own_weights(sites) if hf_model is None else None
    if own is not None:
        return own
    network = hf_model if hf_model is not None else from_files(host)
    if network is None:
        return None, {}
    return network, {layer: network.get_parameter(f"{name}.weight") for layer, name in (names or {}).items()}


def unsteered_difference(host: Host, network: nn.Module, given: bool, rows: Sequence[Tensor]) -> float | None:
    """Measures how far apart the two models are without any perturbation.

    Args:
        host: the model that is steered.
        network: the Hugging Face model.
        given: whether the user named it. If not, it comes from files on this machine, which may be other weights.
        rows: the tokens to run on.

    Returns:
        The largest difference of log-probabilities; None if the files are not what this model was made from, so that
        there is nothing to compare with.

    Raises:
        ValueError: the model that the user named is another one.
    """
    plain = difference(host.forward, lambda ids: network(ids).logits, rows)
    allowed = tolerance(host)
    if plain <= allowed:
        return plain
    if not given:
        return None
    raise ValueError(
        f"without any perturbation, the log-probabilities of the model and of hf_model differ by {plain:.1e} "
        f"(allowed: {allowed:.0e}): its weights were edited after loading, or hf_model is another model. "
        "Pass the one that this model was made from."
    )


def steered_differences(
    host: Host,
    perturbations: Sequence[Perturbation],
    change: Callable[[nn.Module], AbstractContextManager[Any]],
    hf_model: nn.Module | None,
    prompts: Prompts | None,
) -> Differences | None:
    """Compares the model, steered, with the Hugging Face model, changed for the length of a block.

    Args:
        host: the model that is steered.
        perturbations: what steers it, all at once, with its hooks in this model.
        change: makes a block in which the Hugging Face model does what another tool will make it do.
        hf_model: the user's own choice of the Hugging Face model; see `network_of`.
        prompts: the prompts to run on. By default those of the fit, or some tokens if none are known.

    Returns:
        The differences; None if there is no model to compare with.

    Raises:
        ValueError: the model that the user named is another one.
    """
    if prompts is None and not perturbations[0].provenance.get("prompt_tokens"):
        # any tokens tell two models apart
        prompts = (torch.arange(1, 1 + N_TOKENS, device=host.device) % int(host.cfg.d_vocab))[None]
    rows = probes(host, fitting_prompts(perturbations[0], prompts, host.device))
    with hooks.frozen(host, *([] if hf_model is None else [hf_model])), torch.no_grad():
        network, _ = network_of(host, hf_model)
        if network is None:
            return None
        plain = unsteered_difference(host, network, hf_model is not None, rows)
        if plain is None:
            return None
        with hooks.attached(host, [hook for one in perturbations for hook in one.hooks()]):
            expected = [host.forward(ids) for ids in rows]
        with change(network):
            found = [network(ids).logits for ids in rows]
        effect = largest(map(distance, expected, map(host.forward, rows)))
    return Differences(largest(map(distance, found, expected)), plain, tolerance(host) * largest([1.0, effect]))


def difference(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], rows: Sequence[Tensor]) -> float:
    """The largest difference between the log-probabilities of two models on any of the rows."""
    return largest(distance(one(ids), other(ids)) for ids in rows)


def largest(distances: Iterable[float]) -> float:
    """The largest of the distances; NaN if one of them is, which `max` would pass over."""
    return float(torch.tensor(list(distances), dtype=torch.float64, device="cpu").max())


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of log-probabilities; the logits may differ by a constant (center_unembed)."""
    return float((one.float().log_softmax(-1) - other.float().log_softmax(-1)).abs().max())
