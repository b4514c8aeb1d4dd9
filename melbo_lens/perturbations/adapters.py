"""What are steering adapters?  They are low-rank updates of output weights, in one or several layers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.arguments import as_list, check_tensor, plain_fields, public
from melbo_lens.ascent.objectives import Objective
from melbo_lens.perturbations.perturbation import (
    Hook,
    Parts,
    Perturbation,
    checked_history,
    checked_objective,
    no_history,
    objective_header,
)
from melbo_lens.perturbations.rows import checked_provenance
from melbo_lens.perturbations.sites import ModelSites, WeightSite, usual_site
from melbo_lens.perturbations.updates import RowUpdate

if TYPE_CHECKING:
    from typing import Self
else:  # the tests' type checker accepts Self only inside a class that it checks as a whole
    Self = Any

Factors: TypeAlias = tuple[Tensor, Tensor]  # A [adapter rank d_in], B [adapter d_model rank]


@plain_fields
@dataclass(frozen=True, eq=False, repr=False)
class SteeringAdapters(Perturbation):
    """Adapters of one or several source layers.

    At each of these layers, the output of some weights gains ``scale * B A a``, where a is what enters the weights.
    Indexing, also with one integer, gives `SteeringAdapters`; a factor or a sign scales the whole update.

    Attributes:
        factors: source layer -> (A [adapter rank d_in], B [adapter d_model rank]), float32; with a single layer, `A`
            and `B` are these two.
        scales: the number that multiplies each adapter's update.
        history: the objective, summed over all prompts, before each step and finally of these factors; it has no steps
            if the factors were not fitted.
        provenance: every resolved setting of the fit, in JSON's types.
        sites: source layer -> which weights are updated, and where they are hooked; by default the MLP's weights in a
            model without a norm after them.
        objective: what the adapters were learned to maximise; for a control, what the adapters that it is a control of
            were learned to maximise; None if that is not known.
    """

    factors: Mapping[int, Factors]
    scales: Float[Tensor, " adapter"]
    history: Float[Tensor, "step adapter_or_0"] = field(default_factory=lambda: no_history(0))
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    sites: Mapping[int, WeightSite] = field(default_factory=dict[int, WeightSite])
    objective: Objective | None = None

    word = "adapter"

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError("factors is empty: give A and B of at least one source layer.")
        n = len(next(iter(self.factors.values()))[0])
        width = "d_in" if any(site.name == "attn" for site in self.sites.values()) else "d_mlp"
        given = cast(Mapping[Any, Factors], self.factors)  # a caller may hand in any keys
        for layer, (a, b) in given.items():
            if (
                a.ndim != 3
                or b.ndim != 3
                or not len(a) == len(b) == n
                or a.shape[1] != b.shape[2]
                or 0 in a.shape
                or 0 in b.shape
            ):
                raise ValueError(
                    f"the factors of layer {layer} must be A [adapter rank {width}] and B [adapter d_model rank], "
                    f"not empty; got {tuple(a.shape)} and {tuple(b.shape)}."
                )
            if not all(torch.isfinite(factor.float()).all() for factor in (a, b)):  # the dtype in which they are kept
                raise ValueError(
                    f"the factors of layer {layer} hold NaN or infinity (they are kept in float32): a "
                    "perturbation must be finite."
                )
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ValueError(
                    f"source layer {layer!r} must be an integer and must not be negative: count blocks from 0."
                )
        if tuple(self.scales.shape) != (n,) or not torch.isfinite(self.scales).all():
            raise ValueError(f"scales must be {n} finite numbers, one for each adapter; got {self.scales}.")
        kept = {
            layer: tuple(factor.detach().float().clone() for factor in self.factors[layer])
            for layer in sorted(self.factors)
        }
        object.__setattr__(self, "factors", MappingProxyType(kept))
        object.__setattr__(self, "scales", self.scales.detach().to(kept[min(kept)][0]).clone())
        object.__setattr__(self, "history", checked_history(self.history, n, self.word))
        object.__setattr__(self, "provenance", checked_provenance(self.provenance, n))
        object.__setattr__(self, "objective", checked_objective(self.objective, self.provenance))
        object.__setattr__(self, "sites", {layer: self.sites.get(layer, usual_site(layer)) for layer in kept})

    @classmethod
    @public
    def from_factors(
        cls,
        a: Float[Tensor, "adapter rank d_in"],
        b: Float[Tensor, "adapter d_model rank"],
        source_layer: int,
        scale: float = 1.0,
    ) -> "SteeringAdapters":
        """Wraps factors that were made elsewhere; 2-D factors are one adapter.

        Args:
            a: what reads the activation that enters the weights.
            b: what writes to their output.
            source_layer: the block whose MLP output weights are updated.
            scale: the number that multiplies every update.

        Raises:
            ValueError: the factors are not finite, or don't fit each other.
        """
        check_tensor("a", a)
        check_tensor("b", b)
        a, b = (factor[None] if factor.ndim == 2 else factor for factor in (a, b))
        return cls(
            {source_layer: (a, b)},
            a.new_full((len(a),), float(scale), dtype=torch.float32),
            provenance={"method": "from_factors"},
        )

    def parts(self) -> tuple[Parts, dict[str, Any]]:
        factors = {
            f"{name}.{layer}": factor
            for layer, pair in self.factors.items()
            for name, factor in zip("AB", pair, strict=True)
        }
        header = {
            "sites": [asdict(site) for site in self.sites.values()],
            "objective": objective_header(self.objective),
        }
        return {**factors, "scales": self.scales, "history": self.history}, header

    @classmethod
    def of_parts(cls, tensors: Parts, header: Mapping[str, Any], provenance: Mapping[str, Any]) -> Self:
        sites = {site["layer"]: WeightSite(**site) for site in header["sites"]}
        factors = {layer: (tensors[f"A.{layer}"], tensors[f"B.{layer}"]) for layer in sites}
        return cls(
            factors, tensors["scales"], tensors["history"], provenance, sites, Objective.of(header.get("objective"))
        )

    def scaled_parts(self, tensors: Parts, coefficients: Float[Tensor, " row"]) -> Parts:
        return {**tensors, "scales": tensors["scales"] * coefficients.to(self.scales)}

    @classmethod
    def check_joinable(cls, several: Sequence[Self]) -> None:
        shapes = {
            tuple((layer, one.sites[layer].name, a.shape[1:], b.shape[1:]) for layer, (a, b) in one.factors.items())
            for one in several
        }
        if len(shapes) > 1:
            raise ValueError(
                "adapters of different source layers, widths or ranks can't be joined: "
                "steer with several at once, ml.steer(model, [a, b])."
            )

    def measures(self) -> dict[str, list[float]]:
        return {"scale": as_list(self.scales)}

    def __len__(self) -> int:
        return len(self.scales)

    @property
    def site(self) -> str:
        """Which weights are updated: "mlp" or "attn"."""
        return next(iter(self.sites.values())).name

    @property
    def A(self) -> Float[Tensor, "adapter rank d_in"]:
        """What reads the activation that enters the weights; only adapters of a single layer have one A."""
        return self._only()[0]

    @property
    def B(self) -> Float[Tensor, "adapter d_model rank"]:
        """What writes to the output of the weights; only adapters of a single layer have one B."""
        return self._only()[1]

    @property
    def scale(self) -> float:
        """The scale that all adapters share."""
        if not torch.allclose(self.scales, self.scales[0]):
            raise ValueError(
                f"these adapters have scales from {self.scales.min():.4g} to {self.scales.max():.4g}: "
                "use adapters.scales."
            )
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
        """The rank of each update; where layers have different ones, the largest."""
        return max(a.shape[1] for a, _ in self.factors.values())

    @property
    def d_model(self) -> int:
        """The width of the stream."""
        return next(iter(self.factors.values()))[1].shape[1]

    def row_hooks(self, index: Sequence[int], coefficients: Float[Tensor, " row"]) -> list[Hook]:
        """Returns hooks for a batch whose row r gets `coefficients[r]` times the adapter `index[r]`.

        A single entry acts on every row.
        """
        return [
            hook
            for layer, (a, b) in self.factors.items()
            for hook in self.sites[layer].hooks(
                RowUpdate(a, b, list(index), coefficients.to(self.scales) * self.scales[list(index)])
            )
        ]

    def on(self, host: ModelSites) -> Self:
        """Returns the same adapters, hooked where this model has its weights; classes of model differ in that.

        Raises:
            ValueError: the adapters don't fit the model.
        """
        for layer, (a, b) in self.factors.items():
            there = host.widths(layer, self.site) if layer < host.n_layers else None
            if there != (a.shape[2], b.shape[1]):
                width = "d_in" if self.site == "attn" else "d_mlp"
                said = "no such layer" if there is None else f"{width} {there[0]} and d_model {there[1]}"
                raise ValueError(
                    f"the perturbation belongs to layer {layer} of a model "
                    f"({self.provenance.get('model', 'unnamed')}) with {width} {a.shape[2]} and d_model {b.shape[1]}; "
                    f"this model has {said} ({host.n_layers} layers). "
                    "Use the model that it was learned on."
                )
        return self.at({layer: host.weight_site(layer, self.site) for layer in self.factors})

    def at(self, sites: Mapping[int, WeightSite]) -> Self:
        """Returns the same adapters, hooked at other sites."""
        return replace(self, sites=sites).with_token(self.token)

    def rescaled(self, scales: Float[Tensor, " adapter"], how: str) -> "SteeringAdapters":
        """Returns the same factors with other scales; `how` says in the provenance where the scales come from."""
        return self.derived({**self.parts()[0], "scales": scales}, how)

    @public
    def composed(self) -> "SteeringAdapters":
        """Returns one adapter that does what all of these do together, with their ranks side by side.

        ``sum_k s_k B_k A_k = [s_1 B_1 ... s_n B_n] [A_1; ...; A_n]``, so nothing is lost, unlike in a merge of weights
        in half precision. `ml.concatenate` joins adapters of several fits before.

        Returns:
            An adapter of rank n times `rank` and scale 1.
        """
        tensors = {"scales": self.scales.new_ones(1)}
        for layer, (a, b) in self.factors.items():
            tensors[f"A.{layer}"] = a.flatten(0, 1)[None]
            tensors[f"B.{layer}"] = (self.scales[:, None, None] * b).permute(1, 0, 2).flatten(1)[None]
        return self.derived(tensors, f"composed of {len(self)} adapters")

    def _only(self) -> Factors:
        if len(self.factors) > 1:
            raise ValueError(
                f"these adapters act at layers {list(self.factors)}: "
                "use adapters.factors[layer], a pair (A, B), and name the layer."
            )
        return next(iter(self.factors.values()))

    def __repr__(self) -> str:
        a, b = next(iter(self.factors.values()))
        low, high = float(self.scales.min()), float(self.scales.max())
        span = f"{low:.3g}" if high - low <= 1e-4 * abs(high) else f"{low:.3g} to {high:.3g}"
        layers = self.source_layers[0] if len(self.factors) == 1 else list(self.source_layers)
        fields = [
            f"{len(self)} x rank {self.rank}",
            f"{'d_in' if self.site == 'attn' else 'd_mlp'} {a.shape[2]}",
            f"d_model {b.shape[1]}",
            f"source_layer={layers}",
            f"scale {span}",
        ]
        return f"SteeringAdapters({', '.join([*fields, *self.fitted()])})"
