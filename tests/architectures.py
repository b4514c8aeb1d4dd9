"""Which architectures are tried beyond the six of every test?  Tiny random decoders of transformers."""

import json
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
import transformers
from peft import PeftModel
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

import melbo_lens as ml
from melbo_lens.models import hooks, passes
from melbo_lens.perturbations.sites import SITES
from tests import models

RESULTS = Path(__file__).parent / "architectures.json"
MAJOR = version("transformer_lens").split(".")[0]

D, CTX, VOCAB = 32, 64, len(models.WORDS)
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": CTX,
    **TOKENS,
}
GQA = {**WIDE, "num_key_value_heads": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
MAMBA2 = {
    "mamba_d_state": 8,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}

# name -> (configuration class, settings)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("ApertusConfig", GQA),
    "arcee": ("ArceeConfig", {**GQA, "head_dim": 8}),
    "bamba": ("BambaConfig", {**GQA, **MAMBA2, "attn_layer_indices": [1, 3]}),
    "bloom": ("BloomConfig", {"hidden_size": D, "n_layer": 4, "n_head": 4, "seq_length": CTX, **TOKENS}),
    "codegen": (
        "CodeGenConfig",
        {"n_embd": D, "n_layer": 4, "n_head": 4, "n_positions": CTX, "n_ctx": CTX, "rotary_dim": 4, **TOKENS},
    ),
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
    "exaone4": (
        "Exaone4Config",
        {**GQA, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "falcon": (
        "FalconConfig",
        {"hidden_size": D, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": CTX, **TOKENS},
    ),
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
    "gpt_oss": (
        "GptOssConfig",
        {**GQA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "gptj": ("GPTJConfig", {"n_embd": D, "n_layer": 4, "n_head": 4, "n_positions": CTX, "rotary_dim": 4, **TOKENS}),
    "granite": (
        "GraniteConfig",
        {**GQA, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
    ),
    "granite_moe": (
        "GraniteMoeConfig",
        {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.5},
    ),
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
    "lfm2": (
        "Lfm2Config",
        {**GQA, "layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48, "block_auto_adjust_ff_dim": False},
    ),
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
    "rwkv": (
        "RwkvConfig",
        {"hidden_size": D, "num_hidden_layers": 4, "attention_hidden_size": D, "context_length": CTX, **TOKENS},
    ),
    "seed_oss": ("SeedOssConfig", {**GQA, "head_dim": 8}),
    "smollm3": ("SmolLM3Config", GQA),
    "stablelm": ("StableLmConfig", GQA),
    "starcoder2": ("Starcoder2Config", GQA),
    "xglm": (
        "XGLMConfig",
        {"d_model": D, "num_layers": 4, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": CTX, **TOKENS},
    ),
    "zamba2": (
        "Zamba2Config",
        {
            **WIDE,
            **{k: v for k, v in MAMBA2.items() if k != "mamba_n_heads"},
            "n_mamba_heads": 8,
            "layers_block_type": ["mamba", "hybrid"] * 2,
        },
    ),
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
        self.layers = [
            self.network.get_submodule(bridge.adapter.translate_transformer_lens_path(f"blocks.{i}"))
            for i in (SOURCE, TARGET - 1)
        ]

    def __call__(self, ids: list[int], bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of one prompt alone, and the stream that leaves the last layer.

        A bias is added to the stream that leaves the source layer.
        """
        seen = []

        def add(module: Any, arguments: Any, output: Any) -> Any:
            return (output[0] + bias, *output[1:]) if isinstance(output, tuple) else output + bias

        def read(module: Any, arguments: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handles = [
            layer.register_forward_hook(function) for layer, function in zip(self.layers, (add, read), strict=True)
        ]
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


@dataclass(frozen=True)
class Outcome:
    """What an architecture can do here.

    Attributes:
        vectors: "yes", or why they are refused.
        adapters: "yes", or why those of the MLP are refused.
        attention: "yes", or why adapters of the attention's output weights are refused.
        note: what else must be known.
    """

    vectors: str
    adapters: str
    attention: str
    note: str = ""


def outcome(name: str, folder: Path) -> Outcome:
    """Tries everything on one architecture and compares each result with the Hugging Face model.

    Raises:
        AssertionError: a result is wrong.
    """
    directory = save(name, folder / "model")
    bridge = TransformerBridge.boot_transformers(directory, device="cpu", dtype=torch.float32)
    plain = Plain(directory, bridge)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            vectors = ml.fit_vectors(bridge, PROMPTS, SOURCE, TARGET, n_vectors=2, progress=False)
        except (ValueError, RuntimeError) as error:
            return Outcome(*[_sentence(error)] * 3)
        batch = ml.slice_model(bridge, PROMPTS, SOURCE, TARGET).batch
        off = max(_bridge_error(bridge, plain, ids) for ids in batch.rows())
    if off > 1e-4:
        return Outcome(
            "yes",
            "yes",
            "yes",
            f"the bridge itself is off by {off:.0e} of the logits' norm from the Hugging Face model",
        )
    _check_replay(bridge, plain, vectors)
    _check_plain(bridge, plain, vectors, batch.rows()[0])
    for site in ("resid_post", "attn_out"):
        _check_site(bridge, site, vectors)
    note = _check_generation(bridge, plain, vectors, batch.rows())
    found = []
    for site in ("mlp", "attn"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                settings = {
                    "n_adapters": 1,
                    "rank": 2,
                    "n_steps": 2,
                    "optimizer": "power",
                    "site": site,
                    "radius": "auto" if not found else 1.0,  # finding it takes most of the time, and is the same
                    "progress": False,
                }
                adapters = ml.fit_adapters(bridge, PROMPTS, SOURCE, TARGET, **settings)
        except ValueError as error:
            found.append(_sentence(error))
            continue
        _check_peft(bridge, directory, adapters, folder / site, batch.rows()[0])
        found.append("yes")
    return Outcome("yes", *found, note)


def _sentence(error: Exception) -> str:
    text = str(error)
    assert text.endswith("."), text
    return text


def _bridge_error(bridge: Any, plain: Plain, ids: list[int]) -> float:
    with torch.no_grad():
        ours, theirs = bridge(torch.tensor([ids]), use_cache=False)[0], plain(ids, torch.zeros(D))[0]
    return float((ours - theirs).norm() / theirs.norm())


def _check_replay(bridge: Any, plain: Plain, vectors: ml.SteeringVectors) -> None:
    """The slice's target, with all prompts under both vectors as one batch, against the stream of each prompt alone."""
    sliced = ml.slice_model(bridge, PROMPTS, SOURCE, TARGET)
    rows = [(k, i) for k in range(2) for i in reversed(range(len(PROMPTS)))]
    prompts = torch.tensor([i for _, i in rows])
    with torch.no_grad():
        found = sliced.change(vectors.values[[k for k, _ in rows]], prompts) + sliced.target[prompts]
    for row, (k, i) in zip(found, rows, strict=True):
        ids = sliced.batch.rows()[i]
        expected = plain(ids, vectors.values[k])[1]
        error = float((row[: len(ids)] - expected).norm() / expected.norm())
        assert error < 1e-5, f"the replay of vector {k} on prompt {i} is off by {error:.1e}"


def _check_plain(bridge: Any, plain: Plain, vectors: ml.SteeringVectors, ids: list[int]) -> None:
    """The Hugging Face model steered by `on_transformers`, against an ordinary hook and the steered bridge."""
    for site in SITES:
        if f"blocks.{SOURCE}.{SITES[site].hook}" not in bridge.hook_dict:
            continue
        moved = ml.SteeringVectors(-3.0 * vectors.values[1:2], SOURCE, site=site)
        try:
            with torch.no_grad(), ml.on_transformers(plain.network, moved):
                found = plain.network(torch.tensor([ids]), use_cache=False).logits[0]
        except ValueError as error:
            if site != "attn_out" or "can't be steered at the attention's output" not in str(error):
                raise
            continue
        if SITES[site].after_block:
            expected = plain(ids, moved.values[0])[0]
        else:
            with torch.no_grad(), ml.steer(bridge, moved):
                expected = bridge(torch.tensor([ids]), use_cache=False)[0]
        error = float((found - expected).norm() / expected.norm())
        assert error < 1e-4, f"on_transformers at {site} is off by {error:.1e}"


def _check_generation(bridge: Any, plain: Plain, vectors: ml.SteeringVectors, rows: list[list[int]]) -> str:
    """Batched, padded, cached generation whose rows end at different steps, against each row alone without cache."""
    runs = [(i, k, sign) for i in range(len(rows)) for k, sign in ((None, 0), (0, 1), (0, -1), (1, 1), (1, -1))]
    expected = {
        run: plain.greedy(rows[run[0]], torch.zeros(D) if run[1] is None else run[2] * vectors.values[run[1]])
        for run in runs
    }
    # the token that most rows write early ends them, so that rows are dropped while others go on
    end = Counter(token for new, _ in expected.values() for token in dict.fromkeys(new[1:4])).most_common(1)[0][0]
    ending = patch.object(hooks, "end_tokens", lambda model: {end})
    said = ""
    for least in (2, len(runs)):  # with the blocks before the source run once for each prompt, and for each row
        with warnings.catch_warnings(record=True) as caught, ending, patch.object(passes, "LEAST_ROWS", least):
            warnings.simplefilter("always")
            written = ml.generate(bridge, PROMPTS, vectors, N_NEW, include_random=False, progress=False)
        _check_written(written.table, expected, end)
        distrusted = [str(one.message) for one in caught if "without a cache" in str(one.message)]
        assert len(distrusted) < 2 and all(version("transformers") in text for text in distrusted)
        said = said or ("its cache is not believed, so generation goes without" if distrusted else "")
    return said


def _check_written(table: pd.DataFrame, expected: Any, end: int) -> None:
    """Each row's tokens against those that were expected, up to where two logits are as good as equal."""
    for row in table.itertuples():
        new, gaps = expected[row.prompt, None if pd.isna(row.vector) else row.vector, row.sign]
        clear = next((step for step, gap in enumerate(gaps) if gap <= CLEAR), len(gaps))
        cut = new[: new.index(end)] if end in new else new
        assert row.tokens[:clear] == cut[:clear], (
            f"prompt {row.prompt}, vector {row.vector}, sign {row.sign}: {row.tokens} for {cut}"
        )
    lengths = {len(tokens) for tokens in table.tokens}
    assert len(lengths) > 1, "no row ended early: choose another seed"


def _check_site(bridge: Any, site: str, vectors: ml.SteeringVectors) -> None:
    """A slice at another site against whole runs with TransformerLens' own hooks, one prompt at a time.

    The prompts of the slice run as rows of one batch.
    """
    if f"blocks.{SOURCE}.{SITES[site].hook}" not in bridge.hook_dict:
        return
    sliced, moved = (
        ml.slice_model(bridge, PROMPTS, SOURCE, TARGET, site=site),
        ml.SteeringVectors(vectors.values, SOURCE, site=site),
    )
    rows = list(reversed(range(len(PROMPTS))))
    with torch.no_grad():
        found = sliced.change(vectors.values[:1].expand(len(rows), -1), torch.tensor(rows))
    for row, i in zip(found, rows, strict=True):
        ids, streams = torch.tensor([sliced.batch.rows()[i]]), []
        for steering in ([], moved[0].hooks()):
            read = (
                f"blocks.{TARGET - 1}.hook_resid_post",
                lambda stream, hook, streams=streams: streams.append(stream[0]),
            )
            with torch.no_grad():
                bridge.run_with_hooks(ids, fwd_hooks=[*steering, read])
        expected = streams[1] - streams[0]
        error = float((row[: ids.shape[1]] - expected).norm() / expected.norm())
        assert error < 1e-4, f"the replay at {site} is off by {error:.1e} on prompt {i}"


def _check_peft(bridge: Any, directory: str, adapters: ml.SteeringAdapters, folder: Path, ids: list[int]) -> None:
    """The Hugging Face model with the exported adapter, loaded by peft, against the steered bridge."""
    ml.export(adapters, "peft", folder, model=bridge)
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad(), ml.steer(bridge, adapters):
        ours = bridge(torch.tensor([ids]), use_cache=False).log_softmax(-1)
    with torch.no_grad():
        clean = network(torch.tensor([ids]), use_cache=False).logits.log_softmax(-1)
        with ml.on_transformers(network, adapters):
            hooked = network(torch.tensor([ids]), use_cache=False).logits.log_softmax(-1)
        theirs = PeftModel.from_pretrained(network, str(folder))(
            torch.tensor([ids]), use_cache=False
        ).logits.log_softmax(-1)
    assert float((ours - theirs).abs().max()) < 1e-4 and float((ours - clean).abs().max()) > 1e-2
    assert float((hooked - theirs).abs().max()) < 1e-4


def main() -> None:
    """Writes what each architecture can do with this version of TransformerLens: `python -m tests.architectures`."""
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    found = {}
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = asdict(outcome(name, Path(folder)))
        print(f"{name}: {found[name]}", flush=True)
    RESULTS.write_text(json.dumps({**known, MAJOR: found}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
