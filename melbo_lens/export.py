"""How do adapters get into other tools?  As a LoRA directory that the `peft` library loads on the Hugging Face model."""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from melbo_lens import files, hooks
from melbo_lens.adapters import SteeringAdapters
from melbo_lens.controls import fitting_prompts
from melbo_lens.passes import forward
from melbo_lens.prompts import Prompts, tokenize
from melbo_lens.sliced_model import TOLERANCES

N_PROBES = 4
CONV1D = ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel")  # keep their weights as [in out], and peft must know


def to_peft(
    adapters: SteeringAdapters, path: str | os.PathLike[str], model: Any = None, hf_model: nn.Module | None = None, prompts: Prompts | None = None
) -> Path:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, after checking on a probe prompt that they do the same.

    The scale is part of lora_B, so lora_alpha equals the rank. Whatever TransformerLens does to the weights on loading, the update of W_out is
    the same one, unless what is written to the stream was centred and the model does not centre it when reading.

    Args:
        adapters: one adapter, as `adapters[3]`.
        path: a folder; made if it is missing.
        model: the one that the adapter was learned on; by default it is remembered while it lives.
        hf_model: the Hugging Face model to check against. By default the one inside a bridge, or, where TransformerLens has processed the weights (a
            bridge in compatibility mode, a `HookedTransformer`), the model's own files if they are on this machine.
        prompts: what to check on; those of the fit by default.

    Returns:
        The folder.

    Raises:
        ValueError: several adapters, no model, a model without a Hugging Face counterpart, or log-probabilities that differ by more than 1e-4
            (half precision: by its rounding); says by which step.

    Warns:
        UserWarning: there was no Hugging Face model to check against.
    """
    if len(adapters) != 1:
        raise ValueError(f"to_peft writes one adapter, {len(adapters)} were given: choose one, as adapters[0].to_peft(path).")
    model = model if model is not None else adapters.fitted_on() if adapters.fitted_on is not None else None
    if model is None:
        raise ValueError("to_peft needs the model that the adapter was learned on, which is not remembered here: pass model=.")
    adapters = adapters.on(model)
    names = {layer: _module_name(model, layer) for layer in adapters.source_layers}
    checked = _check(adapters, model, names, hf_model, fitting_prompts(adapters, prompts, next(model.parameters()).device))
    if not checked:
        warnings.warn(
            "the exported adapter was not compared with a Hugging Face model: TransformerLens processed this model's weights, and its files are not "
            "on this machine. Pass hf_model= to compare.",
            stacklevel=2,
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(getattr(model.cfg, "model_name", "")),
        "r": adapters.rank,
        "lora_alpha": adapters.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(names.values()),
        "fan_in_fan_out": _architecture(model) in CONV1D,
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


def _check(adapters: SteeringAdapters, model: Any, names: Mapping[int, str], hf_model: nn.Module | None, prompts: Prompts) -> bool:
    """Compares the steered model with the Hugging Face one whose W_out is updated; False if there is none to compare with."""
    rows = [torch.tensor([row], dtype=torch.long, device=next(model.parameters()).device) for row in tokenize(model, prompts).rows()[:N_PROBES]]
    tolerance = TOLERANCES.get(next(model.parameters()).dtype, 1e-4)

    def ours(ids: Tensor) -> Tensor:
        return forward(model, ids)

    def steered(ids: Tensor) -> Tensor:
        with hooks.attached(model, adapters.hooks()):
            return forward(model, ids)

    with hooks.frozen(model), torch.no_grad():
        _check_centring(adapters, model, steered, rows, tolerance)
        network, weights = _network(model, names, hf_model)
        if network is None:
            return False
        plain = _difference(ours, lambda ids: network(ids).logits, rows)
        if plain > tolerance and hf_model is None:
            return False  # the files on this machine are not what this model was made from
        if plain > tolerance:
            raise ValueError(
                f"without any adapter, the log-probabilities of the model and of hf_model differ by {plain:.1e} (allowed: {tolerance:.0e}): its "
                "weights were edited after loading, or hf_model is another model. Pass the one that this model was made from."
            )
        expected = [steered(ids) for ids in rows]  # before the update: a bridge shares its network's weights
        with _updated(adapters, weights):
            difference = max(_distance(network(ids).logits, logits) for ids, logits in zip(rows, expected, strict=True))
    if difference > tolerance:
        raise ValueError(
            f"the log-probabilities of the steered model and of the Hugging Face model with the exported update differ by {difference:.1e} (allowed: "
            f"{tolerance:.0e}), without an adapter by {plain:.1e}: the MLP's weights were processed so that its hidden activation is another one "
            "(folding into W_in or W_out). Load the model without processing, and fit there."
        )
    return True


def _check_centring(adapters: SteeringAdapters, model: Any, steered: Callable[[Tensor], Tensor], rows: list[Tensor], tolerance: float) -> None:
    """Centred writing weights are harmless only where a constant added to the stream changes nothing."""
    if not hooks.is_hooked_transformer(model):
        return
    centred = {layer: (a, b - b.mean(1, keepdim=True)) for layer, (a, b) in adapters.factors.items()}
    means = [model.blocks[layer].mlp.W_out.float().mean(1).norm() / model.blocks[layer].mlp.W_out.float().norm() for layer in adapters.factors]
    if max(means) > 1e-5:
        return
    same = SteeringAdapters(centred, adapters.scales, sites=adapters.sites)

    def without_mean(ids: Tensor) -> Tensor:
        with hooks.attached(model, same.hooks()):
            return forward(model, ids)

    difference = _difference(steered, without_mean, rows)
    if difference > tolerance:
        raise ValueError(
            f"center_writing_weights has centred this model's W_out, but its norms don't centre the stream ({model.cfg.normalization_type}): the "
            f"update means something else to the Hugging Face model, log-probabilities differ by {difference:.1e} (allowed: {tolerance:.0e}). Load "
            "the model with center_writing_weights=False, and fit there."
        )


def _difference(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], rows: list[Tensor]) -> float:
    """The largest difference between what two models say to any of the rows."""
    return max(_distance(one(ids), other(ids)) for ids in rows)


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of log-probabilities; logits themselves may be shifted by a constant (center_unembed)."""
    return float((one.float().log_softmax(-1) - other.float().log_softmax(-1)).abs().max())


def _network(model: Any, names: Mapping[int, str], hf_model: nn.Module | None) -> tuple[nn.Module | None, dict[int, Tensor]]:
    """A Hugging Face model with its own weights, and those of the updated layers."""
    if hf_model is None and not hooks.is_hooked_transformer(model) and not model.compatibility_mode:
        return model.original_model, {layer: model.blocks[layer].mlp.out.original_component.weight for layer in names}
    network = hf_model if hf_model is not None else _from_files(model)
    if network is None:
        return None, {}
    return network, {layer: network.get_submodule(name).weight for layer, name in names.items()}


def _from_files(model: Any) -> nn.Module | None:
    from transformers import AutoModelForCausalLM

    first = next(model.parameters())
    try:
        network = AutoModelForCausalLM.from_pretrained(str(model.cfg.model_name), local_files_only=True, dtype=first.dtype)
    except (OSError, ValueError, AttributeError):
        return None
    return network.to(first.device).eval()


@contextmanager
def _updated(adapters: SteeringAdapters, weights: Mapping[int, Tensor]) -> Iterator[None]:
    """The weights [d_model d_mlp] or, for Conv1D, [d_mlp d_model] with the update added, and bit by bit as they were afterwards."""
    saved = {layer: weight.detach().clone() for layer, weight in weights.items()}
    try:
        for layer, weight in weights.items():
            a, b = adapters.factors[layer]
            update = adapters.scales[0] * b[0] @ a[0]
            weight.copy_((weight.float() + (update if weight.shape == update.shape else update.T).to(weight.device)).to(weight.dtype))
        yield
    finally:
        for layer, weight in weights.items():
            weight.copy_(saved[layer])


def _architecture(model: Any) -> str:
    if hooks.is_hooked_transformer(model):
        return str(model.cfg.original_architecture)
    return str(getattr(model.cfg, "architecture", None))


def _module_name(model: Any, layer: int) -> str:
    """The Hugging Face module of the MLP's output weights, by TransformerLens' own map of names."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    try:
        adapter = getattr(model, "adapter", None)
        if adapter is None:
            cfg = model.cfg
            sizes = {name: getattr(cfg, name) for name in ("d_model", "d_head", "n_layers", "n_ctx", "n_heads", "d_vocab", "d_mlp")}
            adapter = ArchitectureAdapterFactory.select_architecture_adapter(TransformerBridgeConfig(**sizes, architecture=cfg.original_architecture))
        name = adapter.translate_transformer_lens_path(f"blocks.{layer}.mlp.out")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"this model ({_architecture(model)}) has no Hugging Face counterpart known to TransformerLens ({error}).") from error
    if not hasattr(getattr(model, "original_model", None), "config") and not hooks.is_hooked_transformer(model):
        raise ValueError(f"this model ({_architecture(model)}) wraps no Hugging Face model: there is nothing that peft could load an adapter on.")
    return str(name)
