"""How does one talk to a steered and to the unsteered model at once?  Each side goes on from its own answers.

Nothing here knows of a terminal.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from melbo_lens import files
from melbo_lens.arguments import count
from melbo_lens.generation.generate import generate
from melbo_lens.imports import load
from melbo_lens.methods.provenance import warn_of_another_model
from melbo_lens.models.access import Model, host_of
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.sweeps.jobs import ModelKey

Side: TypeAlias = Literal["steered", "unsteered"]
MODEL_FILE, VECTORS_FILE = "loaded.json", "vectors.safetensors"


@dataclass(frozen=True)
class Turn:
    """What was said and answered, and under which setting."""

    message: str
    steered: str
    unsteered: str
    vector: int
    sign: int
    scale: float
    temperature: float


@dataclass(eq=False)
class Conversation:
    """A chat with a model under one of several perturbations, beside the same chat without it.

    A setting that is changed holds from the next turn on; what was answered before stays in both histories.

    Attributes:
        model: the model; it is left as it was after each turn.
        perturbations: the vectors or adapters to choose from.
        key: how the model was loaded, for the transcript.
        vector, sign, scale: which of them steers, and at which multiple.
        max_new_tokens, temperature, seed: how answers are written; temperature 0 is greedy.
        turns: what was said so far.

    Warns:
        UserWarning: the perturbations were learned on a model of other weights.
    """

    model: Model
    perturbations: Perturbation
    key: ModelKey
    vector: int = 0
    sign: int = 1
    scale: float = 1.0
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    turns: list[Turn] = field(default_factory=list)
    saved: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        warn_of_another_model(self.perturbations, host_of(self.model))
        self.choose(vector=self.vector, sign=self.sign, scale=self.scale, max_new_tokens=self.max_new_tokens)
        self.choose(temperature=self.temperature)

    def choose(self, **settings: Any) -> None:
        """Changes settings; all of them or none.

        Raises:
            ValueError: a value breaks a rule.
        """
        for name, value in settings.items():
            if name == "vector":
                count("vector", value, least=0)
                if value >= len(self.perturbations):
                    n, word = len(self.perturbations), self.perturbations.word
                    raise ValueError(f"{word} {value} was asked for, there are {n}: choose from 0 to {n - 1}.")
            elif name == "sign" and value not in (1, -1):
                raise ValueError(f"sign={value!r} must be +1 or -1.")
            elif name == "scale" and not 0 < value < float("inf"):
                raise ValueError(
                    f"scale={value!r} must be a positive, finite number; the sign is a setting of its own."
                )
            elif name == "temperature" and not 0 <= value < float("inf"):
                raise ValueError(f"temperature={value!r} must be 0 (greedy) or a positive, finite number.")
            elif name == "max_new_tokens":
                count(name, value)
        for name, value in settings.items():
            setattr(self, name, value)

    def say(self, message: str) -> Turn:
        """Lets both sides answer a message of the user; if one of them can't, nothing was said.

        Raises:
            ValueError: a history is too long for the model's context, or the chat template refuses it.
            FloatingPointError: the perturbation makes the logits NaN or infinite.
        """
        answers = {side: self._answer(side, message) for side in ("steered", "unsteered")}
        turn = Turn(
            message, answers["steered"], answers["unsteered"], self.vector, self.sign, self.scale, self.temperature
        )
        self.turns.append(turn)
        return turn

    def history(self, side: Side, message: str | None = None) -> list[dict[str, str]]:
        """The messages of one side, and a further one of the user."""
        said = [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in (("user", turn.message), ("assistant", getattr(turn, side)))
        ]
        return said if message is None else [*said, {"role": "user", "content": message}]

    def transcript(self) -> dict[str, Any]:
        """All that was said with its settings, in JSON's types."""
        return {
            "model": asdict(self.key),
            "perturbations": dict(self.perturbations.provenance),
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "turns": [asdict(turn) for turn in self.turns],
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the transcript as JSON, atomically.

        Raises:
            FileExistsError: there is a file that this conversation did not write.
        """
        path = Path(path).resolve()
        if path.exists() and path not in self.saved:
            raise FileExistsError(f"{path} exists already: choose another name.")
        files.write_json(path, self.transcript())
        self.saved.add(path)
        return path

    def _answer(self, side: Side, message: str) -> str:
        chat = self.history(side, message)
        templated = bool(getattr(self.model.tokenizer, "chat_template", None))
        prompts: Sequence[Any] = [chat] if templated else ["\n".join(said["content"] for said in chat)]
        written = generate(
            self.model,
            list(prompts),
            self.perturbations[self.vector] if side == "steered" else None,
            self.max_new_tokens,
            signs=self.sign,
            scales=self.scale,
            temperature=self.temperature,
            include_unsteered=side == "unsteered",
            include_random=False,
            seed=self.seed + len(self.turns),
            progress=False,
        )
        return str(written.table.text[0])


def remember_model(directory: str | os.PathLike[str], key: ModelKey) -> None:
    """Notes in the folder of a run on which model it was, so that a conversation can load it.

    A directory is noted with its whole path.
    """
    name = str(Path(key.name).resolve()) if not key.is_organism and Path(key.name).is_dir() else key.name
    files.write_json(Path(directory) / MODEL_FILE, {**asdict(key), "name": name})


def what_to_open(
    directory: str | os.PathLike[str] | None, key: ModelKey | None, vectors: str | os.PathLike[str] | None, **said: Any
) -> tuple[ModelKey, Perturbation]:
    """Reads which model and which perturbations a conversation is with, before the model is loaded.

    Args:
        directory: the folder of a run, which knows both.
        key, vectors: in place of the folder's.
        said: what a file of another tool doesn't say, as for `ml.load`.

    Raises:
        ValueError: neither says which model, or which vectors, or a file is damaged.
        FileNotFoundError: a file is missing.
    """
    if key is None:
        path = None if directory is None else Path(directory) / MODEL_FILE
        if path is None or not path.is_file():
            where = "no folder was given" if path is None else f"{directory} doesn't say it (it has no {MODEL_FILE})"
            raise ValueError(f"which model? {where}: give --model.")
        try:
            key = ModelKey(**files.read_json(path))
        except TypeError as error:
            raise ValueError(f"{path} is damaged: it doesn't say how a model is loaded ({error}).") from error
    if vectors is None:
        if directory is None:
            raise ValueError("which vectors? Give the folder of a run, or --vectors FILE.")
        vectors = Path(directory) / VECTORS_FILE
    return key, load(vectors, **said)
