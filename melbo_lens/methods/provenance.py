"""What must be known of a fit to repeat it?  The model, layers, hooks, prompts and versions of its slice.

This file also tells whether a model is still the same, and remembers on which model something was learned.
"""

import hashlib
import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from melbo_lens.measures.radius import median_norm
from melbo_lens.models.host import Host
from melbo_lens.models.slices import SlicedModel
from melbo_lens.models.tally import held_in
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.perturbations.sites import SITES

P = TypeVar("P", bound=Perturbation)

# token -> the model on which something was learned, as long as that model lives. An export finds its model here;
# perturbations themselves hold the token and no model.
_MODELS: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()
# The digests of opened models: a host serves one public call, or one slice, within which no weight changes.
_DIGESTS: WeakKeyDictionary[Host, str] = WeakKeyDictionary()


def remembered(found: P, host: Host) -> P:
    """The perturbations with a token, by which `model_of` finds their model in this process while the model lives."""
    token = uuid4().hex
    _MODELS[token] = host.model
    return found.with_token(token)


def model_of(perturbations: Perturbation) -> nn.Module | None:
    """The model on which the perturbations were learned; None if it is not remembered."""
    return _MODELS.get(perturbations.token or "")


def check_same_model(perturbations: Perturbation, host: Host) -> None:
    """Refuses a model of other weights than the one on which the perturbations were learned.

    Only a model of the same class and dtype can be compared, since another class or dtype has other numbers; and only
    with what was fitted since the weights are part of the provenance.

    Raises:
        ValueError: the weights are others.
    """
    learned = perturbations.provenance
    here = {"model_class": type(host.model).__name__, "dtype": str(host.dtype).removeprefix("torch.")}
    if "fingerprint" not in learned or any(learned.get(name) != value for name, value in here.items()):
        return
    if learned["fingerprint"] != fingerprint(host):
        raise ValueError(
            f"the perturbation was learned on {learned.get('model', 'a model')} with other weights than those of this "
            f"model ({host.name}): pass the model that it was learned on, loaded and processed as it was then."
        )


def warn_of_another_model(perturbations: Perturbation, host: Host) -> None:
    """Lets a model of other weights pass with a warning, where it may be what is wanted: to see if vectors carry over.

    Warns:
        UserWarning: the perturbations were learned on a model of other weights (`check_same_model`).
    """
    try:
        check_same_model(perturbations, host)
    except ValueError as error:
        warnings.warn(str(error), stacklevel=3)


def describe(sliced: SlicedModel) -> dict[str, Any]:
    """Provenance of a slice: model, layers, hooks, prompts and versions."""
    host, batch = sliced.host, sliced.batch
    return {
        **describe_model(host),
        "dtype": str(sliced.resid.dtype).removeprefix("torch."),
        "device": sliced.device.type,
        "source_layer": sliced.source_layer,
        "site": sliced.site.name,
        # only where the block changes what is added at a site from which it usually reaches the stream as it is
        **({} if sliced.site == SITES[sliced.site.name] else {"within_block": True}),
        "target_layer": sliced.target_layer,
        "source_hook": sliced.source_hook,
        "target_hook": sliced.target_hook,
        "stream_norm": float(f"{median_norm(sliced):.6g}"),
        # tells models of the same name apart
        "target_norm": float(f"{float(sliced.target[batch.target_mask].norm()):.3g}"),
        "prompts": list(batch.texts),
        "prompt_tokens": batch.rows(),
    }


def describe_model(host: Host) -> dict[str, Any]:
    """Provenance of a model: its name, its weights and the versions of what runs it."""
    return {
        "model": whole_path(host.name),
        "model_class": type(host.model).__name__,
        "fingerprint": fingerprint(host),
        "dtype": str(host.dtype).removeprefix("torch."),
        "device": host.device.type,
        "versions": {name: version(name) for name in ("melbo_lens", "transformer_lens", "transformers", "torch")},
    }


def whole_path(name: str) -> str:
    """The whole path where a model's name is that of a folder on this machine, and so not one on the hub."""
    return str(Path(name).resolve()) if os.sep in name and Path(name).is_dir() else name


def fingerprint(host: Host) -> str:
    """A digest of the model's class and of its weights' names, shapes, dtypes and bits.

    Different models of one name have different digests, and copies of a model have the same one. Each weight enters
    with the exact sum of its bits, read as integers, which changes if any single number changes, and with a sample of
    its numbers. An opened model is digested once.
    """
    if host not in _DIGESTS:
        _DIGESTS[host] = _digest(host)
    return _DIGESTS[host]


def _digest(host: Host) -> str:
    digest = hashlib.blake2b(type(host.model).__name__.encode(), digest_size=16)
    for name, weight in [*nn.Module.named_parameters(host.model), *nn.Module.named_buffers(host.model)]:
        bits = " ".join(_bits(part) for part in held_in(weight.detach()))
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {bits}".encode())
    return digest.hexdigest()


def _bits(weight: Tensor) -> str:
    """The sum of a weight's bits and a sample of its numbers, as text."""
    flat = weight.contiguous().view(-1)
    if not flat.numel() or flat.device.type == "meta":  # offloaded weights are read by no one but their module
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
