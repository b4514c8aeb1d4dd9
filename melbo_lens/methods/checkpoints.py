"""How does a long fit survive an interrupt?  Its state is saved at intervals and on exit, and a later call goes on."""

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from melbo_lens import files
from melbo_lens.ascent.states import State
from melbo_lens.methods import version_0_1_0

KIND = "ascent"
S = TypeVar("S", bound=State)


def run(
    states: Iterable[S],
    checkpoint: str | os.PathLike[str] | None,
    settings: Mapping[str, Any],
    bar: Any,
    state: S | None = None,
    interval: float = 30.0,
) -> S:
    """Takes an ascent to its end and returns the last state.

    The last complete state is saved to `checkpoint` every `interval` seconds, at the end, and on an interrupt.

    Args:
        states: the ascent, which yields its state after each step.
        checkpoint: the file that is written; None saves nothing.
        settings: the provenance of the fit, saved beside the state.
        bar: the progress bar.
        state: the state from which the ascent goes on, if it was resumed.
        interval: the seconds between two saves.
    """
    saved = time.monotonic()
    try:
        for state in states:
            if bar.update():  # the bar was drawn; between two drawings nobody reads the mean
                bar.set_postfix_str(f"objective {_mean_objective(state):.4g}", refresh=False)
            if checkpoint is not None and time.monotonic() - saved > interval:
                files.write(checkpoint, KIND, state.tensors(), settings)
                saved = time.monotonic()
    finally:
        if checkpoint is not None and state is not None:
            files.write(checkpoint, KIND, state.tensors(), settings)
    assert state is not None  # an ascent yields a state, or it was resumed from one
    return state


def _mean_objective(state: State) -> float:
    """The mean, over the rows that have begun, of their last known objective."""
    known = state.history.nan_to_num(-1.0)
    last = torch.where(known >= 0, torch.arange(1, len(known) + 1, device=known.device)[:, None], 0).amax(0)
    begun = last > 0
    return float(known.gather(0, (last - 1).clamp(min=0)[None])[0][begun].mean()) if begun.any() else 0.0


def settings(checkpoint: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The settings of the fit to which a checkpoint belongs; none if there is no such file."""
    if checkpoint is None or not Path(checkpoint).exists():
        return {}
    return dict(files.read(Path(checkpoint), KIND)[1])


def resume(
    checkpoint: str | os.PathLike[str] | None,
    settings: Mapping[str, Any],
    kind: type[S],
    device: torch.device | str = "cpu",
) -> S | None:
    """The saved state; None if there is none yet.

    Raises:
        ValueError: the file is damaged, or belongs to a call with other arguments.
        OSError: the file's folder can't be written to; this is raised now rather than after the work.
    """
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    if not path.exists():
        if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise OSError(f"checkpoint={str(path)!r} can't be written: its folder does not exist or is not writable.")
        return None
    tensors, saved = files.read(path, KIND)
    there, here = _compared({**version_0_1_0.unsaid(saved, settings), **saved}), _compared(settings)
    differing = sorted(key for key in {*here, *there} if here.get(key) != there.get(key))
    if differing:
        pairs = ", ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in differing)
        raise ValueError(
            f"checkpoint={str(path)!r} belongs to another fit ({pairs[:600]}): use the same arguments, or another file."
        )
    return kind.of(version_0_1_0.translated(tensors, there), device)


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without our own version, since states of earlier ones go on; other packages compute the steps."""
    versions = {name: said for name, said in settings.get("versions", {}).items() if name != "melbo_lens"}
    return {**settings, "versions": versions}
