"""How do the post's results compare with those on the organisms?  `reproduce` runs the experiments."""

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import pandas as pd
from scipy.stats import binomtest
from tqdm.auto import tqdm

from melbo_lens.organisms.organism import load
from melbo_lens.studies.claims import TINY, Claim, Suite, median
from melbo_lens.studies.experiments import Score, Size

CONTROLS = ("unsteered", "random", "covariance", "twin")


def reproduce(
    seeds: Sequence[int] | None = None,
    size: Size | None = None,
    titles: Sequence[str] | None = None,
    progress: bool = True,
    suite: Suite = TINY,
) -> dict[str, Any]:
    """Runs the experiments and judges them.

    Args:
        seeds: the seeds of the starting directions, those of the suite by default; seed s learns on clean prompt s.
        size: how much is computed for each seed; as the suite says by default.
        titles: the titles of the experiments to run; all by default.
        progress: whether to show a progress bar.
        suite: the experiments and claims: `TINY` for the organisms that are small models of their own, `REAL` for
            those on SmolLM2.

    Returns:
        A JSON-like dict with the settings and the rows. Each row has the scores of all seeds, their median and spread,
        a 95 % interval, the controls, whether the claim holds, and the seconds.
    """
    seeds, size = suite.seeds if seeds is None else seeds, size or suite.size
    chosen = [experiment for experiment in suite.experiments if titles is None or experiment.title in titles]
    scores: dict[tuple[str, str], list[Score]] = {}
    seconds = {}
    began = time.monotonic()
    with tqdm(total=len(chosen) * len(seeds), desc="reproduce", unit="search", disable=not progress) as bar:
        for experiment in chosen:
            start = time.monotonic()
            organism = load(experiment.organism)
            twin = load(f"{experiment.organism}-twin") if experiment.has_twin else None
            for seed in seeds:
                found = experiment.run(organism, seed, size)
                nothing = {} if twin is None else experiment.run(twin, seed, replace(size, controls=False))
                for measure, score in found.items():
                    rate = nothing[measure].rate if measure in nothing else float("nan")
                    scores.setdefault((experiment.title, measure), []).append(replace(score, twin=rate))
                bar.update()
            seconds[experiment.title] = time.monotonic() - start
    rows = [
        _row(claim, scores[claim.experiment, claim.measure], seconds[claim.experiment])
        for claim in suite.claims
        if (claim.experiment, claim.measure) in scores
    ]
    return {
        "settings": {
            "seeds": list(seeds),
            **asdict(size),
            **suite.settings,
            "machine": (
                f"{platform.machine()}, torch {version('torch')}, transformer_lens {version('transformer_lens')}"
            ),
        },
        "seconds": round(time.monotonic() - began),
        "rows": rows,
    }


def _row(claim: Claim, scores: Sequence[Score], seconds: float) -> dict[str, Any]:
    middle = sorted(scores, key=lambda score: score.rate)[(len(scores) - 1) // 2]
    interval = binomtest(middle.hits, middle.n).proportion_ci(method="wilson")
    return {
        "experiment": claim.experiment,
        "measure": claim.measure,
        "what": claim.what,
        "post": claim.post,
        "required": claim.required,
        "holds": claim.holds(scores),
        "median": middle.rate,
        "least": min(score.rate for score in scores),
        "most": max(score.rate for score in scores),
        "interval": [interval.low, interval.high],
        **{control: median(scores, control) for control in CONTROLS},
        "seconds": round(seconds, 1),
        "scores": [asdict(score) for score in scores],
    }


def table(results: Mapping[str, Any]) -> pd.DataFrame:
    """Turns the output of `reproduce` into a table for people, with one row for each claim."""
    rows = []
    for row in results["rows"]:
        n = row["scores"][0]["n"]
        counted = row["experiment"].startswith("backdoor")
        show = (lambda rate, n=n: f"{rate * n:.0f}") if counted else (lambda rate: f"{rate:.0%}")
        rows.append(
            {
                "experiment": row["experiment"],
                "measure": row["what"],
                "the post": row["post"],
                "here": (
                    f"{show(row['median'])}{f' of {n}' if counted else ''} "
                    f"({show(row['least'])} to {show(row['most'])})"
                ),
                "95 % interval": f"{show(row['interval'][0])} to {show(row['interval'][1])}",
                **{control: _share(row[control]) for control in CONTROLS},
                "seconds": f"{row['seconds']:.0f}",
                "holds": "yes" if row["holds"] else "NO",
            }
        )
    return pd.DataFrame(rows)


def _share(rate: float | None) -> str:
    """A control's rate; NaN, or null in a file, is a control that there is not."""
    return "" if rate is None or rate != rate else f"{rate:.1%}"
