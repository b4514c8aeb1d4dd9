"""How are results kept?  One safetensors file each, written atomically and read without running anything in it."""

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from melbo_lens.perturbations import SteeringVectors

SCHEMA = 1


def save(vectors: SteeringVectors, path: str | os.PathLike[str]) -> None:
    """Writes vectors, history and provenance to one safetensors file; a kill at any instant leaves the old file or the new one.

    Raises:
        OSError: the place can't be written to.
    """
    header = {"source_layer": vectors.source_layer, "provenance": dict(vectors.provenance)}
    write(path, "SteeringVectors", {"values": vectors.values, "history": vectors.history}, header)


def load(path: str | os.PathLike[str]) -> SteeringVectors:
    """Reads what `save` wrote, after checking that it is whole, of a known kind and no newer than this version of melbo_lens.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, of another program, of a newer schema, or its parts don't fit each other.
    """
    tensors, header = read(path, "SteeringVectors")
    if set(tensors) != {"values", "history"} or not isinstance(header.get("source_layer"), int):
        raise ValueError(f"{path} is damaged: it should hold values, history and source_layer; it holds {sorted(tensors)}, {sorted(header)}.")
    try:
        return SteeringVectors(tensors["values"], header["source_layer"], tensors["history"], header.get("provenance", {}))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes tensors and a JSON header to a temporary sibling, flushes it to the disk, and renames it."""
    path = Path(path)
    metadata = {"format": "melbo_lens", "schema": str(SCHEMA), "kind": kind, "header": json.dumps(header)}
    data = to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise type(error)(error.errno, f"path={str(path)!r} can't be written: {error.strerror}. Choose an existing, writable folder") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file of this kind; see `load` for what is refused."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}: check the path.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): it can't be read.") from error
    if metadata.get("format") != "melbo_lens":
        raise ValueError(f"{path} was not written by melbo_lens: it is a safetensors file of something else.")
    schema = metadata.get("schema", "")
    if not schema.isdigit() or int(schema) > SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}, this melbo_lens reads up to {SCHEMA}: install a newer melbo_lens.")
    if metadata.get("kind") != kind:
        raise ValueError(f"{path} holds {metadata.get('kind')!r}, not {kind!r}.")
    try:
        header = json.loads(metadata["header"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: its header is no JSON ({error}).") from error
    if not isinstance(header, dict) or any(not torch.isfinite(t).all() for n, t in tensors.items() if n == "values"):
        raise ValueError(f"{path} is damaged: its header is no JSON object, or its values hold NaN or infinity.")
    return tensors, header


def _umask() -> int:
    # mkstemp makes private files; the result should have the permissions of any other new file
    mask = os.umask(0)
    os.umask(mask)
    return mask
