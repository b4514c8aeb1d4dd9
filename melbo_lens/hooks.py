"""How is a TransformerLens model touched?  The only file that attaches hooks, calls a block or knows the model classes."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
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
        ValueError: an encoder, no stack of blocks, or parts on several devices.
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
    devices = {parameter.device for parameter in nn.Module.parameters(model)}
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
        hint = f"did you mean one of {near}?" if near else "this model has none of that kind (an attention-only model has no MLP)."
        raise ValueError(f"the model has no hook {name!r}: {hint}")
    return points[name]


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


@dataclass(frozen=True)
class BlockCall:
    """One block with the arguments, other than the stream, that the model called it with."""

    block: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, stream: Tensor, prompts: Tensor, n_prompts: int) -> Tensor:
        """Calls the block on rows that belong to the given prompts."""
        arguments = _select_rows(self.arguments, prompts, n_prompts)
        keywords = _select_rows(self.keywords, prompts, n_prompts)
        if "hidden_states" in keywords:
            return _stream(self.block(*arguments, **{**keywords, "hidden_states": stream}))
        return _stream(self.block(stream, *arguments, **keywords))


def in_float32(call: BlockCall) -> BlockCall:
    """The same call on a float32 copy of the block and of its arguments; the model keeps its own."""
    block = copy.deepcopy(call.block).float()
    for module in block.modules():
        attributes = vars(module)
        # a bridge in compatibility mode keeps processed weights as plain attributes
        attributes.update({name: _float(value) for name, value in attributes.items() if isinstance(value, Tensor)})
        if HookedTransformer is not None and isinstance(getattr(module, "cfg", None), HookedTransformerConfig):
            module.cfg.dtype = torch.float32  # its layers cast to what their configuration names; the copy has its own
    return BlockCall(block, _float(call.arguments), _float(call.keywords))


@dataclass(frozen=True)
class Recording:
    """What one ordinary pass did between two layers: the stream that entered each block, and how each block was called."""

    calls: list[BlockCall] = field(default_factory=list)
    streams: list[Tensor] = field(default_factory=list)  # [prompt pos d_model], one more than calls: the last is what left


class _Reached(Exception):
    """Ends a forward pass once everything needed was recorded."""


def record(model: Any, tokens: Tensor, first: int, last: int, hooks: Sequence[Hook] = ()) -> Recording:
    """Runs the model up to and including block `last - 1`, and records the calls of blocks `first` to `last - 1`.

    Nothing after those blocks is run. `first == last` records the stream that leaves block `first - 1` and no call.

    Raises:
        ValueError: a hook did not fire exactly once.
        RuntimeError: a block did not run exactly once.
    """
    recording = Recording()

    def enter(block: nn.Module, arguments: tuple, keywords: dict) -> None:
        stream = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
        rest = arguments if "hidden_states" in keywords else arguments[1:]
        recording.calls.append(BlockCall(block, rest, dict(keywords)))
        recording.streams.append(stream.detach())

    def leave(block: nn.Module, arguments: tuple, output: Any) -> None:
        recording.streams.append(_stream(output).detach())
        raise _Reached

    with ExitStack() as stack:
        fired = stack.enter_context(attached(model, hooks))
        for layer in range(first, last):
            stack.callback(model.blocks[layer].register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(model.blocks[last - 1].register_forward_hook(leave).remove)
        with torch.no_grad(), suppress(_Reached):
            forward(model, tokens)
    for (name, _), times in zip(hooks, fired, strict=True):
        if times != 1:
            raise ValueError(
                f"the hook {name!r} fired {times} times in one forward pass, it must fire once: this block has no such activation "
                "(an attention-only model has no MLP), or runs it repeatedly. Choose another layer or model."
            )
    if len(recording.calls) != last - first or len(recording.streams) != last - first + 1:
        raise RuntimeError(
            f"blocks {first} to {last - 1} should run once each in a forward pass; {len(recording.calls)} calls were seen. "
            "This model can't be sliced."
        )
    return recording


def forward(model: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Logits of one uncached pass; without a mask every column of `tokens` counts."""
    if is_hooked_transformer(model):
        # HookedTransformer would guess a mask from the tokenizer's padding token
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.to(tokens)
        return model(tokens, attention_mask=mask)
    keywords = {} if attention_mask is None else {"attention_mask": attention_mask.to(tokens)}
    return model(tokens, use_cache=False, **keywords)


class CachedDecoder:
    """Feeds a left-padded batch to the model piece by piece, keeping keys and values, and drops rows that are done."""

    def __init__(self, model: Any, attention_mask: Tensor) -> None:
        """`attention_mask` [row pos] is that of the prompts."""
        self.model, self.mask = model, attention_mask
        self.cache: Any = None
        if is_hooked_transformer(model):
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            self.cache = TransformerLensKeyValueCache.init_cache(model.cfg, attention_mask.device, len(attention_mask))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [row d_vocab] after the last of these new tokens [row pos]."""
        if self.cache is not None and is_hooked_transformer(self.model):
            new = self.mask[:, self.mask.shape[1] - tokens.shape[1] :]
            logits = self.model(tokens, attention_mask=new.to(tokens), past_kv_cache=self.cache)
        else:
            positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            keywords = {"position_ids": positions} if self.model._accepts_derived_position_ids() else {}
            if self.cache is not None:
                keywords["past_key_values"] = self.cache
            logits, self.cache = self.model(tokens, return_type="logits_and_cache", attention_mask=self.mask.to(tokens), use_cache=True, **keywords)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows only."""
        self.mask = self.mask[rows]
        if is_hooked_transformer(self.model):
            self.cache.previous_attention_mask = self.cache.previous_attention_mask[rows]
            for entry in self.cache.entries:
                entry.past_keys, entry.past_values = entry.past_keys[rows], entry.past_values[rows]
        else:
            self.cache.batch_select_indices(rows)


def end_tokens(model: Any) -> set[int]:
    """Ids that end a completion: the tokenizer's, and those of a Hugging Face generation config (chat models often have another)."""
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    found = [getattr(model.tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None)]
    return {i for entry in found if entry is not None for i in (entry if isinstance(entry, list | tuple) else [entry])}


def _stream(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _float(value: Any) -> Any:
    """Half-precision tensors as float32, inside tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, tuple | list):
        return type(value)(_float(item) for item in value)
    return {key: _float(item) for key, item in value.items()} if isinstance(value, dict) else value


def _select_rows(value: Any, prompts: Tensor, n_prompts: int) -> Any:
    """Repeats what has a prompt axis; what has none, or one of length 1, broadcasts by itself."""
    if isinstance(value, Tensor):
        has_axis = n_prompts > 1 and value.ndim > 1 and value.shape[0] == n_prompts
        return value[prompts] if has_axis else value
    if isinstance(value, tuple | list):
        return type(value)(_select_rows(item, prompts, n_prompts) for item in value)
    if isinstance(value, dict):
        return {key: _select_rows(item, prompts, n_prompts) for key, item in value.items()}
    return value
