"""Which Hugging Face model stands behind this one?  Here are its network, and its names for the updated weights."""

from typing import Any

from torch import nn

from melbo_lens.models.host import Host
from melbo_lens.perturbations.sites import WeightSite

PARTS = {"mlp": "mlp.out", "attn": "attn.o"}  # TransformerLens' name for the weights of each site


def module_name(host: Host, site: WeightSite) -> str:
    """Returns the name of the Hugging Face module of these weights, by TransformerLens' own map of names.

    Raises:
        ValueError: there is no such module for this model.
    """
    try:
        name = host.name_map().translate_transformer_lens_path(f"blocks.{site.layer}.{PARTS[site.name]}")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"this model ({host.architecture}) has no Hugging Face counterpart known to TransformerLens ({error})."
        ) from error
    if not host.has_counterpart:
        raise ValueError(
            f"this model ({host.architecture}) wraps no Hugging Face model: "
            "there is nothing that peft could load an adapter on."
        )
    return str(name)


def from_files(host: Host) -> nn.Module | None:
    """Loads the Hugging Face model of the same name, if its files are on this machine."""
    from transformers import AutoModelForCausalLM

    try:
        network: Any = AutoModelForCausalLM.from_pretrained(host.name, local_files_only=True, dtype=host.dtype)
    except (OSError, ValueError, AttributeError):
        return None
    return network.to(host.device).eval()
