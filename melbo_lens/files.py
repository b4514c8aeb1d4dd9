"""How do tensors get to the disk and back?  As safetensors files, written atomically.

Reading such a file never runs anything in it.
"""

import json
import math
import os
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

SCHEMA = 1
LOCKS = ".locks"  # the lock of a process that dies is free again at once


def write(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes tensors and a JSON header as one safetensors file, atomically."""
    metadata = {"format": "melbo_lens", "schema": str(SCHEMA), "kind": kind, "header": json.dumps(header)}
    write_atomically(
        path, to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    )


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes to a temporary sibling, flushes it to the disk and renames it.

    At any instant, the path holds either the whole old file or the whole new one.
    """
    path = Path(path)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise type(error)(
            error.errno, f"path={str(path)!r} can't be written: {error.strerror}. Choose an existing, writable folder"
        ) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes text as UTF-8, atomically; a lone surrogate, which UTF-8 can't encode, is written as an escape."""
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON in plain ASCII, atomically; NaN and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(_without_nan(value), indent=1, allow_nan=False) + "\n")


def locked(path: str | os.PathLike[str]) -> FileLock:
    """Returns a lock for `with`, under which one process at a time reads and writes a file again."""
    path = Path(path).resolve()
    (path.parent / LOCKS).mkdir(exist_ok=True)
    return FileLock(path.parent / LOCKS / path.name)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a file that `write_json` wrote.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({error}).") from error


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and the header of a file of this kind; see `read_any`."""
    _, tensors, header = read_any(path, [kind])
    return tensors, header


def read_any(path: str | os.PathLike[str], kinds: Collection[str]) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Reads the kind, the tensors and the header of a file of one of these kinds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, written by another program, of another kind, or of a newer schema.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}: check the path.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): it can't be read.") from error
    if metadata.get("format") != "melbo_lens":
        raise ValueError(f"{path} was not written by melbo_lens: it is a safetensors file of something else.")
    schema = metadata.get("schema", "")
    if not schema.isdigit() or int(schema) > SCHEMA:
        raise ValueError(
            f"{path} has schema {schema!r}, this melbo_lens reads up to {SCHEMA}: install a newer melbo_lens."
        )
    kind = metadata.get("kind")
    if kind is None or kind not in kinds:
        raise ValueError(f"{path} holds {kind!r}, not {' or '.join(map(repr, kinds))}.")
    try:
        header = json.loads(metadata["header"])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: its header is no JSON ({error}).") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged: its header is no JSON object.")
    return kind, tensors, header


def _umask() -> int:
    # mkstemp makes private files, and the result should have the permissions of any other new file
    mask = os.umask(0)
    os.umask(mask)
    return mask
