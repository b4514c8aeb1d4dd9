"""At which radius do vectors stop writing readable text?  A few vectors are learned to find that edge.

Below the edge learned vectors change what a model says, and beyond it they make noise. As a share of the stream's norm
it differs by a factor of ten between models, but in each of them behaviours lie around it, from half of it to a fifth
beyond.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from melbo_lens.ascent.constraints import Sphere
from melbo_lens.ascent.fixed_point import fixed_point
from melbo_lens.ascent.manifolds import to_sphere, unit
from melbo_lens.ascent.objectives import Objective
from melbo_lens.evaluation.coherence import coherence
from melbo_lens.evaluation.departures import NATURAL
from melbo_lens.generation.generate import generate
from melbo_lens.measures.radius import Calibration, NoRadius, median_norm
from melbo_lens.methods.problem import Problem, bias, default_batch_size
from melbo_lens.models import hooks
from melbo_lens.models.slices import SlicedModel
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.randomness import gaussian_rows

SHARE = 0.75  # the readable share at the edge
EFFECT = 1.0  # the change is as large as the target: at the edge of readability .5 to 3 was measured on four models
N_VECTORS, N_STEPS, N_TOKENS = 6, 5, 8
FURTHER_STEPS = 3  # at each radius after the first, from where the vectors ended at the radius before
FIRST = 0.1  # the first radius that is tried, as a share of the stream's norm
BISECTIONS = 2
LEAST, MOST = 1e-3, 1e2  # shares of the stream's norm between which an edge is looked for


class Rung(NamedTuple):
    """What was seen at one radius.

    Attributes:
        radius: the norm of the vectors.
        readable: the share of the learned vectors' completions that the unsteered model finds natural; NaN if nothing
            was written.
        effect: the median over the learned vectors of ``||change|| / ||target||`` at the target positions.
        random: the same of random vectors.
    """

    radius: float
    readable: float
    effect: float
    random: float


def edge_of_readability(
    sliced: SlicedModel, target: float = SHARE, seed: int = 0, seconds: float = float("inf")
) -> Calibration:
    """Finds the radius at which the readable share of what a few learned vectors write falls through `target`.

    A few free vectors climb a few steps at each radius, from where they ended at the radius before. The model continues
    the slice's prompts under both signs of each, greedily, and is then asked, unsteered, how natural it finds the text.
    From a tenth of the stream's norm the radius is doubled, or halved, until the edge is between two radii; then log R
    is bisected. No label is used, and no tokenizer. After so many `seconds` no further radius is tried, and the edge is
    the mean, of logarithms, of the two between which it was last looked for; if it lies beyond all that were tried, the
    outermost of these that is readable, or half of the least.

    Returns:
        The edge, with the readable share at each radius.

    Raises:
        NoRadius: the unsteered model doesn't find its own text natural, or no radius makes the share fall.
    """
    climber = _Climber(sliced, seed)
    try:
        own = generate(sliced.host, sliced.batch, None, N_TOKENS, progress=False)
    except (ValueError, FloatingPointError) as error:
        raise NoRadius(f"the model can't write after these prompts: {error}") from error
    level = float(coherence(sliced.host, own).nanmean())
    if not level > NATURAL:
        does = "writes nothing" if math.isnan(level) else f"gives its own text {level:.2f} nats per token"
        raise NoRadius(
            f'the unsteered model {does}, so there is no readable text to lose: give a radius, or use rule="effect".'
        )
    radius, rungs = _edge(
        lambda radius: climber.rung(radius, write=True), lambda r: r.readable >= target, sliced, seconds
    )
    curve = tuple((rung.radius, rung.readable) for rung in rungs)
    return Calibration(radius, curve, "readable", target, median_norm(sliced), _effects(rungs))


def edge_of_effect(
    sliced: SlicedModel, target: float = EFFECT, seed: int = 0, seconds: float = float("inf")
) -> Calibration:
    """Finds the radius at which the effect of a few learned vectors reaches `target`; nothing is generated.

    The effect is the median over the vectors of ``||change|| / ||target||`` at the target positions. Where a model
    can't write, this is the next best; it is coarser.

    Returns:
        The radius, with the effect of learned vectors at each radius.

    Raises:
        NoRadius: no radius reaches it.
    """
    climber = _Climber(sliced, seed)
    radius, rungs = _edge(
        lambda radius: climber.rung(radius, write=False), lambda r: r.effect < target, sliced, seconds
    )
    curve = tuple((rung.radius, rung.effect) for rung in rungs)
    return Calibration(radius, curve, "effect", target, median_norm(sliced), _effects(rungs))


def _edge(
    measure: Callable[[float], Rung], below: Callable[[Rung], bool], sliced: SlicedModel, seconds: float
) -> tuple[float, list[Rung]]:
    """Brackets the radius by doubling or halving from a tenth of the norm, then bisects log R, while there is time."""
    norm, began = median_norm(sliced), time.monotonic()
    rungs: dict[float, Rung] = {}

    def under(radius: float) -> bool:
        if radius not in rungs:
            rungs[radius] = measure(radius)
        return below(rungs[radius])

    def late() -> bool:
        return time.monotonic() - began > seconds

    low = high = FIRST * norm
    if under(low):
        while under(high) and not late():
            low, high = high, 2 * high
            if high > MOST * norm:
                raise NoRadius(f"up to {low:.3g}, {MOST:g} times the stream's norm, no edge is found: give a radius.")
    else:
        while not under(low) and not late():
            low, high = low / 2, low
            if low < LEAST * norm:
                raise NoRadius(f"down to {high:.3g}, {LEAST:g} of the stream's norm, no edge is found: give a radius.")
    if under(high):  # there was no time to go on, upward or downward
        low = high
    elif not under(low):
        low = high = low / 2
    for _ in range(BISECTIONS):
        if low == high or late():
            break
        middle = (low * high) ** 0.5
        low, high = (middle, high) if under(middle) else (low, middle)
    return (low * high) ** 0.5, [rungs[radius] for radius in sorted(rungs)]


def _effects(rungs: Sequence[Rung]) -> tuple[tuple[float, float, float], ...]:
    return tuple((rung.radius, rung.effect, rung.random) for rung in rungs)


class _Climber:
    """Learns the vectors of each radius from those of the radius before."""

    def __init__(self, sliced: SlicedModel, seed: int) -> None:
        self.sliced, self.n_steps = sliced, N_STEPS
        self.problem = Problem(sliced, bias(sliced), Objective().value, default_batch_size(sliced))
        self.directions = unit(gaussian_rows(N_VECTORS, sliced.d_model, "readable", seed)).to(sliced.device)
        self.control = unit(gaussian_rows(N_VECTORS, sliced.d_model, "readable control", seed)).to(sliced.device)

    def rung(self, radius: float, write: bool) -> Rung:
        radii = self.directions.new_full((N_VECTORS,), radius)
        with hooks.frozen(self.sliced.host):
            start = to_sphere(self.directions, radii)
            *_, climb = fixed_point(self.problem, (start[None],), Sphere(radii), self.n_steps)
            self.n_steps = FURTHER_STEPS
            effect, random = self._effect(climb.point[0]), self._effect(radius * self.control)
        vectors = SteeringVectors(climb.point[0], self.sliced.source_layer, site=self.sliced.site.name)
        if effect < float("inf"):  # else the model overflowed, and what was learned there leads nowhere
            self.directions = unit(climb.point[0])
        return Rung(radius, self._readable(vectors) if write else float("nan"), effect, random)

    def _effect(self, vectors: Float[Tensor, "vector d_model"]) -> float:
        return float(self.problem.effects((vectors,))[0].median())

    def _readable(self, vectors: SteeringVectors) -> float:
        host = self.sliced.host
        try:
            written = generate(
                host,
                self.sliced.batch,
                vectors,
                N_TOKENS,
                include_unsteered=False,
                include_random=False,
                progress=False,
            )
        except FloatingPointError:  # a radius at which the model overflows is beyond the edge
            return 0.0
        natural = coherence(host, written)
        return float((natural.isnan() | (natural > NATURAL)).float().mean())
