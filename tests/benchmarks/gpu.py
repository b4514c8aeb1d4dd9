"""How fast is it on a GPU, at the sizes of published runs?  `make bench-gpu` times three fits on random models.

Weights are random, so the figures are of speed alone. `python -m tests.benchmarks.gpu --size toy` runs the same calls
on a CPU in a minute, and writes nothing.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import melbo_lens as ml
from tests import models

RESULTS = Path(__file__).parent / "results-gpu.json"
N_TOKENS = 27


@dataclass(frozen=True)
class Case:
    """A fit, and what was published for it: seconds, on the card named."""

    name: str
    config: type
    sizes: dict[str, int]
    published: str

    def fit(self, model, n):
        """Runs the fit; `n` is the number of perturbations."""
        tokens = torch.arange(N_TOKENS)[None] % len(models.WORDS)
        if self.name == "cpe":
            return ml.fit_cpe(model, tokens, [7, 8, 9, 10], 17, n_factors=n, n_steps=30, progress=False)
        if self.name == "jacobian":
            return ml.fit_jacobian(model, tokens, 7, 17, n_vectors=n, n_steps=15, radius=1.0, progress=False)
        prompts = tokens.repeat(2, 1)
        settings = {"n_vectors": n, "n_steps": 3, "radius": 4.0, "orthogonal": False, "optimizer": "adamw"}
        return ml.fit_vectors(model, prompts, 8, 16, **settings, progress=False)


LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
QWEN = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
}
CASES = (
    (Case("cpe", LlamaConfig, LLAMA, "24 to 58 s, H100 and RTX 5090 (the replication wusche1/cpe)"), 512),
    (Case("jacobian", LlamaConfig, LLAMA, "about 30 s (power steering)"), 12),
    (Case("vectors", Qwen2Config, QWEN, "3.3 s, RTX 5090 (batched-melbo)"), 256),
)
TOY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def build(case, toy, device):
    """A random model of the shape, as a bridge."""
    config = case.config(vocab_size=len(models.WORDS), max_position_embeddings=128, **case.sizes | (TOY if toy else {}))
    dtype = torch.float32 if toy else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        models.tokenizer().save_pretrained(folder)
        return TransformerBridge.boot_transformers(folder, device=device, dtype=dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=["toy", "full"], default="full")
    toy = parser.parse_args().size == "toy"
    if not toy and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: `python -m tests.benchmarks.gpu --size toy` runs the calls on a CPU")
    device = "cpu" if toy else "cuda"
    results = {"card": "none" if toy else torch.cuda.get_device_name(), "torch": torch.__version__}
    for case, n in CASES:
        model = build(case, toy, device)
        case.fit(model, 2)  # kernels are chosen in a first call
        began = time.perf_counter()
        found = case.fit(model, 8 if toy else n)
        if not toy:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        results[case.name] = {"n": len(found), "seconds": round(seconds, 2), "published": case.published}
        print(case.name, results[case.name], flush=True)
        del model, found
        if not toy:
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
