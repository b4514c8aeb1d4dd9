"""Where, and by how much, does a perturbation change what the model computes?  Changes by token and layer, and at the target.

Nothing here depends on the kind of perturbation: it needs a length, `perturbations[[...]]`, `.on(model)`, and `.hooks()` for a batch with one row
for each.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens import files, hooks
from melbo_lens.objectives import TokenNorm, change_objective, check_exponents
from melbo_lens.prompts import Positions, PromptBatch, Prompts, tokenize

ROWS_AT_ONCE = 64


@dataclass(frozen=True, eq=False, repr=False)
class ActivationChanges:
    """How far perturbations move the residual stream at each token of one prompt.

    Attributes:
        change: norm of the perturbed stream minus the clean one.
        clean: norm of the clean stream.
        tokens: text of each token.
        layers: layer T stands for the stream that enters block T, as `target_layer` does.
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
        return f"ActivationChanges({len(self)} perturbations, layers {self.layers[0]} to {self.layers[-1]}, {len(self.tokens)} tokens)"


@dataclass(frozen=True, eq=False, repr=False)
class TargetEffects:
    """What perturbations change at the target positions, one long row each.

    Attributes:
        values: the changes at all target positions of all prompts, flattened.
        vectors: which perturbation each row belongs to.
        signs: with which sign it was applied.
        target_layer: where it was read, the stream that enters this block.
    """

    values: Float[Tensor, "row feature"]
    vectors: tuple[int, ...]
    signs: tuple[int, ...]
    target_layer: int

    def __len__(self) -> int:
        return len(self.values)

    def cosine_similarity(self) -> Float[Tensor, "row row"]:
        """Cosines between the changes; NaN for rows that hold NaN."""
        unit = self.values.double() / self.values.double().norm(dim=-1, keepdim=True).clamp(min=1e-30)
        return (unit @ unit.T).float()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, atomically."""
        header = {"vectors": list(self.vectors), "signs": list(self.signs), "target_layer": self.target_layer}
        files.write(path, "TargetEffects", {"values": self.values}, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TargetEffects":
        """Reads what `save` wrote."""
        tensors, header = files.read(path, "TargetEffects")
        return cls(tensors["values"], tuple(header["vectors"]), tuple(header["signs"]), header["target_layer"])

    def __repr__(self) -> str:
        return f"TargetEffects({len(self)} rows of {self.values.shape[1]} numbers, at layer {self.target_layer})"


def activation_changes(model: Any, prompt: Prompts, perturbations: Any, layers: Sequence[int] | None = None) -> ActivationChanges:
    """The change of the residual stream at each token of one prompt and each layer, for each perturbation.

    Args:
        model: left as it was.
        prompt: one text, chat, or row of token ids; a text that the model wrote under the perturbation shows where it acts.
        perturbations: vectors or adapters; each acts by itself.
        layers: T for the stream that enters block T (n_layers: that leaves the last); None: all after the perturbation.

    Raises:
        ValueError: several prompts, or a layer that the model does not have.
    """
    hooks.check_model(model)
    batch = tokenize(model, prompt)
    one_prompt(batch)
    n_layers, perturbations = len(model.blocks), perturbations.on(model)
    first = min(int(found[1]) for name, _ in perturbations.hooks() if (found := re.match(r"blocks\.(\d+)\.", name)))
    chosen = list(range(first + 1, n_layers + 1) if layers is None else layers)
    if not chosen or any(not 1 <= layer <= n_layers for layer in chosen):
        raise ValueError(f"layers={chosen} must hold layers from 1 to n_layers = {n_layers}: layer T is the stream that enters block T.")
    with hooks.frozen(model), torch.no_grad():
        clean = _streams(model, batch.tokens, None, chosen)
        norms = [
            torch.stack([(stream - was).norm(dim=-1) for stream, was in zip(streams, clean, strict=True)], dim=1)
            for streams in (_streams(model, batch.tokens.expand(len(part), -1), part, chosen) for part in _parts(perturbations))
        ]
    return ActivationChanges(
        torch.cat(norms).cpu(),
        torch.stack([stream[0].norm(dim=-1) for stream in clean]).cpu(),
        tuple(texts(model, batch.rows()[0])),
        tuple(chosen),
    )


def target_effects(
    model: Any,
    prompts: Prompts,
    perturbations: Any,
    target_layer: int | None = None,
    target_positions: Positions = slice(-1, None),
    signs: Sequence[int] = (1,),
) -> TargetEffects:
    """What each perturbation changes in the stream that enters a layer, at the target positions of all prompts: its effect.

    Args:
        model: left as it was.
        prompts: text, chats or token ids.
        perturbations: vectors or adapters; each acts by itself.
        target_layer: None takes the one that they were learned for.
        target_positions: of each prompt's own tokens.
        signs: +1, -1 or both.
    """
    batch = _target_batch(model, prompts, target_positions)
    layer = _target_layer(model, perturbations, target_layer)
    rows = []
    for sign in signs:
        signed = perturbations if sign == 1 else -perturbations
        rows.append(torch.cat([changes[:, batch.target_mask].flatten(1) for changes in _target(model, batch, signed, layer)]).cpu())
    n, several = len(perturbations), len(tuple(signs))
    return TargetEffects(torch.cat(rows), tuple(range(n)) * several, tuple(sign for sign in signs for _ in range(n)), layer)


def objective(
    model: Any,
    prompts: Prompts,
    perturbations: Any,
    target_layer: int | None = None,
    target_positions: Positions = slice(None),
    p: float = 2,
    q: float = 1,
    token_norm: TokenNorm = "d_model",
) -> Float[Tensor, " vector"]:
    """The objective that `fit_vectors` maximises, summed over prompts, of any perturbations: of random ones it is the level to beat.

    Args:
        model, prompts, target_layer, target_positions, p, q, token_norm: as in `fit_vectors`; give the same.
        perturbations: vectors or adapters.
    """
    check_exponents(p, q, token_norm)
    batch = _target_batch(model, prompts, target_positions)
    parts = []
    for changes in _target(model, batch, perturbations, _target_layer(model, perturbations, target_layer)):
        n = len(changes)
        mask = batch.target_mask.expand(n, -1, -1).flatten(0, 1)
        parts.append(change_objective(changes.flatten(0, 1), mask, p, q, token_norm).view(n, -1).sum(1))
    return torch.cat(parts).cpu()


def _target(model: Any, batch: PromptBatch, perturbations: Any, layer: int) -> Iterator[Float[Tensor, "vector prompt pos d_model"]]:
    """Changes of the stream that enters a layer, some perturbations at a time."""
    perturbations = perturbations.on(model)
    with hooks.frozen(model), torch.no_grad():
        (clean,) = _streams(model, batch.tokens, None, [layer])
        for part in _parts(perturbations):
            changes = [_streams(model, row.expand(len(part), -1), part, [layer])[0] - was for row, was in zip(batch.tokens, clean, strict=True)]
            yield torch.stack(changes, dim=1)


def _streams(model: Any, tokens: Tensor, perturbations: Any, layers: Sequence[int]) -> list[Float[Tensor, "row pos d_model"]]:
    """Float32 streams that enter the layers, one forward pass."""
    seen: dict[int, Tensor] = {}
    readers = [
        (f"blocks.{layer - 1}.hook_resid_post", lambda stream, hook, layer=layer: seen.update({layer: stream.float()})) for layer in set(layers)
    ]
    with hooks.attached(model, [*([] if perturbations is None else perturbations.hooks()), *readers]):
        hooks.forward(model, tokens)
    return [seen[layer] for layer in layers]


def _parts(perturbations: Any) -> Iterator[Any]:
    """The perturbations, as many at a time as make one batch."""
    for first in range(0, len(perturbations), ROWS_AT_ONCE):
        yield perturbations[list(range(first, min(first + ROWS_AT_ONCE, len(perturbations))))]


def _target_batch(model: Any, prompts: Prompts, positions: Positions) -> PromptBatch:
    hooks.check_model(model)
    return tokenize(model, prompts, positions)


def _target_layer(model: Any, perturbations: Any, layer: int | None) -> int:
    n_layers = len(model.blocks)
    learned_for = getattr(perturbations, "provenance", {}).get("target_layer")
    chosen = learned_for or n_layers if layer is None else layer
    if not 1 <= chosen <= n_layers:
        raise ValueError(f"target_layer={chosen} must lie from 1 to n_layers = {n_layers}: it is the stream that enters that block.")
    return chosen


def one_prompt(batch: PromptBatch) -> None:
    """Refuses several prompts."""
    if len(batch) != 1:
        raise ValueError(f"{len(batch)} prompts were given, this looks at the tokens of one: call it for each.")


def texts(model: Any, ids: list[int]) -> list[str]:
    """Each token by itself, as text."""
    return [model.tokenizer.decode([i]) if model.tokenizer is not None else str(i) for i in ids]
