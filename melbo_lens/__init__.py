"""Find what a language model hides: unsupervised steering vectors and adapters (MELBO) for TransformerLens."""

from melbo_lens import organisms, plots
from melbo_lens.adapter_effects import AdapterEffect, random_adapters
from melbo_lens.adapters import SteeringAdapters
from melbo_lens.calibration import Calibration, calibrate_radius
from melbo_lens.completions import Completions
from melbo_lens.discovery import AdapterTrial, Discovery, Trial, discover, make_plan
from melbo_lens.effects import (
    Effects,
    closest_directions,
    cluster_by_effect,
    cluster_by_words,
    effects,
    max_activating,
    rank,
    target_changes,
    top_tokens,
)
from melbo_lens.evaluation import Evaluation, evaluate, select
from melbo_lens.layer_scan import LayerScan, scan_layers
from melbo_lens.methods.adapters import fit_adapters
from melbo_lens.methods.melbo import fit_vectors
from melbo_lens.perturbations import SteeringVectors, concatenate, random_vectors
from melbo_lens.report import report
from melbo_lens.serialization import load, save
from melbo_lens.sliced_model import SlicedModel, slice_model
from melbo_lens.steering import generate, steer

__version__ = "0.1.0"
__all__ = [
    "AdapterEffect",
    "AdapterTrial",
    "Calibration",
    "Completions",
    "Discovery",
    "Effects",
    "Evaluation",
    "LayerScan",
    "SlicedModel",
    "SteeringAdapters",
    "SteeringVectors",
    "Trial",
    "calibrate_radius",
    "closest_directions",
    "cluster_by_effect",
    "cluster_by_words",
    "concatenate",
    "discover",
    "effects",
    "evaluate",
    "fit_adapters",
    "fit_vectors",
    "generate",
    "load",
    "make_plan",
    "max_activating",
    "organisms",
    "plots",
    "random_adapters",
    "random_vectors",
    "rank",
    "report",
    "save",
    "scan_layers",
    "select",
    "slice_model",
    "steer",
    "target_changes",
    "top_tokens",
]
