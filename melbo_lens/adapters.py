"""What else was learned?  `SteeringAdapters`: low-rank updates of MLP output weights, an immutable value without a model inside."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens import tables
from melbo_lens.arguments import plain_fields, plain_json, public
from melbo_lens.mlp import MLPSite, mlp_site, usual_site, widths
from melbo_lens.perturbations import HookFunction, Index, SteeringVectors, chosen_rows, no_history
from melbo_lens.updates import RowUpdate

Factors: TypeAlias = tuple[Tensor, Tensor]  # A [adapter rank d_mlp], B [adapter d_model rank]


@plain_fields
@dataclass(frozen=True, eq=False, repr=False)
class SteeringAdapters:
    """Adapters of one or several source layers: the MLP output there gains ``scale * B A a``, a the hidden activation that enters W_out.

    Indexing, also with one integer, gives `SteeringAdapters`; a factor or a sign scales the whole update.

    Attributes:
        factors: source layer -> (A [adapter rank d_mlp], B [adapter d_model rank]), float32; of one layer, `A` and `B` are these.
        scales: the number that multiplies each adapter's update.
        history: the objective, all prompts summed, before each step and, last, of these factors; no rows if they were not fitted.
        provenance: every resolved setting of the fit, JSON-like.
        sites: source layer -> where its MLP is hooked; by default as in models without a norm after the MLP.
    """

    factors: Mapping[int, Factors]
    scales: Float[Tensor, " adapter"]
    history: Float[Tensor, "step adapter_or_0"] = field(default_factory=lambda: no_history(0))
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sites: Mapping[int, MLPSite] = field(default_factory=dict)
    fitted_on: "weakref.ref[Any] | None" = None  # lets to_peft check itself while the model is still there; never saved

    __array_ufunc__ = None  # a number from a table, numpy's, times adapters is adapters

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError("factors is empty: give A and B of at least one source layer.")
        n = len(next(iter(self.factors.values()))[0])
        for layer, (a, b) in self.factors.items():
            if a.ndim != 3 or b.ndim != 3 or not len(a) == len(b) == n or a.shape[1] != b.shape[2] or 0 in a.shape or 0 in b.shape:
                raise ValueError(
                    f"the factors of layer {layer} must be A [adapter rank d_mlp] and B [adapter d_model rank], not empty; "
                    f"got {tuple(a.shape)} and {tuple(b.shape)}."
                )
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise ValueError(f"the factors of layer {layer} hold NaN or infinity: a perturbation must be finite.")
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ValueError(f"source layer {layer!r} must be an integer and must not be negative: count blocks from 0.")
        if tuple(self.scales.shape) != (n,) or not torch.isfinite(self.scales).all():
            raise ValueError(f"scales must be {n} finite numbers, one for each adapter; got {self.scales}.")
        history = self.history if self.history.numel() else no_history(n)
        if history.ndim != 2 or history.shape[1] != n:
            raise ValueError(f"history must be [step adapter] with {n} columns; got {tuple(history.shape)}.")
        kept = {layer: tuple(factor.detach().float().clone() for factor in self.factors[layer]) for layer in sorted(self.factors)}
        object.__setattr__(self, "factors", MappingProxyType(kept))
        object.__setattr__(self, "scales", self.scales.detach().to(kept[min(kept)][0]).clone())
        object.__setattr__(self, "history", history.detach().float().clone())
        object.__setattr__(self, "provenance", plain_json(self.provenance, "provenance"))
        object.__setattr__(self, "sites", {layer: self.sites.get(layer, usual_site(layer)) for layer in kept})

    @classmethod
    @public
    def from_factors(
        cls, a: Float[Tensor, "adapter rank d_mlp"], b: Float[Tensor, "adapter d_model rank"], source_layer: int, scale: float = 1.0
    ) -> "SteeringAdapters":
        """Wraps factors made elsewhere; 2-D ones are one adapter."""
        a, b = (factor[None] if factor.ndim == 2 else factor for factor in (a, b))
        return cls({source_layer: (a, b)}, a.new_full((len(a),), float(scale), dtype=torch.float32), provenance={"method": "from_factors"})

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a copy holds: everything but the memory of the model."""
        return {**vars(self), "factors": dict(self.factors), "fitted_on": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, factors=MappingProxyType(state["factors"]))

    @property
    def A(self) -> Float[Tensor, "adapter rank d_mlp"]:
        return self._only()[0]

    @property
    def B(self) -> Float[Tensor, "adapter d_model rank"]:
        return self._only()[1]

    @property
    def scale(self) -> float:
        """The scale that all adapters share."""
        if not torch.allclose(self.scales, self.scales[0]):
            raise ValueError(f"these adapters have scales from {self.scales.min():.4g} to {self.scales.max():.4g}: use adapters.scales.")
        return float(self.scales[0])

    @property
    def source_layers(self) -> tuple[int, ...]:
        """The layers at which something is added."""
        return tuple(self.factors)

    @property
    def source_layer(self) -> int:
        """The only source layer."""
        self._only()
        return self.source_layers[0]

    @property
    def rank(self) -> int:
        return next(iter(self.factors.values()))[0].shape[1]

    @property
    def d_model(self) -> int:
        return next(iter(self.factors.values()))[1].shape[1]

    def hooks(self) -> list[tuple[str, HookFunction]]:
        """Hooks for `model.hooks`, `run_with_hooks` or `add_hook`.

        One adapter acts on every batch row; n adapters need a batch of exactly n rows, adapter k acting on row k.
        """
        return self.row_hooks(range(len(self)), self.scales.new_ones(len(self)))

    def row_hooks(self, index: Sequence[int], coefficients: Float[Tensor, " row"]) -> list[tuple[str, HookFunction]]:
        """Hooks for a batch whose row r gets `coefficients[r]` times the adapter `index[r]`; a single entry acts on every row."""
        return [
            hook
            for layer, (a, b) in self.factors.items()
            for hook in self.sites[layer].hooks(RowUpdate(a, b, list(index), coefficients.to(self.scales) * self.scales[list(index)]))
        ]

    def on(self, model: Any) -> "SteeringAdapters":
        """The same adapters hooked where this model has its MLPs: classes of model differ in that.

        Raises:
            ValueError: the adapters don't fit the model.
        """
        for layer, (a, b) in self.factors.items():
            if layer >= len(model.blocks) or widths(model, layer) != (a.shape[2], b.shape[1]):
                there = f"d_mlp {widths(model, layer)[0]} and d_model {widths(model, layer)[1]}" if layer < len(model.blocks) else "no such layer"
                raise ValueError(
                    f"the perturbation belongs to layer {layer} of a model ({self.provenance.get('model', 'unnamed')}) with d_mlp {a.shape[2]} and "
                    f"d_model {b.shape[1]}; this model has {there} ({len(model.blocks)} layers). Use the model that it was learned on."
                )
        return replace(self, sites={layer: mlp_site(model, layer) for layer in self.factors})

    def effect(self, model: Any, prompts: Any, layer: int | None = None) -> Any:
        """The bias that each position actually receives: see `adapter_effects.effect`."""
        from melbo_lens.adapter_effects import effect

        return effect(self, model, prompts, layer)

    def to_vectors(self, model: Any, prompts: Any) -> SteeringVectors:
        """The best single steering vector for each adapter: see `adapter_effects.to_vectors`."""
        from melbo_lens.adapter_effects import to_vectors

        return to_vectors(self, model, prompts)

    def to_peft(self, path: Any, model: Any = None, **settings: Any) -> Any:
        """Writes one adapter for the `peft` library: see `export.to_peft`."""
        from melbo_lens.export import to_peft

        return to_peft(self, path, model, **settings)

    def save(self, path: Any) -> None:
        """Writes one safetensors file, atomically: factors, scales, history, and the provenance in its header."""
        from melbo_lens.serialization import save

        save(self, path)

    def to(self, device: str | torch.device) -> "SteeringAdapters":
        """A copy on another device."""
        factors = {layer: (a.to(device), b.to(device)) for layer, (a, b) in self.factors.items()}
        return replace(self, factors=factors, scales=self.scales.to(device), history=self.history.to(device))

    def rescaled(self, scales: Float[Tensor, " adapter"], how: str) -> "SteeringAdapters":
        """The same factors with other scales; `how` says in the provenance where these come from."""
        # the history belongs to the fitted update, so a derived value has none
        provenance = {**self.provenance, "derived": [*self.provenance.get("derived", []), how]}
        return replace(self, scales=scales, history=no_history(0), provenance=provenance)

    def __len__(self) -> int:
        return len(self.scales)

    def __iter__(self) -> Iterator["SteeringAdapters"]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Index) -> "SteeringAdapters":
        kept = chosen_rows(index, len(self), "adapter").to(self.scales.device)
        chosen = [*self.provenance.get("rows", range(len(self)))]
        return replace(
            self,
            factors={layer: (a[kept], b[kept]) for layer, (a, b) in self.factors.items()},
            scales=self.scales[kept],
            history=self.history[:, kept.to(self.history.device)],
            provenance={**self.provenance, "rows": [chosen[i] for i in kept.tolist()]},
        )

    def __neg__(self) -> "SteeringAdapters":
        return self.rescaled(-self.scales, "negated")

    @public
    def __mul__(self, factor: float | Float[Tensor, " adapter"]) -> "SteeringAdapters":
        """Scales all updates by one number, or each by its own."""
        how = "scaled row by row" if isinstance(factor, Tensor) else f"times {factor:g}"
        return self.rescaled(self.scales * (factor.to(self.scales) if isinstance(factor, Tensor) else factor), how)

    __rmul__ = __mul__

    @public
    def __truediv__(self, divisor: float) -> "SteeringAdapters":
        return self * (1 / divisor)

    @staticmethod
    def joined(several: "Sequence[SteeringAdapters]", history: Tensor, provenance: Mapping[str, Any]) -> "SteeringAdapters":
        """What `concatenate` makes of adapters.

        Raises:
            ValueError: adapters of other layers, widths or ranks.
        """
        shapes = {tuple((layer, a.shape[1:], b.shape[1:]) for layer, (a, b) in one.factors.items()) for one in several}
        if len(shapes) > 1:
            raise ValueError(
                "adapters of different source layers, widths or ranks can't be joined: steer with several at once, ml.steer(model, [a, b])."
            )
        device = several[0].scales.device
        factors = {
            layer: tuple(torch.cat([one.factors[layer][i].to(device) for one in several]) for i in (0, 1)) for layer in several[0].source_layers
        }
        scales = torch.cat([one.scales.to(device) for one in several])
        return SteeringAdapters(factors, scales, history, provenance, several[0].sites, several[0].fitted_on)

    def _only(self) -> Factors:
        if len(self.factors) > 1:
            raise ValueError(f"these adapters act at layers {list(self.factors)}: use adapters.factors[layer], a pair (A, B), and name the layer.")
        return next(iter(self.factors.values()))

    def __repr__(self) -> str:
        a, b = next(iter(self.factors.values()))
        low, high = float(self.scales.min()), float(self.scales.max())
        span = f"{low:.3g}" if high - low <= 1e-4 * abs(high) else f"{low:.3g} to {high:.3g}"
        layers = self.source_layers[0] if len(self.factors) == 1 else list(self.source_layers)
        fields = [f"{len(self)} x rank {self.rank}", f"d_mlp {a.shape[2]}", f"d_model {b.shape[1]}", f"source_layer={layers}", f"scale {span}"]
        if "target_hook" in self.provenance:
            fields.append(f"target {self.provenance['target_hook']}")
        if self.history.shape[0]:
            fields.append(f"objective {self.history[-1].min():.4g} to {self.history[-1].max():.4g} after {self.history.shape[0] - 1} steps")
        fields += [f"derived: {', '.join(self.provenance['derived'])}"] if "derived" in self.provenance else []
        return f"SteeringAdapters({', '.join(fields)})"

    def _repr_html_(self) -> str:
        return tables.html(repr(self), tables.rows(self.history, {"scale": self.scales.tolist()}, "adapter"))


Perturbation: TypeAlias = SteeringVectors | SteeringAdapters
