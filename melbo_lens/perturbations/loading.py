"""How is a file read again?  Any kind of perturbation by its name, checked."""

import os

from melbo_lens import files
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.perturbation import KINDS, Perturbation
from melbo_lens.perturbations.vectors import SteeringVectors

OWN = (SteeringVectors, SteeringAdapters)  # imported here, a kind has entered itself before a file names it


def load(path: str | os.PathLike[str]) -> Perturbation:
    """Reads what `save` wrote, after checking that it is whole, of a known kind and no newer than this version of melbo_lens.

    Kinds of other packages are known once their module is imported.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, of another program, of a newer schema, or its parts don't fit each other.
    """
    kind, tensors, header = files.read_any(path, KINDS)
    try:
        return KINDS[kind].of_parts(tensors, header, header.get("provenance", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it holds {sorted(tensors)} and {sorted(header)} ({error}).") from error
