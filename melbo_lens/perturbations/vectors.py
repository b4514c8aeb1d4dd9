"""What are steering vectors?  Each is a bias that is added at one site of one layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.arguments import as_list, check_tensor, count, plain_fields, public
from melbo_lens.ascent.manifolds import linalg, norm, to_sphere, unit
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
from melbo_lens.perturbations.rows import checked_provenance, says_within_block
from melbo_lens.perturbations.sites import ModelSites, site_of

if TYPE_CHECKING:
    from typing import Self
else:  # the tests' type checker accepts Self only inside a class that it checks as a whole
    Self = Any


@plain_fields
@dataclass(frozen=True, eq=False, repr=False)
class SteeringVectors(Perturbation):
    """Steering vectors of one source layer: each is a bias for an activation at every position.

    Indexing, also with one integer, gives `SteeringVectors`. Arithmetic works on the values and says so in the
    provenance.

    Attributes:
        values: the vectors, float32, always 2-D.
        source_layer: the block at whose `site` they are added.
        history: the objective, summed over all prompts, before each step and finally of `values`; it has no steps if
            the vectors were not fitted.
        provenance: every resolved setting of the fit, in JSON's types.
        site: "mlp_out" (`hook_mlp_out`), "resid_post" (the stream that leaves the block) or "attn_out"
            (`hook_attn_out`).
        objective: what the vectors were learned to maximise; for a control, what those that it is a control of
            were learned to maximise; None if that is not known.
        targets: the unit direction in which each vector changes the target on the mean, where the method learns it
            (`fit_dct`, `fit_jacobian`); None otherwise.
    """

    values: Float[Tensor, "vector d_model"]  # 2-D even for one vector
    source_layer: int
    history: Float[Tensor, "step vector_or_0"] = field(default_factory=lambda: no_history(0))
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    site: str = "mlp_out"
    objective: Objective | None = None
    targets: Float[Tensor, "vector d_target"] | None = None

    word = "vector"

    def __post_init__(self) -> None:
        check_tensor("values", self.values)
        if self.values.ndim != 2 or 0 in self.values.shape or not self.values.is_floating_point():
            raise ValueError(
                "values must be a floating-point tensor [vector d_model] that is not empty; "
                f"got {tuple(self.values.shape)}."
            )
        if not torch.isfinite(self.values.float()).all():  # the dtype in which they are kept
            raise ValueError("values hold NaN or infinity (they are kept in float32): a perturbation must be finite.")
        layer = cast(Any, self.source_layer)  # a caller may hand in anything
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(
                f"source_layer={layer!r} must be an integer and must not be negative: count blocks from 0."
            )
        site_of(self.site)
        # the tensors are copied, since the caller may change its own later, and this value must not change
        object.__setattr__(self, "values", self.values.detach().float().clone())
        object.__setattr__(self, "history", checked_history(self.history, len(self.values), self.word))
        object.__setattr__(self, "provenance", checked_provenance(self.provenance, len(self.values)))
        object.__setattr__(self, "objective", checked_objective(self.objective, self.provenance))
        if self.targets is not None:
            if len(self.targets) != len(self.values):
                raise ValueError(f"{len(self.targets)} targets were given for {len(self.values)} vectors.")
            object.__setattr__(self, "targets", self.targets.detach().float().clone())

    @classmethod
    @public
    def from_tensor(
        cls, values: Float[Tensor, "vector d_model"], source_layer: int, site: str = "mlp_out"
    ) -> "SteeringVectors":
        """Wraps vectors that were made elsewhere; a 1-D tensor is one vector.

        Args:
            values: the vectors; their norms are kept.
            source_layer: the block at whose `site` they are added, counted from 0.
            site: "mlp_out", "resid_post" or "attn_out".

        Raises:
            ValueError: the values are not finite or have another shape, or there is no such layer number or site.
        """
        check_tensor("values", values)
        return cls(
            values[None] if values.ndim == 1 else values, source_layer, provenance={"method": "from_tensor"}, site=site
        )

    def parts(self) -> tuple[Parts, dict[str, Any]]:
        header = {"source_layer": self.source_layer, "site": self.site, "objective": objective_header(self.objective)}
        targets = {} if self.targets is None else {"targets": self.targets}
        return {"values": self.values, "history": self.history, **targets}, header

    @classmethod
    def of_parts(cls, tensors: Parts, header: Mapping[str, Any], provenance: Mapping[str, Any]) -> Self:
        # files of version 0.1.0 name no site and no objective
        site, objective = header.get("site", "mlp_out"), Objective.of(header.get("objective"))
        targets = tensors.get("targets")
        return cls(tensors["values"], header["source_layer"], tensors["history"], provenance, site, objective, targets)

    def scaled_parts(self, tensors: Parts, coefficients: Float[Tensor, " row"]) -> Parts:
        return {"values": tensors["values"] * coefficients.to(self.values)[:, None]}

    @classmethod
    def check_joinable(cls, several: Sequence[Self]) -> None:
        _check_same_place(several, "joined with")

    def measures(self) -> dict[str, list[float]]:
        return {"radius": as_list(self.radii)}

    def __len__(self) -> int:
        return len(self.values)

    @property
    def d_model(self) -> int:
        """The width of the stream."""
        return self.values.shape[1]

    @property
    def source_layers(self) -> tuple[int, ...]:
        """The layers at which something is added."""
        return (self.source_layer,)

    @property
    def radii(self) -> Float[Tensor, " vector"]:
        """The norm of each vector."""
        return norm(self.values)[..., 0]

    @property
    def hook_name(self) -> str:
        """The name of the hook at which the vectors are added."""
        return site_of(self.site).hook_name(self.source_layer)

    @property
    def reaches_stream(self) -> bool:
        """Whether what is added at the site reaches the stream that leaves the block as it is, as far as is known.

        It doesn't at the attention's output; nor at the MLP's where the block scales or normalises its sum, which a fit
        finds out.
        """
        return site_of(self.site).after_block and not says_within_block(self.provenance)

    def row_hooks(self, index: Sequence[int], coefficients: Float[Tensor, " row"]) -> list[Hook]:
        """Returns hooks for a batch whose row r gets `coefficients[r]` times the vector `index[r]`.

        A single entry is added to every row.
        """
        values = self.values[list(index)] * coefficients.to(self.values)[:, None]

        def add_vectors(
            activation: Float[Tensor, "batch pos d_model"], hook: Any = None
        ) -> Float[Tensor, "batch pos d_model"]:
            _check_rows(len(values), activation)
            bias = values.to(activation.device)[:, None, :]
            return (activation + bias).to(activation.dtype)  # added in float32 and rounded once

        return [(self.hook_name, add_vectors)]

    def on(self, host: ModelSites) -> Self:
        """Returns these vectors, which act at the same hook in every class of model.

        Raises:
            ValueError: the vectors don't fit the model.
        """
        n_layers, d_model = host.n_layers, host.d_model
        if self.source_layer >= n_layers or self.d_model != d_model:
            raise ValueError(
                f"the perturbation belongs to layer {self.source_layer} of a model with d_model {self.d_model}; "
                f"this model has layers 0 to {n_layers - 1} and d_model {d_model}. "
                "Use the model that it was learned on."
            )
        return self

    def cosine_similarity(self, other: "SteeringVectors | None" = None) -> Float[Tensor, "vector other"]:
        """Computes cosines between the vectors, or between them and others; a zero vector has cosine 0 with all.

        Args:
            other: vectors of the same width; None means these.
        """
        mine, theirs = (unit(v.values.double()) for v in (self, other or self))
        return (mine @ theirs.T).float()

    @public
    def rescaled(self, radius: float | Float[Tensor, " vector"]) -> "SteeringVectors":
        """Returns the same directions with another norm, one for all or one for each.

        Args:
            radius: the new norm.
        """
        radii = torch.as_tensor(radius, dtype=torch.float32, device=self.values.device).expand(len(self))
        return self.derived(
            {"values": to_sphere(self.values, radii)},
            f"rescaled to {radius if isinstance(radius, int | float) else 'given radii'}",
        )

    def mean(self) -> "SteeringVectors":
        """Returns the mean of the vectors as one vector."""
        return self.derived({"values": self.values.mean(0, keepdim=True)}, "mean")

    def top_singular(self) -> "SteeringVectors":
        """Returns the one direction that explains most of the vectors: their top right-singular vector.

        Its norm is the vectors' mean norm, and its sign is that of their mean along it. The share of the squared norms
        that it explains is in the provenance.
        """
        _, singular, right = linalg.svd(self.values, full_matrices=False)
        direction = right[:1] * (-1 if (self.values @ right[0]).sum() < 0 else 1)
        share = float(singular[0] ** 2 / singular.square().sum())
        return self.derived({"values": direction * self.radii.mean()}, f"top singular vector, explains {share:.3f}")

    @public
    def ablation_hooks(self, layers: Sequence[int]) -> list[Hook]:
        """Returns hooks that remove the vectors' directions from the streams that enter these layers.

        A stream x becomes ``x - (x . v) v / ||v||^2``.

        One vector is removed from every batch row; n vectors need a batch of exactly n rows.

        Args:
            layers: the numbers of the blocks, such as `range(model.cfg.n_layers)` for all.

        Returns:
            (hook name, function) pairs for `model.hooks` or `run_with_hooks`.

        Raises:
            ValueError: layers is empty, or holds something else than a block's number, counted from 0.
        """
        for layer in layers:  # a bridge passes over a hook that it doesn't have
            count("layer", layer, least=0)
        if len(layers) == 0:
            raise ValueError(
                "layers is empty: name at least one layer to remove the direction from, as range(model.cfg.n_layers)."
            )
        directions = unit(self.values)

        def remove_direction(
            activation: Float[Tensor, "batch pos d_model"], hook: Any = None
        ) -> Float[Tensor, "batch pos d_model"]:
            _check_rows(len(self), activation)
            v = directions.to(activation.device)[:, None, :]
            exact = activation.float()
            return (exact - (exact * v).sum(-1, keepdim=True) * v).to(activation.dtype)

        return [(f"blocks.{layer}.hook_resid_pre", remove_direction) for layer in layers]

    def __add__(self, other: "SteeringVectors") -> "SteeringVectors":
        return self._combined(other, 1.0, "plus")

    def __sub__(self, other: "SteeringVectors") -> "SteeringVectors":
        return self._combined(other, -1.0, "minus")

    def _combined(self, other: "SteeringVectors", sign: float, word: str) -> "SteeringVectors":
        if not isinstance(cast(Any, other), SteeringVectors):
            return NotImplemented
        _check_same_place([self, other], word)
        if len(self) != len(other) and 1 not in (len(self), len(other)):
            raise ValueError(
                f"{len(self)} {word} {len(other)} vectors: "
                "both sides need the same number of vectors, or one of them a single one."
            )
        rows = other.provenance.get("rows")
        how = f"{word} {f'vectors {rows}' if rows else 'others'}"
        kept = self._less_target(other)
        if says_within_block(other.provenance):
            kept = replace(kept, provenance={**kept.provenance, "within_block": True})
        return kept.derived({"values": self.values + sign * other.values.to(self.values.device)}, how)

    def _less_target(self, other: "SteeringVectors") -> "SteeringVectors":
        """Returns these vectors, without a target if the others were learned for a different one."""
        if self.objective == other.objective:
            return self
        kept = {key: value for key, value in self.provenance.items() if key not in ("target_layer", "target_hook")}
        return replace(self, provenance=kept, objective=None)

    def __repr__(self) -> str:
        radii = self.radii
        span = (
            f"{radii.min():.3g}"
            if radii.max() - radii.min() <= 1e-4 * radii.max()
            else f"{radii.min():.3g} to {radii.max():.3g}"
        )
        fields = [
            f"{len(self)} x d_model {self.d_model}",
            f"source_layer={self.source_layer}",
            *([f"at {self.site}"] if self.site != "mlp_out" else []),
            f"radius {span}",
        ]
        return f"SteeringVectors({', '.join([*fields, *self.fitted()])})"


def _check_rows(n_vectors: int, activation: Tensor) -> None:
    if n_vectors not in (1, activation.shape[0]):
        raise ValueError(
            f"{n_vectors} steering vectors can't be applied to a batch of {activation.shape[0]} rows: "
            "use one vector (vectors[k]), or a batch with one row for each vector."
        )


def _check_same_place(vectors: Sequence[SteeringVectors], word: str) -> None:
    layers, widths, sites = {v.source_layer for v in vectors}, {v.d_model for v in vectors}, {v.site for v in vectors}
    if len(layers) > 1 or len(widths) > 1 or len(sites) > 1:
        at = f", sites {sorted(sites)}" if len(sites) > 1 else ""
        raise ValueError(
            f"vectors of source layers {sorted(layers)}{at} and widths {sorted(widths)} can't be {word} each other: "
            "they act at different places. Steer with several at once instead: ml.steer(model, [a, b])."
        )
