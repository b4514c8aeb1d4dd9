"""How are control vectors of llama.cpp and repeng read?  From a GGUF file, of which nothing is believed.

Every size is compared with what is left of the file before anything of that size is read, so a file can't make this
process take more memory than itself. This needs no further package.

Source: the GGUF specification, `docs/gguf.md` of ggml.
"""

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from melbo_lens.arguments import count
from melbo_lens.perturbations.vectors import SteeringVectors

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_HEADER = 2**24  # bytes before the tensors; those of control vectors take a hundred for each layer
MOST_WIDTH = 2**20  # numbers in a vector; the widest models have some ten thousand
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MOST_TEXT = 200  # characters of a text or name that are kept or shown
STRING, ARRAY, F32 = 8, 9, 0
DIRECTION = re.compile(r"direction\.(\d{1,6})")


@dataclass(frozen=True)
class ControlVectors:
    """What is in the header of a file of control vectors.

    Attributes:
        path: the file.
        metadata: key -> text or number.
        places: layer, counted from 0 -> the first byte of its vector in the file.
        d_model: the length of every vector.
    """

    path: Path
    metadata: dict[str, Any]
    places: dict[int, int]
    d_model: int

    def vector(self, layer: int) -> SteeringVectors:
        """Reads the vector of one layer."""
        with self.path.open("rb") as file:
            file.seek(self.places[layer])
            data = file.read(4 * self.d_model)
        if len(data) < 4 * self.d_model:
            raise ValueError(f"{self.path} is truncated: the vector of layer {layer} goes on beyond its end.")
        provenance = {
            "method": str(self.metadata.get("controlvector.method", "control vector"))[:MOST_TEXT],
            "model_hint": str(self.metadata.get("controlvector.model_hint", "unknown"))[:MOST_TEXT],
            "file": self.path.name,
        }
        values = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))
        try:
            return SteeringVectors(values[None], layer, provenance=provenance, site="resid_post")
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error


def read(path: str | os.PathLike[str], layer: int | None = None) -> SteeringVectors:
    """Reads one control vector.

    The tensor `direction.N` is added to the stream that leaves block N, counted from 0, so the result has
    source_layer N and site "resid_post".

    Args:
        path: a GGUF file of llama.cpp, repeng, or this package.
        layer: which layer's vector to read; it may be left out if the file has only one.

    Returns:
        One vector, values [1 d_model].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged or holds something else, or it has several layers and none, or one
            that is missing, was named. The message lists the layers.
    """
    if layer is not None:
        count("layer", layer, least=0)
    header = read_header(path)
    layers = sorted(header.places)
    if layer is None and len(layers) > 1:
        raise ValueError(
            f"{path} has control vectors of layers {_listed(layers)}, and one value holds those of one layer: name it, "
            f"as ml.load(path, layer={layers[len(layers) // 2]}). "
            "melbo_lens.imports.gguf.read_all(path) returns a list with all, which ml.steer takes."
        )
    if layer is not None and layer not in header.places:
        raise ValueError(f"{path} has no control vector of layer {layer}: it has those of layers {_listed(layers)}.")
    return header.vector(layers[0] if layer is None else layer)


def read_all(path: str | os.PathLike[str]) -> list[SteeringVectors]:
    """Reads all control vectors of a file, by ascending layer.

    `ml.steer(model, read_all(path))` does what llama.cpp does with the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged or holds something else.
    """
    header = read_header(path)
    return [header.vector(layer) for layer in sorted(header.places)]


def read_header(path: str | os.PathLike[str]) -> ControlVectors:
    """Reads and checks everything before the vectors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: check the path.")
    size = path.stat().st_size
    with path.open("rb") as file:
        cursor = _Cursor(path, file.read(min(size, MOST_HEADER)), size)
    if cursor.take(4) != MAGIC:
        raise ValueError(f"{path} is no GGUF file: it begins with other bytes.")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"{path} has GGUF version {version}: versions 2 and 3, little-endian, are read.")
    n_tensors, n_keys = cursor.counted("Q", 24), cursor.counted("Q", 13)
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    tensors = [_tensor(cursor) for _ in range(n_tensors)]
    return _directions(path, metadata, tensors, cursor.position, size)


def _directions(
    path: Path, metadata: dict[str, Any], tensors: list[tuple[str, list[int], int, int]], end: int, size: int
) -> ControlVectors:
    """Refuses tensors that are no control vectors of one width, or lie outside the file."""
    kind = metadata.get("general.architecture", "unknown")
    if kind != "controlvector" and not any(name.startswith("direction.") for name, *_ in tensors):
        raise ValueError(
            f"{path} holds a model or an adapter ({str(kind)[:MOST_TEXT]!r}), no control vectors: "
            "it has no tensor named direction.N."
        )
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**16:
        raise ValueError(f"{path} is damaged: its tensors are aligned to {str(alignment)[:MOST_TEXT]!r} bytes.")
    start = -(-end // alignment) * alignment
    places: dict[int, int] = {}
    widths: set[int] = set()
    for name, shape, type_, offset in tensors:
        found = DIRECTION.fullmatch(name)
        if found is None or len(shape) != 1 or type_ != F32 or not 1 <= shape[0] <= MOST_WIDTH:
            raise ValueError(
                f"{path} is no file of control vectors: these are tensors direction.N of type F32 with one axis of "
                f"1 to {MOST_WIDTH} numbers, and it has {name[:MOST_TEXT]!r} of type {type_} with axes {shape}."
            )
        if int(found[1]) in places:
            raise ValueError(f"{path} is damaged: it has two tensors of layer {int(found[1])}.")
        if start + offset + 4 * shape[0] > size:
            raise ValueError(f"{path} is truncated: {name} lies beyond its end ({size} bytes).")
        places[int(found[1])] = start + offset
        widths.add(shape[0])
    if len(widths) != 1:
        said = f"of several widths, {sorted(widths)[:8]}" if widths else "missing"
        raise ValueError(f"{path} is no file of control vectors: its vectors are {said}.")
    width = widths.pop()
    if 4 * width * len(places) > size - start:
        raise ValueError(f"{path} is damaged: its {len(places)} vectors overlap, they need more bytes than it has.")
    return ControlVectors(path, metadata, places, width)


def _tensor(cursor: "_Cursor") -> tuple[str, list[int], int, int]:
    """Name, axes, type and offset of the next tensor."""
    name, n_axes = cursor.text(), cursor.number("I")
    if n_axes > 4:
        raise cursor.damaged(f"tensor {name[:MOST_TEXT]!r} has {n_axes} axes")
    return name, [cursor.number("Q") for _ in range(n_axes)], cursor.number("I"), cursor.number("Q")


class _Cursor:
    """Reads a header from its first bytes; every size is checked against what is left of them."""

    def __init__(self, path: Path, data: bytes, size: int) -> None:
        self.path, self.data, self.size, self.position = path, data, size, 0

    def damaged(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is damaged or no file of control vectors: {why}.")

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.position:
            if len(self.data) < self.size:
                raise self.damaged(f"its header is longer than {MOST_HEADER} bytes")
            raise ValueError(f"{self.path} is truncated or damaged: its header goes on beyond its end.")
        self.position += n
        return self.data[self.position - n : self.position]

    def number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return value

    def counted(self, code: str, least: int) -> int:
        """Reads a number of items that take at least so many bytes each."""
        n = self.number(code)
        if n * least > self.size:
            raise self.damaged(f"it has {self.size} bytes and claims {n} items")
        return n

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """Reads a text or a number; an array is passed over, and is None."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise self.damaged(f"its metadata have a value of type {kind}")
        kind, n = self.number("I"), self.counted("Q", 1)
        if kind == STRING:
            for _ in range(n):
                self.take(self.number("Q"))
        elif kind in SCALARS:
            self.take(n * struct.calcsize(f"<{SCALARS[kind]}"))
        else:
            raise self.damaged(f"its metadata have an array of type {kind}")
        return None


def _listed(layers: list[int]) -> str:
    """The layers as "3", "1 to 31", or a list."""
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers[:40])) + (" ..." if len(layers) > 40 else "")
