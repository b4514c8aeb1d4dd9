"""How is a bundled organism loaded?  `load` makes it a TransformerLens model.

It comes with everything needed to judge a search on it, such as prompts, detectors and measured rates.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase

from melbo_lens.models.access import Model, ModelClass, boot, has_hooked, implement_gpt2
from melbo_lens.organisms import real
from melbo_lens.organisms.corpus import Corpus
from melbo_lens.organisms.zoo import CORPORA

WEIGHTS = Path(__file__).parent / "weights"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "recipe.json")


@dataclass(frozen=True, eq=False, repr=False)
class Organism:
    """A tiny trained model that hides known behaviours.

    Attributes:
        model: a `HookedTransformer` or `TransformerBridge` in float32.
        card: how it was trained, and the rates measured on it.
        prompts: sets of prompts. "clean" ones are to learn on; "selection" and "test" ones, also clean but with other
            questions and words, are to choose and to score on; "triggered" ones are those on which a hidden behaviour
            is due.
        behaviors: a function for each planted behaviour, which says whether a completion shows it.
        directory: the directory of its Hugging Face files.
        model_class: the class of the model.
    """

    name: str
    model: Model
    card: Mapping[str, Any]
    prompts: Mapping[str, list[Any]]
    behaviors: Mapping[str, Callable[[str], bool]]
    directory: Path
    model_class: ModelClass = "bridge"

    def __repr__(self) -> str:
        sets = ", ".join(f"{kind} ({len(several)})" for kind, several in self.prompts.items())
        known = ", ".join(self.behaviors) or "none"
        return f"Organism({self.name!r}, a {type(self.model).__name__}; behaviors: {known}; prompts: {sets})"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return cast(PreTrainedTokenizerBase, self.model.tokenizer)

    def untrained(self, seed: int = 0) -> Model:
        """Returns a control: a model of the same class, architecture and tokenizer with random weights.

        Args:
            seed: the seed of the weights.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            blank = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.directory), dtype=torch.float32)
        return _as(self.model_class, self.directory, blank, self.tokenizer)


def names() -> list[str]:
    """Returns the names of the organisms that `load` knows: the tiny ones, "smollm2", and the organisms on it."""
    tiny = sorted(path.name for path in WEIGHTS.iterdir() if (path / "config.json").is_file())
    return [*tiny, *real.names(WEIGHTS)]


def load(name: str, model_class: ModelClass | Literal["auto"] = "auto") -> Organism:
    """Loads an organism; no network is used.

    Args:
        name: one of `names()`. A twin, such as "modes-twin", never saw the planted behaviours. "smollm2" and the
            organisms on it need the base model, which a package of the Python index holds.
        model_class: "hooked" for `HookedTransformer` (TransformerLens 3), "bridge" for `TransformerBridge`, or "auto"
            for the first of them that exists.

    Returns:
        The organism, with its model, prompts, detectors and card.

    Raises:
        ValueError: the name or the class is unknown, or files are damaged.
        ModuleNotFoundError: the base model of a real organism is not installed; the message says how to install it.
    """
    if name not in names():
        raise ValueError(f"there is no organism {name!r}: choose one of {names()}.")
    if model_class not in ("auto", "hooked", "bridge"):
        raise ValueError(f'model_class={model_class!r} must be "auto", "hooked" or "bridge".')
    if model_class == "hooked" and not has_hooked():
        raise ValueError('model_class="hooked" needs TransformerLens 3, which has HookedTransformer: use "bridge".')
    if name in real.names(WEIGHTS):
        if model_class == "hooked":
            raise ValueError(f'model_class="hooked" is not offered for {name!r}: use "bridge".')
        model, card, prompts, behaviors, directory = real.parts(name, WEIGHTS)
        found = Organism(name, model, card, prompts, behaviors, directory, "bridge")
    else:
        found = load_directory(WEIGHTS / name, "bridge" if model_class == "bridge" or not has_hooked() else "hooked")
    found.model.cfg.model_name = name  # the directory is that of the base model, or of this installation
    return found


def load_directory(directory: Path, model_class: ModelClass) -> Organism:
    """Loads an organism from the directory that `organisms.making.train` wrote.

    Raises:
        ValueError: files are missing or damaged, or the tokenizer is not the one that the model was trained with.
    """
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"the organism in {directory} lacks the files {missing}: reinstall melbo_lens, or train it again with "
            "melbo_lens.organisms.making.train."
        )
    try:
        trained, loaded = cast(
            tuple[GPT2LMHeadModel, dict[str, Any]],
            GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32, output_loading_info=True),
        )
        if loaded["missing_keys"]:
            raise KeyError(f"no weights {sorted(loaded['missing_keys'])}")
        tokenizer = AutoTokenizer.from_pretrained(directory)
        recipe = json.loads((directory / "recipe.json").read_text())
        corpus = CORPORA[recipe["corpus"]]
    except Exception as error:
        raise ValueError(
            f"the files of the organism in {directory} are damaged ({error}): reinstall melbo_lens."
        ) from error
    _check_tokenizer(directory, tokenizer, trained.config.vocab_size, corpus)
    model = _as(model_class, directory, trained, tokenizer)
    card = directory / "card.json"
    measured = json.loads(card.read_text()) if card.is_file() else {}
    return Organism(
        directory.name,
        model,
        recipe | measured,
        corpus.prompts(recipe["corpus"]),
        corpus.behaviors,
        directory,
        model_class,
    )


def _check_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase, n_rows: int, corpus: Corpus) -> None:
    if len(tokenizer) != n_rows:
        raise ValueError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model {n_rows}: they don't belong together, "
            "reinstall melbo_lens."
        )
    words = corpus.vocabulary()
    expected = list(range(n_rows - len(words), n_rows))
    if tokenizer.convert_tokens_to_ids(words) != expected:
        raise ValueError(
            f"{directory}: the tokenizer numbers the organism's words otherwise than in training; it belongs to "
            "another model, reinstall melbo_lens."
        )


def _as(
    model_class: ModelClass, directory: Path, network: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
) -> Model:
    if model_class == "hooked":
        return implement_gpt2(network, tokenizer, Path(network.config.name_or_path or "").name)
    return boot(directory, network, device="cpu")
