"""How is a plain Hugging Face model steered?  With torch and safetensors alone, which is all that this file imports.

It is also the file `steer.py` that an export writes beside `steering.safetensors`, so it works without melbo_lens:

    from steer import load, steered

    with steered(model, load("steering.safetensors"), scale=1.0):
        model.generate(...)

`model` is what `AutoModelForCausalLM.from_pretrained` returns. Inside the block every pass of it is steered, at every
position, in `generate` too; afterwards the model is as before, even after an exception. Blocks may be nested.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor, nn

# Where an edit is made in a decoder layer. A vector is added to an activation; an update is added to what weights give.
LAYER_OUTPUT, ATTENTION_OUTPUT = "layer_output", "attention_output"
MLP_WEIGHTS, ATTENTION_WEIGHTS = "mlp_weights", "attention_weights"
PARTS = {  # place -> the names of its tensors
    LAYER_OUTPUT: ("vector",),
    ATTENTION_OUTPUT: ("vector",),
    MLP_WEIGHTS: ("A", "B"),
    ATTENTION_WEIGHTS: ("A", "B"),
}

# What the weights that write to the stream are called within a layer, by architecture.
WEIGHTS = {
    ATTENTION_WEIGHTS: (
        "self_attn.o_proj",
        "self_attn.out_proj",
        "self_attn.dense",
        "attention.dense",
        "self_attention.dense",
        "attn.c_proj",
        "attn.out_proj",
        "attn.attention.out_proj",
    ),
    MLP_WEIGHTS: (
        "mlp.down_proj",
        "mlp.dense_4h_to_h",
        "mlp.c_proj",
        "mlp.fc2",
        "mlp.fc_out",
        "fc2",
        "feed_forward.w2",
        "feed_forward.down_proj",
        "ffn.down_proj",
    ),
}
# The norms of a layer, by their names; the value names the one that the attention's output passes before the stream.
NORMS = {
    frozenset({"input_layernorm", "post_attention_layernorm"}): None,
    frozenset({"ln_1", "ln_2"}): None,
    frozenset({"ln_1"}): None,
    frozenset({"input_layernorm"}): None,
    frozenset({"self_attn_layer_norm", "final_layer_norm"}): None,
    frozenset(
        {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}
    ): "post_attention_layernorm",
    frozenset({"post_attention_layernorm", "post_feedforward_layernorm"}): "post_attention_layernorm",
    frozenset(
        {"input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"}
    ): "post_self_attn_layernorm",
}


class Edit(NamedTuple):
    """One change in one decoder layer.

    Attributes:
        place: "layer_output" or "attention_output", to which a vector is added; or "mlp_weights" or
            "attention_weights", whose output gains ``B A x``, where x is what enters these weights.
        layer: the number of the decoder layer, from 0.
        tensors: (vector [d_model],), or (A [rank d_in], B [d_model rank]); float32.
    """

    place: str
    layer: int
    tensors: tuple[Tensor, ...]


def tensors_of(edits: Sequence[Edit]) -> dict[str, Tensor]:
    """Returns the tensors as the file names them: place, layer and part, as in "layer_output.7.vector"."""
    return {
        f"{edit.place}.{edit.layer}.{name}": tensor
        for edit in edits
        for name, tensor in zip(PARTS[edit.place], edit.tensors, strict=True)
    }


def load(path: Any) -> list[Edit]:
    """Reads `steering.safetensors`.

    Raises:
        ValueError: the file holds something else.
    """
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
    held: dict[tuple[str, int], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, _, rest = name.partition(".")
        layer, _, part = rest.partition(".")
        if place not in PARTS or not layer.isdecimal():
            raise ValueError(f"{path} holds {name[:80]!r}, which is not what an export writes.")
        held.setdefault((place, int(layer)), {})[part] = tensor
    for (place, layer), parts in held.items():
        if set(parts) != set(PARTS[place]):
            raise ValueError(f"{path} holds {sorted(parts)} for {place} of layer {layer}, not {list(PARTS[place])}.")
    edits = [Edit(place, layer, tuple(parts[name] for name in PARTS[place])) for (place, layer), parts in held.items()]
    for place, layer, tensors in edits:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        fits = [len(shape) for shape in shapes] in ([1], [2, 2]) and 0 not in sum(shapes, ())
        if not fits or shapes[0][0] != shapes[-1][-1]:  # a vector's length, or the rank of A and B
            raise ValueError(
                f"{path} holds {', '.join(PARTS[place])} of shape {', '.join(map(str, shapes))} for {place} of layer "
                f"{layer}: a vector must be [d_model], and A and B [rank d_in] and [d_model rank]."
            )
    return edits


@contextmanager
def steered(model: Any, edits: Sequence[Edit], scale: float = 1.0) -> Iterator[Any]:
    """Steers whatever the model runs inside the block, at every position; afterwards it is as before, whatever happens.

    Args:
        model: a decoder of transformers, as `AutoModelForCausalLM.from_pretrained` returns it.
        edits: what `load` returns.
        scale: a number that multiplies every edit.

    Raises:
        TypeError: `model` is no such model.
        ValueError: an edit doesn't fit the model, or the scale is not finite.
    """
    if not isfinite(scale):
        raise ValueError(f"scale={scale!r} must be a finite number.")
    hooks = [_hook(model, edit, scale) for edit in edits]  # everything is looked up before anything is attached
    with ExitStack() as stack:
        for module, function in hooks:
            stack.callback(module.register_forward_hook(function).remove)
        yield model


def decoder_layers(model: Any) -> nn.ModuleList:
    """Returns the stack of decoder layers.

    Raises:
        TypeError: `model` is no Hugging Face model.
        ValueError: the model has no single stack of decoder layers.
    """
    config = _config(model)
    n_layers = getattr(config, "num_hidden_layers", None)
    stacks: dict[str, nn.ModuleList] = {}
    root = model.get_decoder() if hasattr(model, "get_decoder") else model
    for name, module in root.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in stacks)  # a layer's list of experts may be as long
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and not within:
            stacks[name] = module
    if len(stacks) != 1 or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has {len(stacks) or 'no'} stacks of {n_layers} layers: "
            "only a decoder with a single stack can be steered."
        )
    return next(iter(stacks.values()))


def _config(model: Any) -> Any:
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None or hasattr(model, "hook_dict"):
        what = "a model of TransformerLens" if hasattr(model, "hook_dict") else f"a {type(model).__name__}"
        raise TypeError(f"{what} was given: pass a model that AutoModelForCausalLM.from_pretrained returns.")
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _hook(model: Any, edit: Edit, scale: float) -> tuple[nn.Module, Callable[[nn.Module, Any, Any], Any]]:
    """Returns the module that an edit changes, and the forward hook that changes it."""
    layers, config = decoder_layers(model), _config(model)
    if edit.layer >= len(layers):
        raise ValueError(f"layer {edit.layer} was asked for; this model has layers 0 to {len(layers) - 1}.")
    layer, d_model = layers[edit.layer], edit.tensors[-1].shape[0]
    if d_model != getattr(config, "hidden_size", d_model):
        raise ValueError(
            f"the edit of layer {edit.layer} has d_model {d_model}, this model {config.hidden_size}: "
            "use the model that it was learned on."
        )
    if edit.place == LAYER_OUTPUT:
        return layer, _adding_vector(edit.tensors[0], scale)
    if edit.place == ATTENTION_OUTPUT:
        # Granite multiplies what enters the stream; the vector is what arrives there
        factor = getattr(config, "residual_multiplier", 1.0)
        return _attention_output(layer, edit.layer), _adding_vector(edit.tensors[0], scale / factor)
    module, (a, b) = _weights(layer, edit.place, edit.layer), edit.tensors
    d_in = getattr(module, "in_features", None) or module.get_parameter("weight").shape[0]  # GPT-2's has [in out]
    if d_in != a.shape[1]:
        raise ValueError(
            f"the edit of layer {edit.layer} reads {a.shape[1]} numbers, its {edit.place} {d_in}: "
            "use the model that it was learned on."
        )
    return module, _adding_update(a, b, scale)


def _weights(layer: nn.Module, place: str, number: int) -> Any:
    """Returns the weights of that place, a linear map or GPT-2's Conv1D."""
    found = [module for module in (_part(layer, name) for name in WEIGHTS[place]) if module is not None]
    if len(found) != 1:
        raise ValueError(
            f"layer {number} ({type(layer).__name__}) has {len(found) or 'none'} of the {place} known here, "
            f"{WEIGHTS[place]}: this architecture can't be steered there."
        )
    return found[0]


def _attention_output(layer: nn.Module, number: int) -> nn.Module:
    """Returns the module whose output the stream gains from attention: its weights, or a norm after them."""
    known = {name for names in NORMS for name in names}
    norms = frozenset(
        [name for name in known if _part(layer, name) is not None]
        + [name for name, _ in layer.named_children() if "norm" in name]
    )
    if norms not in NORMS:
        raise ValueError(
            f"layer {number} ({type(layer).__name__}) has the norms {sorted(norms)}, among which the one after "
            "attention is not known: this architecture can't be steered at the attention's output."
        )
    after = NORMS[norms]
    return _weights(layer, ATTENTION_WEIGHTS, number) if after is None else layer.get_submodule(after)


def _part(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def _adding_vector(vector: Tensor, scale: float) -> Callable[[nn.Module, Any, Any], Any]:
    held = _Near((scale * vector,))

    def add(module: nn.Module, arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.ndim != 3:
            raise ValueError(
                f"{type(module).__name__} gives {tuple(hidden.shape)}, not [batch pos d_model]: "
                "this architecture can't be steered there."
            )
        (bias,) = held.on(hidden.device)
        moved = (hidden + bias).to(hidden.dtype)  # added in float32 and rounded once
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    return add


def _adding_update(a: Tensor, b: Tensor, scale: float) -> Callable[[nn.Module, Any, Any], Any]:
    held = _Near((a, scale * b))

    def add(module: nn.Module, arguments: Any, output: Any) -> Any:
        near_a, near_b = held.on(output.device)
        return (output + arguments[0].float() @ near_a.T @ near_b.T).to(output.dtype)

    return add


class _Near:
    """Tensors that are moved to a device once, since generation asks for them at every token."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors

    def on(self, device: Any) -> tuple[Tensor, ...]:
        if self.tensors[0].device != device:
            self.tensors = tuple(tensor.to(device) for tensor in self.tensors)
        return self.tensors
