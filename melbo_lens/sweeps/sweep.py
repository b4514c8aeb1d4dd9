"""How does a sweep go on where it stopped?  It runs what its folder lacks; any number of folders make one table."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from melbo_lens import files
from melbo_lens.arguments import public
from melbo_lens.models.access import Model
from melbo_lens.progress import Progress
from melbo_lens.sweeps.engines import MODEL, PLANS, Engine, Folder, Where, engine_for
from melbo_lens.sweeps.jobs import Job
from melbo_lens.sweeps.outcomes import Outcome, TrialTask, all_of


@public
def sweep(
    plan: Sequence[Job],
    directory: Folder,
    engine: Where = "here",
    *,
    model: Model | None = None,
    shard: tuple[int, int] | None = None,
    n_workers: int | None = None,
    retry: bool = False,
    progress: bool = True,
) -> Iterator[Outcome]:
    """Runs the trials of a plan, each of which is kept in a file of its own, and goes on where an earlier call stopped.

    A trial that fails (no memory even for one row, no radius, NaN) is an outcome with its reason, and the sweep goes
    on. Where memory runs out, the trial is tried again with half of the rows in a pass. Several processes, also on
    several machines, may share a folder: none runs what another one runs.

    Args:
        plan: the jobs, as `plan_jobs` makes them, all of one model.
        directory: the folder of the outcomes; it is made if it is missing.
        engine: "here" runs in this process; "ray" in Ray's actors (`pip install 'melbo-lens[sweep]'`), on this machine
            or on the cluster that `ray.init` was given.
        model: the model itself, if it is loaded already; only for "here".
        shard: (i, n) runs every n-th job from the i-th on, i from 1 to n. None takes them from Slurm, if this is a task
            of a job array.
        n_workers: how many actors Ray gets; None takes one for each GPU, or for each core.
        retry: whether trials that failed earlier are run again.
        progress: whether to show a progress bar with the remaining time.

    Returns:
        An iterator of outcomes: first those that are there, then the others as they come. Nothing runs until it is
        asked for; `list` asks for all.

    Raises:
        ValueError: the plan is empty or of several models, or the folder holds outcomes of another model.
        ImportError: Ray is not installed.
    """
    keys = list(dict.fromkeys(job.model for job in plan))
    if len(keys) != 1:
        raise ValueError(f"a sweep is of one model, and this plan has {len(keys)}: run one sweep for each.")
    if engine == "ray" and model is not None:
        raise ValueError('engine="ray" loads the model in its actors: leave model out, its key is in the plan.')
    what = keys[0] if model is None else model
    if what is None:
        raise ValueError("these jobs are of a model that a search was given, and name none: give it as model.")
    tasks = [TrialTask(job) for job in list(plan)[of_shard(shard)]]
    return _outcomes(engine_for(what, directory, engine, n_workers), tasks, retry, progress)


def _outcomes(workers: Engine, tasks: list[TrialTask], retry: bool, progress: bool) -> Iterator[Outcome]:
    """Yields the outcomes of different tasks, first those that are there."""
    tasks = list({task.name(workers.fingerprint): task for task in tasks}.values())
    with workers, Progress(total=len(tasks), desc="sweep", unit="trial", disable=not progress) as bar:
        workers.begin(tasks)
        missing: list[TrialTask] = []
        for task in tasks:
            known = workers.known(task)
            if known is None or (retry and known.failure is not None):
                missing.append(task)
            else:
                bar.update()
                yield known
        bar.unpause()
        for done in workers.run(missing):
            bar.update()
            yield done.value()


def of_shard(shard: tuple[int, int] | None) -> slice:
    """Returns which jobs of a plan a shard runs; all if there is none.

    Raises:
        ValueError: the shard's number doesn't lie within their count, or Slurm's array has gaps.
    """
    if shard is None:
        if "SLURM_ARRAY_TASK_ID" not in os.environ:
            return slice(None)
        names = ("ID", "MIN", "MAX", "COUNT", "STEP")
        said = {name: int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", 0)) for name in names}
        step = max(said["STEP"], 1)
        n = (said["MAX"] - said["MIN"]) // step + 1
        if said["COUNT"] not in (0, n):
            raise ValueError(
                f"Slurm's array has {said['COUNT']} tasks with numbers from {said['MIN']} to {said['MAX']}: which part "
                "of the plan each of them runs can't be told. Use an array without gaps, or give shard."
            )
        shard = ((said["ID"] - said["MIN"]) // step + 1, n)
    i, n = shard
    if not 1 <= i <= n:
        raise ValueError(f"shard={i}/{n} must have a number from 1 to {max(n, 1)}.")
    return slice(i - 1, None, n)


def folders_of(directories: Folder | Sequence[Folder]) -> list[Path]:
    """Lists the folders, of which one may be given alone."""
    return list(map(Path, [directories] if isinstance(directories, str | os.PathLike) else directories))


def model_of(folder: Path) -> str | None:
    """Returns the fingerprint of the model of a folder; None if it has none."""
    path = folder / MODEL
    return str(files.read_json(path)["fingerprint"]) if path.is_file() else None


@public
def merge(directories: Folder | Sequence[Folder]) -> pd.DataFrame:
    """Makes one table from the folders of any number of sweeps, with one row for each trial.

    Args:
        directories: the folders.

    Returns:
        The trials' settings, how many completions were written under learned vectors, which share of them is readable,
        which share of the directions does nothing, changes the wording or the content, or writes noise, the seconds,
        and for trials that failed the reason. A trial that is in several folders has one row, a finished one if any.

    Raises:
        FileNotFoundError: there is no such folder.

    Warns:
        UserWarning: a file is damaged; it is left out.
    """
    for folder in folders_of(directories):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {str(folder)!r} to merge: name those that a sweep wrote to.")
    rows = [outcome.row() for folder in folders_of(directories) for outcome in all_of(folder)]
    if not rows:
        return pd.DataFrame(columns=["digest", "method", "failure"])
    table = pd.DataFrame(rows).sort_values(["digest", "failure"], na_position="first", kind="stable")
    return table.drop_duplicates("digest").reset_index(drop=True)


@dataclass(frozen=True)
class Status:
    """How far the sweeps of a folder are.

    Attributes:
        n_done: how many trials are finished. Pairs of a scan and the edge of a search count as trials.
        n_asked: how many were asked for.
        failures: digest -> why the trial failed.
        seconds_left: what the others will take one after another, if each takes as long as the finished ones; None
            before one is finished.
    """

    n_done: int
    n_asked: int
    failures: dict[str, str]
    seconds_left: float | None

    def __repr__(self) -> str:
        left = "" if self.seconds_left is None else f", about {self.seconds_left:.0f} s of work left"
        return f"Status({self.n_done} of {self.n_asked} trials done, {len(self.failures)} failed{left})"


@public
def status(directory: Folder) -> Status:
    """Says how far the sweeps of a folder are.

    Args:
        directory: the folder.

    Returns:
        How many trials are done, failed and missing, and the reasons of those that failed.

    Raises:
        ValueError: no sweep was begun there.
    """
    plans = sorted((Path(directory) / PLANS).glob("*.json"))
    if not plans:
        raise ValueError(f"no sweep was begun in {directory}.")
    asked = {digest for plan in plans for digest in files.read_json(plan)}
    measured = sum((Path(directory) / f"{name}.json").is_file() for name in asked)  # what is not a trial
    known = [outcome for outcome in all_of(directory) if outcome.digest in asked]
    done = [outcome for outcome in known if outcome.failure is None]
    failures = {outcome.digest: outcome.failure for outcome in known if outcome.failure is not None}
    left = len(asked) - len(known) - measured
    each = sum(outcome.seconds for outcome in done) / len(done) if done else None
    return Status(len(done) + measured, len(asked), failures, None if each is None else round(left * each, 1))
