"""How does a `HookedTransformer` do what a host must?  It is TransformerLens' own implementation, up to version 3."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from melbo_lens.models.hooks import without_reason
from melbo_lens.models.host import Host
from melbo_lens.perturbations.sites import WeightSite


class HookedHost(Host):
    """A model that TransformerLens implements itself."""

    def logits(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        # without a mask, the model would guess one from the tokenizer's padding token
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.to(tokens)
        return self.model(tokens, attention_mask=mask)

    def start_cache(self, n_rows: int, shared: int = 0) -> Any:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache  # version 4 lacks this

        cache = TransformerLensKeyValueCache.init_cache(self.cfg, self.device, n_rows)
        if shared:
            one = TransformerLensKeyValueCache.init_cache(self.cfg, self.device, 1)
            cache.entries[:shared] = one.entries[:shared]
            cache.previous_attention_mask = one.previous_attention_mask
        return cache

    def cached_logits(self, tokens: Tensor, attention_mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        new = attention_mask[:, attention_mask.shape[1] - tokens.shape[1] :]
        return self.model(tokens, attention_mask=new.to(tokens), past_kv_cache=cache), cache

    def drop_rows(self, cache: Any, kept: Tensor) -> bool:
        cache.previous_attention_mask = cache.previous_attention_mask[kept.to(cache.previous_attention_mask.device)]
        for entry in cache.entries:
            here = kept.to(entry.past_keys.device)
            entry.past_keys, entry.past_values = entry.past_keys[here], entry.past_values[here]
        return True

    def only_attends(self, cache: Any) -> bool:
        return True

    def joined(self, caches: Sequence[Any], n_rows: Sequence[int], shared: int) -> Any:
        def together(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([part.expand(n, *part.shape[1:]) for part, n in zip(parts, n_rows, strict=True)])

        first = caches[0]
        for entries in zip(*(cache.entries for cache in caches), strict=True):
            entries[0].past_keys = together([entry.past_keys for entry in entries])
            entries[0].past_values = together([entry.past_values for entry in entries])
            for other in entries[1:]:  # so that no more than one layer is held twice
                other.past_keys = other.past_values = entries[0].past_keys[:0]
        first.previous_attention_mask = together([cache.previous_attention_mask for cache in caches])
        return first

    @property
    def before_unembed(self) -> str:
        return "ln_final.hook_normalized"

    def weight_site(self, layer: int, name: str) -> WeightSite:
        hidden = f"blocks.{layer}.mlp.hook_post" if name == "mlp" else f"blocks.{layer}.attn.hook_z"
        if hidden not in self.points:
            raise ValueError(f"the model has no hook {hidden!r}: {without_reason(self, hidden)}")
        norm_name = self._norm_after(name)
        if norm_name is None:
            return WeightSite(layer, hidden, f"blocks.{layer}.hook_{name}_out", name=name)
        norm = getattr(self.blocks[layer], norm_name)
        if not type(norm).__name__.startswith("RMSNorm"):
            raise ValueError(
                f"the norm after the {name}, blocks.{layer}.{norm_name}, is a {type(norm).__name__}: "
                "only RMS norms are known there. Use a bridge."
            )
        return WeightSite(layer, hidden, f"blocks.{layer}.{norm_name}", float(norm.eps), name)

    def widths(self, layer: int, name: str) -> tuple[int, int]:
        self.weight_site(layer, name)
        block: Any = self.blocks[layer]
        return tuple(block.mlp.W_out.shape) if name == "mlp" else (block.attn.W_O.flatten(0, 1).shape[0], self.d_model)

    @property
    def architecture(self) -> str:
        return str(self.cfg.original_architecture)

    @property
    def has_counterpart(self) -> bool:
        return True

    def name_map(self) -> Any:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

        sizes = {
            name: getattr(self.cfg, name)
            for name in ("d_model", "d_head", "n_layers", "n_ctx", "n_heads", "d_vocab", "d_mlp")
        }
        return ArchitectureAdapterFactory.select_architecture_adapter(
            TransformerBridgeConfig(**sizes, architecture=self.cfg.original_architecture)
        )

    def own_weights(self, sites: Sequence[WeightSite]) -> tuple[nn.Module, dict[int, Tensor]] | None:
        return None

    def writes_centred(self, site: WeightSite) -> bool:
        block: Any = self.blocks[site.layer]
        weights = (block.mlp.W_out if site.name == "mlp" else block.attn.W_O.flatten(0, 1)).float()
        return bool(weights.mean(1).norm() <= 1e-5 * weights.norm())

    def _norm_after(self, name: str) -> str | None:
        """Names the norm that the MLP's or the attention's output passes through before its hook, if there is one."""
        from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

        number = {"attn": 1, "mlp": 2}[name]
        if self.cfg.use_normalization_before_and_after:
            return f"ln{number}_post"
        return f"ln{number}" if self.cfg.original_architecture in POST_NORM_ARCHITECTURES else None
