"""Does an interrupted fit go on where it was?"""

import pytest
import torch

import melbo_lens as ml
from melbo_lens import files
from melbo_lens.ascent.states import State
from melbo_lens.methods import checkpoints

ARGUMENTS = {"source_layer": 1, "target_layer": 3, "n_vectors": 3, "radius": 2.0, "progress": False}


class Power(Exception):
    """The lights go out."""


def fit(model, path=None, **changes):
    return ml.fit_vectors(model, "w1 w2 w3", **{**ARGUMENTS, "checkpoint": path, **changes})


def interrupted(model, path, after, error=KeyboardInterrupt, **changes):
    """Runs a fit that is broken off in its n-th pass through block 2."""
    calls = [0]

    def stop(*_):
        calls[0] += 1
        if calls[0] == after:
            raise error

    handle = model.blocks[2].register_forward_hook(stop)
    try:
        with pytest.raises(error):
            fit(model, path, **changes)
    finally:
        handle.remove()


@pytest.mark.parametrize("optimizer", ["power", "adamw"])
@pytest.mark.parametrize("after", [9, 13, 21])
def test_going_on_after_an_interrupt_equals_one_run(any_model, tmp_path, optimizer, after):
    changes = {"optimizer": optimizer, "n_steps": 25 if optimizer == "power" else 10}
    whole = fit(any_model, **changes)
    path = tmp_path / "state"
    interrupted(any_model, path, after, **changes)
    state, _ = files.read(path, checkpoints.KIND)
    assert 0 < torch.isfinite(state["history"]).sum() < whole.history.numel()  # it holds what was reached
    calls = [0]
    handle = any_model.blocks[2].register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    resumed = fit(any_model, path, **changes)
    handle.remove()
    assert torch.equal(resumed.values, whole.values) and torch.equal(resumed.history, whole.history)
    assert fit(any_model, path, **changes).values.equal(whole.values)  # a finished checkpoint is the result


def test_the_state_is_saved_at_intervals_too(model, tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(files, "write", lambda *arguments: saves.append(arguments))
    states = (State((torch.ones(1, 3),), torch.ones(2, 1), step) for step in range(5))

    class Bar:
        update = set_postfix_str = lambda *_, **__: None

    checkpoints.run(states, tmp_path / "x", {}, Bar(), interval=-1.0)
    assert len(saves) == 6


def test_a_checkpoint_of_other_arguments_is_refused(model, tmp_path):
    path = tmp_path / "state"
    interrupted(model, path, 9, Power)
    with pytest.raises(ValueError, match=r"belongs to another fit \(radius: 2.0 there, 3.0 here\)"):
        fit(model, path, radius=3.0)
    with pytest.raises(ValueError, match="init"):
        fit(model, path, init=torch.ones(3, model.cfg.d_model))


def test_a_damaged_or_unwritable_checkpoint_is_refused_before_the_work(model, tmp_path):
    (tmp_path / "state").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="truncated or no safetensors"):
        fit(model, tmp_path / "state")
    with pytest.raises(OSError, match="its folder does not exist"):
        fit(model, tmp_path / "nowhere" / "state")
