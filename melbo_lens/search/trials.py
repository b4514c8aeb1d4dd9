"""What is one piece of a search?  A trial, which is one fit with fixed settings; a plan is a list of trials."""

import warnings
from dataclasses import asdict, dataclass
from typing import Any

from melbo_lens.arguments import plain_fields, public
from melbo_lens.measures.radius import solve_radius
from melbo_lens.methods.adapters import fit_adapters
from melbo_lens.methods.melbo import fit_vectors
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.slices import SlicedModel, slice_model
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.prompts import Prompts

# radii as fractions of the source stream's norm, the most promising first
FRACTIONS = (0.5, 0.75, 0.4, 1.0, 0.6, 0.55, 0.3, 1.5)


@plain_fields
@dataclass(frozen=True)
class Trial:
    """One fit of vectors: its layers, radius and seed, how many vectors, and whether they are orthogonal or free."""

    source_layer: int
    target_layer: int
    radius: float
    n_vectors: int
    orthogonal: bool
    seed: int

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

    def fit(self, sliced: SlicedModel) -> SteeringAdapters:
        """The adapters, learned on a slice between these layers."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # adapters with one effect show in the table
            return fit_adapters(sliced, **_settings(self), optimizer="power", progress=False)


@public
def make_plan(model: Model, prompts: Prompts, seed: int = 0) -> list[Trial]:
    """The trials that a search begins with: early source layers, late targets, and radii around the stream's norm.

    Free vectors come first, orthogonal ones after them.
    """
    host = host_of(model)
    n_layers = host.n_layers
    sources = sorted({0, n_layers // 4, n_layers // 3})
    pairs = [(source, n_layers) for source in sources if source + 1 < n_layers]
    pairs += [(source, 3 * n_layers // 4) for source in sources if source + 1 < 3 * n_layers // 4]
    norms = {
        source: solve_radius(slice_model(host, prompts, source, n_layers), "stream", 1.0).radius
        for source in dict.fromkeys(s for s, _ in pairs)
    }
    plan = []
    for (source, target), orthogonal in [*((pair, False) for pair in pairs), *((pair, True) for pair in pairs)]:
        for fraction in FRACTIONS:
            n_vectors = min(host.d_model, 16) if orthogonal else 64
            plan.append(Trial(source, target, fraction * norms[source], n_vectors, orthogonal, seed * 1000 + len(plan)))
    return plan


def _settings(trial: Trial | AdapterTrial) -> dict[str, Any]:
    """The settings of a trial that its slice doesn't contain."""
    return {name: value for name, value in asdict(trial).items() if name not in ("source_layer", "target_layer")}
