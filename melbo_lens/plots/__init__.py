"""Which pictures are there?  Arrays in, plotly figures out; nothing is shown by itself."""

from melbo_lens.plots.embedding import embed
from melbo_lens.plots.figures import behavior_rates, cosine_similarity, layer_map, objective_history, radius_curve

__all__ = ["behavior_rates", "cosine_similarity", "embed", "layer_map", "objective_history", "radius_curve"]
