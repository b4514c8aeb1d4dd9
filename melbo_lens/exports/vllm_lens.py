"""What does vllm-lens (UK AISI) take?  The JSON of its `SteeringVector`, which a request to vLLM carries."""

import base64
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from melbo_lens import files
from melbo_lens.arguments import finite
from melbo_lens.exports import exporter
from melbo_lens.exports.layer_outputs import compare, single_vectors
from melbo_lens.models.access import Model
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Prompts


@exporter("vllm-lens")
def to_vllm_lens(
    vectors: Perturbation | Sequence[Perturbation],
    path: str | os.PathLike[str],
    model: Model | None = None,
    hf_model: nn.Module | None = None,
    prompts: Prompts | None = None,
    scale: float = 1.0,
) -> Path:
    """Writes one JSON file, after a comparison with the Hugging Face model.

    ``h <- h + scale * v`` at the output of decoder layer L, counted from 0, at every position. The tensor is float32 in
    base64 without compression, which every version of vllm-lens decodes. In Python it is used as
    ``SamplingParams(extra_args={"apply_steering_vectors": [SteeringVector.model_validate(json.load(file))]})``.

    Args:
        vectors: one vector, such as `vectors[3]`, or a sequence of single vectors of different layers.
        path: the file to write.
        model, hf_model, prompts: what to compare on; see `melbo_lens.exports.layer_outputs.compare`.
        scale: the number that vllm-lens multiplies the vectors by.

    Returns:
        The path.

    Raises:
        ValueError: the format can't hold the vectors, the scale is no finite number, or the comparison failed; nothing
            is written.

    Warns:
        UserWarning: there was no model, or no Hugging Face model, to compare with.
    """
    scale = finite("scale", scale)
    several = single_vectors(vectors, "vllm-lens")
    compare(several, model, hf_model, prompts)
    array = torch.cat([one.values.cpu() for one in several]).numpy().astype("<f4")  # [layer hidden]
    said = {
        "activations": {
            "data": base64.b64encode(array.tobytes()).decode("ascii"),
            "dtype": "float32",
            "shape": list(array.shape),
        },
        "layer_indices": [one.source_layer for one in several],
        "scale": scale,
        "norm_match": False,
        "position_indices": None,
    }
    files.write_json(path, said)
    return Path(path)
