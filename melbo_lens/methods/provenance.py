"""What must be known of a fit to repeat it?  Model, layers, hooks, prompts and versions of its slice."""

from importlib.metadata import version
from typing import Any

from melbo_lens.sliced_model import SlicedModel


def describe(sliced: SlicedModel) -> dict[str, Any]:
    """Provenance of a slice: model, layers, hooks, prompts and versions."""
    model, batch = sliced.model, sliced.batch
    return {
        "model": str(getattr(model.cfg, "model_name", None) or "unnamed"),
        "model_class": type(model).__name__,
        "dtype": str(sliced.resid.dtype).removeprefix("torch."),
        "device": sliced.device.type,
        "source_layer": sliced.source_layer,
        "target_layer": sliced.target_layer,
        "source_hook": sliced.source_hook,
        "target_hook": sliced.target_hook,
        "target_norm": float(f"{float(sliced.target[batch.target_mask].norm()):.3g}"),  # tells models of one name apart
        "prompts": list(batch.texts),
        "prompt_tokens": batch.rows(),
        "versions": {name: version(name) for name in ("melbo_lens", "transformer_lens", "transformers", "torch")},
    }
