"""What can any perturbation do?  It can be counted, indexed, scaled, joined, attached, saved and shown.

This file has what all kinds share; each kind adds what is special to it.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, SupportsIndex, TypeAlias, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_lens import files, tables
from melbo_lens.arguments import as_list, plain, public
from melbo_lens.ascent.objectives import Objective
from melbo_lens.perturbations import hub
from melbo_lens.perturbations.card import card
from melbo_lens.perturbations.sites import ModelSites

if TYPE_CHECKING:
    from typing import Self
else:  # the tests' type checker accepts Self only inside a class that it checks as a whole
    Self = Any


@runtime_checkable
class Column(Protocol):
    """A pandas Series or Index, whose library declares no types."""

    def tolist(self) -> list[Any]: ...


HookFunction: TypeAlias = Callable[..., Tensor | None]
Hook: TypeAlias = tuple[str, HookFunction]
Index: TypeAlias = SupportsIndex | slice | Sequence[int] | np.ndarray | Column | Tensor
Numbers: TypeAlias = Sequence[float] | np.ndarray | Column | Tensor  # one for each row
Parts: TypeAlias = dict[str, Tensor]
P = TypeVar("P", bound="Perturbation")

KINDS: dict[str, type["Perturbation"]] = {}  # every kind by the name that files use; a subclass registers itself


class Perturbation(ABC):
    """An immutable value of which each row perturbs a model; it holds no model.

    A kind is a frozen dataclass with the fields `history` and `provenance`, and `objective` if it has one. It says once
    of which tensors it consists (`parts`). Indexing, signs, multiples, joining, files, pickles, copies and devices all
    follow from these.

    Attributes:
        history: the objective, summed over all prompts, before each step and finally of these rows; it has no steps if
            the rows were not fitted.
        provenance: every resolved setting of the fit, in JSON's types.
        objective: what these rows were learned to maximise; for a control, what the rows that it is a control of were
            learned to maximise; None if that is not known.
    """

    word: ClassVar[str] = "perturbation"  # what one row is called
    __array_ufunc__ = None  # lets a NumPy scalar (say, from a DataFrame row) multiply perturbations

    history: Tensor
    provenance: Mapping[str, Any]
    objective: Objective | None = None

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        KINDS[cls.__name__] = cls

    # Each kind defines these.

    @abstractmethod
    def parts(self) -> tuple[Parts, dict[str, Any]]:
        """Returns all tensors, and a header in JSON's types that explains them.

        Among the tensors is "history" [step row]; the first axis of every other one is the rows.
        """

    @classmethod
    @abstractmethod
    def of_parts(cls, tensors: Parts, header: Mapping[str, Any], provenance: Mapping[str, Any]) -> Self:
        """Makes the value from what its `parts` returned."""

    @abstractmethod
    def row_hooks(self, index: Sequence[int], coefficients: Float[Tensor, " row"]) -> list[Hook]:
        """Returns hooks for a batch whose row r gets `coefficients[r]` times the row `index[r]` of this value.

        A single entry acts on every row.
        """

    @abstractmethod
    def on(self, host: ModelSites) -> Self:
        """Returns the same value with the hooks of this opened model.

        Raises:
            ValueError: the value doesn't fit the model.
        """

    @classmethod
    def check_argument(cls, name: str, value: object) -> None:
        """Refuses what a caller passes for a value of this kind and is none.

        Raises:
            TypeError: the value is of another class.
        """
        if isinstance(value, cls):
            return
        found = type(value).__name__
        if isinstance(value, Perturbation):
            remedy = f"this works on {cls.word}s alone" + (
                ", and ml.nearest_vectors makes some of adapters" if cls.word == "vector" else ""
            )
        elif isinstance(value, list | tuple):
            remedy = "ml.concatenate makes one value of several"
        else:
            remedy = "ml.SteeringVectors.from_tensor(values, source_layer) makes one of a tensor"
        wanted = "vectors or adapters" if cls is Perturbation else cls.__name__
        raise TypeError(f"{name} must be {wanted}, not {found}: {remedy}.")

    @abstractmethod
    def scaled_parts(self, tensors: Parts, coefficients: Float[Tensor, " row"]) -> Parts:
        """Returns the parts with the effect of each row multiplied by its coefficient."""

    @property
    @abstractmethod
    def source_layers(self) -> tuple[int, ...]:
        """The layers at which something is added."""

    @classmethod
    @abstractmethod
    def check_joinable(cls, several: Sequence[Any]) -> None:
        """Refuses values of this kind that can't become rows of one value.

        Raises:
            ValueError: the values don't fit together.
        """

    @abstractmethod
    def measures(self) -> dict[str, list[float]]:
        """Returns the numbers that a table shows for each row, beside the objective."""

    # These follow from the above.

    @property
    def token(self) -> str | None:
        """The mark of the fit in this process, by which its model can be found; no file, pickle or copy keeps it."""
        return vars(self).get("_token")

    def with_token(self, token: str | None) -> Self:
        """Marks this value and returns it."""
        object.__setattr__(self, "_token", token)
        return self

    def fitted(self) -> list[str]:
        """What a `repr` says of every kind: where it was learned to act, how far the ascent came, what was derived."""
        facts = [f"target {self.provenance['target_hook']}"] if "target_hook" in self.provenance else []
        if len(self.history):
            low, high = self.history[-1].min(), self.history[-1].max()
            facts.append(f"objective {low:.4g} to {high:.4g} after {len(self.history) - 1} steps")
        return facts + ([f"derived: {', '.join(self.provenance['derived'])}"] if "derived" in self.provenance else [])

    def _repr_html_(self) -> str:
        return tables.rows_html(repr(self), self.history, self.measures(), self.word)

    def hooks(self) -> list[Hook]:
        """Returns hooks for `model.hooks`, `run_with_hooks` or `add_hook`.

        One row acts on every batch row. More rows, n, need a batch of exactly n, and row k acts on batch row k.
        """
        return self.row_hooks(range(len(self)), torch.ones(len(self), dtype=torch.float32, device="cpu"))

    def derived(self, tensors: Parts, how: str) -> Self:
        """Makes a value of the same kind from other tensors; `how` says in the provenance where they come from."""
        _, header = self.parts()
        provenance = {**self.provenance, "derived": [*self.provenance.get("derived", []), how]}
        # the history belongs to what was fitted, so a derived value has none
        return type(self).of_parts({**tensors, "history": no_history(0)}, header, provenance).with_token(self.token)

    @public
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file with the tensors, and with the header and the provenance as JSON.

        If the process is killed at any instant, the old file or the new one is left.

        Args:
            path: the file, which usually ends in .safetensors.
        """
        tensors, header = self.parts()
        files.write(path, type(self).__name__, tensors, {**header, "provenance": self.provenance})

    @public
    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        overwrite_card: bool = False,
        commit_message: str = "Add a perturbation of melbo_lens",
    ) -> str:
        """Puts the value on the Hugging Face hub: the file that `save` writes, and a card that says what it is.

        The file has the provenance, and so the prompts that the value was learned on: they become readable to all who
        can read the repository. Of a model that was loaded from a folder only the folder's name is kept.

        Args:
            repo_id: "user/name"; the repository is made if it is missing.
            private: whether a new repository is private; None takes the account's default.
            revision: the branch; None is the main one.
            token: of the account; None takes the one with which this machine is logged in.
            overwrite_card: whether a card (`README.md`) that is there is replaced; else it is left as it is.
            commit_message: the message of the commit.

        Returns:
            The address of the commit.

        Raises:
            ModuleNotFoundError: the client of the hub, huggingface_hub, is not installed.
        """
        clean = _with_provenance(self, hub.without_places(self.provenance))
        return hub.push(
            repo_id,
            clean.save,
            card(clean, repo_id),
            private=private,
            revision=revision,
            token=token,
            overwrite_card=overwrite_card,
            commit_message=commit_message,
        )

    def explore(self, model: Any, prompts: Any, **settings: Any) -> Any:
        """Lets a person try the rows by hand in a notebook: the same as `melbo_lens.explore(model, prompts, self)`."""
        # a value knows no model, so the package's front door is asked, and only now
        return import_module("melbo_lens").explore(model, prompts, self, **settings)

    @classmethod
    @public
    def from_pretrained(
        cls,
        repo_id: str,
        *,
        filename: str = hub.FILE,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Loads a value of this kind from the Hugging Face hub; see `melbo_lens.from_pretrained`."""
        path = hub.fetch(repo_id, filename, revision=revision, token=token, cache_dir=cache_dir)
        return cast(Any, read(path, KINDS if cls is Perturbation else [cls.__name__]))

    def to(self, device: str | torch.device) -> Self:
        """Returns a copy on another device."""
        tensors, header = self.parts()
        return type(self).of_parts(
            {name: tensor.to(device) for name, tensor in tensors.items()}, header, self.provenance
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), *self.parts(), self.provenance)

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(len(self)))

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: Index) -> Self:
        tensors, header = self.parts()
        kept = chosen_rows(index, len(self), self.word)
        numbers = [*self.provenance.get("rows", range(len(self)))]
        chosen = {
            name: tensor.index_select(_row_axis(name), kept.to(tensor.device)) for name, tensor in tensors.items()
        }
        return (
            type(self)
            .of_parts(chosen, header, {**self.provenance, "rows": [numbers[i] for i in as_list(kept)]})
            .with_token(self.token)
        )

    def __neg__(self) -> Self:
        return self.multiplied(-1.0, "negated")

    @public
    def __mul__(self, factor: float | Numbers) -> Self:
        """Scales all rows by one number, or each by its own."""
        return self.multiplied(
            factor, f"times {float(factor):g}" if isinstance(factor, int | float) else "scaled row by row"
        )

    __rmul__ = __mul__

    @public
    def __truediv__(self, divisor: float | Numbers) -> Self:
        return self * (
            1
            / (
                divisor
                if isinstance(divisor, int | float)
                else torch.as_tensor(as_list(divisor), dtype=torch.float32, device="cpu")
            )
        )

    def multiplied(self, factor: float | Numbers, how: str) -> Self:
        """Multiplies all rows by one factor, or each by its own; `how` says so in the provenance."""
        tensors, _ = self.parts()
        coefficients = torch.as_tensor(as_list(factor), dtype=torch.float32, device="cpu")
        if coefficients.ndim and len(coefficients) != len(self):
            raise ValueError(
                f"{len(coefficients)} factors were given for {len(self)} {self.word}s: "
                "give one number, or one for each."
            )
        coefficients = coefficients.expand(len(self))
        return self.derived(self.scaled_parts(tensors, coefficients), how)


def _with_provenance(value: P, provenance: Mapping[str, Any]) -> P:
    return cast(Any, replace)(value, provenance=provenance)  # every kind is a dataclass with this field


def read(path: str | os.PathLike[str], kinds: Collection[str]) -> Perturbation:
    """Reads a file that `save` wrote, of one of these kinds, and checks it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, written by another program, of another kind or of a newer schema, or its
            parts don't fit each other.
    """
    kind, tensors, header = files.read_any(path, kinds)
    try:
        return KINDS[kind].of_parts(tensors, header, header.get("provenance", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it holds {sorted(tensors)} and {sorted(header)} ({error}).") from error


def _rebuilt(kind: type[P], tensors: Parts, header: Mapping[str, Any], provenance: Mapping[str, Any]) -> P:
    return kind.of_parts(tensors, header, provenance)


def _row_axis(name: str) -> int:
    return 1 if name == "history" else 0


def concatenate(several: Iterable[P]) -> P:
    """Joins vectors of one source layer, or adapters of one shape.

    Norms may differ. The histories are dropped if their lengths differ. The settings on which all agree stay in the
    provenance, whose entry "parts" holds the full provenance of each.

    Args:
        several: the perturbations, in the order in which their rows will stand.

    Returns:
        One value with the rows of all.

    Raises:
        ValueError: there is nothing to join, or the perturbations differ in kind, layers or widths.
    """
    several = list(several)
    if not several:
        raise ValueError("concatenate was given nothing to join: pass at least one perturbation.")
    anything: list[Any] = several  # a caller may hand in what the types don't allow
    if strange := [type(one).__name__ for one in anything if not isinstance(one, Perturbation)]:
        raise TypeError(f"concatenate joins vectors or adapters, and was given {strange[0]}.")
    kinds = {type(one).__name__ for one in several}
    if len(kinds) > 1:
        raise ValueError(
            f"{' and '.join(sorted(kinds))} can't be joined: steer with several at once, ml.steer(model, [a, b])."
        )
    type(several[0]).check_joinable(several)
    first = several[0].provenance
    shared = {
        key: first[key]
        for key in first
        if key != "rows" and all(one.provenance.get(key, one) == first[key] for one in several)
    }
    tensors, header = several[0].parts()
    if any(one.objective != several[0].objective for one in several):
        # what was learned for several objectives has none, and so no target
        header = {**header, "objective": None}
        shared = {key: value for key, value in shared.items() if key not in ("target_layer", "target_hook")}
    alike = len({one.history.shape[0] for one in several}) == 1
    held = [one.parts()[0] for one in several]
    joined = {
        name: torch.cat([parts[name].to(tensor.device) for parts in held], dim=_row_axis(name))
        if alike or name != "history"
        else no_history(0)
        for name, tensor in tensors.items()
        if len({parts[name].shape[1:] if name in parts else None for parts in held}) == 1 or name == "history"
    }
    return type(several[0]).of_parts(joined, header, {**shared, "parts": [dict(one.provenance) for one in several]})


def no_history(n: int) -> Float[Tensor, "0 n"]:
    """Returns the empty history of n rows that were not fitted."""
    return torch.zeros(0, n, dtype=torch.float32, device="cpu")


def checked_history(history: Tensor, n: int, word: str) -> Tensor:
    """Returns a copy of the history in float32.

    Raises:
        ValueError: the history doesn't have one column for each row.
    """
    history = history if history.numel() else no_history(n)
    if history.ndim != 2 or history.shape[1] != n:
        raise ValueError(f"history must be [step {word}] with {n} columns; got {tuple(history.shape)}.")
    return history.detach().float().clone()


def checked_objective(objective: Objective | None, provenance: Mapping[str, Any]) -> Objective | None:
    """Returns the objective, or else the one in the provenance, where files of version 0.1.0 keep it."""
    return objective or Objective.of(provenance)


def objective_header(objective: Objective | None) -> dict[str, Any] | None:
    """Returns the objective as a file's header keeps it."""
    return None if objective is None else objective.header()


def chosen_rows(index: Index, n: int, word: str) -> Int[Tensor, " row"]:
    """Returns the numbers of the rows that an index selects; an integer, also one of NumPy, selects one row.

    Raises:
        IndexError: an integer is out of range, or nothing is selected.
    """
    chosen: Any = plain(index if isinstance(index, slice) else as_list(index))
    chosen = list(cast(Sequence[Any], chosen)) if isinstance(chosen, tuple | range) else chosen
    if isinstance(chosen, bool | float | str):
        raise IndexError(f"{chosen!r} is no index: use an integer, a slice, or a list of either integers or booleans.")
    one = isinstance(chosen, Integral)
    if one and not -n <= int(chosen) < n:
        raise IndexError(f"{word} {chosen} was asked for, there are {n}: use 0 to {n - 1}.")
    # torch knows no negative steps
    rows = list(range(n))[chosen] if isinstance(chosen, slice) else [int(chosen)] if one else chosen
    kept = torch.arange(n, device="cpu")[rows]
    if len(kept) == 0:
        raise IndexError(f"the selection {chosen!r} holds no {word}; there are {n}.")
    return kept
