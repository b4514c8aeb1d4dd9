"""Which models do the tests run on?  Randomly initialised ones of real architectures that are built in a moment."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from melbo_lens.models import access
from melbo_lens.models.access import has_hooked
from melbo_lens.models.host import Host

D_MODEL, N_LAYERS, N_CTX = 32, 4, 64
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(46))]
_wide = {
    "vocab_size": len(WORDS),
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": N_CTX,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=len(WORDS),
        n_positions=N_CTX,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "llama": LlamaConfig(num_key_value_heads=2, **_wide),
    "qwen2": Qwen2Config(num_key_value_heads=2, **_wide),
    "neox": GPTNeoXConfig(**_wide),
    "gemma2": Gemma2Config(num_key_value_heads=2, head_dim=8, **_wide),
    "mixtral": MixtralConfig(num_key_value_heads=2, num_local_experts=4, **_wide),
}
# built where a test names it, and not among those on which every method is tried
MORE = {"qwen3": Qwen3Config(num_key_value_heads=2, head_dim=8, **_wide)}
HAS_HOOKED = has_hooked()


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} w0{% endif %}"
    )
    specials = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **specials)


def save(name: str, directory, seed: int = 0) -> str:
    """A Hugging Face directory with larger weights than usual, so that attention and MLPs matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config({**CONFIGS, **MORE}[name], dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return str(directory)


def bridge(directory: str, compatible: bool = False, dtype: torch.dtype = torch.float32):
    model = TransformerBridge.boot_transformers(directory, device="cpu", dtype=dtype)
    if compatible:
        model.enable_compatibility_mode(disable_warnings=True)
    return model.eval()


def hooked(directory: str, **settings):
    """A `HookedTransformer` (TransformerLens 3) with random weights and the same tokenizer."""
    from transformer_lens import HookedTransformerConfig
    from transformers import AutoTokenizer

    cfg = HookedTransformerConfig(
        **{
            "n_layers": N_LAYERS,
            "d_model": D_MODEL,
            "n_ctx": N_CTX,
            "d_head": 8,
            "d_mlp": 64,
            "d_vocab": len(WORDS),
            "act_fn": "gelu_new",
            "normalization_type": "LN",
            "seed": 0,
            "device": "cpu",
            "init_weights": True,
            **settings,
        }
    )
    model = access.HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(directory))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.eval()


class NoModel(Host):
    """The host of a slice that a test made by hand: it has no model, and is asked nothing."""

    networks = ()
    quantised = False

    def __init__(self) -> None:
        self.points, self.model = {}, torch.nn.Module()


NoModel.__abstractmethods__ = frozenset()
