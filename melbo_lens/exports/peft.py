"""What does the `peft` library load?  A LoRA folder, checked against the Hugging Face model before it is written."""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from melbo_lens import files
from melbo_lens.exports import exporter
from melbo_lens.measures.controls import fitting_prompts
from melbo_lens.methods.provenance import model_of
from melbo_lens.models import hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.counterparts import from_files, module_name
from melbo_lens.models.host import Host
from melbo_lens.models.memory import packed
from melbo_lens.models.slices import TOLERANCES
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.perturbations.sites import WeightSite
from melbo_lens.prompts import Prompts, tokenize

N_PROBES = 4
CONV1D = ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel")  # keep their weights as [in out], which peft must be told


@exporter("peft")
def to_peft(
    adapters: Perturbation,
    path: str | os.PathLike[str],
    model: Model | None = None,
    hf_model: nn.Module | None = None,
    prompts: Prompts | None = None,
) -> Path:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, after checking that they have the same effect.

    The scale is part of lora_B, so lora_alpha equals the rank. However TransformerLens processed the weights on
    loading, their update is the same. The exception is a model whose writing weights were centred although it does
    not centre the stream when it reads it; such a model is refused.

    Args:
        adapters: one adapter, such as `adapters[3]`.
        path: a folder, which is made if it is missing.
        model: the model that the adapter was learned on. By default it is the remembered model, if that still lives.
        hf_model: the Hugging Face model to check against. By default it is the model inside a bridge. If
            TransformerLens has processed the weights (in a `HookedTransformer`, or a bridge in compatibility mode),
            it is loaded from the model's own files, if these are on this machine.
        prompts: the prompts to check on; by default those of the fit.

    Returns:
        The folder.

    Raises:
        ValueError: there isn't exactly one adapter, the model is missing or has no Hugging Face counterpart, or
            log-probabilities differ by more than 1e-4 (in half precision, by more than its rounding). The message names
            the step that failed.

    Warns:
        UserWarning: there was no Hugging Face model to check against.
    """
    if not isinstance(adapters, SteeringAdapters):
        raise ValueError(
            f"peft holds updates of weights, and {type(adapters).__name__} were given: export adapters, as "
            "fit_adapters learns them."
        )
    if len(adapters) != 1:
        raise ValueError(
            f"a peft folder holds one adapter, {len(adapters)} were given: choose one, as ml.export(adapters[0], "
            '"peft", path, model=model).'
        )
    known = model if model is not None else model_of(adapters)
    if known is None:
        raise ValueError(
            "a peft folder needs the model that the adapter was learned on, which is not remembered here: pass model=."
        )
    host = host_of(known)
    adapters = adapters.on(host)
    sites = list(adapters.sites.values())
    names = {site.layer: module_name(host, site) for site in sites}
    checked = _check(adapters, host, sites, names, hf_model, fitting_prompts(adapters, prompts, host.device))
    if not checked:
        warnings.warn(
            "the exported adapter was not compared with a Hugging Face model: TransformerLens processed this model's "
            "weights, and its files are not "
            "on this machine. Pass hf_model= to compare.",
            stacklevel=2,
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": host.name,
        "r": adapters.rank,
        "lora_alpha": adapters.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(names.values()),
        "fan_in_fan_out": host.architecture in CONV1D,
        "inference_mode": True,
    }
    weights = {}
    for layer, name in names.items():
        a, b = adapters.factors[layer]
        weights[f"base_model.model.{name}.lora_A.weight"] = a[0].cpu().contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = (adapters.scales[0] * b[0]).cpu().contiguous()
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomically(folder / "adapter_model.safetensors", to_bytes(weights, {"format": "pt"}))
    files.write_atomically(folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode())
    return folder


def _check(
    adapters: SteeringAdapters,
    host: Host,
    sites: Sequence[WeightSite],
    names: Mapping[int, str],
    hf_model: nn.Module | None,
    prompts: Prompts,
) -> bool:
    """Compares the steered model with the updated Hugging Face model; False if there is none to compare with."""
    rows = [
        torch.tensor([row], dtype=torch.long, device=host.device) for row in tokenize(host, prompts).rows()[:N_PROBES]
    ]
    tolerance = TOLERANCES.get(host.dtype, 1e-4)

    def steered(ids: Tensor) -> Tensor:
        with hooks.attached(host, adapters.hooks()):
            return host.forward(ids)

    with hooks.frozen(host), torch.no_grad():
        _check_centring(adapters, host, steered, rows, tolerance)
        network, weights = _network(host, sites, names, hf_model)
        if network is None:
            return False
        plain = _difference(host.forward, lambda ids: network(ids).logits, rows)
        if plain > tolerance and hf_model is None:
            return False  # the files on this machine are not what this model was made from
        if plain > tolerance:
            raise ValueError(
                f"without any adapter, the log-probabilities of the model and of hf_model differ by {plain:.1e} "
                f"(allowed: {tolerance:.0e}): its "
                "weights were edited after loading, or hf_model is another model. Pass the one that this model was "
                "made from."
            )
        expected = [steered(ids) for ids in rows]  # before the update: a bridge shares its network's weights
        with _updated(adapters, network, names, weights, host.architecture in CONV1D):
            difference = max(_distance(network(ids).logits, logits) for ids, logits in zip(rows, expected, strict=True))
    if difference > tolerance:
        raise ValueError(
            "the log-probabilities of the steered model and of the Hugging Face model with the exported update "
            f"differ by {difference:.1e} (allowed: "
            f"{tolerance:.0e}), without an adapter by {plain:.1e}: the MLP's weights were processed so that its "
            "hidden activation is another one "
            "(folding into W_in or W_out). Load the model without processing, and fit there."
        )
    return True


def _check_centring(
    adapters: SteeringAdapters, host: Host, steered: Callable[[Tensor], Tensor], rows: list[Tensor], tolerance: float
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

    difference = _difference(steered, without_mean, rows)
    if difference > tolerance:
        raise ValueError(
            "center_writing_weights has centred this model's weights, but its norms don't centre the stream "
            f"({host.cfg.normalization_type}): the "
            f"update means something else to the Hugging Face model, log-probabilities differ by {difference:.1e} "
            f"(allowed: {tolerance:.0e}). Load "
            "the model with center_writing_weights=False, and fit there."
        )


def _difference(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], rows: list[Tensor]) -> float:
    """The largest difference between the log-probabilities of two models on any of the rows."""
    return max(_distance(one(ids), other(ids)) for ids in rows)


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of log-probabilities; the logits may differ by a constant (center_unembed)."""
    return float((one.float().log_softmax(-1) - other.float().log_softmax(-1)).abs().max())


def _network(
    host: Host, sites: Sequence[WeightSite], names: Mapping[int, str], hf_model: nn.Module | None
) -> tuple[nn.Module | None, dict[int, Tensor]]:
    """The Hugging Face model to compare with, and its weights at the updated layers; None and {} if there is none."""
    own = host.own_weights(sites) if hf_model is None else None
    if own is not None:
        return own
    network = hf_model if hf_model is not None else from_files(host)
    if network is None:
        return None, {}
    return network, {layer: network.get_parameter(f"{name}.weight") for layer, name in names.items()}


@contextmanager
def _updated(
    adapters: SteeringAdapters,
    network: nn.Module,
    names: Mapping[int, str],
    weights: Mapping[int, Tensor],
    conv1d: bool,
) -> Iterator[None]:
    """Adds the update to the weights [d_model d_in] (for Conv1D [d_in d_model]), and afterwards restores their bits.

    Quantised weights can't be added to, so what the update makes of a module's input is added to its output, as peft
    itself does.
    """

    def beside(layer: int) -> Callable[..., Tensor]:
        a, b = adapters.factors[layer]
        update = adapters.scales[0] * b[0] @ a[0]
        return lambda module, inputs, output: (output + inputs[0].float() @ update.to(output.device).T).to(output.dtype)

    whole = {layer: weight for layer, weight in weights.items() if packed(weight)}
    weights = {layer: weight for layer, weight in weights.items() if layer not in whole}
    saved = {layer: weight.detach().clone() for layer, weight in weights.items()}
    with hooks.watched(after=[(network.get_submodule(names[layer]), beside(layer)) for layer in whole]):
        try:
            for layer, weight in weights.items():
                a, b = adapters.factors[layer]
                update = adapters.scales[0] * b[0] @ a[0]
                weight.copy_((weight.float() + (update.T if conv1d else update).to(weight.device)).to(weight.dtype))
            yield
        finally:
            for layer, weight in weights.items():
                weight.copy_(saved[layer])
