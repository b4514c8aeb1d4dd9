"""How does the published recipe climb?  AdamW, projected back into the constraint after every step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from melbo_lens.ascent.constraints import Constraint
from melbo_lens.ascent.states import Evaluate, Point, State

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@dataclass(frozen=True, eq=False)
class Descent(State):
    """The state of `adamw`.

    Attributes:
        group: the number of the rows that climb, all of them at the end; `step` counts the steps of this group.
        exp_avg, exp_avg_sq, max_exp_avg_sq: the moments of these rows.
    """

    group: int
    exp_avg: Point
    exp_avg_sq: Point
    max_exp_avg_sq: Point


def adamw(
    evaluate: Evaluate, start: Point, constraint: Constraint, n_steps: int, lr: float, state: Descent | None = None
) -> Iterator[Descent]:
    """AdamW (betas .9 and .98, no weight decay, amsgrad) within a constraint; the last iterate is kept.

    Orthogonal vectors are learned one after another, each in the complement of those found, with a fresh optimizer. Others are learned all at
    once, which is the same as one by one since AdamW acts on each coordinate alone.

    Args:
        evaluate: the function to climb.
        start: starting rows, [row ...] each, moved into the constraint before the first step.
        constraint: where they stay.
        n_steps: steps of each group of rows.
        lr: step size in units of the rows' entries.
        state: a state yielded before, to go on from it.

    Yields:
        The state after each step.
    """
    n_rows = len(start[0])
    if state is None:
        history = start[0].new_full((n_steps + 1, n_rows), float("nan"))
        state = Descent(tuple(x.clone() for x in start), history, 0, 0, (), (), ())
    for rows in constraint.groups(n_rows)[state.group :]:
        at = slice(rows.start, rows.stop)
        found = tuple(x[None, : rows.start] for x in state.point)
        first = tuple(x[at].clone() for x in state.point)  # the optimizer writes into its parameters
        moving = [nn.Parameter(x) for x in (first if state.step else _one(constraint.project(_many(first), found)))]
        optimizer = _optimizer(moving, lr, state)
        for step in range(state.step, n_steps + 1):
            here = tuple(x.detach() for x in moving)
            seen = evaluate(
                tuple(torch.cat([old, x[None]], dim=1) for old, x in zip(found, here, strict=True)), rows.start
            )
            if step < n_steps:
                ascents = constraint.tangent(seen.gradient, _many(here), found)
                for x, ascent in zip(moving, ascents, strict=True):
                    x.grad = -ascent[0]
                optimizer.step()
                for x, projected in zip(
                    moving, constraint.project(_many(tuple(x.detach() for x in moving)), found), strict=True
                ):
                    x.data = projected[0]
            history = state.history.clone()
            history[step, at] = seen.value[0]
            point = tuple(
                torch.cat([x[: rows.start], new.detach(), x[rows.stop :]])
                for x, new in zip(state.point, moving, strict=True)
            )
            moments = {name: tuple(optimizer.state[x][name].clone() for x in moving) for name in MOMENTS}
            state = replace(state, point=point, history=history, step=step + 1, **moments)
            if step == n_steps:
                state = replace(state, group=state.group + 1, step=0)
            yield state


def _optimizer(moving: list[nn.Parameter], lr: float, state: Descent) -> torch.optim.AdamW:
    """AdamW as it was after so many steps. torch would make the first moments by itself, in the default dtype and on the default device."""
    optimizer = torch.optim.AdamW(moving, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)
    for i, x in enumerate(moving):
        moments = {name: getattr(state, name)[i].clone() if state.step else torch.zeros_like(x) for name in MOMENTS}
        optimizer.state[x] = {"step": torch.tensor(float(state.step), dtype=torch.float32, device="cpu"), **moments}
    return optimizer


def _many(rows: Point) -> Point:
    """The rows of one start, as a constraint takes them: [restart row ...]."""
    return tuple(x[None] for x in rows)


def _one(rows: Point) -> Point:
    return tuple(x[0] for x in rows)
