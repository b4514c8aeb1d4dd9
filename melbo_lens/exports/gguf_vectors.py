"""What does llama.cpp add to its stream?  A GGUF file of control vectors, at most one for each layer."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from melbo_lens import files
from melbo_lens.exports import exporter, gguf_files
from melbo_lens.exports.layer_outputs import compare, single_vectors
from melbo_lens.models.access import Model
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Prompts


@exporter("gguf")
def to_gguf(
    vectors: Perturbation | Sequence[Perturbation],
    path: str | os.PathLike[str],
    model: Model | None = None,
    hf_model: nn.Module | None = None,
    prompts: Prompts | None = None,
) -> Path:
    """Writes control vectors of llama.cpp, after checking them on the Hugging Face model.

    The tensor `direction.N` is added to the stream that leaves block N, counted from 0, at every position. llama.cpp
    has no place for block 0. The file is used as `llama-cli -m model.gguf --control-vector FILE`, or with
    `--control-vector-scaled FILE:S` to scale all vectors by S. By default all layers of the file act.

    Args:
        vectors: one vector, such as `vectors[3]`, or a sequence of single vectors of different layers.
        path: the file to write.
        model: the model that the vectors were learned on. Without it nothing is checked on a model.
        hf_model: the Hugging Face model to check against; see `layer_outputs.compare` for the default.
        prompts: the prompts to check on. By default those of the fit, or some tokens if none are known.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: the `gguf` package is not installed.
        ValueError: a vector is of layer 0, two are of one layer, there are several for one layer, a site is not the
            stream, or the check failed. The message names which.

    Warns:
        UserWarning: there was no model, or no Hugging Face model, to check against.

    Source: llama.cpp, `common/common.cpp` and `src/llama-adapter.cpp`.
    """
    gguf_files.library()  # before anything is computed
    several = single_vectors(vectors, "gguf")
    if several[0].source_layer == 0:
        raise ValueError(
            "gguf can't hold a vector of layer 0: llama.cpp adds control vectors to the streams that leave blocks 1 "
            "and later. Learn it at source_layer=1, or export an adapter (gguf-lora), which can be of layer 0."
        )
    host = compare(several, model, hf_model, prompts)
    hint = "unknown" if host is None else gguf_files.ARCHITECTURES.get(host.architecture, host.architecture)
    directions = {one.source_layer: one.values[0] for one in several}
    return write_control_vector(path, directions, str(several[0].provenance.get("method", "unknown")), hint)


def write_control_vector(
    path: str | os.PathLike[str], directions: Mapping[int, Tensor], method: str, model_hint: str
) -> Path:
    """Writes a control-vector file atomically, without any check; see `control_vector` for what is in it.

    Returns:
        The path.
    """
    files.write_atomically(path, control_vector(directions, method, model_hint))
    return Path(path)


def control_vector(directions: Mapping[int, Tensor], method: str, model_hint: str) -> bytes:
    """Returns a control-vector file.

    Args:
        directions: layer, counted from 0 -> vector [d_model], which is added to the stream that leaves this layer.
            llama.cpp refuses a file with layer 0; other readers of the format take it.
        method: how the vectors were made, for people.
        model_hint: the architecture of their model, for people.
    """
    metadata = {
        "controlvector.model_hint": model_hint,
        "controlvector.method": method,
        "controlvector.layer_count": len(directions),
    }
    tensors = {f"direction.{layer}": directions[layer] for layer in sorted(directions)}
    return gguf_files.to_bytes("controlvector", metadata, tensors)
