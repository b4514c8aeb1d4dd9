"""What does the model write under a perturbation?  `steer` attaches one to a model, `generate` runs many as the rows of large batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, TypeAlias

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from melbo_lens import hooks
from melbo_lens.completions import COLUMNS, Completions
from melbo_lens.perturbations import SteeringVectors, concatenate, random_vectors
from melbo_lens.prompts import Prompts, as_list, tokenize
from melbo_lens.randomness import generator

Positions: TypeAlias = Literal["all", "prompt", "generated"]


@contextmanager
def steer(model: Any, perturbation: SteeringVectors | Sequence[SteeringVectors]) -> Iterator[Any]:
    """Steers whatever the model runs inside the block, and leaves no trace after it, also on an exception.

    One vector steers every row of a batch; n vectors need batches of exactly n rows. A sequence steers with all its members at once.

    Raises:
        ValueError: the vectors don't fit the model.
    """
    several = [perturbation] if isinstance(perturbation, SteeringVectors) else list(perturbation)
    hooks.check_model(model)
    for one in several:
        _check_fits(model, one)
    with hooks.attached(model, [hook for one in several for hook in one.hooks()]):
        yield model


@dataclass(frozen=True)
class Run:
    """One completion to make: a row of a batch."""

    prompt: int
    kind: str
    vector: int | None
    sign: int
    scale: float
    sample: int


def generate(
    model: Any,
    prompts: Prompts,
    perturbations: SteeringVectors | None,
    max_new_tokens: int = 64,
    signs: Sequence[int] = (+1, -1),
    scales: Sequence[float] = (1.0,),
    temperature: float = 0.0,
    n_samples: int = 1,
    positions: Positions = "all",
    include_unsteered: bool = True,
    include_random: bool = True,
    batch_size: int | None = None,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    chat: bool | None = None,
    progress: bool = True,
) -> Completions:
    """Completes every prompt under every perturbation, both signs, with norm-matched random vectors and unsteered beside them.

    Args:
        model: `HookedTransformer` or `TransformerBridge`; it is left as it was.
        prompts: text, chat messages, a list of either, or token ids [prompt pos].
        perturbations: each of its vectors is applied by itself, at every position unless `positions` says otherwise; None steers nothing.
        max_new_tokens: a completion ends here, or at the model's end token.
        signs: -v is not the mirror image of v, so both are the default.
        scales: multiples of each vector.
        temperature: 0 is greedy; else tokens are sampled, each completion from a stream of its own that depends on `seed` and the row alone.
        n_samples: completions of each row; more than one needs a temperature.
        positions: "all", only the tokens of the "prompt", or only the "generated" ones.
        include_unsteered: also complete without perturbation.
        include_random: also complete with `random_vectors(perturbations, seed)`.
        batch_size: completions that run at once; None chooses 256. Memory for keys and values grows with it.
        seed: of the sampling and of the random vectors.
        stop: text that ends a completion; it is cut off the completion's text.
        chat: True makes each text prompt one user message of the tokenizer's chat template.
        progress: whether to show a progress bar.

    Returns:
        The completions as a table, unsteered first, then steered, then random.

    Raises:
        TypeError, ValueError: bad arguments, said before the model runs.
    """
    hooks.check_model(model)
    if perturbations is not None:
        _check_fits(model, perturbations)
    _check_settings(max_new_tokens, signs, scales, temperature, n_samples, positions, batch_size)
    if chat and not isinstance(prompts, Tensor):
        prompts = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in as_list(prompts)]
    batch = tokenize(model, prompts, n_new_tokens=max_new_tokens)
    bank = perturbations
    runs = [Run(i, "unsteered", None, 0, 0.0, sample) for i in range(len(batch)) for sample in range(n_samples) if include_unsteered]
    if perturbations is not None:
        if include_random:
            bank = concatenate([perturbations, random_vectors(perturbations, seed)])
        for kind in ("steered", "random") if include_random else ("steered",):
            grid = product(range(len(batch)), range(len(perturbations)), signs, scales, range(n_samples))
            runs += [Run(i, kind, k, int(sign), float(scale), sample) for i, k, sign, scale, sample in grid]
    if not runs:
        raise ValueError("nothing to generate: give perturbations, or include_unsteered=True.")
    n_vectors = 0 if perturbations is None else len(perturbations)
    decoding = Decoding(model, batch.rows(), bank, n_vectors, max_new_tokens, temperature, positions, seed, _stops(stop))
    results: dict[Run, tuple[list[int], list[float], str]] = {}
    ordered = sorted(runs, key=lambda run: len(decoding.prompts[run.prompt]))  # like lengths together: little padding
    with tqdm(total=len(runs), desc="generate", unit="completion", disable=not progress) as bar, hooks.frozen(model), torch.no_grad():
        for first in range(0, len(ordered), batch_size or 256):
            chunk = ordered[first : first + (batch_size or 256)]
            results |= dict(zip(chunk, decoding.complete(chunk, bar), strict=True))
    rows = [(r.prompt, batch.texts[r.prompt], r.kind, r.vector, r.sign, r.scale, r.sample, results[r][2], results[r][0], results[r][1]) for r in runs]
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"vector": "Int64"})
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "positions": positions,
        "seed": seed,
        "stop": _stops(stop),
        "perturbations": dict(perturbations.provenance) if perturbations else None,
    }
    return Completions(table, settings)


@dataclass(frozen=True)
class Decoding:
    """What all batches of one call share."""

    model: Any
    prompts: list[list[int]]
    bank: SteeringVectors | None  # the perturbations, then their random counterparts
    n_vectors: int
    max_new_tokens: int
    temperature: float
    positions: Positions
    seed: int
    stops: list[str]

    def complete(self, runs: list[Run], bar: Any) -> list[tuple[list[int], list[float], str]]:
        """New ids, their log-probabilities and the text of each run, decoded together."""
        device = next(self.model.parameters()).device
        rows = [self.prompts[run.prompt] for run in runs]
        width = max(map(len, rows))
        tokens = torch.tensor([[row[0]] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
        draws = self._draws(runs).to(device)
        decoder, ends = hooks.CachedDecoder(self.model, mask), hooks.end_tokens(self.model)
        new: list[list[int]] = [[] for _ in runs]
        log_probs: list[list[float]] = [[] for _ in runs]
        alive = list(range(len(runs)))  # the runs that the decoder's rows stand for
        done: set[int] = set()
        for step in range(self.max_new_tokens):
            with self._steered([runs[i] for i in alive], step):
                logits = decoder(tokens).float()
            chosen = self._choose(logits, draws[alive, step])
            chosen_log_probs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist()
            for i, token, log_prob in zip(alive, chosen.tolist(), chosen_log_probs, strict=True):
                if i in done:
                    continue
                if token not in ends:
                    new[i].append(token)
                    log_probs[i].append(log_prob)
                if token in ends or step + 1 == self.max_new_tokens or (self.stops and self._stopped(new[i])):
                    done.add(i)
                    bar.update()
            if len(done) == len(runs):
                break
            left = [row for row, i in enumerate(alive) if i not in done]
            tokens = chosen[:, None]
            if len(left) <= 0.9 * len(alive):  # copying the cache costs too, so a few finished rows are carried along
                kept = torch.tensor(left, device=device)
                decoder.keep(kept)
                tokens, alive = tokens[kept], [alive[row] for row in left]
        return [(ids, probs, self._text(ids)) for ids, probs in zip(new, log_probs, strict=True)]

    def _steered(self, runs: list[Run], step: int) -> Any:
        if self.bank is None or self.positions == ("generated" if step == 0 else "prompt"):
            return nullcontext()
        index = [(run.vector or 0) + (self.n_vectors if run.kind == "random" else 0) for run in runs]
        coefficients = torch.tensor([run.sign * run.scale for run in runs])  # 0 where unsteered
        rows = self.bank[index] * coefficients
        return hooks.attached(self.model, rows.hooks())

    def _draws(self, runs: list[Run]) -> Tensor:
        """Uniform numbers [run step], each row from its own stream, so that batches don't matter."""
        if self.temperature == 0:
            return torch.zeros(len(runs), self.max_new_tokens)
        keys = [("sample", self.seed, run.prompt, run.kind, run.vector, run.sign, run.scale, run.sample) for run in runs]
        return torch.stack([torch.rand(self.max_new_tokens, generator=generator(*key)) for key in keys])

    def _choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        cumulative = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        return torch.searchsorted(cumulative, draws.double()[:, None] * cumulative[:, -1:]).clamp(max=logits.shape[-1] - 1)[:, 0]

    def _stopped(self, ids: list[int]) -> bool:
        return any(text in self._decode(ids) for text in self.stops)

    def _text(self, ids: list[int]) -> str:
        text = self._decode(ids)
        return text[: min([text.find(stop) for stop in self.stops if stop in text], default=len(text))]

    def _decode(self, ids: list[int]) -> str:
        tokenizer = self.model.tokenizer
        return tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids))


def _stops(stop: str | Sequence[str] | None) -> list[str]:
    return [] if stop is None else [stop] if isinstance(stop, str) else list(stop)


def _check_fits(model: Any, vectors: SteeringVectors) -> None:
    n_layers, d_model = len(model.blocks), model.cfg.d_model
    if vectors.source_layer >= n_layers or vectors.d_model != d_model:
        raise ValueError(
            f"the perturbation belongs to layer {vectors.source_layer} of a model with d_model {vectors.d_model}; this model has layers 0 to "
            f"{n_layers - 1} and d_model {d_model}. Use the model that it was learned on."
        )
    hooks.hook_point(model, vectors.hook_name)


def _check_settings(
    max_new_tokens: int,
    signs: Sequence[int],
    scales: Sequence[float],
    temperature: float,
    n_samples: int,
    positions: str,
    batch_size: int | None,
) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("n_samples", n_samples), ("batch_size", batch_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
    if not signs or any(sign not in (1, -1) for sign in signs):
        raise ValueError(f"signs={signs!r} must hold +1, -1 or both; use scales for other multiples.")
    if not scales or any(not 0 < scale < float("inf") for scale in scales):
        raise ValueError(f"scales={scales!r} must hold positive, finite multiples; use signs for the direction.")
    if len(set(signs)) < len(signs) or len(set(scales)) < len(scales):
        raise ValueError(f"signs={signs!r} or scales={scales!r} repeat a value: name each once.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or a positive, finite number.")
    if n_samples > 1 and temperature == 0:
        raise ValueError(f"n_samples={n_samples} at temperature=0 would repeat one completion: set a temperature.")
    if positions not in ("all", "prompt", "generated"):
        raise ValueError(f'positions={positions!r} must be "all", "prompt" or "generated".')
