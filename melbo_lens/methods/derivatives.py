"""What does a slice do to the smallest perturbations?  Its first and second derivatives at 0 say it, exactly."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from melbo_lens.ascent.manifolds import linalg, orthonormalize, unit
from melbo_lens.ascent.objectives import Objective
from melbo_lens.ascent.states import State
from melbo_lens.methods.mean_change import MeanChange, mean_weights
from melbo_lens.methods.problem import Problem, bias
from melbo_lens.models.slices import SlicedModel
from melbo_lens.progress import Progress


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Makes attention use kernels whose gradients can be differentiated again."""
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        yield


def singular(
    sliced: SlicedModel, n: int, batch_size: int
) -> tuple[Float[Tensor, "factor d_model"], Float[Tensor, "factor d_target"], Float[Tensor, " factor"]]:
    """Computes the largest singular values of the Jacobian of the mean change, and both their singular vectors.

    Returns:
        The right singular vectors, the left ones, and the values, the largest first.
    """
    exact = sliced.in_float32()
    changes = MeanChange(Problem(exact, bias(exact), Objective().value, batch_size))
    every = torch.eye(exact.target.shape[-1], dtype=torch.float32, device=exact.device)
    _, (jacobian,) = changes((every.new_zeros(len(every), exact.d_model),), every)  # row i is J^T e_i
    left, values, right = linalg.svd(_finite(jacobian), full_matrices=False)
    return right[:n], left[:, :n].mT, values[:n]


def quadratic(
    sliced: SlicedModel, start: Float[Tensor, "factor d_model"], n_steps: int, batch_size: int, progress: bool
) -> tuple[Float[Tensor, "factor d_model"], Float[Tensor, "factor d_target"], Float[Tensor, " factor"]]:
    """Finds factors of the second derivative H of the mean change, ``H(v, v) ~ sum_l alpha_l <v_l, v>^2 u_l``.

    A step is ``u <- H(v, v)``, normalised, and ``v <- H_u v``, orthogonalised in order.

    Returns:
        The v, the u, and the strengths ``<u, H(v, v)>``, which are not negative.
    """
    exact, v = sliced.in_float32(), start
    u = second(exact, v, v.new_zeros(len(v), exact.target.shape[-1]), batch_size)[0]
    for _ in Progress(range(n_steps), desc="second derivatives", unit="step", disable=not progress):
        v = orthonormalize(second(exact, v, unit(u), batch_size)[1])
        u = second(exact, v, u, batch_size)[0]
    return v, unit(u), u.norm(dim=1)


def second(
    sliced: SlicedModel, v: Float[Tensor, "row d_model"], u: Float[Tensor, "row d_target"], batch_size: int
) -> tuple[Float[Tensor, "row d_target"], Float[Tensor, "row d_model"]]:
    """Computes H(v, v) and H_u v of each row, one row at a time, since third derivatives keep much.

    With g(theta) the gradient of <u, Delta(theta)>, H_u v is the gradient of <g, v>; and <H_u v, v> is linear in u, so
    that its gradient by u is H(v, v). Both are sums over the prompts, of which `batch_size` run at once.
    """
    weights = mean_weights(sliced)[..., None]
    along, curved = v.new_zeros(len(v), u.shape[1]), torch.zeros_like(v)
    for k, (direction, target) in enumerate(zip(v, u, strict=True)):
        for prompts in sliced.everyone.split(max(1, batch_size)):
            with twice_differentiable():
                theta, leaf = torch.zeros_like(direction).requires_grad_(), target.clone().requires_grad_()
                change = sliced.change(theta.expand(len(prompts), -1), prompts)
                mean = (change * weights[prompts]).sum((0, 1))
                (first,) = torch.autograd.grad(mean @ leaf, theta, create_graph=True)
                (hessian,) = torch.autograd.grad(first @ direction, theta, create_graph=True)
                (both,) = torch.autograd.grad(hessian @ direction, leaf)
            along[k] += both.detach()
            curved[k] += hessian.detach()
    return _finite(along), _finite(curved)


def products(
    sliced: SlicedModel, v: Float[Tensor, "row d_model"], batch_size: int
) -> tuple[Float[Tensor, "row prompt pos d_target"], Float[Tensor, "row d_model"]]:
    """Computes J v and J^T J v of each row, J the Jacobian at the target positions of all prompts.

    J^T w is the gradient of <w, change>, and <J^T w, v> is linear in w, so that its gradient by w is J v. J^T J v is a
    sum over the prompts. At most `batch_size` rows, of a vector and a prompt each, run at once.
    """
    mask = sliced.batch.target_mask[..., None]
    at_once = max(1, batch_size)
    forward, back = [], torch.zeros_like(v)
    for prompts in sliced.everyone.split(at_once):
        parts: list[Tensor] = []
        for k in range(0, len(v), max(1, at_once // len(prompts))):
            rows = v[k : k + max(1, at_once // len(prompts))]
            with twice_differentiable():
                theta = torch.zeros_like(rows).requires_grad_()
                change = sliced.change(theta.repeat_interleave(len(prompts), 0), prompts.repeat(len(rows)))
                change = change.unflatten(0, (len(rows), -1)) * mask[prompts]
                w = torch.zeros_like(change).requires_grad_()
                (pulled,) = torch.autograd.grad(change, theta, w, create_graph=True)
                (along,) = torch.autograd.grad(pulled, w, rows, retain_graph=True)
                (again,) = torch.autograd.grad(change, theta, along)
            parts.append(along.detach())
            back[k : k + len(rows)] += again.detach()
        forward.append(torch.cat(parts))
    return _finite(torch.cat(forward, dim=1)), _finite(back)


def _finite(found: Tensor) -> Tensor:
    """Returns derivatives that are finite.

    Raises:
        FloatingPointError: one is NaN or infinite.
    """
    if not torch.isfinite(found).all():
        raise FloatingPointError(
            "a derivative of the slice is NaN or infinite: choose layers that are nearer to each other, a shorter "
            "prompt, or a model in float32."
        )
    return found


def reached(values: Float[Tensor, "row d_model"]) -> State:
    """Returns rows that no ascent made as the end of one, with an empty history."""
    return State((values,), values.new_zeros(0, len(values)), 0)
