"""What does the model write under many perturbations?  `generate` runs them as the rows of large batches."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pandas as pd
from torch import Tensor

from melbo_lens.arguments import counts, flag, public, signs_of
from melbo_lens.generation.completions import COLUMNS, Completions
from melbo_lens.generation.decoding import Decoding, Run
from melbo_lens.generation.steer import fitting
from melbo_lens.measures.controls import random_like
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.passes import Positions
from melbo_lens.perturbations.perturbation import Perturbation, concatenate
from melbo_lens.prompts import AsPrompts, Chat, PromptBatch, Prompts, as_list, is_open, tokenize
from melbo_lens.texts import space_between


@public
def generate(
    model: Model,
    prompts: Prompts,
    perturbations: Perturbation | None = None,
    max_new_tokens: int = 64,
    *,
    signs: int | Sequence[int] = (+1, -1),
    scales: float | Sequence[float] = (1.0,),
    temperature: float = 0.0,
    top_p: float = 1.0,
    n_samples: int = 1,
    positions: Positions = "all",
    include_unsteered: bool = True,
    include_random: bool | int = True,
    batch_size: int | None = None,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    chat: bool | None = None,
    progress: bool = True,
) -> Completions:
    """Completes every prompt under every perturbation with both signs, unsteered, and under random controls.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; it is left as it was.
        prompts: text, chat messages, a list of either, or token ids [prompt pos].
        perturbations: vectors or adapters. Each is applied by itself, at every position unless `positions` says
            otherwise. None generates unsteered completions only.
        max_new_tokens: the length at which a completion ends, unless the model's end token comes first.
        signs: +1, -1 or both. The effect of -v is not the opposite of the effect of v, so both are the default.
        scales: multiples at which each perturbation is applied.
        temperature: 0 decodes greedily. Otherwise tokens are sampled, with a separate random stream for each
            completion, which depends on `seed` and the row alone.
        top_p: sampling leaves out the tokens beyond the fewest that together have this probability.
        n_samples: the number of completions of each row; more than one needs a temperature.
        positions: where the perturbation acts: at "all" tokens, only those of the "prompt", or only "generated" ones.
        include_unsteered: whether to complete the prompts without a perturbation as well.
        include_random: whether to complete them with norm-matched controls as well: `random_vectors(perturbations,
            seed)`, or `random_adapters` matched on the prompts of the fit. A number makes controls of so many of the
            perturbations, from the first.
        batch_size: the number of completions that run at once, at most; None means 256, or fewer where prompts are so
            long that these would hold more than 4 GiB. Memory for keys and values grows with it, and where memory runs
            out it is halved.
        seed: the seed of the sampling and of the random controls.
        stop: a text, or several, that ends a completion; it is cut off the completion's text.
        chat: True makes each text prompt one user message of the tokenizer's chat template.
        progress: whether to show a progress bar.

    Returns:
        The completions as a table: first unsteered, then steered, then random.

    Raises:
        TypeError, ValueError: arguments break a rule; this is raised before the model runs.
        FloatingPointError: a perturbation makes the logits NaN or infinite. The message names the perturbation, its
            scale and the model's dtype.

    Warns:
        UserWarning: the model's cache gives other logits than a pass without it; generation then goes on without it.
    """
    host = host_of(model)
    if perturbations is not None:
        perturbations = fitting(host, perturbations)
    all_signs = signs_of(signs)
    all_scales: Sequence[float] = [scales] if isinstance(scales, int | float) else scales
    _check_settings(max_new_tokens, all_scales, temperature, n_samples, positions, batch_size)
    check_top_p(top_p)
    flag("include_unsteered", include_unsteered)
    if chat is not None:
        flag("chat", chat)
    if not isinstance(include_random, int) or include_random < 0:
        raise ValueError(f"include_random={include_random!r} must be True, False, or how many controls to make.")
    stops = stops_of(stop)
    by_ids = isinstance(prompts, Tensor | PromptBatch | AsPrompts)  # token ids are never chats
    if chat and not by_ids:
        prompts = [
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in as_list(prompts)
        ]
    batch = tokenize(host, prompts, n_new_tokens=max_new_tokens)
    bank = perturbations
    runs = [
        Run(i, "unsteered", None, 0, 0.0, sample)
        for i in range(len(batch))
        for sample in range(n_samples)
        if include_unsteered
    ]
    if perturbations is not None:
        n_random = len(perturbations) if include_random is True else min(int(include_random), len(perturbations))
        if n_random:
            bank = concatenate([perturbations, random_like(perturbations[:n_random], host, batch, seed)])
        for kind, n_rows in (("steered", len(perturbations)), ("random", n_random)):
            grid = product(range(len(batch)), range(n_rows), all_signs, all_scales, range(n_samples))
            runs += [Run(i, kind, k, int(sign), float(scale), sample) for i, k, sign, scale, sample in grid]
    if not runs:
        raise ValueError("nothing to generate: give perturbations, or include_unsteered=True.")
    n_vectors = 0 if perturbations is None else len(perturbations)
    decoding = Decoding(host, bank, n_vectors, max_new_tokens, temperature, positions, seed, stops, top_p=top_p)
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "positions": positions,
        "seed": seed,
        "stop": stops,
        "perturbations": dict(perturbations.provenance) if perturbations else None,
    }
    asked = None if by_ids else as_list(prompts)
    order = [int(run.prompt) for run in runs]
    chats = [asked[i] for i in order] if asked and all(isinstance(prompt, list) for prompt in asked) else None
    ids = batch.rows()
    texts, rows = [batch.texts[i] for i in order], [ids[i] for i in order]
    return _complete(decoding, runs, texts, rows, chats, settings, batch_size, progress)


def _complete(
    decoding: Decoding,
    runs: list[Run],
    texts: list[str],
    rows: list[list[int]],
    chats: list[Chat] | None,
    settings: dict[str, Any],
    batch_size: int | None,
    progress: bool,
) -> Completions:
    """Completes the runs; if they are chats, the result can be continued."""
    written = decoding.complete(runs, rows, batch_size, progress)
    columns = [
        (run.prompt, text, run.kind, run.vector, run.sign, run.scale, run.sample, new.text, new.tokens, new.log_probs)
        for run, text, new in zip(runs, texts, written, strict=True)
    ]

    table = pd.DataFrame(columns, columns=COLUMNS).astype({"vector": "Int64"})
    ids = tuple(map(tuple, rows))
    if chats is None:
        return Completions(table, settings, ids)

    def continue_with(messages: Sequence[str]) -> Completions:
        longer = []
        for chat, row, new, message in zip(chats, rows, written, messages, strict=True):
            answer = answered(chat, space_between(decoding.host, row, new.tokens), new.text)
            longer.append([*answer, {"role": "user", "content": message}])
        batch = tokenize(decoding.host, longer, n_new_tokens=decoding.max_new_tokens)
        later = replace(decoding, turn=decoding.turn + 1)
        return _complete(later, runs, list(batch.texts), batch.rows(), longer, settings, batch_size, progress)

    return Completions(table, settings, ids, continue_with)


def answered(chat: Chat, space: str, text: str) -> Chat:
    """The chat with what the model wrote, as a new message or as the rest of the open message that ends the chat."""
    if is_open(chat):
        content = chat[-1]["content"]
        whole = (
            content + space + text if isinstance(content, str) else [*content, {"type": "text", "text": space + text}]
        )
        return [*chat[:-1], {**chat[-1], "content": whole}]
    return [*chat, {"role": "assistant", "content": text}]


def stops_of(stop: str | Sequence[str] | None) -> list[str]:
    """The texts that end a completion, as a list."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    if any(not isinstance(text, str) for text in stops):
        raise TypeError(f"stop={stop!r} must be a text, or several.")
    if any(not text for text in stops):
        raise ValueError(f"stop={stop!r} holds an empty string, which every text contains: leave it out.")
    return stops


def check_top_p(top_p: float) -> None:
    """Refuses what is no share of probability."""
    if isinstance(top_p, bool) or not isinstance(top_p, int | float) or not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r} must be a probability above 0, and 1 to leave nothing out.")


def _check_settings(
    max_new_tokens: int,
    scales: Sequence[float],
    temperature: float,
    n_samples: int,
    positions: str,
    batch_size: int | None,
) -> None:
    counts(max_new_tokens=max_new_tokens, n_samples=n_samples, batch_size=batch_size)
    if not isinstance(scales, Sequence) or any(
        isinstance(one, bool) or not isinstance(one, int | float) for one in scales
    ):
        raise ValueError(f"scales={scales!r} must be a list of numbers.")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise ValueError(f"temperature={temperature!r} must be 0 (greedy) or a positive, finite number.")
    if not scales or any(not 0 < scale < float("inf") for scale in scales):
        raise ValueError(f"scales={scales!r} must hold positive, finite multiples; use signs for the direction.")
    if len(set(scales)) < len(scales):
        raise ValueError(f"scales={scales!r} repeat a value: name each once.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or a positive, finite number.")
    if n_samples > 1 and temperature == 0:
        raise ValueError(f"n_samples={n_samples} at temperature=0 would repeat one completion: set a temperature.")
    if positions not in ("all", "prompt", "generated"):
        raise ValueError(f'positions={positions!r} must be "all", "prompt" or "generated".')
