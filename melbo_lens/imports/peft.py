"""What does a LoRA folder of `peft` hold?  Low-rank updates; those of the weights that write to the stream are read."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.sites import WeightSite, usual_site

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG = 1 << 20
MAX_BYTES = 4 << 30
# The last part of a module's name -> the weights that it is, unless the part before says otherwise (GPT-2's c_proj).
OUTPUTS = {
    "o_proj": "attn",
    "out_proj": "attn",
    "down_proj": "mlp",
    "dense_4h_to_h": "mlp",
    "fc2": "mlp",
    "fc_out": "mlp",
    "w2": "mlp",
}
BY_PARENT = {
    "dense": {"attention": "attn", "self_attention": "attn", "self_attn": "attn"},
    "c_proj": {"attn": "attn", "mlp": "mlp"},
}
NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<factor>lora_[AB])(?:\.default)?\.weight")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.(.+)")
# Settings that make an adapter more than ``scale * B A x`` on the modules that it names.
UNKNOWN = (
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "megatron_config",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "arrow_config",
)

# Ways to begin a fit that leave the base model's weights alone; "pissa", "olora", "corda" and others take a part out.
KEEP_WEIGHTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def read(path: str | os.PathLike[str]) -> SteeringAdapters:
    """Reads the folder that `peft` saved as one adapter.

    Each module's scale, ``alpha / r`` (with `use_rslora`, ``alpha / sqrt(r)``), becomes part of its B, so the adapter
    has scale 1.

    Args:
        path: the folder.

    Raises:
        ValueError: the folder is damaged, is no LoRA, or updates more than the output weights of the attention, or of
            the MLP.
    """
    folder = Path(path)
    config = _config(folder)
    tensors = _tensors(folder)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = NAME.fullmatch(name)
        if found is None:
            raise ValueError(
                f"{folder} holds {name[:120]!r}, which is no factor of a LoRA: it can't be expressed here."
            )
        modules.setdefault(found["module"], {})[found["factor"]] = tensor
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    sites: dict[int, WeightSite] = {}
    for module, pair in modules.items():
        layer, site = _place(folder, module)
        if layer in factors:
            raise ValueError(
                f"{folder} updates two modules of layer {layer}: an adapter here updates the output weights of the "
                "attention, or of the MLP, in each layer."
            )
        factors[layer] = _factors(folder, module, pair, config)
        sites[layer] = _site(layer, site)
    if not factors or len({site.name for site in sites.values()}) > 1:
        raise ValueError(
            f"{folder} updates {'both the attention and the MLP' if factors else 'nothing'}: an adapter here updates "
            "the output weights of one of them."
        )
    name = config.get("base_model_name_or_path")
    provenance = {"method": "load", "file": folder.name, "source": "peft", **({"model": str(name)} if name else {})}
    scales = torch.ones(1, dtype=torch.float32, device="cpu")
    try:
        return SteeringAdapters(factors, scales, provenance=provenance, sites=sites)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _config(folder: Path) -> Mapping[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"{folder} has no {CONFIG}: it is no adapter of peft.")
    if file.stat().st_size > MAX_CONFIG:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, more than a configuration needs.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it is no JSON ({error}).") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{folder} is a {str(kind)[:40]} adapter: only LORA is read.")
    more = [name for name in UNKNOWN if config.get(name)]
    if more or config.get("bias", "none") != "none":
        said = ", ".join(more) or f"bias={str(config['bias'])[:40]}"
        raise ValueError(f"{folder} has {said}, which an adapter can't express here.")
    start = config.get("init_lora_weights", True)
    if start not in KEEP_WEIGHTS:
        raise ValueError(
            f"{folder} has init_lora_weights={str(start)[:40]!r}, which may have changed the base model's own weights, "
            "for which the factors alone don't make up: save it with peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it."
        )
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {WEIGHTS}: older versions of peft wrote a pickle, adapter_model.bin, which is not read. "
            "Load it with peft where you trust it, and save it again."
        )
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes; an adapter may have at most {MAX_BYTES}.")
    try:
        with safe_open(str(file), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error}): it can't be read.") from error


def _place(folder: Path, module: str) -> tuple[int, str]:
    """Returns the layer of a module, and which weights it is."""
    found = LAYER.search(module)
    parts = found[2].split(".") if found else []
    site = OUTPUTS.get(parts[-1]) if parts else None
    if len(parts) > 1 and parts[-1] in BY_PARENT:
        site = BY_PARENT[parts[-1]].get(parts[-2])
    if found is None or site is None:
        raise ValueError(
            f"{folder} updates {module[:120]!r}: only the output weights of a layer's attention (o_proj) or MLP "
            "(down_proj) can be expressed here."
        )
    return int(found[1]), site


def _factors(folder: Path, module: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns A [1 rank d_in] and B [1 d_model rank], with the scale in B."""
    if len(pair) != 2 or any(factor.ndim != 2 or not factor.is_floating_point() for factor in pair.values()):
        shapes = {name: tuple(factor.shape) for name, factor in pair.items()}
        raise ValueError(
            f"{folder}: {module[:120]} must have lora_A [rank d_in] and lora_B [d_out rank]; got {shapes}."
        )
    a, b = pair["lora_A"], pair["lora_B"]
    alpha = _alpha(folder, module, config)
    if a.shape[0] != b.shape[1]:
        raise ValueError(f"{folder}: the factors of {module[:120]} have ranks {a.shape[0]} and {b.shape[1]}.")
    rank = a.shape[0] ** 0.5 if config.get("use_rslora") else a.shape[0]
    return a.float()[None], (b.float() * (alpha / max(rank, 1)))[None]


def _alpha(folder: Path, module: str, config: Mapping[str, Any]) -> float:
    """Returns lora_alpha of a module, for which peft also looks at patterns of its name."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or any(re.fullmatch(r"[\w.]+", pattern) is None for pattern in patterns):
        raise ValueError(f"{folder}: alpha_pattern must be names of modules; a regular expression is not followed.")
    found = [value for name, value in patterns.items() if module == name or module.endswith(f".{name}")]
    alpha = found[0] if found else config.get("lora_alpha", 8)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"{folder}: lora_alpha={alpha!r} must be a number.")
    return alpha


def _site(layer: int, name: str) -> WeightSite:
    if name == "mlp":
        return usual_site(layer)
    return WeightSite(layer, f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_attn_out", name="attn")
