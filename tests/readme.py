"""Where do the outputs and numbers in the README and in docs/ come from?  `python -m tests.readme` fills them in.

A table stands between `<!-- NAME -->` and `<!-- end -->`. The output of a block stands after it, below
`<!-- output -->`. Tables are always filled in. `--outputs PAGE` also runs the blocks of a page, one after another, and
writes what they print; with `--real` it runs those that need SmolLM2, too.
"""

import argparse
import contextlib
import io
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from melbo_lens.studies.reproduction import CONTROLS, table
from tests.benchmarks.discovery import summary

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BENCHMARKS = ROOT / "tests" / "benchmarks"
RESULTS = BENCHMARKS / "results.json"
MARKED = re.compile(r"<!-- ([\w-]+) -->\n((?:(?!<!--).)*)\n<!-- end -->", re.DOTALL)
BLOCK = re.compile(
    r"^```python(?: (?P<mark>no-run|real))?\n(?P<code>.*?)^```\n(?:\n<!-- output -->\n```text\n(?P<shown>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
REPRODUCTION = BENCHMARKS / "reproduction.json"
REPRODUCTION_REAL = BENCHMARKS / "reproduction-real.json"
ARCHITECTURES = ROOT / "tests" / "architectures.json"
REASONS = {
    "mixture of experts": "a mixture of experts has no one MLP matrix to update",
    "without an MLP": "no MLP whose output is hooked",
    "forward pass": "this version of TransformerLens can't run it with transformers 5.23",
}
DISCOVERY = BENCHMARKS / "results-discovery.json"
SEARCHES = BENCHMARKS / "results-search.json"
REAL = BENCHMARKS / "results-real.json"


def run(code: str, names: dict[str, Any] | None = None) -> str:
    """What a block prints, which finds and leaves the names of the blocks before it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "a page", "exec"), {} if names is None else names)
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
    """The table of the post's results, with what each claim asks for."""
    results = json.loads(file.read_text())
    rows = table(results).drop(columns="holds").to_dict("records")
    required = ""
    for row, said in zip(rows, results["rows"], strict=True):
        row |= {control: row[control] or "–" for control in CONTROLS}
        required = required if said["required"] == "the same" else said["required"]
        if said["experiment"].startswith("backdoor"):
            row["95 % interval"] += f" of {said['scores'][0]['n']}"
        row["seconds"] += " s"
        row |= {"holds if": required, "holds": "yes" if said["holds"] else "NO"}
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows))]
    return "\n".join(lines)


def discovery() -> str:
    """What each method finds in equal time: in short, and a row for each organism, the methods that find most first."""
    rows = summary(json.loads(DISCOVERY.read_text()))
    lines = [
        *_in_short(rows),
        "",
        "| organism | method | found | in the first ten groups | share of completions | random | readable "
        "| do nothing | vectors | R / norm | first hit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = ["organism", "budget", "found", "in_first_ten", "share"]
    rows = rows.sort_values(order, ascending=[False, True, False, False, False], kind="stable")

    def cell(value: float, form: str) -> str:
        return "" if value != value else format(value, form)

    for row in rows.itertuples():
        cells = [
            _where(row.organism, row.budget, row.threads),
            row.method,
            f"{row.found} of {row.hidden}" if row.hidden else "",
            str(row.in_first_ten) if row.hidden else "",
            *(cell(value, ".1%") for value in (row.share, row.random_share)),
            *(cell(value, ".0%") for value in (row.readable, row.nothing)),
            f"{row.vectors:.0f}",
            cell(row.relative_radius, ".2f"),
            cell(row.first_hit, ".0f") and f"{row.first_hit:.0f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_short(rows: pd.DataFrame) -> list[str]:
    """One row for each method: the behaviours in the first ten groups, of each organism and of all, and recovery."""
    places = list(dict.fromkeys(zip(rows.organism, rows.budget, rows.threads, strict=True)))
    table: dict[str, dict[Any, str]] = {}
    for row in rows.itertuples():
        known = f"{row.in_first_ten} of {row.hidden}" if row.recovery != row.recovery else f"{row.recovery:.0%}"
        table.setdefault(str(row.method), {})[row.organism, row.budget, row.threads] = known
    usual = rows[rows.budget == rows.groupby("organism").budget.transform("min")]  # longer searches are fewer
    sums = usual.groupby("method")[["in_first_ten", "hidden"]].sum()
    lines = [f"| method | {' | '.join(_where(*place) for place in places)} | all |", "|---" * (len(places) + 2) + "|"]
    for method in sorted(table, key=lambda method: -int(sums.in_first_ten[method])):
        cells = [table[method].get(place, "") for place in places]
        lines.append(f"| {method} | {' | '.join(cells)} | {sums.in_first_ten[method]} of {sums.hidden[method]} |")
    return lines


def _where(organism: str, budget: float, threads: int) -> str:
    return f"{organism}, {budget:.0f} s on {'one core' if threads == 1 else f'{threads} cores'}"


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


def searches() -> str:
    """The table of ten searches of the backdoored model, with the place of each behaviour among the groups."""
    rows = json.loads(SEARCHES.read_text())
    names = list(rows[0]["behaviors"])
    heads = ["prompt, seed", "completions", "readable", "do nothing", *names, "random"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        found = [row["behaviors"][name] for name in names]
        places = [
            "not found" if one["group"] is None else f"group {one['group']}, {one['steered']} times" for one in found
        ]
        asked = f"“{row['prompt']}”" if isinstance(row["prompt"], str) else str(row["prompt"])
        cells = [f"{asked}, {row['seed']}", str(row["n_steered"]), f"{row['readable']:.0%}"]
        cells += [f"{row['shares']['nothing']:.0%}", *places]
        cells.append(f"{sum(one['random'] for one in found)} of {row['n_random']}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def peers() -> str:
    """The table of speeds beside peers on a real model."""
    results = json.loads(REAL.read_text())
    step, whole, power = results["step"], results["from a prompt"], results["power"]
    size = f"{step['n_vectors']} vectors on {step['n_tokens']} tokens"
    rows = [
        (f"a vector and step of AdamW, {size}: the post's equations, one vector after another", "textbook", "seconds"),
        ("— batched-melbo 0.1.1", "batched_melbo", "seconds"),
        ("— melbo_lens", "melbo_lens", "seconds"),
        ("— the products with the weights alone, forwards and backwards", "products", "seconds"),
    ]
    cells = [(label, f"{step[kind][name] * 1000:.0f} ms") for label, name, kind in rows]
    for length in ("12 tokens", "24 tokens"):
        written = results["generation"][length]
        cells.append(
            (
                f"writing {written['rows']} completions of {length}, {written['equal_rows']} of them equal to those of "
                "transformers with a hook",
                f"{written['seconds']:.1f} s; transformers {written['seconds_transformers']:.1f} s; the products "
                f"alone {written['seconds_products']:.1f} s",
            )
        )
    cells += [
        (
            "from a prompt to completions: fit and writing; the peer's fit by AdamW",
            f"{whole['seconds_fit']:.0f} s and {whole['seconds_write']:.0f} s; {whole['seconds_peer_fit']:.0f} s",
        ),
    ]
    for share in sorted({case["share_of_edge"] for case in power["cases"]}):
        found = power[f"at {share} of the edge"]
        cells.append(
            (
                f"`power` against 300 AdamW steps, 8 orthogonal vectors, three pairs of layers, {share} of the edge: "
                "objective (median, worst) and how much sooner than whole forward passes, at least",
                f"{found['objective_median']:.2f}, {found['objective_worst']:.2f}; "
                f"{found['times_textbook_least']:.0f} times",
            )
        )
    cores = "one core" if power["threads"] == 1 else f"{power['threads']} cores"
    lines = [
        f"On SmolLM2-135M ({results['machine']}; the last two rows on {cores}):",
        "",
        "| what | measured |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])


TABLES = {
    "benchmark": benchmark,
    "reproduction": reproduction,
    "reproduction-real": lambda: reproduction(REPRODUCTION_REAL),
    "discovery": discovery,
    "searches": searches,
    "peers": peers,
    "architectures": architectures,
}


def pages() -> list[Path]:
    """The README and the pages of docs/."""
    return [README, *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A page with the numbers of the last measurements."""
    return MARKED.sub(lambda found: f"<!-- {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->", text)


def with_outputs(text: str, marks: Iterable[str | None] = (None,)) -> str:
    """A page with what its blocks print now; only those with one of these marks are run, in a scratch folder."""
    names: dict[str, Any] = {}

    def renewed(found: re.Match[str]) -> str:
        if found["mark"] not in marks:
            return found[0]
        printed = run(found["code"], names)
        if found["shown"] is None:
            return found[0]
        before, after = found.start("shown") - found.start(), found.end("shown") - found.start()
        return found[0][:before] + printed + found[0][after:]

    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        return BLOCK.sub(renewed, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--outputs", nargs="+", default=[], metavar="PAGE", help="names of pages, as in tutorial.md")
    parser.add_argument("--real", action="store_true", help="run the blocks of these pages that need SmolLM2, too")
    asked = parser.parse_args()
    if unknown := set(asked.outputs) - {page.name for page in pages()}:
        parser.error(f"there is no page {', '.join(sorted(unknown))}")
    for page in pages():
        text = page.read_text()
        if page.name in asked.outputs:
            text = with_outputs(text, (None, "real") if asked.real else (None,))
        page.write_text(filled(text))


if __name__ == "__main__":
    main()
