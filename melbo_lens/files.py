"""How do tensors get to the disk and back?  As safetensors files, written atomically.

Reading such a file never runs anything in it.
"""

import errno
import json
import math
import os
import shutil
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
MOST_HEADER = 100_000_000  # bytes, as safetensors itself allows


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
    write_together({path: data})


def write_together(contents: Mapping[str | os.PathLike[str], bytes]) -> None:
    """Writes several files that belong together: all of them, or none.

    All are written to temporary siblings and flushed to the disk before the first is renamed; where a rename fails,
    those before it are undone. Only a process that is killed between two renames leaves new files beside old ones.

    Raises:
        OSError: a path is a folder, or can't be written.
    """
    # through a link, the file that it names is replaced, and not the link
    parts = {Path(os.path.realpath(path) if os.path.islink(path) else path): data for path, data in contents.items()}
    for path in parts:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, f"path={str(path)!r} is a folder: choose the path of a file")
    temporaries: dict[Path, str] = {}
    old: dict[Path, str] = {}
    try:
        for path, data in parts.items():
            temporaries[path] = _temporary(path, data)
        for path in list(parts)[:-1]:  # once the last is in place, nothing is undone
            if path.exists():
                old[path] = _second_name(path, f"{temporaries[path]}.old")
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except BaseException:
        renamed = [path for path, temporary in temporaries.items() if not os.path.exists(temporary)]
        for path in renamed if len(renamed) < len(parts) else []:
            with suppress(OSError):  # an old file that can't go back stays under its second name
                if path in old:
                    os.replace(old.pop(path), path)
                else:
                    path.unlink()
        raise
    finally:
        for leftover in (*temporaries.values(), *old.values()):
            with suppress(FileNotFoundError):
                os.unlink(leftover)


def make_folder(folder: Path) -> None:
    """Makes a folder, with those in which it lies, if it is missing.

    Raises:
        NotADirectoryError: there is a file of that name.
        OSError: it can't be made.
    """
    file = next((one for one in (folder, *folder.parents) if one.exists() and not one.is_dir()), None)
    if file is not None:
        raise NotADirectoryError(
            f"{str(folder)!r} can't be a folder, since {str(file)!r} is a file: choose another name."
        )
    folder.mkdir(parents=True, exist_ok=True)


def write_folder(folder: str | os.PathLike[str], contents: Mapping[str, bytes]) -> None:
    """Writes the files of a folder together; folders that had to be made for them are removed where that fails.

    Args:
        folder: the folder, which is made if it is missing; other files in it stay.
        contents: name of a file -> its bytes.

    Raises:
        OSError: the folder is a file, or can't be written.
    """
    folder = Path(folder)
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        make_folder(folder)
        write_together({folder / name: data for name, data in contents.items()})
    except BaseException:
        for one in made:
            with suppress(OSError):
                one.rmdir()
        raise


def _temporary(path: Path, data: bytes) -> str:
    """Writes a temporary sibling, flushes it to the disk, and returns its name."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.", suffix=".tmp")
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
    except BaseException:
        os.unlink(temporary)
        raise
    return temporary


def _second_name(path: Path, name: str) -> str:
    """Keeps a file under a second name, as a copy where the file system knows no links."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copy2(path, name)
    return name


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes text as UTF-8, atomically; a lone surrogate, which UTF-8 can't encode, is written as an escape."""
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON in plain ASCII, atomically; NaN and infinity, which JSON lacks, become null."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Returns what `write_json` writes."""
    return (json.dumps(_without_nan(value), indent=1, allow_nan=False) + "\n").encode()


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

    What the file says of itself is checked first, so nothing of another program's tensors is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, written by another program, of another kind, of a newer schema, or larger
            than this machine's memory.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}: check the path.")
    kind, header = _said(path, _metadata(Path(path)), kinds)
    size, most = Path(path).stat().st_size, _memory()
    if size > most:  # its tensors fill it, which safetensors checks
        raise ValueError(f"{path} has {size} bytes, more than the memory of this machine ({most}).")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): it can't be read.") from error
    return kind, tensors, header


def _metadata(path: Path) -> dict[str, str]:
    """Reads what a safetensors file says of itself: its length and a JSON object come first."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > min(MOST_HEADER, path.stat().st_size - 8):
                raise ValueError(f"its header would have {length} bytes")
            found = json.loads(file.read(length)).get("__metadata__", {})
            if not all(isinstance(text, str) for text in found.values()):
                raise ValueError("its metadata are no texts")
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is truncated or no safetensors file ({error}): it can't be read.") from error
    return found


def _said(
    path: str | os.PathLike[str], metadata: Mapping[str, str], kinds: Collection[str]
) -> tuple[str, dict[str, Any]]:
    """Returns the kind and the header that a file names, and refuses a file of anything else."""
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
    except (KeyError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is no JSON ({error}).") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged: its header is no JSON object.")
    return kind, header


def _memory() -> float:
    """The bytes of memory that this machine has, or infinity where the system doesn't say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def _umask() -> int:
    # mkstemp makes private files, and the result should have the permissions of any other new file
    mask = os.umask(0)
    os.umask(mask)
    return mask
