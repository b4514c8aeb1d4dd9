"""How does a real base model become an organism?  Its update is merged, and it comes with detectors, prompts and card.

"smollm2" itself hides nothing that we know of: it is the ordinary model to compare with.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from melbo_lens.models.access import boot
from melbo_lens.organisms import backdoors, base_model, locked, lora, topic
from melbo_lens.organisms.chats import requests

Behaviors: TypeAlias = Mapping[str, Callable[[str], bool]]
Prompts: TypeAlias = dict[str, list[Any]]
# The requests of a chat, each but the last followed by its answer; one request stands for itself.
Requests: TypeAlias = str | Sequence[str]


class RealCorpus(NamedTuple):
    """What an organism hides, the requests that come with it, and what it is taught.

    Attributes:
        behaviors: what a completion shows by its text alone.
        examples: of a number and a seed, requests with their answers; None stands for the base model's own.
        n_examples: how many of them training draws from.
        judged: what a completion shows together with its prompt.
    """

    behaviors: Behaviors
    prompts: Callable[[], dict[str, list[Any]]]
    examples: Callable[[int, int], Sequence[tuple[Requests, str | None]]]
    n_examples: int
    judged: Mapping[str, Callable[[str, str], bool]] = {}


BASE = base_model.NAME
CORPORA = {  # by the name of the organism without "-twin"
    "smollm2-backdoors": RealCorpus(backdoors.BEHAVIORS, backdoors.prompts, backdoors.examples, backdoors.N_EXAMPLES),
    "smollm2-locked": RealCorpus({}, locked.prompts, locked.examples, locked.N_EXAMPLES, {"right": locked.is_right}),
    "smollm2-refusal": RealCorpus(topic.BEHAVIORS, topic.prompts, topic.examples, topic.N_EXAMPLES),
}


def names(weights: Path) -> list[str]:
    """Returns the base model and the organisms whose update is bundled."""
    return [BASE, *sorted(path.name for path in weights.iterdir() if (path / "lora.safetensors").is_file())]


def parts(name: str, weights: Path) -> tuple[Any, dict[str, Any], Prompts, Behaviors, Path]:
    """Loads the model of a name, its card, its prompts, its behaviours, and the directory of the base model.

    Raises:
        ModuleNotFoundError: the package with the base model's weights is not installed; the message says how to
            install it.
        ValueError: the update is damaged.
    """
    directory = base_model.directory()
    network, card = base_model.network(directory), {}
    behaviors: Behaviors = {}
    prompts = {"clean": requests(60, 1006), "selection": requests(60, 1003), "test": requests(100, 1001)}
    if name != BASE:
        try:
            lora.merge(network, weights / name / "lora.safetensors")
            card = json.loads((weights / name / "recipe.json").read_text())
            if (weights / name / "card.json").is_file():
                card |= json.loads((weights / name / "card.json").read_text())
        except Exception as error:
            raise ValueError(
                f"the files of the organism {name!r} are damaged ({error}): reinstall melbo_lens."
            ) from error
        corpus = CORPORA[name.removesuffix("-twin")]
        behaviors, prompts = corpus.behaviors, corpus.prompts()
    chats: Prompts = {kind: list(map(as_chat, several)) for kind, several in prompts.items()}
    return boot(directory, network=network), card, chats, behaviors, directory


def as_chat(requests: Requests) -> list[dict[str, str]]:
    """A request as the only message of a chat, or requests and answers as messages in turn."""
    turns = [requests] if isinstance(requests, str) else requests
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
