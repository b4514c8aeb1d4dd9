"""How is a slice cut out?  The model runs once, its blocks are recorded, and what they do alone is compared with it."""

from dataclasses import replace

import torch

from melbo_lens.arguments import public
from melbo_lens.models import blocks, fidelity, hooks
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.host import Host
from melbo_lens.models.reaching import reaches_stream
from melbo_lens.models.slices import SlicedModel, replay
from melbo_lens.models.targets import target_of
from melbo_lens.perturbations.sites import site_of
from melbo_lens.prompts import Positions, Prompts, tokenize

KEPT_BYTES = 2**30  # what the forward pass of one row may keep for the backward pass without recomputing blocks


@public
def slice_model(
    model: Model,
    prompts: Prompts,
    source_layer: int,
    target_layer: int | None = None,
    target_positions: Positions | None = None,
    target_hook: str | None = None,
    site: str = "mlp_out",
) -> SlicedModel:
    """Runs the model once and cuts out the part between two layers.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`; it is left as it was.
        prompts: text, chat messages, a list of either, or token ids [prompt pos].
        source_layer: the block at whose `site` perturbations are added.
        target_layer: the target is the stream that enters this block, or for `n_layers` the stream that leaves the last
            block. Larger ones cost more.
        target_positions: a slice or indices into each prompt's own tokens; a change counts only there. None means all
            of them, except a first position that is an attention sink: in many models the stream has over a hundred
            times its usual norm there, which would drown every change of behaviour.
        target_hook: the activation to read instead of a layer's stream, for instance "blocks.9.attn.hook_z".
        site: "mlp_out", "resid_post" or "attn_out"; the first two give the same slice, and the last runs the source
            block too. So does "mlp_out" where the block scales or normalises its sum, as those of Gemma 4 do.

    Returns:
        The slice. It was checked: replaying the blocks without a perturbation reproduces the recorded stream, and with
        a random perturbation it reproduces a hooked run of the model.

    Raises:
        TypeError, ValueError: the model can't be steered, or the arguments don't fit it; this is raised before
            any forward pass.
        FloatingPointError: the activations hold NaN or infinity.
        RuntimeError: the model's blocks can't be replayed faithfully.
    """
    host = host_of(model)
    last, target_name = target_of(host, source_layer, target_layer, target_hook)
    where = site_of(site)
    source_hook = hooks.source_hook(host, where, source_layer)
    batch = tokenize(host, prompts, slice(None) if target_positions is None else target_positions)
    with hooks.frozen(host):
        whole = blocks.record_with_axes(host, batch.tokens, source_layer, last)
        recording = blocks.Recording(whole.calls[1:], whole.streams[1:])
        fidelity.check_finite(recording, batch, source_layer)
        everyone = torch.arange(len(batch), device=batch.tokens.device)
        read = target_name if target_layer is None else None
        with torch.no_grad():
            fidelity.check_replay(host, recording, everyone, source_layer)
            target = replay(host, recording.calls, [], read, recording.streams[0], everyone, len(batch))
            entry, *streams = (stream.to(host.device) for stream in whole.streams)
            sliced = SlicedModel(
                host,
                batch,
                source_layer,
                target_layer,
                source_hook,
                hooks.resolved_name(host, target_name),
                tuple(recording.calls),
                streams[0],
                target.to(host.device).float(),
                tuple(streams),
                whole.calls[0],
                entry,
                where,
            )
            if where.after_block and not reaches_stream(host, batch, source_layer, source_hook):
                sliced = replace(sliced, site=replace(where, after_block=False))
            fidelity.check_hooked_run(sliced, last)
            fidelity.check_alone(sliced, last, recording.streams[-1])
            if host.quantised:
                fidelity.check_gradient(sliced)
    sliced = without_sink(sliced) if target_positions is None else sliced
    return replace(sliced, recomputed=True) if sliced.kept[0] > KEPT_BYTES else sliced


def without_sink(sliced: SlicedModel) -> SlicedModel:
    """Returns the slice of whose positions a first one does not count that is an attention sink at its target."""
    if not sliced.begins_with_a_sink:
        return sliced
    return replace(sliced, batch=tokenize(sliced.host, sliced.batch, slice(1, None)))


def opened(model: "Model | SlicedModel") -> "SlicedModel | Host":
    """Opens a model, so that it can be asked for its sizes; a slice is returned unchanged."""
    return model if isinstance(model, SlicedModel) else host_of(model)


def as_slice(
    model: "Model | SlicedModel",
    prompts: Prompts | None,
    source_layer: int | None,
    target_layer: int | None,
    target_positions: Positions | None,
    target_hook: str | None,
    site: str | None,
    default_positions: Positions | None = None,
) -> SlicedModel:
    """Returns the slice that was given in place of a model, or makes a new one.

    Raises:
        TypeError: a model was given without prompts or a source layer, or a slice with arguments that it fixes itself.
    """
    if not isinstance(model, SlicedModel):
        if prompts is None or source_layer is None:
            name = "prompts" if prompts is None else "source_layer"
            raise TypeError(
                f"{name} is missing: give it beside the model, or a slice of slice_model in the model's place."
            )
        positions = default_positions if target_positions is None else target_positions
        return slice_model(model, prompts, source_layer, target_layer, positions, target_hook, site or "mlp_out")
    beside = {
        "prompts": prompts,
        "source_layer": source_layer,
        "target_layer": target_layer,
        "target_positions": target_positions,
        "target_hook": target_hook,
        "site": site,
    }
    given = [name for name, value in beside.items() if value is not None]
    if given:
        raise TypeError(
            f"a slice was given, which says {' and '.join(given)} itself: "
            f"leave {'it' if len(given) == 1 else 'them'} out."
        )
    return model
