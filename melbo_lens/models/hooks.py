"""How is a model touched?  Hooks are attached and removed, modules are watched, and parameters are frozen.

This is the only file that attaches anything to a model of TransformerLens.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from melbo_lens.models.host import HookPoint, Host
from melbo_lens.perturbations.sites import Hook, Site

# one for each model, so that calls from several threads take turns
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
OF_PAIRS = ("hook_pattern", "hook_attn_scores")  # their axes are [row head pos pos]


def hook_point(host: Host, name: str) -> HookPoint:
    """Returns the hook point of that name; a bridge also knows aliases.

    Raises:
        ValueError: the model has no such hook.
    """
    return _named(host.points, name)


def check_target(host: Host, name: str) -> None:
    """Refuses an activation of which no position's change can be told.

    Raises:
        ValueError: the model has no such hook, or its axes are those of heads and of pairs of positions.
    """
    hook_point(host, name)
    if name.endswith(OF_PAIRS):
        raise ValueError(
            f"target_hook={name!r} has scores of pairs of positions, and a target is an activation [row pos ...]: "
            "choose another hook, such as that of the attention's output."
        )


def _named(points: Mapping[str, HookPoint], name: str) -> HookPoint:
    if name not in points:
        near = sorted(other for other in points if other.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1])[:4]
        hint = (
            f"did you mean one of {near}?"
            if near
            else "this model has none of that kind; model.hook_dict lists those it has."
        )
        raise ValueError(f"the model has no hook {name!r}: {hint}")
    return points[name]


def source_hook(host: Host, site: Site, layer: int) -> str:
    """Returns the name of the activation to which vectors are added at a layer.

    Raises:
        ValueError: the block has no such activation; the message says which blocks have one.
    """
    name = site.hook_name(layer)
    if name not in host.points:
        raise ValueError(f"the model has no hook {name!r}: {without_reason(host, name)}")
    return resolved_name(host, name)


def without_reason(host: Host, name: str) -> str:
    """Says why a hook is missing or silent, and which other blocks have one."""
    found = re.match(r"blocks\.(\d+)\.(.+)", name)
    if found is None or name in host.points:
        attention_only = getattr(host.cfg, "attn_only", False)
        why = (
            "this is an attention-only model, which has no MLP"
            if attention_only
            else "this model runs it never, or more than once"
        )
        return f"{why}. Choose another layer or model."
    layer, kind = int(found[1]), found[2]
    parts = ", ".join(child for child, _ in host.blocks[layer].named_children() if not child.startswith(("hook_", "_")))
    architecture = type(host.networks[-1]).__name__
    others = [i for i in range(host.n_layers) if f"blocks.{i}.{kind}" in host.points]
    if others:
        return (
            f"block {layer} of this {architecture} consists of {parts or 'one part'}. "
            f"The layers that have one are {others}: choose among them."
        )
    return (
        f"the blocks of this {architecture} consist of {parts or 'one part'}, without an MLP whose output is hooked. "
        "Choose another model."
    )


def resolved_name(host: Host, name: str) -> str:
    """Returns the hook point's own name: a raw bridge's `blocks.1.hook_mlp_out` is `blocks.1.mlp.hook_out`."""
    return str(hook_point(host, name).name)


def within(host: Host, block: nn.Module, hooks: Sequence[Hook]) -> list[Hook]:
    """Returns the hooks that are attached to parts of one block."""
    parts = set(map(id, block.modules())) if hooks else set()
    return [hook for hook in hooks if id(hook_point(host, hook[0])) in parts]


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
def attached(host: Host, hooks: Sequence[Hook]) -> Iterator[list[int]]:
    """Attaches forward hooks inside the `with` block, and afterwards removes exactly those, whatever happens.

    Yields:
        A list of how often each hook has fired, which is updated as the model runs.
    """
    fired = [0] * len(hooks)
    # all names are looked up before any hook is attached
    points = [(_named(host.points, name), function) for name, function in hooks]
    with ExitStack() as stack:
        for i, (point, function) in enumerate(points):
            before = set(map(id, point.fwd_hooks))
            point.add_hook(_Counted(function, fired, i))
            handle = next(handle for handle in point.fwd_hooks if id(handle) not in before)
            stack.callback(_detach, point, handle)
        yield fired


def _detach(point: HookPoint, handle: Any) -> None:
    handle.hook.remove()
    point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


@contextmanager
def watched(
    before: Sequence[tuple[nn.Module, Callable[..., Any]]] = (),
    after: Sequence[tuple[nn.Module, Callable[..., Any]]] = (),
) -> Iterator[None]:
    """Calls functions before and after modules run, inside the `with` block.

    Functions before a module get (module, arguments, keywords), and functions after it (module, arguments, output).
    """
    with ExitStack() as stack:
        for module, function in before:
            stack.callback(module.register_forward_pre_hook(function, with_kwargs=True).remove)
        for module, function in after:
            stack.callback(module.register_forward_hook(function).remove)
        yield


@contextmanager
def frozen(host: Host, *others: nn.Module) -> Iterator[None]:
    """Switches gradients of parameters and dropout off inside; afterwards every flag is restored, whatever happens.

    Other threads that ask the same of the model wait: they would see its hooks, and keep flags that are off for now.
    """
    with _LOCKS.setdefault(host.model, RLock()), _frozen([*host.networks, *others]):
        yield


@contextmanager
def _frozen(trees: Sequence[nn.Module]) -> Iterator[None]:
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


def check_finite(host: Host, values: Tensor, names: Sequence[str], what: str) -> None:
    """Refuses rows whose largest number is NaN or infinite, since whatever is computed from them means nothing.

    Single entries of -inf come from a mask, and are allowed.

    Args:
        host: the model, whose dtype the message names.
        values: one row for each name.
        names: what caused each row, such as "vector 3".
        what: what the rows are, for the message.

    Raises:
        FloatingPointError: a row is NaN or infinite; the message names the cause, the rows and the dtype.
    """
    broken = (~torch.isfinite(values.flatten(1).amax(1))).nonzero()[:, 0].tolist()
    if broken:
        dtype = str(host.dtype).removeprefix("torch.")
        unsteered = names[broken[0]] == "the unsteered model"
        remedy = "check the weights and the prompt" if unsteered else "use smaller scales"
        remedy += ", or load the model in bfloat16 or float32" if host.dtype == torch.float16 else ""
        raise FloatingPointError(
            f"{names[broken[0]]} makes {what} NaN or infinite in {dtype} ({len(broken)} of {len(names)} rows): "
            f"{remedy}."
        )


def end_tokens(host: Host) -> set[int]:
    """Returns the ids that end a completion.

    These are the end tokens of the tokenizer and of a Hugging Face model's configurations, and the token with which the
    chat template ends a turn. A `HookedTransformer` keeps no such configuration, so for it only the template tells that
    a chat model ends its turn with another token.
    """
    configs = [getattr(host.networks[-1], name, None) for name in ("generation_config", "config")]
    found = [getattr(config, "eos_token_id", None) for config in [host.tokenizer, *configs]]
    ends = {i for entry in found if entry is not None for i in (entry if isinstance(entry, list | tuple) else [entry])}
    # a tokenizer may have more tokens than the model, which can't write these
    return {i for i in ends | _end_of_turn(host.tokenizer) if i < host.cfg.d_vocab}


def _end_of_turn(tokenizer: Any) -> set[int]:
    """Finds the special token that the chat template writes right after the words of the assistant, if there is one."""
    if not getattr(tokenizer, "chat_template", None):
        return set()
    said = "melbo"
    user, answer = ({"role": role, "content": said} for role in ("user", "assistant"))
    parts = [{**message, "content": [{"type": "text", "text": said}]} for message in (user, answer)]
    # templates differ in which chats they accept, and some close an answer only when another message follows
    found: set[int] = set()
    for chat in ([user, answer], [user, answer, user], [{"role": "system", "content": said}, user, answer], parts):
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            at = [match.end() for match in re.finditer(said, text, re.IGNORECASE)][
                chat.index(answer) if answer in chat else -1
            ]
            after = tokenizer(text[at:].lstrip(), add_special_tokens=False)["input_ids"]
        except Exception:  # a template that refuses this chat says nothing about ends
            continue
        found |= set(after[:1])
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    return (found & special) - {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id} | (
        found & {tokenizer.eos_token_id}
    )
