"""What does EasySteer take?  The JSON of a `SteeringSpec`, and beside it the GGUF file of vectors that it names."""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from melbo_lens import files
from melbo_lens.arguments import finite
from melbo_lens.exports import exporter, gguf_files
from melbo_lens.exports.gguf_vectors import control_vector
from melbo_lens.exports.layer_outputs import compare, single_vectors
from melbo_lens.imports.gguf import read_header
from melbo_lens.models.access import Model
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Prompts


@exporter("easysteer")
def to_easysteer(
    vectors: Perturbation | Sequence[Perturbation],
    path: str | os.PathLike[str],
    model: Model | None = None,
    hf_model: nn.Module | None = None,
    prompts: Prompts | None = None,
    scale: float = 1.0,
    source: str | None = None,
) -> Path:
    """Writes one JSON file and one GGUF file, after a comparison with the Hugging Face model.

    ``h <- h + scale * v`` at the output of decoder layer L, counted from 0, at every position of the prompt and of what
    is generated. The GGUF file has `direction.L`; unlike for llama.cpp, L may be 0. In Python it is used as
    ``llm.generate(..., steering=SteeringSpec.model_validate_json(text))``, over HTTP as the field "steering".

    Args:
        vectors: one vector, such as `vectors[3]`, or a sequence of single vectors of different layers.
        path: the JSON file to write; the GGUF file lies beside it and has the ending .gguf instead. Both are written
            or none, and a GGUF file is replaced only if an earlier export to the same path wrote it.
        model, hf_model, prompts: what to compare on; see `melbo_lens.exports.layer_outputs.compare`.
        scale: the number that EasySteer multiplies the vectors by.
        source: the path of the GGUF file where EasySteer runs; by default the one that it is written to.

    Returns:
        The path of the JSON file.

    Raises:
        ModuleNotFoundError: the `gguf` package is not installed.
        ValueError: the format can't hold the vectors, the path ends in .gguf, a GGUF file that no export wrote lies
            beside it, the scale is no finite number, or the comparison failed; nothing is written.

    Warns:
        UserWarning: there was no model, or no Hugging Face model, to compare with.
    """
    gguf_files.library()  # before anything is computed
    path = Path(path)
    beside = path.with_suffix(".gguf")
    if beside == path:
        raise ValueError(
            f"path={str(path)!r} is that of the JSON file, beside which {beside.name} lies: let it end in .json."
        )
    if beside.exists() and not _is_export(path, beside):
        raise ValueError(
            f"{beside} is there, and no earlier export to {path.name}: the vectors would replace it. Choose another "
            "path, or move that file."
        )
    scale = finite("scale", scale)
    several = single_vectors(vectors, "easysteer")
    host = compare(several, model, hf_model, prompts)
    spec = {
        "vectors": [
            {
                "source": source or str(beside),
                "algorithm": "direct",
                "scale": scale,
                "layers": [one.source_layer for one in several],
                "normalize": False,
                "apply": {"prompt": "all", "generation": "all"},
            }
        ],
        "conflict": "priority",
    }
    hint = "unknown" if host is None else gguf_files.ARCHITECTURES.get(host.architecture, host.architecture)
    directions = {one.source_layer: one.values[0] for one in several}
    vectors_file = control_vector(directions, str(several[0].provenance.get("method", "unknown")), hint)
    files.write_together({beside: vectors_file, path: files.json_bytes(spec)})
    return path


def _is_export(path: Path, beside: Path) -> bool:
    """Says whether the two files are what an earlier export wrote."""
    try:
        said = files.read_json(path)
        read_header(beside)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(said, dict) and {"vectors", "conflict"} <= set(said)
