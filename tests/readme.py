"""Where do the README's outputs and numbers come from?  `python -m tests.readme` runs its blocks and fills them in."""

import contextlib
import io
import json
import re
from pathlib import Path

from melbo_lens.organisms.reproduction import table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "tests" / "benchmarks" / "results.json"
BLOCK = re.compile(r"```python\n(.*?)```\n\n<!-- output -->\n```text\n(.*?)```", re.DOTALL)
REPRODUCTION = ROOT / "tests" / "benchmarks" / "reproduction.json"
REPRODUCED = re.compile(r"<!-- reproduction -->\n(?:.*?)(?=\n`melbo-lens reproduce`)", re.DOTALL)
BENCHMARK = re.compile(r"<!-- benchmark -->\n(?:.*?)(?=\n`make bench`)", re.DOTALL)


def run(code: str) -> str:
    """What a block prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines()) + "\n"


def benchmark() -> str:
    """The table of measured speeds."""
    results = json.loads(RESULTS.read_text())
    step, power, memory = results["step"], results["power"], results["memory"]
    rows = [
        ("one vector and step (24 layers, d_model 512, layers 7 to 16, 32 tokens)", f"{step['factor']:.1f} times faster", ""),
        ("— of it from blocks that are not run", f"{step['factor_skipped_blocks']:.1f}", ""),
        ("— of it from 32 vectors as batch rows", f"{step['factor_batching']:.1f}", ""),
    ]
    for name, label in (("default", "`power`"), ("restarts", "`power`, `restarts=8`")):
        speed, objective = (f"{name}_{what}" for what in ("speedup", "objective"))
        rows.append(
            (
                f"{label} against 300 AdamW steps, 8 orthogonal vectors, median of 8 cases",
                f"{power[speed + '_median']:.0f} times faster at {power[objective + '_median']:.3f} of the objective",
                f"{power[speed + '_worst']:.0f} times, {power[objective + '_worst']:.3f}",
            )
        )
    rows.append(
        ("64 completions (32 vectors, both signs) at once, against one vector at a time", f"{results['generation']['factor']:.0f} times faster", "")
    )
    many = results["adapters"]
    peak, before = (many[name] / 2**20 for name in ("peak_rss_kib", "rss_before_kib"))
    label = f"one adapter and step of the published recipe ({many['n_adapters']} of rank {many['rank']}, the same model)"
    rows.append((label, f"{many['factor']:.1f} times faster; {peak:.1f} GiB at its peak, {before:.1f} before the fit", ""))
    ascent = results["adapter_power"]
    rows.append(
        (
            "adapters: `power` against 400 AdamW steps, 8 adapters of rank 16, median of 4 cases",
            f"{ascent['speedup_median']:.1f} times faster at {ascent['objective_median']:.3f} of the objective",
            f"{ascent['speedup_min']:.1f} times, {ascent['objective_min']:.3f}",
        )
    )
    found = results["diversity"]
    rows.append(
        (
            f"planted behaviours (of 4) that 8 adapters find with `diversity={found['diversity']}`, median of {len(found['seeds'])} seeds",
            f"{found['median_with']} against {found['median_without']} without it, at {found['objective_kept']:.3f} of the objective",
            f"{min(found['found_with'])} against {min(found['found_without'])}",
        )
    )
    rows.append(("bytes kept for the backward pass at half the `batch_size`", f"{memory['saved_ratio']:.2f} of them", ""))
    lines = [
        f"Against a textbook implementation of the post's equations ({results['machine']}):",
        "",
        "| what | measured | worst case |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def reproduction() -> str:
    """The table of the post's results."""
    results = json.loads(REPRODUCTION.read_text())
    rows = table(results)
    lines = [f"| {' | '.join(row)} |" for row in (rows.columns, ["---"] * len(rows.columns), *rows.itertuples(index=False))]
    return "\n".join(lines)


def filled(text: str) -> str:
    """The README with outputs and numbers of now."""
    text = BLOCK.sub(lambda found: found[0].replace(found[2], run(found[1])) if found[2] else found[0][:-3] + run(found[1]) + "```", text)
    text = BENCHMARK.sub(lambda _: "<!-- benchmark -->\n" + benchmark() + "\n", text)
    return REPRODUCED.sub(lambda _: "<!-- reproduction -->\n" + reproduction() + "\n", text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
