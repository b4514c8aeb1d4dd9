"""How much does a perturbation change what the model computes?  Measured by token and layer, and at the target.

Nothing here depends on the kind of perturbation.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from melbo_lens import files
from melbo_lens.arguments import public, signs_of
from melbo_lens.ascent.objectives import Objective, TokenNorm
from melbo_lens.models import hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.host import Host
from melbo_lens.models.sinks import SINK
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Positions, PromptBatch, Prompts, one_prompt, tokenize
from melbo_lens.texts import token_texts

ROWS_AT_ONCE = 64


@dataclass(frozen=True, eq=False, repr=False)
class ActivationChanges:
    """How far perturbations move the residual stream at each token of one prompt.

    Attributes:
        change: the norm of the difference between the perturbed stream and the clean one.
        clean: the norm of the clean stream.
        tokens: the text of each token.
        layers: the measured layers; layer T is the stream that enters block T, as in `target_layer`.
    """

    change: Float[Tensor, "vector layer pos"]
    clean: Float[Tensor, "layer pos"]
    tokens: tuple[str, ...]
    layers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.change)

    @property
    def relative(self) -> Float[Tensor, "vector layer pos"]:
        """The change as a share of the clean stream's norm."""
        return self.change / self.clean.clamp(min=1e-30)

    @property
    def sinks(self) -> Bool[Tensor, "vector layer pos"]:
        """Where a position is an attention sink, or is made one; its change is no measure of behaviour.

        The clean norm of a sink is over ten times the median of its layer. A position is made one where its change is
        over ten times that median, and over ten times the perturbation's own median change in the layer.
        """
        usual = self.clean.median(dim=-1, keepdim=True).values
        own = self.change.median(dim=-1, keepdim=True).values
        return (self.clean > SINK * usual) | ((self.change > SINK * usual) & (self.change > SINK * own))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically."""
        header = {"tokens": list(self.tokens), "layers": list(self.layers)}
        files.write(path, "ActivationChanges", {"change": self.change, "clean": self.clean}, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ActivationChanges":
        """Reads what `save` wrote."""
        tensors, header = files.read(path, "ActivationChanges")
        return cls(tensors["change"], tensors["clean"], tuple(header["tokens"]), tuple(header["layers"]))

    def __repr__(self) -> str:
        return (
            f"ActivationChanges({len(self)} perturbations, layers {self.layers[0]} to {self.layers[-1]}, "
            f"{len(self.tokens)} tokens)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class TargetEffects:
    """What perturbations change at the target positions; each perturbation and sign has one long row.

    Attributes:
        values: the changes at all target positions of all prompts, flattened.
        vectors: the number of the perturbation that each row belongs to.
        signs: the sign with which each row's perturbation was applied.
        target_layer: the change was read in the stream that enters this block; None if it was another activation.
        target_hook: the name of the activation that was read.
    """

    values: Float[Tensor, "row feature"]
    vectors: tuple[int, ...]
    signs: tuple[int, ...]
    target_layer: int | None
    target_hook: str = ""

    def __len__(self) -> int:
        return len(self.values)

    def cosine_similarity(self) -> Float[Tensor, "row row"]:
        """The cosines between the changes; NaN for rows that hold NaN."""
        unit = self.values.double() / self.values.double().norm(dim=-1, keepdim=True).clamp(min=1e-30)
        return (unit @ unit.T).float()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically."""
        header = {
            "vectors": list(self.vectors),
            "signs": list(self.signs),
            "target_layer": self.target_layer,
            "target_hook": self.target_hook,
        }
        files.write(path, "TargetEffects", {"values": self.values}, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TargetEffects":
        """Reads what `save` wrote."""
        tensors, header = files.read(path, "TargetEffects")
        return cls(
            tensors["values"],
            tuple(header["vectors"]),
            tuple(header["signs"]),
            header["target_layer"],
            header.get("target_hook", ""),
        )

    def __repr__(self) -> str:
        where = f"layer {self.target_layer}" if self.target_layer is not None else self.target_hook
        return f"TargetEffects({len(self)} rows of {self.values.shape[1]} numbers, at {where})"


@public
def activation_changes(
    model: Model, prompt: Prompts, perturbations: Perturbation, layers: Sequence[int] | None = None
) -> ActivationChanges:
    """The change of the residual stream at each token of one prompt and each layer, for each perturbation.

    Args:
        model: the model, which is left as it was.
        prompt: one text, chat, or row of token ids. A text that the model wrote under the perturbation shows where the
            perturbation acts.
        perturbations: vectors or adapters; each acts by itself.
        layers: T means the stream that enters block T, and n_layers the stream that leaves the last block. None means
            all layers after the perturbation.

    Returns:
        The norms of the changes [vector layer pos], and of the clean stream.

    Raises:
        ValueError: there are several prompts, or a layer that the model does not have.
        FloatingPointError: the stream holds NaN or infinity.
    """
    host = host_of(model)
    batch = tokenize(host, prompt)
    one_prompt(batch)
    n_layers, perturbations = host.n_layers, perturbations.on(host)
    chosen = range(min(perturbations.source_layers) + 1, n_layers + 1) if layers is None else layers
    if not isinstance(chosen, Sequence) or not chosen or any(not _is_layer(layer, n_layers) for layer in chosen):
        raise ValueError(
            f"layers={layers!r} must hold layers from 1 to n_layers = {n_layers}: layer T is the stream that enters "
            "block T."
        )
    with hooks.frozen(host), torch.no_grad():
        names = [_stream_name(layer) for layer in chosen]
        clean = _read(host, batch.tokens, None, names)
        norms = [
            torch.stack([(stream - was).norm(dim=-1) for stream, was in zip(streams, clean, strict=True)], dim=1)
            for streams in (
                _read(host, batch.tokens.expand(len(part), -1), part, names) for part in _parts(perturbations)
            )
        ]
    change = torch.cat(norms)
    hooks.check_finite(host, change, [f"{perturbations.word} {k}" for k in range(len(change))], "the stream")
    return ActivationChanges(
        change.cpu(),
        torch.stack([stream[0].norm(dim=-1) for stream in clean]).cpu(),
        tuple(token_texts(host, batch.rows()[0])),
        tuple(chosen),
    )


@public
def target_effects(
    model: Model,
    prompts: Prompts,
    perturbations: Perturbation,
    target_layer: int | None = None,
    target_positions: Positions = slice(-1, None),
    signs: int | Sequence[int] = (1,),
    target_hook: str | None = None,
) -> TargetEffects:
    """The effect of each perturbation: what it changes at its target, at the target positions of all prompts.

    Args:
        model: the model, which is left as it was.
        prompts: text, chats or token ids.
        perturbations: vectors or adapters; each acts by itself.
        target_layer: the change is read in the stream that enters this layer. None takes the target that the
            perturbations were learned for; a control takes the target of the perturbations that it is matched to.
        target_positions: where the change is read, in each prompt's own tokens.
        signs: +1, -1 or both.
        target_hook: the change is read in this activation instead of a layer's stream.

    Returns:
        The changes [row feature]: all vectors with the first sign, then all with the second.

    Raises:
        ValueError: a sign is neither +1 nor -1, the perturbations know no target and none is given, or the model has no
            such layer or hook.
        FloatingPointError: the target holds NaN or infinity.
    """
    signs, host = signs_of(signs), host_of(model)
    batch = tokenize(host, prompts, target_positions)
    layer, name = _target(host, perturbations, target_layer, target_hook)
    rows = []
    for sign in signs:
        signed = perturbations if sign == 1 else -perturbations
        rows.append(
            torch.cat(
                [changes[:, batch.target_mask].flatten(1) for changes in _changes(host, batch, signed, name)]
            ).cpu()
        )
    n = len(perturbations)
    return TargetEffects(
        torch.cat(rows), tuple(range(n)) * len(signs), tuple(sign for sign in signs for _ in range(n)), layer, name
    )


@public
def objective(
    model: Model,
    prompts: Prompts,
    perturbations: Perturbation,
    target_layer: int | None = None,
    target_positions: Positions | None = None,
    p: float | None = None,
    q: float | None = None,
    token_norm: TokenNorm | None = None,
    target_hook: str | None = None,
) -> Float[Tensor, " vector"]:
    """The objective that a fit maximises, for any perturbations: without its penalty, and summed over the prompts.

    The objective of random perturbations is the level that learned ones must beat.

    Args:
        model, prompts: as in `fit_vectors`; give the same ones to compare with a fit.
        perturbations: vectors or adapters.
        target_layer, target_positions, p, q, token_norm, target_hook: None takes what the perturbations were learned
            for; a control takes what the perturbations that it is matched to were learned for. Settings that they don't
            know are those of `fit_vectors` (all positions, p 2, q 1).

    Returns:
        One number for each perturbation.

    Raises:
        ValueError: the perturbations know no target and none is given, or the model has no such layer or hook.
        FloatingPointError: the target holds NaN or infinity.
    """
    given = {"target_positions": target_positions, "p": p, "q": q, "token_norm": token_norm}
    given = {name: value for name, value in given.items() if value is not None}
    wanted = replace(perturbations.objective or Objective(), **given)
    host = host_of(model)
    batch = tokenize(host, prompts, wanted.target_positions)
    _, name = _target(host, perturbations, target_layer, target_hook)
    parts = []
    for changes in _changes(host, batch, perturbations, name):
        n = len(changes)
        mask = batch.target_mask.expand(n, -1, -1).flatten(0, 1)
        parts.append(wanted.value(changes.flatten(0, 1), mask).view(n, -1).sum(1))
    return torch.cat(parts).cpu()


def _changes(
    host: Host, batch: PromptBatch, perturbations: Perturbation, name: str
) -> Iterator[Float[Tensor, "vector prompt pos d_target"]]:
    """The changes of an activation, `ROWS_AT_ONCE` perturbations at a time."""
    perturbations = perturbations.on(host)
    with hooks.frozen(host), torch.no_grad():
        (clean,) = _read(host, batch.tokens, None, [name])
        for first, part in zip(range(0, len(perturbations), ROWS_AT_ONCE), _parts(perturbations), strict=True):
            changes = [
                _read(host, row.expand(len(part), -1), part, [name])[0] - was
                for row, was in zip(batch.tokens, clean, strict=True)
            ]
            stacked = torch.stack(changes, dim=1)
            hooks.check_finite(
                host, stacked[:, batch.own].abs(), [f"{part.word} {first + i}" for i in range(len(part))], repr(name)
            )
            yield stacked


def _read(
    host: Host, tokens: Tensor, perturbations: Perturbation | None, names: Sequence[str]
) -> list[Float[Tensor, "row pos d"]]:
    """The activations at these hooks from one forward pass, in float32; the axes after `pos` are flattened.

    Raises:
        ValueError: an activation has other axes.
    """
    seen: dict[str, Tensor] = {}
    readers = [
        (name, lambda activation, hook, name=name: seen.update({name: activation})) for name in dict.fromkeys(names)
    ]
    with hooks.attached(host, [*([] if perturbations is None else perturbations.hooks()), *readers]):
        host.forward(tokens)
    for name in names:
        shape = tuple(seen[name].shape) if name in seen else ()
        if len(shape) < 3 or shape[:2] != tokens.shape:
            raise ValueError(f"{name!r} must have an activation [row pos ...]; seen: {shape}. Choose another hook.")
    return [seen[name].to(host.device).float().flatten(2) for name in names]


def _stream_name(layer: int) -> str:
    """The hook of the stream that enters a layer, which is the stream that leaves the block before it."""
    return f"blocks.{layer - 1}.hook_resid_post"


def _parts(perturbations: Perturbation) -> Iterator[Perturbation]:
    """The perturbations in groups of at most `ROWS_AT_ONCE`."""
    for first in range(0, len(perturbations), ROWS_AT_ONCE):
        yield perturbations[list(range(first, min(first + ROWS_AT_ONCE, len(perturbations))))]


def _target(host: Host, perturbations: Perturbation, layer: int | None, hook: str | None) -> tuple[int | None, str]:
    """The target layer (None if the target is no layer's stream) and the name of the activation to read."""
    n_layers = host.n_layers
    if layer is not None and hook is not None:
        raise ValueError(
            f"target_layer={layer} and target_hook={hook!r} were given: one place is read, leave one of them out."
        )
    if layer is None and hook is None:
        learned_for = perturbations.objective or Objective()
        layer = learned_for.target_layer
        hook = learned_for.target_hook if layer is None else None
    if hook is not None:
        hooks.check_target(host, hook)
        return None, hook
    if layer is None:
        raise ValueError(
            "these perturbations don't know where their effect is to be read (they were not learned, or joined over "
            f"several targets): give target_layer, from 1 to n_layers = {n_layers}, or target_hook."
        )
    if not _is_layer(layer, n_layers):
        raise ValueError(
            f"target_layer={layer!r} must lie from 1 to n_layers = {n_layers}: it is the stream that enters that block."
        )
    if layer <= min(perturbations.source_layers):
        raise ValueError(
            f"target_layer={layer} must lie above {min(perturbations.source_layers)}, where the {perturbations.word}s "
            "act: the stream that enters an earlier block is as it was."
        )
    return layer, _stream_name(layer)


def _is_layer(layer: Any, n_layers: int) -> bool:
    return isinstance(layer, int) and not isinstance(layer, bool) and 1 <= layer <= n_layers
