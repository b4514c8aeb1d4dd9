"""What are the objective and its gradient for many perturbations?  They run through the slice as batch rows, in chunks that bound memory."""

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.objectives import TokenNorm, change_objective
from melbo_lens.optimization import Evaluate
from melbo_lens.sliced_model import SlicedModel

SAVED_BYTES = 2**30
SAVED_PER_TOKEN = 40  # numbers that one block keeps for the backward pass, per token and unit of d_model: measured 25 to 45


def default_batch_size(sliced: SlicedModel) -> int:
    """Rows whose forward pass keeps about 1 GiB for the backward pass."""
    per_row = sliced.resid.shape[1] * sliced.d_model * len(sliced.calls) * SAVED_PER_TOKEN * sliced.resid.element_size()
    return max(1, SAVED_BYTES // per_row)


def objective_and_gradient(sliced: SlicedModel, p: float, q: float, token_norm: TokenNorm, batch_size: int) -> Evaluate:
    """The function from vectors to their objective, summed over the prompts, and its gradient.

    A row is one vector on one prompt. Rows never see each other, so `batch_size` changes results by rounding only.
    """
    n_prompts = len(sliced.batch)

    def evaluate(theta: Float[Tensor, "vector d_model"]) -> tuple[Float[Tensor, " vector"], Float[Tensor, "vector d_model"]]:
        rows = torch.arange(len(theta) * n_prompts, device=theta.device)
        values, gradients = [], []
        for chunk in rows.split(batch_size):
            vectors, prompts = chunk // n_prompts, chunk % n_prompts
            leaf = theta[vectors].detach().requires_grad_()
            with torch.enable_grad():
                change = sliced.change(leaf, prompts)
                outer = change.detach().requires_grad_()
                value = change_objective(outer, sliced.batch.target_mask[prompts], p, q, token_norm)
                (cotangent,) = torch.autograd.grad(value.sum(), outer)
                # Half precision overflows easily; a power of two is exact, and rows are independent, so each may have its own.
                scale = power_of_two(cotangent)
                (gradient,) = torch.autograd.grad(change, leaf, cotangent / scale)
            values.append(value.detach())
            gradients.append(gradient * scale[:, :, 0])
        per_row_value, per_row_gradient = torch.cat(values), torch.cat(gradients)
        return per_row_value.view(-1, n_prompts).sum(1), per_row_gradient.view(-1, n_prompts, theta.shape[1]).sum(1)

    return evaluate


def power_of_two(cotangent: Float[Tensor, "row pos d_target"]) -> Float[Tensor, "row 1 1"]:
    """The power of two next to each row's largest entry; 1 for a row of zeros."""
    largest = cotangent.abs().amax((1, 2), keepdim=True)
    return torch.where(largest > 0, torch.exp2(largest.clamp(min=1e-30).log2().floor()), torch.ones_like(largest))
