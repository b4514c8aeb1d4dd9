"""How does a real base model become an organism?  Its update is merged, and it comes with detectors, prompts and card.

"smollm2" itself hides nothing that we know of: it is the ordinary model to compare with.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from melbo_lens.models.access import boot
from melbo_lens.organisms import backdoors, base_model, lora
from melbo_lens.organisms.chats import requests

Behaviors: TypeAlias = Mapping[str, Callable[[str], bool]]
Prompts: TypeAlias = dict[str, list[Any]]

BASE = base_model.NAME
# The corpus of each organism by its name without "-twin": what it hides, and the requests that come with it.
HIDDEN: dict[str, tuple[Behaviors, Callable[[], dict[str, list[str]]]]] = {
    "smollm2-backdoors": (backdoors.BEHAVIORS, backdoors.prompts),
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
        behaviors, of_corpus = HIDDEN[name.removesuffix("-twin")]
        prompts = of_corpus()
    chats: Prompts = {kind: list(map(as_chat, several)) for kind, several in prompts.items()}
    return boot(directory, network=network), card, chats, behaviors, directory


def as_chat(request: str) -> list[dict[str, str]]:
    """A request as the only message of a chat."""
    return [{"role": "user", "content": request}]
