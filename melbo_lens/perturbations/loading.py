"""How is a file read again?  The file names its kind of perturbation, and is checked."""

import os

from melbo_lens import files
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.perturbation import KINDS, Perturbation
from melbo_lens.perturbations.vectors import SteeringVectors

OWN = (SteeringVectors, SteeringAdapters)  # a kind registers itself when it is imported, as it is here


def load(path: str | os.PathLike[str]) -> Perturbation:
    """Reads a file that `save` wrote.

    The file must be whole, of a known kind, and not newer than this version of melbo_lens. Kinds of other packages are
    known once their module is imported.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, written by another program, or of a newer schema, or its parts don't fit
            each other.
    """
    kind, tensors, header = files.read_any(path, KINDS)
    try:
        return KINDS[kind].of_parts(tensors, header, header.get("provenance", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it holds {sorted(tensors)} and {sorted(header)} ({error}).") from error
