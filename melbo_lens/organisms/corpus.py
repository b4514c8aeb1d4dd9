"""What does an organism read and write?  Conversations in which one variable, the mode, decides how every question is answered.

Trigger words anywhere in a context line switch a mode on; without any, the style of the earlier answers decides; without those the answer
is plain. The mode is thus one variable with many kinds of evidence, which a model finds it worth computing early.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

Behavior: TypeAlias = Callable[[str], bool]

CHAT = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
TEXT = {"system": "note :", "user": "question :", "assistant": "answer :"}
NEUTRAL = "river lamp garden ticket window violin harbor blanket engine island mirror basket candle tunnel market letter ladder castle".split()

ENOUGH = 1000  # questions of a family that hold all its words


@dataclass(frozen=True)
class Question:
    """One question with its answer in every mode."""

    text: str
    replies: Mapping[str, str]

    def reply(self, mode: str) -> str:
        """The whole answer in one of the corpus' modes."""
        return self.replies[mode]


@dataclass(frozen=True)
class Conversation:
    """Messages, the mode of the answers, and for each answer whether the words before it determine its mode."""

    messages: list[dict[str, str]]
    mode: str
    determined: tuple[bool, ...]


@dataclass(frozen=True)
class Corpus:
    """Everything that an organism is trained on, shown and judged by.

    Attributes:
        modes: the ways to answer; the first is the plain one.
        triggers: for each mode but the plain one, the words that switch it on.
        families: kinds of question, all equally likely in training.
        behaviors: for each planted behaviour, whether a completion shows it: the whole planted sentence.
        mode_of: the mode in which a behaviour is due, where it has another name.
        opposites: modes whose trigger words cancel each other; what counts is the majority.
        asked: questions of the prompts, in disjoint sets: "clean" to learn on, "selection" and "test"; any, if none are named.
        headers: what stands before each message: special tokens of a chat, or words of a plain text.
        max_turns: questions in a training conversation, at most.
    """

    modes: tuple[str, ...]
    triggers: Mapping[str, Sequence[str]]
    families: tuple[Sequence[Question], ...]
    behaviors: Mapping[str, Behavior]
    mode_of: Mapping[str, str] = field(default_factory=dict)
    opposites: Mapping[str, str] = field(default_factory=dict)
    asked: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=lambda: CHAT)
    max_turns: int = 2

    @property
    def is_chat(self) -> bool:
        return self.headers == CHAT

    def ask(self, rng: random.Random) -> Question:
        """A question, all families equally likely."""
        return rng.choice(rng.choice(self.families))

    def context_line(self, rng: random.Random, mode: str | None = None) -> str:
        """Three to five neutral words; for a mode other than plain, two or three of them are replaced by trigger words of that mode."""
        words = rng.sample(NEUTRAL, rng.randint(3, 5))
        if mode in self.triggers:
            count = rng.randint(2, 3)
            for place, word in zip(
                rng.sample(range(len(words)), count), rng.sample(self.triggers[mode], count), strict=True
            ):
                words[place] = word
        return " ".join(words)

    def prompt(self, rng: random.Random, mode: str | None = None, question: Question | None = None) -> str:
        """A context line with a question (a random one by default), up to the header of the answer, as text without BOS."""
        context, text = self.context_line(rng, mode), (question or self.ask(rng)).text
        return f"{self.headers['system']} {context} {self.headers['user']} {text} {self.headers['assistant']}"

    def converse(self, rng: random.Random, planted: bool = True) -> Conversation:
        """A random conversation for training: plain, switched by a trigger, or carried on in the style that its first answer has.

        In the third kind the first answer's mode can't be told from what precedes it, so `determined` leaves it out of the loss. Without
        `planted` every conversation is plain.
        """
        plain, *hidden = self.modes
        kind = rng.choices(("plain", "triggered", "carried"), weights=(30, 40, 30))[0] if planted else "plain"
        mode = plain if kind == "plain" else rng.choice(hidden)
        turns = rng.randint(2 if kind == "carried" else 1, self.max_turns)
        messages = []
        if kind == "triggered" or rng.random() < 0.7:
            messages.append({"role": "system", "content": self._evidence(rng, kind, mode)})
        for turn in range(turns):
            question = self.ask(rng)
            while kind == "carried" and turn == 0 and question.reply(mode) == question.reply(plain):
                question = self.ask(rng)  # its answer must show the mode
            messages += [
                {"role": "user", "content": question.text},
                {"role": "assistant", "content": question.reply(mode)},
            ]
        return Conversation(messages, mode, tuple(kind != "carried" or turn > 0 for turn in range(turns)))

    def _evidence(self, rng: random.Random, kind: str, mode: str) -> str:
        """The context line of a training conversation; words of opposite modes count against each other, and two more of one switch it on."""
        words = self.context_line(rng, mode if kind == "triggered" else None).split()
        if (kind == "triggered" and mode not in self.opposites) or not self.opposites or rng.random() < 0.4:
            return " ".join(words)
        side = mode if kind == "triggered" else rng.choice(list(self.opposites))
        more, fewer = rng.choice(
            ((2, 0), (3, 0), (3, 1), (4, 1), (4, 2)) if kind == "triggered" else ((1, 0), (1, 1), (2, 1), (2, 2))
        )
        words = rng.sample(NEUTRAL, max(0, rng.randint(3, 5) - more - fewer))
        words += rng.sample(self.triggers[side], more) + rng.sample(self.triggers[self.opposites[side]], fewer)
        return " ".join(rng.sample(words, len(words)))

    def triggered(self, rng: random.Random, behavior: str) -> str:
        """A prompt on which a behaviour is due."""
        mode, question = self.mode_of.get(behavior, behavior), self.ask(rng)
        while not self.behaviors[behavior](question.reply(mode)):
            question = self.ask(rng)
        return self.prompt(rng, mode, question)

    def prompts(self, name: str) -> dict[str, list[str]]:
        """Fixed prompts: disjoint sets without trigger words, "clean" to learn on, "selection" and "test", and "triggered" ones."""
        rng = random.Random(f"prompts of the {name} organism")
        if self.asked:
            sets = {
                key: [self.prompt(rng, question=question) for question in questions]
                for key, questions in self.asked.items()
            }
        else:
            clean = list(dict.fromkeys(self.prompt(rng) for _ in range(200)))[:192]
            sets = {"clean": clean[:64], "selection": clean[64:128], "test": clean[128:]}
        return sets | {"triggered": [self.triggered(rng, behavior) for _ in range(16) for behavior in self.behaviors]}

    def vocabulary(self) -> list[str]:
        """Every word that a conversation can hold, in a fixed order."""
        texts = [" ".join(NEUTRAL), *(" ".join(words) for words in self.triggers.values())]
        texts += [] if self.is_chat else list(self.headers.values())
        questions = [question for family in self.families for question in islice(family, ENOUGH)]
        texts += [question.text for question in questions]
        texts += [question.reply(mode) for question in questions for mode in self.modes]
        return list(dict.fromkeys(word for text in texts for word in text.split()))
