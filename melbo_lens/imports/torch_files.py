"""What does a `.pt` file of another tool hold?  Tensors, read without running anything that the file says.

A `.pt` file is a zip archive: a pickle that names its tensors, and their bytes. Here the archive and the names in the
pickle are checked first. Then `torch.load` reads it with `weights_only=True`, and maps the file instead of copying it,
so that a tensor can't be larger than the file.
"""

import os
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from melbo_lens.arguments import count
from melbo_lens.perturbations.sites import site_of
from melbo_lens.perturbations.vectors import SteeringVectors

MAX_BYTES = 1 << 30
MAX_PICKLE = 16 << 20
# All that a pickle of tensors needs. torch's own list is longer, and has functions that take memory.
NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.nn.parameter Parameter",
}
STORAGE = re.compile(r"torch \w+Storage|torch\.storage \w+Storage")
FOREIGN = "steering_vectors.steering_vector SteeringVector"
# The sites of other tools, by the names that they give them.
SITES = {
    "decoder_block": "resid_post",  # steering-vectors
    "self_attn": "attn_out",
    "mlp": "mlp_out",
    "down_proj": "mlp_out",  # power_steering
    "layer_output": "resid_post",
}


class SteeringVector:
    """Stands for the class of that name in steering-vectors: it has the attributes in a file, and no code."""

    layer_activations: dict[int, Tensor]
    layer_type: str


def read(path: str | os.PathLike[str], layer: int | None = None, site: str | None = None) -> SteeringVectors:
    """Reads vectors from a `.pt` file; see `melbo_lens.load`.

    Raises:
        ValueError: the file is damaged or too large, names anything but tensors, holds no vectors, or doesn't say the
            layer.
    """
    held = _contents(Path(path))
    if isinstance(held, SteeringVector):
        values, said = _of_steering_vectors(path, held, layer)
    elif isinstance(held, Mapping):
        values, said = _of_mapping(path, dict(held))
    elif _is_of_layers(path, held):
        values, said = _of_hotwire(path, held, layer)
    else:
        values, said = held, {}
    return _vectors(path, values, said, layer, site)


def _vectors(path: Any, values: Any, said: Mapping[str, Any], layer: int | None, site: str | None) -> SteeringVectors:
    stack = _stacked(path, values)
    known = said.get("layer")
    if isinstance(known, bool) or not isinstance(known, int) or known < 0:  # that is no number of a block
        if layer is None:
            why = "doesn't say at which layer its vectors act"
            if known is not None:
                why = f"says layer {str(known)[:60]!r}, which is no number of a block"
            raise ValueError(f"{path} {why}: pass layer=, the number of the block, counted from 0.")
        known = layer
    if layer is not None and known != layer:
        raise ValueError(f"layer={layer} was given, but {path} says layer {known!r}: leave it out.")
    count("layer", known, least=0)
    where = site or said.get("site") or "mlp_out"
    site_of(where)
    provenance = {"method": "load", "file": Path(path).name, **said, "layer": known}
    try:
        return SteeringVectors(stack, known, provenance=provenance, site=where)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _stacked(path: Any, values: Any) -> Tensor:
    """Returns the vectors as the rows of one tensor; they may also be one vector, or a list of them."""
    rows: list[Any] = [*values] if isinstance(values, list | tuple) and values else [values]
    for row in rows:
        _check(path, row)
    if sum(row.numel() * row.element_size() for row in rows) > Path(path).stat().st_size:
        raise ValueError(f"{path} holds the same vectors many times: each must have its own bytes in the file.")
    if len({row.shape[-1] for row in rows}) > 1:
        raise ValueError(f"{path} holds vectors of different lengths: they belong to different models.")
    return torch.cat([row[None] if row.ndim == 1 else row for row in rows]).float()


def _is_of_layers(path: Any, held: Any) -> bool:
    """Says whether the rows are those of all layers of a model: some are zero, as no vector that steers is."""
    if not isinstance(held, Tensor) or held.ndim != 2:
        return False
    _check(path, held)
    acts = held.float().any(1)
    return bool(acts.any()) and not bool(acts.all())


def _of_hotwire(path: Any, held: Tensor, layer: int | None) -> tuple[Any, dict[str, Any]]:
    layers = held.float().any(1).nonzero()[:, 0].tolist()
    if layer is None and len(layers) > 1:
        raise ValueError(f"{path} has vectors of the layers {layers}: pass layer=, one of them.")
    chosen = layers[0] if layer is None else layer
    if chosen not in layers:
        raise ValueError(
            f"layer={layer} must be one of {layers}, for which {path} has vectors: rows of zeros are layers without "
            "one, as hotwire-vllm keeps them. If all rows are vectors of one layer, save them without the zeros."
        )
    return held[chosen], {"layer": chosen, "site": "resid_post", "source": "hotwire-vllm"}


def _of_steering_vectors(path: Any, held: SteeringVector, layer: int | None) -> tuple[Any, dict[str, Any]]:
    activations, place = getattr(held, "layer_activations", None), getattr(held, "layer_type", "decoder_block")
    if not isinstance(activations, Mapping) or not activations or not isinstance(place, str):
        raise ValueError(f"{path} holds a SteeringVector without layer_activations: it is damaged.")
    layers = sorted(key for key in activations if isinstance(key, int))
    if layer is None and len(layers) != 1:
        raise ValueError(f"{path} has vectors of the layers {layers}: pass layer=, one of them.")
    chosen = layers[0] if layer is None else layer
    if chosen not in activations:
        raise ValueError(f"layer={layer} must be one of {layers}, for which {path} has vectors.")
    return activations[chosen], {"layer": chosen, "site": _site(path, place), "source": "steering-vectors"}


def _of_mapping(path: Any, held: dict[Any, Any]) -> tuple[Any, dict[str, Any]]:
    if "vectors" in held or "steering" in held:
        said: dict[str, Any] = {"source": "power_steering"}
        if isinstance(held.get("model"), str):
            said["model"] = held["model"]
        if isinstance(held.get("method"), str):
            said["found_by"] = held["method"]
        if held.get("source_layer") is not None:
            said["layer"] = held["source_layer"]
        if isinstance(held.get("capture_site"), str):
            said["site"] = _site(path, held["capture_site"])
        return held["vectors"] if "vectors" in held else held["steering"], said
    entries = [entry for entry in held.values() if isinstance(entry, Mapping) and "steering_vector" in entry]
    if len(entries) == len(held) == 1:
        return _of_lm_eval(path, str(next(iter(held))), entries[0])
    names = ", ".join(sorted(map(str, held))[:8])[:200]
    raise ValueError(
        f'{path} holds a dict with {names}: known are one with "vectors" (power_steering), and one hookpoint of '
        "lm-evaluation-harness. Save the tensor [vector d_model] itself, and load that with layer=."
    )


def _of_lm_eval(path: Any, hookpoint: str, entry: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    layer, vector = re.fullmatch(r"(?:\w+\.)*(\d+)", hookpoint), entry["steering_vector"]
    coefficient = entry.get("steering_coefficient", 1.0)
    if layer is None or entry.get("action") != "add" or not isinstance(coefficient, int | float):
        raise ValueError(
            f'{path} does {str(entry.get("action"))[:20]!r} at {hookpoint[:60]!r}: only "add" at a decoder layer, '
            'such as "layers.7", can be expressed here.'
        )
    _check(path, vector)
    said = {"layer": int(layer[1]), "site": "resid_post", "source": "lm-evaluation-harness"}
    return vector.float() * coefficient, said


def _site(path: Any, name: str) -> str:
    if name not in SITES:
        raise ValueError(f"{path} acts at {name[:60]!r}, which can't be expressed here: known are {sorted(SITES)}.")
    return SITES[name]


def _check(path: Any, values: Any) -> None:
    """Refuses what is no plain tensor of vectors, before any memory is taken for it."""
    if type(values) not in (Tensor, torch.nn.Parameter):
        raise ValueError(f"{path} holds {type(values).__name__} where a tensor [vector d_model] is expected.")
    size = values.numel() * values.element_size()
    if (
        values.layout != torch.strided
        or values.device.type != "cpu"
        or not values.is_floating_point()
        or values.ndim not in (1, 2)
        or not 0 < size <= values.untyped_storage().nbytes()
    ):
        raise ValueError(
            f"{path} holds a tensor {tuple(values.shape)} of {values.dtype}: vectors must be floating-point numbers "
            "[vector d_model] or [d_model], each with its own bytes in the file."
        )


def _contents(path: Path) -> Any:
    """Reads the objects of a `.pt` file, whose tensors are views of the file.

    Raises:
        ValueError: the file is damaged, too large, of torch's old format, or names anything but tensors.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes; a file of vectors may have at most {MAX_BYTES}.")
    if not _is_archive(path):
        raise ValueError(
            f"{path} is a pickle, as versions of torch before 1.6 wrote, or damaged. Reading one would run what it "
            "says: load it where you trust it, and save the tensor again with torch.save."
        )
    try:
        foreign = sorted(set(_names(path, size)) - NAMES)
    except Exception as error:  # zipfile and pickletools raise many kinds for damaged files
        raise ValueError(f"{path} is damaged, or no file of torch.save ({str(error)[:200]}).") from error
    refused = [name for name in foreign if name != FOREIGN and not STORAGE.fullmatch(name)]
    if refused:
        raise ValueError(
            f"{path} names {', '.join(refused)[:200]}, which is no tensor, and reading it could run code. Nothing was "
            "run. Save the tensor [vector d_model] itself with torch.save, and load that with layer=."
        )
    try:
        with torch.serialization.safe_globals([(SteeringVector, FOREIGN.replace(" ", "."))]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise ValueError(f"{path} is damaged, or no file of torch.save ({str(error)[:200]}).") from error


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of several volumes, it says
        return False


def _names(path: Path, size: int) -> Iterator[str]:
    """Yields the names of all that the pickle in the archive would call or make, without doing so."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its parts claim more bytes than it has")
        pickles = [entry for entry in entries if entry.filename.rsplit("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
            raise ValueError("it has no data.pkl, or too large a one")
        data = archive.read(pickles[0])
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            yield str(argument)
        elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            yield f"something through {opcode.name}"
