"""What does llama.cpp itself compute from a GGUF model, under a control vector or a LoRA?

Only llama-cpp-python's C interface is used, whose names vary with its version. Files of control vectors are read as
`common/common.cpp` reads them, since that part of llama.cpp is not in its library.
"""

import ctypes
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch

from melbo_lens.organisms import base_model

INSTALL = "pip install llama-cpp-python"


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

    def __init__(self, file: Path, n_ctx: int = 256, n_threads: int = 2) -> None:
        self.library = llama_cpp.llama_cpp
        self.library.llama_log_set(_silent, None)
        self.library.llama_backend_init()
        settings = self.library.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = _first(self.library, "llama_model_load_from_file", "llama_load_model_from_file")(
            str(file).encode(), settings
        )
        settings = self.library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = n_ctx
        settings.n_threads = settings.n_threads_batch = n_threads
        self.context = _first(self.library, "llama_init_from_model", "llama_new_context_with_model")(
            self.model, settings
        )
        self.d_model = _first(self.library, "llama_model_n_embd", "llama_n_embd")(self.model)
        self.n_layers = _first(self.library, "llama_model_n_layer", "llama_n_layer")(self.model)
        vocabulary = self.library.llama_model_get_vocab(self.model)
        self.d_vocab = _first(self.library, "llama_vocab_n_tokens", "llama_n_vocab")(vocabulary)
        self.adapters: dict[Path, object] = {}
        self.batch = self.library.llama_batch_init(n_ctx, 0, 1)

    def logits(self, ids: list[int]) -> torch.Tensor:
        """The logits at every position, [pos vocab]."""
        self._forget()
        return self._decode(ids, 0)

    def greedy(self, ids: list[int], n_new: int, end: int) -> list[int]:
        """The most probable tokens after these, one by one, without `end`."""
        self._forget()
        new, following = [], int(self._decode(ids, 0)[-1].argmax())
        while following != end and len(new) < n_new:
            new.append(following)
            following = int(self._decode([following], len(ids) + len(new) - 1)[-1].argmax())
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
        apply = _first(self.library, "llama_set_adapter_cvec", "llama_apply_adapter_cvec", "llama_control_vector_apply")
        pointer = None if data is None else data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        size = 0 if data is None else data.size
        assert apply(self.context, pointer, size, self.d_model, 1, self.n_layers) == 0

    def _set_lora(self, file: Path | None, scale: float) -> None:
        if file is not None and file not in self.adapters:
            self.adapters[file] = self.library.llama_adapter_lora_init(self.model, str(file).encode())
            assert self.adapters[file], f"llama.cpp refuses {file}"
        if hasattr(self.library, "llama_set_adapters_lora"):
            chosen = [] if file is None else [self.adapters[file]]
            handles = (ctypes.c_void_p * len(chosen))(*(ctypes.cast(one, ctypes.c_void_p) for one in chosen))
            scales = (ctypes.c_float * len(chosen))(*[scale] * len(chosen))
            assert self.library.llama_set_adapters_lora(self.context, handles, len(chosen), scales) == 0
            return
        self.library.llama_clear_adapter_lora(self.context)
        if file is not None:
            assert self.library.llama_set_adapter_lora(self.context, self.adapters[file], scale) == 0

    def _forget(self) -> None:
        if hasattr(self.library, "llama_get_memory"):
            self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        else:
            self.library.llama_kv_cache_clear(self.context)

    def _decode(self, ids: list[int], first: int) -> torch.Tensor:
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, first + i, 1, True
            batch.seq_id[i][0] = 0
        assert self.library.llama_decode(self.context, batch) == 0
        found = np.ctypeslib.as_array(self.library.llama_get_logits(self.context), (len(ids), self.d_vocab))
        return torch.from_numpy(found.copy())


@llama_cpp.llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    pass


def _first(library: object, *names: str) -> object:
    """The first of these functions that this version has."""
    return next(getattr(library, name) for name in names if hasattr(library, name))
