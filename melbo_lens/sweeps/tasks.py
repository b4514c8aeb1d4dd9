"""What is one piece of work on a model?  A task, which is done at a bench, and whose result is kept under its name."""

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from melbo_lens import files
from melbo_lens.ascent.objectives import positions_of
from melbo_lens.methods.provenance import fingerprint
from melbo_lens.models.access import host_of
from melbo_lens.models.slices import SlicedModel
from melbo_lens.models.slicing import slice_model
from melbo_lens.prompts import Positions, Prompts, outside_the_template, tokenize
from melbo_lens.sweeps.jobs import Loadable, ModelKey, as_prompts

R = TypeVar("R")
KEPT_BYTES = 2**30  # of the streams of slices that stay at a bench beside the one in use


class Bench:
    """An open model with the last slices of it, at which tasks are done.

    Attributes:
        organism: the whole organism, if the model was loaded as one.
        host: the model.
    """

    def __init__(self, model: Loadable) -> None:
        key = ModelKey(model) if isinstance(model, str) else model
        self.organism = key.organism() if isinstance(key, ModelKey) else None
        if self.organism is not None:
            self.host = host_of(self.organism.model)
        else:
            self.host = host_of(key.load() if isinstance(key, ModelKey) else key)
        self._slices: dict[str, SlicedModel] = {}

    @cached_property
    def fingerprint(self) -> str:
        """The digest of the model's weights."""
        return fingerprint(self.host)

    def tokens(
        self, prompts: Prompts, target_positions: Positions = slice(None), n_new_tokens: int = 0
    ) -> tuple[dict[str, Any], ...]:
        """Tokenizes prompts, after which so many tokens are to be written, and returns the "ids" and "text" of each.

        Raises:
            TypeError, ValueError: the prompts, the positions or the new tokens don't fit the model.
        """
        batch = tokenize(self.host, prompts, target_positions, n_new_tokens=n_new_tokens)
        return tuple({"ids": ids, "text": text} for ids, text in zip(batch.rows(), batch.texts, strict=True))

    def outside_the_template(self, prompts: Prompts) -> list[int]:
        """Returns the numbers of the texts that a chat model gets without the template of its chats."""
        return outside_the_template(self.host, prompts)

    def slice(
        self, prompts: Sequence[Any], source_layer: int, target_layer: int, target_positions: str | None
    ) -> SlicedModel:
        """Returns the slice between two layers; the last ones that were asked for are kept.

        Args:
            prompts: prompts as a `Job` has them.
            source_layer, target_layer: the layers.
            target_positions: where a change counts, as `positions_text` writes it; None as in `slice_model`.
        """
        key = repr((prompts, source_layer, target_layer, target_positions))
        sliced = self._slices.pop(key, None)
        if sliced is None:
            where = None if target_positions is None else positions_of(target_positions)
            sliced = slice_model(self.host, as_prompts(prompts), source_layer, target_layer, where)
        while self._slices and _n_bytes(sliced, *self._slices.values()) > KEPT_BYTES:
            del self._slices[next(iter(self._slices))]  # the one that was not asked for longest
        self._slices[key] = sliced
        return sliced


def _n_bytes(*slices: SlicedModel) -> int:
    return sum(stream.nbytes for sliced in slices for stream in (*sliced.streams, sliced.target))


class Task(ABC, Generic[R]):
    """A piece of work, whose result depends on its fields and on the model's weights alone."""

    @abstractmethod
    def name(self, fingerprint: str) -> str:
        """Returns the name of the result for a model of these weights; other tasks have other names."""

    @abstractmethod
    def run(self, bench: Bench) -> R:
        """Does the work."""

    @abstractmethod
    def keep(self, result: R, folder: Path, name: str) -> None:
        """Writes the result into a folder, whole or not at all."""

    @abstractmethod
    def kept(self, folder: Path, name: str) -> R | None:
        """Reads the result; None if there is none.

        Warns:
            UserWarning: its file is damaged, so that there is none.
        """

    def is_done(self, folder: Path, name: str) -> bool:
        """Says whether there is a result with which one need not begin again."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # whoever reads it is told
            return self.kept(folder, name) is not None

    def failed(self, error: Exception, name: str) -> R | None:
        """Returns what is kept of an attempt that failed; None keeps nothing, and the error is the caller's."""
        return None


class Measurement(Task[R]):
    """A task whose result is kept as JSON."""

    @abstractmethod
    def of_json(self, said: Any) -> R:
        """Makes the result from its JSON.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is something else.
        """

    def as_json(self, result: R) -> Any:
        """Describes the result in JSON's types, in which NaN becomes null."""
        return result

    def keep(self, result: R, folder: Path, name: str) -> None:
        files.write_json(folder / f"{name}.json", self.as_json(result))

    def kept(self, folder: Path, name: str) -> R | None:
        path = folder / f"{name}.json"
        if not path.is_file():
            return None
        try:
            return self.of_json(files.read_json(path))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            warnings.warn(f"{path} is damaged ({error}): what it held is measured again.", stacklevel=3)
            return None


def digest(said: Any) -> str:
    """Returns a name for what this value of JSON's types says."""
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=8).hexdigest()
