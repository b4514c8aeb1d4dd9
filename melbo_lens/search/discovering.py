"""What does an unknown model hide?  A search of layers and radii within a time budget finds groups of completions."""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import methodcaller
from typing import Any

from torch import Tensor

from melbo_lens.arguments import public
from melbo_lens.ascent.objectives import positions_text
from melbo_lens.evaluation.rates import Behavior, check_behaviors
from melbo_lens.methods.planning import plan_memory
from melbo_lens.progress import Progress
from melbo_lens.prompts import AsPrompts, Positions, PromptBatch, Prompts, as_list
from melbo_lens.search.arms import Method, arms_of, check_methods
from melbo_lens.search.discovery import Discovery
from melbo_lens.search.groups import HeldoutTask, heldout_rate
from melbo_lens.search.pace import MARGIN
from melbo_lens.search.searching import Search, as_planned, in_rounds, until_interrupted
from melbo_lens.sweeps.engines import Engine, Folder, Where, engine_for
from melbo_lens.sweeps.jobs import Loadable
from melbo_lens.sweeps.tasks import Bench
from melbo_lens.sweeps.trials import AnyTrial

SHARE_FOR_HELDOUT, SHARE_FOR_GROUPS = 0.2, 0.03  # of the budget, for what follows the trials
UNSTEERED = -1  # the number of the task that writes on held-out prompts without a vector
SHARE_FOR_EDGE = 0.35  # of the budget, after which the edge is bisected no further


@public
def discover(
    model: Loadable,
    prompts: Prompts,
    budget: float = 60.0,
    behaviors: Mapping[str, Behavior] | None = None,
    *,
    heldout: Prompts | None = None,
    target_positions: Positions = slice(-1, None),
    max_new_tokens: int = 16,
    seed: int = 0,
    plan: Sequence[AnyTrial] | None = None,
    methods: Sequence[Method] = ("melbo",),
    directory: Folder | None = None,
    engine: Where = "here",
    progress: bool = True,
) -> Discovery:
    """Searches a model of which nothing is known, from one prompt or a few.

    First the edge of readability is found (`calibrate_radius`). Then come rounds of trials: the first is small and
    covers as many pairs of layers and radii around the edge as half of the time allows. Each later round repeats the
    better half of the one before with twice as many vectors from other starts. Every trial learns vectors, writes with
    both signs and with random vectors of equal norm, and judges how each completion departs from the unsteered one.

    Args:
        model: the model, which is left as it was; or its name or an `ml.ModelKey`, by which it is loaded.
        prompts: text, chats or token ids; one prompt is enough.
        budget: the time in seconds, from when the model is loaded. Trials are sized by what earlier ones took, and one
            is begun only if it is expected to end in time; the first one always runs.
        behaviors: name -> a regular expression or a function of the text. Completions that show a behaviour form a
            group of this name; all others are grouped by their words.
        heldout: prompts on which the vectors of the first groups are scored, as many as the time allows.
        target_positions: where a change counts; by default the last position, where the style of an answer is decided.
        max_new_tokens: the length of the completions.
        seed: the seed of the starts and the controls.
        plan: trials, all of which are run whatever the budget: `Trial` (vectors), `AdapterTrial`, `CpeTrial`,
            `DctTrial`, `JacobianTrial`, `NoiseTrial`, or `ContrastiveTrial`, which uses labels.
        methods: what a search without a plan tries in turns: "melbo" (free vectors of `fit_vectors`, stopped early),
            "orthogonal", "soft" (vectors that repel each other), "adamw" (the published recipe: at least four vectors
            of 300 steps, whatever the budget), "adapters" (`fit_adapters`), "cpe" (`fit_cpe`), "dct" and "dct_qr"
            (`fit_dct`), "jacobian" (`fit_jacobian`) and "noise" (`noise_vectors`).
        directory: a folder of a sweep, in which the edge, every trial, and the state of the search are kept; it is made
            if it is missing. The same call goes on where it was stopped: what is there is not run again, and the
            seconds up to the last trial that was begun or ended count as spent. What a trial took that was cut off is
            not counted, and the trial is run again. With a larger budget an ended search goes on, too.
        engine: "here" runs one trial after another. "ray" runs as many at a time as Ray's cluster has GPUs, or else
            cores; it needs a directory and a name or key of the model. A round then ends when all its trials have.
        progress: whether to show a progress bar with the seconds.

    Returns:
        The ranked groups with their vectors, what became of all directions, and the plan that was completed. Where the
        call is interrupted (Ctrl-C, or a notebook's stop), these are of the trials that were over.

    Raises:
        ValueError: the budget is not a positive number of seconds, the model has no edge, the directory holds results
            of another model, or another argument breaks a rule.
        FloatingPointError, ValueError, RuntimeError: no trial could be completed; it is the error of the last one.
        KeyboardInterrupt: it was interrupted before a trial was over, or with a directory, where the same call goes on
            and `gather` has what is there.

    Warns:
        UserWarning: the search was interrupted. Or a behaviour failed on a text, so that words alone made groups. Or a
            prompt is plain text although the model's tokenizer has a template for chats. Or a trial was left out, since
            activations or logits were NaN or infinite, or since its method doesn't suit the model; with a directory,
            for whatever reason. Or a group could not be scored on held-out prompts.
    """
    anything: Any = budget  # a caller may hand in what the types don't allow
    if plan is None and (not isinstance(anything, int | float) or not 0 < anything < float("inf")):
        raise ValueError(f"budget={budget!r} must be a positive number of seconds.")
    if plan is not None and not len(plan):
        raise ValueError("plan is empty: give at least one trial, or none of it (plan=None) and a budget.")
    check_methods(methods)
    check_behaviors(behaviors or {})
    where = positions_text(target_positions)
    with engine_for(model, directory, engine) as workers:
        asked = _asked(workers, prompts, max_new_tokens, target_positions)
        _warn_of_plain_text(workers, prompts)
        held_out = None if heldout is None else _asked(workers, heldout, max_new_tokens)
        search = Search(workers, asked, where, max_new_tokens, seed)
        memory = workers.ask(partial(_memory, prompts, max_new_tokens))
        with Progress(
            total=round(budget) if plan is None else None, desc="discover", unit="s", disable=not progress
        ) as bar:
            if progress:
                bar.write(f"memory that it takes: {memory}", file=sys.stderr)
            with until_interrupted(search):
                if plan is None:
                    held = SHARE_FOR_HELDOUT if heldout is not None else 0.0
                    search.clock.seconds = budget * (1 - held - SHARE_FOR_GROUPS)
                    in_rounds(search, methods, SHARE_FOR_EDGE * budget, bar)
                else:
                    as_planned(search, plan, bar)
            found, behaviors = _grouped(search, behaviors or {})
            if held_out is not None and not search.interrupted:
                bar.set_postfix_str("held-out prompts")
                ends = budget if plan is None else float("inf")
                with until_interrupted(search):
                    _score(found, search, held_out, behaviors, ends)
            if plan is None and not search.interrupted:
                bar.update(bar.total - bar.n)  # the rest of the budget is too short for anything more
    settings = {
        "budget": budget,
        "seed": seed,
        "seconds": round(search.clock.passed, 1),
        "interrupted": search.interrupted,
        "max_new_tokens": max_new_tokens,
        "target_positions": where,
        "memory": memory,
        "trials_ended": [round(seconds, 1) for seconds in search.ended],
    }
    return replace(found, settings=settings)


def _grouped(search: Search, behaviors: Mapping[str, Behavior]) -> tuple[Discovery, Mapping[str, Behavior]]:
    """Groups what was written, and says by which behaviours: by none if one of them fails on a text."""
    outcomes = search.outcomes
    try:
        return Discovery.of(outcomes, behaviors, search.edge), behaviors
    except (ValueError, RuntimeError) as error:
        if not behaviors:
            raise
        warnings.warn(f"the groups are of words alone, since a behaviour failed: {error}", stacklevel=4)
        return Discovery.of(outcomes, {}, search.edge), {}


def _asked(
    workers: Engine, prompts: Prompts, n_new_tokens: int, target_positions: Positions = slice(None)
) -> tuple[Any, ...]:
    """Returns prompts as a `Job` has them.

    Raises:
        TypeError, ValueError: the prompts, with so many new tokens, or the positions don't fit the model.
    """
    ids = workers.ask(methodcaller("tokens", prompts, target_positions, n_new_tokens))
    return ids if isinstance(prompts, Tensor | PromptBatch | AsPrompts) else tuple(as_list(prompts))


def _warn_of_plain_text(workers: Engine, prompts: Prompts) -> None:
    plain = workers.ask(methodcaller("outside_the_template", prompts))
    if plain:
        warnings.warn(
            f"prompts[{plain[0]}] is plain text, and the model's tokenizer has a template for chats: the model may go "
            'on with the text instead of answering it. A question is asked as [{"role": "user", "content": ...}].',
            stacklevel=4,
        )


def _memory(prompts: Prompts, max_new_tokens: int, bench: Bench) -> str:
    """Predicts in words what a trial of usual size holds, with the longest slice that a search takes."""
    n_layers = bench.host.n_layers
    pairs = [(arm.source_layer, arm.target_layer) for arm in arms_of(n_layers, ("melbo",))]
    source, target = max(pairs, key=lambda pair: pair[1] - pair[0])
    lengths = [len(one["ids"]) for one in bench.tokens(prompts)]
    plan = plan_memory(
        bench.host, max(lengths), source, target, n_vectors=16, n_prompts=len(lengths), max_new_tokens=max_new_tokens
    )
    return repr(plan)


def _score(
    found: Discovery, search: Search, prompts: tuple[Any, ...], behaviors: Mapping[str, Behavior], ends: float
) -> None:
    """Writes into the table how far the groups transfer to held-out prompts, the first groups first."""
    rows = {int(row.Index): row for row in found.table.itertuples()}
    began, longest = dict[int, float](), search.clock.per_row * len(prompts)

    def tasks() -> Iterator[HeldoutTask]:
        for index, row in rows.items():
            if search.clock.passed + MARGIN * longest > ends:
                return
            began[index] = search.clock.passed
            job, learned = search.outcomes[row.trial].job, found.vectors[row.trial][row.vector]
            yield HeldoutTask(index, job, int(row.vector), int(row.sign), learned, prompts, search.seed)

    ordinary, plain = found.ordinary, None
    if rows and search.clock.passed + MARGIN * longest <= ends:
        began_at = search.clock.passed
        (done,) = search.workers.run([HeldoutTask(UNSTEERED, search.outcomes[0].job, 0, 1, None, prompts, search.seed)])
        try:
            plain = done.value()
        except (FloatingPointError, ValueError, RuntimeError, MemoryError) as error:  # what was found is not to be lost
            warnings.warn(f"no group has a rate on held-out prompts: {error}", stacklevel=4)
            return
        longest = max(longest, search.clock.passed - began_at)
    for done in search.workers.run(tasks() if plain is not None else []):
        index = done.task.number
        try:
            rate = heldout_rate(done.value(), plain or [], rows[index], behaviors, ordinary)
            found.table.loc[index, "heldout_rate"] = rate
        except (FloatingPointError, ValueError, RuntimeError, MemoryError) as error:
            warnings.warn(f"group {index} has no rate on held-out prompts: {error}", stacklevel=4)
            if isinstance(error, RuntimeError | MemoryError):
                return  # memory has run out, or a device has failed
        longest = max(longest, search.clock.passed - began[index])
    if rows and not began:
        warnings.warn(
            f"no time was left to score a group on {len(prompts)} held-out prompts: give fewer of them, or a larger "
            "budget.",
            stacklevel=4,
        )
