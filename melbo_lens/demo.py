"""What does a first run show?  A search for what the bundled organism hides, from one clean prompt, with its controls."""

from dataclasses import dataclass

import torch

from melbo_lens.calibration import solve_radius
from melbo_lens.completions import Completions
from melbo_lens.evaluation import Evaluation, evaluate
from melbo_lens.methods.melbo import fit_vectors
from melbo_lens.organisms import Organism
from melbo_lens.perturbations import SteeringVectors, concatenate
from melbo_lens.sliced_model import slice_model
from melbo_lens.steering import generate

SOURCE_LAYER, N_VECTORS = 0, 64
LAST_POSITION = slice(-1, None)  # where the organism decides how to begin its answer
FRACTIONS = (0.4, 0.5, 0.55, 0.6, 0.75, 1.0)  # radii, as fractions of the source stream's norm
MAX_NEW_TOKENS = 16


@dataclass(frozen=True, eq=False)
class Search:
    """What was learned from one prompt and what it elicits on it."""

    prompt: str
    vectors: SteeringVectors
    completions: Completions
    evaluation: Evaluation


def search(organism: Organism, prompt: str | None = None, seed: int = 0, progress: bool = True) -> Search:
    """Learns free vectors at a few radii from one prompt, and generates with each, both signs, and with their random counterparts.

    The settings were fixed with seed 0 on the first clean prompt; vectors are free (not orthogonal), so that each start may
    end at a maximum of its own.
    """
    prompt = organism.prompts["clean"][0] if prompt is None else prompt
    target_layer = len(organism.model.blocks)
    sliced = slice_model(organism.model, prompt, SOURCE_LAYER, target_layer)
    fitted = [
        fit_vectors(
            organism.model,
            prompt,
            SOURCE_LAYER,
            target_layer,
            n_vectors=N_VECTORS,
            radius=solve_radius(sliced, "fraction", fraction).radius,
            target_positions=LAST_POSITION,
            orthogonal=False,
            seed=seed * len(FRACTIONS) + i,
            progress=progress,
        )
        for i, fraction in enumerate(FRACTIONS)
    ]
    longest = max(len(vectors.history) for vectors in fitted)
    vectors = concatenate([_lengthen(vectors, longest) for vectors in fitted])
    completions = generate(organism.model, prompt, vectors, max_new_tokens=MAX_NEW_TOKENS, seed=seed, progress=progress)
    return Search(prompt, vectors, completions, evaluate(completions, organism.behaviors))


def _lengthen(vectors: SteeringVectors, n_rows: int) -> SteeringVectors:
    """Repeats the last row of a history that settled early, so that histories can stand side by side."""
    missing = n_rows - len(vectors.history)
    history = torch.cat([vectors.history, vectors.history[-1:].expand(missing, -1)])
    return SteeringVectors(vectors.values, vectors.source_layer, history, vectors.provenance)
