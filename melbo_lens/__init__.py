"""Find what a language model hides: unsupervised steering vectors and adapters (MELBO) for TransformerLens."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from melbo_lens import organisms as organisms
    from melbo_lens import plots as plots
    from melbo_lens.adapter_effects import AdapterEffect as AdapterEffect
    from melbo_lens.adapter_effects import nearest_vectors as nearest_vectors
    from melbo_lens.adapter_effects import source_effects as source_effects
    from melbo_lens.adapters import SteeringAdapters as SteeringAdapters
    from melbo_lens.attaching import steer as steer
    from melbo_lens.calibration import Calibration as Calibration
    from melbo_lens.calibration import calibrate_radius as calibrate_radius
    from melbo_lens.completions import Completions as Completions
    from melbo_lens.controls import random_adapters as random_adapters
    from melbo_lens.controls import random_like as random_like
    from melbo_lens.controls import random_vectors as random_vectors
    from melbo_lens.differences import ActivationChanges as ActivationChanges
    from melbo_lens.differences import TargetEffects as TargetEffects
    from melbo_lens.differences import activation_changes as activation_changes
    from melbo_lens.differences import objective as objective
    from melbo_lens.differences import target_effects as target_effects
    from melbo_lens.directions import closest_directions as closest_directions
    from melbo_lens.directions import max_activating as max_activating
    from melbo_lens.directions import top_tokens as top_tokens
    from melbo_lens.discovery import Discovery as Discovery
    from melbo_lens.discovery import discover as discover
    from melbo_lens.evaluation import Evaluation as Evaluation
    from melbo_lens.evaluation import evaluate as evaluate
    from melbo_lens.evaluation import select as select
    from melbo_lens.expectations import NextTokens as NextTokens
    from melbo_lens.expectations import next_tokens as next_tokens
    from melbo_lens.exports import export as export
    from melbo_lens.findings import Findings as Findings
    from melbo_lens.layer_scan import LayerScan as LayerScan
    from melbo_lens.layer_scan import scan_layers as scan_layers
    from melbo_lens.methods.adapters import fit_adapters as fit_adapters
    from melbo_lens.methods.melbo import fit_vectors as fit_vectors
    from melbo_lens.naturalness import coherence as coherence
    from melbo_lens.output import Effects as Effects
    from melbo_lens.output import output_effects as output_effects
    from melbo_lens.page import report as report
    from melbo_lens.page import report_directory as report_directory
    from melbo_lens.page import save_results as save_results
    from melbo_lens.perturbation import concatenate as concatenate
    from melbo_lens.perturbation import load as load
    from melbo_lens.perturbations import SteeringVectors as SteeringVectors
    from melbo_lens.ranking import cluster_by_effect as cluster_by_effect
    from melbo_lens.ranking import rank as rank
    from melbo_lens.sliced_model import SlicedModel as SlicedModel
    from melbo_lens.sliced_model import slice_model as slice_model
    from melbo_lens.steering import generate as generate
    from melbo_lens.trials import AdapterTrial as AdapterTrial
    from melbo_lens.trials import Trial as Trial
    from melbo_lens.trials import make_plan as make_plan
    from melbo_lens.words import cluster_by_words as cluster_by_words

__version__ = "0.1.0"

# Where each public name lives. A module is imported when one of its names is first asked for, so that `import melbo_lens` costs nothing.
_HOMES = {
    "adapter_effects": "nearest_vectors source_effects",
    "adapters": "SteeringAdapters",
    "attaching": "steer",
    "calibration": "calibrate_radius",
    "completions": "Completions",
    "controls": "random_adapters random_like random_vectors",
    "differences": "activation_changes objective target_effects",
    "directions": "closest_directions max_activating top_tokens",
    "discovery": "discover",
    "evaluation": "evaluate select",
    "expectations": "next_tokens",
    "exports": "export",
    "findings": "Findings",
    "layer_scan": "scan_layers",
    "methods.adapters": "fit_adapters",
    "methods.melbo": "fit_vectors",
    "naturalness": "coherence",
    "output": "output_effects",
    "page": "report report_directory save_results",
    "perturbation": "concatenate load",
    "perturbations": "SteeringVectors",
    "ranking": "cluster_by_effect rank",
    "sliced_model": "slice_model",
    "steering": "generate",
    "trials": "AdapterTrial Trial make_plan",
    "words": "cluster_by_words",
}
# What calls return: here for `isinstance` and annotations.
_RESULTS = {
    "adapter_effects": "AdapterEffect",
    "calibration": "Calibration",
    "differences": "ActivationChanges TargetEffects",
    "discovery": "Discovery",
    "evaluation": "Evaluation",
    "expectations": "NextTokens",
    "layer_scan": "LayerScan",
    "output": "Effects",
    "sliced_model": "SlicedModel",
}
_MODULES = ("organisms", "plots")
_HOME_OF = {name: home for homes in (_HOMES, _RESULTS) for home, names in homes.items() for name in names.split()}
__all__ = sorted([*(name for names in _HOMES.values() for name in names.split()), *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"melbo_lens.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'melbo_lens' has no attribute {name!r}")
    value = getattr(import_module(f"melbo_lens.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
