"""How are many completions written at once?  Runs, each a prompt under one perturbation, as the rows of cached batches."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from melbo_lens import hooks
from melbo_lens.adapters import Perturbation
from melbo_lens.randomness import generator

Positions: TypeAlias = Literal["all", "prompt", "generated"]
Written: TypeAlias = tuple[list[int], list[float], str]  # new ids, their log-probabilities, their text


@dataclass(frozen=True)
class Run:
    """One completion to make: a row of a batch."""

    prompt: int
    kind: str
    vector: int | None
    sign: int
    scale: float
    sample: int


@dataclass(frozen=True)
class Decoding:
    """What all batches of one call share."""

    model: Any
    bank: Perturbation | None  # the perturbations, then their random counterparts
    n_vectors: int
    max_new_tokens: int
    temperature: float
    positions: Positions
    seed: int
    stops: list[str]
    turn: int = 0

    def complete(self, runs: list[Run], rows: list[list[int]], batch_size: int, progress: bool) -> list[Written]:
        """Completes each run's prompt, `batch_size` at once, those of like length together so that there is little padding."""
        results: list[Written | None] = [None] * len(runs)
        ordered = sorted(range(len(runs)), key=lambda i: len(rows[i]))
        with tqdm(total=len(runs), desc="generate", unit="completion", disable=not progress) as bar, hooks.frozen(self.model), torch.no_grad():
            for first in range(0, len(ordered), batch_size):
                chunk = ordered[first : first + batch_size]
                for i, written in zip(chunk, self._together([runs[i] for i in chunk], [rows[i] for i in chunk], bar), strict=True):
                    results[i] = written
        return results

    def _together(self, runs: list[Run], rows: list[list[int]], bar: Any) -> list[Written]:
        device = next(self.model.parameters()).device
        width = max(map(len, rows))
        tokens = torch.tensor([[row[0]] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
        draws = self._draws(runs).to(device)
        decoder, ends = hooks.CachedDecoder(self.model, mask), hooks.end_tokens(self.model)
        new: list[list[int]] = [[] for _ in runs]
        log_probs: list[list[float]] = [[] for _ in runs]
        alive = list(range(len(runs)))  # the runs that the decoder's rows stand for
        steering = self._steering(runs)
        done: set[int] = set()
        for step in range(self.max_new_tokens):
            active = self.positions != ("generated" if step == 0 else "prompt")
            with hooks.attached(self.model, steering if active else []):
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
                steering = self._steering([runs[i] for i in alive])
        return [(ids, probs, self._text(ids)) for ids, probs in zip(new, log_probs, strict=True)]

    def _steering(self, runs: list[Run]) -> list[hooks.Hook]:
        """Hooks for a batch whose rows are these runs."""
        if self.bank is None:
            return []
        index = [(run.vector or 0) + (self.n_vectors if run.kind == "random" else 0) for run in runs]
        coefficients = torch.tensor([run.sign * run.scale for run in runs])  # 0 where unsteered
        return self.bank.row_hooks(index, coefficients)

    def _draws(self, runs: list[Run]) -> Tensor:
        """Uniform numbers [run step], each row from its own stream, so that batches don't matter."""
        if self.temperature == 0:
            return torch.zeros(len(runs), self.max_new_tokens)
        keys = [("sample", self.seed, self.turn, run.prompt, run.kind, run.vector, run.sign, run.scale, run.sample) for run in runs]
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
