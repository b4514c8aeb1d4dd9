"""Which radius should vectors have?  The one where the blocks up to the target stop being linear, or another rule's."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from melbo_lens import tables
from melbo_lens.ascent.manifolds import unit
from melbo_lens.memory import is_out_of_memory
from melbo_lens.models import hooks
from melbo_lens.models.slices import SlicedModel
from melbo_lens.perturbations.sites import Hook
from melbo_lens.randomness import gaussian_rows

Rule: TypeAlias = Literal["nonlinearity", "fraction", "stream", "kl"]  # what `solve_radius` knows
Reduction: TypeAlias = Literal["every", "mean"]
Read: TypeAlias = Callable[[Float[Tensor, " d_model"]], Float[Tensor, " change"]]  # the change that a vector makes
DEFAULT_TARGETS = {"nonlinearity": 0.5, "fraction": 0.35, "stream": 0.05, "kl": 0.1}
N_DIRECTIONS = 8
STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)  # of central differences, as shares of the stream's norm
AGREEMENT = 0.05  # the largest relative difference between the estimates of two neighbouring steps
HALF_STEPS, HALF_AGREEMENT = (0.5, 0.3, 0.15, 0.1), 0.35  # in half precision, where rounding drowns smaller steps
NEARLY_LINEAR = 0.1  # blocks whose nonlinearity stays below this at every radius have no radius


@dataclass(frozen=True, repr=False)
class Calibration:
    """A radius, with the curve on which it was solved.

    Attributes:
        radius: the solution.
        curve: (radius, value) pairs in the order of the radius.
        rule: the rule whose value the curve shows.
        target: the value that was to be reached.
        norm: the median norm of the stream that leaves the source block, at the prompts' own positions.
        share: the share of the solution that `radius` is; below 1 it stays short of an edge.
        layers: the source and the target layer where it was solved, if they are known.
        effects: of rules that learn vectors, (radius, learned, random) in the order of the radius: the median over the
            vectors of ``||change|| / ||target||`` at the target positions, for learned and for random vectors.
    """

    radius: float
    curve: tuple[tuple[float, float], ...]
    rule: str
    target: float
    norm: float | None = None
    effects: tuple[tuple[float, float, float], ...] = ()
    share: float = 1.0
    layers: tuple[int, int] | None = None

    @property
    def why(self) -> str:
        """The rule in a few words, as the provenance of a fit names it."""
        return f"{self.rule} {self.target:.3g}" + ("" if self.share == 1 else f", {self.share:g} of its radius")

    @property
    def relative(self) -> float | None:
        """The radius as a share of the stream's median norm, by which models can be compared."""
        return None if self.norm is None else self.radius / self.norm

    @classmethod
    def of_json(cls, said: Mapping[str, Any]) -> "Calibration":
        """Makes a calibration from its attributes as JSON keeps them, with lists for tuples and null for NaN.

        Raises:
            KeyError, TypeError, ValueError: they are something else.
        """
        rows = {
            name: tuple(tuple(math.nan if value is None else float(value) for value in row) for row in said[name])
            for name in ("curve", "effects")
            if name in said
        }
        layers = None if said.get("layers") is None else tuple(map(int, said["layers"]))
        return cls(**{**said, **rows, "layers": layers})

    def _repr_html_(self) -> str:
        table = pd.DataFrame(self.curve, columns=["radius", self.rule])
        if self.effects:
            table[["effect", "random effect"]] = [row[1:] for row in self.effects]
        return tables.html(repr(self), table)

    def __repr__(self) -> str:
        share = "" if self.relative is None else f", {self.relative:.3g} of the stream's norm"
        tried = f"{len(self.curve)} radii tried"
        return f"Calibration(radius {self.radius:.4g}{share}: {self.rule} {self.target:g}, {tried})"


class NoRadius(ValueError):
    """No finite radius reaches what a rule asks for."""


def check_rule(rule: str, target: float | None) -> None:
    """Refuses an unknown rule, and a target that is not a positive, finite number."""
    if rule not in DEFAULT_TARGETS:
        raise ValueError(f"rule={rule!r} must be one of {sorted(DEFAULT_TARGETS)}.")
    if target is not None and not 0 < target < float("inf"):
        raise ValueError(f"target={target} must be a positive, finite number.")


def solve_radius(
    sliced: SlicedModel,
    rule: Rule = "nonlinearity",
    target: float | None = None,
    seed: int = 0,
    reduction: Reduction = "every",
) -> Calibration:
    """The radius R at which a rule reaches its target, measured along random unit directions v.

    - "nonlinearity": the rms over v of ``||D(R v) - R J v|| / ||R J v||``. Here D is the change of the target
      activations and J v its directional derivative at 0, both in float32. By `reduction`, D has the changes at "every"
      target position of every prompt, or is their "mean" over positions and prompts, as for DCT. Where the curve
      levels off below the default target, half of that level becomes the target. The curve of a mixture of experts
      jumps at tiny radii, where a token changes its expert; there the last rise counts, or the lowest point of the
      curve.
    - "fraction": R is the target times the median norm of the activation to which vectors are added (the MLP output),
      over the prompts' own positions. The post's code has a mean there, which in many models is that of an attention
      sink.
    - "stream": the same of the stream that leaves the source block.
    - "kl": the mean over v and prompts of ``KL(clean || steered)`` between the next-token distributions after each
      prompt, in nats.

    Raises:
        ValueError: the rule is unknown, or the target is not a positive, finite number.
        NoRadius: no finite radius qualifies, usually because the slice is nearly linear.
    """
    check_rule(rule, target)
    wanted = DEFAULT_TARGETS[rule] if target is None else target
    norm = median_norm(sliced)
    if rule in ("fraction", "stream"):
        of = norm if rule == "stream" else _norm_of_source(sliced)
        return Calibration(wanted * of, ((wanted * of, wanted),), rule, wanted, norm)
    directions = unit(gaussian_rows(N_DIRECTIONS, sliced.d_model, seed, "calibration")).to(sliced.device)
    with hooks.frozen(sliced.host):
        if rule == "kl":
            clean = _next_token_log_probs(sliced, None)
            kl = _solve(lambda radius: _kl(sliced, clean, radius * directions), norm, wanted, rule, False)
            return replace(kl, norm=norm)
        exact = sliced.in_float32()
        change = _change_of(exact, reduction)
        linear = _directional_derivatives(exact, change, directions)
        bent = _solve(
            lambda radius: _nonlinearity(change, directions, linear, radius), norm, wanted, rule, target is None
        )
        return replace(bent, norm=norm)


def median_norm(sliced: SlicedModel) -> float:
    """Measures the median norm of the stream that leaves the source block, at the prompts' own positions.

    A median leaves out the massive activations that many models have at the first position. It is 1 if all are zero.
    """
    return float(sliced.resid.float().norm(dim=-1)[sliced.batch.own].median()) or 1.0


def _norm_of_source(sliced: SlicedModel) -> float:
    """Measures the median norm of the activation to which the slice's vectors are added."""
    assert sliced.source_call is not None and sliced.entry is not None  # `slice_model` recorded them
    seen: list[Tensor] = []
    read = (sliced.source_hook, lambda activation, hook: seen.append(activation))
    with hooks.frozen(sliced.host), torch.no_grad(), hooks.attached(sliced.host, [read]):
        sliced.source_call(sliced.entry, sliced.everyone, len(sliced.batch))
    return float(seen[0].to(sliced.device).float().norm(dim=-1)[sliced.batch.own].median()) or 1.0


def _solve(
    value_at: Callable[[float], float], typical: float, wanted: float, rule: Rule, may_lower: bool
) -> Calibration:
    """Brackets the solution by doublings from a tenth of the stream's norm, then bisects log R."""
    curve: dict[float, float] = {}

    def value(radius: float) -> float:
        return curve.setdefault(radius, value_at(radius))

    def solved() -> float:
        low = high = 0.1 * typical
        while value(low) >= wanted and low > 1e-6 * typical:
            if value(low / 2) > value(low):  # the curve jumps at small radii; what counts is where it rises for good
                low = high = min(
                    (0.1 * 2**i * typical for i in range(10)),
                    key=lambda radius: (value(radius) >= wanted, value(radius)),
                )
                if value(low) >= wanted:
                    return low
                break
            low, high = low / 2, low
        while value(high) < wanted:
            low, high = high, 2 * high
            if high > 1e4 * typical:
                raise NoRadius(
                    f"no finite radius reaches {rule} {wanted:.3g}: it is {value(low):.2g} at {low:.3g}, so the "
                    "blocks between source and target "
                    "are (nearly) linear. Give a radius, or put more blocks between."
                )
        for _ in range(6):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if value(middle) < wanted else (low, middle)
        return (low * high) ** 0.5

    try:
        radius = solved()
    except NoRadius:
        level = max(curve.values())
        if not may_lower or level < NEARLY_LINEAR:
            raise
        wanted = level / 2
        radius = solved()
    return Calibration(radius, tuple(sorted(curve.items())), rule, wanted)


def _change_of(sliced: SlicedModel, reduction: Reduction) -> Read:
    """The function from a vector to what it changes: one long row of numbers."""
    everyone, mask = sliced.everyone, sliced.batch.target_mask

    def change(vector: Tensor) -> Tensor:
        at_targets = sliced.change(vector.expand(len(everyone), -1), everyone)
        if reduction == "every":
            return at_targets[mask].flatten()
        return (at_targets * (mask / mask.sum(1, keepdim=True))[..., None]).sum(1).mean(0)

    return change


def _nonlinearity(change: Read, directions: Tensor, linear: Float[Tensor, "direction change"], radius: float) -> float:
    """The rms over directions of the relative difference between the changes and their linear approximation."""
    changes = _changes(change, radius * directions)
    expected = radius * linear
    ratios = (changes - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    return float(ratios.square().mean().sqrt())


def _changes(change: Read, vectors: Float[Tensor, "direction d_model"]) -> Float[Tensor, "direction change"]:
    with torch.no_grad():
        return torch.stack([change(vector) for vector in vectors])


def _directional_derivatives(
    sliced: SlicedModel, change: Read, directions: Float[Tensor, "direction d_model"]
) -> Float[Tensor, "direction change"]:
    """J v by forward differentiation, or by differences if an operation has no forward derivative.

    Some mixtures of experts have such operations. The kernels of quantised weights lack one without saying so.
    """
    if sliced.host.quantised:
        return _central_differences(sliced, change, directions, NotImplementedError("the weights are quantised"))
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the only form of attention that has a forward derivative
            return torch.stack([torch.func.jvp(change, (torch.zeros_like(v),), (v,))[1].detach() for v in directions])
    except (NotImplementedError, RuntimeError) as missing:
        if is_out_of_memory(missing):
            raise
        return _central_differences(sliced, change, directions, missing)


def _central_differences(
    sliced: SlicedModel, change: Read, directions: Float[Tensor, "direction d_model"], missing: Exception
) -> Float[Tensor, "direction change"]:
    """The derivative ``(D(h v) - D(-h v)) / 2 h`` at the step h where two neighbouring steps agree best.

    Steps are shares of the median norm of the stream.

    Raises:
        NoRadius: no two neighbouring steps agree to within `AGREEMENT` (in half precision, `HALF_AGREEMENT`).
    """
    typical = median_norm(sliced)
    # a slice that needs the model's own hooks has no float32 copy, so it may still be in half precision; and some
    # quantised weights round what they are given
    exact = sliced.resid.dtype in (torch.float32, torch.float64) and not sliced.host.quantised
    steps, agreement = (STEPS, AGREEMENT) if exact else (HALF_STEPS, HALF_AGREEMENT)
    estimates = []
    for step in (share * typical for share in steps):
        estimates.append((_changes(change, step * directions) - _changes(change, -step * directions)) / (2 * step))
    apart = [
        float((larger - smaller).norm() / smaller.norm().clamp(min=1e-30))
        for larger, smaller in itertools.pairwise(estimates)
    ]
    best = min(range(len(apart)), key=apart.__getitem__)
    if not apart[best] <= agreement:
        raise NoRadius(
            f"the blocks between have no forward derivative ({str(missing).splitlines()[0]}), and differences "
            f"disagree by {apart[best]:.0%} between "
            'the best two steps: give a radius, or calibrate one with rule="kl".'
        ) from missing
    return estimates[best + 1]


def _kl(
    sliced: SlicedModel, clean: Float[Tensor, "prompt d_vocab"], vectors: Float[Tensor, "direction d_model"]
) -> float:
    values = [divergence(clean, _next_token_log_probs(sliced, vector)).mean() for vector in vectors]
    return float(torch.stack(values).mean())


def divergence(clean: Tensor, steered: Tensor) -> Float[Tensor, " prompt"]:
    """``KL(clean || steered)`` of log-probabilities, in nats; a token that is impossible in `clean` adds nothing."""
    return torch.where(clean > -torch.inf, clean.exp() * (clean - steered), torch.zeros_like(clean)).sum(-1)


def _next_token_log_probs(
    sliced: SlicedModel, vector: Float[Tensor, " d_model"] | None
) -> Float[Tensor, "prompt d_vocab"]:
    """The next-token log-probabilities after each prompt, with the vector added if there is one."""
    added: list[Hook] = []
    if vector is not None:

        def add(activation: Tensor, hook: Any) -> Tensor:
            return (activation + vector.to(activation.device)).to(activation.dtype)

        added.append((sliced.source_hook, add))
    with torch.no_grad(), hooks.attached(sliced.host, added):
        logits = sliced.host.forward(sliced.batch.tokens)
    after = logits[sliced.everyone, sliced.batch.lengths - 1].float()
    hooks.check_finite(
        sliced.host, after, ["the unsteered model" if vector is None else "a random vector"] * len(after), "the logits"
    )
    return after.log_softmax(-1)
