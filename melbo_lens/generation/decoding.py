"""How are many completions written at once?  As rows of cached batches, each a prompt under one perturbation."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.memory import in_batches
from melbo_lens.models import hooks
from melbo_lens.models.host import Host
from melbo_lens.models.passes import Decoder, Positions, rows_at_once
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.perturbations.sites import Hook
from melbo_lens.progress import Progress
from melbo_lens.randomness import uniform
from melbo_lens.texts import text_after


@dataclass
class Written:
    """What was written in one row.

    Attributes:
        tokens: the new ids, without the end token.
        log_probs: their log-probabilities at temperature 1.
        likely: at each of them, the most likely tokens with their log-probabilities, if they were asked for.
        text: the text of the ids, cut off before a stop.
        ended: why it ends: by the model's end token, by a stop, after `max_new_tokens`, or where the context is full.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    likely: list[list[tuple[int, float]]] = field(default_factory=list)
    text: str = ""
    ended: Literal["", "end", "stop", "length", "context"] = ""


@dataclass(frozen=True)
class Run:
    """One completion to make: a row of a batch.

    The prompt is its number or its text. With the seed and the other fields it decides which random numbers are drawn.
    """

    prompt: int | str
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
        return f"{who}, on prompt {self.prompt!r:.80},"


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
    top_p: float = 1.0
    n_likely: int = 0

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
        written = [Written() for _ in runs]
        limits = [self._limit(row) for row in rows]
        chosen = draws  # a placeholder that the first step does not read
        for step in range(self.max_new_tokens):
            logits = decoder.next(chosen) if step else decoder.first()
            # without this check, NaN would silently be decoded as some token again and again
            hooks.check_finite(self.host, logits, [runs[i].name for i in decoder.alive], "the logits")
            chosen = self._choose(logits, draws[decoder.alive, step])
            log_probs = logits.log_softmax(-1)
            likely = self._likely(log_probs)
            chosen_log_probs = log_probs.gather(1, chosen[:, None])[:, 0].tolist()
            for place, (i, token) in enumerate(zip(decoder.alive, chosen.tolist(), strict=True)):
                row = written[i]
                if row.ended:
                    continue
                if token in ends:
                    row.ended = "end"
                else:
                    row.tokens.append(token)
                    row.log_probs.append(chosen_log_probs[place])
                    row.likely.append(likely[place])
                    if self.stops and self._stopped(rows[i], row.tokens):
                        row.ended = "stop"
                    elif step + 1 == limits[i]:
                        row.ended = "length" if limits[i] == self.max_new_tokens else "context"
                if row.ended:
                    bar.update()
            if all(row.ended for row in written):
                break
            left = [place for place, i in enumerate(decoder.alive) if not written[i].ended]
            # copying the cache costs too, so a few finished rows are carried along
            if len(left) <= 0.9 * len(decoder.alive) and decoder.keep(left):
                chosen = chosen[left]
        for before, row in zip(rows, written, strict=True):
            row.text = self._text(before, row.tokens)
        return written, decoder.cached

    def _limit(self, row: list[int]) -> int:
        """How many tokens can be written after this prompt."""
        n_ctx = getattr(self.host.cfg, "n_ctx", None)
        return min(self.max_new_tokens, n_ctx - len(row)) if n_ctx else self.max_new_tokens

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
        probs = (logits.double() / self.temperature).softmax(-1)
        if self.top_p < 1:
            probs = nucleus(probs, self.top_p)
        cumulative = probs.cumsum(-1)
        # to the right, since a token of no probability adds nothing to the sum before it
        return torch.searchsorted(cumulative, draws.double()[:, None] * cumulative[:, -1:], right=True).clamp(
            max=logits.shape[-1] - 1
        )[:, 0]

    def _likely(self, log_probs: Tensor) -> list[list[tuple[int, float]]]:
        """The most likely tokens of each row, the first first, with their log-probabilities."""
        if not self.n_likely:
            return [[]] * len(log_probs)
        top = log_probs.topk(min(self.n_likely, log_probs.shape[-1]))
        return [
            list(zip(ids, values, strict=True))
            for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def _stopped(self, before: list[int], ids: list[int]) -> bool:
        text = text_after(self.host, before, ids)
        return any(stop in text for stop in self.stops)

    def _text(self, before: list[int], ids: list[int]) -> str:
        """The new text, cut off before the first stop."""
        text = text_after(self.host, before, ids)
        return text[: min([text.find(stop) for stop in self.stops if stop in text], default=len(text))]


def nucleus(probs: Float[Tensor, "row d_vocab"], top_p: float) -> Float[Tensor, "row d_vocab"]:
    """The probabilities with 0 outside of the fewest tokens that together have at least `top_p` of a row.

    The published rule (Holtzman et al., 2020), in which the token that crosses the limit is the last one kept.
    """
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
