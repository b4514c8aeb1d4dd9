"""Which class of model is this?  `host_of` opens a model, or refuses it with an explanation; `boot` loads one.

This is the only file that names the classes of model.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from melbo_lens.models.bridge import BridgeHost
from melbo_lens.models.hooked import HookedHost
from melbo_lens.models.host import Host

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    # what public calls take; a host is a model that is already open
    Model: TypeAlias = HookedTransformer | TransformerBridge | Host
else:
    try:
        from transformer_lens import HookedTransformer
    except ImportError:  # TransformerLens 4 removed it
        HookedTransformer = None

    Model = Any  # at run time, `host_of` refuses anything else with an explanation

ModelClass = Literal["hooked", "bridge"]


def host_of(model: Any) -> Host:
    """Opens a model; a host is already open.

    Raises:
        TypeError: the model is neither a `HookedTransformer` nor a `TransformerBridge`.
        ValueError: the model is or has an encoder, has no stack of blocks, or has weights that were made in inference
            mode.
    """
    if isinstance(model, Host):
        return model
    hooked = HookedTransformer is not None and isinstance(model, HookedTransformer)
    if not (hooked or isinstance(model, TransformerBridge)):
        raise TypeError(
            f"model must be a HookedTransformer or a TransformerBridge; got {type(model).__name__}. "
            "Load it with TransformerLens."
        )
    _check(model)
    return HookedHost(model) if hooked else BridgeHost(model)


def _check(model: Any) -> None:
    adapter = getattr(model, "adapter", None)
    bidirectional = getattr(model.cfg, "attention_dir", "causal") == "bidirectional"
    hf_config = getattr(getattr(model, "original_model", None), "config", None)
    seq2seq = bool(getattr(hf_config, "is_encoder_decoder", False))
    if seq2seq:
        raise ValueError(
            "model is an encoder with a decoder (a prompt and its continuation pass through different blocks): "
            "only decoder-only language models can be steered here."
        )
    if bidirectional or (adapter is not None and not (adapter.supports_causal_loss and adapter.supports_generation)):
        raise ValueError(
            "model is an encoder (its attention sees later tokens): "
            "only decoder-only language models can be steered here."
        )
    if not isinstance(getattr(model, "blocks", None), nn.ModuleList):
        raise ValueError(
            "model has no single stack of blocks (model.blocks): only decoder-only language models can be steered here."
        )
    if any(parameter.is_inference() for parameter in nn.Module.parameters(model)):
        raise ValueError(
            "model was loaded inside torch.inference_mode(), so no derivative can be taken through its weights: "
            "load it outside (torch.no_grad() does no harm)."
        )


def has_hooked() -> bool:
    """Whether this TransformerLens has `HookedTransformer`."""
    return HookedTransformer is not None


def boot(
    name: str | Path, network: nn.Module | None = None, device: str | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """Makes a bridge around a Hugging Face model.

    The model is loaded from that name or directory; if `network` is given, it is the model, and its files lie there.
    """
    return TransformerBridge.boot_transformers(str(name), device=device, dtype=dtype, hf_model=network).eval()


def implement_gpt2(network: nn.Module, tokenizer: Any, name: str) -> Any:
    """Makes a `HookedTransformer` with the weights of a Hugging Face GPT-2."""
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights

    config = cast(Any, network.config)
    cfg = HookedTransformerConfig(
        n_layers=config.n_layer,
        d_model=config.n_embd,
        n_ctx=config.n_positions,
        d_head=config.n_embd // config.n_head,
        n_heads=config.n_head,
        d_mlp=4 * config.n_embd,
        d_vocab=config.vocab_size,
        act_fn="gelu_new",
        eps=config.layer_norm_epsilon,
        normalization_type="LN",
        model_name=name,
        original_architecture="GPT2LMHeadModel",
        device="cpu",
        seed=None,
    )
    model = HookedTransformer(cfg, tokenizer=tokenizer)
    model.load_state_dict(convert_gpt2_weights(network, cfg), strict=False)
    return model.eval()
