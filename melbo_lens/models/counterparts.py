"""Which Hugging Face model stands behind this one?  Here are its network, and its names for weights and layers."""

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
    return _name(host, f"blocks.{site.layer}.{PARTS[site.name]}")


def layer_name(host: Host, layer: int) -> str:
    """Returns the name of the Hugging Face module whose output is the stream that leaves a block.

    Raises:
        ValueError: there is no such module for this model.
    """
    return _name(host, f"blocks.{layer}")


def _name(host: Host, path: str) -> str:
    try:
        name = host.name_map().translate_transformer_lens_path(path)
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"this model ({host.architecture}) has no Hugging Face counterpart known to TransformerLens ({error})."
        ) from error
    if not host.has_counterpart:
        raise ValueError(
            f"this model ({host.architecture}) wraps no Hugging Face model: "
            "there is nothing to which an export could be applied."
        )
    return str(name)


def from_files(host: Host) -> nn.Module | None:
    """Loads the Hugging Face model of the same name, if its files are on this machine."""
    from transformers import AutoModelForCausalLM

    try:
        # with peft installed, transformers looks for an adapter as well, and would ask the hub for it
        network: Any = AutoModelForCausalLM.from_pretrained(
            host.name, local_files_only=True, adapter_kwargs={"local_files_only": True}, dtype=host.dtype
        )
    except (OSError, ValueError, AttributeError):
        return None
    return network.to(host.device).eval()
