"""How does one climb fast?  By iterating the condition that holds at a maximum.

There, the point is the one that its own gradient asks for.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from melbo_lens.ascent.constraints import INERTIA, Block, Constraint, Inertia
from melbo_lens.ascent.states import Evaluate, Point, State, check_finite

TOLERANCE = 1e-3
SLOWER, FASTER = 2.0, 0.9  # what a row's inertia is multiplied by where the row would turn back, and elsewhere
HEAVIEST = 32.0  # the largest inertia
AT_EASE = 5  # steps in which no row is slowed: a few large steps keep rows diverse, and make no cycle yet


@dataclass(frozen=True, eq=False)
class Climb(State):
    """The state of `fixed_point`.

    Attributes:
        moving: where every restart stands, [restart row ...] each; `point` holds the frozen rows, and of each other row
            the best that was seen.
        inertia: the share of its old direction that each row keeps.
        dry: the last of these points at which a row did not run into a sink; NaN before there is one.
        best: the best score of each problem in the block that is frozen next; a joint block is one problem, otherwise
            each row is one.
        recent: the scores of the last steps that count towards settling, NaN before the first step.
        block: the number of the block that is frozen next.
        settled: how many rows were frozen before their deadline.
    """

    moving: Point
    inertia: Inertia
    dry: Point
    best: Float[Tensor, " problem"]
    recent: Float[Tensor, "patience restart problem"]
    block: int
    settled: int


def fixed_point(
    evaluate: Evaluate,
    starts: Point,
    constraint: Constraint,
    n_steps: int,
    tolerance: float = TOLERANCE,
    state: Climb | None = None,
) -> Iterator[Climb]:
    """The fast ascent: each step moves to the point that maximises the linearised objective, for all rows at once.

    On a sphere that is ``theta <- R grad f / ||grad f||``. Orthogonal rows take their gradients orthonormalised *in
    order*, so the fixed point is the same as for learning them one after another. A part of the old point is added each
    time, and after a few steps a larger one by a row that would turn back on the way it came, which damps oscillation.
    Rows are frozen block by block, each at the best point that any restart has seen since the previous block was
    frozen, and the other rows go on in the complement. So a row never falls once the rows before it are frozen. A block
    that has settled is frozen early.

    Args:
        evaluate: the function to climb.
        starts: the starting rows, [restart row ...] each.
        constraint: the set in which the rows stay.
        n_steps: the largest number of steps.
        tolerance: a block has settled when its score changes by less than this share within the constraint's patience,
            in every restart.
        state: a state that was yielded earlier, from which the ascent goes on.

    Yields:
        The state after each evaluation. In its history, a frozen row keeps its value.

    Raises:
        FloatingPointError: an objective or a gradient is NaN or infinite.
    """
    n_rows = starts[0].shape[1]
    blocks = constraint.blocks(n_rows, n_steps)
    climb = state or _begun(
        constraint.project(starts, tuple(x[:, :0] for x in starts)), blocks[0], constraint.patience, n_steps
    )
    while climb.block < len(blocks):
        block = blocks[climb.block]
        active = tuple(x[:, block.start :] for x in climb.moving)
        seen = evaluate(climb.moving, block.start)
        sunk = torch.zeros_like(seen.value, dtype=torch.bool) if seen.sunk is None else seen.sunk
        can_go_back = sunk & ~climb.dry[0][:, block.start :].flatten(2).isnan().any(-1)
        check_finite(climb.step, (seen.value, seen.score, *seen.gradient), block.start, spared=can_go_back)

        # as its negative, a score in a sink is worse than any other, and the mildest sink is the best of them
        score = torch.where(sunk, -seen.score.nan_to_num(torch.inf), seen.score)[:, : len(block)]
        score = score.sum(1, keepdim=True) if block.joint else score  # [restart problem]
        top, winner = score.max(0)
        better = top > climb.best
        rows = torch.arange(len(block), device=top.device)
        improved, winners = better.expand(len(block)), winner.expand(len(block))
        best = [
            _where(improved, x[winners, rows], old[block.start : block.stop])
            for x, old in zip(active, climb.point, strict=True)
        ]
        history = climb.history.clone()
        before = history[max(climb.step - 1, 0)]
        history[climb.step, : block.start] = before[: block.start]
        ahead_of = torch.where(sunk, -seen.value, seen.value)[:, len(block) :].amax(0)
        history[climb.step, block.stop :] = torch.where(
            (ahead_of >= 0) | before[block.stop :].isnan(), ahead_of.abs(), before[block.stop :]
        )
        history[climb.step, block.start : block.stop] = torch.where(
            improved, seen.value[winners, rows], before[block.start : block.stop]
        )

        # With patience, the best recent score counts, since scores fall and rise again while factors take turns.
        latest = torch.fmax(score, climb.recent[-1]) if constraint.patience > 1 else score
        # a row that was slowed moves so much less
        stride = (1 + INERTIA) / (1 + climb.inertia[:, block.start : block.stop])
        stride = stride.amin(1, keepdim=True) if block.joint else stride
        settled = bool(((latest - climb.recent[0]).abs() <= tolerance * stride * latest.abs()).all())
        late = climb.step >= block.deadline
        frozen = block.stop if settled or late else block.start
        dry, here, pull = climb.moving, active, seen.gradient
        if sunk.any():
            dry, here, pull = _out_of_sinks(sunk, climb, active, seen.gradient, constraint)
        still = tuple(
            torch.cat([x[:, : block.start], kept.expand(len(x), *kept.shape)], dim=1)[:, :frozen]
            for x, kept in zip(climb.moving, best, strict=True)
        )
        ahead = tuple(x[:, frozen - block.start :] for x in here)
        along = tuple(x[:, frozen - block.start :] for x in pull)
        moved, inertia = ahead, climb.inertia[:, frozen:]
        if frozen < n_rows:
            moved = constraint.pulled(ahead, along, still, climb.step, inertia)
        if frozen < n_rows and climb.step >= AT_EASE and constraint.patience == 1:  # factors take turns by themselves
            came = tuple(x[:, frozen:] for x in climb.dry)
            slowed = _slowed(inertia, came, ahead, moved, sunk[:, frozen - block.start :])
            if not torch.equal(slowed, inertia):
                inertia, moved = slowed, constraint.pulled(ahead, along, still, climb.step, slowed)
        moving = tuple(torch.cat(pair, dim=1) for pair in zip(still, moved, strict=True))
        rest = [x[0, block.stop :] for x in moving]
        point = tuple(
            torch.cat([old[: block.start], kept, others])
            for old, kept, others in zip(climb.point, best, rest, strict=True)
        )
        inertia = torch.cat([climb.inertia[:, :frozen], inertia], dim=1)
        climb = replace(climb, history=history, step=climb.step + 1, point=point)
        climb = replace(climb, moving=moving, inertia=inertia, dry=dry)
        if frozen == block.start:
            top, recent = torch.where(better, top, climb.best), torch.cat([climb.recent[1:], latest[None]])
            climb = replace(climb, best=top, recent=recent)
        else:
            following = blocks[climb.block + 1] if climb.block + 1 < len(blocks) else None
            top, recent = _unseen(moving[0], following, constraint.patience)
            n_settled = climb.settled + (0 if late else len(block))
            climb = replace(climb, best=top, recent=recent, block=climb.block + 1, settled=n_settled)
        yield climb


def _slowed(inertia: Inertia, came: Point, rows: Point, moved: Point, sunk: Bool[Tensor, "restart row"]) -> Inertia:
    """The inertia of the rows for this step; `came` is where they stood before.

    It grows where a row would turn back on the way that it came, and falls elsewhere. If it stayed the same, such a row
    might jump to and fro across the top for ever. A row in a sink goes back for another reason.
    """
    turn = torch.zeros_like(inertia)
    for old, here, new in zip(came, rows, moved, strict=True):
        turn += ((here - old) * (new - here)).flatten(2).sum(-1)
    return torch.where((turn < 0) & ~sunk, SLOWER * inertia, FASTER * inertia).clamp(INERTIA, HEAVIEST)


def _out_of_sinks(
    sunk: Bool[Tensor, "restart row"], climb: Climb, active: Point, gradient: Point, constraint: Constraint
) -> tuple[Point, Point, Point]:
    """Takes the rows that run into a sink half of the way back to where they last did not.

    Returns:
        `Climb.dry`, then the active rows' points and gradients from which the step goes on. A row that goes back has
        its point as its gradient, so that it stays there.
    """
    first = climb.dry[0].shape[1] - active[0].shape[1]
    dry = tuple(
        torch.cat([old[:, :first], _where(~sunk, x, old[:, first:])], dim=1)
        for x, old in zip(active, climb.dry, strict=True)
    )
    leaving = sunk & ~dry[0][:, first:].flatten(2).isnan().any(-1)
    between = tuple(_where(leaving, (x + last[:, first:]) / 2, x) for x, last in zip(active, dry, strict=True))
    back = constraint.project(between, tuple(x[:, :first] for x in climb.moving))
    here, pull = (
        tuple(_where(leaving, half, x) for half, x in zip(back, ordinary, strict=True))
        for ordinary in (active, gradient)
    )
    return dry, here, pull


def _begun(starts: Point, block: Block, patience: int, n_steps: int) -> Climb:
    history = starts[0].new_full((n_steps + 1, starts[0].shape[1]), float("nan"))
    best, recent = _unseen(starts[0], block, patience)
    dry, inertia = tuple(torch.full_like(x, float("nan")) for x in starts), unslowed(starts)
    point = tuple(x[0] for x in starts)
    return Climb(point, history, 0, starts, inertia, dry, best, recent, block=0, settled=0)


def unslowed(rows: Point) -> Inertia:
    """The inertia of rows [restart row ...] at the start."""
    return rows[0].new_full(rows[0].shape[:2], INERTIA)


def _unseen(like: Tensor, block: Block | None, patience: int) -> tuple[Tensor, Tensor]:
    """Returns `best` and `recent` of a block of which nothing was evaluated yet."""
    problems = 0 if block is None else 1 if block.joint else len(block)
    return like.new_full((problems,), -torch.inf), like.new_full((patience, len(like), problems), torch.nan)


def _where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Takes the new rows where `rows` is true, and the old ones elsewhere."""
    return torch.where(rows.view(*rows.shape, *[1] * (new.ndim - rows.ndim)), new, old)
