"""How is a TransformerLens model touched?  The only file that attaches hooks or knows the model classes."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:  # TransformerLens 4 removed them
    HookedTransformer = HookedTransformerConfig = None

Hook: TypeAlias = tuple[str, Callable[..., Any]]


def is_hooked_transformer(model: Any) -> bool:
    """Whether the model is TransformerLens' own implementation (else it is a bridge around another library's)."""
    return HookedTransformer is not None and isinstance(model, HookedTransformer)


def norm_after_mlp(model: Any) -> str | None:
    """The name of the norm through which a `HookedTransformer`'s MLP output passes before its hook, if there is one."""
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

    if model.cfg.use_normalization_before_and_after:
        return "ln2_post"
    return "ln2" if model.cfg.original_architecture in POST_NORM_ARCHITECTURES else None


def check_model(model: Any) -> None:
    """Refuses what this library can't steer.

    Raises:
        TypeError: neither a `HookedTransformer` nor a `TransformerBridge`.
        ValueError: an encoder, no stack of blocks, parts on several devices, or weights that were made in inference mode.
    """
    if not (is_hooked_transformer(model) or isinstance(model, TransformerBridge)):
        raise TypeError(f"model must be a HookedTransformer or a TransformerBridge; got {type(model).__name__}. Load it with TransformerLens.")
    adapter = getattr(model, "adapter", None)
    bidirectional = getattr(model.cfg, "attention_dir", "causal") == "bidirectional"
    hf_config = getattr(getattr(model, "original_model", None), "config", None)
    seq2seq = bool(getattr(hf_config, "is_encoder_decoder", False))
    if bidirectional or seq2seq or (adapter is not None and not (adapter.supports_causal_loss and adapter.supports_generation)):
        raise ValueError("model is an encoder (its attention sees later tokens): only decoder-only language models can be steered here.")
    if not isinstance(getattr(model, "blocks", None), nn.ModuleList):
        raise ValueError("model has no single stack of blocks (model.blocks): only decoder-only language models can be steered here.")
    parameters = list(nn.Module.parameters(model))
    if any(parameter.is_inference() for parameter in parameters):
        raise ValueError(
            "model was loaded inside torch.inference_mode(), so its weights can take part in no derivative: load it outside (torch.no_grad() is fine)."
        )
    devices = {parameter.device for parameter in parameters}
    if len(devices) > 1:
        raise ValueError(f"model lies on several devices ({', '.join(sorted(map(str, devices)))}): move it to one, as with model.to(device).")


def hook_point(model: Any, name: str) -> nn.Module:
    """The hook point of that name; a bridge also knows names that are aliases.

    Raises:
        ValueError: the model has no such hook.
    """
    return _named(model.hook_dict, name)


def _named(points: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name not in points:
        near = sorted(other for other in points if other.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1])[:4]
        hint = f"did you mean one of {near}?" if near else "this model has none of that kind; model.hook_dict lists those it has."
        raise ValueError(f"the model has no hook {name!r}: {hint}")
    return points[name]


def mlp_output(model: Any, layer: int) -> str:
    """The name of a block's `hook_mlp_out`, where vectors are added.

    Raises:
        ValueError: the block has none; says what it is and which blocks have one.
    """
    name = f"blocks.{layer}.hook_mlp_out"
    if name not in model.hook_dict:
        raise ValueError(f"the model has no hook {name!r}: {without_reason(model, name)}")
    return name


def without_reason(model: Any, name: str) -> str:
    """Why a block's hook is missing or silent, and which layers have one that could be used instead."""
    found = re.match(r"blocks\.(\d+)\.(.+)", name)
    if found is None:
        return "this model never runs it. Choose another hook."
    layer, kind = int(found[1]), found[2]
    parts = ", ".join(child for child, module in model.blocks[layer].named_children() if not child.startswith(("hook_", "_")))
    what = f"block {layer} of this {type(getattr(model, 'original_model', model)).__name__} consists of {parts or 'one part'}, and has no such activation"
    others = [i for i in range(len(model.blocks)) if i != layer and f"blocks.{i}.{kind}" in model.hook_dict]
    if others:
        return f"{what}. Layers that have one: {others}."
    return f"{what}, nor has any other block (no MLP of its own whose output could be perturbed). Choose another model."


def resolved_name(model: Any, name: str) -> str:
    """The name that the hook point itself has: a raw bridge's `blocks.1.hook_mlp_out` is `blocks.1.mlp.hook_out`."""
    return str(hook_point(model, name).name)


@dataclass(frozen=True)
class _Counted:
    """A hook function that counts its calls."""

    function: Callable[..., Any]
    fired: list[int]
    number: int

    def __call__(self, activation: Tensor, hook: Any) -> Any:
        self.fired[self.number] += 1
        return self.function(activation, hook=hook)


@contextmanager
def attached(model: Any, hooks: Sequence[Hook]) -> Iterator[list[int]]:
    """Attaches forward hooks for the length of a block and removes exactly those, whatever happens.

    Yields:
        How often each hook has fired so far, a list that grows as the model runs.
    """
    fired = [0] * len(hooks)
    known = model.hook_dict if hooks else {}  # a bridge builds it anew each time it is asked
    points = [(_named(known, name), function) for name, function in hooks]  # all names are known before any hook is attached
    with ExitStack() as stack:
        for i, (point, function) in enumerate(points):
            before = set(map(id, point.fwd_hooks))
            point.add_hook(_Counted(function, fired, i))
            handle = next(handle for handle in point.fwd_hooks if id(handle) not in before)
            stack.callback(_detach, point, handle)
        yield fired


def _detach(point: nn.Module, handle: Any) -> None:
    handle.hook.remove()
    point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


@contextmanager
def watched(
    before: Sequence[tuple[nn.Module, Callable[..., Any]]] = (), after: Sequence[tuple[nn.Module, Callable[..., Any]]] = ()
) -> Iterator[None]:
    """Calls functions before modules, as (module, arguments, keywords), and after them, as (module, arguments, output), for the length of a block."""
    with ExitStack() as stack:
        for module, function in before:
            stack.callback(module.register_forward_pre_hook(function, with_kwargs=True).remove)
        for module, function in after:
            stack.callback(module.register_forward_hook(function).remove)
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Parameters need no gradient and dropout is off inside; every flag is as it was afterwards, whatever happens."""
    wrapped = getattr(model, "original_model", None)  # some of its modules (GPT-2's dropout) are not among the bridge's own
    trees = [model, wrapped] if isinstance(wrapped, nn.Module) else [model]
    modules = list(dict.fromkeys(module for tree in trees for module in tree.modules()))
    parameters = list(dict.fromkeys(parameter for tree in trees for parameter in nn.Module.parameters(tree)))
    training, needed = [module.training for module in modules], [parameter.requires_grad for parameter in parameters]
    try:
        for module in modules:
            module.training = False
        for parameter in parameters:
            parameter.requires_grad_(False)
        with torch.inference_mode(False):
            yield
    finally:
        for module, was in zip(modules, training, strict=True):
            module.training = was
        for parameter, was in zip(parameters, needed, strict=True):
            parameter.requires_grad_(was)


def dtype_of(model: Any) -> str:
    """The name of the dtype of the model's weights, for messages."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def end_tokens(model: Any) -> set[int]:
    """Ids that end a completion: the tokenizer's, and those of a Hugging Face generation config (chat models often have another)."""
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    found = [getattr(model.tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None)]
    return {i for entry in found if entry is not None for i in (entry if isinstance(entry, list | tuple) else [entry])}
