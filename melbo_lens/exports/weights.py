"""What does one adapter add to the weights of the Hugging Face model?  Two factors for each module, checked."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from melbo_lens.exports import comparison
from melbo_lens.measures.controls import fitting_prompts
from melbo_lens.methods.provenance import check_same_model, model_of
from melbo_lens.models import hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.counterparts import module_name
from melbo_lens.models.host import Host
from melbo_lens.models.tally import packed
from melbo_lens.perturbations.adapters import Factors, SteeringAdapters
from melbo_lens.prompts import Prompts

CONV1D = ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel")  # keep their weights as [in out]


class Lora(NamedTuple):
    """One adapter by the names of the Hugging Face model.

    Attributes:
        host: the model that it was learned on.
        adapter: the adapter with its hooks in this model.
        names: source layer -> name of the Hugging Face module whose weights it updates.
    """

    host: Host
    adapter: SteeringAdapters
    names: dict[int, str]

    @property
    def rank(self) -> int:
        """The rank that every module is written with: the largest of any layer."""
        return max(a.shape[1] for a, _ in self.adapter.factors.values())

    @property
    def alpha(self) -> int:
        """Readers multiply each module's ``B A`` by alpha over its rank, so that of our own scale is in B."""
        return self.rank

    @property
    def factors(self) -> dict[str, Factors]:
        """Module name -> (A [rank d_in], B [d_model rank]), float32 on the CPU; the module's weights gain ``B A``.

        Formats have one rank for all modules, so factors of a smaller one are filled up with zeros.
        """
        scale = self.adapter.scales[0]  # becomes part of B
        pairs = {name: self.adapter.factors[layer] for layer, name in self.names.items()}
        return {
            name: (
                pad(a[0], (0, 0, 0, self.rank - a.shape[1])).cpu(),
                pad(scale * b[0], (0, self.rank - b.shape[2])).cpu(),
            )
            for name, (a, b) in pairs.items()
        }

    @property
    def updates(self) -> dict[int, Tensor]:
        """Layer -> what readers of the factors and of alpha add to its weights [d_model d_in]."""
        factors = self.factors
        return {
            layer: self.alpha / len(factors[name][0]) * factors[name][1] @ factors[name][0]
            for layer, name in self.names.items()
        }


def lora_of(adapters: object, format: str, model: Model | None = None) -> Lora:
    """Names the modules of the Hugging Face model that one adapter updates.

    Args:
        adapters: one adapter, such as `adapters[3]`.
        format: the format that it is exported to, for messages.
        model: the model that the adapter was learned on. By default it is the remembered model, if that still lives.

    Raises:
        ValueError: there isn't exactly one adapter, or the model is missing, is another one than that of
            the fit, or has no Hugging Face counterpart.
    """
    if not isinstance(adapters, SteeringAdapters):
        raise ValueError(
            f"{format} holds updates of weights, and {type(adapters).__name__} were given: export one adapter, as "
            "fit_adapters learns them."
        )
    if len(adapters) != 1:
        raise ValueError(
            f"{format} holds one adapter, {len(adapters)} were given: choose one, as ml.export(adapters[0], "
            f'"{format}", path, model=model).'
        )
    known = model if model is not None else model_of(adapters)
    if known is None:
        raise ValueError(
            f"{format} needs the model that the adapter was learned on, which is not remembered here: pass model=."
        )
    host = host_of(known)
    adapter = adapters.on(host)
    check_same_model(adapter, host)
    return Lora(host, adapter, {site.layer: module_name(host, site) for site in adapter.sites.values()})


def compare(lora: Lora, hf_model: nn.Module | None = None, prompts: Prompts | None = None) -> None:
    """Checks that the adapter has the same effect on the Hugging Face model.

    However TransformerLens processed the weights on loading, their update is the same. The exception is a model whose
    writing weights were centred although it does not centre the stream when it reads it; such a model is refused.

    Args:
        lora: the adapter.
        hf_model: the Hugging Face model to check against. By default it is the model inside a bridge. If
            TransformerLens has processed the weights (in a `HookedTransformer`, or a bridge in compatibility mode),
            it is loaded from the model's own files, if these are on this machine.
        prompts: the prompts to check on; by default those of the fit.

    Raises:
        ValueError: log-probabilities differ by more than 1e-4 (in half precision, by more than its rounding), or
            hf_model is another model. The message names the step that failed.

    Warns:
        UserWarning: there was no Hugging Face model to check against.
    """
    if not _check(lora, hf_model, fitting_prompts(lora.adapter, prompts, lora.host.device)):
        warnings.warn(
            "the exported adapter was not compared with a Hugging Face model: TransformerLens processed this model's "
            "weights, and its files are not on this machine or give other log-probabilities. "
            "Pass hf_model= to compare.",
            stacklevel=3,
        )


def _check(lora: Lora, hf_model: nn.Module | None, prompts: Prompts) -> bool:
    """Compares the steered model with the updated Hugging Face model; False if there is none to compare with."""
    host, adapters, names = lora
    rows, allowed = comparison.probes(host, prompts), comparison.tolerance(host)

    def steered(ids: Tensor) -> Tensor:
        with hooks.attached(host, adapters.hooks()):
            return host.forward(ids)

    with hooks.frozen(host, *([] if hf_model is None else [hf_model])), torch.no_grad():
        _check_centring(adapters, host, steered, rows, allowed)
        network, weights = comparison.network_of(host, hf_model, list(adapters.sites.values()), names)
        if network is None:
            return False
        plain = comparison.unsteered_difference(host, network, hf_model is not None, rows)
        if plain is None:
            return False
        expected = [steered(ids) for ids in rows]  # before the update: a bridge shares its network's weights
        with _updated(lora.updates, network, names, weights, host.architecture in CONV1D):
            difference = comparison.largest(
                comparison.distance(network(ids).logits, logits) for ids, logits in zip(rows, expected, strict=True)
            )
    if not difference <= allowed:  # so that NaN is refused, too
        raise ValueError(
            "the log-probabilities of the steered model and of the Hugging Face model with the exported update "
            f"differ by {difference:.1e} (allowed: {allowed:.0e}), without an adapter by {plain:.1e}: these "
            "weights were processed on loading, so that what enters them is another activation. Load the model without "
            "processing, and fit there."
        )
    return True


def _check_centring(
    adapters: SteeringAdapters, host: Host, steered: Callable[[Tensor], Tensor], rows: list[Tensor], allowed: float
) -> None:
    """Refuses centred writing weights, unless adding a constant to the stream changes nothing.

    Raises:
        ValueError: the part of the update that centring removes changes the log-probabilities.
    """
    if not all(map(host.writes_centred, adapters.sites.values())):
        return
    centred = {layer: (a, b - b.mean(1, keepdim=True)) for layer, (a, b) in adapters.factors.items()}
    same = SteeringAdapters(centred, adapters.scales, sites=adapters.sites)

    def without_mean(ids: Tensor) -> Tensor:
        with hooks.attached(host, same.hooks()):
            return host.forward(ids)

    difference = comparison.difference(steered, without_mean, rows)
    if not difference <= allowed:
        raise ValueError(
            "center_writing_weights has centred this model's weights, but its norms don't centre the stream "
            f"({host.cfg.normalization_type}): the update means something else to the Hugging Face model, "
            f"log-probabilities differ by {difference:.1e} (allowed: {allowed:.0e}). Load the model with "
            "center_writing_weights=False, and fit there."
        )


@contextmanager
def _updated(
    updates: Mapping[int, Tensor],
    network: nn.Module,
    names: Mapping[int, str],
    weights: Mapping[int, Tensor],
    conv1d: bool,
) -> Iterator[None]:
    """Adds the update to the weights [d_model d_in] (for Conv1D [d_in d_model]), and afterwards restores their bits.

    Quantised weights can't be added to, so what the update makes of a module's input is added to its output, as peft
    itself does.
    """

    def beside(update: Tensor) -> Callable[..., Tensor]:
        return lambda module, inputs, output: (output + inputs[0].float() @ update.to(output.device).T).to(output.dtype)

    readable = {layer: weight for layer, weight in weights.items() if not packed(weight)}
    saved = {layer: weight.detach().clone() for layer, weight in readable.items()}
    others = [
        (network.get_submodule(names[layer]), beside(updates[layer])) for layer in weights.keys() - readable.keys()
    ]
    with hooks.watched(after=others):
        try:
            for layer, weight in readable.items():
                update = updates[layer].T if conv1d else updates[layer]
                weight.copy_((weight.float() + update.to(weight.device)).to(weight.dtype))
            yield
        finally:
            for layer, weight in readable.items():
                weight.copy_(saved[layer])
