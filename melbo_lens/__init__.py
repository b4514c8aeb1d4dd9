"""Find what a language model hides: unsupervised steering vectors (MELBO) for TransformerLens."""

from melbo_lens import organisms, plots
from melbo_lens.completions import Completions
from melbo_lens.evaluation import Evaluation, evaluate
from melbo_lens.methods.melbo import fit_vectors
from melbo_lens.perturbations import SteeringVectors, concatenate, random_vectors
from melbo_lens.report import report
from melbo_lens.serialization import load, save
from melbo_lens.sliced_model import SlicedModel, slice_model
from melbo_lens.steering import generate, steer

__version__ = "0.1.0"
__all__ = [
    "Completions",
    "Evaluation",
    "SlicedModel",
    "SteeringVectors",
    "concatenate",
    "evaluate",
    "fit_vectors",
    "generate",
    "load",
    "organisms",
    "plots",
    "random_vectors",
    "report",
    "save",
    "slice_model",
    "steer",
]
