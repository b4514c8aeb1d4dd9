"""Which radius?  The one at which the blocks between source and target stop being linear, or another stated rule."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from melbo_lens import hooks
from melbo_lens.manifolds import to_sphere
from melbo_lens.randomness import gaussian_rows
from melbo_lens.sliced_model import SlicedModel

Rule: TypeAlias = Literal["nonlinearity", "fraction"]
DEFAULT_TARGETS = {"nonlinearity": 0.5, "fraction": 0.35}
N_DIRECTIONS = 8


@dataclass(frozen=True)
class Calibration:
    """A radius with the curve it was solved on.

    Attributes:
        radius: the solution.
        curve: (radius, value) pairs, by radius.
        rule: which value the curve shows.
        target: the value asked for.
    """

    radius: float
    curve: tuple[tuple[float, float], ...]
    rule: str
    target: float


def solve_radius(sliced: SlicedModel, rule: Rule = "nonlinearity", target: float | None = None, seed: int = 0) -> Calibration:
    """The radius at which a rule reaches its target.

    "nonlinearity" solves, over random unit directions v, the rms of ``||D(R v) - R J v|| / ||R J v|| = target``, D the change of the target
    activations at the target positions and J v its directional derivative at 0. "fraction" takes that fraction of the mean norm of the
    stream that leaves the source block, at the prompts' own positions.

    Raises:
        ValueError: an unknown rule, a target that is not positive, or no finite radius that qualifies (the slice is linear).
    """
    if rule not in DEFAULT_TARGETS:
        raise ValueError(f"rule={rule!r} must be one of {sorted(DEFAULT_TARGETS)}.")
    wanted = DEFAULT_TARGETS[rule] if target is None else target
    if not 0 < wanted < float("inf"):
        raise ValueError(f"target={wanted} must be a positive, finite number.")
    batch = sliced.batch
    own = torch.arange(batch.tokens.shape[1], device=sliced.device) < batch.lengths[:, None]
    typical = float(sliced.resid.float().norm(dim=-1)[own].mean()) or 1.0  # only where to begin; a stream of zeros has no scale
    if rule == "fraction":
        return Calibration(wanted * typical, ((wanted * typical, wanted),), rule, wanted)
    directions = to_sphere(gaussian_rows(N_DIRECTIONS, sliced.d_model, seed, "calibration"), torch.ones(N_DIRECTIONS)).to(sliced.device)
    with hooks.frozen(sliced.model):
        linear = _directional_derivatives(sliced, directions)
        return _solve(lambda radius: _nonlinearity(sliced, directions, linear, radius), typical, wanted)


def _solve(value_at, typical: float, wanted: float) -> Calibration:
    """Bisects log R between the largest power of two below and the smallest above, starting from a tenth of the stream's norm."""
    curve: dict[float, float] = {}

    def value(radius: float) -> float:
        return curve.setdefault(radius, value_at(radius))

    low = high = 0.1 * typical
    while value(high) < wanted:
        low, high = high, 2 * high
        if high > 1e4 * typical:
            raise ValueError(
                f"no finite radius reaches nonlinearity {wanted}: it is {value(low):.2g} at {low:.3g}, so the blocks between source and target "
                "are linear. Give a radius, or put more blocks between."
            )
    while value(low) >= wanted and low > 1e-6 * typical:
        low, high = low / 2, low
    for _ in range(6):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if value(middle) < wanted else (low, middle)
    return Calibration((low * high) ** 0.5, tuple(sorted(curve.items())), "nonlinearity", wanted)


def _nonlinearity(sliced: SlicedModel, directions: Tensor, linear: Float[Tensor, "direction change"], radius: float) -> float:
    changes = _selected(sliced, radius * directions)
    expected = radius * linear
    ratios = (changes - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    return float(ratios.square().mean().sqrt())


def _selected(sliced: SlicedModel, vectors: Float[Tensor, "direction d_model"]) -> Float[Tensor, "direction change"]:
    """The change at all target positions of all prompts, one long row for each direction."""
    everyone = torch.arange(len(sliced.batch), device=sliced.device)
    with torch.no_grad():
        return torch.stack([sliced.change(v.expand(len(everyone), -1), everyone)[sliced.batch.target_mask].flatten() for v in vectors])


def _directional_derivatives(sliced: SlicedModel, directions: Float[Tensor, "direction d_model"]) -> Float[Tensor, "direction change"]:
    """J v by forward differentiation; attention takes its plain form, the only one that has it."""
    everyone = torch.arange(len(sliced.batch), device=sliced.device)
    rows = []
    with sdpa_kernel(SDPBackend.MATH):
        for v in directions:
            primal = torch.zeros_like(v)

            def change(bias: Tensor) -> Tensor:
                return sliced.change(bias.expand(len(everyone), -1), everyone)[sliced.batch.target_mask].flatten()

            rows.append(torch.func.jvp(change, (primal,), (v,))[1].detach())
    return torch.stack(rows)
