"""How does a value steer a Hugging Face model that TransformerLens has not wrapped?  `on_transformers` does it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from melbo_lens.arguments import finite
from melbo_lens.exports.standalone import (
    ATTENTION_OUTPUT,
    ATTENTION_WEIGHTS,
    LAYER_OUTPUT,
    MLP_WEIGHTS,
    Edit,
    steered,
)
from melbo_lens.perturbations.adapters import SteeringAdapters
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.perturbations.vectors import SteeringVectors

# Adding to what the MLP writes equals adding to the stream that leaves the block, in every block that has a site there.
PLACES = {"mlp_out": LAYER_OUTPUT, "resid_post": LAYER_OUTPUT, "attn_out": ATTENTION_OUTPUT}
WEIGHTS = {"mlp": MLP_WEIGHTS, "attn": ATTENTION_WEIGHTS}


@contextmanager
def on_transformers(hf_model: Any, perturbation: Perturbation, scale: float = 1.0) -> Iterator[Any]:
    """Steers a plain Hugging Face model inside the block; afterwards it is as before, even after an exception.

    It does what `steer` does on a `TransformerBridge` around the same model, and needs no TransformerLens. Every pass
    is steered, at every position: calls of the model, and `generate` with and without a cache, with beams or samples.
    A vector is added to the output of its decoder layer, or of its attention; an adapter adds ``scale * B A x`` to the
    output of the weights that it updates. Blocks may be nested, and their effects add up.

    Args:
        hf_model: what `AutoModelForCausalLM.from_pretrained` returns, in any dtype and on any devices; the block gets
            it back as the value of `with`.
        perturbation: one vector or one adapter, such as `vectors[3]`. A batch of `generate` has rows for beams and
            samples, so several of them have no rows of their own here.
        scale: a number that multiplies the perturbation; a negative one turns it around.

    Raises:
        TypeError: `hf_model` is no such model, or the perturbation is of another package's kind.
        ValueError: there are several vectors or adapters, they don't fit the model, or the scale is no finite number.
    """
    with steered(hf_model, edits_of(perturbation), finite("scale", scale)) as model:
        yield model


def edits_of(perturbation: Perturbation) -> list[Edit]:
    """Returns what one vector or one adapter changes in the decoder layers of a Hugging Face model.

    Raises:
        TypeError: the perturbation is of another package's kind.
        ValueError: there are several vectors or adapters, or a vector doesn't reach the output of its layer as it is.
    """
    if not isinstance(perturbation, SteeringVectors | SteeringAdapters):
        raise TypeError(f"one vector or one adapter can steer here; got {type(perturbation).__name__}.")
    if len(perturbation) != 1:
        raise ValueError(
            f"one {perturbation.word} can steer here, {len(perturbation)} were given: choose one, as "
            f"{perturbation.word}s[0]. Nest blocks to steer with several at once."
        )
    if isinstance(perturbation, SteeringVectors):
        if perturbation.site != "attn_out" and not perturbation.reaches_stream:
            raise ValueError(
                f"a vector at site={perturbation.site!r} is added to the output of its layer here, and in the model "
                "that it was learned on the block scales or normalises it first"
                + ("." if perturbation.site == "resid_post" else ': learn it at site="resid_post".')
            )
        return [Edit(PLACES[perturbation.site], perturbation.source_layer, (perturbation.values[0],))]
    scale = perturbation.scales[0]
    return [
        Edit(WEIGHTS[perturbation.site], layer, (a[0], scale * b[0])) for layer, (a, b) in perturbation.factors.items()
    ]
