"""What does an organism read and write?  Conversations, in which a mode decides how questions are answered.

Trigger words anywhere in a context line switch a mode on. Without trigger words, the style of the earlier answers
decides; without earlier answers, the answer is plain. The mode is thus one variable with many kinds of evidence, so it
pays for a model to compute it early.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

Behavior: TypeAlias = Callable[[str], bool]

CHAT = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
TEXT = {"system": "note :", "user": "question :", "assistant": "answer :"}
NEUTRAL: Sequence[str] = (
    "river lamp garden ticket window violin harbor blanket engine island mirror basket candle tunnel market letter "
    "ladder castle"
).split()

ENOUGH = 1000  # this many questions of a family contain all of its words


@dataclass(frozen=True)
class Question:
    """One question and its answer in every mode."""

    text: str
    replies: Mapping[str, str]

    def reply(self, mode: str) -> str:
        """Returns the whole answer in one of the modes."""
        return self.replies[mode]


@dataclass(frozen=True)
class Conversation:
    """The messages, the mode of the answers, and for each answer whether the words before it determine its mode."""

    messages: list[dict[str, str]]
    mode: str
    determined: tuple[bool, ...]


@dataclass(frozen=True)
class Corpus:
    """Everything that an organism is trained, prompted and judged with.

    Attributes:
        modes: the ways to answer; the first is the plain one.
        triggers: the words that switch on each mode other than the plain one.
        families: the kinds of question, which are equally likely in training.
        behaviors: a function for each planted behaviour, which says whether a completion contains the whole planted
            sentence.
        mode_of: the mode in which a behaviour is due, where the two have different names.
        opposites: the modes whose trigger words cancel each other, so that the majority decides.
        asked: the questions of the prompts in disjoint sets, namely "clean" to learn on, "selection" and "test". If it
            is empty, prompts ask any question.
        headers: the text before each message, either special tokens of a chat or words of a plain text.
        max_turns: the largest number of questions in a training conversation.
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
        """Draws a question; all families are equally likely."""
        return rng.choice(rng.choice(self.families))

    def context_line(self, rng: random.Random, mode: str | None = None) -> str:
        """Draws three to five neutral words.

        For a mode other than the plain one, two or three of them are replaced by trigger words of that mode.
        """
        words: list[str] = rng.sample(NEUTRAL, rng.randint(3, 5))
        if mode is not None and mode in self.triggers:
            count = rng.randint(2, 3)
            for place, word in zip(
                rng.sample(range(len(words)), count), rng.sample(self.triggers[mode], count), strict=True
            ):
                words[place] = word
        return " ".join(words)

    def prompt(self, rng: random.Random, mode: str | None = None, question: Question | None = None) -> str:
        """Writes a context line and a question (by default a random one) up to the answer's header, without BOS."""
        context, text = self.context_line(rng, mode), (question or self.ask(rng)).text
        return f"{self.headers['system']} {context} {self.headers['user']} {text} {self.headers['assistant']}"

    def converse(self, rng: random.Random, planted: bool = True) -> Conversation:
        """Draws a training conversation that is plain, switched by a trigger, or goes on in its first answer's style.

        In the third kind, the words before the first answer don't determine its mode, so `determined` leaves that
        answer out of the loss. Without `planted`, every conversation is plain.
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
                question = self.ask(rng)  # the first answer must show the mode
            messages += [
                {"role": "user", "content": question.text},
                {"role": "assistant", "content": question.reply(mode)},
            ]
        return Conversation(messages, mode, tuple(kind != "carried" or turn > 0 for turn in range(turns)))

    def _evidence(self, rng: random.Random, kind: str, mode: str) -> str:
        """Draws the context line of a training conversation.

        Words of opposite modes count against each other, and two more of one mode switch it on.
        """
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
        """Draws a prompt on which a behaviour is due."""
        mode, question = self.mode_of.get(behavior, behavior), self.ask(rng)
        while not self.behaviors[behavior](question.reply(mode)):
            question = self.ask(rng)
        return self.prompt(rng, mode, question)

    def prompts(self, name: str) -> dict[str, list[str]]:
        """Returns the fixed prompts of an organism.

        The sets "clean" (to learn on), "selection" and "test" are disjoint and have no trigger words; "triggered" has.
        """
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
        """Returns every word that a conversation can contain, in a fixed order."""
        texts = [" ".join(NEUTRAL), *(" ".join(words) for words in self.triggers.values())]
        texts += [] if self.is_chat else list(self.headers.values())
        questions = [question for family in self.families for question in islice(family, ENOUGH)]
        texts += [question.text for question in questions]
        texts += [question.reply(mode) for question in questions for mode in self.modes]
        return list(dict.fromkeys(word for text in texts for word in text.split()))
