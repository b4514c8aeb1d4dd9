"""What does hotwire-vllm take?  A tensor in a `.pt` file, whose name without the ending is the vector's id."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from melbo_lens import files
from melbo_lens.exports import exporter
from melbo_lens.exports.layer_outputs import compare, single_vectors
from melbo_lens.models.access import Model
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Prompts


@exporter("hotwire")
def to_hotwire(
    vectors: Perturbation | Sequence[Perturbation],
    path: str | os.PathLike[str],
    model: Model | None = None,
    hf_model: nn.Module | None = None,
    prompts: Prompts | None = None,
) -> Path:
    """Writes one `.pt` file, after a comparison with the Hugging Face model.

    A single vector is written as a tensor [hidden]. hotwire-vllm adds it to the output of the decoder layer that a
    request names, which is the vector's `source_layer`: ``extra_args={"hotwire": '{"id": FILE, "layer": L, "scale":
    1.0}'}``, with FILE the name of the file without its ending. Vectors of several layers are the rows of a tensor
    [n_layers hidden], whose other rows are zero, and a request names each layer in a list of such entries.

    Args:
        vectors: one vector, such as `vectors[3]`, or a sequence of single vectors of different layers.
        path: the file to write; it must end in .pt.
        model, hf_model, prompts: what to compare on; see `melbo_lens.exports.layer_outputs.compare`. Vectors of
            several layers need the model, to know how many it has.

    Returns:
        The path.

    Raises:
        ValueError: the format can't hold the vectors, the path ends otherwise, or the comparison failed; nothing is
            written.

    Warns:
        UserWarning: there was no model, or no Hugging Face model, to compare with.
    """
    if Path(path).suffix != ".pt":
        raise ValueError(f"path={str(path)!r} must end in .pt: hotwire-vllm reads no other file.")
    several = single_vectors(vectors, "hotwire")
    host = compare(several, model, hf_model, prompts)
    tensor = several[0].values[0].cpu().clone()
    if len(several) > 1:
        if host is None:
            raise ValueError("vectors of several layers need their model, to know how many layers it has: pass model=.")
        tensor = tensor.new_zeros(host.n_layers, len(tensor))
        for one in several:
            tensor[one.source_layer] = one.values[0].cpu()
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    files.write_atomically(path, buffer.getvalue())
    return Path(path)
