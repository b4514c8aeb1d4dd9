"""What is kept of a trial of a sweep?  One file under its digest, with all of it, or with the reason why it failed."""

import json
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from melbo_lens import files
from melbo_lens.evaluation.departures import shares
from melbo_lens.generation.completions import Completions
from melbo_lens.perturbations.perturbation import KINDS, Perturbation
from melbo_lens.sweeps.jobs import Job, as_prompts, job_from
from melbo_lens.sweeps.running import perform
from melbo_lens.sweeps.tasks import Bench, Task

KIND = "Outcome"
DIGEST = re.compile(r"[0-9a-f]{24}")


@dataclass(frozen=True, eq=False, repr=False)
class Outcome:
    """The result of a job.

    Attributes:
        job: the job.
        digest: its name.
        learned: the vectors or adapters; None if the trial failed.
        completions: what the model wrote; None if the trial failed.
        judged: how each completion departs from the unsteered one (`departures`); None if the trial failed.
        seconds: how long it took.
        failure: why the trial failed; None if it didn't.
        fitting: how many of the seconds its fit took.
    """

    job: Job
    digest: str
    learned: Perturbation | None
    completions: Completions | None
    judged: pd.DataFrame | None
    seconds: float
    failure: str | None = None
    fitting: float = 0.0

    def row(self) -> dict[str, Any]:
        """Returns the row of a table: the trial's settings, what became of its directions, or why it failed."""
        trial, settings = self.job.trial, self.job.as_json()["trial"]
        found = {
            "digest": self.digest,
            "method": trial.method,
            **{name: value for name, value in settings.items() if name not in ("positive", "negative")},
            "prompts": json.dumps(self.job.prompts),
            "seconds": round(self.seconds, 3),
            "failure": self.failure,
        }
        if self.completions is None or self.judged is None:
            return found
        table = self.completions.table.join(self.judged).assign(trial=0)
        table = table[table.kind != "unsteered"]
        steered = table[table.kind == "steered"]
        done = {"completions": len(steered), "readable": float((steered.change != "noise").mean())}
        return {**found, **done, **shares(table)}

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes the file of this outcome into a folder, atomically."""
        path = path_of(directory, self.digest, failed=self.failure is not None)
        header: dict[str, Any] = {"job": self.job.as_json(), "seconds": self.seconds, "fitting": self.fitting}
        if self.learned is None or self.completions is None or self.judged is None:
            files.write_json(path, {**header, "failure": self.failure})
            return path
        tensors, parts = self.learned.parts()
        header |= {
            "learned": {"kind": type(self.learned).__name__, "header": parts},
            "provenance": dict(self.learned.provenance),
            "completions": {"lines": self.completions.to_lines(), "settings": dict(self.completions.settings)},
            "judged": self.judged.to_dict("list"),
        }
        files.write(path, KIND, tensors, header)
        path_of(directory, self.digest, failed=True).unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Outcome":
        """Reads the file of an outcome.

        Raises:
            ValueError: the file is damaged, or no outcome.
        """
        path = Path(path)
        digest = path.name.split(".")[0]
        try:
            if path.suffix == ".json":
                said = files.read_json(path)
                return cls(job_from(said["job"]), digest, None, None, None, said["seconds"], said["failure"])
            tensors, said = files.read(path, KIND)
            learned = KINDS[said["learned"]["kind"]].of_parts(tensors, said["learned"]["header"], said["provenance"])
            written = Completions.from_lines(said["completions"]["lines"], said["completions"]["settings"])
            judged = pd.DataFrame(said["judged"], index=written.table.index)
            seconds, fitting = said["seconds"], said["fitting"]
            return cls(job_from(said["job"]), digest, learned, written, judged, seconds, fitting=fitting)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error!r}.") from error

    def __repr__(self) -> str:
        what = f"failed: {self.failure}" if self.failure is not None else repr(self.completions)
        return f"Outcome({self.digest}, {self.job.trial}, {what})"


@dataclass(frozen=True)
class TrialTask(Task[Outcome]):
    """The task of a job.

    Attributes:
        job: the job.
        number: its place in a plan, which changes nothing.
    """

    job: Job
    number: int = 0

    def name(self, fingerprint: str) -> str:
        return self.job.digest(fingerprint)

    def run(self, bench: Bench) -> Outcome:
        job = self.job
        sliced = bench.slice(job.prompts, job.trial.source_layer, job.trial.target_layer, job.target_positions)
        done = perform(job.trial, sliced, as_prompts(job.prompts), job.max_new_tokens)
        seconds = done.fitting + done.writing
        return Outcome(job, "", done.learned, done.completions, done.judged, seconds, fitting=done.fitting)

    def keep(self, result: Outcome, folder: Path, name: str) -> None:
        replace(result, digest=name).save(folder)

    def kept(self, folder: Path, name: str) -> Outcome | None:
        return read(folder, name)

    def is_done(self, folder: Path, name: str) -> bool:
        """Says whether the trial succeeded; one that failed is run again by whoever asks for it."""
        return is_done(folder, name)

    def failed(self, error: Exception, name: str) -> Outcome:
        return Outcome(self.job, name, None, None, None, 0.0, f"{type(error).__name__}: {error}")


def path_of(directory: str | os.PathLike[str], digest: str, failed: bool = False) -> Path:
    """Returns the file of a job's result in a folder."""
    return Path(directory) / (f"{digest}.failed.json" if failed else f"{digest}.safetensors")


def read(directory: str | os.PathLike[str], digest: str) -> Outcome | None:
    """Reads what is known of a job; None if nothing is, or its file is damaged.

    Warns:
        UserWarning: the file is damaged; its trial is to be run again.
    """
    for failed in (False, True):
        path = path_of(directory, digest, failed)
        if path.is_file():
            try:
                return Outcome.load(path)
            except ValueError as error:
                warnings.warn(f"{error} Its trial is run again.", stacklevel=2)
    return None


def is_done(directory: str | os.PathLike[str], digest: str) -> bool:
    """Says whether a job has a whole result that is no failure."""
    try:
        return Outcome.load(path_of(directory, digest)).failure is None
    except (FileNotFoundError, ValueError):
        return False


def all_of(directory: str | os.PathLike[str]) -> Iterator[Outcome]:
    """Reads every outcome of a folder, in the order of their names."""
    paths = [*Path(directory).glob("*.safetensors"), *Path(directory).glob("*.failed.json")]
    digests = {path.name.split(".")[0] for path in paths}
    for digest in sorted(filter(DIGEST.fullmatch, digests)):  # other files are the user's own
        if (outcome := read(directory, digest)) is not None:
            yield outcome
