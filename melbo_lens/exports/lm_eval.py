"""What does the `steered` model of lm-evaluation-harness load?  A `.pt` file with one hookpoint and its vector."""

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from melbo_lens import files
from melbo_lens.arguments import finite
from melbo_lens.exports import exporter
from melbo_lens.exports.layer_outputs import compare, single_vectors
from melbo_lens.models.access import Model
from melbo_lens.models.counterparts import layer_name
from melbo_lens.models.host import Host
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Prompts

ENDINGS = (".pt", ".pth")  # any other ending is refused there


@exporter("lm-eval")
def to_lm_eval(
    vector: Perturbation,
    path: str | os.PathLike[str],
    model: Model | None = None,
    hf_model: nn.Module | None = None,
    prompts: Prompts | None = None,
    coefficient: float = 1.0,
    hookpoint: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Path:
    """Writes one file for ``lm_eval --model steered --model_args pretrained=...,steer_path=FILE``.

    The file holds ``{hookpoint: {"action": "add", "steering_vector": v, ...}}``, and the harness adds
    ``coefficient * v`` to the output of that module at every position. It holds one hookpoint: of several, older
    versions of the harness add the last one's vector at all of them.

    Args:
        vector: one vector, such as `vectors[3]`.
        path: the file to write; it must end in .pt or .pth.
        model, hf_model, prompts: what to compare on; see `melbo_lens.exports.layer_outputs.compare`.
        coefficient: the number that the harness multiplies the vector by.
        hookpoint: the name of the decoder layer within the model without its head, such as "layers.7"; by default the
            one that the model has.
        dtype: the dtype in which the harness will run the model, to which older versions of it don't convert the
            vector; by default that of the model, or float32.
        device: where the vector lies when it has been loaded, from which older versions don't move it: "cuda" for their
            runs on a GPU.

    Returns:
        The path.

    Raises:
        ValueError: the format can't hold the vector, the path ends otherwise, the coefficient is no finite number, the
            hookpoint is not known, or the comparison failed; nothing is written.

    Warns:
        UserWarning: there was no model, or no Hugging Face model, to compare with.
    """
    if Path(path).suffix not in ENDINGS:
        raise ValueError(f"path={str(path)!r} must end in .pt or .pth: the harness refuses any other file.")
    coefficient = finite("coefficient", coefficient)
    (only,) = single_vectors([vector], "lm-eval")
    host = compare([only], model, hf_model, prompts)
    name = hookpoint or _hookpoint(host, only.source_layer)
    if dtype is None:
        dtype = host.dtype if host is not None else torch.float32
    kept = only.values[0].to(device=device, dtype=dtype).clone()
    if not torch.isfinite(kept).all():
        raise ValueError(f"the vector has values that {dtype} can't hold: choose another dtype, or a shorter vector.")
    entry: dict[str, Any] = {
        "action": "add",
        "steering_vector": kept,
        "steering_coefficient": coefficient,
        "bias": None,
    }
    buffer = io.BytesIO()
    torch.save({name: entry}, buffer)
    files.write_atomically(path, buffer.getvalue())
    return Path(path)


def _hookpoint(host: Host | None, layer: int) -> str:
    if host is None:
        raise ValueError(
            "the name of the decoder layer is not known without the model: pass model=, or hookpoint= as the harness "
            f'names it, such as hookpoint="layers.{layer}".'
        )
    # "model.layers.7": the harness looks for names in the model without its head, whose own name comes first
    return layer_name(host, layer).split(".", 1)[1]
