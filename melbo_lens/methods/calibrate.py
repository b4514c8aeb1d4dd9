"""Which radius should vectors have, by which rule?  `calibrate_radius`: the door to all rules."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeAlias

from melbo_lens.arguments import positive, public
from melbo_lens.measures.radius import Calibration, solve_radius
from melbo_lens.methods.readable import EFFECT, SHARE, edge_of_effect, edge_of_readability
from melbo_lens.models.access import Model
from melbo_lens.models.slices import SlicedModel
from melbo_lens.models.slicing import as_slice, opened
from melbo_lens.prompts import Positions, Prompts

AnyRule: TypeAlias = Literal["readable", "effect", "nonlinearity", "fraction", "stream", "kl"]
# each rule by its name: of a slice, a target (None: its own default) and a seed
RULES: dict[str, Callable[[SlicedModel, float | None, int], Calibration]] = {
    "readable": lambda sliced, target, seed: edge_of_readability(sliced, target or SHARE, seed),
    "effect": lambda sliced, target, seed: edge_of_effect(sliced, target or EFFECT, seed),
    "nonlinearity": lambda sliced, target, seed: solve_radius(sliced, "nonlinearity", target, seed),
    "fraction": lambda sliced, target, seed: solve_radius(sliced, "fraction", target, seed),
    "stream": lambda sliced, target, seed: solve_radius(sliced, "stream", target, seed),
    "kl": lambda sliced, target, seed: solve_radius(sliced, "kl", target, seed),
}


@public
def calibrate_radius(
    model: Model | SlicedModel,
    prompts: Prompts | None = None,
    source_layer: int | None = None,
    target_layer: int | None = None,
    rule: AnyRule = "readable",
    target: float | None = None,
    target_positions: Positions | None = None,
    target_hook: str | None = None,
    seed: int = 0,
    site: str | None = None,
) -> Calibration:
    """Chooses a radius by a stated rule, without looking at behaviours.

    Args:
        model, prompts, source_layer, target_layer, target_positions, target_hook, site: as in `slice_model`; or a
            slice in the model's place, which says them itself.
        rule: "readable" (the share of learned vectors' short completions that the unsteered model finds natural falls
            through `target`: behaviours were seen from half of that radius to a fifth beyond it), "effect" (learned
            vectors change the target by so much of its norm), "nonlinearity" (the blocks between source and target stop
            being linear), "fraction" (a fraction of the norm of the activation to which vectors are added, as
            published), "stream" (a fraction of the source stream's norm) or "kl" (how far random vectors of that norm
            move the next-token distribution).
            Norms are medians over positions.  See `edge_of_readability`, `edge_of_effect` and `solve_radius`.
        target: the value that the rule must reach; by default 0.75, 1, 0.5, 0.35 and 0.05 of the norms, and 0.1 nats.
        seed: the seed of the random directions.

    Returns:
        The radius, and the curve on which it was solved. Of "readable" it is the edge itself, of which `radius="auto"`
        of a fit takes 0.65.

    Raises:
        TypeError, ValueError: the rule is unknown, the target is not a positive, finite number, no finite radius
            qualifies, or prompts or layers are missing or stand beside a slice that says them.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} must be one of {sorted(RULES)}.")
    if target is not None:
        positive("target", target, "")
    sliced = as_slice(opened(model), prompts, source_layer, target_layer, target_positions, target_hook, site)
    found = RULES[rule](sliced, target, seed)
    return found if sliced.target_layer is None else replace(found, layers=(sliced.source_layer, sliced.target_layer))
