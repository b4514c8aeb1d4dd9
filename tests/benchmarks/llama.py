"""Does llama.cpp, under an exported control vector or LoRA, compute what the steered model computes?  On SmolLM2.

`make bench-llama` builds llama.cpp and prints the figures.

Each perturbation is learned on SmolLM2, exported, and loaded by llama.cpp beside the model's own GGUF file. The
*change* of the logits (steered minus unsteered) after the last token of each prompt is compared, so that what both
models have in common says nothing. llama.cpp runs the file twice: as it is, with 4-bit weights and activations that it
rounds to 8 bits, and with the same weights in float32, where no rounding hides a mistake of the format.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import melbo_lens as ml
from melbo_lens.models.access import host_of
from melbo_lens.organisms import real
from melbo_lens.prompts import tokenize
from tests.llama_cpp import LlamaCpp, dequantised, smollm2_file

N_PROMPTS, N_NEW = 10, 16


class Outcome(NamedTuple):
    """What a model does on some prompts.

    Attributes:
        logits: after the last token of each prompt, [prompt vocab].
        texts: the greedy tokens that follow each prompt.
    """

    logits: Tensor
    texts: list[list[int]]


class Agreement(NamedTuple):
    """How near llama.cpp is to the steered model.

    Attributes:
        cosines: for each prompt, the cosine between the changes of the logits.
        ratios: for each prompt, the norm of llama.cpp's change over that of ours.
        apart: the norm of the difference between the steered logits, over all prompts.
        equal: how many greedy continuations are equal, token by token.
        changed: how many of ours differ from the unsteered ones.
    """

    cosines: Tensor
    ratios: Tensor
    apart: float
    equal: int
    changed: int


def learned(model: Any, chat: Any) -> dict[str, Any]:
    """Name -> what is exported: vectors of layer 7, and of 7 and 10, and adapters of both kinds of weights."""
    common = {"target_positions": slice(-3, None), "progress": False}
    early, late = (
        ml.fit_vectors(model, chat, layer, 16, n_vectors=2, radius=6.0, n_steps=8, **common) for layer in (7, 10)
    )
    mlp = ml.fit_adapters(model, chat, 7, 16, n_adapters=2, rank=8, optimizer="power", n_steps=8, scale=0.05, **common)
    attention = ml.fit_cpe(model, chat, [4, 5, 6, 7, 8], 16, n_factors=2, n_steps=4, **common)
    return {
        "a vector": early[0],
        "minus another": -early[1],
        "vectors of two layers": [early[1], 0.7 * late[0]],
        "an adapter of the MLP": mlp[0],
        "a factor of CPE": attention[0],
    }


def ours(model: Any, rows: Sequence[list[int]], perturbation: Any = ()) -> Outcome:
    """What the model does here under a perturbation, without a cache."""
    host = host_of(model)

    def logits(ids: Sequence[list[int]]) -> Tensor:
        # what stands after a row's last token changes nothing before it
        padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        return torch.stack([row[len(one) - 1] for row, one in zip(host.forward(padded), ids, strict=True)])

    with ml.steer(model, perturbation), torch.no_grad():
        first = following = logits(rows)
        texts = [list(row) for row in rows]
        for _ in range(N_NEW):
            texts = [[*text, int(row.argmax())] for text, row in zip(texts, following, strict=True)]
            following = logits(texts)
    end = host.tokenizer.eos_token_id
    new = [text[len(row) :] for text, row in zip(texts, rows, strict=True)]
    return Outcome(first, [text[: text.index(end)] if end in text else text for text in new])


def theirs(llama: LlamaCpp, rows: Sequence[list[int]], end: int) -> Outcome:
    """What llama.cpp does under what is applied to it."""
    return Outcome(torch.stack([llama.logits(ids) for ids in rows]), [llama.greedy(ids, N_NEW, end) for ids in rows])


def exported(perturbation: Any, path: Path, model: Any) -> Path:
    """Writes the file for llama.cpp; the kind of the perturbation decides on its format."""
    return ml.export(perturbation, "gguf-lora" if is_lora(perturbation) else "gguf", path, model=model)


def is_lora(perturbation: Any) -> bool:
    return isinstance(perturbation, ml.SteeringAdapters)


def agreement(here: Outcome, there: Outcome, here_before: Outcome, there_before: Outcome) -> Agreement:
    """Compares what a perturbation changes here with what its file changes there."""
    mine, other = here.logits - here_before.logits, there.logits - there_before.logits
    return Agreement(
        torch.cosine_similarity(mine, other, dim=-1),
        other.norm(dim=-1) / mine.norm(dim=-1),
        float((here.logits - there.logits).norm()),
        sum(one == another for one, another in zip(here.texts, there.texts, strict=True)),
        sum(one != another for one, another in zip(here.texts, here_before.texts, strict=True)),
    )


def prompt_rows(organism: Any) -> list[list[int]]:
    """Chats on which nothing was learned, as tokens."""
    return tokenize(host_of(organism.model), organism.prompts["test"][:N_PROMPTS]).rows()


def main() -> None:
    organism = ml.organisms.load(real.BASE)
    model, rows, end = organism.model, prompt_rows(organism), organism.tokenizer.eos_token_id
    perturbations = learned(model, organism.prompts["clean"][0])
    here_before = ours(model, rows)
    here = {name: ours(model, rows, one) for name, one in perturbations.items()}
    with tempfile.TemporaryDirectory() as folder:
        exact = dequantised(smollm2_file(), Path(folder) / "float32.gguf")
        paths = {
            name: exported(one, Path(folder) / f"{i}", model) for i, (name, one) in enumerate(perturbations.items())
        }
        for said, file in (("4-bit weights, as the file has them", smollm2_file()), ("float32 weights", exact)):
            llama = LlamaCpp(file)
            there_before = theirs(llama, rows, end)
            unchanged = agreement(here_before, there_before, here_before, there_before)
            print(
                f"llama.cpp with {said}: unsteered, the logits are {unchanged.apart:.2g} apart (norm over all "
                f"prompts), {unchanged.equal} of {len(rows)} texts are equal",
                flush=True,
            )
            for name, one in perturbations.items():
                with llama.under(paths[name], is_lora(one)):
                    found = agreement(here[name], theirs(llama, rows, end), here_before, there_before)
                said = f"  {name}: cosine of the change of logits {found.cosines.median():.4f} (least "
                said += f"{found.cosines.min():.4f}), its norm {found.ratios.min():.3f} to {found.ratios.max():.3f} of "
                said += f"ours; {found.apart:.2g} apart; {found.equal} of {len(rows)} texts equal, "
                said += f"{found.changed} of ours changed"
                if not is_lora(one):
                    with llama.under(paths[name], shift=1):
                        late = agreement(here[name], theirs(llama, rows, end), here_before, there_before)
                    said += f"; one layer too late {late.cosines.median():.4f}, {late.equal} texts equal"
                print(said, flush=True)


if __name__ == "__main__":
    main()
