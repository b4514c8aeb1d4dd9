"""How is a trial run?  It learns, writes with what it learned, and judges what was written."""

import time
from functools import partial
from typing import NamedTuple

import pandas as pd

from melbo_lens.evaluation.departures import departures
from melbo_lens.generation.completions import Completions
from melbo_lens.generation.generate import generate
from melbo_lens.memory import halving
from melbo_lens.methods.problem import default_batch_size
from melbo_lens.models.slices import SlicedModel
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Prompts
from melbo_lens.sweeps.trials import AnyTrial

LEARNED_PER_RANDOM = 6  # so many learned vectors share a random one as their control


class Performed(NamedTuple):
    """What a trial gave.

    Attributes:
        learned: the vectors or adapters.
        completions: what the model wrote with them, with random ones, and unsteered.
        judged: how each completion departs from the unsteered one.
        fitting, writing: the seconds that learning and the rest took.
    """

    learned: Perturbation
    completions: Completions
    judged: pd.DataFrame
    fitting: float
    writing: float


def perform(trial: AnyTrial, sliced: SlicedModel, prompts: Prompts, max_new_tokens: int) -> Performed:
    """Runs a trial on a slice between its layers, and writes on its prompts.

    Where memory runs out, the fit is repeated with half of the rows in a pass, and again with half of these. What is
    written and judged is halved by itself, so that a fit that succeeded is not repeated.

    Args:
        trial: the trial.
        sliced: the slice.
        prompts: the prompts of the slice.
        max_new_tokens: the length of the completions.

    Raises:
        FloatingPointError: activations or logits are NaN or infinite.
        torch.OutOfMemoryError, MemoryError, RuntimeError: memory runs out even with one row.
    """
    began = time.monotonic()
    # more rows than this were hardly in a pass, so there would be nothing to halve
    usual = min(default_batch_size(sliced), trial.n_vectors * len(sliced.batch))
    learned = halving(partial(trial.fit, sliced), usual)
    fitted = time.monotonic()
    completions = generate(
        sliced.host,
        prompts,
        learned,
        max_new_tokens=max_new_tokens,
        include_random=n_controls(len(learned)),
        seed=trial.seed,
        progress=False,
    )
    judged = departures(sliced.host, completions)
    return Performed(learned, completions, judged, fitted - began, time.monotonic() - fitted)


def n_controls(n_vectors: int) -> int:
    """Returns how many random vectors stand beside so many learned ones."""
    return max(2, n_vectors // LEARNED_PER_RANDOM)
