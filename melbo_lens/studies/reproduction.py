"""How do the post's results compare with those on the organisms?  `reproduce` runs the experiments."""

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy.stats import binomtest

from melbo_lens.arguments import plain_json
from melbo_lens.progress import Progress
from melbo_lens.studies.claims import TINY, Claim, Experiment, Suite, median
from melbo_lens.studies.experiments import Score, Size
from melbo_lens.sweeps.engines import Folder, Where, engine_for
from melbo_lens.sweeps.jobs import ModelKey
from melbo_lens.sweeps.tasks import Bench, Measurement, digest

CONTROLS = ("unsteered", "random", "covariance", "twin")


class Found(NamedTuple):
    """What an experiment gave for a seed: a score for each measure, and the seconds that it took."""

    scores: dict[str, Score]
    seconds: float


@dataclass(frozen=True)
class ExperimentTask(Measurement[Found]):
    """Runs an experiment for a seed on the organism that is at the bench.

    Attributes:
        experiment: the experiment.
        seed: the seed.
        size: how much is computed.
        settings: what else decides the results of its suite.
    """

    experiment: Experiment
    seed: int
    size: Size
    settings: Mapping[str, Any]

    def name(self, fingerprint: str) -> str:
        settings = plain_json(self.settings, "settings")
        said = [self.experiment.title, self.seed, asdict(self.size), settings, fingerprint]
        return f"{digest(said)}-experiment"

    def run(self, bench: Bench) -> Found:
        assert bench.organism is not None  # it was loaded by its name
        began = time.monotonic()
        scores = dict(self.experiment.run(bench.organism, self.seed, self.size))
        return Found(scores, time.monotonic() - began)

    def as_json(self, result: Found) -> Any:
        return {"scores": {name: asdict(score) for name, score in result.scores.items()}, "seconds": result.seconds}

    def of_json(self, said: Any) -> Found:
        scores = {measure: {**score, **_nan(score)} for measure, score in said["scores"].items()}
        return Found({measure: Score(**score) for measure, score in scores.items()}, float(said["seconds"]))


def _nan(said: Mapping[str, Any]) -> dict[str, Any]:
    """Returns NaN for what JSON has null for."""
    return {name: float("nan") for name, value in said.items() if value is None}


def reproduce(
    seeds: Sequence[int] | None = None,
    size: Size | None = None,
    titles: Sequence[str] | None = None,
    progress: bool = True,
    suite: Suite = TINY,
    *,
    directory: Folder | None = None,
    engine: Where = "here",
) -> dict[str, Any]:
    """Runs the experiments and judges them.

    Each experiment is run for each seed on its organism and, without random controls, on the twin of the organism.

    Args:
        seeds: the seeds of the starting directions, those of the suite by default; seed s learns on clean prompt s.
        size: how much is computed for each seed; as the suite says by default.
        titles: the titles of the experiments to run; all by default.
        progress: whether to show a progress bar.
        suite: the experiments and claims: `TINY` for the organisms that are small models of their own, `REAL` for
            those on SmolLM2.
        directory: a folder with a folder for each organism, in which every experiment on a seed is kept when it is
            over; it is made if it is missing. The same call skips these. Without it nothing is kept.
        engine: "here", or "ray" for Ray's actors, which run several seeds at a time and need a directory.

    Returns:
        A JSON-like dict with the settings and the rows. Each row has the scores of all seeds, their median and spread,
        a 95 % interval, the controls, whether the claim holds, and the seconds. All seconds are those of the work,
        whenever and wherever it was done, without the loading of models.

    Raises:
        ValueError: a folder holds results of another model, or the engine lacks a directory.
    """
    seeds, size = suite.seeds if seeds is None else seeds, size or suite.size
    chosen = [experiment for experiment in suite.experiments if titles is None or experiment.title in titles]
    tasks: dict[str, list[ExperimentTask]] = {}  # by organism, which is loaded once
    for experiment in chosen:
        for name, how in (
            (experiment.organism, size),
            *([(f"{experiment.organism}-twin", replace(size, controls=False))] if experiment.has_twin else []),
        ):
            tasks.setdefault(name, []).extend(ExperimentTask(experiment, seed, how, suite.settings) for seed in seeds)
    found: dict[tuple[str, str, int], Found] = {}  # by organism, experiment and seed
    with Progress(total=sum(map(len, tasks.values())), desc="reproduce", unit="search", disable=not progress) as bar:
        for name, some in tasks.items():
            folder = None if directory is None else Path(directory) / name
            with engine_for(ModelKey(name), folder, engine) as workers:
                workers.begin(some)
                for done in workers.results(some):
                    found[name, done.task.experiment.title, done.task.seed] = done.value()
                    bar.update()
    scores: dict[tuple[str, str], list[Score]] = {}
    seconds: dict[str, float] = {}
    for experiment in chosen:
        title = experiment.title
        for seed in seeds:
            mine = found[experiment.organism, title, seed]
            twin = found.get((f"{experiment.organism}-twin", title, seed), Found({}, 0.0))
            for measure, score in mine.scores.items():
                rate = twin.scores[measure].rate if measure in twin.scores else float("nan")
                scores.setdefault((title, measure), []).append(replace(score, twin=rate))
            seconds[title] = seconds.get(title, 0.0) + mine.seconds + twin.seconds
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
        "seconds": round(sum(seconds.values())),
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
