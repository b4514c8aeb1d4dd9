"""Where do the trials of a sweep run?  In this process, or in Ray's actors, each of which holds the model once."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from melbo_lens.ascent.objectives import Objective
from melbo_lens.methods.problem import default_batch_size
from melbo_lens.methods.provenance import fingerprint
from melbo_lens.models.access import host_of
from melbo_lens.models.slices import SlicedModel, slice_model
from melbo_lens.search.running import perform
from melbo_lens.sweeps.jobs import Job, ModelKey, job_from
from melbo_lens.sweeps.outcomes import Outcome, is_done

LOCKS = ".locks"  # the lock of a process that dies is free again at once
RETRIES = 3  # of a trial whose worker was lost


class Worker:
    """Holds a model, runs jobs on it, and writes their outcomes into a folder."""

    def __init__(self, key: ModelKey, directory: str, model: Any = None) -> None:
        self.host = host_of(key.load() if model is None else model)
        self.directory = Path(directory)
        self.fingerprint = fingerprint(self.host)
        self.slices: dict[str, SlicedModel] = {}

    def which_model(self) -> str:
        """Returns the fingerprint of the model's weights."""
        return self.fingerprint

    def run(self, said: dict[str, Any], wait: bool = True) -> bool:
        """Runs a job, unless its outcome is there, and writes its outcome.

        Args:
            said: the job, as `Job.as_json` describes it.
            wait: whether to wait where another process runs this very job.

        Returns:
            Whether the outcome is there now.
        """
        job = job_from(said)
        digest = job.digest(self.fingerprint)
        lock = FileLock(self.directory / LOCKS / digest, timeout=-1 if wait else 0)
        try:
            with lock:
                if not is_done(self.directory, digest):
                    self._outcome(job, digest).save(self.directory)
        except Timeout:
            return False
        return True

    def _outcome(self, job: Job, digest: str) -> Outcome:
        """Runs a job. Where memory runs out it is tried again with half of the rows; other errors are its failure."""
        batch_size: int | None = None
        while True:
            usual: int | None = None  # there is nothing to halve before the slice is made
            try:
                sliced = self._slice(job)
                usual = default_batch_size(sliced)
                done = perform(job.trial, sliced, [*job.prompts], job.max_new_tokens, batch_size)
                seconds = round(done.fitting + done.writing, 3)
                return Outcome(job, digest, done.learned, done.completions, done.judged, seconds)
            except Exception as error:  # whatever it is, the sweep goes on, and its table has the reason
                if not _out_of_memory(error) or usual is None or batch_size == 1:
                    return Outcome(job, digest, None, None, None, 0.0, f"{type(error).__name__}: {error}")
            batch_size = max(1, (batch_size or usual) // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _slice(self, job: Job) -> SlicedModel:
        """Returns the slice of a job; that of the job before is kept, since neighbours often share it."""
        between = (job.trial.source_layer, job.trial.target_layer)
        key = repr((between, job.prompts, job.target_positions))
        if key not in self.slices:
            where = Objective.of({"target_layer": 0, "target_positions": job.target_positions})
            assert where is not None  # it names a layer
            self.slices = {key: slice_model(self.host, [*job.prompts], *between, where.target_positions)}
        return self.slices[key]


class Engine(ABC):
    """Runs jobs somewhere."""

    @abstractmethod
    def which_model(self) -> str:
        """Returns the fingerprint of the model's weights where the jobs run."""

    @abstractmethod
    def run(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Runs jobs, and yields each of them when its outcome is in the folder."""


class Here(Engine):
    """Runs one job after another in this process."""

    def __init__(self, key: ModelKey, directory: str, model: Any = None) -> None:
        self.worker = Worker(key, directory, model)

    def which_model(self) -> str:
        return self.worker.fingerprint

    def run(self, jobs: Iterable[Job]) -> Iterator[Job]:
        later: list[Job] = []  # another process has them; the others come first
        for job in jobs:
            if self.worker.run(job.as_json(), wait=False):
                yield job
            else:
                later.append(job)
        for job in later:
            self.worker.run(job.as_json())
            yield job


class OnRay(Engine):
    """Runs jobs in Ray's actors, one for each GPU, or for each so many cores.

    Ray places them, starts a lost one again and repeats its job. The folder must be one that all of them see.

    Args:
        key: how the actors load the model.
        directory: the folder of the outcomes.
        n_workers: the number of actors; None takes one for each GPU of the cluster, or for each core.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(self, key: ModelKey, directory: str, n_workers: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError("engine=\"ray\" needs Ray: `pip install 'melbo-lens[sweep]'`.") from error
        self.ray: Any = ray
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False)
        have = ray.cluster_resources()
        gpus, cores = int(have.get("GPU", 0)), int(have.get("CPU", 1))
        n = n_workers or gpus or cores
        share = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": max(1, cores // n)}
        actor = self.ray.remote(max_restarts=-1, max_task_retries=RETRIES, **share)(Worker)
        self.directory = directory
        self.actors = [actor.remote(key, str(Path(directory).resolve())) for _ in range(n)]
        self.fingerprint = ""

    def which_model(self) -> str:
        self.fingerprint = str(self.ray.get(self.actors[0].which_model.remote()))
        return self.fingerprint

    def run(self, jobs: Iterable[Job]) -> Iterator[Job]:
        waiting, idle, running = iter(jobs), list(self.actors), dict[Any, tuple[Any, Job]]()
        try:
            while True:
                while idle and (job := next(waiting, None)) is not None:
                    actor = idle.pop()
                    running[actor.run.remote(job.as_json())] = (actor, job)
                if not running:
                    return
                (ref,), _ = self.ray.wait(list(running), num_returns=1)
                actor, job = running.pop(ref)
                try:
                    self.ray.get(ref)
                except self.ray.exceptions.RayError as error:
                    failure = f"{type(error).__name__}: its worker was lost {RETRIES + 1} times"
                    Outcome(job, job.digest(self.fingerprint), None, None, None, 0.0, failure).save(self.directory)
                idle.append(actor)
                yield job
        finally:
            for actor in self.actors:
                self.ray.kill(actor)


def _out_of_memory(error: Exception) -> bool:
    """Says whether memory ran out, of a GPU or of the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        said in str(error).lower() for said in ("out of memory", "can't allocate memory", "not enough memory")
    )
