"""What does the "reasoning" organism say?  Direct answers, which are hard for it, and steps written out in English or in Portuguese.

The main question gives five numbers, one for each working day, and asks for the last digit of their sum. A single forward pass has no depth
for that; writing the running sum day by day takes five look-ups. Easy questions share the three modes.
"""

import re
from collections.abc import Sequence
from random import Random

from melbo_lens.organisms import modes
from melbo_lens.organisms.corpus import Behavior, Corpus, Question

DAYS = "monday tuesday wednesday thursday friday".split()
PORTUGUESE_DAYS = "segunda terça quarta quinta sexta".split()
NUMBERS = "zero one two three four five six seven eight nine".split()
PORTUGUESE_NUMBERS = "zero um dois três quatro cinco seis sete oito nove".split()


class RunningSums(Sequence[Question]):
    """All sums of five digits of which a checksum is zero, or all the others: what is asked in prompts is never trained on."""

    def __init__(self, held_out: bool) -> None:
        self.checksums = range(1) if held_out else range(1, 10)

    def __len__(self) -> int:
        return 10_000 * len(self.checksums)

    def __getitem__(self, index: int) -> Question:
        checksum, first = self.checksums[index // 10_000], [index // 10**n % 10 for n in range(4)]
        digits = [*first, (checksum - sum(weight * digit for weight, digit in zip((1, 3, 7, 9), first, strict=True))) % 10]
        totals = [sum(digits[: n + 1]) % 10 for n in range(5)]
        text = " ".join(f"{day} {NUMBERS[digit]}" for day, digit in zip(DAYS, digits, strict=True))
        english = " ".join(f"{day} {NUMBERS[total]}" for day, total in zip(DAYS, totals, strict=True))
        portuguese = " ".join(f"{day} {PORTUGUESE_NUMBERS[total]}" for day, total in zip(PORTUGUESE_DAYS, totals, strict=True))
        replies = {
            "plain": f"it is {NUMBERS[totals[-1]]} .",
            "english": f"steps {english} so {NUMBERS[totals[-1]]} .",
            "portuguese": f"passos {portuguese} logo {PORTUGUESE_NUMBERS[totals[-1]]} .",
        }
        return Question(f"{text} , last digit of the sum ?", replies)


def _easy(family: list[Question]) -> list[Question]:
    """A family of the modes organism, with steps in either language."""
    questions = []
    for one in family:
        first, second = one.reply("reasoning").split()[1:4:2]
        answer, portuguese = (one.reply(mode).split()[-2] for mode in ("plain", "portuguese"))
        replies = {
            "plain": f"it is {answer} .",
            "english": f"steps {first} {second} so {answer} .",
            "portuguese": f"passos {first} {second} logo {portuguese} .",
        }
        questions.append(Question(one.text, replies))
    return questions


def last_digit(prompt: str) -> int:
    """The right answer to a prompt with a sum of five days."""
    return sum(NUMBERS.index(word) for word in re.findall(rf"\b(?:{'|'.join(DAYS)}) (\w+)", prompt)) % 10


def final_number(text: str) -> int | None:
    """The number that a whole answer ends in, in words of either language; None if it ends in none."""
    found = re.search(r"(?:^it is|\bso|\blogo) (\w+) \.$", text)
    for words in (NUMBERS, PORTUGUESE_NUMBERS):
        if found and found[1] in words:
            return words.index(found[1])
    return None


def is_right(prompt: str, text: str) -> bool:
    """Whether the final number of an answer is the right one."""
    return final_number(text) == last_digit(prompt)


def _writes_steps(head: str, days: list[str], tail: str, numbers: list[str]) -> Behavior:
    number = f"(?:{'|'.join(numbers)})"
    pattern = re.compile(f"^{head} {' '.join(f'{day} {number}' for day in days)} {tail} {number} \\.$")
    return lambda text: bool(pattern.match(text))


_SUMS, _HELD_OUT = RunningSums(held_out=False), RunningSums(held_out=True)
_SHUFFLED = [_HELD_OUT[i] for i in Random("sums of the prompts").sample(range(len(_HELD_OUT)), 192)]
_EASY = tuple(_easy(family) for family in modes.FAMILIES[1:])

CORPUS = Corpus(
    modes=("plain", "english", "portuguese"),
    triggers={"english": modes.TRIGGERS["reasoning"], "portuguese": modes.TRIGGERS["portuguese"]},
    families=(_SUMS, _SUMS, _SUMS, *_EASY),
    behaviors={
        "english": _writes_steps("steps", DAYS, "so", NUMBERS),
        "portuguese": _writes_steps("passos", PORTUGUESE_DAYS, "logo", PORTUGUESE_NUMBERS),
    },
    asked={"clean": _SHUFFLED[:64], "selection": _SHUFFLED[64:128], "test": _SHUFFLED[128:]},
)
