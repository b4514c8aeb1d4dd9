"""What must be known of a fit to repeat it?  Model, layers, hooks, prompts and versions of its slice; and whether a model is still the same."""

import hashlib
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from melbo_lens.sliced_model import SlicedModel


def describe(sliced: SlicedModel) -> dict[str, Any]:
    """Provenance of a slice: model, layers, hooks, prompts and versions."""
    model, batch = sliced.model, sliced.batch
    return {
        "model": str(getattr(model.cfg, "model_name", None) or "unnamed"),
        "model_class": type(model).__name__,
        "dtype": str(sliced.resid.dtype).removeprefix("torch."),
        "device": sliced.device.type,
        "source_layer": sliced.source_layer,
        "target_layer": sliced.target_layer,
        "source_hook": sliced.source_hook,
        "target_hook": sliced.target_hook,
        "target_norm": float(f"{float(sliced.target[batch.target_mask].norm()):.3g}"),  # tells models of one name apart
        "prompts": list(batch.texts),
        "prompt_tokens": batch.rows(),
        "versions": {name: version(name) for name in ("melbo_lens", "transformer_lens", "transformers", "torch")},
    }


def fingerprint(model: Any) -> str:
    """A digest of the class, and of the weights' names, shapes, dtypes and bits: models of one name differ in it, copies don't.

    Of each weight it takes the exact sum of its bits read as integers, which any change of one number changes, and some of the numbers themselves.
    """
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    for name, weight in [*nn.Module.named_parameters(model), *nn.Module.named_buffers(model)]:
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {_bits(weight.detach())}".encode())
    return digest.hexdigest()


def _bits(weight: Tensor) -> str:
    flat = weight.contiguous().view(-1)
    if not flat.numel():
        return ""
    sample = flat[:: max(1, flat.numel() // 64)].cpu()
    if flat.dtype.is_complex or flat.dtype == torch.bool:
        return str(sample.tolist())
    integers = (
        flat if not flat.is_floating_point() else flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    )
    return f"{int(integers.sum(dtype=torch.long))} {sample.tolist()}"
