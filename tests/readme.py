"""Where do the README's outputs and numbers come from?  `python -m tests.readme` runs its blocks and fills them in."""

import contextlib
import io
import json
import re
from pathlib import Path

from melbo_lens.studies.reproduction import table
from tests.benchmarks.discovery import summary

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "tests" / "benchmarks" / "results.json"
BLOCK = re.compile(r"```python\n(.*?)```\n\n<!-- output -->\n```text\n(.*?)```", re.DOTALL)
REPRODUCTION = ROOT / "tests" / "benchmarks" / "reproduction.json"
REPRODUCTION_REAL = ROOT / "tests" / "benchmarks" / "reproduction-real.json"
REPRODUCED = re.compile(r"<!-- reproduction -->\n(?:.*?)(?=\n`melbo-lens reproduce`)", re.DOTALL)
REPRODUCED_REAL = re.compile(r"<!-- reproduction-real -->\n(?:.*?)(?=\n`melbo-lens reproduce --real`)", re.DOTALL)
ARCHITECTURES = ROOT / "tests" / "architectures.json"
TRIED = re.compile(r"<!-- architectures -->\n(?:.*?)(?=\n`python -m tests.architectures`)", re.DOTALL)
REASONS = {
    "mixture of experts": "a mixture of experts has no one MLP matrix to update",
    "without an MLP": "no MLP whose output is hooked",
    "forward pass": "this version of TransformerLens can't run it with transformers 5.23",
}
DISCOVERY = ROOT / "tests" / "benchmarks" / "results-discovery.json"
COMPARED = re.compile(r"<!-- discovery -->\n(?:.*?)(?=\n`make bench-discovery`)", re.DOTALL)
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
        (
            "one vector and step (24 layers, d_model 512, layers 7 to 16, 32 tokens)",
            f"{step['factor']:.1f} times faster",
            "",
        ),
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
        (
            "64 completions (32 vectors, both signs) at once, against one vector at a time",
            f"{results['generation']['factor']:.0f} times faster",
            "",
        )
    )
    rows.append(
        (
            "— share of it in which the cache is compared with a pass without",
            f"{results['generation']['check_share']:.1%}",
            "",
        )
    )
    many = results["adapters"]
    peak, before = (many[name] / 2**20 for name in ("peak_rss_kib", "rss_before_kib"))
    label = (
        f"one adapter and step of the published recipe ({many['n_adapters']} of rank {many['rank']}, the same model)"
    )
    rows.append(
        (label, f"{many['factor']:.1f} times faster; {peak:.1f} GiB at its peak, {before:.1f} before the fit", "")
    )
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
            f"planted behaviours (of 4) that 8 adapters find with `diversity={found['diversity']}`, "
            f"median of {len(found['seeds'])} seeds",
            f"{found['median_with']} against {found['median_without']} without it, "
            f"at {found['objective_kept']:.3f} of the objective",
            f"{min(found['found_with'])} against {min(found['found_without'])}",
        )
    )
    rows.append(
        ("bytes kept for the backward pass at half the `batch_size`", f"{memory['saved_ratio']:.2f} of them", "")
    )
    lines = [
        f"Against a textbook implementation of the post's equations ({results['machine']}):",
        "",
        "| what | measured | worst case |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def reproduction(file: Path = REPRODUCTION) -> str:
    """The table of the post's results."""
    results = json.loads(file.read_text())
    rows = table(results)
    lines = [
        f"| {' | '.join(row)} |" for row in (rows.columns, ["---"] * len(rows.columns), *rows.itertuples(index=False))
    ]
    return "\n".join(lines)


def discovery() -> str:
    """The table of what each method finds in equal time, the methods that find most first."""
    rows = summary(json.loads(DISCOVERY.read_text()))
    lines = [
        "| organism | method | found | in the first ten groups | share of completions | random | readable "
        "| do nothing | vectors | R / norm | first hit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = ["organism", "budget", "found", "in_first_ten", "share"]
    rows = rows.sort_values(order, ascending=[False, True, False, False, False], kind="stable")

    def cell(value: float, form: str) -> str:
        return "" if value != value else format(value, form)

    for row in rows.itertuples():
        cores = "one core" if row.threads == 1 else f"{row.threads} cores"
        cells = [
            f"{row.organism}, {row.budget:.0f} s on {cores}",
            row.method,
            f"{row.found} of {row.hidden}",
            str(row.in_first_ten),
            *(cell(value, ".1%") for value in (row.share, row.random_share)),
            *(cell(value, ".0%") for value in (row.readable, row.nothing)),
            f"{row.vectors:.0f}",
            cell(row.relative_radius, ".2f"),
            cell(row.first_hit, ".0f") and f"{row.first_hit:.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def architectures() -> str:
    """The table of architectures, by what works with each version of TransformerLens."""
    results = json.loads(ARCHITECTURES.read_text())
    lines = ["| architecture | vectors | adapters (MLP) | adapters (attention) | |", "|---|---|---|---|---|"]
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in results["3"]:
        found = [_cells(results[major][name]) for major in ("3", "4")]
        cells = found[0] if found[0] == found[1] else tuple(_both(*pair) for pair in zip(*found, strict=True))
        alike.setdefault(cells, []).append(name)
    for cells, names in sorted(alike.items(), key=lambda item: (-len(item[1]), item[1])):
        lines.append(f"| {', '.join(names)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(entry: dict[str, str]) -> tuple[str, ...]:
    """Whether vectors and adapters work, and why not or with what."""
    kinds = ("vectors", "adapters", "attention")
    refused = next((entry[kind] for kind in kinds if entry[kind] != "yes"), "")
    if "off by" in entry["note"]:
        return "differ", "differ", "differ", entry["note"]
    why = next((short for long, short in REASONS.items() if long in refused), refused)
    return *("yes" if entry[kind] == "yes" else "no" for kind in kinds), " ".join(filter(None, [why, entry["note"]]))


def _both(three: str, four: str) -> str:
    return three if three == four else f"TransformerLens 3: {three or 'yes'}; 4: {four or 'as the others'}"


def filled(text: str) -> str:
    """The README with outputs and numbers of now."""
    text = BLOCK.sub(
        lambda found: found[0].replace(found[2], run(found[1])) if found[2] else found[0][:-3] + run(found[1]) + "```",
        text,
    )
    text = BENCHMARK.sub(lambda _: "<!-- benchmark -->\n" + benchmark() + "\n", text)
    text = TRIED.sub(lambda _: "<!-- architectures -->\n" + architectures() + "\n", text)
    text = COMPARED.sub(lambda _: "<!-- discovery -->\n" + discovery() + "\n", text)
    text = REPRODUCED.sub(lambda _: "<!-- reproduction -->\n" + reproduction() + "\n", text)
    real = reproduction(REPRODUCTION_REAL)
    return REPRODUCED_REAL.sub(lambda _: "<!-- reproduction-real -->\n" + real + "\n", text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
