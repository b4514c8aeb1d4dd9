"""What is one piece of a search?  A trial, which is one fit with fixed settings, whatever its method."""

import warnings
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeAlias

from melbo_lens.arguments import plain_fields, plain_json
from melbo_lens.methods.adapters import fit_adapters
from melbo_lens.methods.contrastive import fit_contrastive
from melbo_lens.methods.cpe import fit_cpe
from melbo_lens.methods.dct import fit_dct
from melbo_lens.methods.fitting import Optimizer, measured
from melbo_lens.methods.jacobian import fit_jacobian
from melbo_lens.methods.low_rank import band_with
from melbo_lens.methods.melbo import fit_vectors
from melbo_lens.methods.noise import noise_vectors
from melbo_lens.methods.problem import vectors_on
from melbo_lens.models.slices import SlicedModel
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.vectors import SteeringVectors


@plain_fields
@dataclass(frozen=True)
class Trial:
    """One fit of vectors: its layers, radius and seed, how many vectors, and how they are kept apart, if at all.

    `n_steps` is the number of steps; None takes the default of `fit_vectors`.
    """

    source_layer: int
    target_layer: int
    radius: float
    n_vectors: int
    orthogonal: bool | Literal["soft"]
    seed: int
    n_steps: int | None = None
    optimizer: Optimizer = "power"

    @property
    def method(self) -> str:
        """The name of the kind of fit: "melbo" for free vectors, "orthogonal", "soft", or "adamw"."""
        if self.optimizer == "adamw":
            return "adamw"
        return "soft" if self.orthogonal == "soft" else "orthogonal" if self.orthogonal else "melbo"

    def fit(self, sliced: SlicedModel, batch_size: int | None = None) -> SteeringVectors:
        """The vectors, learned on a slice between these layers."""
        return fit_vectors(sliced, **_settings(self), batch_size=batch_size, progress=False)


@plain_fields
@dataclass(frozen=True)
class AdapterTrial:
    """One fit of adapters: its layers and seed, the mean norm of the updates, how many adapters, and their rank."""

    source_layer: int
    target_layer: int
    radius: float
    n_adapters: int
    rank: int
    seed: int
    diversity: float = 0.0
    n_steps: int | None = None

    method: ClassVar[str] = "adapters"

    @property
    def n_vectors(self) -> int:
        return self.n_adapters

    def fit(self, sliced: SlicedModel, batch_size: int | None = None) -> SteeringAdapters:
        """The adapters, learned on a slice between these layers."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # adapters with one effect show in the table
            return fit_adapters(sliced, **_settings(self), optimizer="power", batch_size=batch_size, progress=False)


@plain_fields
@dataclass(frozen=True)
class CpeTrial:
    """One fit of CPE: the first of its source layers and how many there are, the target, how many factors, and R."""

    source_layer: int
    target_layer: int
    n_factors: int
    seed: int
    n_layers: int = 4
    scale: float = 1.0
    n_steps: int = 10

    method: ClassVar[str] = "cpe"
    radius: ClassVar[float] = float("nan")  # factors of unit norm need none

    @property
    def n_vectors(self) -> int:
        return self.n_factors

    def fit(self, sliced: SlicedModel, batch_size: int | None = None) -> SteeringAdapters:
        """The factors, learned on a slice that begins at the first source layer."""
        settings = {"n_factors": self.n_factors, "seed": self.seed, "scale": self.scale, "n_steps": self.n_steps}
        most = self.target_layer - 1
        band = range(self.source_layer, min(self.source_layer + self.n_layers, most))
        layers = band_with(sliced.host, "attn", band, most)
        return fit_cpe(sliced, source_layers=layers, batch_size=batch_size, progress=False, **settings)


@plain_fields
@dataclass(frozen=True)
class DctTrial:
    """One fit of the exponential DCT: its layers, radius and seed, and how many factors."""

    source_layer: int
    target_layer: int
    radius: float
    n_factors: int
    seed: int
    orthogonalize: Literal["qr", "soft"] = "soft"
    n_steps: int = 10

    @property
    def method(self) -> str:
        """The name of the kind of fit: "dct", or "dct_qr" for factors that are orthogonal."""
        return "dct" if self.orthogonalize == "soft" else "dct_qr"

    @property
    def n_vectors(self) -> int:
        return self.n_factors

    def fit(self, sliced: SlicedModel, batch_size: int | None = None) -> SteeringVectors:
        """The factors, learned on a slice between these layers."""
        return fit_dct(sliced, **_settings(self), batch_size=batch_size, progress=False)


@plain_fields
@dataclass(frozen=True)
class JacobianTrial:
    """One fit of singular vectors: its layers, radius and seed, and how many vectors."""

    source_layer: int
    target_layer: int
    radius: float
    n_vectors: int
    seed: int
    n_steps: int = 8

    method: ClassVar[str] = "jacobian"

    def fit(self, sliced: SlicedModel, batch_size: int | None = None) -> SteeringVectors:
        """The singular vectors of the Jacobian of a slice between these layers."""
        return fit_jacobian(sliced, **_settings(self), batch_size=batch_size, progress=False)


@plain_fields
@dataclass(frozen=True)
class NoiseTrial:
    """Random vectors of this radius at the source layer, which nothing is learned for."""

    source_layer: int
    target_layer: int
    radius: float
    n_vectors: int
    seed: int

    method: ClassVar[str] = "noise"
    n_steps: ClassVar[int] = 0

    def fit(self, sliced: SlicedModel, batch_size: int | None = None) -> SteeringVectors:
        """The vectors, with what they change on a slice between these layers."""
        return noise_vectors(sliced, **_settings(self), batch_size=batch_size)


@plain_fields
@dataclass(frozen=True)
class ContrastiveTrial:
    """A difference of means of this radius: the supervised yardstick, since its prompts are labels."""

    source_layer: int
    target_layer: int
    radius: float
    positive: tuple[Any, ...]
    negative: tuple[Any, ...]
    seed: int = 0

    method: ClassVar[str] = "contrastive"
    n_vectors: ClassVar[int] = 1
    n_steps: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if isinstance(self.positive, str) or isinstance(self.negative, str):
            raise ValueError("positive and negative are sets of prompts: give tuples of texts or chats.")

    def fit(self, sliced: SlicedModel, batch_size: int | None = None) -> SteeringVectors:
        """The vector, with what it changes on a slice between these layers."""
        found = fit_contrastive(sliced.host, [*self.positive], [*self.negative], self.source_layer, radius=self.radius)
        provenance = {**found.provenance, **measured(vectors_on(sliced, batch_size), (found.values,), self.radius)}
        return replace(found, provenance=provenance)


AnyTrial: TypeAlias = Trial | AdapterTrial | CpeTrial | DctTrial | JacobianTrial | NoiseTrial | ContrastiveTrial


TRIALS: dict[str, type[AnyTrial]] = {
    "vectors": Trial,
    "adapters": AdapterTrial,
    "cpe": CpeTrial,
    "dct": DctTrial,
    "jacobian": JacobianTrial,
    "noise": NoiseTrial,
    "contrastive": ContrastiveTrial,
}


def trial_from(said: Mapping[str, Any]) -> AnyTrial:
    """Makes the trial that a mapping describes, as `trial_as` writes it and people write it in a plan.

    Args:
        said: "kind", a name in `TRIALS`, beside the settings of that kind.

    Raises:
        ValueError: the kind is unknown, or its settings are not these.
    """
    kind = said.get("kind", "vectors")
    if kind not in TRIALS:
        raise ValueError(f"kind={kind!r} must be one of {sorted(TRIALS)}.")
    known, settings = fields(TRIALS[kind]), {name: value for name, value in said.items() if name != "kind"}
    unknown = sorted(set(settings) - {field.name for field in known})
    missing = [field.name for field in known if field.default is MISSING and field.name not in settings]
    if unknown or missing:
        raise ValueError(
            f"a trial of kind {kind!r} has no setting {unknown}: choose from {[field.name for field in known]}."
            if unknown
            else f"a trial of kind {kind!r} needs {missing}."
        )
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    make: Any = TRIALS[kind]  # its settings are checked above, and their types where they are used
    return make(**given)


def trial_as(trial: AnyTrial) -> dict[str, Any]:
    """Describes a trial in JSON's types."""
    kind = next(name for name, cls in TRIALS.items() if type(trial) is cls)
    return {"kind": kind, **plain_json(asdict(trial), "trial")}


def _settings(trial: AnyTrial) -> dict[str, Any]:
    """The settings of a trial that its slice doesn't contain."""
    return {name: value for name, value in asdict(trial).items() if name not in ("source_layer", "target_layer")}
