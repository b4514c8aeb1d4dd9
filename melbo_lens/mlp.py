"""Where does a block's MLP take an update of its output weights?  The names of the hooks around W_out, for each class of model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from melbo_lens import hooks

Update: TypeAlias = Callable[[Tensor], Tensor]  # hidden activation [batch pos d_mlp] -> what the MLP's output gains [batch pos d_model]


@dataclass(frozen=True)
class MLPSite:
    """The two ends of one MLP's output weights.

    Attributes:
        layer: the block.
        hidden_hook: the activation that enters W_out, [batch pos d_mlp].
        output_hook: what leaves W_out, before any norm; with `norm_eps` the name of an RMS norm that follows and is the only thing to hook.
        norm_eps: None, or the epsilon of that norm.
    """

    layer: int
    hidden_hook: str
    output_hook: str
    norm_eps: float | None = None

    def hooks(self, update: Update) -> list[hooks.Hook]:
        """Hooks that add `update(hidden)` to the MLP's output, before the norm that may follow."""
        tap = _Tap(update, self.norm_eps or 0.0)
        if self.norm_eps is None:
            return [(self.hidden_hook, tap.read_hidden), (self.output_hook, tap.add_update)]
        norm = self.output_hook
        return [(self.hidden_hook, tap.read_hidden), (f"{norm}.hook_scale", tap.read_scale), (f"{norm}.hook_normalized", tap.add_within_norm)]


@dataclass(eq=False)
class _Tap:
    """What one forward pass hands from the hidden activation's hook to the output's."""

    update: Update
    norm_eps: float
    hidden: Tensor | None = None
    scale: Tensor | None = None

    def read_hidden(self, activation: Tensor, hook: Any = None) -> None:
        self.hidden = activation

    def read_scale(self, scale: Tensor, hook: Any = None) -> None:
        self.scale = scale

    def add_update(self, output: Tensor, hook: Any = None) -> Tensor:
        return (output + self.update(self._taken())).to(output.dtype)  # added in float32, rounded once

    def add_within_norm(self, normalized: Tensor, hook: Any = None) -> Tensor:
        # x / rms(x) and rms(x) are all that can be hooked here: together they are x
        output = normalized.float() * self.scale.float() + self.update(self._taken())
        self.scale = None
        return (output / (output.square().mean(-1, keepdim=True) + self.norm_eps).sqrt()).to(normalized.dtype)

    def _taken(self) -> Tensor:
        hidden, self.hidden = self.hidden, None
        return hidden


def usual_site(layer: int) -> MLPSite:
    """The site in a model without a norm after the MLP, by names that every class of model knows."""
    return MLPSite(layer, f"blocks.{layer}.mlp.hook_post", f"blocks.{layer}.hook_mlp_out")


def mlp_site(model: Any, layer: int) -> MLPSite:
    """Finds the ends of the output weights of one block.

    Raises:
        ValueError: no such block, a mixture of experts, or a hidden activation without a hook.
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(model.blocks):
        last = len(model.blocks) - 1
        raise ValueError(f"source_layer={layer!r} must be an integer from 0 to {last}: the model has {last + 1} blocks.")
    if hooks.is_hooked_transformer(model):
        return _hooked_site(model, layer)
    hidden, output = f"blocks.{layer}.mlp.out.hook_in", f"blocks.{layer}.mlp.out.hook_out"
    _check_hook(model, layer, hidden)
    return MLPSite(layer, hidden, output)


def widths(model: Any, layer: int) -> tuple[int, int]:
    """d_mlp and d_model of one block's output weights."""
    mlp_site(model, layer)
    mlp = model.blocks[layer].mlp
    if hooks.is_hooked_transformer(model):
        return tuple(mlp.W_out.shape)
    linear = mlp.out.original_component
    # a quantised Linear packs its weight, so ask for its features; GPT-2's Conv1D has none and stores [d_mlp d_model]
    return getattr(linear, "in_features", linear.weight.shape[0]), model.cfg.d_model


def _hooked_site(model: Any, layer: int) -> MLPSite:
    hidden = f"blocks.{layer}.mlp.hook_post"
    _check_hook(model, layer, hidden)
    block = model.blocks[layer]
    name = hooks.norm_after_mlp(model)
    if name is None:
        return MLPSite(layer, hidden, f"blocks.{layer}.hook_mlp_out")
    norm = getattr(block, name)
    if not type(norm).__name__.startswith("RMSNorm"):
        raise ValueError(f"the norm after the MLP, blocks.{layer}.{name}, is a {type(norm).__name__}: only RMS norms are known there. Use a bridge.")
    return MLPSite(layer, hidden, f"blocks.{layer}.{name}", float(norm.eps))


def _check_hook(model: Any, layer: int, name: str) -> None:
    if name in model.hook_dict:
        return
    kind = type(getattr(model.blocks[layer], "mlp", None)).__name__
    if "moe" in kind.lower():
        kinds = [type(getattr(block, "mlp", None)).__name__ for block in model.blocks]
        dense = [i for i, other in enumerate(kinds) if "moe" not in other.lower() and name.replace(f".{layer}.", f".{i}.", 1) in model.hook_dict]
        raise ValueError(
            f"block {layer} ({kind}) has no hook {name!r}: it is a mixture of experts: each token's hidden activation is spread over "
            "several experts, and there is no one W_out to update. Learn steering vectors instead (fit_vectors)"
            + (f", or choose one of the layers {dense}, which are dense." if dense else "; no block of this model has that hook.")
        )
    raise ValueError(f"the model has no hook {name!r}: {hooks.without_reason(model, name)}")
