"""What must be added to the output of each decoder layer?  One vector for each layer, checked."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from melbo_lens.exports import comparison
from melbo_lens.methods.provenance import check_same_model
from melbo_lens.models import hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.counterparts import layer_name
from melbo_lens.models.host import Host
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.prompts import Prompts


def single_vectors(perturbation: Perturbation | Sequence[Perturbation], format: str) -> list[SteeringVectors]:
    """Refuses what can't be added to the outputs of decoder layers, one vector for each layer.

    A vector at "mlp_out" is written straight to the stream, so it equals the same vector at "resid_post": the output of
    the decoder layer. A vector at "attn_out" passes through the rest of its block and has no such equal.

    Args:
        perturbation: one vector, such as `vectors[3]`, or a sequence of single vectors of different layers, which act
            together.
        format: the format that they are exported to, for messages.

    Returns:
        The vectors by ascending layer, one row each.

    Raises:
        ValueError: something else than single vectors of different layers and one width was given, or one has no equal
            at the output of its layer.
    """
    several = [perturbation] if isinstance(perturbation, Perturbation) else list(perturbation)
    if not several:
        raise ValueError(f"{format} was given nothing to export: pass at least one vector.")
    vectors: list[SteeringVectors] = []
    for one in several:
        if not isinstance(one, SteeringVectors):
            raise ValueError(
                f"{format} holds vectors, and {type(one).__name__} were given: export steering vectors, as "
                "fit_vectors learns them."
            )
        if len(one) != 1:
            raise ValueError(
                f"{format} holds one vector for each layer, {len(one)} of layer {one.source_layer} were given: choose "
                f'one, as ml.export(vectors[0], "{format}", path, model=model).'
            )
        if not one.reaches_stream:
            raise ValueError(
                f"{format} adds vectors to the output of a block, and a vector at site={one.site!r} passes through "
                "the rest of its block first"
                + ("." if one.site == "resid_post" else ': learn it at site="resid_post".')
            )
        vectors.append(one)
    layers = [one.source_layer for one in vectors]
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise ValueError(
            f"{format} holds one vector for each layer, and several of layers {twice} were given: "
            "add them first, as vectors[0] + vectors[1]."
        )
    widths = sorted({one.d_model for one in vectors})
    if len(widths) > 1:
        raise ValueError(f"{format} holds vectors of one width, and widths {widths} were given: they fit no one model.")
    return sorted(vectors, key=lambda one: one.source_layer)


def compare(
    vectors: Sequence[SteeringVectors],
    model: Model | None = None,
    hf_model: nn.Module | None = None,
    prompts: Prompts | None = None,
) -> Host | None:
    """Checks that adding the vectors to the outputs of the Hugging Face model's layers has the same effect.

    Args:
        vectors: single vectors of different layers, which act together.
        model: the model that they were learned on.
        hf_model: the Hugging Face model to check against. By default it is the model inside a bridge or, where
            TransformerLens processed the weights, the one in the model's own files.
        prompts: the prompts to check on. By default those of the fit, or some tokens if none are known.

    Returns:
        The opened model; None if there is none.

    Raises:
        ValueError: the vectors don't fit the model or were learned on another one, log-probabilities differ by more
            than 1e-4 of their change where that is above one (in half precision, by more than its rounding), or
            hf_model is another model.

    Warns:
        UserWarning: there was no model, or no Hugging Face model, to check against.
    """
    host = None if model is None else host_of(model)
    if host is None:
        missing = "no model was given. Pass model="
    elif not _check([one.on(host) for one in vectors], host, hf_model, prompts):
        missing = (
            "TransformerLens processed its weights, and its files are not on this machine or give other "
            "log-probabilities. Pass hf_model="
        )
    else:
        return host
    warnings.warn(
        f"the exported vectors were not compared with a Hugging Face model: {missing} to compare.", stacklevel=3
    )
    return host


def _check(vectors: Sequence[SteeringVectors], host: Host, hf_model: nn.Module | None, prompts: Prompts | None) -> bool:
    """Compares the steered model with the Hugging Face model; False if there is none to compare with."""
    for one in vectors:
        check_same_model(one, host)

    def changed(network: nn.Module) -> AbstractContextManager[None]:
        return hooks.watched(
            after=[
                (network.get_submodule(layer_name(host, one.source_layer)), _adding(one.values[0])) for one in vectors
            ]
        )

    differences = comparison.steered_differences(host, vectors, changed, hf_model, prompts)
    if differences is None:
        return False
    if not differences.steered <= differences.allowed:
        raise ValueError(
            "the log-probabilities of the steered model and of the Hugging Face model with the vectors added to the "
            f"output of layers {[one.source_layer for one in vectors]} differ by {differences.steered:.1e} (allowed: "
            f"{differences.allowed:.0e}), without them by {differences.unsteered:.1e}: what is written at "
            f"{vectors[0].hook_name!r} does not reach the stream of this model unchanged. Learn the vectors at "
            'site="resid_post".'
        )
    return True


def _adding(vector: Tensor) -> Callable[..., Any]:
    """Returns a function that adds a vector to the output of a module after it ran."""

    def add(module: nn.Module, arguments: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        stream = (stream + vector.to(stream.device)).to(stream.dtype)  # added in float32 and rounded once
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    return add
