"""Where does a perturbation enter a block?  At an activation, or at the weights that an adapter updates."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from torch import Tensor

# From what enters the weights [batch pos d_in] to what their output gains [batch pos d_model].
Update: TypeAlias = Callable[[Tensor], Tensor]
Hook: TypeAlias = tuple[str, Callable[..., Any]]


@dataclass(frozen=True)
class Site:
    """An activation of every block to which a vector can be added.

    Attributes:
        name: the name that users give.
        hook: its name within a block.
        after_block: whether adding there equals adding to the stream that leaves the block, so that the block itself
            need not run again.
    """

    name: str
    hook: str
    after_block: bool

    def hook_name(self, layer: int) -> str:
        return f"blocks.{layer}.{self.hook}"


SITES = {
    site.name: site
    for site in (
        Site("mlp_out", "hook_mlp_out", True),
        Site("resid_post", "hook_resid_post", True),
        Site("attn_out", "hook_attn_out", False),
    )
}
WEIGHTS = ("mlp", "attn")  # the output weights of a block's MLP and of its attention


def layer_of(hook_name: str) -> int | None:
    """Returns the layer in whose block a hook is; None for one outside the blocks."""
    found = re.match(r"blocks\.(\d+)\.", hook_name)
    return int(found[1]) if found else None


def site_of(name: str) -> Site:
    """Returns the site of that name.

    Raises:
        ValueError: there is no such site.
    """
    if name not in SITES:
        raise ValueError(
            f"site={name!r} must be one of {sorted(SITES)}: "
            "an activation of the source layer's block to which vectors are added."
        )
    return SITES[name]


@dataclass(frozen=True)
class WeightSite:
    """The two ends of one matrix of weights that writes to the stream.

    Attributes:
        layer: the number of the block.
        hidden_hook: the activation that enters the weights, [batch pos d_in] or [batch pos head d_head].
        output_hook: the activation that leaves the weights, before any norm. If `norm_eps` is given, this is instead
            the name of an RMS norm that follows, where alone the output can be hooked.
        norm_eps: the epsilon of that norm, or None.
        name: "mlp" or "attn".
    """

    layer: int
    hidden_hook: str
    output_hook: str
    norm_eps: float | None = None
    name: str = "mlp"

    @property
    def written(self) -> str:
        """The activation through which the output of these weights reaches the stream, after any norm that follows."""
        return f"blocks.{self.layer}.hook_{self.name}_out"

    def hooks(self, update: Update) -> list[Hook]:
        """Returns hooks that add `update(hidden)` to the output of the weights, before any norm that follows."""
        tap = _Tap(update, self.norm_eps or 0.0)
        if self.norm_eps is None:
            return [(self.hidden_hook, tap.read_hidden), (self.output_hook, tap.add_update)]
        norm = self.output_hook
        return [
            (self.hidden_hook, tap.read_hidden),
            (f"{norm}.hook_scale", tap.read_scale),
            (f"{norm}.hook_normalized", tap.add_within_norm),
        ]


if TYPE_CHECKING:

    class ModelSites(Protocol):
        """What a perturbation asks of an opened model, so that this folder imports nothing from `models/`."""

        @property
        def n_layers(self) -> int: ...

        @property
        def d_model(self) -> int: ...

        def widths(self, layer: int, name: str) -> tuple[int, int]: ...

        def weight_site(self, layer: int, name: str) -> WeightSite: ...

else:  # the tests' type checker would ask a model for every attribute, at every call
    ModelSites = Any


@dataclass(eq=False)
class _Tap:
    """Hands what one hook sees in a forward pass to the hook at the output."""

    update: Update
    norm_eps: float
    hidden: Tensor | None = None
    scale: Tensor | None = None

    def read_hidden(self, activation: Tensor, hook: Any = None) -> None:
        self.hidden = flat_heads(activation)

    def read_scale(self, scale: Tensor, hook: Any = None) -> None:
        self.scale = scale

    def add_update(self, output: Tensor, hook: Any = None) -> Tensor:
        return (output + self.update(self._taken())).to(output.dtype)  # added in float32 and rounded once

    def add_within_norm(self, normalized: Tensor, hook: Any = None) -> Tensor:
        # only x / rms(x) and rms(x) can be hooked here; their product is x
        output = normalized.float() * cast(Tensor, self.scale).float() + self.update(self._taken())
        self.scale = None
        return (output / (output.square().mean(-1, keepdim=True) + self.norm_eps).sqrt()).to(normalized.dtype)

    def _taken(self) -> Tensor:
        hidden, self.hidden = self.hidden, None
        return cast(Tensor, hidden)  # the hook at the hidden activation has fired before


def flat_heads(activation: Tensor) -> Tensor:
    """Makes what enters the weights one vector at each position: the heads of attention are put side by side."""
    return activation.flatten(2) if activation.ndim == 4 else activation


def usual_site(layer: int) -> WeightSite:
    """Returns the site of an MLP without a norm after it, by names that every class of model knows."""
    return WeightSite(layer, f"blocks.{layer}.mlp.hook_post", f"blocks.{layer}.hook_mlp_out")
