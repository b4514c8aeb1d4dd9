"""Which pictures are there?  Plotly figures and circuitsvis token views, which are returned and never displayed."""

from melbo_lens.plots.embedding import TokenView, embed
from melbo_lens.plots.figures import (
    behavior_rates,
    cosine_similarity,
    effect_scatter,
    layer_heatmap,
    layer_map,
    objective_history,
    radius_curve,
    ranking,
    scale_sweep,
    token_heatmap,
)
from melbo_lens.plots.paper import Figure
from melbo_lens.plots.tokens import (
    colored_tokens,
    colored_tokens_multi,
    text_neuron_activations,
    token_log_probs,
    top_tokens,
)

__all__ = [
    "Figure",
    "TokenView",
    "behavior_rates",
    "colored_tokens",
    "colored_tokens_multi",
    "cosine_similarity",
    "effect_scatter",
    "embed",
    "layer_heatmap",
    "layer_map",
    "objective_history",
    "radius_curve",
    "ranking",
    "scale_sweep",
    "text_neuron_activations",
    "token_heatmap",
    "token_log_probs",
    "top_tokens",
]
