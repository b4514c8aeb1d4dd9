"""What is one piece of a search?  A trial, which is one fit with fixed settings; a plan is a list of trials."""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

from melbo_lens.arguments import plain_fields, public
from melbo_lens.measures.radius import Calibration, median_norm
from melbo_lens.methods.adapters import fit_adapters
from melbo_lens.methods.automatic import edge
from melbo_lens.methods.cpe import fit_cpe
from melbo_lens.methods.dct import fit_dct
from melbo_lens.methods.melbo import fit_vectors
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.host import Host
from melbo_lens.models.slices import SlicedModel, slice_model
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.prompts import Positions, Prompts

# The most promising come first. Layers are shares of the depth; radii are shares of the edge of readability. On SmolLM2
# an early, near target found as much with each vector as a far one, and its fits take half of the time.
SOURCES, TARGETS = (0.1, 0.17, 0.23), (0.33, 0.53)
MOST_BETWEEN = 3  # so many blocks lie between source and target, if the model has them
RUNGS = (0.6, 0.9, 0.4, 1.25)
# The ladder is longer where it doesn't reach from readable text to noise; the edge was found with a few vectors only.
STRETCH, ALL_READABLE, MOST_NOISE = 1.5, 0.9, 0.5
N_STEPS = 4  # more of them cost time and diversity: free vectors then gather at the loudest change
N_VECTORS = 24
STRENGTHS = (1.0, 2.0)  # of CPE


@plain_fields
@dataclass(frozen=True)
class Trial:
    """One fit of vectors: its layers, radius and seed, how many vectors, and whether they are orthogonal or free.

    `n_steps` is the number of steps; None takes the default of `fit_vectors`.
    """

    source_layer: int
    target_layer: int
    radius: float
    n_vectors: int
    orthogonal: bool
    seed: int
    n_steps: int | None = None

    method: ClassVar[str] = "melbo"

    def fit(self, sliced: SlicedModel) -> SteeringVectors:
        """The vectors, learned on a slice between these layers."""
        return fit_vectors(sliced, **_settings(self), progress=False)


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

    method: ClassVar[str] = "adapters"

    @property
    def n_vectors(self) -> int:
        return self.n_adapters

    def fit(self, sliced: SlicedModel) -> SteeringAdapters:
        """The adapters, learned on a slice between these layers."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # adapters with one effect show in the table
            return fit_adapters(sliced, **_settings(self), optimizer="power", progress=False)


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

    def fit(self, sliced: SlicedModel) -> SteeringAdapters:
        """The factors, learned on a slice that begins at the first source layer."""
        settings = {"n_factors": self.n_factors, "seed": self.seed, "scale": self.scale, "n_steps": self.n_steps}
        band = range(self.source_layer, self.source_layer + self.n_layers)
        return fit_cpe(sliced, source_layers=[*band], progress=False, **settings)


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

    method: ClassVar[str] = "dct"

    @property
    def n_vectors(self) -> int:
        return self.n_factors

    def fit(self, sliced: SlicedModel) -> SteeringVectors:
        """The factors, learned on a slice between these layers."""
        return fit_dct(sliced, **_settings(self), progress=False)


AnyTrial: TypeAlias = Trial | AdapterTrial | CpeTrial | DctTrial
Method: TypeAlias = Literal["melbo", "cpe", "dct"]


class Arm(NamedTuple):
    """What several trials can have in common: their layers, a rung of the ladder of radii, and the method.

    CPE has no radius, so that its rung is the strength R of its factors.
    """

    source_layer: int
    target_layer: int
    rung: float
    orthogonal: bool
    method: Method = "melbo"

    def beyond(self, readable: float) -> "Arm | None":
        """Returns the arm of the next rung, if this one is an end of the ladder and should not be.

        Above the highest rung there is one more while nearly everything is readable, and below the lowest while most of
        it is noise.

        Args:
            readable: the share of completions of this arm that are not noise.
        """
        if self.orthogonal or self.method != "melbo":
            return None
        if self.rung >= max(RUNGS) and readable >= ALL_READABLE:
            return self._replace(rung=self.rung * STRETCH)
        if self.rung <= min(RUNGS) and readable < MOST_NOISE:
            return self._replace(rung=self.rung / STRETCH)
        return None

    def trial(self, radius_at_edge: float, n_vectors: int, d_model: int, seed: int) -> AnyTrial:
        """Makes the trial of so many vectors with this seed, where the edge lies at this radius."""
        n_vectors = min(n_vectors, d_model) if self.orthogonal else n_vectors
        radius = float(f"{self.rung * radius_at_edge:.6g}")
        if self.method == "cpe":
            band = min(CpeTrial.n_layers, self.target_layer - self.source_layer - 1)
            return CpeTrial(self.source_layer, self.target_layer, n_vectors, seed, band, self.rung)
        if self.method == "dct":
            return DctTrial(self.source_layer, self.target_layer, radius, n_vectors, seed)
        return Trial(self.source_layer, self.target_layer, radius, n_vectors, self.orthogonal, seed, N_STEPS)


def arms_of(n_layers: int, methods: Sequence[Method] = ("melbo",)) -> list[Arm]:
    """Lists every arm of a search, the most promising first; the methods take turns.

    Each pair of layers has free vectors at each rung. The first pair of all gets every rung before the other pairs get
    theirs; orthogonal vectors, at the middle of the ladder, come last. CPE and DCT have the farther targets.
    """
    pairs = layer_pairs(n_layers)
    ladder = [(pairs[0], rung) for rung in RUNGS]
    rest = [(pair, rung) for some in (RUNGS[:2], RUNGS[2:]) for pair in pairs[1:] for rung in some]
    free = [Arm(*pair, rung, False) for pair, rung in (*ladder, *rest)]
    far = [pair for pair in pairs if pair[1] == max(target for _, target in pairs)]
    of_method: dict[Method, list[Arm]] = {
        "melbo": [*free, *(Arm(*pair, RUNGS[0], True) for pair in pairs)],
        "cpe": [Arm(*pair, strength, False, "cpe") for strength in STRENGTHS for pair in far],
        "dct": [Arm(*pair, rung, False, "dct") for rung in RUNGS[:2] for pair in far],
    }
    in_turns = itertools.zip_longest(*(of_method[method] for method in methods))
    return [arm for turn in in_turns for arm in turn if arm is not None]


def layer_pairs(n_layers: int) -> list[tuple[int, int]]:
    """Lists pairs of an early source and a later target layer, with some blocks between them.

    Raises:
        ValueError: the model has a single block, and no block lies between a source and a target.
    """
    pairs: dict[tuple[int, int], None] = {}
    for target_share, source_share in itertools.product(TARGETS, SOURCES):
        source = min(round(source_share * n_layers), n_layers - 2)
        target = min(max(round(target_share * n_layers), source + 1 + MOST_BETWEEN), n_layers)
        if source >= 0:
            pairs[source, target] = None
    if not pairs:
        raise ValueError(f"the model has {n_layers} block, and a search needs one between its source and its target.")
    return list(pairs)


class Ladder(NamedTuple):
    """The edge of a model, from which the radii of every trial follow.

    Attributes:
        edge: the edge, as it was found at the first pair of layers.
        norms: by source layer, the median norm of its stream.
    """

    edge: Calibration
    norms: dict[int, float]

    def radius_at_edge(self, source_layer: int) -> float:
        """Returns the edge at a source layer: everywhere it has the same share of the stream's median norm."""
        assert self.edge.relative is not None  # an edge knows the norm of its stream
        return self.edge.relative * self.norms[source_layer]


@public
def make_plan(
    model: Model,
    prompts: Prompts,
    seed: int = 0,
    *,
    n_vectors: int = N_VECTORS,
    target_positions: Positions = slice(-1, None),
    methods: Sequence[Method] = ("melbo",),
) -> list[AnyTrial]:
    """The trials that a search of every arm begins with: early source layers, later targets, a ladder of radii.

    The radii lie around the edge of readability (`calibrate_radius`), which is found at the first pair of layers.

    Args:
        model: the model, which is left as it was.
        prompts: the prompts of the search.
        seed: the seed of the trials.
        n_vectors: how many vectors each trial learns.
        target_positions: where a change counts.
        methods: as in `discover`.

    Raises:
        ValueError: the model has no edge of readability or of effect; give `discover` a plan of your own radii.
    """
    check_methods(methods)
    host = host_of(model)
    arms = arms_of(host.n_layers, methods)
    sliced = slice_model(host, prompts, arms[0].source_layer, arms[0].target_layer, target_positions)
    ladder = Ladder(edge(sliced, seed), norms_of(host, prompts, arms))
    return [
        arm.trial(ladder.radius_at_edge(arm.source_layer), n_vectors, host.d_model, seed * 1000 + i)
        for i, arm in enumerate(arms)
    ]


def norms_of(host: Host, prompts: Prompts, arms: list[Arm]) -> dict[int, float]:
    """Measures the median norm of the stream that leaves each source layer."""
    sources = dict.fromkeys(arm.source_layer for arm in arms)
    return {source: median_norm(slice_model(host, prompts, source, source + 2)) for source in sources}


def check_methods(methods: Sequence[str]) -> None:
    """Refuses methods that a search doesn't know, and none at all.

    Raises:
        ValueError: there is no method, or an unknown one.
    """
    if isinstance(methods, str) or not methods or not set(methods) <= set(get_args(Method)):
        raise ValueError(f"methods={methods!r} must be a list of some of {list(get_args(Method))}.")


def _settings(trial: AnyTrial) -> dict[str, Any]:
    """The settings of a trial that its slice doesn't contain."""
    return {name: value for name, value in asdict(trial).items() if name not in ("source_layer", "target_layer")}
