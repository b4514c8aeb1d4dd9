"""What is one entry of a sweep?  A trial with its prompts and its model, as plain JSON, under a digest of its own."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import torch

from melbo_lens import organisms
from melbo_lens.arguments import count, plain_fields, plain_json, public
from melbo_lens.ascent.objectives import positions_of, positions_text
from melbo_lens.methods.provenance import fingerprint, whole_path
from melbo_lens.models.access import Model, boot, host_of
from melbo_lens.organisms import Organism
from melbo_lens.prompts import Positions, Prompts, pad
from melbo_lens.sweeps.trials import AnyTrial, trial_as, trial_from

DTYPES = ("float32", "bfloat16", "float16")


@plain_fields
@dataclass(frozen=True)
class ModelKey:
    """How a model is loaded, wherever a trial is run.

    Attributes:
        name: the name of an organism, a directory, or a name on the Hugging Face hub.
        dtype: "float32", "bfloat16" or "float16"; organisms are float32.
        device: as torch names it; None lets TransformerLens choose.
    """

    name: str
    dtype: str = "float32"
    device: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {list(DTYPES)}.")
        if self.is_organism and self.dtype != "float32":
            raise ValueError(f"dtype={self.dtype!r} is not offered for organisms, which are float32: leave it out.")

    def load(self, expected: str | None = None) -> Any:
        """Loads the model.

        Args:
            expected: the fingerprint of its weights, as the provenance of what was learned on them has it.

        Raises:
            ValueError: the model has another fingerprint, the name is almost that of an organism, or torch was built
                without the device.
        """
        try:
            torch.empty(0, dtype=torch.float32, device=self.device)
        except AssertionError as error:  # so torch says that it was built without it
            raise ValueError(f"device={self.device!r} can't be used: {error}.") from error
        organism = self.organism()
        if organism is not None:
            model = organism.model
        elif not Path(self.name).exists() and (meant := get_close_matches(self.name, organisms.names(), 1, 0.85)):
            raise ValueError(f"there is no model {self.name!r} here: did you mean the organism {meant[0]!r}?")
        else:
            model = boot(whole_path(self.name), device=self.device, dtype=getattr(torch, self.dtype))
        if expected is not None and (found := fingerprint(host_of(model))) != expected:
            raise ValueError(
                f"the weights of {self.name!r} have the fingerprint {found}, not {expected}: it is another model, or "
                "it was edited or processed after it was loaded. Load it as it was then, without this call."
            )
        return model

    @property
    def is_organism(self) -> bool:
        """Whether the name is an organism's."""
        return self.name in organisms.names()

    def organism(self) -> Organism | None:
        """Loads the organism of this name, with its prompts and detectors; None if it is another model's name."""
        if not self.is_organism:
            return None
        found = organisms.load(self.name)
        model: Any = found.model
        return found if self.device is None else replace(found, model=model.to(self.device))


# a model that is open, or how one is loaded: its name or its key
Loadable: TypeAlias = Model | ModelKey | str


@plain_fields
@dataclass(frozen=True)
class Job:
    """A trial on prompts and a model: all that decides its result but the model's weights.

    Attributes:
        trial: the trial.
        prompts: the prompts that it learns and writes on, each text, a chat, or the "ids" of tokens with their "text".
        model: how the model is loaded; None for a model that is in the caller's hands.
        target_positions: where a change counts, in each prompt's own tokens.
        max_new_tokens: the length of the completions.
    """

    trial: AnyTrial
    prompts: tuple[Any, ...]
    model: ModelKey | None
    target_positions: str = "slice(-1, None, None)"
    max_new_tokens: int = 16

    def as_json(self) -> dict[str, Any]:
        """Describes the job in JSON's types; `job_from` makes it again."""
        return {
            "trial": trial_as(self.trial),
            "prompts": plain_json(self.prompts, "prompts"),
            "model": None if self.model is None else asdict(self.model),
            "target_positions": self.target_positions,
            "max_new_tokens": self.max_new_tokens,
        }

    def digest(self, fingerprint: str) -> str:
        """Returns the name of the job's result: a digest of all that changes it, the model's weights included.

        Where the model lies and from which place it was loaded changes nothing, and is left out.
        """
        said = self.as_json()
        said["model"] = None if self.model is None else self.model.dtype
        text = json.dumps([said, fingerprint], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def as_prompts(prompts: Sequence[Any]) -> Prompts:
    """Returns a job's prompts as a model's calls take them."""
    if all(isinstance(prompt, Mapping) for prompt in prompts):
        return pad([list(prompt["ids"]) for prompt in prompts], [prompt["text"] for prompt in prompts])
    return [*prompts]


def job_from(said: Mapping[str, Any]) -> Job:
    """Makes the job that `Job.as_json` described."""
    return Job(
        trial_from(said["trial"]),
        tuple(said["prompts"]),
        None if said["model"] is None else ModelKey(**said["model"]),
        said["target_positions"],
        said["max_new_tokens"],
    )


@public
def plan_jobs(
    model: str | ModelKey,
    trials: Sequence[AnyTrial],
    prompts: Sequence[Any],
    *,
    together: bool = False,
    target_positions: Positions = slice(-1, None),
    max_new_tokens: int = 16,
) -> list[Job]:
    """Makes the plan of a sweep: every trial on every prompt.

    Args:
        model: the name of an organism, a directory, a name on the Hugging Face hub, or a `ModelKey`.
        trials: what is tried.
        prompts: texts or chats, each of which is a case of its own; a single one is one case.
        together: whether a trial learns on all prompts at once instead.
        target_positions: where a change counts, in each prompt's own tokens.
        max_new_tokens: the length of the completions.

    Returns:
        A job for each trial on each prompt, or on all of them.

    Raises:
        ValueError: there is no trial or no prompt, or a setting breaks a rule.
    """
    if not trials or not prompts:
        raise ValueError("a sweep needs at least one trial and one prompt.")
    first = prompts[0]
    alone = isinstance(prompts, str) or (isinstance(first, Mapping) and "role" in first)  # one text, or one chat
    each: list[Any] = [prompts] if alone else list(prompts)
    for prompt in each:
        if not prompt or isinstance(prompt, bytes) or not isinstance(prompt, str | Sequence | Mapping):
            raise ValueError(f"{prompt!r} is no prompt: give texts, or chats as lists of messages.")
    count("max_new_tokens", max_new_tokens)
    key = model if isinstance(model, ModelKey) else ModelKey(model)
    cases = [tuple(each)] if together else [(prompt,) for prompt in each]
    where = positions_text(target_positions)
    return [Job(trial, case, key, where, max_new_tokens) for case in cases for trial in trials]


def jobs_of(said: Mapping[str, Any]) -> list[Job]:
    """Makes the plan that a file describes.

    It has "model" (and "dtype", "device"), "prompts", "trials", and the settings of `plan_jobs`. Each entry of the
    trials has a "kind" and its settings; a setting that is a list stands for a trial for each of its values, in every
    combination.

    Raises:
        ValueError: the file lacks something, or says something unknown.
    """
    if not isinstance(said, Mapping):
        raise ValueError(f"a plan is a mapping with model, prompts and trials; got {type(said).__name__}.")
    known = {"model", "dtype", "device", "prompts", "trials", "together", "target_positions", "max_new_tokens"}
    unknown = sorted(set(said) - known)
    missing = sorted({"model", "prompts", "trials"} - set(said))
    if unknown or missing:
        raise ValueError(
            f"a plan knows no {unknown}: choose from {sorted(known)}." if unknown else f"the plan lacks {missing}."
        )
    entries = said["trials"]
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError("a plan's trials are a list of mappings, each with a kind and its settings.")
    trials = [trial_from(one) for entry in entries for one in _combinations(entry)]
    if not isinstance(said["prompts"], str | list):
        raise ValueError(f"a plan's prompts must be a text, a chat, or a list of either; got {said['prompts']!r}.")
    key = ModelKey(said["model"], said.get("dtype", "float32"), said.get("device"))
    settings = {name: said[name] for name in ("together", "max_new_tokens") if name in said}
    if "target_positions" in said:
        where = said["target_positions"]
        # a number alone is neither a slice nor a list, which its reader says
        settings["target_positions"] = positions_of(str(list(where)) if isinstance(where, list | range) else str(where))
    return plan_jobs(key, trials, said["prompts"], **settings)


def _combinations(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns an entry for each combination of the values of its lists; sets of prompts stay whole."""
    names = [name for name, value in entry.items() if isinstance(value, list) and name not in ("positive", "negative")]
    return [
        {**entry, **dict(zip(names, values, strict=True))}
        for values in itertools.product(*(entry[name] for name in names))
    ]
