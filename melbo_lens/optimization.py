"""How does one climb on a sphere?  Two ascents that ask only for values and gradients; each yields its whole state after every step."""

import itertools
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from melbo_lens.manifolds import orthonormalize, project_off, tangent, to_sphere

Values: TypeAlias = Float[Tensor, " row"]
Rows: TypeAlias = Float[Tensor, "row d_model"]
Evaluate: TypeAlias = Callable[[Rows], tuple[Values, Rows]]  # objective and gradient of independent rows
State: TypeAlias = dict[str, Tensor]  # everything an interrupted ascent needs to go on; "values" and "history" are the result

INERTIA = 0.4  # share of the old direction in the new one
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def adamw(
    evaluate: Evaluate, start: Rows, radii: Values, n_steps: int, lr: float, orthogonal: bool = True, state: State | None = None
) -> Iterator[State]:
    """The published recipe: AdamW (betas .9 and .98, no weight decay, amsgrad) on the sphere; the last iterate is kept.

    Orthogonal vectors are learned one after another, each in the complement of those found, with a fresh optimizer; free ones all at once,
    which is the same as one by one since AdamW acts on each coordinate alone.

    Args:
        evaluate: objective and gradient of each row.
        start: starting directions.
        radii: the norm of each vector.
        n_steps: steps for each vector.
        lr: step size in units of the vectors' coordinates.
        orthogonal: whether each vector is orthogonal to those before it.
        state: a state yielded before, to go on from it.

    Yields:
        The state after each step. The last one's history is full: row t is the objective before step t, the last row that of the values.
    """
    n_vectors = len(start)
    if state is None:
        history = start.new_full((n_steps + 1, n_vectors), float("nan"))
        state = {"values": start.clone(), "history": history, "group": whole(0), "step": whole(0)}
    groups = [slice(k, k + 1) for k in range(n_vectors)] if orthogonal else [slice(0, n_vectors)]
    while int(state["group"]) < len(groups):
        number, step = int(state["group"]), int(state["step"])
        rows = groups[number]
        values, history = state["values"].clone(), state["history"].clone()
        found, radius = values[: rows.start], radii[rows]
        theta = nn.Parameter(values[rows] if step else to_sphere(project_off(values[rows], found), radius))
        optimizer = torch.optim.AdamW([theta], lr=lr, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)
        optimizer.state[theta] = {name: state[f"adamw_{name}"].clone() for name in MOMENTS} if step else moments_of(theta)
        while step <= n_steps:
            history[step, rows], gradient = evaluate(theta.detach())
            if step < n_steps:
                theta.grad = -tangent(project_off(gradient, found), theta.detach())
                optimizer.step()
                theta.data = to_sphere(project_off(theta.data, found), radius)
            step += 1
            values[rows] = theta.detach()
            moments = {f"adamw_{name}": moment.clone() for name, moment in optimizer.state[theta].items()}
            done = step > n_steps
            position = {"group": whole(number + done), "step": whole(0 if done else step)}
            # a new mapping of new tensors, so that whoever holds an earlier state holds a whole one
            state = {"values": values.clone(), "history": history.clone(), **position, **moments}
            yield state


def power(
    evaluate: Evaluate,
    starts: Float[Tensor, "restart vector d_model"],
    radii: Values,
    n_steps: int,
    orthogonal: bool = True,
    tolerance: float = 1e-3,
    state: State | None = None,
) -> Iterator[State]:
    """The fast ascent: on a sphere a maximum is a fixed point of ``theta <- R grad f / ||grad f||``, here for all rows at once.

    Orthogonal rows take their gradients orthonormalised *in order*, so that row k never depends on the rows after it, and the fixed point is
    that of learning them one after another. Part of the old direction is added each time, which damps oscillation. The first half of the
    steps moves all rows; then they are frozen in order, each at the best point that any restart has seen since the row before it was frozen,
    and the rest goes on in the complement. So a row never falls once the rows before it are frozen. A row whose objective has settled is frozen
    early.

    Args:
        evaluate: objective and gradient of each row.
        starts: starting directions; restarts are batch rows.
        radii: the norm of each vector.
        n_steps: at most so many steps.
        orthogonal: whether each vector is orthogonal to those before it; if not, every vector is a problem of its own.
        tolerance: a row has settled when its objective changes by less than this share in one step, in every restart.
        state: a state yielded before, to go on from it.

    Yields:
        The state after each evaluation. In its history a frozen row keeps its value; "settled" counts the rows frozen before their deadline.
    """
    n_restarts, n_vectors, d_model = starts.shape
    n_rows = n_vectors if orthogonal else 1  # free vectors are n_vectors problems of one row each
    radii = radii.view(-1, n_rows)
    unit = orthonormalize(starts.reshape(n_restarts, -1, n_rows, d_model))  # [restart problem row d_model]
    blocks = _blocks(n_rows, n_steps)
    state = state or _blank(unit * radii[..., None], n_steps, len(blocks[0]))
    while int(state["block"]) < len(blocks):
        number, step = int(state["block"]), int(state["step"])
        block = blocks[number]
        theta, history = state["theta"], state["history"].clone()
        active = theta[..., block.start :, :]
        value, gradient = (x.unflatten(0, active.shape[:3]) for x in evaluate(active.flatten(0, 2)))

        # The best point of the block so far, over steps and restarts.
        score = value[..., : len(block)].sum(-1)
        top, winner = score.max(0)
        better = top > state["best_score"]
        problems = torch.arange(len(top), device=top.device)
        best_score = torch.where(better, top, state["best_score"])
        best_value = torch.where(better[:, None], value[winner, problems, : len(block)], state["best_value"])
        best_theta = torch.where(better[:, None, None], active[winner, problems, : len(block)], state["best_theta"])
        rows = history[step].view(-1, n_rows)  # a view: writing to it writes the history
        rows[:, : block.start] = history[max(step - 1, 0)].view(-1, n_rows)[:, : block.start]
        rows[:, block.start :] = value.amax(0)
        rows[:, block.start : block.stop] = best_value

        settled = bool(((score - state["last_score"]).abs() <= tolerance * score.abs()).all())
        late = step >= _deadline(block[-1], n_rows, n_steps)
        freeze = settled or late
        if freeze:
            theta = torch.cat([theta[..., : block.start, :], best_theta.expand(n_restarts, -1, -1, -1), theta[..., block.stop :, :]], dim=2)
        first = block.stop if freeze else block.start
        fixed, moving = theta[..., :first, :], theta[..., first:, :]
        pull = _in_order(fixed, gradient[..., first - block.start :, :])
        moved = _in_order(fixed, pull + INERTIA * moving / radii[:, first:, None]) * radii[:, first:, None]
        if freeze:
            number += 1
            size = len(blocks[number]) if number < len(blocks) else 0
            cleared = _blank(theta, n_steps, size)
            best_score, best_value, best_theta, score = (cleared[k] for k in ("best_score", "best_value", "best_theta", "last_score"))
        state = {
            "theta": torch.cat([fixed, moved], dim=2),
            "values": torch.cat([fixed, moved], dim=2)[0].flatten(0, 1),
            "history": history,
            "best_score": best_score,
            "best_value": best_value,
            "best_theta": best_theta,
            "last_score": score,
            "block": whole(number),
            "step": whole(step + 1),
            "settled": state["settled"] + (freeze and not late) * len(block),
        }
        yield state


def moments_of(parameter: Tensor) -> State:
    """AdamW's state before its first step. torch would make one by itself, in the default dtype and on the default device."""
    zeros = [torch.zeros_like(parameter) for _ in MOMENTS[1:]]
    return {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu"), **dict(zip(MOMENTS[1:], zeros, strict=True))}


def whole(number: int) -> Tensor:
    """An integer as a state keeps it."""
    return torch.tensor(number, dtype=torch.long, device="cpu")


def _blank(theta: Float[Tensor, "restart problem row d_model"], n_steps: int, block_size: int) -> State:
    restarts, problems, n_rows, d_model = theta.shape
    return {
        "theta": theta,
        "history": theta.new_full((n_steps + 1, problems * n_rows), float("nan")),
        "best_score": theta.new_full((problems,), -1.0),
        "best_value": theta.new_zeros(problems, block_size),
        "best_theta": theta.new_zeros(problems, block_size, d_model),
        "last_score": theta.new_full((restarts, problems), float("inf")),
        "block": whole(0),
        "step": whole(0),
        "settled": whole(0),
    }


def _in_order(fixed: Tensor, rows: Tensor) -> Tensor:
    """The rows orthonormalised in order, in the complement of fixed ones."""
    return orthonormalize(torch.cat([fixed, rows], dim=-2))[..., fixed.shape[-2] :, :]


def _deadline(row: int, n_rows: int, n_steps: int) -> int:
    """The step by which a row must be frozen: the rows share the second half of the steps, and the last row takes the last."""
    return n_steps if n_rows == 1 else round(n_steps / 2 * (1 + row / (n_rows - 1)))


def _blocks(n_rows: int, n_steps: int) -> list[range]:
    """Consecutive rows with one deadline are frozen together: there are more of them than one only if rows outnumber the steps left."""
    deadlines = [_deadline(row, n_rows, n_steps) for row in range(n_rows)]
    edges = [row for row in range(n_rows) if row == 0 or deadlines[row] != deadlines[row - 1]] + [n_rows]
    return [range(a, b) for a, b in itertools.pairwise(edges)]
