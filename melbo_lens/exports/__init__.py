"""How do perturbations get into other tools?  `export` writes one in another tool's format.

Each format is a file of this folder; other packages can add formats with `exporter`.
"""

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from melbo_lens.arguments import public
from melbo_lens.perturbations.perturbation import Perturbation

Exporter: TypeAlias = Callable[..., Path]  # takes the perturbation, the path and the format's settings

EXPORTERS: dict[str, Exporter] = {}
# Formats of this package, and their files, which are imported on demand.
OURS = {
    "gguf": "gguf_vectors",
    "gguf-lora": "gguf_lora",
    "peft": "peft",
    "transformers": "transformers",
    "vllm-lens": "vllm_lens",
    "easysteer": "easysteer",
    "hotwire": "hotwire",
    "lm-eval": "lm_eval",
    "neuronpedia": "neuronpedia",
}


def exporter(format: str) -> Callable[[Exporter], Exporter]:
    """Makes a function known to `export` under the name of its format; other packages may use it too.

    Args:
        format: the name of the format, as `export` takes it; a format that has the name already is replaced.

    Returns:
        A decorator for a function of the perturbation, the path and the format's settings, which returns the path.
    """

    def known(function: Exporter) -> Exporter:
        EXPORTERS[format] = function
        return function

    return known


@public
def export(
    perturbation: Perturbation | Sequence[Perturbation], format: str, path: str | os.PathLike[str], **settings: Any
) -> Path:
    """Writes a perturbation in another tool's format.

    | format       | who reads it                                          | what it holds             |
    |--------------|-------------------------------------------------------|---------------------------|
    | peft         | the `peft` library, and vLLM: a folder                | one adapter               |
    | gguf-lora    | llama.cpp                                             | one adapter               |
    | transformers | a file of torch code that comes with it: a folder     | one vector or one adapter |
    | gguf         | llama.cpp                                             | one vector for each layer |
    | vllm-lens    | vLLM with vllm-lens: JSON                             | one vector for each layer |
    | easysteer    | vLLM with EasySteer: JSON and GGUF                    | one vector for each layer |
    | hotwire      | vLLM with hotwire-vllm: `.pt`                         | one vector for each layer |
    | lm-eval      | the `steered` model of lm-evaluation-harness: `.pt`   | one vector                |
    | neuronpedia  | the site's upload: the JSON body of the request       | one vector                |

    Args:
        perturbation: what the format can hold: one vector or one adapter, such as `vectors[3]`, or a sequence of single
            vectors of different layers.
        format: one of the table, or a format that a package has added with `exporter`.
        path: the file or folder to write; the format says which.
        settings: settings of the format, such as `model=`; see the format's exporter, `melbo_lens.exports.FORMAT`.

    Returns:
        The path of what was written.

    Raises:
        ValueError: the format is unknown, or can't hold this perturbation.
    """
    if format in OURS and format not in EXPORTERS:  # another package's goes before ours
        import_module(f"melbo_lens.exports.{OURS[format]}")
    if format not in EXPORTERS:
        raise ValueError(
            f"format={format!r} must be one of {sorted({*OURS, *EXPORTERS})}: one of ours, or one added with "
            "melbo_lens.exports.exporter."
        )
    return EXPORTERS[format](perturbation, path, **settings)
