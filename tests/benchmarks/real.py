"""How fast is it on a real chat model?  `make bench-real` compares it with the textbook, with batched-melbo and with
plain `transformers` on SmolLM2. It prints the results and writes results-real.json. Parts can be named: `python -m
tests.benchmarks.real step generation`.
"""

import contextlib
import importlib.util
import io
import json
import os
import platform
import statistics
import sys
import time
from itertools import product
from pathlib import Path

import torch
from tqdm.auto import tqdm

import melbo_lens as ml
from melbo_lens.methods.automatic import SHARE_OF_EDGE, edge
from melbo_lens.organisms import base_model
from tests.oracles.textbook import Textbook

RESULTS = Path(__file__).parent / "results-real.json"
THREADS, SOURCE, TARGET, LAST, N_VECTORS = 2, 7, 16, 3, 24
PAIRS = ((3, 10), (7, 16), (10, 22))
SHARES = (0.4, SHARE_OF_EDGE)  # of the edge of readability
CHAT = [{"role": "user", "content": "Why is the sky blue?"}]
OTHER_CHAT = [{"role": "user", "content": "How do I keep bread fresh?"}]
RADIUS = 6.0  # a twentieth of the stream's median norm


def seconds(function, *arguments, **settings):
    began = time.perf_counter()
    result = function(*arguments, **settings)
    return time.perf_counter() - began, result


def middle(repeats, function, *arguments, **settings):
    return statistics.median(seconds(function, *arguments, **settings)[0] for _ in range(repeats))


def rendered(tokenizer):
    return tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)


def batched_melbo(n_vectors, n_steps):
    """The installed peer's training; None where it is not installed."""
    if importlib.util.find_spec("batched_melbo") is None:
        return None
    from batched_melbo.batched_melbo import BatchedMELBO

    peer = BatchedMELBO(
        base_model.network(),
        base_model.tokenizer(),
        SOURCE,
        TARGET - 1,  # it reads behind the block of this number
        slice(-LAST, None),
        layers_name="model.layers",  # its own guess has one "model" too many for this architecture
        normalization=RADIUS,
        num_steps=n_steps,
        power=2,
        q=1,
    )
    peer.tokenizer.pad_token = peer.tokenizer.pad_token or peer.tokenizer.eos_token
    text = rendered(peer.tokenizer)
    with contextlib.redirect_stderr(io.StringIO()):
        return seconds(peer.train, [text], n_vectors, n_vectors)[0]


def matrix_products(layers, n_rows, backward=False, repeats=3):
    """Seconds of nothing but the products with these blocks' weights for so many rows, and with their transposes."""
    weights = [part.weight for layer in layers for part in layer.modules() if isinstance(part, torch.nn.Linear)]
    given = {size: torch.randn(n_rows, size) for weight in weights for size in weight.shape}

    def products():
        for weight in weights:
            torch.nn.functional.linear(given[weight.shape[1]], weight)
            if backward:
                given[weight.shape[0]] @ weight

    with torch.no_grad():
        return middle(repeats, products)


def step_cost(model, n_steps=10, repeats=3):
    """Seconds per vector and step of the published recipe: the textbook, the peer and the library, in turns.

    Beside them is what the matrix products alone take, which no implementation in the same precision can be below.
    """
    tokens = ml.slice_model(model, CHAT, SOURCE, TARGET).batch.rows()[0]
    ids = torch.tensor([tokens], dtype=torch.long)
    book = Textbook(model, [ids], SOURCE, TARGET, [list(range(len(tokens) - LAST, len(tokens)))])
    start = torch.randn(1, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    settings = {"n_vectors": N_VECTORS, "radius": RADIUS, "orthogonal": False, "optimizer": "adamw", "progress": False}
    times = {"textbook": [], "batched_melbo": [], "melbo_lens": [], "products": []}
    for _ in tqdm(range(repeats), desc="cost of a step"):
        times["textbook"].append(seconds(book.learn, start, RADIUS, 3, 1e-3)[0] / 3)
        peer = batched_melbo(N_VECTORS, 3)
        if peer is not None:
            times["batched_melbo"].append(peer / 3 / N_VECTORS)
        fit = seconds(
            ml.fit_vectors,
            model,
            CHAT,
            SOURCE,
            TARGET,
            target_positions=slice(-LAST, None),
            n_steps=n_steps,
            **settings,
        )[0]
        times["melbo_lens"].append(fit / n_steps / N_VECTORS)
    between = base_model.network().model.layers[SOURCE + 1 : TARGET]
    times["products"].append(matrix_products(between, N_VECTORS * len(tokens), backward=True) / N_VECTORS)
    found = {name: statistics.median(spent) for name, spent in times.items() if spent}
    return {"n_tokens": len(tokens), "n_vectors": N_VECTORS, "seconds": found} | {
        f"times_{name}": found[name] / found["melbo_lens"] for name in found if name != "melbo_lens"
    }


def ascents(model, n_vectors=8, n_steps=300):
    """`power` against 300 AdamW steps for 8 orthogonal vectors, at two shares of the edge, of which "auto" takes one.

    AdamW runs on the library's slice with steps of a hundredth of the radius, since the published 1e-3 gets nowhere in
    so few steps; what the textbook would take is its time of one step times the steps. The tests show that both give
    the same vectors. The ascent was not developed on this prompt and seed.
    """
    rows = []
    for (source, target), share in tqdm(list(product(PAIRS, SHARES)), desc="power against AdamW"):
        sliced = ml.slice_model(model, OTHER_CHAT, source, target, slice(-LAST, None))
        radius = share * edge(sliced).radius
        settings = {"n_vectors": n_vectors, "radius": radius, "seed": 1, "progress": False}
        spent, vectors = seconds(ml.fit_vectors, sliced, **settings)
        slow, best = seconds(ml.fit_vectors, sliced, optimizer="adamw", n_steps=n_steps, lr=0.01 * radius, **settings)
        tokens = sliced.batch.rows()[0]
        places = list(range(len(tokens) - LAST, len(tokens)))
        book = Textbook(model, [torch.tensor([tokens], dtype=torch.long)], source, target, [places])
        start = torch.randn(1, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
        rows.append(
            {
                "source_layer": source,
                "target_layer": target,
                "share_of_edge": share,
                "radius": radius,
                "objective": float(vectors.history[-1].sum() / best.history[-1].sum()),
                "effect": statistics.median(vectors.provenance["effects"]),
                "effect_adamw": statistics.median(best.provenance["effects"]),
                "times_adamw_on_the_slice": slow / spent,
                "times_textbook": seconds(book.learn, start, radius, 3, 1e-3)[0] / 3 * n_steps * n_vectors / spent,
            }
        )
    found = {"cases": rows}
    for share in SHARES:
        some = [row for row in rows if row["share_of_edge"] == share]
        found[f"at {share} of the edge"] = {
            "objective_median": statistics.median(row["objective"] for row in some),
            "objective_worst": min(row["objective"] for row in some),
            "times_textbook_least": min(row["times_textbook"] for row in some),
        }
    return found


def plain_generate(vectors, n_tokens):
    """The same completions by plain `transformers` with one forward hook, as token ids."""
    network, tokenizer = base_model.network(), base_model.tokenizer()
    rows = torch.cat([vectors.values, -vectors.values])
    ids = tokenizer(rendered(tokenizer), return_tensors="pt", add_special_tokens=False)["input_ids"]

    def add(module, arguments, output):
        stream = output[0] if isinstance(output, tuple) else output
        changed = stream + rows[:, None]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = network.model.layers[vectors.source_layer].register_forward_hook(add)
    try:
        with torch.no_grad():
            spent, written = seconds(
                network.generate,
                ids.expand(len(rows), -1),
                attention_mask=torch.ones_like(ids).expand(len(rows), -1),
                max_new_tokens=n_tokens,
                do_sample=False,
            )
    finally:
        handle.remove()
    return spent, written[:, ids.shape[1] :].tolist()


def generation(model, repeats=3):
    """Seconds for 48 vectors with both signs, greedily, and the same by plain `transformers`.

    Beside them is what the matrix products alone take: the prompt in the blocks from the source on, then one token of
    each row at a time in all blocks and the unembedding.
    """
    directions = torch.randn(48, model.cfg.d_model, generator=torch.Generator().manual_seed(1))
    vectors = ml.SteeringVectors.from_tensor(directions, SOURCE).rescaled(RADIUS)
    network, prompt = base_model.network(), ml.slice_model(model, CHAT, SOURCE, TARGET).batch.rows()[0]
    n_rows = 2 * len(vectors)
    first = matrix_products(network.model.layers[SOURCE:], n_rows * len(prompt))
    step = matrix_products([*network.model.layers, network.get_output_embeddings()], n_rows)
    found = {}
    for n_tokens in (12, 24):
        ours, plain = [], []
        for _ in tqdm(range(repeats), desc=f"{n_tokens} tokens"):
            spent, mine = seconds(
                ml.generate,
                model,
                CHAT,
                vectors,
                n_tokens,
                include_unsteered=False,
                include_random=False,
                progress=False,
            )
            ours.append(spent)
            spent, theirs = plain_generate(vectors, n_tokens)
            plain.append(spent)
        table = mine.table.sort_values(["sign", "vector"], ascending=[False, True])
        equal = sum(list(row) == theirs[i][: len(row)] for i, row in enumerate(table.tokens))
        found[f"{n_tokens} tokens"] = {
            "seconds": statistics.median(ours),
            "seconds_transformers": statistics.median(plain),
            "seconds_products": first + (n_tokens - 1) * step,
            "times_transformers": statistics.median(plain) / statistics.median(ours),
            "equal_rows": equal,
            "rows": len(table),
        }
    return found


def from_a_prompt(model, n_vectors=100, n_tokens=24):
    """Seconds from a prompt to 100 vectors and their 200 completions, and what the peers would take.

    The peer's 300 steps are extrapolated from 3.
    """
    settings = {"n_vectors": n_vectors, "orthogonal": False, "radius": RADIUS, "progress": False}
    fit, vectors = seconds(ml.fit_vectors, model, CHAT, SOURCE, TARGET, target_positions=slice(-LAST, None), **settings)
    write = seconds(ml.generate, model, CHAT, vectors, n_tokens, include_random=False, progress=False)[0]
    found = {"seconds_fit": fit, "seconds_write": write}
    peer = batched_melbo(n_vectors, 3)
    if peer is not None:
        plain = plain_generate(vectors, n_tokens)[0]
        found |= {"seconds_peer_fit": 100 * peer, "seconds_transformers": plain}
        found["times_peers"] = (100 * peer + plain) / (fit + write)
    return found


def main(parts):
    """Measures the parts that are named, or all of them; what other parts found before stays."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", THREADS)))
    model = ml.organisms.load("smollm2").model
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results["machine"] = f"{platform.machine()}, {THREADS} threads, torch {torch.__version__}"  # each part says its own
    measures = {
        "step": lambda: step_cost(model),
        "generation": lambda: generation(model),
        "from a prompt": lambda: from_a_prompt(model),
        "power": lambda: ascents(model),
    }
    for name in parts or measures:
        began = time.monotonic()
        found = measures[name]()
        results[name] = found | {
            "threads": torch.get_num_threads(),
            "seconds_measured": round(time.monotonic() - began),
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(results[name], indent=1), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
