"""Which architectures are tried, beyond the six that every test knows?  Tiny random models of the decoders that transformers has."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests import models

D, CTX, VOCAB = 32, 64, len(models.WORDS)
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": CTX, **TOKENS}
GQA = {**WIDE, "num_key_value_heads": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 3}
MAMBA2 = {"mamba_d_state": 8, "mamba_d_conv": 3, "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}

# name -> (configuration class, settings)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("ApertusConfig", GQA),
    "arcee": ("ArceeConfig", {**GQA, "head_dim": 8}),
    "bamba": ("BambaConfig", {**GQA, **MAMBA2, "attn_layer_indices": [1, 3]}),
    "bloom": ("BloomConfig", {"hidden_size": D, "n_layer": 4, "n_head": 4, "seq_length": CTX, **TOKENS}),
    "codegen": ("CodeGenConfig", {"n_embd": D, "n_layer": 4, "n_head": 4, "n_positions": CTX, "n_ctx": CTX, "rotary_dim": 4, **TOKENS}),
    "cohere": ("CohereConfig", GQA),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **WIDE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "ernie4_5": ("Ernie4_5Config", {**GQA, "head_dim": 8}),
    "exaone4": ("Exaone4Config", {**GQA, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "falcon": ("FalconConfig", {"hidden_size": D, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": CTX, **TOKENS}),
    "falcon_rw": (
        "FalconConfig",
        {
            "hidden_size": D,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            **TOKENS,
        },
    ),
    "falcon_h1": ("FalconH1Config", {**GQA, **MAMBA2, "mamba_d_ssm": 64, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**GQA, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**GQA, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**GQA, "head_dim": 8, "sliding_window": 8}),
    "glm": ("GlmConfig", {**GQA, "head_dim": 8}),
    "glm4": ("Glm4Config", {**GQA, "head_dim": 8}),
    "gpt2": ("GPT2Config", {"n_embd": D, "n_layer": 4, "n_head": 4, "n_positions": CTX, **TOKENS}),
    "gpt_bigcode": ("GPTBigCodeConfig", {"n_embd": D, "n_layer": 4, "n_head": 4, "n_positions": CTX, **TOKENS}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": D,
            "num_layers": 4,
            "num_heads": 4,
            "max_position_embeddings": CTX,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 8,
            **TOKENS,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", WIDE),
    "gpt_oss": ("GptOssConfig", {**GQA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "gptj": ("GPTJConfig", {"n_embd": D, "n_layer": 4, "n_head": 4, "n_positions": CTX, "rotary_dim": 4, **TOKENS}),
    "granite": ("GraniteConfig", {**GQA, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0}),
    "granite_moe": ("GraniteMoeConfig", {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.5}),
    "granite_moe_hybrid": (
        "GraniteMoeHybridConfig",
        {
            **GQA,
            **MAMBA2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"] * 2,
        },
    ),
    "helium": ("HeliumConfig", {**GQA, "head_dim": 8}),
    "hunyuan": ("HunYuanDenseV1Config", {**GQA, "head_dim": 8}),
    "jamba": (
        "JambaConfig",
        {
            **GQA,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "lfm2": ("Lfm2Config", {**GQA, "layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48, "block_auto_adjust_ff_dim": False}),
    "llama": ("LlamaConfig", GQA),
    "mamba": ("MambaConfig", {"hidden_size": D, "num_hidden_layers": 4, "state_size": 8, **TOKENS}),
    "ministral3": ("Ministral3Config", {**GQA, "head_dim": 8}),
    "mistral": ("MistralConfig", {**GQA, "sliding_window": 8}),
    "mixtral": ("MixtralConfig", {**GQA, "num_local_experts": 4}),
    "mpt": ("MptConfig", {"d_model": D, "n_layers": 4, "n_heads": 4, "max_seq_len": CTX, **TOKENS}),
    "nemotron": ("NemotronConfig", {**GQA, "head_dim": 8}),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **GQA,
            "head_dim": 8,
            "hybrid_override_pattern": "M-*-",
            "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "olmo": ("OlmoConfig", GQA),
    "olmo2": ("Olmo2Config", GQA),
    "olmo3": ("Olmo3Config", {**GQA, "sliding_window": 8}),
    "olmo_hybrid": ("OlmoHybridConfig", {**GQA, **LINEAR, "layer_types": ["linear_attention", "full_attention"] * 2}),
    "olmoe": ("OlmoeConfig", {**GQA, "num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPTConfig", {**WIDE, "ffn_dim": 48, "word_embed_proj_dim": D}),
    "phi": ("PhiConfig", GQA),
    "phi3": ("Phi3Config", {**GQA, "sliding_window": None}),
    "phimoe": ("PhimoeConfig", {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("Qwen2Config", GQA),
    "qwen2_moe": ("Qwen2MoeConfig", {**GQA, **MOE, "shared_expert_intermediate_size": 24}),
    "qwen3": ("Qwen3Config", {**GQA, "head_dim": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", {**GQA, **MOE, "head_dim": 8}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **GQA,
            **MOE,
            **LINEAR,
            "head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    "rwkv": ("RwkvConfig", {"hidden_size": D, "num_hidden_layers": 4, "attention_hidden_size": D, "context_length": CTX, **TOKENS}),
    "seed_oss": ("SeedOssConfig", {**GQA, "head_dim": 8}),
    "smollm3": ("SmolLM3Config", GQA),
    "stablelm": ("StableLmConfig", GQA),
    "starcoder2": ("Starcoder2Config", GQA),
    "xglm": ("XGLMConfig", {"d_model": D, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": CTX, **TOKENS}),
    "zamba2": ("Zamba2Config", {**WIDE, **{k: v for k, v in MAMBA2.items() if k != "mamba_n_heads"}, "n_mamba_heads": 8, "layers_block_type": ["mamba", "hybrid"] * 2}),
}


PROMPTS = ["w1 w2 w3 w4 w5 w6 w7", "w8 w9", "w3 w1 w4 w1"]
SOURCE, TARGET = 1, 4
N_NEW = 8
CLEAR = 1e-3  # where the two best logits are nearer than this, rounding may choose


def save(name: str, directory: Any, seed: int = 0) -> str:
    """A Hugging Face directory of a random model with weights large enough that attention and MLPs matter."""
    kind, settings = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3)
    model.save_pretrained(directory)
    models.tokenizer().save_pretrained(directory)
    return str(directory)


class Plain:
    """The Hugging Face model itself, with ordinary forward hooks: what all else is held against."""

    def __init__(self, directory: str, bridge: Any) -> None:
        self.network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.layers = [self.network.get_submodule(bridge.adapter.translate_transformer_lens_path(f"blocks.{i}")) for i in (SOURCE, TARGET - 1)]

    def __call__(self, ids: list[int], bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, and the stream that leaves the last layer, of one prompt alone, with a bias added to the stream that leaves the source layer."""
        seen = []

        def add(module: Any, arguments: Any, output: Any) -> Any:
            return (output[0] + bias, *output[1:]) if isinstance(output, tuple) else output + bias

        def read(module: Any, arguments: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handles = [layer.register_forward_hook(function) for layer, function in zip(self.layers, (add, read), strict=True)]
        try:
            with torch.no_grad():
                logits = self.network(torch.tensor([ids]), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits[0], seen[0][0]

    def greedy(self, ids: list[int], bias: torch.Tensor) -> tuple[list[int], list[float]]:
        """`N_NEW` tokens, each by a pass over everything, and how clearly each was the best."""
        ids, new, gaps = list(ids), [], []
        for _ in range(N_NEW):
            best = self(ids, bias)[0][-1].topk(2)
            new.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            ids.append(new[-1])
        return new, gaps
