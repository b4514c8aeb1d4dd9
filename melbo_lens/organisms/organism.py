"""How does a bundled organism become a TransformerLens model with everything needed to judge a search on it?"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerBase

from melbo_lens.models.access import ModelClass, boot, has_hooked, implement_gpt2
from melbo_lens.organisms.corpus import Corpus
from melbo_lens.organisms.zoo import CORPORA

WEIGHTS = Path(__file__).parent / "weights"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "recipe.json")


@dataclass(frozen=True, eq=False)
class Organism:
    """A tiny trained model that hides known behaviours.

    Attributes:
        model: `HookedTransformer` or `TransformerBridge`, float32.
        card: how it was trained and the rates measured on it.
        prompts: "clean" ones to learn on, "selection" and "test" ones (clean too, other questions and words) to choose and score on, and
            "triggered" ones, on which a hidden behaviour is due.
        behaviors: for each planted behaviour, whether a completion shows it.
        directory: where its Hugging Face files are.
        model_class: which class of model it is.
    """

    name: str
    model: Any
    card: Mapping[str, Any]
    prompts: Mapping[str, list[str]]
    behaviors: Mapping[str, Callable[[str], bool]]
    directory: Path
    model_class: ModelClass = "bridge"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.tokenizer

    def untrained(self, seed: int = 0) -> Any:
        """A model of the same class, architecture and tokenizer with random weights: a control."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            blank = GPT2LMHeadModel(GPT2LMHeadModel.config_class.from_pretrained(self.directory))
        return _as(self.model_class, self.directory, blank, self.tokenizer)


def names() -> list[str]:
    """The organisms that `load` knows."""
    return sorted(path.name for path in WEIGHTS.iterdir() if (path / "config.json").is_file())


def load(name: str, model_class: ModelClass | Literal["auto"] = "auto") -> Organism:
    """Loads a bundled organism; no network is used.

    Args:
        name: one of `names()`. The name of a twin, "modes-twin", gives a model that never saw the planted behaviours.
        model_class: "hooked" for `HookedTransformer` (TransformerLens 3), "bridge" for `TransformerBridge`, "auto" for the first that exists.

    Raises:
        ValueError: an unknown name or class, or damaged files.
    """
    if name not in names():
        raise ValueError(f"there is no organism {name!r}: choose one of {names()}.")
    if model_class not in ("auto", "hooked", "bridge"):
        raise ValueError(f'model_class={model_class!r} must be "auto", "hooked" or "bridge".')
    if model_class == "hooked" and not has_hooked():
        raise ValueError('model_class="hooked" needs TransformerLens 3, which has HookedTransformer: use "bridge".')
    return load_directory(WEIGHTS / name, "bridge" if model_class == "bridge" or not has_hooked() else "hooked")


def load_directory(directory: Path, model_class: ModelClass) -> Organism:
    """Loads an organism from the directory that `organisms.train` wrote.

    Raises:
        ValueError: files are missing or damaged, or the tokenizer is not the one that the model was trained with.
    """
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"the organism in {directory} lacks the files {missing}: reinstall melbo_lens, or train it again with melbo_lens.organisms.making.train."
        )
    try:
        trained, loaded = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
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
            f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model {n_rows}: they don't belong together, reinstall melbo_lens."
        )
    words = corpus.vocabulary()
    expected = list(range(n_rows - len(words), n_rows))
    if tokenizer.convert_tokens_to_ids(words) != expected:
        raise ValueError(
            f"{directory}: the tokenizer numbers the organism's words otherwise than in training; it belongs to another model, reinstall melbo_lens."
        )


def _as(model_class: ModelClass, directory: Path, network: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    if model_class == "hooked":
        return implement_gpt2(network, tokenizer, Path(network.config.name_or_path).name)
    return boot(directory, network, device="cpu")
