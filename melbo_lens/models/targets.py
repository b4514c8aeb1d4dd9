"""Which activation is the target?  A layer's stream or a hook; it is checked before anything runs."""

from melbo_lens.models import hooks
from melbo_lens.models.host import Host
from melbo_lens.perturbations.sites import layer_of


def target_of(host: Host, source_layer: int, target_layer: int | None, target_hook: str | None) -> tuple[int, str]:
    """Returns how many blocks must run, and the name of the activation to read.

    Raises:
        ValueError: the layers or the hook don't fit the model or each other.
    """
    n_layers = host.n_layers
    if isinstance(source_layer, bool) or not isinstance(source_layer, int) or not 0 <= source_layer < n_layers:
        raise ValueError(
            f"source_layer={source_layer!r} must be an integer from 0 to {n_layers - 1}: "
            f"the model has {n_layers} blocks."
        )
    if (target_layer is None) == (target_hook is None):
        raise ValueError(
            "give either target_layer or target_hook, and not both: the change of one activation is measured."
        )
    if target_hook is not None:
        hooks.check_target(host, target_hook)
        block = layer_of(target_hook)
        if block is None or block <= source_layer:
            raise ValueError(
                f"target_hook={target_hook!r} must lie in a block after source_layer={source_layer}, "
                f"as blocks.{source_layer + 1}.…"
            )
        return block + 1, target_hook
    if (
        isinstance(target_layer, bool)
        or not isinstance(target_layer, int)
        or not source_layer + 1 < target_layer <= n_layers
    ):
        raise ValueError(
            f"target_layer={target_layer!r} must be an integer from source_layer + 2 = {source_layer + 2} "
            f"to n_layers = {n_layers}: "
            "at least one block has to lie between the perturbation and the activation that it changes."
        )
    return target_layer, stream_name(target_layer, n_layers)


def stream_name(layer: int, n_layers: int) -> str:
    """Names the stream that enters a layer; for `n_layers`, it is the stream that leaves the last block."""
    return f"blocks.{layer}.hook_resid_pre" if layer < n_layers else f"blocks.{n_layers - 1}.hook_resid_post"
