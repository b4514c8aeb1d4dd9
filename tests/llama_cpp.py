"""What does llama.cpp itself compute from a GGUF model, under a control vector or a LoRA?

llama.cpp is the library in llama-cpp-python, called by its C interface. Files of control vectors are read as
`common/common.cpp` reads them, since that part of llama.cpp is not in the library.
"""

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import torch
from llama_cpp import llama_cpp as library

from melbo_lens.organisms import base_model


def smollm2_file() -> Path:
    """The GGUF file from which the organism "smollm2" was dequantised."""
    package = importlib.util.find_spec(base_model.PACKAGE)
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return file


def dequantised(source: Path, target: Path) -> Path:
    """Writes the same model with float32 weights, so that llama.cpp rounds no activations to 8 bits either."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], (field.types[1:] or [None])[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


class LlamaCpp:
    """A model that llama.cpp runs on the CPU."""

    def __init__(self, file: Path, n_ctx: int = 256) -> None:
        library.llama_log_set(_silent, None)
        library.llama_backend_init()
        settings = library.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = library.llama_model_load_from_file(str(file).encode(), settings)
        assert self.model, f"llama.cpp refuses {file}"
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = n_ctx
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.type_k = settings.type_v = gguf.GGMLQuantizationType.F32  # by default the cache is in half precision
        settings.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = library.llama_init_from_model(self.model, settings)
        assert self.context, f"llama.cpp can't run {file}"
        self.d_model, self.n_layers = library.llama_model_n_embd(self.model), library.llama_model_n_layer(self.model)
        self.d_vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))
        self.loras: dict[Path, object] = {}

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """The logits after the last of these tokens."""
        library.llama_memory_clear(library.llama_get_memory(self.context), True)
        return self._append(ids)

    def greedy(self, ids: Sequence[int], n_new: int, end: int) -> list[int]:
        """The most probable tokens after these, one by one with llama.cpp's cache, without `end`."""
        new, following = [], int(self.logits(ids).argmax())
        while following != end and len(new) < n_new:
            new.append(following)
            following = int(self._append([following]).argmax())
        return new

    @contextmanager
    def under(self, file: Path, lora: bool = False, scale: float = 1.0, shift: int = 0) -> Iterator[None]:
        """Applies a file inside the block, as `--control-vector-scaled FILE:SCALE` or `--lora-scaled FILE:SCALE` does.

        A shift adds control vectors so many layers too late.
        """
        if lora:
            self._set_lora(file, scale)
        else:
            self._set_control(self._directions(file, scale, shift))
        yield
        if lora:
            self._set_lora(None, 1.0)
        else:
            self._set_control(None)

    def _directions(self, file: Path, scale: float, shift: int) -> np.ndarray:
        """What `common_control_vector_load` makes of a file: [layer d_model], beginning with layer 1."""
        data = np.zeros((self.n_layers - 1, self.d_model), np.float32)
        for tensor in gguf.GGUFReader(file).tensors:
            layer = int(tensor.name.removeprefix("direction."))
            assert layer >= 1 and tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.data.ndim == 1
            data[layer - 1 + shift] += scale * tensor.data
        return data

    def _set_control(self, data: np.ndarray | None) -> None:
        pointer = None if data is None else data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        size = 0 if data is None else data.size
        assert library.llama_set_adapter_cvec(self.context, pointer, size, self.d_model, 1, self.n_layers) == 0

    def _set_lora(self, file: Path | None, scale: float) -> None:
        if file is not None and file not in self.loras:
            self.loras[file] = library.llama_adapter_lora_init(self.model, str(file).encode())
            assert self.loras[file], f"llama.cpp refuses {file}"
        chosen = [] if file is None else [self.loras[file]]
        adapters = (library.llama_adapter_lora_p_ctypes * len(chosen))(*chosen)
        scales = (ctypes.c_float * len(chosen))(*[scale] * len(chosen))
        assert library.llama_set_adapters_lora(self.context, adapters, len(chosen), scales) == 0

    def _append(self, ids: Sequence[int]) -> torch.Tensor:
        tokens = (library.llama_token * len(ids))(*ids)
        assert library.llama_decode(self.context, library.llama_batch_get_one(tokens, len(ids))) == 0
        found = np.ctypeslib.as_array(library.llama_get_logits_ith(self.context, -1), (self.d_vocab,))
        return torch.from_numpy(found.copy())


@library.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    pass
