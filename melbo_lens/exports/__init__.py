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
# formats of this package and their files, which are imported on demand
OURS = {"gguf": "gguf_vectors", "gguf-lora": "gguf_lora", "peft": "peft"}


def exporter(format: str) -> Callable[[Exporter], Exporter]:
    """Makes a function known to `export` under the name of its format; other packages may use it too."""

    def known(function: Exporter) -> Exporter:
        EXPORTERS[format] = function
        return function

    return known


@public
def export(
    perturbation: Perturbation | Sequence[Perturbation], format: str, path: str | os.PathLike[str], **settings: Any
) -> Path:
    """Writes a perturbation in another tool's format.

    Args:
        perturbation: a perturbation that the format can hold: one adapter, such as `adapters[3]`, for "peft" and
            "gguf-lora"; one vector, or a sequence of vectors of different layers, for "gguf".
        format: "peft" (a folder that the `peft` library loads), "gguf" (control vectors of llama.cpp), "gguf-lora" (a
            LoRA of llama.cpp), or a format that a package has added with `exporter`.
        path: the file or folder to write; the format says which.
        settings: settings of the format, such as `model=`; see the format's exporter.

    Returns:
        The path of what was written.

    Raises:
        ValueError: the format is unknown, or can't hold this perturbation.
    """
    if format in OURS:
        import_module(f"melbo_lens.exports.{OURS[format]}")
    if format not in EXPORTERS:
        raise ValueError(
            f"format={format!r} must be one of {sorted({*OURS, *EXPORTERS})}: one of ours, or one added with "
            "melbo_lens.exports.exporter."
        )
    return EXPORTERS[format](perturbation, path, **settings)
