"""What must be known of a fit to repeat it?  Model, layers, hooks, prompts and versions of its slice; and whether a model is still the same."""

import hashlib
from importlib.metadata import version
from typing import Any, TypeVar
from uuid import uuid4
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from melbo_lens.models.host import Host
from melbo_lens.models.slices import SlicedModel
from melbo_lens.perturbations.perturbation import Perturbation

P = TypeVar("P", bound=Perturbation)

# The models on which something was learned, while they live, so that an export needs not be told which; values hold a token, and no model.
_MODELS: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()


def remembered(found: P, host: Host) -> P:
    """The perturbations, which from now on know their model by a token, in this process and while it lives."""
    token = uuid4().hex
    _MODELS[token] = host.model
    return found.with_token(token)


def model_of(perturbations: Perturbation) -> Any:
    """The model on which they were learned, if it is remembered; None if not."""
    return _MODELS.get(perturbations.token or "")


def describe(sliced: SlicedModel) -> dict[str, Any]:
    """Provenance of a slice: model, layers, hooks, prompts and versions."""
    host, batch = sliced.host, sliced.batch
    return {
        "model": host.name,
        "model_class": type(host.model).__name__,
        "dtype": str(sliced.resid.dtype).removeprefix("torch."),
        "device": sliced.device.type,
        "source_layer": sliced.source_layer,
        "site": sliced.site.name,
        "target_layer": sliced.target_layer,
        "source_hook": sliced.source_hook,
        "target_hook": sliced.target_hook,
        "target_norm": float(f"{float(sliced.target[batch.target_mask].norm()):.3g}"),  # tells models of one name apart
        "prompts": list(batch.texts),
        "prompt_tokens": batch.rows(),
        "versions": {name: version(name) for name in ("melbo_lens", "transformer_lens", "transformers", "torch")},
    }


def fingerprint(host: Host) -> str:
    """A digest of the class, and of the weights' names, shapes, dtypes and bits: models of one name differ in it, copies don't.

    Of each weight it takes the exact sum of its bits read as integers, which any change of one number changes, and some of the numbers themselves.
    """
    digest = hashlib.blake2b(type(host.model).__name__.encode(), digest_size=16)
    for name, weight in [*nn.Module.named_parameters(host.model), *nn.Module.named_buffers(host.model)]:
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
        flat
        if not flat.is_floating_point()
        else flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    )
    return f"{int(integers.sum(dtype=torch.long))} {sample.tolist()}"
