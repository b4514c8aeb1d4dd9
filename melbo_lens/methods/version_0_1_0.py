"""How are earlier checkpoints read?  Those of version 0.1.0 are renamed, since its four ascents used other names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from melbo_lens.ascent.adamw import MOMENTS
from melbo_lens.ascent.constraints import OrderedRows
from melbo_lens.ascent.fixed_point import unslowed

# Settings that version 0.1.0 did not record, because there was no choice.
UNSAID: dict[str, dict[str, Any]] = {
    "fit_vectors": {"site": "mlp_out", "diversity": 0.0},
    "fit_adapters": {"site": "mlp", "init": None, "restarts": 1},
}


def unsaid(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a checkpoint of that version lacks; what it did not measure is as it is now."""
    measured = {name: settings[name] for name in ("stream_norm", "fingerprint") if name in settings}
    return UNSAID.get(saved.get("method", ""), {}) | measured


def translated(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under the names that they have now."""
    if "theta" in tensors:
        return _unslowed(_power(tensors, settings))
    if "scores" in tensors:
        return _unslowed(_alternate(tensors, settings))
    if "moving.0" in tensors and "inertia" not in tensors:  # a later state, before rows were slowed
        return _unslowed(tensors)
    if "adamw_exp_avg" in tensors:
        moments = {f"{name}.0": tensors[f"adamw_{name}"] for name in MOMENTS}
        return {
            "point.0": tensors["values"],
            **moments,
            **{name: tensors[name] for name in ("history", "group", "step")},
        }
    if "step.0" in tensors:
        ended = int(tensors["step"]) > settings["n_steps"]
        return {**tensors, "group": _whole(int(ended)), "step": _whole(0) if ended else tensors["step"]}
    return dict(tensors)


def _unslowed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a "power" ascent in which no row has been slowed."""
    return {**tensors, "inertia": unslowed((tensors["moving.0"],))}


def _power(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of a "power" ascent of vectors, which gave each problem an axis and kept its best points separately."""
    moving, number = tensors["theta"].flatten(1, 2), int(tensors["block"])
    n_rows, best = moving.shape[1], tensors["best_score"]
    point, seen = moving[0].clone(), best >= 0
    settled = tensors["settled"]
    if settings["orthogonal"]:
        blocks = OrderedRows(moving.new_ones(n_rows)).blocks(n_rows, settings["n_steps"])
        if number < len(blocks) and seen.all():
            point[blocks[number].start : blocks[number].stop] = tensors["best_theta"][0]
    else:
        settled = settled * n_rows
        if number == 0:
            point[seen] = tensors["best_theta"][seen, 0]
    last = tensors["last_score"][None]
    known = {
        "best": torch.where(seen, best, -torch.inf),
        "recent": torch.where(last.isinf(), torch.nan, last),
        "settled": settled,
    }
    return {
        "point.0": point,
        "moving.0": moving,
        "dry.0": moving,
        **known,
        **{name: tensors[name] for name in ("history", "block", "step")},
    }


def _alternate(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of a "power" ascent of adapters, which had no restarts and kept the best scores of every step."""
    step, settled, scores = int(tensors["step"]), int(tensors["settled"]), tensors["scores"]
    recent = torch.cat([scores.new_full((10, scores.shape[1]), torch.nan), scores[:step]])[-10:]
    point = {name: tensor for name, tensor in tensors.items() if name.startswith("point.")}
    moving = {name: tensor[None] for name, tensor in tensors.items() if name.startswith("moving.")}
    moving |= {name.replace("moving", "dry"): tensor for name, tensor in moving.items()}
    known = {
        "best": scores[step - 1],
        "recent": recent[:, None],
        "history": tensors["history"],
        "step": tensors["step"],
    }
    position = {
        "settled": _whole(settled * scores.shape[1]),
        "block": _whole(int(settled or step > settings["n_steps"])),
    }
    return {**point, **moving, **known, **position}


def _whole(number: int) -> Tensor:
    return torch.tensor(number, dtype=torch.long, device="cpu")
