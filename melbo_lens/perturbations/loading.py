"""How is a file read again?  The file names its kind of perturbation, and is checked."""

import os

from melbo_lens.arguments import public
from melbo_lens.perturbations import hub
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.perturbation import KINDS, Perturbation, read
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
    return read(path, KINDS)


@public
def from_pretrained(
    repo_id: str,
    *,
    filename: str = hub.FILE,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Perturbation:
    """Loads vectors or adapters that `push_to_hub` put on the Hugging Face hub. Nothing of the file is run.

    Args:
        repo_id: "user/name".
        filename: the name of the file in the repository, without any folder.
        revision: a branch, a tag or a commit; None is the main branch. A commit pins what is loaded.
        token: of the account; None takes the one with which this machine is logged in.
        cache_dir: the folder that keeps what was downloaded; None is the hub's usual one.

    Returns:
        The value, of the kind that the file names.

    Raises:
        ModuleNotFoundError: the client of the hub, huggingface_hub, is not installed.
        ValueError: a name could leave the cache's folder, or the file is too large, damaged, or none of melbo_lens.
        OSError: the repository or file is not there, or can't be reached.
    """
    return load(hub.fetch(repo_id, filename, revision=revision, token=token, cache_dir=cache_dir))
