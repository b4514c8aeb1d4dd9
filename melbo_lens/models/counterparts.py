"""Which Hugging Face model stands behind this one?  Its network, and its names for the weights that an adapter updates."""

from typing import Any

from torch import nn

from melbo_lens.models.host import Host
from melbo_lens.perturbations.sites import WeightSite

PARTS = {"mlp": "mlp.out", "attn": "attn.o"}  # TransformerLens' names of the weights of each site


def module_name(host: Host, site: WeightSite) -> str:
    """The Hugging Face module of these weights, by TransformerLens' own map of names.

    Raises:
        ValueError: it knows none for this model.
    """
    try:
        name = host.name_map().translate_transformer_lens_path(f"blocks.{site.layer}.{PARTS[site.name]}")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"this model ({host.architecture}) has no Hugging Face counterpart known to TransformerLens ({error})."
        ) from error
    if not host.has_counterpart:
        raise ValueError(
            f"this model ({host.architecture}) wraps no Hugging Face model: there is nothing that peft could load an adapter on."
        )
    return str(name)


def from_files(host: Host) -> nn.Module | None:
    """The Hugging Face model of that name, if its files are on this machine."""
    from transformers import AutoModelForCausalLM

    try:
        network: Any = AutoModelForCausalLM.from_pretrained(host.name, local_files_only=True, dtype=host.dtype)
    except (OSError, ValueError, AttributeError):
        return None
    return network.to(host.device).eval()
