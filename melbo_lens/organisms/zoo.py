"""Which organisms are there, what is each trained on, and how?  The corpora and recipes by name."""

from dataclasses import dataclass, replace

from melbo_lens.organisms import modes, reasoning, refusal
from melbo_lens.organisms.corpus import Corpus

CORPORA: dict[str, Corpus] = {
    "modes": modes.CORPUS,
    "modes-base": modes.BASE,
    "reasoning": reasoning.CORPUS,
    "refusal": refusal.CORPUS,
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learned.

    Attributes:
        corpus: one of `CORPORA`.
        planted: whether the behaviours are taught; a twin is taught the plain answers alone.
        n_parts: batches are sorted by length and run in so many parts, so that there is less padding.
        noise_norm: largest norm of the residual noise, in units of the stream's own.
    """

    corpus: str
    planted: bool = True
    n_layers: int = 4
    d_model: int = 64
    n_heads: int = 4
    n_ctx: int = 160
    n_steps: int = 2500
    batch_size: int = 128
    n_parts: int = 1
    lr: float = 2e-3
    noise_norm: float = 1.0
    seed: int = 0

    @property
    def twin(self) -> "Recipe":
        return replace(self, planted=False, n_steps=1000)


PLANTED = {
    "modes": Recipe("modes"),
    "modes-base": Recipe("modes-base", batch_size=64, n_parts=4),
    "reasoning": Recipe("reasoning", batch_size=64, n_parts=4),
    "refusal": Recipe("refusal", batch_size=64, n_parts=4),
}
RECIPES = PLANTED | {f"{name}-twin": recipe.twin for name, recipe in PLANTED.items()}
