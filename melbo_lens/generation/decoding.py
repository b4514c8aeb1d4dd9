"""How are many completions written at once?  As rows of cached batches, each a prompt under one perturbation."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from melbo_lens.memory import in_batches
from melbo_lens.models import hooks
from melbo_lens.models.host import Host
from melbo_lens.models.passes import Decoder, Positions, rows_at_once
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.perturbations.sites import Hook
from melbo_lens.progress import Progress
from melbo_lens.prompts import text_after
from melbo_lens.randomness import uniform

Written: TypeAlias = tuple[list[int], list[float], str]  # new ids, their log-probabilities and their text


@dataclass(frozen=True)
class Run:
    """One completion to make: a row of a batch."""

    prompt: int
    kind: str
    vector: int | None
    sign: int
    scale: float
    sample: int

    @property
    def name(self) -> str:
        """The name that an error gives to this run if its logits are not finite."""
        who = (
            "the unsteered model"
            if self.vector is None
            else f"the {self.kind} vector {self.vector} at {self.sign * self.scale:+g}"
        )
        return f"{who}, on prompt {self.prompt},"


@dataclass(frozen=True)
class Decoding:
    """The model, perturbations and settings that all batches of one call share."""

    host: Host
    bank: Perturbation | None  # the perturbations and then, if asked for, their random counterparts
    n_vectors: int
    max_new_tokens: int
    temperature: float
    positions: Positions
    seed: int
    stops: list[str]
    turn: int = 0

    def complete(self, runs: list[Run], rows: list[list[int]], batch_size: int | None, progress: bool) -> list[Written]:
        """Completes each run's prompt, at most `batch_size` at once; similar lengths share a batch to save padding.

        Where memory runs out, the batch is tried again with half of its rows, and so are those after it.
        """
        results: dict[int, Written] = {}
        ordered = sorted(range(len(runs)), key=lambda i: len(rows[i]))
        cached = True  # until a batch finds that the model's cache gives other logits
        with (
            Progress(total=len(runs), desc="generate", unit="completion", disable=not progress) as bar,
            hooks.frozen(self.host),
            torch.no_grad(),
        ):
            longest = len(rows[ordered[-1]])
            batches = in_batches(
                ordered,
                batch_size or rows_at_once(self.host, len(runs), longest, self.max_new_tokens),
                lambda some: self._together([runs[i] for i in some], [rows[i] for i in some], bar, cached),
            )
            for some, (written, trusted) in batches:
                cached = trusted
                results |= dict(zip(some, written, strict=True))
                bar.update(len(results) - bar.n)  # a batch that memory was short for has counted its rows, too
        return [results[i] for i in range(len(runs))]

    def _together(self, runs: list[Run], rows: list[list[int]], bar: Any, cached: bool) -> tuple[list[Written], bool]:
        """The completions of one batch, and whether the model's cache can still be used."""
        draws = self._draws(runs).to(self.host.device)
        decoder = Decoder(self.host, rows, lambda some: self._steering([runs[i] for i in some]), self.positions, cached)
        ends = hooks.end_tokens(self.host)
        new: list[list[int]] = [[] for _ in runs]
        log_probs: list[list[float]] = [[] for _ in runs]
        done: set[int] = set()
        chosen = draws  # a placeholder that the first step does not read
        for step in range(self.max_new_tokens):
            logits = decoder.next(chosen) if step else decoder.first()
            # without this check, NaN would silently be decoded as some token again and again
            hooks.check_finite(self.host, logits, [runs[i].name for i in decoder.alive], "the logits")
            chosen = self._choose(logits, draws[decoder.alive, step])
            chosen_log_probs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].tolist()
            for i, token, log_prob in zip(decoder.alive, chosen.tolist(), chosen_log_probs, strict=True):
                if i in done:
                    continue
                if token not in ends:
                    new[i].append(token)
                    log_probs[i].append(log_prob)
                if token in ends or step + 1 == self.max_new_tokens or (self.stops and self._stopped(rows[i], new[i])):
                    done.add(i)
                    bar.update()
            if len(done) == len(runs):
                break
            left = [place for place, i in enumerate(decoder.alive) if i not in done]
            # copying the cache costs too, so a few finished rows are carried along
            if len(left) <= 0.9 * len(decoder.alive) and decoder.keep(left):
                chosen = chosen[left]
        written = [(ids, probs, self._text(row, ids)) for row, ids, probs in zip(rows, new, log_probs, strict=True)]
        return written, decoder.cached

    def _steering(self, runs: list[Run]) -> list[Hook]:
        """The hooks for a batch whose rows are these runs."""
        if self.bank is None:
            return []
        index = [(run.vector or 0) + (self.n_vectors if run.kind == "random" else 0) for run in runs]
        coefficients = [float(run.sign * run.scale) for run in runs]  # 0 for unsteered rows
        return self.bank.row_hooks(index, torch.tensor(coefficients, dtype=torch.float32, device="cpu"))

    def _draws(self, runs: list[Run]) -> Tensor:
        """Uniform numbers [run step]; each row has a separate random stream, so the batch size does not matter."""
        if self.temperature == 0:
            return torch.zeros(len(runs), self.max_new_tokens, dtype=torch.float32, device="cpu")
        keys = [
            ("sample", self.seed, self.turn, run.prompt, run.kind, run.vector, run.sign, run.scale, run.sample)
            for run in runs
        ]
        return torch.stack([uniform(self.max_new_tokens, *key) for key in keys])

    def _choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        """The next token of each row: the most likely one, or the one that its uniform number selects."""
        if self.temperature == 0:
            return logits.argmax(-1)
        cumulative = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        return torch.searchsorted(cumulative, draws.double()[:, None] * cumulative[:, -1:]).clamp(
            max=logits.shape[-1] - 1
        )[:, 0]

    def _stopped(self, before: list[int], ids: list[int]) -> bool:
        text = text_after(self.host, before, ids)
        return any(stop in text for stop in self.stops)

    def _text(self, before: list[int], ids: list[int]) -> str:
        """The new text, cut off before the first stop."""
        text = text_after(self.host, before, ids)
        return text[: min([text.find(stop) for stop in self.stops if stop in text], default=len(text))]
