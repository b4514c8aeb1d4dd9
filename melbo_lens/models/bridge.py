"""How does a `TransformerBridge` do what a host must?  It wraps a Hugging Face model, and uses its cache and masks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from melbo_lens.models.hooks import without_reason
from melbo_lens.models.host import Host
from melbo_lens.perturbations.sites import WeightSite


class BridgeHost(Host):
    """A model that TransformerLens wraps."""

    def logits(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        keywords = {} if attention_mask is None else {"attention_mask": attention_mask.to(tokens)}
        return self.model(tokens, use_cache=False, **keywords)

    def start_cache(self, n_rows: int, shared: int = 0) -> Any:
        return None

    def cached_logits(self, tokens: Tensor, attention_mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        # the bridge derives positions from the mask for those models that take positions
        known = {} if cache is None else {"past_key_values": cache}
        return self.model(
            tokens, return_type="logits_and_cache", attention_mask=attention_mask.to(tokens), use_cache=True, **known
        )

    def drop_rows(self, cache: Any, kept: Tensor) -> bool:
        # the cache's reordering for beam search can take any rows, also of recurrent states; selecting indices forgets
        # those states
        parts = [cache, *(getattr(cache, "layers", None) or [])]
        if not all(callable(getattr(part, "reorder_cache", None)) for part in parts):
            return False
        cache.reorder_cache(kept)
        return True

    def joined(self, caches: Sequence[Any], n_rows: Sequence[int], shared: int) -> Any:
        of_layers = [list(getattr(cache, "layers", None) or []) for cache in caches]
        if any(len(layers) != self.n_layers for layers in of_layers):  # layers may share a cache, or have none
            return None
        if not all(callable(getattr(layer, "reorder_cache", None)) for layers in of_layers for layer in layers):
            return None
        if len(caches) > 1 and not all(map(self.only_attends, caches)):  # recurrent states are kept in other ways
            return None
        for layers, n in zip(of_layers, n_rows, strict=True):
            for layer in layers[:shared]:
                layer.reorder_cache(torch.zeros(n, dtype=torch.long, device=self.device))
        if len(caches) > 1:
            for same in zip(*of_layers, strict=True):
                for name in _states(same[0]):
                    setattr(same[0], name, torch.cat([getattr(layer, name) for layer in same]))
                    for other in same[1:]:
                        setattr(other, name, None)  # so that no more than one layer is held twice
        return caches[0]

    def only_attends(self, cache: Any) -> bool:
        layers = getattr(cache, "layers", None) or []
        return all({*_states(layer)} <= {"keys", "values"} for layer in layers)

    @property
    def before_unembed(self) -> str:
        return "unembed.hook_in"

    def weight_site(self, layer: int, name: str) -> WeightSite:
        part = {"mlp": "mlp.out", "attn": "attn.o"}[name]
        hidden, output = f"blocks.{layer}.{part}.hook_in", f"blocks.{layer}.{part}.hook_out"
        if hidden not in self.points:
            raise ValueError(self._without_weights(layer, name, hidden))
        return WeightSite(layer, hidden, output, name=name)

    def widths(self, layer: int, name: str) -> tuple[int, int]:
        self.weight_site(layer, name)
        linear = self._linear(layer, name)
        # a quantised Linear packs its weight, so its features are asked for; GPT-2's Conv1D has none, and stores its
        # weight as [d_in d_model]
        return getattr(linear, "in_features", linear.weight.shape[0]), self.d_model

    @property
    def architecture(self) -> str:
        return str(getattr(self.cfg, "architecture", None))

    @property
    def has_counterpart(self) -> bool:
        return getattr(self.networks[-1], "config", None) is not None and self.networks[-1] is not self.model

    def name_map(self) -> Any:
        return self.model.adapter

    def own_weights(self, sites: Sequence[WeightSite]) -> tuple[nn.Module, dict[int, Tensor]] | None:
        if self.model.compatibility_mode:
            return None
        return self.model.original_model, {site.layer: self._linear(site.layer, site.name).weight for site in sites}

    def writes_centred(self, site: WeightSite) -> bool:
        return False

    def _linear(self, layer: int, name: str) -> Any:
        """Returns the module of the weights, which in GPT-2 is not a `Linear`."""
        block: Any = self.blocks[layer]
        return (block.mlp.out if name == "mlp" else block.attn.o).original_component

    def _without_weights(self, layer: int, name: str, hidden: str) -> str:
        kind = type(getattr(self.blocks[layer], name, None)).__name__
        if name == "mlp" and "moe" in kind.lower():
            dense = [i for i in range(self.n_layers) if hidden.replace(f".{layer}.", f".{i}.", 1) in self.points]
            return (
                f"block {layer} ({kind}) has no hook {hidden!r}: it is a mixture of experts: each token's hidden "
                "activation is spread over several experts, and there is no one W_out to update. "
                'Update the attention\'s output weights instead (site="attn"), learn steering vectors '
                + (
                    f"(fit_vectors), or choose one of the layers {dense}, which are dense."
                    if dense
                    else "(fit_vectors)."
                )
            )
        return f"the model has no hook {hidden!r}: {without_reason(self, hidden)}"


def _states(layer: Any) -> list[str]:
    """The names of what a layer of a cache holds for each row; recurrent states are in dictionaries."""
    held = vars(layer).items()
    return [
        name
        for name, value in held
        if isinstance(value, dict | list | tuple) or (isinstance(value, Tensor) and value.ndim)
    ]
