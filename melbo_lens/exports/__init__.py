"""How do perturbations get into other tools?  `export` writes one in another tool's format; each format is a file here, and others can be added."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from melbo_lens.arguments import public
from melbo_lens.perturbations.perturbation import Perturbation

Exporter: TypeAlias = Callable[..., Path]  # of the perturbation, the path, and settings of its own

EXPORTERS: dict[str, Exporter] = {}
OURS = ("peft",)  # formats whose files are imported when they are asked for


def exporter(format: str) -> Callable[[Exporter], Exporter]:
    """Makes a function known to `export` under the name of its format; a package of one's own may do so too."""

    def known(function: Exporter) -> Exporter:
        EXPORTERS[format] = function
        return function

    return known


@public
def export(perturbation: Perturbation, format: str, path: str | os.PathLike[str], **settings: Any) -> Path:
    """Writes a perturbation in another tool's format.

    Args:
        perturbation: what the format can hold; for "peft" one adapter, as `adapters[3]`.
        format: "peft" (a folder that the `peft` library loads), or one that a package has added with `exporter`.
        path: a file or folder, as the format has it.
        settings: of the format, as `model=`; see the function of that name.

    Returns:
        What was written.

    Raises:
        ValueError: an unknown format, or one that can't hold this.
    """
    if format in OURS:
        import_module(f"melbo_lens.exports.{format}")
    if format not in EXPORTERS:
        raise ValueError(
            f"format={format!r} must be one of {sorted({*OURS, *EXPORTERS})}: one of ours, or one added with melbo_lens.exports.exporter."
        )
    return EXPORTERS[format](perturbation, path, **settings)
