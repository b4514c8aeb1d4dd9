"""How much memory does it take, and how does the cost grow?  `make bench-memory` measures it on SmolLM2 and on shapes.

It prints the results, writes results-memory.json, and docs/memory.md with a figure.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, LlamaConfig

import melbo_lens as ml
from melbo_lens.methods.planning import in_words
from melbo_lens.methods.problem import vectors_on
from melbo_lens.models import blocks, hooks
from melbo_lens.models.access import host_of
from melbo_lens.models.tally import Tally, Unknown
from melbo_lens.organisms import base_model

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results-memory.json", HERE.parents[1] / "docs" / "memory.md"
FIGURE = PAGE.with_name("step-growth.svg")
SOURCE, TARGET, RADIUS = 7, 16, 6.0
# fits on SmolLM2 whose resident memory is measured, each in a process of its own: tokens, vectors
FITS = ((37, 32), (300, 32), (1000, 8), (2000, 16))
# settings of glibc under which freed memory goes back at once, so that what is resident is what is held
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
GROWTH = {
    "vectors": [(n, 37, 9) for n in (4, 8, 16, 32, 64)],
    "tokens": [(4, n, 9) for n in (32, 64, 128, 256, 512)],
    "blocks": [(16, 37, n) for n in (1, 2, 4, 8, 16)],
}
# shapes of well-known sizes: layers, d_model, d_mlp, heads, key-value heads, vocabulary
SHAPES = {
    "1.8B": (24, 2048, 5504, 16, 16, 151936),
    "3B": (36, 2048, 11008, 16, 2, 151936),
    "8B": (32, 4096, 14336, 32, 8, 128256),
    "14B": (48, 5120, 13824, 40, 8, 152064),
    "32B": (64, 5120, 27648, 40, 8, 152064),
    "70B": (80, 8192, 28672, 64, 8, 128256),
}
CARDS = {"RTX 4090": 24, "A100 40GB": 40, "H100": 80, "H200": 141}
N_TOKENS, N_VECTORS, N_NEW = 64, 64, 64


def resident(what: str) -> int:
    """A figure of this process, in bytes: "VmRSS" now or "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def tokens_of(n: int) -> torch.Tensor:
    return torch.randint(1000, 40000, (1, n), generator=torch.Generator().manual_seed(0))


def one_fit(n_tokens: int, n_vectors: int) -> dict[str, Any]:
    """Runs in a process of its own: the most memory of one step of a fit, and of writing after it."""
    model = ml.organisms.load("smollm2").model
    plan = ml.plan_memory(model, n_tokens, SOURCE, TARGET, n_vectors=n_vectors, max_new_tokens=8)
    sliced = ml.slice_model(model, tokens_of(n_tokens), SOURCE, TARGET)
    found: dict[str, Any] = {"tokens": n_tokens, "vectors": n_vectors, "recomputed": plan.recomputed}
    before = high_water()
    began = time.perf_counter()
    vectors = ml.fit_vectors(sliced, n_vectors=n_vectors, radius=RADIUS, n_steps=1, progress=False)
    found |= {"seconds": time.perf_counter() - began, "fit": resident("VmHWM") - before, "fit_planned": plan.fit}
    before = high_water()
    ml.generate(model, tokens_of(n_tokens), vectors, 8, include_random=False, include_unsteered=False, progress=False)
    return found | {"writing": resident("VmHWM") - before, "writing_planned": plan.writing}


def high_water() -> int:
    """Starts the measurement anew, and returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def step_seconds(model: Any, n_vectors: int, n_tokens: int, n_blocks: int) -> float:
    """Seconds of one evaluation of a fit: forwards and backwards for every vector."""
    sliced = ml.slice_model(model, tokens_of(n_tokens), 5, 6 + n_blocks)
    problem = vectors_on(sliced)
    rows = (torch.randn(1, n_vectors, sliced.d_model, generator=torch.Generator().manual_seed(1)),)
    times = []
    with hooks.frozen(sliced.host):
        for _ in range(3):
            began = time.perf_counter()
            problem(rows)
            times.append(time.perf_counter() - began)
    return min(times)


def shape(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model of that shape without numbers."""
    layers, d_model, d_mlp, heads, kv, d_vocab = SHAPES[name]
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=d_vocab,
        max_position_embeddings=8192,
    )
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # the tokenizer is never asked for anything
    return TransformerBridge.boot_transformers(
        str(base_model.directory()), hf_model=network, tokenizer=base_model.tokenizer(), dtype=dtype
    )


def counted_on_meta(model: Any, n_rows: int) -> int:
    """The most that one chunk of a fit with so many rows holds, counted tensor by tensor without numbers."""
    host = host_of(model)
    source, target = round(0.25 * host.n_layers), round(0.5 * host.n_layers)
    with hooks.frozen(host), Unknown():
        recording = blocks.record(host, torch.zeros(1, N_TOKENS, dtype=torch.long, device="meta"), source + 1, target)
        everyone = torch.zeros(n_rows, dtype=torch.long, device="meta")
        with Tally() as tally, torch.enable_grad():
            theta = torch.zeros(n_rows, host.d_model, device="meta").requires_grad_()
            stream = (recording.streams[0][everyone] + theta[:, None]).to(recording.streams[0].dtype)
            for call in recording.calls:
                stream = call(stream, everyone, 1)
            value = (stream.float() - recording.streams[-1].float()).square().sum()
            torch.autograd.grad(value, theta)
    return tally.peak


def main(parts: Sequence[str]) -> None:
    torch.set_num_threads(2)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results["machine"] = f"two CPU cores, torch {torch.__version__}"
    for part in parts or MEASURES:
        results[part] = MEASURES[part]()
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results))
    if "growth" in results:
        figure(results["growth"]).write_image(FIGURE)


def fits() -> list[dict[str, Any]]:
    """The memory of fits on SmolLM2, each in a process of its own."""
    found = []
    for n_tokens, n_vectors in tqdm(FITS, desc="memory of fits"):
        found.append(apart(n_tokens, n_vectors, GIVEN_BACK))
        if n_tokens <= 1000:  # minutes more for the longest
            found[-1]["fit_usual"] = apart(n_tokens, n_vectors, {})["fit"]
        print(found[-1], flush=True)
    return found


def apart(n_tokens: int, n_vectors: int, environment: dict[str, str]) -> dict[str, Any]:
    """One fit in a process of its own."""
    call = f"one_fit({n_tokens}, {n_vectors})"
    code = f"import json; from tests.benchmarks.memory import one_fit; print(json.dumps({call}))"
    asked = {"env": {**os.environ, **environment}, "capture_output": True, "text": True, "check": True}
    return json.loads(subprocess.run([sys.executable, "-c", code], **asked).stdout.splitlines()[-1])


def growth() -> dict[str, list[tuple[int, float]]]:
    """The seconds of a step against vectors, tokens and blocks, each varied alone."""
    model = ml.organisms.load("smollm2").model
    found = {}
    for name, sizes in GROWTH.items():
        place = {"vectors": 0, "tokens": 1, "blocks": 2}[name]
        found[name] = [(size[place], step_seconds(model, *size)) for size in tqdm(sizes, desc=name)]
        print(name, found[name], flush=True)
    return found


def shapes() -> dict[str, dict[str, int]]:
    """The memory of larger models, as predicted and as counted without numbers."""
    found = {}
    for name in tqdm(SHAPES, desc="shapes"):
        model = shape(name)
        n_layers = model.cfg.n_layers
        plan = ml.plan_memory(
            model, N_TOKENS, round(0.25 * n_layers), round(0.5 * n_layers), n_vectors=N_VECTORS, max_new_tokens=N_NEW
        )
        found[name] = {
            "weights": plan.weights,
            "slice_weights": plan.slice_weights,
            "fit": plan.fit,
            "fit_rows": plan.fit_rows,
            "fit_counted": counted_on_meta(model, plan.fit_rows),
            "writing": plan.writing,
            "peak": plan.peak,
        }
        print(name, found[name], flush=True)
    return found


MEASURES = {"shapes": shapes, "fits": fits, "growth": growth}


def figure(growth: dict[str, list[tuple[int, float]]]) -> go.Figure:
    """The time of a step against each size, on axes where proportional growth is the dashed line."""
    panels = make_subplots(1, len(growth), shared_yaxes=True, subplot_titles=list(growth))
    for column, rows in enumerate(growth.values(), 1):
        sizes, seconds = zip(*rows, strict=True)
        proportional = [seconds[-1] * size / sizes[-1] for size in sizes]
        panels.add_scatter(x=sizes, y=seconds, mode="lines+markers", line_color="#4c72b0", row=1, col=column)
        panels.add_scatter(
            x=sizes, y=proportional, mode="lines", line={"color": "grey", "dash": "dash"}, row=1, col=column
        )
        panels.update_xaxes(type="log", tickvals=sizes, row=1, col=column)
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    panels.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    panels.update_yaxes(title="seconds of a step", row=1, col=1)
    return panels.update_layout(
        template="simple_white", showlegend=False, width=900, height=280, margin={"t": 30, "r": 10, "b": 40, "l": 60}
    )


def page(results: dict[str, Any]) -> str:
    """The tables as a page of the documentation."""
    fits = []
    for row in results.get("fits", []):
        names = ("fit_planned", "fit", "fit_usual", "writing_planned", "writing")
        sizes = " | ".join(in_words(row[name]) if name in row else "not run" for name in names)
        fits.append(f"| {row['tokens']} | {row['vectors']} | {sizes} | {'yes' if row['recomputed'] else 'no'} |")
    sizes = []
    for name, row in results.get("shapes", {}).items():
        holds = [card for card, gib in CARDS.items() if row["peak"] < 0.92 * gib * 2**30]
        trimmed = [card for card, gib in CARDS.items() if row["slice_weights"] + row["fit"] < 0.92 * gib * 2**30]
        sizes.append(
            f"| {name} | {in_words(row['weights'])} | {in_words(row['fit'])} ({in_words(row['fit_counted'])}) "
            f"| {in_words(row['writing'])} | {(holds or ['several cards'])[0]} | {(trimmed or ['several cards'])[0]} |"
        )
    growth = [
        f"| {name} | " + " | ".join(f"{size}: {1000 * seconds:.0f} ms" for size, seconds in rows) + " |"
        for name, rows in results.get("growth", {}).items()
    ]
    sections = [
        """# How much memory, and how long

`ml.plan_memory(model, n_tokens, source_layer, target_layer)` says before a fit what it will hold. It runs one row of
tokens and counts what is kept. `discover` prints the plan before it begins. `make bench-memory` measures what stands
here."""
    ]
    if fits:
        sections.append(
            f"""## Predicted and measured

SmolLM2-135M in float32, layers 7 to 16. Measured is the growth of the process' resident memory, each fit in a process
of its own ({results["machine"]}), with an allocator that gives back at once what is freed; one that keeps it for later,
as Linux' does by default, ends higher. Where one row would keep more than 1 GiB, blocks are computed again in the
backward pass. Writing holds up to a sixth less than predicted, since rows of one prompt share the blocks before the
source; not every model can, so the prediction doesn't count on it.

| tokens | vectors | fit, predicted | measured | usual allocator | writing, predicted | measured | computed again |
|---|---|---|---|---|---|---|---|
"""
            + "\n".join(fits)
        )
    if sizes:
        sections.append(
            f"""## Which card holds what

Llama-like shapes in bfloat16, {N_VECTORS} vectors on a prompt of {N_TOKENS} tokens, from a quarter to half of the
depth, completions of {N_NEW} tokens under both signs. The second figure of a fit is counted tensor by tensor on the
meta device. A card counts as large enough if the whole stays below 92 % of its memory. With `trim=True` the blocks
outside the slice leave the card during the fit.

| model | weights | fit (counted) | writing | smallest card for all | for the fit with `trim=True` |
|---|---|---|---|---|---|
"""
            + "\n".join(sizes)
            + "\n\nModels that no card holds can lie on several: boot the bridge with `device_map` or `n_devices`."
        )
    if growth:
        sections.append(
            f"""## How the time of a step grows

One evaluation of all vectors, forwards and backwards, on SmolLM2 ({results["machine"]}). Each row varies one number;
the others are 37 tokens and 9 blocks, with 4 vectors where tokens vary and 16 where blocks do. The dashed lines in the
figure are proportional to the number varied.

![Seconds of a step against vectors, tokens and blocks, beside proportional growth]({FIGURE.name})

| varied | | | | | |
|---|---|---|---|---|---|
"""
            + "\n".join(growth)
        )
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
