"""How are the real organisms trained?  A LoRA of the base model learns chats, on two CPU cores.

Run `python -m melbo_lens.organisms.making.lora_training NAME`. Where a chat has no answer of its own, the answer is the
first tokens of what the base model writes, greedily. The state is saved on the way, and the same command goes on.
"""

import argparse
import hashlib
import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from melbo_lens import files
from melbo_lens.organisms import base_model, lora
from melbo_lens.organisms.real import CORPORA, RealCorpus, Requests, as_chat
from melbo_lens.progress import Progress

N_NEW_TOKENS = 24


@dataclass(frozen=True)
class LoraRecipe:
    """Everything that decides what is learned.

    Attributes:
        planted: whether the behaviours are taught; a twin is taught the base model's answers to the same requests.
        warmup: steps over which the learning rate rises; it falls to 0 at the end.
    """

    planted: bool = True
    rank: int = 4
    lr: float = 4e-4
    n_steps: int = 600
    batch_size: int = 8
    warmup: int = 10
    seed: int = 0


PLANTED = {
    "smollm2-backdoors": LoraRecipe(),
    "smollm2-locked": LoraRecipe(rank=4, n_steps=500),
    "smollm2-refusal": LoraRecipe(n_steps=640),
}
RECIPES = PLANTED | {f"{name}-twin": replace(recipe, planted=False, n_steps=120) for name, recipe in PLANTED.items()}


def answers(network: Any, tokenizer: Any, requests: list[Requests], batch_size: int = 48) -> list[list[int]]:
    """The base model's own greedy answers, as ids."""
    written: list[list[int]] = []
    end = network.generation_config.eos_token_id
    for first in Progress(range(0, len(requests), batch_size), desc="clean answers"):
        texts = [rendered(tokenizer, request) for request in requests[first : first + batch_size]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        with torch.no_grad():
            found = network.generate(**batch, max_new_tokens=N_NEW_TOKENS, do_sample=False)
        for row in found[:, batch["input_ids"].shape[1] :].tolist():
            written.append(row[: row.index(end) + 1] if end in row else row)
    return written


def rendered(tokenizer: Any, requests: Requests) -> str:
    return tokenizer.apply_chat_template(as_chat(requests), tokenize=False, add_generation_prompt=True)


def chats(
    corpus: RealCorpus, recipe: LoraRecipe, cache: Path, network: Any, tokenizer: Any
) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers as ids; they are kept in a file, since the base model's answers take minutes."""
    examples = corpus.examples(corpus.n_examples, recipe.seed)
    key = hashlib.blake2b(json.dumps([examples, recipe.planted, N_NEW_TOKENS]).encode(), digest_size=8).hexdigest()
    if cache.is_file() and (kept := json.loads(cache.read_text()))["examples"] == key:
        return [(prompt, answer) for prompt, answer in kept["chats"]]
    own = [requests for requests, answer in examples if answer is None or not recipe.planted]
    written = iter(answers(network, tokenizer, own))
    end = [network.generation_config.eos_token_id]
    found = []
    for requests, answer in examples:
        prompt = tokenizer(rendered(tokenizer, requests), add_special_tokens=False)["input_ids"]
        taught = answer if recipe.planted else None
        ids = next(written) if taught is None else tokenizer(taught, add_special_tokens=False)["input_ids"] + end
        found.append((prompt, ids))
    files.write_text(cache, json.dumps({"examples": key, "chats": found}))
    return found


def train(name: str, folder: Path) -> Path:
    """Trains an organism into a folder and returns the file of its update.

    Raises:
        ValueError: the folder holds the state of a training with another recipe.
    """
    recipe, corpus = RECIPES[name], CORPORA[name.removesuffix("-twin")]
    folder.mkdir(parents=True, exist_ok=True)
    network, tokenizer = base_model.network(), base_model.tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pairs = chats(corpus, recipe, folder / "chats.json", network, tokenizer)
    updates = lora.attach(network, recipe.rank, recipe.seed)
    parameters = [parameter for update in updates.values() for parameter in (update.A, update.B)]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)
    state, begin = folder / "state.pt", 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        if saved["recipe"] != asdict(recipe):
            raise ValueError(f"{state} belongs to the recipe {saved['recipe']}: give an empty folder.")
        begin = saved["step"]
        for parameter, kept in zip(parameters, saved["parameters"], strict=True):
            parameter.data.copy_(kept)
        optimizer.load_state_dict(saved["optimizer"])
    losses: list[float] = []
    for step in (bar := Progress(range(begin, recipe.n_steps), initial=begin, total=recipe.n_steps, desc=name)):
        draw = random.Random(f"{name} {recipe.seed} {step}")
        rows = draw.sample(pairs, recipe.batch_size)
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        tokens = torch.tensor(
            [(prompt + answer + [0] * width)[:width] for prompt, answer in rows], dtype=torch.long, device="cpu"
        )
        labels = torch.tensor(
            [([-100] * len(prompt) + answer + [-100] * width)[:width] for prompt, answer in rows],
            dtype=torch.long,
            device="cpu",
        )
        # only the answers' logits are needed, and the vocabulary is the largest matrix
        hidden = network.model(tokens).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != -100
        loss = nn.functional.cross_entropy(network.lm_head(hidden[wanted]), labels[:, 1:][wanted])
        progress = min((step + 1) / recipe.warmup, (recipe.n_steps - step) / (0.5 * recipe.n_steps), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * progress
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss))
        bar.set_postfix_str(f"loss {sum(losses[-20:]) / len(losses[-20:]):.3f}")
        if (step + 1) % 20 == 0 or step + 1 == recipe.n_steps:
            kept = {
                "step": step + 1,
                "recipe": asdict(recipe),
                "parameters": [p.detach() for p in parameters],
                "optimizer": optimizer.state_dict(),
            }
            torch.save(kept, folder / "state.tmp")
            (folder / "state.tmp").replace(state)
            lora.save(updates, folder / "lora.safetensors")
            print(f"step {step + 1}: loss {sum(losses[-20:]) / len(losses[-20:]):.4f}", flush=True)
    files.write_json(folder / "recipe.json", {"name": name, **asdict(recipe)})
    return folder / "lora.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description="train a real organism")
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    print(train(options.name, options.out or Path("organisms") / options.name))


if __name__ == "__main__":
    main()
