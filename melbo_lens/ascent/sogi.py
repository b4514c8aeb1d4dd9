"""How do many rows climb at once and stay apart?  Each jumps to its own gradient, then the rows repel each other."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.ascent.manifolds import unit
from melbo_lens.ascent.states import Point, State, check_finite

# From rows [row ...] and directions of the target [row d_target], or None for the directions of the changes themselves,
# to the rows' mean changes and the gradients of their components along these directions.
MeanChange: TypeAlias = Callable[[Point, Tensor | None], tuple[Tensor, Point]]
Spread: TypeAlias = Callable[[Point], Point]  # from gradients to the next rows, which it keeps apart


@dataclass(frozen=True, eq=False)
class Swarm(State):
    """The state of `sogi`.

    Attributes:
        targets: the unit direction in which each row changes the target.
    """

    targets: Float[Tensor, "row d_target"]


def sogi(
    changes: MeanChange,
    start: Point,
    targets: Float[Tensor, "row d_target"],
    spread: Spread,
    n_steps: int,
    directed: bool,
    state: Swarm | None = None,
) -> Iterator[Swarm]:
    """Climbs by "soft orthogonal gradient iteration": a step has no size, and the last iterate is kept.

    With Delta the mean change of the target, a step is ``u <- Delta(phi) / ||Delta(phi)||`` and
    ``phi <- spread(gradient of <u, Delta(phi)>)``. If `directed`, the gradient is taken with the u of the step before;
    otherwise with the new one, which makes it the gradient of ``||Delta(phi)||``.

    Args:
        changes: the function that is climbed.
        start: the starting rows, [row ...] each.
        targets: the starting directions u, which matter only if `directed`.
        spread: makes the next rows from the gradients.
        n_steps: the number of steps.
        directed: which u the gradient is taken with.
        state: a state that was yielded earlier, from which the ascent goes on.

    Yields:
        The state after each evaluation. Its history has ``<u, Delta>`` with that u, and after the last step its
        targets belong to its point.

    Raises:
        FloatingPointError: a row changes the target by NaN or infinity.

    Source: Mack, Panickssery and Turner, "Causal Perturbative Elicitation" (2026), algorithm 1, and its public code.
    """
    if state is None:
        history = start[0].new_full((n_steps + 1, len(start[0])), float("nan"))
        state = Swarm(start, history, 0, targets)
    for step in range(state.step, n_steps + 1):
        means, gradient = changes(state.point, state.targets if directed else None)
        check_finite(step, [x[None] for x in (means, *gradient)])
        new_targets, history = unit(means), state.history.clone()
        history[step] = (means * (state.targets if directed else new_targets)).sum(-1)
        point = spread(gradient) if step < n_steps else state.point
        state = replace(state, point=point, history=history, step=step + 1, targets=new_targets)
        yield state


def soft_orthogonalize(
    rows: Float[Tensor, "row dim"],
    log_weights: Float[Tensor, " row"],
    project: Callable[[Tensor], Tensor],
    n_iterations: int = 10,
    temperature: float = 1.0,
) -> Float[Tensor, "row dim"]:
    """Subtracts from each row, again and again, a mean of the others that weighs those most that are most like it.

    An iteration projects the rows and then computes, with S_ii = -infinity:

        S_ij = <row_i, row_j> / temperature + log_weights_j,    row_i <- row_i - sum_j softmax_j(S_i)_j row_j

    Of two rows each has the other as its mean, so that they end as opposites.

    Args:
        rows: the rows.
        log_weights: how strongly each row repels the others: the logarithms of the norms of their gradients.
        project: scales rows to the set in which they live; the rows are projected once more at the end.
        n_iterations: the number of iterations.
        temperature: a lower one concentrates on the most similar rows.

    Source: as `sogi`, algorithm 2.
    """
    if len(rows) < 2:
        return project(rows)
    alone = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    for _ in range(n_iterations):
        rows = project(rows)
        similar = (rows @ rows.T / temperature + log_weights).masked_fill(alone, -torch.inf)
        rows = rows - similar.softmax(-1) @ rows
    return project(rows)
