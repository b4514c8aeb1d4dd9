"""How does a direction begin, and where does it act?  The first tokens that it promotes, and its change at each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from melbo_lens.measures.changes import activation_changes
from melbo_lens.measures.output import run_to_the_end
from melbo_lens.models import hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Prompts, one_prompt, tokenize
from melbo_lens.texts import token_texts

N_TOKENS = 5


@dataclass(frozen=True)
class Look:
    """What one direction does on one prompt.

    Attributes:
        promoted: the tokens whose probability as the first new token it raises most, with the probability without and
            with it.
        tokens: the text of each token of the prompt.
        change: at each token, the norm of the change of the stream as a share of the clean stream's norm there.
        layer: the change is that of the stream that enters this layer.
    """

    promoted: tuple[tuple[str, float, float], ...]
    tokens: tuple[str, ...]
    change: tuple[float, ...]
    layer: int

    def as_json(self) -> dict[str, Any]:
        """Describes the look in JSON's types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def of_json(cls, said: Mapping[str, Any]) -> "Look":
        """Makes what `as_json` described."""
        promoted = tuple((str(token), float(before), float(after)) for token, before, after in said["promoted"])
        return cls(promoted, tuple(said["tokens"]), tuple(map(float, said["change"])), int(said["layer"]))


def look(model: Model, prompt: Prompts, direction: Perturbation, layer: int | None = None) -> Look:
    """Takes a look at one direction.

    Args:
        model: the model, which is left as it was.
        prompt: one prompt.
        direction: one vector or adapter, with its sign.
        layer: where the change is measured; None means the stream that leaves the last block.

    Raises:
        FloatingPointError: the logits or the stream hold NaN or infinity.
    """
    host = host_of(model)
    batch = tokenize(host, prompt)
    one_prompt(batch)
    where = host.n_layers if layer is None else layer
    changes = activation_changes(host, batch.tokens, direction, [where])
    with hooks.frozen(host), torch.no_grad():
        before, after = (
            run_to_the_end(host, batch.tokens, batch.lengths, steering)[0][0].softmax(-1).cpu()
            for steering in ([], direction.on(host).hooks())
        )
    hooks.check_finite(host, after[None], ["the direction"], "the next-token distribution")
    best = (after - before).topk(min(N_TOKENS, len(after))).indices.tolist()
    texts = token_texts(host, best)
    promoted = [
        (text, float(before[i]), float(after[i])) for text, i in zip(texts, best, strict=True) if after[i] > before[i]
    ]
    return Look(tuple(promoted), changes.tokens, tuple(changes.relative[0, 0].tolist()), where)
