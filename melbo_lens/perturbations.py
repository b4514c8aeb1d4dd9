"""What was learned?  `SteeringVectors`: an immutable value with its history and provenance, and no model inside."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from melbo_lens import tables
from melbo_lens.arguments import as_list, plain, plain_fields, plain_json, public
from melbo_lens.manifolds import to_sphere, unit

HookFunction: TypeAlias = Callable[..., Tensor]
Index: TypeAlias = SupportsIndex | slice | Sequence[int] | np.ndarray | pd.Series | Tensor


@plain_fields
@dataclass(frozen=True, eq=False, repr=False)
class SteeringVectors:
    """Steering vectors of one source layer: each is a bias for the MLP output at every position.

    Indexing, also with one integer, gives `SteeringVectors`; arithmetic works on the values and says so in the provenance.

    Attributes:
        values: the vectors, float32, always 2-D.
        source_layer: they are added at `blocks.{source_layer}.hook_mlp_out`.
        history: the objective, all prompts summed, before each step and, last, of `values`; no rows for vectors that were not fitted.
        provenance: every resolved setting of the fit, JSON-like.
    """

    values: Float[Tensor, "vector d_model"]  # 2-D also for one vector
    source_layer: int
    history: Float[Tensor, "step vector_or_0"] = field(default_factory=lambda: no_history(0))
    provenance: Mapping[str, Any] = field(default_factory=dict)

    __array_ufunc__ = None  # a number from a table, numpy's, times vectors is vectors

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or 0 in self.values.shape or not self.values.is_floating_point():
            raise ValueError(f"values must be a floating-point tensor [vector d_model] that is not empty; got {tuple(self.values.shape)}.")
        if not torch.isfinite(self.values).all():
            raise ValueError("values hold NaN or infinity: a perturbation must be finite.")
        layer = self.source_layer
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"source_layer={layer!r} must be an integer and must not be negative: count blocks from 0.")
        history = self.history if self.history.numel() else no_history(len(self.values))
        if history.ndim != 2 or history.shape[1] != len(self.values):
            raise ValueError(f"history must be [step vector] with {len(self.values)} columns; got {tuple(history.shape)}.")
        # copies: what the caller does with its tensors later must not change this value
        object.__setattr__(self, "values", self.values.detach().float().clone())
        object.__setattr__(self, "history", history.detach().float().clone())
        object.__setattr__(self, "provenance", plain_json(self.provenance, "provenance"))

    @classmethod
    @public
    def from_tensor(cls, values: Float[Tensor, "vector d_model"], source_layer: int) -> "SteeringVectors":
        """Wraps vectors made elsewhere; a 1-D tensor is one vector."""
        return cls(values[None] if values.ndim == 1 else values, source_layer, provenance={"method": "from_tensor"})

    @property
    def d_model(self) -> int:
        return self.values.shape[1]

    @property
    def source_layers(self) -> tuple[int, ...]:
        """The layers at which something is added."""
        return (self.source_layer,)

    @property
    def radii(self) -> Float[Tensor, " vector"]:
        """The norm of each vector."""
        return self.values.norm(dim=-1)

    @property
    def hook_name(self) -> str:
        return f"blocks.{self.source_layer}.hook_mlp_out"

    def hooks(self) -> list[tuple[str, HookFunction]]:
        """Hooks for `model.hooks`, `run_with_hooks` or `add_hook`.

        One vector is added to every batch row; n vectors need a batch of exactly n rows, vector k going to row k.
        """
        return self.row_hooks(range(len(self)), self.values.new_ones(len(self)))

    def row_hooks(self, index: Sequence[int], coefficients: Float[Tensor, " row"]) -> list[tuple[str, HookFunction]]:
        """Hooks for a batch whose row r gets `coefficients[r]` times the vector `index[r]`; a single entry is added to every row."""
        values = self.values[list(index)] * coefficients.to(self.values)[:, None]

        def add_vectors(activation: Float[Tensor, "batch pos d_model"], hook: Any = None) -> Float[Tensor, "batch pos d_model"]:
            _check_rows(len(values), activation)
            bias = values.to(activation.device)[:, None, :]
            return (activation + bias).to(activation.dtype)  # added in float32, rounded once

        return [(self.hook_name, add_vectors)]

    def on(self, model: Any) -> "SteeringVectors":
        """These vectors, which act at the same hook in every class of model.

        Raises:
            ValueError: the vectors don't fit the model.
        """
        n_layers, d_model = len(model.blocks), model.cfg.d_model
        if self.source_layer >= n_layers or self.d_model != d_model:
            raise ValueError(
                f"the perturbation belongs to layer {self.source_layer} of a model with d_model {self.d_model}; this model has layers 0 to "
                f"{n_layers - 1} and d_model {d_model}. Use the model that it was learned on."
            )
        return self

    def cosine_similarity(self, other: "SteeringVectors | None" = None) -> Float[Tensor, "vector other"]:
        """Cosines between the vectors, or between these and others; a vector of zeros has cosine 0 with everything."""
        mine, theirs = (unit(v.values.double()) for v in (self, other or self))
        return (mine @ theirs.T).float()

    @public
    def rescaled(self, radius: float | Float[Tensor, " vector"]) -> "SteeringVectors":
        """The same directions with another norm, one for all or one for each."""
        radii = torch.as_tensor(radius, dtype=torch.float32, device=self.values.device).expand(len(self))
        return self._derived(to_sphere(self.values, radii), f"rescaled to {radius if isinstance(radius, int | float) else 'given radii'}")

    def mean(self) -> "SteeringVectors":
        """The mean of the vectors, as one vector."""
        return self._derived(self.values.mean(0, keepdim=True), "mean")

    def top_singular(self) -> "SteeringVectors":
        """The one direction that explains most of the vectors: their top right-singular vector, with their mean norm.

        Its sign is that of the vectors' mean along it; the share of the squared norms it explains is in the provenance.
        """
        _, singular, right = torch.linalg.svd(self.values, full_matrices=False)
        direction = right[:1] * (-1 if (self.values @ right[0]).sum() < 0 else 1)
        share = float(singular[0] ** 2 / singular.square().sum())
        return self._derived(direction * self.radii.mean(), f"top singular vector, explains {share:.3f}")

    @public
    def ablation_hooks(self, layers: Sequence[int]) -> list[tuple[str, HookFunction]]:
        """Hooks that remove the vectors' directions from the stream entering these layers: ``x - (x . v) v / ||v||^2``.

        One vector is removed from every batch row; n vectors need a batch of exactly n rows.
        """
        if len(layers) == 0:
            raise ValueError("layers is empty: name at least one layer to remove the direction from, as range(model.cfg.n_layers).")
        directions = unit(self.values)

        def remove_direction(activation: Float[Tensor, "batch pos d_model"], hook: Any = None) -> Float[Tensor, "batch pos d_model"]:
            _check_rows(len(self), activation)
            v = directions.to(activation.device)[:, None, :]
            exact = activation.float()
            return (exact - (exact * v).sum(-1, keepdim=True) * v).to(activation.dtype)

        return [(f"blocks.{layer}.hook_resid_pre", remove_direction) for layer in layers]

    def to(self, device: str | torch.device) -> "SteeringVectors":
        """A copy on another device."""
        return replace(self, values=self.values.to(device), history=self.history.to(device))

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator["SteeringVectors"]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Index) -> "SteeringVectors":
        kept = chosen_rows(index, len(self), "vector").to(self.values.device)
        chosen = [*self.provenance.get("rows", range(len(self)))]
        provenance = {**self.provenance, "rows": [chosen[i] for i in kept.tolist()]}
        return replace(self, values=self.values[kept], history=self.history[:, kept.to(self.history.device)], provenance=provenance)

    def __neg__(self) -> "SteeringVectors":
        return self._derived(-self.values, "negated")

    @public
    def __mul__(self, factor: float | Float[Tensor, " vector"]) -> "SteeringVectors":
        """Scales all vectors by one number, or each by its own."""
        if isinstance(factor, Tensor) and factor.ndim:
            return self._derived(self.values * factor.to(self.values)[:, None], "scaled row by row")
        return self._derived(self.values * float(factor), f"times {float(factor):g}")

    __rmul__ = __mul__

    @public
    def __truediv__(self, divisor: float) -> "SteeringVectors":
        return self * (1 / divisor)

    def __add__(self, other: "SteeringVectors") -> "SteeringVectors":
        return self._combined(other, 1.0, "plus")

    def __sub__(self, other: "SteeringVectors") -> "SteeringVectors":
        return self._combined(other, -1.0, "minus")

    def _combined(self, other: "SteeringVectors", sign: float, word: str) -> "SteeringVectors":
        if not isinstance(other, SteeringVectors):
            return NotImplemented
        _check_same_layer([self, other], word)
        if len(self) != len(other) and 1 not in (len(self), len(other)):
            raise ValueError(f"{len(self)} {word} {len(other)} vectors: both sides need the same number of vectors, or one of them a single one.")
        rows = other.provenance.get("rows")
        return self._derived(self.values + sign * other.values.to(self.values.device), f"{word} {f'vectors {rows}' if rows else 'others'}")

    def _derived(self, values: Tensor, how: str) -> "SteeringVectors":
        # the history belongs to the fitted values, so a derived value has none
        provenance = {**self.provenance, "derived": [*self.provenance.get("derived", []), how]}
        return SteeringVectors(values, self.source_layer, provenance=provenance)

    @staticmethod
    def joined(several: "Sequence[SteeringVectors]", history: Tensor, provenance: Mapping[str, Any]) -> "SteeringVectors":
        """What `concatenate` makes of vectors."""
        _check_same_layer(several, "joined with")
        device = several[0].values.device
        return SteeringVectors(torch.cat([v.values.to(device) for v in several]), several[0].source_layer, history, provenance)

    def save(self, path: Any) -> None:
        """Writes one safetensors file, atomically: values, history, and the provenance in its header."""
        from melbo_lens.serialization import save

        save(self, path)

    def __repr__(self) -> str:
        radii = self.radii
        span = f"{radii.min():.3g}" if radii.max() - radii.min() <= 1e-4 * radii.max() else f"{radii.min():.3g} to {radii.max():.3g}"
        fields = [f"{len(self)} x d_model {self.d_model}", f"source_layer={self.source_layer}", f"radius {span}"]
        if "target_hook" in self.provenance:
            fields.append(f"target {self.provenance['target_hook']}")
        if self.history.shape[0]:
            fields.append(f"objective {self.history[-1].min():.4g} to {self.history[-1].max():.4g} after {self.history.shape[0] - 1} steps")
        fields += [f"derived: {', '.join(self.provenance['derived'])}"] if "derived" in self.provenance else []
        return f"SteeringVectors({', '.join(fields)})"

    def _repr_html_(self) -> str:
        return tables.html(repr(self), tables.rows(self.history, {"radius": self.radii.tolist()}, "vector"))


def concatenate(several: Sequence[Any]) -> Any:
    """Joins vectors of one source layer, or adapters of one shape; norms may differ, the histories are dropped if their lengths do.

    The settings on which all agree stay in the provenance, and `parts` holds each one's own.

    Raises:
        ValueError: nothing to join, vectors with adapters, or perturbations of different layers or widths.
    """
    if not several:
        raise ValueError("concatenate was given nothing to join: pass at least one perturbation.")
    kinds = {type(one).__name__ for one in several}
    if len(kinds) > 1:
        raise ValueError(f"{' and '.join(sorted(kinds))} can't be joined: steer with several at once, ml.steer(model, [a, b]).")
    first = several[0].provenance
    shared = {key: first[key] for key in first if key != "rows" and all(one.provenance.get(key, one) == first[key] for one in several)}
    same_length = len({one.history.shape[0] for one in several}) == 1
    history = torch.cat([one.history.to(several[0].history.device) for one in several], dim=1) if same_length else no_history(0)
    return several[0].joined(several, history, {**shared, "parts": [dict(one.provenance) for one in several]})


def no_history(n: int) -> Float[Tensor, "0 n"]:
    """The history of n perturbations that were not fitted."""
    return torch.zeros(0, n, dtype=torch.float32, device="cpu")


def objective_of(perturbations: Any) -> dict[str, Any]:
    """Where the change was read that these were learned to maximise: what a control must know, to be measured at the same place."""
    return {key: perturbations.provenance[key] for key in ("target_layer", "target_hook") if key in perturbations.provenance}


def chosen_rows(index: Index, n: int, word: str) -> Int[Tensor, " row"]:
    """The rows that an index means, one integer (also numpy's) as a list of one.

    Raises:
        IndexError: an integer out of range, or a selection of nothing.
    """
    index = plain(as_list(index) if not isinstance(index, Tensor) else index)
    one = isinstance(index, Integral)
    if one and not -n <= int(index) < n:
        raise IndexError(f"{word} {index} was asked for, there are {n}: use 0 to {n - 1}.")
    everything = torch.arange(n, device="cpu")
    kept = everything[[int(index)] if one else index.cpu() if isinstance(index, Tensor) else index]
    if len(kept) == 0:
        raise IndexError(f"the selection {index!r} holds no {word}; there are {n}.")
    return kept


def _check_rows(n_vectors: int, activation: Tensor) -> None:
    if n_vectors not in (1, activation.shape[0]):
        raise ValueError(
            f"{n_vectors} steering vectors can't be applied to a batch of {activation.shape[0]} rows: "
            "use one vector (vectors[k]), or a batch with one row for each vector."
        )


def _check_same_layer(vectors: Sequence[SteeringVectors], word: str) -> None:
    layers, widths = {v.source_layer for v in vectors}, {v.d_model for v in vectors}
    if len(layers) > 1 or len(widths) > 1:
        raise ValueError(
            f"vectors of source layers {sorted(layers)} and widths {sorted(widths)} can't be {word} each other: "
            "they act at different places. Steer with several at once instead: ml.steer(model, [a, b])."
        )
