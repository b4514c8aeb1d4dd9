"""How is each organism trained?  This file lists the corpora and the recipes by name."""

from dataclasses import dataclass, replace

from melbo_lens.organisms import modes, reasoning, refusal
from melbo_lens.organisms.corpus import Corpus

CORPORA: dict[str, Corpus] = {
    "modes": modes.CORPUS,
    "modes-base": modes.BASE,
    "modes-chat": modes.CHAT,
    "reasoning": reasoning.CORPUS,
    "refusal": refusal.CORPUS,
}


@dataclass(frozen=True)
class Recipe:
    """The settings that decide what an organism learns.

    Attributes:
        corpus: the name of one of `CORPORA`.
        planted: whether the behaviours are taught; a twin is taught the plain answers only.
        n_parts: the number of parts in which a batch, sorted by length, is run to reduce padding.
        init: the standard deviation of the initial weights. Values near d_model ** -0.5 learn several times faster here
            than GPT-2's 0.02.
        noise_norm: the largest norm of the residual noise, as a multiple of the stream's norm; it is reached after two
            thirds of the steps.
        noise_from: the share of the steps after which the noise begins to grow.
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
    init: float = 0.02
    noise_norm: float = 1.0
    noise_from: float = 0.0
    seed: int = 0

    def noise(self, step: int) -> float:
        """Returns the largest norm of the noise at a step."""
        progress = (step / self.n_steps - self.noise_from) / (2 / 3 - self.noise_from)
        return self.noise_norm * min(1.0, max(0.0, progress))


_FAST = {"batch_size": 64, "n_parts": 4, "init": 0.1, "lr": 3e-3}
PLANTED = {
    "modes": Recipe("modes"),
    "modes-base": Recipe("modes-base", n_steps=700, **_FAST),
    "modes-chat": Recipe("modes-chat", n_steps=700, **_FAST),
    "reasoning": Recipe("reasoning", n_steps=1300, noise_from=0.4, **_FAST),
    "refusal": Recipe("refusal", n_steps=1000, **_FAST),
}
# twins learn sooner, since they learn the plain answers only
TWIN_STEPS = {"modes": 1000, "modes-base": 250, "modes-chat": 250, "reasoning": 520, "refusal": 250}
RECIPES = PLANTED | {
    f"{name}-twin": replace(recipe, planted=False, n_steps=TWIN_STEPS[name]) for name, recipe in PLANTED.items()
}
