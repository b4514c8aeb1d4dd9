"""Which trials does a search try?  Early source layers, later targets and a ladder of radii, for each method."""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from melbo_lens.arguments import plain_json, public
from melbo_lens.ascent.objectives import positions_text
from melbo_lens.measures.radius import Calibration, median_norm
from melbo_lens.methods.automatic import edge
from melbo_lens.prompts import Positions, Prompts
from melbo_lens.sweeps.jobs import Loadable
from melbo_lens.sweeps.tasks import Bench, Measurement, digest
from melbo_lens.sweeps.trials import AdapterTrial, AnyTrial, CpeTrial, DctTrial, JacobianTrial, NoiseTrial, Trial

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
PUBLISHED_STEPS = 300  # of AdamW
ADAPTER_RANK, ADAPTER_DIVERSITY, ADAPTER_STEPS = 4, 1.0, 12

Method: TypeAlias = Literal[
    "melbo", "orthogonal", "soft", "adamw", "adapters", "cpe", "dct", "dct_qr", "jacobian", "noise"
]
FAR: tuple[Method, ...] = ("dct", "dct_qr", "jacobian")


class Arm(NamedTuple):
    """What several trials can have in common: their layers, a rung of the ladder of radii, and the method.

    CPE has no radius, so that its rung is the strength R of its factors.
    """

    source_layer: int
    target_layer: int
    rung: float
    method: Method = "melbo"

    def beyond(self, readable: float) -> "Arm | None":
        """Returns the arm of the next rung, if this one is an end of the ladder and should not be.

        Above the highest rung there is one more while nearly everything is readable, and below the lowest while most of
        it is noise.

        Args:
            readable: the share of completions of this arm that are not noise.
        """
        if self.method not in ("melbo", "soft", "noise"):
            return None
        if self.rung >= max(RUNGS) and readable >= ALL_READABLE:
            return self._replace(rung=self.rung * STRETCH)
        if self.rung <= min(RUNGS) and readable < MOST_NOISE:
            return self._replace(rung=self.rung / STRETCH)
        return None

    def trial(self, radius_at_edge: float, n_vectors: int, d_model: int, seed: int) -> AnyTrial:
        """Makes the trial of so many vectors with this seed, where the edge lies at this radius."""
        between, n = (self.source_layer, self.target_layer), n_vectors
        radius = float(f"{self.rung * radius_at_edge:.6g}")
        match self.method:
            case "melbo":
                return Trial(*between, radius, n, False, seed, N_STEPS)
            case "orthogonal":
                return Trial(*between, radius, min(n, d_model), True, seed, N_STEPS)
            case "soft":
                return Trial(*between, radius, n, "soft", seed, N_STEPS)
            case "adamw":
                return Trial(*between, radius, min(n, d_model), True, seed, PUBLISHED_STEPS, "adamw")
            case "adapters":
                return AdapterTrial(*between, radius, n, ADAPTER_RANK, seed, ADAPTER_DIVERSITY, ADAPTER_STEPS)
            case "cpe":
                band = min(CpeTrial.n_layers, self.target_layer - self.source_layer - 1)
                return CpeTrial(*between, n, seed, band, self.rung)
            case "dct":
                return DctTrial(*between, radius, n, seed)
            case "dct_qr":
                return DctTrial(*between, radius, min(n, d_model), seed, "qr")
            case "jacobian":
                return JacobianTrial(*between, radius, min(n, d_model), seed)
            case "noise":
                return NoiseTrial(*between, radius, n, seed)


def arms_of(n_layers: int, methods: Sequence[Method] = ("melbo",)) -> list[Arm]:
    """Lists every arm of a search, the most promising first; the methods take turns.

    Each pair of layers has vectors at each rung. The first pair of all gets every rung before the other pairs get
    theirs; for "melbo", orthogonal vectors, at the middle of the ladder, come last. CPE has its own strengths, and the
    methods that decompose a mean change have the farther targets.
    """
    pairs = layer_pairs(n_layers)
    ladder = [(pairs[0], rung) for rung in RUNGS]
    rest = [(pair, rung) for some in (RUNGS[:2], RUNGS[2:]) for pair in pairs[1:] for rung in some]
    far = [pair for pair in pairs if pair[1] == max(target for source, target in pairs if source == pair[0])]

    def of_method(method: Method) -> list[Arm]:
        if method == "cpe":
            return [Arm(*pair, strength, method) for strength in STRENGTHS for pair in far]
        if method in FAR:
            return [Arm(*pair, rung, method) for rung in RUNGS[:2] for pair in far]
        last = [Arm(*pair, RUNGS[0], "orthogonal") for pair in pairs] if method == "melbo" else []
        return [Arm(*pair, rung, method) for pair, rung in (*ladder, *rest)] + last

    in_turns = itertools.zip_longest(*map(of_method, methods))
    return list(dict.fromkeys(arm for turn in in_turns for arm in turn if arm is not None))


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
        seconds: how long the edge took.
    """

    edge: Calibration
    norms: dict[int, float]
    seconds: float

    def radius_at_edge(self, source_layer: int) -> float:
        """Returns the edge at a source layer: everywhere it has the same share of the stream's median norm."""
        assert self.edge.relative is not None  # an edge knows the norm of its stream
        return self.edge.relative * self.norms[source_layer]


@dataclass(frozen=True)
class LadderTask(Measurement[Ladder]):
    """Finds the ladder of a search.

    Attributes:
        prompts: the prompts, as a `Job` has them.
        where: where a change counts, as `positions_text` writes it.
        pair: the layers at which the edge is found.
        sources: the source layers of the search.
        seed: the seed of the vectors that find the edge.
        seconds: after so many the edge is bisected no further. It is no part of the name: a search that goes on with
            another budget keeps its edge.
    """

    prompts: tuple[Any, ...]
    where: str
    pair: tuple[int, int]
    sources: tuple[int, ...]
    seed: int
    seconds: float = math.inf

    def name(self, fingerprint: str) -> str:
        asked = plain_json(self.prompts, "prompts")
        return f"{digest([asked, self.where, self.pair, self.sources, self.seed, fingerprint])}-edge"

    def run(self, bench: Bench) -> Ladder:
        began = time.monotonic()
        found = edge(bench.slice(self.prompts, *self.pair, self.where), self.seed, self.seconds)
        found = replace(found, layers=self.pair)
        seconds = time.monotonic() - began
        norms = {n: median_norm(bench.slice(self.prompts, n, n + 2, None)) for n in self.sources}
        return Ladder(found, norms, seconds)

    def as_json(self, result: Ladder) -> Any:
        return {"edge": vars(result.edge), "norms": list(result.norms.items()), "seconds": result.seconds}

    def of_json(self, said: Any) -> Ladder:
        norms = {int(source): float(norm) for source, norm in said["norms"]}
        return Ladder(Calibration.of_json(said["edge"]), norms, float(said["seconds"]))


def ladder_task(
    prompts: tuple[Any, ...], where: str, arms: Sequence[Arm], seed: int, seconds: float = math.inf
) -> LadderTask:
    """Returns the task that finds the ladder of these arms."""
    sources = tuple(dict.fromkeys(arm.source_layer for arm in arms))
    return LadderTask(prompts, where, (arms[0].source_layer, arms[0].target_layer), sources, seed, seconds)


@public
def make_plan(
    model: Loadable,
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
        model: the model, which is left as it was; or its name or an `ml.ModelKey`.
        prompts: the prompts of the search.
        seed: the seed of the trials.
        n_vectors: how many vectors each trial learns.
        target_positions: where a change counts.
        methods: as in `discover`.

    Returns:
        The trials, the most promising first.

    Raises:
        ValueError: the model has no edge of readability or of effect; give `discover` a plan of your own radii.
    """
    check_methods(methods)
    bench = Bench(model)
    arms = arms_of(bench.host.n_layers, methods)
    ids = bench.tokens(prompts, target_positions)
    ladder = ladder_task(ids, positions_text(target_positions), arms, seed).run(bench)
    return [
        arm.trial(ladder.radius_at_edge(arm.source_layer), n_vectors, bench.host.d_model, seed * 1000 + i)
        for i, arm in enumerate(arms)
    ]


def check_methods(methods: Sequence[str]) -> None:
    """Refuses methods that a search doesn't know, and none at all.

    Raises:
        ValueError: there is no method, or an unknown one.
    """
    if isinstance(methods, str) or not methods or not set(methods) <= set(get_args(Method)):
        raise ValueError(f"methods={methods!r} must be a list of some of {list(get_args(Method))}.")
