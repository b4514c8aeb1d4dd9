"""How are learned perturbations kept?  `save` and `load`, one file each."""

import os
from dataclasses import asdict
from typing import Any

from torch import Tensor

from melbo_lens import files
from melbo_lens.adapters import Perturbation, SteeringAdapters
from melbo_lens.mlp import MLPSite
from melbo_lens.perturbations import SteeringVectors


def save(perturbation: Perturbation, path: str | os.PathLike[str]) -> None:
    """Writes values, history and provenance to one safetensors file; a kill at any instant leaves the old file or the new one.

    Raises:
        OSError: the place can't be written to.
    """
    tensors, header = {"history": perturbation.history}, {"provenance": dict(perturbation.provenance)}
    if isinstance(perturbation, SteeringVectors):
        tensors |= {"values": perturbation.values}
        header |= {"source_layer": perturbation.source_layer}
    else:
        tensors |= {"scales": perturbation.scales}
        tensors |= {f"{name}.{layer}": factor for layer, pair in perturbation.factors.items() for name, factor in zip("AB", pair, strict=True)}
        header |= {"sites": [asdict(site) for site in perturbation.sites.values()]}
    files.write(path, type(perturbation).__name__, tensors, header)


def load(path: str | os.PathLike[str]) -> Perturbation:
    """Reads what `save` wrote, after checking that it is whole, of a known kind and no newer than this version of melbo_lens.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, of another program, of a newer schema, or its parts don't fit each other.
    """
    kind, tensors, header = files.read_any(path, MAKERS)
    try:
        return MAKERS[kind](tensors, header)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it holds {sorted(tensors)} and {sorted(header)} ({error}).") from error


def _vectors(tensors: dict[str, Tensor], header: dict[str, Any]) -> SteeringVectors:
    if not isinstance(header["source_layer"], int):
        raise ValueError("its source_layer is no integer")
    return SteeringVectors(tensors["values"], header["source_layer"], tensors["history"], header.get("provenance", {}))


def _adapters(tensors: dict[str, Tensor], header: dict[str, Any]) -> SteeringAdapters:
    sites = {site["layer"]: MLPSite(**site) for site in header["sites"]}
    factors = {layer: (tensors[f"A.{layer}"], tensors[f"B.{layer}"]) for layer in sites}
    return SteeringAdapters(factors, tensors["scales"], tensors["history"], header.get("provenance", {}), sites)


MAKERS = {"SteeringVectors": _vectors, "SteeringAdapters": _adapters}
