"""How does one climb on a sphere?  Two ascents that ask only for values and gradients; each yields its whole state after every step."""

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

MOMENTUM, MOST_MOMENTUM = 1.0, 16.0


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
        The state after each step; the last one's `history` is full: row t holds the objective before step t, the last row that of `values`.
    """
    n_vectors = len(start)
    groups = [slice(k, k + 1) for k in range(n_vectors)] if orthogonal else [slice(0, n_vectors)]
    state = dict(state) if state else _blank(start, n_steps)
    first, first_step = int(state["group"]), int(state["step"])
    for number, rows in enumerate(groups[first:], first):
        found, radius = state["values"][: rows.start if orthogonal else 0], radii[rows]
        if first_step == 0:
            state["values"] = _put(state["values"], rows, to_sphere(project_off(state["values"][rows], found), radius))
        theta = nn.Parameter(state["values"][rows].clone())
        optimizer = torch.optim.AdamW([theta], lr=lr, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)
        if first_step:
            names = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
            optimizer.state[theta] = {name: state[f"adamw_{name}"].clone() for name in names}
        for step in range(first_step, n_steps + 1):
            value, gradient = evaluate(theta.detach())
            state["history"][step, rows] = value
            if step < n_steps:
                theta.grad = -tangent(project_off(gradient, found), theta.detach())
                optimizer.step()
                theta.data = to_sphere(project_off(theta.data, found), radius)
                state |= {f"adamw_{name}": moment.clone() for name, moment in optimizer.state[theta].items()}
            state["values"] = _put(state["values"], rows, theta.detach())
            state |= {"group": torch.tensor(number), "step": torch.tensor(step + 1)}
            if step == n_steps:
                state |= {"group": torch.tensor(number + 1), "step": torch.tensor(0)}
            yield state
        first_step = 0


def _blank(start: Rows, n_steps: int) -> State:
    history = start.new_full((n_steps + 1, len(start)), float("nan"))
    return {"values": start.clone(), "history": history, "group": torch.tensor(0), "step": torch.tensor(0)}


def _put(values: Rows, rows: slice, new: Rows) -> Rows:
    values = values.clone()
    values[rows] = new
    return values
