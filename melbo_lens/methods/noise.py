"""What does noise find?  Random vectors stand beside the methods that learn, as the unsupervised baseline."""

from melbo_lens.arguments import counts, positive, public
from melbo_lens.ascent.manifolds import to_sphere
from melbo_lens.methods.fitting import measured, objective_at
from melbo_lens.methods.problem import vectors_on
from melbo_lens.methods.provenance import describe
from melbo_lens.models import hooks
from melbo_lens.models.access import Model
from melbo_lens.models.slices import SlicedModel
from melbo_lens.models.slicing import as_slice, opened
from melbo_lens.perturbations.vectors import SteeringVectors
from melbo_lens.prompts import Positions, Prompts
from melbo_lens.randomness import gaussian_rows


@public
def noise_vectors(
    model: Model | SlicedModel,
    prompts: Prompts | None = None,
    source_layer: int | None = None,
    target_layer: int | None = None,
    *,
    radius: float,
    n_vectors: int = 32,
    target_positions: Positions | None = None,
    target_hook: str | None = None,
    site: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> SteeringVectors:
    """Draws vectors of norm R in random directions, and measures what they change.

    Nothing is learned, so all of a budget is left for writing: a completion for each of many vectors is activation
    noise at equal cost. (`random_vectors` makes the control of vectors that were learned.)

    Args:
        model: a `HookedTransformer` or `TransformerBridge`, or a slice of `slice_model`, as in `fit_vectors`.
        prompts: text, chat messages, a list of either, or token ids [prompt pos].
        source_layer: the block at whose `site` the vectors are added, at every position.
        target_layer: the change is measured in the stream that enters this block.
        radius: the norm R of the vectors.
        n_vectors: how many; for a fresh one for each completion, as many as there will be completions.
        target_positions, target_hook, site, batch_size: as in `fit_vectors`.
        seed: vector k depends on (seed, k) alone.

    Returns:
        The vectors, with their effects in the provenance.

    Raises:
        TypeError, ValueError: arguments break a rule; this is raised before the model runs.
    """
    counts(n_vectors=n_vectors, batch_size=batch_size)
    positive("radius", radius, "")
    sliced = as_slice(opened(model), prompts, source_layer, target_layer, target_positions, target_hook, site)
    directions = gaussian_rows(n_vectors, sliced.d_model, "noise_vectors", seed).to(sliced.device)
    values = to_sphere(directions, directions.new_full((n_vectors,), float(radius)))
    with hooks.frozen(sliced.host):
        found = measured(vectors_on(sliced, batch_size), (values,), float(radius), "random; nothing was learned")
    aim = objective_at(sliced)
    settings = {**describe(sliced), "target_positions": aim.header()["target_positions"], "n_vectors": n_vectors}
    provenance = {"method": "noise_vectors", **settings, "radius": float(radius), "seed": seed, **found}
    return SteeringVectors(values, sliced.source_layer, provenance=provenance, site=sliced.site.name, objective=aim)
