"""Does a slice compute what the whole model computes?  Each way in which it might not is checked when it is cut out."""

import torch
from torch import Tensor

from melbo_lens.models import blocks, hooks
from melbo_lens.models.host import Host
from melbo_lens.models.slices import SlicedModel, plus
from melbo_lens.prompts import PromptBatch
from melbo_lens.randomness import gaussian

NO_GRADIENT = 1e-3  # a derivative that is so small a share of a difference is none
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check_finite(recording: blocks.Recording, batch: PromptBatch, source_layer: int) -> None:
    for i, stream in enumerate(recording.streams):
        bad = ~torch.isfinite(stream).all(-1) & batch.own.to(stream.device)
        if bad.any():
            prompt, position = bad.nonzero()[0].tolist()
            raise FloatingPointError(
                f"the clean activations that leave block {source_layer + i} hold NaN or infinity "
                f"(prompt {prompt}, position {position}): check the weights, or load the model in bfloat16 or float32."
            )


def check_replay(host: Host, recording: blocks.Recording, everyone: Tensor, source_layer: int) -> None:
    for i, call in enumerate(recording.calls):
        compare(
            host,
            call(recording.streams[i], everyone, len(everyone)),
            recording.streams[i + 1],
            f"block {source_layer + 1 + i} replayed by itself",
        )


def check_hooked_run(sliced: SlicedModel, last: int) -> None:
    """Checks that a random perturbation at the hook has the effect that the replay predicts.

    It has another effect in a model that scales or normalises the sum afterwards.
    """
    typical = sliced.resid.float().norm(dim=-1).mean()
    noise = gaussian((sliced.d_model,), "slice check").to(sliced.device)
    vector = noise / noise.norm() * typical * 0.1
    seen: list[Tensor] = []
    add = (sliced.source_hook, lambda activation, hook: plus(activation, vector))
    read = (
        [(sliced.target_hook, lambda activation, hook: seen.append(activation.flatten(2)))]
        if sliced.target_layer is None
        else []
    )
    hooked = blocks.record(sliced.host, sliced.batch.tokens, sliced.source_layer + 1, last, [add, *read])
    # the rows have another order and number, so that arguments must follow their prompts
    rows = torch.cat([sliced.everyone, sliced.everyone[:1]]).flip(0)
    replayed = sliced.change(vector.expand(len(rows), -1), rows) + sliced.target[rows]
    expected = seen[0] if seen else hooked.streams[-1]
    compare(
        sliced.host,
        replayed,
        expected.to(sliced.device)[rows],
        f"the blocks after a perturbation at {sliced.source_hook!r}",
    )


def check_gradient(sliced: SlicedModel) -> None:
    """Checks that the blocks pass gradients on; some kernels of quantised weights drop them without a word.

    Along a random v, the derivative of the change is compared with a difference, in the direction u of what the change
    has beyond v itself: the stream passes v on whatever the blocks do, and only they change it in other directions.
    """
    row, noise = sliced.everyone[:1], gaussian((sliced.d_model,), "gradient check").to(sliced.device)
    typical = float(sliced.resid[:1].float().norm(dim=-1)[sliced.batch.own[:1]].median()) or 1.0
    step = 0.05 * typical
    v = noise / noise.norm()
    difference = (sliced.change(step * v[None], row) - sliced.change(-step * v[None], row)) / (2 * step)
    difference = difference * sliced.batch.own[:1, :, None]
    u = difference
    if u.shape[-1] == len(v):
        u = difference - (difference @ v)[..., None] * v
    u = u / u.norm().clamp(min=1e-30)
    with torch.enable_grad():
        theta = torch.zeros_like(v[None]).requires_grad_()
        along = (sliced.change(theta, row) * u).sum()
        found = torch.autograd.grad(along, theta)[0] @ v if along.requires_grad else v.new_zeros(1)
    expected = float((difference * u).sum())
    if abs(float(found)) <= NO_GRADIENT * abs(expected):
        raise RuntimeError(
            f"the blocks change the target, but pass on no gradient (along one direction {float(found):.2g}, where a "
            f"difference has {expected:.2g}): a kernel of this model computes forwards only. This is so for "
            "bitsandbytes' 4 bits on CPUs with AVX512 in bfloat16, after the first pass. Load the model without "
            "quantisation, with torchao's int8 weights, or on a GPU. Writing and measures work as they are."
        )


def check_alone(sliced: SlicedModel, last: int, together: Tensor) -> None:
    """Checks that the shortest prompt gives the same activations in the batch as alone.

    It doesn't in models that derive positions from the length of the batch, where padding matters.
    """
    lengths = sliced.batch.lengths.tolist()
    if min(lengths) == max(lengths):
        return
    row = lengths.index(min(lengths))
    ids = sliced.batch.tokens[[row], : lengths[row]]
    alone = blocks.record(sliced.host, ids, last, last).streams[-1]
    compare(
        sliced.host,
        together[[row], : lengths[row]],
        alone,
        f"the activations of prompt {row} beside longer prompts",
        "on the length of the batch; give prompts of one length",
    )


def check_source(sliced: SlicedModel) -> None:
    """Checks that the source block can be replayed, which `SlicedModel.change_under` needs.

    Raises:
        RuntimeError: the replay doesn't reproduce the recorded stream.
    """
    assert sliced.source_call is not None and sliced.entry is not None  # `slice_model` recorded them
    with hooks.frozen(sliced.host), torch.no_grad():
        compare(
            sliced.host,
            sliced.source_call(sliced.entry, sliced.everyone, len(sliced.batch)),
            sliced.resid,
            f"block {sliced.source_layer} replayed by itself",
        )


def compare(host: Host, replayed: Tensor, recorded: Tensor, what: str, why: str = "rescale the perturbation") -> None:
    error = (replayed.float() - recorded.float()).norm() / recorded.float().norm().clamp(min=1e-30)
    tolerance = TOLERANCES[torch.float16] if host.quantised else TOLERANCES.get(recorded.dtype, 1e-4)
    if not error <= tolerance:
        raise RuntimeError(
            f"{what} differ from a run of the whole model by {error:.1e} of their norm (allowed: {tolerance:.0e}). "
            f"This model can't be sliced here: its blocks depend on something other than their arguments, or {why}."
        )
