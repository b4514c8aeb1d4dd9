"""How does a value get to the Hugging Face hub and back?  One safetensors file and a card; nothing is unpickled."""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

FILE, CARD = "perturbation.safetensors", "README.md"
MAX_BYTES = 4 << 30
# What may become part of a path in the cache: a file's name, and a branch, a tag or a commit.
NAME, REVISION = re.compile(r"\w[\w.-]*"), re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*")


def _library() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the hub is reached by its own client: pip install huggingface_hub") from error
    return huggingface_hub


def push(
    repo_id: str,
    save: Callable[[Path], None],
    card: str,
    *,
    private: bool | None,
    revision: str | None,
    token: str | bool | None,
    overwrite_card: bool,
    commit_message: str,
) -> str:
    """Makes the repository if it is missing, and commits the file and its card to it at once.

    Args:
        repo_id: "user/name".
        save: writes the file to a path.
        card: the text of the card.
        private: whether a new repository is private; None takes the account's default.
        revision: the branch; None is the main one.
        token: of the account; None takes the one with which this machine is logged in.
        overwrite_card: whether a card that is there is replaced.
        commit_message: the message of the commit.

    Returns:
        The address of the commit.

    Raises:
        ModuleNotFoundError: the client of the hub is not installed.
    """
    hub = _library()
    api = hub.HfApi()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        save(path)
        api.create_repo(repo_id, private=private, token=token, exist_ok=True)
        operations = [hub.CommitOperationAdd(FILE, str(path))]
        if overwrite_card or not api.file_exists(repo_id, CARD, revision=revision, token=token):
            operations.append(hub.CommitOperationAdd(CARD, card.encode("utf-8", "backslashreplace")))
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision, token=token)
    return str(commit.commit_url)


def fetch(
    repo_id: str,
    filename: str = FILE,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Downloads a file of a repository to the hub's cache, or finds it there.

    Args:
        repo_id: "user/name".
        filename: the name of the file, without any folder.
        revision: a branch, a tag or a commit; None is the main branch.
        token: of the account; None takes the one with which this machine is logged in.
        cache_dir: the cache; None is the usual one.

    Raises:
        ModuleNotFoundError: the client of the hub is not installed.
        ValueError: a name could leave the cache's folder, or the file is too large.
        OSError: the repository or file is not there, or can't be reached.
    """
    hub = _library()
    if NAME.fullmatch(filename) is None or ".." in filename:
        raise ValueError(f"filename={filename!r} must be the plain name of a file, without a folder.")
    if revision is not None and (REVISION.fullmatch(revision) is None or ".." in revision):
        raise ValueError(f"revision={revision!r} must be a branch, a tag or a commit.")
    url = hub.hf_hub_url(repo_id, filename, revision=revision)
    try:
        said = hub.get_hf_file_metadata(url, token=token)
    except hub.errors.HfHubHTTPError:  # the server says why not
        raise
    except Exception:  # it can't be reached, or must not be: then only the cache is looked at
        said = None
    if said is not None:
        # the client makes paths of these
        for name, text in (("etag", said.etag), ("commit", said.commit_hash)):
            if text is None or NAME.fullmatch(text) is None or ".." in text:
                raise ValueError(f"{url} answers with {name} {text!r}, which is no name of a file in the cache.")
        if said.size is None or said.size > MAX_BYTES:
            raise ValueError(f"{url} has {said.size} bytes; a file of this kind may have at most {MAX_BYTES}.")
    return Path(
        hub.hf_hub_download(
            repo_id, filename, revision=revision, token=token, cache_dir=cache_dir, local_files_only=said is None
        )
    )


def without_places(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the provenance with the name of each model's folder, where it says the whole path on this machine."""

    def cleaned(key: str, entry: Any) -> Any:
        if isinstance(entry, Mapping):
            return {inner: cleaned(inner, value) for inner, value in cast(Mapping[str, Any], entry).items()}
        if isinstance(entry, list):
            return [cleaned(key, value) for value in cast(list[Any], entry)]
        return Path(entry).name if key == "model" and isinstance(entry, str) and os.path.isabs(entry) else entry

    return cleaned("", provenance)
