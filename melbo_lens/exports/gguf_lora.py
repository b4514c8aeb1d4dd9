"""Which LoRA does llama.cpp load?  A GGUF file with one adapter, checked on the Hugging Face model."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from melbo_lens.exports import exporter, gguf_files
from melbo_lens.exports.weights import Lora, compare, lora_of
from melbo_lens.models.access import Model
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Prompts


@exporter("gguf-lora")
def to_gguf_lora(
    adapters: Perturbation | Sequence[Perturbation],
    path: str | os.PathLike[str],
    model: Model | None = None,
    hf_model: nn.Module | None = None,
    prompts: Prompts | None = None,
    architecture: str | None = None,
) -> Path:
    """Writes one adapter as a LoRA of llama.cpp, after checking that it has the same effect.

    For weights W [out in] that llama.cpp calls `blk.N.ffn_down.weight` (the MLP's) or `blk.N.attn_output.weight` (the
    attention's), the file holds `.lora_a` = A [rank in] and `.lora_b` = B [out rank], both F32. llama.cpp computes
    ``W x + alpha / rank * B A x``. The scale of the adapter is part of B, and alpha is the rank. There is one alpha
    for all layers, so those of a smaller rank than others are filled up with zeros. These weights are never permuted in
    a GGUF file; what llama.cpp permutes are the rows of Llama's query and key weights.

    It is used as `llama-cli -m model.gguf --lora FILE`, or in a request to its server, which was started with the same
    option, as `"lora": [{"id": 0, "scale": 1.0}]`.

    Args:
        adapters: one adapter, such as `adapters[3]`.
        path: the file to write.
        model: the model that the adapter was learned on. By default it is the remembered model, if that still lives.
        hf_model: the Hugging Face model to check against; see `weights.compare` for the default.
        prompts: the prompts to check on; by default those of the fit.
        architecture: `general.architecture` of the model's own GGUF file. By default it is known for common
            architectures (`gguf_files.ARCHITECTURES`).

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: the `gguf` package is not installed.
        ValueError: there isn't exactly one adapter, the check refuses it, or llama.cpp's names for this model are not
            known.

    Warns:
        UserWarning: there was no Hugging Face model to check against.

    Source: llama.cpp, `convert_lora_to_gguf.py` and `src/llama-adapter.cpp`.
    """
    gguf = gguf_files.library()  # before anything is computed
    lora = lora_of(adapters, "gguf-lora", model)
    theirs = lora.host.architecture
    architecture = architecture or gguf_files.ARCHITECTURES.get(theirs, "unknown")
    names = _tensor_names(gguf, architecture, theirs, lora)
    compare(lora, hf_model, prompts)
    tensors = {}
    for module, (a, b) in lora.factors.items():
        tensors[f"{names[module]}.weight.lora_a"], tensors[f"{names[module]}.weight.lora_b"] = a, b
    metadata = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(lora.alpha)}
    return gguf_files.write(path, architecture, metadata, tensors)


def _tensor_names(gguf: Any, architecture: str, theirs: str, lora: Lora) -> dict[str, str]:
    """Hugging Face module -> llama.cpp's name, such as "blk.3.ffn_down", by the package's own table."""
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known[architecture], lora.host.n_layers) if architecture in known else {}
    missing = [module for module in lora.names.values() if module not in table]
    if missing:
        raise ValueError(
            f"architecture={architecture!r} of llama.cpp has no weights for {missing[0]!r} of {theirs}: pass "
            "architecture=, the general.architecture of the model's own GGUF file."
        )
    return {module: table[module] for module in lora.names.values()}
