"""How does a model write token by token?  It uses a cache, which is trusted only after it was checked."""

import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from melbo_lens.memory import is_out_of_memory
from melbo_lens.models.hooks import attached
from melbo_lens.models.host import Host
from melbo_lens.models.tally import Tally
from melbo_lens.perturbations.sites import Hook, layer_of

Positions: TypeAlias = Literal["all", "prompt", "generated"]  # the tokens on which a perturbation acts
Steering: TypeAlias = Callable[[Sequence[int]], list[Hook]]  # row numbers -> hooks for a batch of exactly these rows

# How far a step with the cache may differ from a pass without it, as a share of the logits' norm.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1.5e-1}
CACHE_ERRORS = (TypeError, AttributeError, ValueError, IndexError, KeyError, RuntimeError)  # of caches that don't work
WRITTEN_AT_ONCE = 256  # completions
WRITTEN_TOKENS = 2**14  # of prompts that need no measurement before they run together
WRITING_BYTES = 4 * 2**30
LEAST_ROWS, MOST_PROMPTS = 8, 8  # rows per prompt on average, and prompts, between which each prompt runs by itself
TOKENS_AT_ONCE = 4096  # the limit for an uncached pass, whose logits are large


class Decoder:
    """Feeds prompts of different lengths to a model token by token, with separate hooks for each row.

    Keys and values are cached in a left-padded batch. Before the cache is trusted, the row with the most padding is
    compared with a pass of this row alone, without padding or cache. This is done at the first step if there is
    padding, at the first cached step, at the first step after rows were dropped, and where a model changes how it
    encodes positions. If the two differ, a warning says so, and every later step runs all tokens again without a cache,
    and each row by itself if padding matters too. That is slower but right.

    In the first pass, rows of one prompt share the blocks before the first steered one. That is compared in the same
    way; where it differs or fails, all rows run through all blocks.
    """

    def __init__(
        self,
        host: Host,
        rows: Sequence[Sequence[int]],
        steering: Steering,
        positions: Positions = "all",
        cached: bool = True,
    ) -> None:
        """
        Args:
            host: the opened model, which the caller has frozen.
            rows: the token ids of the prompts.
            steering: a function that returns the hooks for a batch of the given rows.
            positions: the tokens on which these hooks act.
            cached: whether a cache is used at all.
        """
        self.host, self.steering, self.positions, self.cached = host, steering, positions, cached
        # the tokens of each prompt and the new ones, also for rows that were dropped
        self.ids = [list(row) for row in rows]
        self.lengths = [len(row) for row in rows]
        self.alive = list(range(len(rows)))
        self.device = host.device
        self.doubtful, self.apart = True, False
        self.cache: Any = None
        width = max(self.lengths)
        self.mask = self._tensor([[False] * (width - n) + [True] * n for n in self.lengths], torch.bool)

    def first(self) -> Float[Tensor, "row d_vocab"]:
        """Computes the logits after each prompt."""
        if not self.cached:
            return self._uncached(self.alive)
        shared = self._shared()
        if shared is not None:
            return shared
        width = max(self.lengths)
        self.cache = self.host.start_cache(len(self.alive))
        tokens = self._padded(self.alive)
        logits = self.step(tokens, self.positions != "generated")
        return logits if min(self.lengths) == width else self._proved(logits)

    def next(self, chosen: Tensor) -> Float[Tensor, "row d_vocab"]:
        """Computes the logits after one more token of each row."""
        for i, token in zip(self.alive, chosen.tolist(), strict=True):
            self.ids[i].append(token)
        if not self.cached:
            return self._uncached(self.alive)
        turning = self.host.turning_length
        if turning is not None and max(len(self.ids[i]) for i in self.alive) == turning + 1:
            self.doubtful = True
        if not self.doubtful:
            return self.step(chosen[:, None], self.positions != "prompt")
        try:
            logits = self.step(chosen[:, None], self.positions != "prompt")
        except CACHE_ERRORS as error:
            if is_out_of_memory(error):
                raise
            return self._distrusted(f"failed ({type(error).__name__}: {error})")
        self.doubtful = not any(map(self._telling, range(len(self.alive))))
        return self._proved(logits)

    def keep(self, places: Sequence[int]) -> bool:
        """Goes on with only the rows at these places of the batch.

        Returns False, and changes nothing, if the model's cache can't drop rows.
        """
        if self.cached and not self._drop(self._tensor(places, torch.long)):
            return False
        self.alive = [self.alive[place] for place in places]
        self.doubtful = True
        return True

    def step(self, tokens: Tensor, steered: bool = False) -> Float[Tensor, "row d_vocab"]:
        """Runs one pass with the cache over the last columns of the mask, and computes the logits after them."""
        hooks = [*(self.steering(self.alive) if steered else []), *self._unembedding(-1)]
        with attached(self.host, hooks):
            logits, self.cache = self.host.cached_logits(tokens, self.mask, self.cache)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return logits[:, -1].to(self.device).float()

    def _shared(self) -> Tensor | None:
        """Computes the logits after each prompt; the blocks before the first steered one run once for each prompt.

        Returns:
            The logits; None if that saves too little, or if this model can't do it.
        """
        prompts: dict[tuple[int, ...], list[int]] = {}
        for row, ids in enumerate(self.ids):
            prompts.setdefault(tuple(ids), []).append(row)
        hooks = self.steering(self.alive) if self.positions != "generated" else []
        depth = min((layer_of(name) or 0 for name, _ in hooks), default=self.host.n_layers)
        saved = depth * (len(self.ids) - len(prompts))
        # the proof costs a pass of one row, and many passes of few rows are slower than one of all
        few = len(self.ids) < LEAST_ROWS * len(prompts) or len(prompts) > MOST_PROMPTS
        if not self.host.shares or few or saved < 2 * self.host.n_layers:
            return None
        try:
            logits, cache = self._joined(list(prompts.values()), depth)
        except (*CACHE_ERRORS, AssertionError) as error:  # blocks may refuse a mask of one row beside a stream of many
            if is_out_of_memory(error):
                raise
            logits = cache = None
        if logits is None or cache is None or not self._off(logits) <= self._allowed:
            self.host.shares = False
            return None
        self.cache, self.mask = cache, torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return logits

    def _joined(self, rows: Sequence[Sequence[int]], depth: int) -> tuple[Float[Tensor, "row d_vocab"], Any]:
        """Runs each prompt by itself, and returns the logits and the cache of all rows.

        Args:
            rows: the rows of each prompt.
            depth: the first steered block.
        """
        parts = [self._spread(some, depth) for some in rows]
        logits = torch.cat([logits for logits, _ in parts])
        cache = self.host.joined([cache for _, cache in parts], [len(some) for some in rows], depth)
        order = self._tensor([row for some in rows for row in some], torch.long).argsort()
        if len(parts) > 1 and cache is not None and not self.host.drop_rows(cache, order):
            cache = None
        return logits[order], cache

    def _spread(self, rows: Sequence[int], depth: int) -> tuple[Float[Tensor, "row d_vocab"], Any]:
        """Runs the one prompt of these rows; at block `depth` its stream becomes the stream of each row."""
        name, hooks = f"blocks.{depth}.hook_resid_pre", self._unembedding(-1)
        if depth < self.host.n_layers:
            hooks = [(name, lambda stream, hook: stream.expand(len(rows), -1, -1).contiguous()), *hooks]
            hooks = [*hooks, *(self.steering(rows) if self.positions != "generated" else [])]
        cache = self.host.start_cache(len(rows), depth)
        with attached(self.host, hooks):
            logits, cache = self.host.cached_logits(self._padded(rows[:1]), self.mask[rows[:1]], cache)
        return logits[:, -1].to(self.device).float().expand(len(rows), -1), cache

    def _padded(self, rows: Sequence[int]) -> Tensor:
        """The ids of these rows' prompts, padded on the left."""
        width = max(self.lengths)
        return self._tensor([self.ids[i][:1] * (width - len(self.ids[i])) + self.ids[i] for i in rows], torch.long)

    def _unembedding(self, position: int | Tensor) -> list[Hook]:
        """Hooks that let the unembedding, the largest matrix of the model, see one position of each row only.

        A model without that hook point computes the logits of every position.
        """
        rows = torch.arange(len(position), device=self.device) if isinstance(position, Tensor) else slice(None)

        def only(activation: Tensor, hook: Any = None) -> Tensor:
            here, there = (
                place.to(activation.device) if isinstance(place, Tensor) else place for place in (rows, position)
            )
            return activation[here, there].contiguous()[:, None]

        name = self.host.before_unembed
        return [(name, only)] if name in self.host.points else []

    def _drop(self, places: Tensor) -> bool:
        if not self.host.drop_rows(self.cache, places):
            return False
        self.mask = self.mask[places]
        return True

    def _proved(self, logits: Tensor) -> Tensor:
        """Returns the logits if the witnesses' are right, and else those of a pass without a cache."""
        error = self._off(logits)
        if error <= self._allowed:
            return logits
        return self._distrusted(f"is off by {error:.1e} of the logits' norm (allowed: {self._allowed:.0e})")

    def _distrusted(self, what: str) -> Tensor:
        self.cached, self.cache = False, None
        together = self._uncached(self.alive)
        self.apart = self._off(together) > self._allowed
        warnings.warn(
            f"generation goes on without a cache, right but slower: a step with the cache of this model {what}, "
            f"compared with a pass of the whole text. The versions are transformers {version('transformers')} and "
            f"transformer_lens {version('transformer_lens')}; another version of either may have a cache that works.",
            stacklevel=2,
        )
        return self._uncached(self.alive) if self.apart else together

    def _off(self, logits: Tensor) -> float:
        """Measures how far the logits of the witnesses are from a pass of such a row alone; NaN if any of them is."""
        errors = [self._error(logits[place], self._uncached([self.alive[place]])[0]) for place in self._witnesses()]
        return float(torch.tensor(errors, dtype=torch.float64, device="cpu").max())  # Python's `max` passes over NaN

    def _witnesses(self) -> list[int]:
        """The places of the rows that tell whether a pass is right: the most padded of all and of telling ones.

        Of several it is the last, since the first row of a prompt whose pass was shared may be right by itself.
        """
        places = list(reversed(range(len(self.alive))))
        some = [places, list(filter(self._telling, places))]
        found = [min(rows, key=lambda place: len(self.ids[self.alive[place]])) for rows in some if rows]
        return list(dict.fromkeys(found))

    def _telling(self, place: int) -> bool:
        """Whether a row has different tokens; if not, all that is attended to is the same, whatever a cache forgets."""
        return len({*self.ids[self.alive[place]]}) > 1

    @property
    def _allowed(self) -> float:
        return closeness(self.host.dtype)

    @staticmethod
    def _error(found: Tensor, expected: Tensor) -> float:
        """Measures how far logits are from the expected ones, as a share of their norm.

        It is 0 if none is finite; the code that chooses a token reports that.
        """
        finite = torch.isfinite(expected)
        if not finite.any():
            return 0.0
        a, b = (values[finite] - values[finite].mean() for values in (found, expected))
        return float((a - b).norm() / b.norm().clamp(min=1e-30))

    def _uncached(self, rows: Sequence[int]) -> Float[Tensor, "row d_vocab"]:
        """Computes the logits after all tokens of these rows so far, without a cache and some rows at a time.

        Padding is on the right, where it is never seen.
        """
        width = max(len(self.ids[i]) for i in rows)
        parts, at_once = [], 1 if self.apart else max(1, TOKENS_AT_ONCE // width)
        for part in (rows[first : first + at_once] for first in range(0, len(rows), at_once)):
            width = max(len(self.ids[i]) for i in part)
            tokens = self._tensor(
                [self.ids[i] + self.ids[i][:1] * (width - len(self.ids[i])) for i in part], torch.long
            )
            hooks = self.steering(part)
            if self.positions != "all":
                generated = (
                    torch.arange(width, device=self.device)
                    >= self._tensor([self.lengths[i] for i in part], torch.long)[:, None]
                )
                hooks = _at(hooks, generated if self.positions == "generated" else ~generated)
            last = self._tensor([len(self.ids[i]) - 1 for i in part], torch.long)
            with attached(self.host, [*hooks, *self._unembedding(last)]):
                logits = self.host.forward(tokens)
            order = torch.arange(len(part), device=self.device)
            parts.append((logits[:, 0] if logits.shape[1] == 1 else logits[order, last]).float())
        return torch.cat(parts)

    def _tensor(self, values: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def rows_at_once(host: Host, n_rows: int, n_tokens: int, n_new_tokens: int) -> int:
    """How many completions are written at once by default: 256, or what 4 GiB hold where prompts are long.

    Args:
        host: the opened model, which the caller has frozen.
        n_rows: the number of completions.
        n_tokens: the length of the longest prompt.
        n_new_tokens: the most tokens that are added to it.
    """
    rows = min(n_rows, WRITTEN_AT_ONCE)
    if rows * n_tokens <= WRITTEN_TOKENS:
        return rows
    first, step, cache = bytes_of_writing(host, n_tokens)
    return max(1, min(rows, WRITING_BYTES // max(first, step + cache * (n_tokens + n_new_tokens))))


def bytes_of_writing(host: Host, n_tokens: int) -> tuple[int, int, int]:
    """Measures the writing of one row: the most that its first pass holds, what a step adds, and a token's cache."""
    decoder = Decoder(host, [[0] * n_tokens], lambda rows: [])
    with torch.no_grad():
        with Tally() as tally:
            logits = decoder.first()
            del logits
            held = tally.live
            most = tally.peak
        with Tally() as tally:
            try:
                decoder.step(torch.zeros(1, 1, dtype=torch.long, device=host.device))
            except CACHE_ERRORS as error:  # then the whole text runs again at each step
                if is_out_of_memory(error):
                    raise
            more = tally.peak
    return most, max(0, more - held), held // n_tokens


def closeness(dtype: torch.dtype) -> float:
    """How far a pass with a cache may differ from one without, in this precision."""
    return TOLERANCES.get(dtype, 1e-3)


def _at(hooks: Sequence[Hook], where: Bool[Tensor, "row pos"]) -> list[Hook]:
    """Limits hooks, which must act on each position by itself, to the positions where the mask is True."""

    def limited(function: Callable[..., Any]) -> Callable[..., Any]:
        def at_some_positions(activation: Tensor, hook: Any) -> Tensor | None:
            changed = function(activation, hook=hook)
            return None if changed is None else torch.where(where[..., None].to(changed.device), changed, activation)

        return at_some_positions

    return [(name, limited(function)) for name, function in hooks]
