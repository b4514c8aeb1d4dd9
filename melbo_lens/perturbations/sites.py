"""Where does a perturbation enter a block?  The activations to which a vector is added, and the weights that an adapter updates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

Update: TypeAlias = Callable[
    [Tensor], Tensor
]  # what enters the weights [batch pos d_in] -> what their output gains [batch pos d_model]
Hook: TypeAlias = tuple[str, Callable[..., Any]]


@dataclass(frozen=True)
class Site:
    """An activation of every block to which a vector can be added.

    Attributes:
        name: as users call it.
        hook: its name within a block.
        after_block: whether adding there equals adding to the stream that leaves the block, so that the block itself needs not run again.
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
WEIGHTS = ("mlp", "attn")  # the output weights of a block's MLP, and those of its attention


def site_of(name: str) -> Site:
    """The site of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in SITES:
        raise ValueError(
            f"site={name!r} must be one of {sorted(SITES)}: an activation of the source layer's block to which vectors are added."
        )
    return SITES[name]


@dataclass(frozen=True)
class WeightSite:
    """The two ends of one matrix of weights that writes to the stream.

    Attributes:
        layer: the block.
        hidden_hook: the activation that enters the weights, [batch pos d_in], or [batch pos head d_head].
        output_hook: what leaves them, before any norm; with `norm_eps` the name of an RMS norm that follows and is the only thing to hook.
        norm_eps: None, or the epsilon of that norm.
        name: "mlp" or "attn".
    """

    layer: int
    hidden_hook: str
    output_hook: str
    norm_eps: float | None = None
    name: str = "mlp"

    @property
    def written(self) -> str:
        """The activation in which what these weights write reaches the stream, after a norm that may follow."""
        return f"blocks.{self.layer}.hook_{self.name}_out"

    def hooks(self, update: Update) -> list[Hook]:
        """Hooks that add `update(hidden)` to the output of the weights, before the norm that may follow."""
        tap = _Tap(update, self.norm_eps or 0.0)
        if self.norm_eps is None:
            return [(self.hidden_hook, tap.read_hidden), (self.output_hook, tap.add_update)]
        norm = self.output_hook
        return [
            (self.hidden_hook, tap.read_hidden),
            (f"{norm}.hook_scale", tap.read_scale),
            (f"{norm}.hook_normalized", tap.add_within_norm),
        ]


@dataclass(eq=False)
class _Tap:
    """What one forward pass hands from the hidden activation's hook to the output's."""

    update: Update
    norm_eps: float
    hidden: Tensor | None = None
    scale: Tensor | None = None

    def read_hidden(self, activation: Tensor, hook: Any = None) -> None:
        self.hidden = flat_heads(activation)

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


def flat_heads(activation: Tensor) -> Tensor:
    """What enters the weights as one vector at each position: the heads of attention side by side."""
    return activation.flatten(2) if activation.ndim == 4 else activation


def usual_site(layer: int) -> WeightSite:
    """The MLP's output weights in a model without a norm after them, by names that every class of model knows."""
    return WeightSite(layer, f"blocks.{layer}.mlp.hook_post", f"blocks.{layer}.hook_mlp_out")
