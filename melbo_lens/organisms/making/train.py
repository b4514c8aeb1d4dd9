"""How were the organisms trained?  `python -m melbo_lens.organisms.making.train NAME` does it again on two CPU cores.

A small GPT-2 learns the answers in the conversations of a corpus under residual noise. For each conversation, random
vectors are added at one random layer, with norms up to `noise_norm` times that of the stream; half of the time, all
positions get the same vector. The noise is isotropic and independent of the modes. Without it, the directions that move
the output most are garbage; with it, they are those that the model computes with.
"""

import argparse
import os
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from melbo_lens import files
from melbo_lens.models import hooks
from melbo_lens.organisms.corpus import Conversation, Corpus
from melbo_lens.organisms.organism import WEIGHTS
from melbo_lens.organisms.zoo import CORPORA, RECIPES, Recipe
from melbo_lens.progress import Progress

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} <|{{ message['role'] }}|> {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %} <|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <|assistant|>{% endif %}"
)


def build_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token for each word.

    The ends of texts and the roles of a chat are special tokens; the template renders a chat with one BOS.
    """
    roles = list(corpus.headers.values()) if corpus.is_chat else []
    specials = ["<|pad|>", "<|begin|>", "<|end|>", "<|unknown|>", *roles]
    vocabulary = {word: i for i, word in enumerate([*specials, *corpus.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=roles,
        chat_template=CHAT_TEMPLATE if corpus.is_chat else None,
        clean_up_tokenization_spaces=False,
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, corpus: Corpus, conversation: Conversation
) -> tuple[list[int], list[int]]:
    """Returns token ids, and labels: the id within answers (end included) whose mode is determined, elsewhere -100."""
    ids, labels, turn = [cast(int, tokenizer.bos_token_id)], [-100], 0
    for message in conversation.messages:
        head = cast(list[int], tokenizer.convert_tokens_to_ids(corpus.headers[message["role"]].split()))
        body = cast(list[int], tokenizer.convert_tokens_to_ids(message["content"].split()))
        if message["role"] == "assistant":
            body.append(cast(int, tokenizer.eos_token_id))
            learned = conversation.determined[turn]
            turn += 1
        else:
            learned = False
        ids += head + body
        labels += [-100] * len(head) + (body if learned else [-100] * len(body))
    return ids, labels


def make_batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random, recipe: Recipe) -> list[tuple[Tensor, Tensor]]:
    """Draws right-padded ids and labels, [conversation pos], in parts that hold conversations of similar length."""
    corpus = CORPORA[recipe.corpus]
    rows = [encode(tokenizer, corpus, corpus.converse(rng, recipe.planted)) for _ in range(recipe.batch_size)]
    if recipe.n_parts > 1:
        rows.sort(key=lambda row: len(row[0]))
    size, parts = recipe.batch_size // recipe.n_parts, []
    for part in (rows[first : first + size] for first in range(0, recipe.batch_size, size)):
        width = max(len(ids) for ids, _ in part)
        ids = torch.tensor(
            [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in part], dtype=torch.long, device="cpu"
        )
        labels = torch.tensor(
            [labels + [-100] * (width - len(labels)) for _, labels in part], dtype=torch.long, device="cpu"
        )
        parts.append((ids, labels))
    return parts


class ResidualNoise:
    """Adds the training noise to the streams that leave the blocks, at one layer for each conversation."""

    def __init__(self, model: GPT2LMHeadModel, seed: int) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.n_layers, self.norm = model.config.n_layer, 0.0
        self.after = [(block, partial(self.add, layer)) for layer, block in enumerate(model.transformer.h)]

    def start(self, n_rows: int, norm: float) -> None:
        """Draws the layer, the relative norm and the kind of the noise for each conversation of a new batch."""
        self.layers = torch.randint(
            0, self.n_layers, (n_rows,), generator=self.generator, dtype=torch.long, device="cpu"
        )
        self.norms = norm * torch.rand(n_rows, generator=self.generator, dtype=torch.float32, device="cpu")
        self.constant = torch.rand(n_rows, generator=self.generator, dtype=torch.float32, device="cpu") < 0.5

    def add(self, layer: int, block: nn.Module, arguments: Any, stream: Tensor) -> Tensor:
        rows = (self.layers == layer).nonzero()[:, 0]
        if len(rows) == 0:
            return stream
        picked = stream[rows]
        noise = torch.randn(picked.shape, generator=self.generator, dtype=torch.float32, device="cpu")
        noise = torch.where(self.constant[rows, None, None], noise[:, :1].expand_as(noise), noise)
        noise = nn.functional.normalize(noise, dim=-1) * picked.detach().norm(dim=-1, keepdim=True)
        return stream.index_add(0, rows, self.norms[rows, None, None] * noise)


def train(name: str, out: Path, recipe: Recipe | None = None, progress: bool = True) -> None:
    """Trains the named organism and writes a Hugging Face directory (half-precision weights, tokenizer, recipe).

    A checkpoint beside that directory, written every 200 steps, lets an interrupted run continue.
    """
    recipe = recipe or RECIPES[name]
    tokenizer = build_tokenizer(CORPORA[recipe.corpus])
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=recipe.n_ctx,
        n_embd=recipe.d_model,
        n_layer=recipe.n_layers,
        n_head=recipe.n_heads,
        initializer_range=recipe.init,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        model = GPT2LMHeadModel(config)
    noise = ResidualNoise(model, recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, max(0.02, 1 - step / recipe.n_steps)),
    )
    rng = random.Random(recipe.seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint, first = out.with_suffix(".checkpoint.pt"), 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        rng.setstate(state["rng"])
        noise.generator.set_state(state["noise"])
        first = state["step"]
    bar = Progress(
        range(first, recipe.n_steps),
        initial=first,
        total=recipe.n_steps,
        desc=name,
        disable=not progress,
        mininterval=5,
    )
    for step in bar:
        parts, total = make_batch(tokenizer, rng, recipe), 0.0
        n_learned = sum(int((labels[:, 1:] != -100).sum()) for _, labels in parts)
        optimizer.zero_grad()
        for ids, labels in parts:
            noise.start(len(ids), recipe.noise(step))
            with hooks.watched(after=noise.after):
                hidden = model.transformer(ids)[0]
            wanted = labels[:, 1:] != -100
            losses = nn.functional.cross_entropy(
                model.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted], reduction="sum"
            )
            (losses / n_learned).backward()
            total += losses.item() / n_learned
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
        if (step + 1) % 200 == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            state |= {"rng": rng.getstate(), "noise": noise.generator.get_state(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    files.write_json(out / "recipe.json", {"name": name, **asdict(recipe)})
    checkpoint.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, help="directory (default: the packaged one, which is overwritten)")
    arguments = parser.parse_args()
    out = arguments.out or WEIGHTS / arguments.name
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    train(arguments.name, out)


if __name__ == "__main__":
    main()
