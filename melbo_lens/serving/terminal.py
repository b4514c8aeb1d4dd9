"""How does a conversation look in a terminal?  Two columns, and commands that begin with a slash.

What a model wrote is shown as plain text: neither the terminal nor rich takes any of it for a command.
"""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from melbo_lens.serving.conversation import Conversation
from melbo_lens.serving.harmless import harmless

HELP = {
    "/vector N": "steer with vector N",
    "/sign +": "or -, the direction of the vector",
    "/scale X": "the multiple at which it is added; + and - move it a step",
    "/length N": "the longest answer, in tokens",
    "/temperature X": "0 is greedy",
    "/reset": "forget what was said",
    "/save PATH": "write the transcript as JSON",
    "/help": "these lines",
    "/quit": "or the end of the input",
}
STEPS = (0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # of the slider; any scale can be typed
SIGNS = {"+": 1, "+1": 1, "1": 1, "-": -1, "-1": -1}


def talk(conversation: Conversation, console: Console, read: Callable[[], str]) -> None:
    """Reads lines until they end: messages to both sides, and commands.

    Args:
        conversation: what is talked with.
        console: where answers are shown.
        read: returns the next line; EOFError ends the conversation.
    """
    console.print(Text(harmless(f"{_setting(conversation)}; /help lists the commands")))
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                console.print(Text(harmless(command(conversation, line))))
            elif line:
                _show(conversation, console, line)
        except KeyboardInterrupt:
            console.print(Text("stopped; nothing was said"))
        except Exception as error:  # also of memory that ran out, or of a kernel: what was said before can be saved
            console.print(Text(f"error: {harmless(str(error) or repr(error))}", style="red"))


def command(conversation: Conversation, line: str) -> str:
    """Carries a command out and returns what to say about it.

    Raises:
        ValueError: there is no such command, or what it was given breaks a rule.
        OSError: a file can't be written.
    """
    name, _, given = line.partition(" ")
    given = given.strip()
    if name == "/help":
        return "\n".join(f"{usage:<16}{what}" for usage, what in HELP.items())
    if name == "/reset":
        conversation.turns.clear()
        return "both sides have forgotten what was said"
    if name == "/save":
        if not given:
            raise ValueError("/save needs a path, as /save transcript.json.")
        return f"wrote {conversation.save(Path(given).expanduser())}"
    if name == "/sign":
        if given not in SIGNS:
            raise ValueError(f"/sign {given} must be /sign + or /sign -.")
        conversation.choose(sign=SIGNS[given])
    elif name in ("/vector", "/length"):
        conversation.choose(**{"vector" if name == "/vector" else "max_new_tokens": _number(name, given, int)})
    elif name == "/scale" and given in ("+", "-"):
        conversation.choose(scale=_next_step(conversation.scale, given))
    elif name in ("/scale", "/temperature"):
        conversation.choose(**{name[1:]: _number(name, given, float)})
    else:
        raise ValueError(f"there is no command {name}: /help lists them.")
    return _setting(conversation)


def _number(name: str, given: str, kind: Callable[[str], float]) -> float:
    try:
        return kind(given)
    except ValueError as error:
        raise ValueError(f"{name} {given} must be a number, as {name} 3.") from error


def _setting(conversation: Conversation) -> str:
    """Which vector steers, and how."""
    word, n = conversation.perturbations.word, len(conversation.perturbations)
    multiple = conversation.sign * conversation.scale
    where = _slider(conversation.scale)
    return f"{word} {conversation.vector} of {n} (0 to {n - 1}), multiplied by {multiple:+g}  {where}"


def _next_step(scale: float, way: str) -> float:
    """The step of the slider above or below a scale.

    Raises:
        ValueError: it is at the end of the slider, or beyond.
    """
    left = [step for step in STEPS if (step > scale if way == "+" else step < scale)]
    if not left:
        raise ValueError(
            f"/scale {way} goes from {STEPS[0]:g} to {STEPS[-1]:g}, and it is at {scale:g}: type a number."
        )
    return left[0] if way == "+" else left[-1]


def _slider(scale: float) -> str:
    """Where a scale stands between the steps, in a line."""
    place = min(range(len(STEPS)), key=lambda i: abs(STEPS[i] - scale))
    line = "".join("●" if i == place else "─" for i in range(len(STEPS)))
    return f"{STEPS[0]:g} {line} {STEPS[-1]:g}"


def _show(conversation: Conversation, console: Console, message: str) -> None:
    """Says a message and shows both answers side by side."""
    with console.status("writing"):
        turn = conversation.say(message)
    table = Table(expand=True, show_lines=True)
    for heading in (
        f"{conversation.perturbations.word} {turn.vector}, multiplied by {turn.sign * turn.scale:+g}",
        "unsteered",
    ):
        table.add_column(Text(heading), ratio=1, overflow="fold")
    table.add_row(Text(harmless(turn.steered)), Text(harmless(turn.unsteered)))
    console.print(table)
