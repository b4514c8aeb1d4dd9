"""How are unsupervised steering vectors learned?  `fit_vectors`: the method of Mack and Turner's post, on slices and in batches."""

import hashlib
import time
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from melbo_lens import hooks
from melbo_lens.access import host_of
from melbo_lens.arguments import counts, public
from melbo_lens.calibration import solve_radius
from melbo_lens.methods import checkpoints
from melbo_lens.methods.gradients import default_batch_size, objective_and_gradient
from melbo_lens.methods.provenance import describe
from melbo_lens.objectives import TokenNorm, check_exponents
from melbo_lens.optimization import State, adamw, power
from melbo_lens.perturbations import SteeringVectors
from melbo_lens.prompts import Positions, Prompts, positions_text
from melbo_lens.randomness import gaussian_rows
from melbo_lens.sliced_model import SlicedModel, slice_model

DEFAULT_STEPS = {"adamw": 300, "power": 40}
DEFAULT_LR = 1e-3
Optimizer = Literal["power", "adamw"]


@public
def fit_vectors(
    model: Any,
    prompts: Prompts,
    source_layer: int,
    target_layer: int | None = None,
    n_vectors: int = 32,
    radius: float | Literal["auto"] = "auto",
    p: float = 2,
    q: float = 1,
    target_positions: Positions = slice(None),
    orthogonal: bool = True,
    optimizer: Optimizer = "power",
    n_steps: int | None = None,
    lr: float | None = None,
    init: Float[Tensor, "vector d_model"] | None = None,
    restarts: int = 1,
    token_norm: TokenNorm = "d_model",
    batch_size: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    target_hook: str | None = None,
    site: str = "mlp_out",
) -> SteeringVectors:
    """Learns vectors of norm R that, added at an early MLP output, change a later activation most.

    Maximises over ``||theta|| = R``::

        sum over prompts i of ( sum over t in I_i of || Z_i,t(theta) - Z_i,t(0) || ** p ) ** (1 / q)

    with Z the target activation and I_i the target positions. No labels are used. Model and global state are left as they were.

    Args:
        model: `HookedTransformer` or `TransformerBridge`.
        prompts: text, chat messages, a list of either, or token ids [prompt pos]. One is enough.
        source_layer: the block at whose `site` the vectors are added, at every position.
        target_layer: the change is measured in the stream entering this block (`n_layers`: leaving the last one).
        n_vectors: how many to learn. With `orthogonal`, at most d_model.
        radius: their norm R. Behaviours sit at different radii: try a few. "auto" calibrates one (`calibrate_radius`).
        p: larger ones favour a change concentrated on few positions; the post uses 2 and 4.
        q: each prompt's sum is raised to 1 / q; the post uses 1 and p.
        target_positions: where a change counts, in each prompt's own tokens: `slice(-3, None)` for the last three.
        orthogonal: each vector is orthogonal to those before it. Without it many find the same loudest direction.
        optimizer: "power", a fixed-point iteration, is fast; "adamw" is the published recipe, step by step.
        n_steps: default 40 at most for "power", which stops by tolerance, and 300 for "adamw".
        lr: of "adamw", in units of the vectors' coordinates; default 1e-3, as published.
        init: starting directions instead of random ones.
        restarts: number of random starts from which "power" keeps the best of each vector.
        token_norm: see `change_objective`.
        batch_size: rows (vector x prompt) in one forward pass. It bounds memory and changes results by rounding only; None takes about 1 GiB.
        seed: of the starting directions; that of vector k depends on (seed, k) alone.
        checkpoint: a file to which the state is saved twice a minute and on an interrupt; the same call later goes on from it.
        progress: whether to show a progress bar with the mean objective.
        target_hook: read this activation instead of a layer's stream.
        site: where in the block they are added: "mlp_out", "resid_post" (the stream that leaves it) or "attn_out".

    Returns:
        The vectors, with `history` [step vector] and every resolved setting in `provenance`.

    Raises:
        TypeError, ValueError: arguments that break a rule, said before any optimisation step.
        FloatingPointError: NaN or infinity in the activations.

    Source: Mack and Turner, "Mechanistically Eliciting Latent Behaviors in Language Models" (2024).
    """
    _check_settings(n_vectors, radius, optimizer, n_steps, lr, restarts, batch_size, init)
    check_exponents(p, q, token_norm)
    host = host_of(model)
    d_model = host.d_model
    if orthogonal and n_vectors > d_model:
        raise ValueError(
            f"n_vectors={n_vectors} can't be orthogonal in d_model={d_model} dimensions: ask for at most {d_model}, or orthogonal=False."
        )
    if init is not None and tuple(init.shape) != (n_vectors, d_model):
        raise ValueError(f"init has shape {tuple(init.shape)}, it must be [vector d_model] = ({n_vectors}, {d_model}).")
    began = time.monotonic()
    sliced = slice_model(host, prompts, source_layer, target_layer, target_positions, target_hook, site)
    with hooks.frozen(host):
        solved = solve_radius(sliced, seed=seed) if radius == "auto" else None
        settings = {
            "method": "fit_vectors",
            **describe(sliced),
            "n_vectors": n_vectors,
            "radius": solved.radius if solved else float(radius),
            "radius_rule": f"{solved.rule} {solved.target:.3g}" if solved else "given",
            "p": p,
            "q": q,
            "token_norm": token_norm,
            "target_positions": positions_text(target_positions),
            "orthogonal": orthogonal,
            "optimizer": optimizer,
            "n_steps": n_steps or DEFAULT_STEPS[optimizer],
            "lr": (lr or DEFAULT_LR) if optimizer == "adamw" else None,
            "init": None if init is None else _digest(init),
            "restarts": restarts,
            "batch_size": batch_size or default_batch_size(sliced),
            "seed": seed,
        }
        starts = torch.stack([_starts(init, n_vectors, d_model, seed, restart) for restart in range(restarts)]).to(sliced.device)
        state = _ascend(sliced, starts, settings, checkpoint, progress)
    steps = int(state["step"]) - 1 if optimizer == "power" else settings["n_steps"]
    settings |= {"status": _status(state, settings, steps), "seconds": round(time.monotonic() - began, 3)}
    return SteeringVectors(state["values"], source_layer, state["history"][: steps + 1], settings, site)


def _ascend(sliced: SlicedModel, starts: Float[Tensor, "restart vector d_model"], settings: dict, checkpoint: Any, progress: bool) -> State:
    n_vectors, n_steps = settings["n_vectors"], settings["n_steps"]
    evaluate = objective_and_gradient(sliced, settings["p"], settings["q"], settings["token_norm"], settings["batch_size"])
    radii = starts.new_full((n_vectors,), settings["radius"])
    saved = checkpoints.resume(checkpoint, settings)
    saved = None if saved is None else {name: tensor.to(sliced.device) for name, tensor in saved.items()}
    if settings["optimizer"] == "adamw":
        states = adamw(evaluate, starts[0], radii, n_steps, settings["lr"], settings["orthogonal"], saved)
        total = (n_steps + 1) * (n_vectors if settings["orthogonal"] else 1)
    else:
        states = power(evaluate, starts, radii, n_steps, settings["orthogonal"], state=saved)
        total = n_steps + 1
    label = f"layer {settings['source_layer']}, radius {settings['radius']:.3g}"
    with tqdm(total=total, desc=label, unit="step", disable=not progress) as bar:
        return checkpoints.run(states, checkpoint, settings, bar, saved)


def _starts(init: Tensor | None, n_vectors: int, d_model: int, seed: int, restart: int) -> Float[Tensor, "vector d_model"]:
    """The given directions or random ones; row k depends on (seed, k) alone, and on which restart it is for."""
    if init is not None and restart == 0:
        return init.detach().float().cpu()
    return gaussian_rows(n_vectors, d_model, "fit_vectors", seed, restart)


def _digest(init: Tensor) -> str:
    return hashlib.blake2b(init.detach().float().cpu().numpy().tobytes(), digest_size=8).hexdigest()


def _status(state: State, settings: dict, steps: int) -> str:
    if settings["optimizer"] == "adamw":
        return f"ran all {steps} steps; the last iterate is kept"
    total = settings["n_vectors"] if settings["orthogonal"] else 1
    settled = int(state["settled"])
    if settled == total:
        return f"settled after {steps} steps: every objective changed by less than .1 % in a step"
    what = f"{settled} of {total} vectors had settled" if settings["orthogonal"] else "not all vectors had settled"
    return f"stopped after {steps} steps, as n_steps says; {what}, each is the best point seen"


def _check_settings(
    n_vectors: int,
    radius: float | str,
    optimizer: str,
    n_steps: int | None,
    lr: float | None,
    restarts: int,
    batch_size: int | None,
    init: Tensor | None,
) -> None:
    counts(n_vectors=n_vectors, n_steps=n_steps, restarts=restarts, batch_size=batch_size)
    if radius != "auto" and (isinstance(radius, str) or not 0 < radius < float("inf")):
        raise ValueError(f'radius={radius!r} must be a positive, finite number, or "auto" to calibrate one.')
    if optimizer not in DEFAULT_STEPS:
        raise ValueError(f'optimizer={optimizer!r} must be "power" (fast) or "adamw" (the published recipe).')
    if lr is not None and optimizer != "adamw":
        raise ValueError(f'lr={lr} has no meaning for optimizer="power", which takes no step size: leave it out, or use "adamw".')
    if lr is not None and not 0 < lr < float("inf"):
        raise ValueError(f"lr={lr} must be a positive, finite number.")
    if restarts > 1 and optimizer != "power":
        raise ValueError(f'restarts={restarts} needs optimizer="power": the published recipe has one start.')
    if init is not None and not (torch.isfinite(init).all() and (init.norm(dim=-1) > 0).all()):
        raise ValueError("init must hold finite directions, none of them zero.")
