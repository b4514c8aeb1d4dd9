"""How are unsupervised steering vectors learned?  By the method of Mack and Turner's post, on slices and in batches."""

import hashlib
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_lens.arguments import check_tensor, counts, positive, public
from melbo_lens.ascent.constraints import OrderedRows, RepellingRows, Sphere
from melbo_lens.ascent.objectives import Objective, TokenNorm
from melbo_lens.methods.automatic import resumed_or_automatic
from melbo_lens.methods.fitting import Optimizer, Run, fit, objective_at, settings_of
from melbo_lens.methods.problem import Problem, bias
from melbo_lens.models import hooks
from melbo_lens.models.access import Model
from melbo_lens.models.slices import SlicedModel
from melbo_lens.models.slicing import as_slice, opened
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.prompts import Positions, Prompts
from melbo_lens.randomness import gaussian_rows

STEPS = {"adamw": 300, "power": 40}
ROWS = {True: OrderedRows, False: Sphere, "soft": RepellingRows}  # how vectors are kept apart


@public
def fit_vectors(
    model: Model | SlicedModel,
    prompts: Prompts | None = None,
    source_layer: int | None = None,
    target_layer: int | None = None,
    *,
    n_vectors: int = 32,
    radius: float | Literal["auto"] = "auto",
    p: float = 2,
    q: float = 1,
    target_positions: Positions | None = None,
    orthogonal: bool | Literal["soft"] = True,
    optimizer: Optimizer = "power",
    n_steps: int | None = None,
    lr: float | None = None,
    init: Float[Tensor, "vector d_model"] | SteeringVectors | None = None,
    restarts: int = 1,
    diversity: float = 0.0,
    token_norm: TokenNorm = "d_model",
    batch_size: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    trim: bool = False,
    target_hook: str | None = None,
    site: str | None = None,
) -> SteeringVectors:
    """Learns vectors of norm R that, added at an early MLP output, change a later activation most.

    Maximises over ``||theta|| = R``:

        sum over prompts i of ( sum over t in I_i of || Z_i,t(theta) - Z_i,t(0) || ** p ) ** (1 / q)

    Here Z is the target activation and I_i are the target positions of prompt i. No labels are used. The model and all
    global state are left as they were.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, or a slice of `slice_model`, which itself says the prompts,
            layers, positions and site.
        prompts: text, chat messages, a list of either, or token ids [prompt pos]. One prompt is enough.
        source_layer: the block at whose `site` the vectors are added, at every position.
        target_layer: the change is measured in the stream that enters this block; `n_layers` means the stream that
            leaves the last block.
        n_vectors: how many vectors to learn; with `orthogonal`, at most d_model.
        radius: the norm R of the vectors. Different radii elicit different behaviours, so try a few. "auto" takes .65
            of the edge at which a few learned vectors stop writing readable text (`calibrate_radius`); where a model
            can't write, of that at which their effect is 1, or else the radius at which the blocks bend. The
            provenance says which (`radius_rule`).
        p: a larger p favours a change that is concentrated on few positions; the post uses 2 and 4.
        q: each prompt's sum is raised to 1 / q; the post uses 1 and p.
        target_positions: where a change counts, in each prompt's own tokens: `slice(-3, None)` for the last three. None
            means all positions but an attention sink at the first (`slice_model`).
        orthogonal: True makes each vector orthogonal to those before it, so that the first are learned as if alone.
            False lets many vectors find the same direction of largest change. With "soft", vectors that point the same
            way repel each other in every step (`soft_orthogonalize`), and there may be more of them than d_model. Of
            two alone, the second is minus the first, so ask for three or more.
        optimizer: "power", a fixed-point iteration, is fast; "adamw" is the published recipe, step by step.
        n_steps: by default 300 for "adamw", and at most 40 for "power", which stops by tolerance.
        lr: the step size of "adamw" in units of the vectors' coordinates; 1e-3 by default, as published.
        init: starting directions instead of random ones.
        restarts: the number of random starts from which "power" keeps the best of each vector.
        diversity: above 0, each vector pays for a change like that of an earlier one, as in `fit_adapters`. It is of
            use with `orthogonal=False`.
        token_norm: see `change_objective`.
        batch_size: the number of rows (vector x prompt) in one forward pass. It bounds memory and changes results by
            rounding only; None takes about 1 GiB.
        seed: the seed of the starting directions; that of vector k depends on (seed, k) alone.
        checkpoint: a file to which the state is saved twice a minute and on an interrupt. The same call, made later,
            goes on from it.
        progress: whether to show a progress bar with the mean objective.
        trim: whether the weights outside the slice leave the accelerator during the ascent, to make room; they are put
            back afterwards.
        target_hook: the change is measured in this activation instead of a layer's stream.
        site: where in the block the vectors are added: "mlp_out" (also if None), "resid_post" (the stream that leaves
            the block) or "attn_out".

    Returns:
        The vectors, with `history` [step vector] and every resolved setting in `provenance`.

    Raises:
        TypeError, ValueError: arguments break a rule; this is raised before any optimisation step.
        FloatingPointError: the activations hold NaN or infinity.

    Source: Mack and Turner, "Mechanistically Eliciting Latent Behaviors in Language Models" (2024).
    """
    asked = Run(optimizer, n_steps, lr, restarts, batch_size, seed, checkpoint, progress, trim)
    counts(n_vectors=n_vectors)
    if orthogonal not in ROWS:
        raise ValueError(f'orthogonal={orthogonal!r} must be True, False or "soft".')
    orthogonal = orthogonal if orthogonal == "soft" else bool(orthogonal)
    if orthogonal == "soft" and optimizer == "adamw":
        raise ValueError('orthogonal="soft" needs optimizer="power": vectors of "adamw" know nothing of each other.')
    if radius != "auto":
        positive("radius", radius, ', or "auto" to calibrate one')
    init = init.values if isinstance(init, SteeringVectors) else init
    if init is not None:
        check_tensor("init", init)
        init = init.float()
    if init is not None and not (torch.isfinite(init).all() and (init.norm(dim=-1) > 0).all()):
        raise ValueError("init must hold finite directions, none of them zero.")
    Objective(p=p, q=q, token_norm=token_norm, diversity=diversity)  # checks them before the model runs
    model = opened(model)
    d_model = model.d_model
    if orthogonal is True and n_vectors > d_model:
        raise ValueError(
            f"n_vectors={n_vectors} can't be orthogonal in d_model={d_model} dimensions: ask for at most {d_model}, "
            'or orthogonal=False or "soft".'
        )
    if init is not None and tuple(init.shape) != (n_vectors, d_model):
        raise ValueError(f"init has shape {tuple(init.shape)}, it must be [vector d_model] = ({n_vectors}, {d_model}).")
    sliced = as_slice(model, prompts, source_layer, target_layer, target_positions, target_hook, site)
    run = asked.resolved(sliced, STEPS)
    objective = objective_at(sliced, p=p, q=q, token_norm=token_norm, diversity=diversity)
    with hooks.frozen(sliced.host):
        if radius == "auto":
            radius, why = resumed_or_automatic(sliced, seed, checkpoint, "radius_rule")
        else:
            radius, why = float(radius), "given"
        settings = settings_of("fit_vectors", sliced, objective, run) | {
            "n_vectors": n_vectors,
            "radius": radius,
            "radius_rule": why,
            "orthogonal": orthogonal,
            "init": None if init is None else _digest(init),
        }
        starts = torch.stack([_starts(init, n_vectors, d_model, seed, restart) for restart in range(restarts)])
        starts = starts.to(sliced.device)
        radii = starts.new_full((n_vectors,), settings["radius"])
        problem = Problem(sliced, bias(sliced), objective.value, run.batch_size, diversity)
        label = f"layer {sliced.source_layer}, radius {settings['radius']:.3g}"
        found = fit(problem, (starts,), ROWS[orthogonal](radii), run, settings, label)
    return SteeringVectors(
        found.point[0], sliced.source_layer, found.history, found.provenance, sliced.site.name, objective
    )


def _starts(
    init: Tensor | None, n_vectors: int, d_model: int, seed: int, restart: int
) -> Float[Tensor, "vector d_model"]:
    """The directions of one start: `init` at the first one if it is given, else random.

    A random row k depends only on (seed, k) and on which restart it is for.
    """
    if init is not None and restart == 0:
        return init.detach().float().cpu()
    return gaussian_rows(n_vectors, d_model, "fit_vectors", seed, restart)


def _digest(init: Tensor) -> str:
    """A short digest of the given directions, by which the provenance names them."""
    return hashlib.blake2b(init.detach().float().cpu().numpy().tobytes(), digest_size=8).hexdigest()
