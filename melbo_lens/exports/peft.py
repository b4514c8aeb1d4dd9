"""What does the `peft` library load?  A LoRA folder, checked against the Hugging Face model before it is written."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save as to_bytes
from torch import nn

from melbo_lens import files
from melbo_lens.exports import exporter
from melbo_lens.exports.weights import CONV1D, compare, lora_of
from melbo_lens.models.access import Model
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Prompts


@exporter("peft")
def to_peft(
    adapters: Perturbation | Sequence[Perturbation],
    path: str | os.PathLike[str],
    model: Model | None = None,
    hf_model: nn.Module | None = None,
    prompts: Prompts | None = None,
) -> Path:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, after checking that they have the same effect.

    The scale is part of lora_B, so lora_alpha equals the rank. Layers of a smaller rank than others are filled up with
    zeros, so that one rank holds for all. `weights.compare` says what is checked, on which model,
    and what is refused.

    Args:
        adapters: one adapter, such as `adapters[3]`.
        path: a folder, which is made if it is missing.
        model: the model that the adapter was learned on. By default it is the remembered model, if that still lives.
        hf_model: the Hugging Face model to check against; see `weights.compare` for the default.
        prompts: the prompts to check on; by default those of the fit.

    Returns:
        The folder.

    Raises:
        ValueError: there isn't exactly one adapter, or the check refuses it; the message names the step that failed.

    Warns:
        UserWarning: there was no Hugging Face model to check against.
    """
    lora = lora_of(adapters, "peft", model)
    compare(lora, hf_model, prompts)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora.host.name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(lora.names.values()),
        "fan_in_fan_out": lora.host.architecture in CONV1D,  # peft must be told that the weights are [in out]
        "inference_mode": True,
    }
    weights = {}
    for name, (a, b) in lora.factors.items():
        weights[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    contents = {
        "adapter_model.safetensors": to_bytes(weights, {"format": "pt"}),
        "adapter_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
    files.write_folder(path, contents)
    return Path(path)
