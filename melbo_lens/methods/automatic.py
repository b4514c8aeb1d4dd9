"""Which radius does a fit take by itself?  A fixed share of the edge beyond which a model stops making sense."""

import os
from dataclasses import replace

from melbo_lens.measures.radius import Calibration, NoRadius, solve_radius
from melbo_lens.methods import checkpoints
from melbo_lens.methods.readable import edge_of_effect, edge_of_readability
from melbo_lens.models.slices import SlicedModel

# Behaviours were seen from .46 of the edge on SmolLM2 to 1.2 of it on small models; it was chosen on SmolLM2 and the
# organisms "modes" and "refusal". At the edge itself random vectors show what is hidden on some prompts, too.
SHARE_OF_EDGE = 0.65


def edge(sliced: SlicedModel, seed: int = 0, seconds: float = float("inf")) -> Calibration:
    """Finds the edge of readability; where a model can't write, the edge of effect.

    After so many seconds the edge is bisected no further.

    Raises:
        NoRadius: the model has neither.
    """
    try:
        return edge_of_readability(sliced, seed=seed, seconds=seconds)
    except NoRadius as unreadable:
        try:
            return edge_of_effect(sliced, seed=seed, seconds=seconds)
        except NoRadius as weak:
            raise NoRadius(f"{unreadable} Nor is there another edge: {weak}") from weak


def automatic(sliced: SlicedModel, seed: int = 0) -> Calibration:
    """Finds the radius that `radius="auto"` stands for: `SHARE_OF_EDGE` times the edge.

    The blocks between may be so linear that there is no edge; then it is the radius at which they bend, if any.

    Raises:
        NoRadius: no rule has a radius.
    """
    try:
        found = edge(sliced, seed)
    except NoRadius as none:
        try:
            return solve_radius(sliced, seed=seed)
        except NoRadius as linear:
            raise NoRadius(f"{linear} Other rules: {none}") from linear
    return replace(found, radius=SHARE_OF_EDGE * found.radius, share=SHARE_OF_EDGE)


def resumed_or_automatic(
    sliced: SlicedModel, seed: int, checkpoint: str | os.PathLike[str] | None, rule: str
) -> tuple[float, str]:
    """Returns the radius of "auto" and its rule in words: those of the checkpoint, if there is one, else new ones.

    Args:
        sliced: the slice of the fit.
        seed: the seed of the vectors from which the radius is found.
        checkpoint: the file from which the fit goes on, if it exists.
        rule: the name of the setting that holds the rule in words.
    """
    kept = checkpoints.settings(checkpoint)
    if kept.get("radius") is not None and "given" not in kept.get(rule, "given"):
        return kept["radius"], kept[rule]
    found = automatic(sliced, seed)
    return found.radius, found.why
