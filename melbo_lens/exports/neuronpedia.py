"""What does Neuronpedia take?  The JSON body of a request that makes a vector there; the request itself is not sent."""

import os
from pathlib import Path
from typing import cast

from torch import nn

from melbo_lens import files
from melbo_lens.exports import exporter
from melbo_lens.exports.layer_outputs import compare, single_vectors
from melbo_lens.models.access import Model
from melbo_lens.models.host import Host
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Prompts

MAX_STRENGTH = 300.0  # larger ones are refused there, as are longer vectors
MAX_LENGTH = 24576


@exporter("neuronpedia")
def to_neuronpedia(
    vector: Perturbation,
    path: str | os.PathLike[str],
    model: Model | None = None,
    hf_model: nn.Module | None = None,
    prompts: Prompts | None = None,
    model_id: str | None = None,
    label: str | None = None,
) -> Path:
    """Writes the body of ``POST /api/vector/new``, after a comparison with the Hugging Face model. Nothing is sent.

    Neuronpedia adds ``strength * vector`` to the stream. The vector is written with norm 1 and its own norm as the
    default strength (or 300, the largest there, with what is left in the vector). The stream that leaves layer L is the
    one that enters layer L + 1, so a vector of layer L is written as "hook_resid_pre" of layer L + 1, which
    every version of the site takes; only that of the last layer is written as "hook_resid_post".

    Args:
        vector: one vector, such as `vectors[3]`.
        path: the file to write.
        model, hf_model, prompts: what to compare on; see `melbo_lens.exports.layer_outputs.compare`. Here the model is
            needed, to know which layer is the last.
        model_id: Neuronpedia's own name of the model, such as "gemma-2-2b"; by default the name that the model has
            here, without the name before a slash and in small letters.
        label: what the vector is called there.

    Returns:
        The path.

    Raises:
        ValueError: the format can't hold the vector, there is no model, or the comparison failed;
            nothing is written.

    Warns:
        UserWarning: there was no Hugging Face model, to compare with.
    """
    (only,) = single_vectors([vector], "neuronpedia")
    strength = min(float(only.radii[0]), MAX_STRENGTH)
    if only.d_model > MAX_LENGTH:
        raise ValueError(f"Neuronpedia takes vectors of at most {MAX_LENGTH} numbers; this one has {only.d_model}.")
    if strength == 0:
        raise ValueError("the vector is zero, so it has no direction to upload.")
    if model is None:
        raise ValueError("neuronpedia needs the model that the vector was learned on, to know its layers: pass model=.")
    host = cast(Host, compare([only], model, hf_model, prompts))
    name = model_id or host.name.rstrip("/").rsplit("/", 1)[-1].lower()
    last = only.source_layer == host.n_layers - 1
    said = {
        "modelId": name,
        "layerNumber": only.source_layer if last else only.source_layer + 1,
        "hookType": "hook_resid_post" if last else "hook_resid_pre",
        "vector": (only.values[0] / strength).tolist(),
        "vectorDefaultSteerStrength": strength,
        "vectorLabel": label or f"{only.provenance.get('method', 'melbo_lens')}, layer {only.source_layer}",
    }
    files.write_json(path, said)
    return Path(path)
