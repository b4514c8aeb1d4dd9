"""Where is the work done?  In this process, or in Ray's actors, each of which holds the model once."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar

from filelock import FileLock, Timeout

from melbo_lens import files
from melbo_lens.arguments import counts, one_of
from melbo_lens.files import LOCKS
from melbo_lens.sweeps.jobs import Loadable, ModelKey
from melbo_lens.sweeps.tasks import Bench, Task, digest

MODEL, PLANS = "model.json", "plans"  # what a folder has beside the results: of which model, and what was asked for
RETRIES = 3  # of a task whose worker was lost
Where: TypeAlias = Literal["here", "ray"]
Folder: TypeAlias = str | os.PathLike[str]
T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """A task that came to its end, with its result or with the error that ended it."""

    task: Any
    result: Any = None
    error: Exception | None = None

    def value(self) -> Any:
        """Returns the result.

        Raises:
            Exception: the error that ended the task.
        """
        if self.error is not None:
            raise self.error
        return self.result


class Worker:
    """Holds a model, does tasks on it, and keeps their results in a folder."""

    def __init__(self, model: Loadable, folder: Path) -> None:
        self.bench, self.folder = Bench(model), folder

    def ask(self, question: Callable[[Bench], T]) -> T:
        """Answers a question about the model."""
        return question(self.bench)

    def run(self, task: Task[Any], wait: bool = True) -> Any:
        """Does a task, unless its result is there, and keeps the result.

        Args:
            task: the task.
            wait: whether to wait where another process does this very task.

        Returns:
            The result, as it was read from its file; None if another process does the task and it was not waited for.

        Raises:
            Exception: the task failed, and its failure is not kept.
            RuntimeError: the file is gone as soon as it was written.
        """
        name = task.name(self.bench.fingerprint)
        try:
            with FileLock(self.folder / LOCKS / name, timeout=-1 if wait else 0):
                if not task.is_done(self.folder, name):
                    task.keep(self._result(task, name), self.folder, name)
                result = task.kept(self.folder, name)
        except Timeout:
            return None
        if result is None:
            raise RuntimeError(f"what {task} gave was written into {self.folder} and can't be read there.")
        return result

    def _result(self, task: Task[Any], name: str) -> Any:
        try:
            return task.run(self.bench)
        except Exception as error:  # whatever it is, a trial of a sweep keeps it, and the sweep goes on
            failure = task.failed(error, name)
            if failure is None:
                raise
            return failure


class Engine(ABC):
    """Does tasks somewhere, each of them once.

    Attributes:
        folder: where results are kept; None keeps them in memory only.
        n_at_once: how many tasks are done at the same time.
    """

    folder: Path | None
    n_at_once: int = 1

    @abstractmethod
    def ask(self, question: Callable[[Bench], T]) -> T:
        """Asks something about the model where the work is done."""

    @abstractmethod
    def run(self, tasks: Iterable[Task[Any]]) -> Iterator[Done]:
        """Does tasks, and yields each at its end. The next one is taken when a worker is idle, and not before."""

    def close(self) -> None:  # noqa: B027 (most have nobody to let go)
        """Lets the workers go."""

    @cached_property
    def fingerprint(self) -> str:
        """The digest of the model's weights."""
        return self.ask(attrgetter("fingerprint"))

    def known(self, task: Task[Any]) -> Any:
        """Returns the result that the folder has of a task; None if there is none."""
        return None if self.folder is None else task.kept(self.folder, task.name(self.fingerprint))

    def results(self, tasks: Iterable[Task[Any]]) -> Iterator[Done]:
        """Yields the tasks whose results are kept, and then the others as they come."""
        missing: list[Task[Any]] = []
        for task in tasks:
            known = self.known(task)
            if known is None:
                missing.append(task)
            else:
                yield Done(task, known)
        yield from self.run(missing)

    def begin(self, tasks: Iterable[Task[Any]], plan: str | None = None) -> None:
        """Makes the folder, if it is missing, and notes what is asked for, so that `status` can tell how far it is.

        Args:
            tasks: the tasks.
            plan: the name of a note to which these are added; None makes one that is named after the tasks.

        Raises:
            ValueError: the folder is of another model.
        """
        if self.folder is None:
            return
        for inner in (LOCKS, PLANS):
            files.make_folder(self.folder / inner)
        with FileLock(self.folder / LOCKS / "model"):
            if not self.check_folder():
                name = self.ask(attrgetter("host.name"))
                files.write_json(self.folder / MODEL, {"name": name, "fingerprint": self.fingerprint})
        names = sorted({task.name(self.fingerprint) for task in tasks})
        note = self.folder / PLANS / f"{plan or digest(names)}.json"
        known = files.read_json(note) if note.is_file() else []
        if not set(names) <= set(known):
            files.write_json(note, sorted({*known, *names}))

    def check_folder(self) -> bool:
        """Says whether the folder is of a model already.

        Raises:
            ValueError: it is of another one than this.
        """
        if self.folder is None or not (self.folder / MODEL).is_file():
            return False
        known = files.read_json(self.folder / MODEL)
        if known["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.folder} holds results of {known['name']!r} with other weights than "
                f"{self.ask(attrgetter('host.name'))!r} has now: choose another folder."
            )
        return True

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class InMemory(Engine):
    """Does one task after another in this process, and keeps nothing."""

    folder = None

    def __init__(self, model: Loadable) -> None:
        self.bench = Bench(model)

    def ask(self, question: Callable[[Bench], T]) -> T:
        return question(self.bench)

    def run(self, tasks: Iterable[Task[Any]]) -> Iterator[Done]:
        for task in tasks:
            try:
                done = Done(task, task.run(self.bench))
            except Exception as error:
                done = Done(task, error=error)
            yield done


class Here(Engine):
    """Does one task after another in this process."""

    def __init__(self, model: Loadable, folder: Path) -> None:
        self.folder, self.worker = folder, Worker(model, folder)

    def ask(self, question: Callable[[Bench], T]) -> T:
        return self.worker.ask(question)

    def run(self, tasks: Iterable[Task[Any]]) -> Iterator[Done]:
        later: list[Task[Any]] = []  # another process does them; the others come first
        for task in tasks:
            done = self._tried(task, wait=False)
            if done is None:
                later.append(task)
            else:
                yield done
        for task in later:
            done = self._tried(task, wait=True)
            assert done is not None  # it was waited for
            yield done

    def _tried(self, task: Task[Any], wait: bool) -> Done | None:
        try:
            result = self.worker.run(task, wait)
        except Exception as error:
            return Done(task, error=error)
        return None if result is None else Done(task, result)


class OnRay(Engine):
    """Does tasks in Ray's actors, one for each GPU, or for each so many cores.

    Ray places them, starts a lost one again and repeats its task. The folder must be one that all of them see.

    Args:
        key: how the actors load the model.
        folder: the folder of the results.
        n_workers: the number of actors; None takes one for each GPU of the cluster, or for each core.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(self, key: ModelKey | str, folder: Path, n_workers: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError("engine=\"ray\" needs Ray: `pip install 'melbo-lens[sweep]'`.") from error
        self.ray: Any = ray
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False)
        have = ray.cluster_resources()
        gpus, cores = int(have.get("GPU", 0)), int(have.get("CPU", 1))
        self.n_at_once = n_workers or gpus or cores
        share = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": max(1, cores // self.n_at_once)}
        actor = self.ray.remote(max_restarts=-1, max_task_retries=RETRIES, **share)(Worker)
        self.folder = folder.resolve()
        self.actors = [actor.remote(key, self.folder) for _ in range(self.n_at_once)]

    def ask(self, question: Callable[[Bench], T]) -> T:
        try:
            return self.ray.get(self.actors[0].ask.remote(question))
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error

    def run(self, tasks: Iterable[Task[Any]]) -> Iterator[Done]:
        waiting, idle, running = iter(tasks), list(self.actors), dict[Any, tuple[Any, Task[Any]]]()
        while True:
            while idle and (task := next(waiting, None)) is not None:
                actor = idle.pop()
                running[actor.run.remote(task)] = (actor, task)
            if not running:
                return
            (ref,), _ = self.ray.wait(list(running), num_returns=1)
            actor, task = running.pop(ref)
            idle.append(actor)
            yield self._got(ref, task)

    def _got(self, ref: Any, task: Task[Any]) -> Done:
        try:
            return Done(task, self.ray.get(ref))
        except self.ray.exceptions.RayTaskError as error:
            return Done(task, error=error.cause)
        except self.ray.exceptions.RayError as lost:
            assert self.folder is not None
            error = RuntimeError(f"its worker was lost {RETRIES + 1} times ({type(lost).__name__})")
            name = task.name(self.fingerprint)
            failure = task.failed(error, name)
            if failure is None:
                return Done(task, error=error)
            task.keep(failure, self.folder, name)
            return Done(task, failure)

    def close(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor)


def engine_for(
    model: Loadable, directory: Folder | None = None, engine: Where = "here", n_workers: int | None = None
) -> Engine:
    """Opens an engine, to be used in a `with` block.

    Args:
        model: the model, its key, or its name.
        directory: the folder of the results, which `begin` makes if it is missing; None keeps them in memory.
        engine: "here" is this process, "ray" are Ray's actors.
        n_workers: as in `OnRay`.

    Raises:
        ValueError: the folder holds results of another model, or Ray is to do without a folder or a key.
        ImportError: Ray is not installed.
    """
    one_of("engine", engine, ("here", "ray"))
    counts(n_workers=n_workers)
    if engine == "here":
        if directory is None:
            return InMemory(model)
        workers: Engine = Here(model, Path(directory))
    else:
        if directory is None:
            raise ValueError('engine="ray" keeps results in a folder, which all workers see: give directory.')
        if not isinstance(model, ModelKey | str):
            raise ValueError(
                'engine="ray" loads the model in its actors: give its name or an ml.ModelKey, not a model.'
            )
        workers = OnRay(model, Path(directory), n_workers)
    try:
        workers.check_folder()
    except BaseException:
        workers.close()
        raise
    return workers
