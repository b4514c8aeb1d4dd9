"""What must a class of model be able to do?  A host, opened once for each public call, answers all questions."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from melbo_lens.models.tally import packed
from melbo_lens.perturbations.sites import WeightSite

if TYPE_CHECKING:

    class HookPoint(Protocol):
        """TransformerLens' module at an activation, as far as it is used here."""

        name: str | None
        fwd_hooks: list[Any]

        def add_hook(self, hook: Callable[..., Any]) -> None: ...

else:  # the tests' type checker would ask a module for every attribute, at every call
    HookPoint = Any


class Host(ABC):
    """A model as this library needs it. `host_of(model)` opens one; a subclass answers for one class of model.

    Attributes:
        model: the user's own model; it is typed Any, since `nn.Module` declares none of its attributes.
        points: its hook points by name, asked for only once, since a bridge builds the mapping anew each time.
        shares: whether rows of one prompt can share the first blocks of a pass; False once they could not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.points: Mapping[str, HookPoint] = self.model.hook_dict
        self.shares = True

    # Each class of model defines these.

    @abstractmethod
    def logits(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Computes the logits of one uncached pass; without a mask, every column of `tokens` counts."""

    @abstractmethod
    def start_cache(self, n_rows: int, shared: int = 0) -> Any:
        """Makes the cache that `cached_logits` is given at the first step.

        In the first `shared` layers it is for a single row, which stands for all rows until `joined` is called.
        """

    @abstractmethod
    def cached_logits(self, tokens: Tensor, attention_mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Computes the logits of one pass over the last columns of the mask, and the cache with these columns."""

    @abstractmethod
    def drop_rows(self, cache: Any, kept: Tensor) -> bool:
        """Keeps these rows of a cache; returns False, and changes nothing, if the cache can't drop rows."""

    @abstractmethod
    def joined(self, caches: Sequence[Any], n_rows: Sequence[int], shared: int) -> Any:
        """Makes one cache out of several of one length; returns None if caches of this model can't be joined.

        Args:
            caches: the caches, which are used up.
            n_rows: the number of rows of each.
            shared: the number of first layers in which each cache holds a single row, shared by all of its rows.
        """

    @abstractmethod
    def only_attends(self, cache: Any) -> bool:
        """Whether a cache holds keys and values alone.

        Several tokens at once after a recurrent state are rounded otherwise than one by one, and some rows more.
        """

    @property
    @abstractmethod
    def before_unembed(self) -> str:
        """The name of the hook point whose activation [row pos d_model] the unembedding reads."""

    @abstractmethod
    def weight_site(self, layer: int, name: str) -> WeightSite:
        """Says where the output weights of the block's "mlp" or "attn" are hooked.

        Raises:
            ValueError: the block has no such weights, or what enters them has no hook.
        """

    @abstractmethod
    def widths(self, layer: int, name: str) -> tuple[int, int]:
        """Returns d_in and d_model of these weights."""

    @property
    @abstractmethod
    def architecture(self) -> str:
        """The name of the Hugging Face architecture."""

    @property
    @abstractmethod
    def has_counterpart(self) -> bool:
        """Whether there is a Hugging Face model of this architecture."""

    @abstractmethod
    def name_map(self) -> Any:
        """Returns TransformerLens' map from its names of modules to those of Hugging Face."""

    @abstractmethod
    def own_weights(self, sites: Sequence[WeightSite]) -> tuple[nn.Module, dict[int, Tensor]] | None:
        """Returns the Hugging Face model inside, and its weights at these sites by layer.

        None means that there is no such model, or that TransformerLens processed the weights.
        """

    @abstractmethod
    def writes_centred(self, site: WeightSite) -> bool:
        """Whether TransformerLens centred the output of these weights."""

    # These follow from the above.

    @property
    def cfg(self) -> Any:
        return self.model.cfg

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.blocks

    @property
    def n_layers(self) -> int:
        return len(self.model.blocks)

    @property
    def d_model(self) -> int:
        return self.model.cfg.d_model

    @property
    def device(self) -> torch.device:
        """The device on which the model expects tokens, and on which results are gathered.

        The blocks may lie on others. Weights that are offloaded lie on "meta" until their module runs.
        """
        first = next(self.model.parameters()).device
        offloaded = first.type == "meta" and getattr(self.networks[-1], "hf_device_map", None)
        return torch.device(self.cfg.device) if offloaded else first

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def quantised(self) -> bool:
        """Whether weights of the blocks are packed into fewer bits."""
        return any(packed(weight) for weight in nn.Module.parameters(self.blocks))

    @property
    def name(self) -> str:
        return str(getattr(self.cfg, "model_name", None) or "unnamed")

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The modules that hold all parameters and modes.

        A bridge wraps some modules (GPT-2's dropout) that are not among its own, so the wrapped model is listed too.
        """
        wrapped = getattr(self.model, "original_model", None)
        return [self.model, wrapped] if isinstance(wrapped, nn.Module) else [self.model]

    def through_final_norm(self, directions: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Returns what the unembedding reads of directions of the last stream, but for the norm's common factor.

        That is ``weight * v``, with v centred if the norm centres; both are told from what the norm does, since models
        keep its weight in several forms, and some have folded it into the unembedding. The caller has frozen the model.
        """
        norm = getattr(self.model, "ln_final", None)
        if norm is None:
            return directions
        width = directions.shape[1]
        probe = torch.ones(width, dtype=self.dtype, device=directions.device)
        probe[1::2] = -1
        if width % 2:
            probe[-3:] = torch.tensor([1, 1, -2], dtype=self.dtype, device=directions.device)  # its mean is 0, too
        loud = 100 * probe  # beside which the norm's epsilon is nothing
        with torch.no_grad():
            plus, minus, raised = (norm(x[None, None])[0, 0].float() for x in (loud, -loud, loud + 300))
        weight = (plus - minus) / (2 * probe.float()) * probe.float().square().mean().sqrt()
        centres = torch.allclose(plus, raised, rtol=0.1, atol=0.01)
        return weight.to(directions) * (directions - directions.mean(1, keepdim=True) if centres else directions)

    @property
    def turning_length(self) -> int | None:
        """The length beyond which a model encodes the positions of all tokens differently ("longrope", "dynamic").

        That concerns the short rows of a batch, too. It is None for other models.
        """
        config = getattr(self.networks[-1], "config", None)
        for part in (config, getattr(config, "text_config", None)):
            settings = getattr(part, "rope_parameters", None) or getattr(part, "rope_scaling", None) or {}
            for rope in (settings, *(one for one in settings.values() if isinstance(one, dict))):
                if rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic"):
                    return (
                        rope.get("original_max_position_embeddings")
                        or getattr(part, "original_max_position_embeddings", None)
                        or self.cfg.n_ctx
                    )
        return None

    def to_tokens(self, text: str, **settings: Any) -> Tensor:
        return self.model.to_tokens(text, **settings)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Computes the logits of one uncached pass, on `device`; without a mask, every column of `tokens` counts.

        Raises:
            RuntimeError: the model itself can't be run.
        """
        try:
            return self.logits(tokens, attention_mask).to(self.device)
        except (AttributeError, TypeError, KeyError, NameError, NotImplementedError) as error:
            raise RuntimeError(
                f"the forward pass of this model fails ({type(error).__name__}: {error}), "
                f"with transformers {version('transformers')} and transformer_lens {version('transformer_lens')}: "
                "another version of either may run it."
            ) from error
