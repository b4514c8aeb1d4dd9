"""How are learned perturbations kept?  `save` and `load`, one file each."""

import os

from melbo_lens import files
from melbo_lens.perturbations import SteeringVectors

KIND = "SteeringVectors"


def save(vectors: SteeringVectors, path: str | os.PathLike[str]) -> None:
    """Writes vectors, history and provenance to one safetensors file; a kill at any instant leaves the old file or the new one.

    Raises:
        OSError: the place can't be written to.
    """
    header = {"source_layer": vectors.source_layer, "provenance": dict(vectors.provenance)}
    files.write(path, KIND, {"values": vectors.values, "history": vectors.history}, header)


def load(path: str | os.PathLike[str]) -> SteeringVectors:
    """Reads what `save` wrote, after checking that it is whole, of a known kind and no newer than this version of melbo_lens.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, of another program, of a newer schema, or its parts don't fit each other.
    """
    tensors, header = files.read(path, KIND)
    if set(tensors) != {"values", "history"} or not isinstance(header.get("source_layer"), int):
        raise ValueError(f"{path} is damaged: it should hold values, history and source_layer; it holds {sorted(tensors)}, {sorted(header)}.")
    try:
        return SteeringVectors(tensors["values"], header["source_layer"], tensors["history"], header.get("provenance", {}))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
