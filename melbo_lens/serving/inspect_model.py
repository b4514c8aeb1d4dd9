"""How does Inspect evaluate a steered model?  Its concurrent calls become rows of one batch, under one perturbation.

inspect eval task.py --model melbo/DIR -M vectors=v.safetensors -M index=3 -M scale=1.0
"""

import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
from safetensors.torch import save as to_bytes

try:
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        GenerateConfig,
        Logprob,
        Logprobs,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        StopReason,
        TopLogprob,
    )
    from inspect_ai.tool import ToolChoice, ToolInfo
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("models of Inspect need a package: pip install 'melbo-lens[inspect]'.") from error

from melbo_lens.arguments import check_seed, count, flag
from melbo_lens.generation.decoding import Decoding, Run, Written
from melbo_lens.generation.generate import check_top_p, stops_of
from melbo_lens.generation.steer import fitting
from melbo_lens.imports import load
from melbo_lens.measures.controls import random_like
from melbo_lens.methods.provenance import fingerprint, warn_of_another_model
from melbo_lens.models.access import host_of
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import tokenize
from melbo_lens.sweeps.jobs import ModelKey
from melbo_lens.texts import spelled, text_after

MAX_TOKENS = 256  # where neither the task nor the command says it
PAUSE = 0.02  # seconds; as long as calls keep coming at this distance, a batch waits for them
STOP_REASONS: dict[str, StopReason] = {"end": "stop", "stop": "stop", "length": "max_tokens", "context": "model_length"}
# settings that would change what is written, and that nothing here follows
UNKNOWN = "top_k frequency_penalty presence_penalty logit_bias best_of response_schema prompt_logprobs".split()


@dataclass(frozen=True)
class Settings:
    """What all calls of a batch have in common."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stops: tuple[str, ...]
    n_likely: int


@dataclass(eq=False)
class Call:
    """One call of Inspect: a prompt that is to be completed n times."""

    text: str
    ids: list[int]
    n: int
    settings: Settings
    written: list[Written] = field(default_factory=list)
    error: Exception | None = None


class Gathering:
    """Lets concurrent calls run together, in a thread, so that the event loop goes on.

    One batch runs at a time. Whoever has its turn takes all waiting calls of equal settings with it, so those that came
    while the last batch ran are the next one.
    """

    def __init__(self, complete: Callable[[list[Call]], None], at_once: int) -> None:
        self.complete, self.at_once = complete, at_once
        self.waiting: list[Call] = []
        self.turn = anyio.Lock()

    async def answered(self, call: Call) -> list[Written]:
        """Waits until the call is completed, by its own turn or by another's.

        Raises:
            Exception: what completing this call raised.
        """
        self.waiting.append(call)
        try:
            async with self.turn:
                if call in self.waiting:
                    await self._gathered()
                    alike = [one for one in self.waiting if one.settings == call.settings and one is not call]
                    batch = [call, *alike][: self.at_once]
                    self.waiting = [one for one in self.waiting if one not in batch]
                    await anyio.to_thread.run_sync(self._run, batch)
        finally:
            if call in self.waiting:  # it was cancelled
                self.waiting.remove(call)
        if call.error is not None:
            raise call.error
        return call.written

    async def _gathered(self) -> None:
        """Waits as long as further calls come and there is room for them."""
        n = 0
        while n < len(self.waiting) < self.at_once:
            n = len(self.waiting)
            await anyio.sleep(PAUSE)

    def _run(self, batch: list[Call]) -> None:
        try:
            self.complete(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].error = error
            else:  # each by itself, so that only the one that is to blame fails
                for call in batch:
                    self._run([call])


class SteeredModelAPI(ModelAPI):
    """A model that TransformerLens loads, under one vector or adapter.

    Temperature 0, at which it decodes greedily, is the default. With a seed, what is sampled depends on the seed and
    the prompt alone, so epochs repeat it; without one, each completion is drawn afresh. Log-probabilities are those
    of the steered model at temperature 1. Tools are refused.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (Inspect's own default)
        *,
        vectors: str | None = None,
        index: int | None = None,
        scale: float = 1.0,
        random: bool = False,
        seed: int = 0,
        prompts: str | list[str] | None = None,
        layer: int | None = None,
        chat: bool | None = None,
        batch_size: int = 32,
        dtype: str = "float32",
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        """Reads the perturbation and loads the model.

        Args:
            model_name: a local directory, the name of an organism, or a name on the Hugging Face hub.
            base_url, api_key: unused. The address of an opened model is a digest of all that decides what it writes,
                since Inspect's cache tells models of one name apart by their address.
            config: Inspect's settings.
            vectors: a file that `ml.load` reads, of vectors or adapters; None leaves the model unsteered.
            index: which of them, from 0; a file that has one needs no index.
            scale: the multiple at which it is applied; negative for the other sign.
            random: whether a random one of equal norm takes its place: the control that `generate` has for it.
            seed: the seed of that control.
            prompts: a text or several over which the control of an adapter has the same norm of update; one that was
                fitted knows its own.
            layer: the layer, if a file of another tool doesn't say it.
            chat: whether the tokenizer's chat template writes the messages, as is the default where there is one; False
                gives their texts as they are, one in each line.
            batch_size: how many completions run at once, at most.
            dtype, device: how the model is loaded, as in `ModelKey`.

        Raises:
            ValueError: an option is unknown or breaks a rule, or the perturbation doesn't fit the model.

        Warns:
            UserWarning: the perturbation was learned on a model of other weights.
        """
        super().__init__(model_name=model_name, base_url=base_url, api_key=api_key, config=config)
        if unknown:
            known = "vectors index scale random seed prompts layer chat batch_size dtype device".split()
            raise ValueError(f"a melbo model has no options {sorted(unknown)}: choose from {known}.")
        count("batch_size", batch_size)
        check_seed(seed)
        flag("random", random)
        if chat is not None:
            flag("chat", chat)
        perturbation = None if vectors is None else load(vectors, layer=layer)
        self.index = None if perturbation is None else _chosen(perturbation, index)
        if perturbation is None and (index is not None or random or scale != 1.0):
            raise ValueError("index, random and scale are about vectors, and none are given: add -M vectors=FILE.")
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale or not math.isfinite(scale):
            raise ValueError(f"scale={scale!r} must be a finite number other than 0: leave vectors out to not steer.")
        if prompts is not None and not random:
            raise ValueError(
                "prompts are what a random adapter is measured on, and none was asked for: leave them out."
            )
        if random and _needs_prompts(perturbation) and prompts is None:
            raise ValueError(
                "random=True needs prompts: a random adapter has the same mean norm of its update over them, and this "
                "one was not fitted here, so it knows none. Add -M prompts='a prompt as those of the task'."
            )
        self.scale = float(scale)
        self.kind = "unsteered" if perturbation is None else "random" if random else "steered"
        self.host = host_of(ModelKey(model_name, dtype, device).load())
        self.chat = bool(getattr(self.host.tokenizer, "chat_template", None)) if chat is None else chat
        if perturbation is not None:
            warn_of_another_model(perturbation, self.host)
            perturbation = fitting(self.host, perturbation)
            if random:
                texts = [prompts] if isinstance(prompts, str) else prompts
                asked = texts and [self._prompt([{"role": "user", "content": text}]) for text in texts]
                perturbation = random_like(perturbation, self.host, asked, seed=seed)
        self.bank = perturbation
        self.base_url = f"melbo:{self._digest()}"
        self.batch_size = batch_size
        self.gathering = Gathering(self._complete, batch_size)

    def max_tokens(self) -> int:
        """How many tokens are written where nobody says it."""
        return MAX_TOKENS

    def max_connections(self) -> int:
        """How many calls are open at a time: as many as a batch has rows."""
        return self.batch_size

    def collapse_user_messages(self) -> bool:
        """Joins messages of a user that follow each other, which many chat templates refuse."""
        return True

    async def tokenize(self, text: str) -> list[int]:
        """The ids of a text by itself."""
        return list(self.host.tokenizer(text, add_special_tokens=False)["input_ids"])

    async def count_text_tokens(self, text: str) -> int:
        """The number of a text's tokens."""
        return len(await self.tokenize(text))

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Completes a chat, in a batch with others.

        Raises:
            ValueError: there are tools, contents other than text, or settings that are not offered; or the chat doesn't
                fit the model's context.
        """
        if tools:
            raise ValueError("a melbo model calls no tools: run a task that has none.")
        settings, n = _settings(config), config.num_choices or 1
        if n > 1 and settings.temperature == 0:
            raise ValueError(f"num_choices={n} at temperature 0 would repeat one completion: set a temperature.")
        chat = [{"role": message.role, "content": _text(message)} for message in input]
        batch = tokenize(self.host, [self._prompt(chat)], n_new_tokens=1)
        began = time.monotonic()
        call = Call(batch.texts[0], batch.rows()[0], n, settings)
        written = await self.gathering.answered(call)
        n_new = sum(len(one.tokens) + (one.ended == "end") for one in written)
        n_old = len(call.ids)
        return ModelOutput(
            model=self.model_name,
            choices=[self._choice(one, call.ids, config) for one in written],
            usage=ModelUsage(input_tokens=n_old, output_tokens=n_new, total_tokens=n_old + n_new),
            time=time.monotonic() - began,
            metadata={"kind": self.kind, "vector": self.index, "scale": self.scale if self.bank is not None else 0.0},
        )

    def _complete(self, calls: list[Call]) -> None:
        """Completes calls of equal settings as one batch."""
        settings = calls[0].settings
        sign, scale = (0, 0.0) if self.bank is None else (1 if self.scale > 0 else -1, abs(self.scale))
        runs = [
            # without a seed, equal prompts must differ as well
            Run(call.text, self.kind, self.index, sign, scale, k if settings.seed is not None else k + 1000 * place)
            for place, call in enumerate(calls)
            for k in range(call.n)
        ]
        decoding = Decoding(
            self.host,
            self.bank,
            0,  # the bank holds either vectors or controls
            settings.max_new_tokens,
            settings.temperature,
            "all",
            secrets.randbits(63) if settings.seed is None else settings.seed,
            list(settings.stops),
            top_p=settings.top_p,
            n_likely=settings.n_likely,
        )
        rows = [call.ids for call in calls for _ in range(call.n)]
        written = iter(decoding.complete(runs, rows, self.batch_size, progress=False))
        for call in calls:
            call.written = [next(written) for _ in range(call.n)]

    def _prompt(self, chat: list[dict[str, str]]) -> Any:
        """A chat as the model gets it: as messages, or as their texts in lines."""
        return chat if self.chat else "\n".join(message["content"] for message in chat)

    def _digest(self) -> str:
        """A digest of the weights, of what is added to them, and of how a prompt is written.

        What a fit was like, how many rows run at once and on which device changes nothing that is written.
        """
        template = getattr(self.host.tokenizer, "chat_template", None) if self.chat else None
        what: list[Any] = [fingerprint(self.host), str(self.host.dtype), template, self.kind]
        tensors = b""
        if self.bank is not None and self.index is not None:
            parts, header = self.bank[self.index].parts()
            what += [self.index, self.scale, type(self.bank).__name__, header]
            tensors = to_bytes({name: part.detach().cpu().contiguous() for name, part in parts.items()})
        return hashlib.blake2b(json.dumps(what, sort_keys=True).encode() + tensors, digest_size=16).hexdigest()

    def _choice(self, written: Written, before: list[int], config: GenerateConfig) -> ChatCompletionChoice:
        logprobs = None
        if config.logprobs:
            n = self._n_in_text(written, before)
            rows = zip(written.tokens[:n], written.log_probs, written.likely, strict=False)
            logprobs = Logprobs(
                content=[
                    Logprob(
                        **self._spelled(token),
                        logprob=log_prob,
                        top_logprobs=[TopLogprob(**self._spelled(i), logprob=value) for i, value in likely] or None,
                    )
                    for token, log_prob, likely in rows
                ]
            )
        message = ChatMessageAssistant(content=written.text, model=self.model_name, source="generate")
        return ChatCompletionChoice(message=message, stop_reason=STOP_REASONS[written.ended], logprobs=logprobs)

    def _n_in_text(self, written: Written, before: list[int]) -> int:
        """How many tokens stand in the text as a whole: a stop cuts off its own, also one that begins before it."""
        n = len(written.tokens)
        if written.ended != "stop":
            return n
        texts = {k: text_after(self.host, before, written.tokens[:k]) for k in range(n, -1, -1)}
        return next(k for k, text in texts.items() if written.text.startswith(text))

    def _spelled(self, token: int) -> dict[str, Any]:
        """A token's text, and its bytes where they are known."""
        text, held = spelled(self.host, token)
        return {"token": text, "bytes": None if held is None else list(held)}


def _needs_prompts(perturbation: Perturbation | None) -> bool:
    """Whether a random one like it has to be measured on prompts that somebody must give."""
    return isinstance(perturbation, SteeringAdapters) and not perturbation.provenance.get("prompt_tokens")


def _chosen(perturbation: Perturbation, index: int | None) -> int:
    """The place of the one that was asked for, or of the only one."""
    n = len(perturbation)
    if index is None and n == 1:
        return 0
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < n:
        raise ValueError(f"index={index!r} must be one of 0 to {n - 1}: the file holds {n} {perturbation.word}s.")
    return index


def _settings(config: GenerateConfig) -> Settings:
    """The settings of a call.

    Raises:
        ValueError: one breaks a rule, or is not offered.
    """
    asked = [name for name in UNKNOWN if getattr(config, name) is not None]
    if asked:
        raise ValueError(f"a melbo model doesn't follow {asked}: leave them out.")
    temperature, top_p = config.temperature or 0.0, 1.0 if config.top_p is None else config.top_p
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or a positive, finite number.")
    check_top_p(top_p)
    n_new = MAX_TOKENS if config.max_tokens is None else config.max_tokens
    count("max_tokens", n_new)
    n_likely = (config.top_logprobs or 0) if config.logprobs else 0
    return Settings(n_new, temperature, top_p, config.seed, tuple(stops_of(config.stop_seqs)), n_likely)


def _text(message: ChatMessage) -> str:
    """The text of a message.

    Raises:
        ValueError: it is of a tool, or holds something else than text.
    """
    parts = [] if isinstance(message.content, str) else message.content
    other = sorted({part.type for part in parts} - {"text", "reasoning"})
    if other or message.role == "tool" or getattr(message, "tool_calls", None):
        raise ValueError(f"a melbo model reads text only, and this chat has {other or 'calls of tools'}.")
    return message.text
