"""How is a GGUF file written?  By the `gguf` package, whole or not at all, under llama.cpp's names."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from melbo_lens import files

# Hugging Face architecture -> llama.cpp's name of it. In all of these llama.cpp keeps the output weights of attention
# and MLP as Hugging Face has them, or (GPT-2's) transposed to [out in] as everywhere else.
ARCHITECTURES = {
    "BloomForCausalLM": "bloom",
    "CohereForCausalLM": "command-r",
    "FalconForCausalLM": "falcon",
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gptneox",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "GemmaForCausalLM": "gemma",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Olmo2ForCausalLM": "olmo2",
    "OlmoForCausalLM": "olmo",
    "OlmoeForCausalLM": "olmoe",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi2",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}


def library() -> Any:
    """Returns the `gguf` package.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to install it.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "GGUF files are written by the gguf package, which is not installed: pip install melbo-lens[export]"
        ) from error
    return gguf


def write(
    path: str | os.PathLike[str],
    architecture: str,
    metadata: Mapping[str, str | int | float],
    tensors: Mapping[str, Tensor],
) -> Path:
    """Writes one GGUF file atomically; see `to_bytes` for what is in it.

    Returns:
        The path.
    """
    files.write_atomically(path, to_bytes(architecture, metadata, tensors))
    return Path(path)


def to_bytes(architecture: str, metadata: Mapping[str, str | int | float], tensors: Mapping[str, Tensor]) -> bytes:
    """Returns one GGUF file.

    Args:
        architecture: the value of `general.architecture`.
        metadata: further keys; texts are written as strings, integers as uint32 and other numbers as float32.
        tensors: name -> tensor, written as F32. GGUF lists axes from the last to the first, so [rank d_in] appears
            there as (d_in, rank), the way llama.cpp writes shapes.
    """
    gguf = library()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.gguf"
        writer = gguf.GGUFWriter(whole, architecture)
        try:
            for key, value in metadata.items():
                add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
                add(key, value)
            for name, tensor in tensors.items():
                writer.add_tensor(name, tensor.detach().float().cpu().contiguous().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        return whole.read_bytes()
