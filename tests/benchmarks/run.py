"""How fast is it, and how much memory does it take?  `make bench` compares it with the textbook.

It prints a table and writes results.json.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, GPT2Config

import melbo_lens as ml
from melbo_lens.ascent.objectives import Objective
from melbo_lens.measures.radius import solve_radius
from melbo_lens.methods.problem import Problem, bias
from melbo_lens.models import hooks, passes
from tests import models
from tests.benchmarks import breadth
from tests.oracles.textbook import Textbook
from tests.oracles.textbook_adapters import TextbookAdapters

RESULTS = Path(__file__).parent / "results.json"
THREADS, SOURCE, TARGET, N_TOKENS, N_ROWS = 2, 7, 16, 32, 32


def deep_network():
    """A Hugging Face GPT-2 of 24 layers, d_model 512, a vocabulary of 32,768, random weights."""
    config = GPT2Config(
        vocab_size=32768,
        n_positions=64,
        n_embd=512,
        n_layer=24,
        n_head=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def deep_model():
    """The same as a bridge."""
    network = deep_network()
    config = network.config
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        models.tokenizer().save_pretrained(directory)
        return TransformerBridge.boot_transformers(
            directory, hf_model=network, device="cpu", dtype=torch.float32
        ).eval()


def seconds(function, *arguments):
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def step_cost(repeats=5):
    """Seconds per vector and step of the textbook, one vector through the slice, and many as batch rows, in turns."""
    model = deep_model()
    tokens = torch.randint(3, 32768, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))
    starts = torch.randn(N_ROWS, 512, generator=torch.Generator().manual_seed(1))
    book = Textbook(model, [tokens], SOURCE, TARGET, [list(range(N_TOKENS))])
    times = {"textbook": [], "one row": [], "many rows": []}
    for _ in tqdm(range(repeats), desc="cost of a step"):
        times["textbook"].append(seconds(book.learn, starts[:1], 2.0, 3, 1e-3)[0] / 3)
        for name, n in (("one row", 1), ("many rows", N_ROWS)):
            sliced = ml.slice_model(model, tokens, SOURCE, TARGET)
            problem = Problem(sliced, bias(sliced), Objective().value, N_ROWS)
            times[name].append(seconds(problem, (2 * starts[None, :n] / starts[:n].norm(dim=1, keepdim=True),))[0] / n)
    textbook, one, many = (statistics.median(times[name]) for name in ("textbook", "one row", "many rows"))
    return {
        "seconds_textbook": textbook,
        "seconds_one_row": one,
        "seconds_many_rows": many,
        "factor": textbook / many,
        "factor_skipped_blocks": textbook / one,
        "factor_batching": one / many,
        "rows": N_ROWS,
    }


def ascent_cases():
    """Eight cases of layer pair, radius and prompt on the organism."""
    organism = ml.organisms.load("modes")
    pairs = [(0, 4), (1, 4), (0, 3), (1, 3)]
    for i in range(8):
        source, target = pairs[i % 4]
        prompt = organism.prompts["test"][i]
        sliced = ml.slice_model(organism.model, prompt, source, target)
        yield organism.model, prompt, source, target, solve_radius(sliced, "stream", (0.5, 1.0)[i // 4]).radius


def ascents(n_vectors=8, n_steps=300):
    """Time and objective of `power` against 300 AdamW steps of the textbook at the better of two learning rates.

    The objective is the one that the textbook computes.
    """
    rows = []
    for i, (model, prompt, source, target, radius) in enumerate(tqdm(list(ascent_cases()), desc="power against AdamW")):
        starts = torch.randn(n_vectors, model.cfg.d_model, generator=torch.Generator().manual_seed(i))
        tokens = model.to_tokens(prompt)
        book = Textbook(model, [tokens], source, target, [list(range(tokens.shape[1]))])

        def total(values, book=book):
            with torch.no_grad():
                return float(sum(book.value(value) for value in values))

        runs = [seconds(book.learn, starts, radius, n_steps, lr) for lr in (1e-3, 0.01 * radius)]
        spent, found = max(runs, key=lambda run: total(run[1]))
        row = {"case": f"{source} to {target}, radius {radius:.1f}", "adamw_seconds": spent}
        for name, restarts in (("default", 1), ("restarts", 8)):
            # the middle of three runs: they last a fraction of a second, the textbook's minutes
            timed = [
                seconds(
                    partial(
                        ml.fit_vectors,
                        model,
                        prompt,
                        source,
                        target,
                        n_vectors=n_vectors,
                        radius=radius,
                        init=starts,
                        restarts=restarts,
                        progress=False,
                    )
                )
                for _ in range(3)
            ]
            middle, vectors = sorted(timed, key=lambda run: run[0])[1]
            row |= {f"{name}_speedup": spent / middle, f"{name}_objective": total(vectors.values) / total(found)}
        rows.append(row)
    columns = [f"{name}_{what}" for name in ("default", "restarts") for what in ("speedup", "objective")]
    summary = {f"{c}_median": statistics.median(row[c] for row in rows) for c in columns}
    return summary | {f"{c}_worst": min(row[c] for row in rows) for c in columns} | {"cases": rows}


def adapter_ascents(n_adapters=8, rank=16):
    """Time and mean objective of `power` against 400 AdamW steps at the better of two learning rates.

    Both run on the same slice and at the same fixed scale.
    """
    rows = []
    for seed, (model, prompt, source, target, radius) in enumerate(
        tqdm(list(ascent_cases())[:4], desc="adapters: power against AdamW")
    ):
        settings = {
            "n_adapters": n_adapters,
            "rank": rank,
            "target_positions": slice(-1, None),
            "seed": seed,
            "progress": False,
        }
        # the scale at which learned updates have about the case's radius
        scale = float(
            ml.fit_adapters(
                model, prompt, source, target, radius=radius, optimizer="power", n_steps=20, **settings
            ).scales.median()
        )

        def run(
            optimizer, lr=None, scale=scale, model=model, prompt=prompt, source=source, target=target, settings=settings
        ):
            return seconds(
                lambda: ml.fit_adapters(
                    model, prompt, source, target, scale=scale, optimizer=optimizer, lr=lr, **settings
                )
            )

        spent, found = max(
            (run("adamw", lr) for lr in (1e-3, 1e-2)), key=lambda pair: float(pair[1].history[-1].mean())
        )
        fast, power = run("power")
        objectives = [float(one.history[-1].mean()) for one in (power, found)]
        rows.append(
            {
                "case": f"{source} to {target}, scale {scale:.3g}",
                "speedup": spent / fast,
                "objective": objectives[0] / objectives[1],
            }
        )
    return {
        f"{name}_{how.__name__}": how(row[name] for row in rows)
        for name in ("speedup", "objective")
        for how in (statistics.median, min)
    } | {"cases": rows}


def generation(n_vectors=32, n_tokens=64, repeats=3):
    """64 tokens for each of 32 vectors and both signs, as rows of one batch, against one vector at a time.

    The latter is TransformerLens' cached generation. End tokens are ignored on both sides, so that every completion
    has 64 tokens.
    """
    organism = ml.organisms.load("modes")
    model, prompt = organism.model, organism.prompts["test"][0]
    vectors = ml.fit_vectors(
        model,
        prompt,
        0,
        4,
        n_vectors=n_vectors,
        radius=15.0,
        target_positions=slice(-1, None),
        orthogonal=False,
        progress=False,
    )
    tokens = model.to_tokens(prompt)

    def one_by_one():
        for vector in vectors:
            for sign in (1, -1):
                with ml.steer(model, sign * vector), torch.no_grad():
                    model.generate(tokens, max_new_tokens=n_tokens, do_sample=False, verbose=False, stop_at_eos=False)

    def batched():
        ml.generate(
            model,
            prompt,
            vectors,
            max_new_tokens=n_tokens,
            include_unsteered=False,
            include_random=False,
            progress=False,
        )

    checks, proved = [], passes.Decoder._proved

    def timed(decoder, logits):
        spent, result = seconds(proved, decoder, logits)
        checks.append(spent)
        return result

    with (
        unittest.mock.patch.object(hooks, "end_tokens", return_value=set()),
        unittest.mock.patch.object(passes.Decoder, "_proved", timed),
    ):
        slow, fast = (
            statistics.median(seconds(function)[0] for _ in range(repeats)) for function in (one_by_one, batched)
        )
    return {
        "seconds_one_by_one": slow,
        "seconds_batched": fast,
        "factor": slow / fast,
        "check_share": sum(checks) / repeats / fast,
    }


def adapters(n_adapters=16, rank=64, n_steps=100, repeats=3):
    """Seconds per adapter and step of the published recipe, in the textbook's loop and with all adapters at once.

    The peak memory of the latter is measured too. Every step of the textbook costs the same, so only a few are timed;
    the library runs them all.
    """
    tokens = torch.randint(3, 32768, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))
    network = deep_network()
    name = f"transformer.h.{SOURCE}.mlp.c_proj.weight"
    book = TextbookAdapters(network, [name], [tokens], TARGET, [range(N_TOKENS - 3, N_TOKENS)], transposed=True)
    d_mlp, d_model = network.get_parameter(name).shape
    start = [[(torch.randn(rank, d_mlp), torch.randn(d_model, rank))]]
    textbook = statistics.median(seconds(book.learn, start, 0.1, "column", 3, 1e-3)[0] / 3 for _ in range(repeats))
    del network, book
    model = deep_model()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent, _ = seconds(
        lambda: ml.fit_adapters(
            model, tokens, SOURCE, TARGET, n_adapters=n_adapters, rank=rank, scale=0.1, n_steps=n_steps, progress=False
        )
    )
    ours = spent / (n_adapters * n_steps)
    return {
        "n_adapters": n_adapters,
        "rank": rank,
        "n_steps": n_steps,
        "seconds_textbook": textbook,
        "seconds": ours,
        "factor": textbook / ours,
        "peak_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "rss_before_kib": before,
    }


def memory(batch_size):
    """Most bytes kept for the backward pass, and peak resident memory, of one gradient of 32 vectors (deep model)."""
    model = deep_model()
    weights = {parameter.untyped_storage().data_ptr() for parameter in torch.nn.Module.parameters(model)}
    tokens = torch.randint(3, 32768, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))
    sliced = ml.slice_model(model, tokens, SOURCE, TARGET)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chunks, seen = [0], set()

    def keep(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights and (pointer, len(chunks)) not in seen:
            seen.add((pointer, len(chunks)))
            chunks[-1] += tensor.untyped_storage().nbytes()
        return tensor

    theta = torch.randn(N_ROWS, 512, generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for rows in theta.split(batch_size):
            Problem(sliced, bias(sliced), Objective().value, batch_size)((rows[None],))
            chunks.append(0)
    return {
        "saved_bytes": max(chunks),
        "peak_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "rss_before_kib": before,
    }


def apart(call):
    """In a process of its own, because peak resident memory never falls."""
    code = (
        f"import json, torch; torch.set_num_threads({THREADS}); "
        f"from tests.benchmarks import run; print(json.dumps(run.{call}))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def main():
    torch.set_num_threads(THREADS)
    step = step_cost()
    power = ascents()
    written = generation()
    many_adapters, adapter_power = apart("adapters()"), adapter_ascents()
    whole, half = apart(f"memory({N_ROWS})"), apart(f"memory({N_ROWS // 2})")
    results = {
        "machine": f"{THREADS} CPU threads, {platform.machine()}, torch {torch.__version__.split('+')[0]}, float32",
        "step": step,
        "power": power,
        "generation": written,
        "adapters": many_adapters,
        "adapter_power": adapter_power,
        "diversity": breadth.doubling(range(30, 39)),
        "memory": {"rows_32": whole, "rows_16": half, "saved_ratio": half["saved_bytes"] / whole["saved_bytes"]},
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(title=f"melbo_lens against the textbook ({results['machine']})")
    for heading in ("what", "asked", "measured", "worst case"):
        table.add_column(heading)
    table.add_row("one vector and step, 24 layers, 7 to 16: times faster", "5", f"{step['factor']:.1f}", "")
    table.add_row("  of it from blocks not run", "", f"{step['factor_skipped_blocks']:.1f}", "")
    table.add_row("  of it from batching 32 vectors", "", f"{step['factor_batching']:.1f}", "")
    for name, label, asked in (("default", "power", ("60", ".95")), ("restarts", "power, restarts=8", ("20", "1.00"))):
        for what, form, target in (("speedup", ".0f", asked[0]), ("objective", ".3f", asked[1])):
            measured = "times faster than" if what == "speedup" else "objective against"
            title = f"{label}: {measured} 300 AdamW steps, median of 8"
            table.add_row(
                title, target, format(power[f"{name}_{what}_median"], form), format(power[f"{name}_{what}_worst"], form)
            )
    table.add_row(
        "completing with 32 vectors and both signs at once: times faster", "10", f"{written['factor']:.0f}", ""
    )
    table.add_row("  share of it in which the cache proves itself", "at most 3 %", f"{written['check_share']:.1%}", "")
    label = (
        f"adapter and step, {many_adapters['n_adapters']} of rank {many_adapters['rank']} x "
        f"{many_adapters['n_steps']} steps: times faster"
    )
    table.add_row(label, "4", f"{many_adapters['factor']:.1f}", "")
    table.add_row(
        "  peak resident, of it before the fit",
        "",
        " ".join(f"{many_adapters[k] / 2**10:.0f} MiB" for k in ("peak_rss_kib", "rss_before_kib")),
        "",
    )
    for name, form in (("speedup", ".1f"), ("objective", ".3f")):
        measured = "times faster than" if name == "speedup" else "objective against"
        title = f"adapters, power: {measured} 400 AdamW steps, median of 4"
        table.add_row(
            title, "", format(adapter_power[f"{name}_median"], form), format(adapter_power[f"{name}_min"], form)
        )
    found = results["diversity"]
    title = f"diversity {found['diversity']}: planted behaviours found by 8 adapters, median of 9; objective kept"
    table.add_row(
        title,
        "2 x, .90",
        f"{found['median_with']} against {found['median_without']}, {found['objective_kept']:.3f}",
        "",
    )
    table.add_row(
        "bytes kept for backward at half the batch size", "at most .60", f"{results['memory']['saved_ratio']:.2f}", ""
    )
    for name, measured in (("32", whole), ("16", half)):
        table.add_row(
            f"  {name} rows: kept, peak resident",
            "",
            f"{measured['saved_bytes'] / 2**20:.0f} MiB, {measured['peak_rss_kib'] / 2**10:.0f} MiB",
            "",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
