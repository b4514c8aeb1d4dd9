"""Find what a language model hides: unsupervised steering vectors and adapters (MELBO) for TransformerLens."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from melbo_lens import organisms as organisms
    from melbo_lens import plots as plots
    from melbo_lens.evaluation.coherence import coherence as coherence
    from melbo_lens.evaluation.judges import Agreement as Agreement
    from melbo_lens.evaluation.judges import Judge as Judge
    from melbo_lens.evaluation.judges import judge as judge
    from melbo_lens.evaluation.openai_client import openai_client as openai_client
    from melbo_lens.evaluation.rates import Evaluation as Evaluation
    from melbo_lens.evaluation.rates import evaluate as evaluate
    from melbo_lens.evaluation.rates import select as select
    from melbo_lens.evaluation.words import cluster_by_words as cluster_by_words
    from melbo_lens.exports import export as export
    from melbo_lens.exports.plain_models import on_transformers as on_transformers
    from melbo_lens.generation.completions import Completions as Completions
    from melbo_lens.generation.generate import generate as generate
    from melbo_lens.generation.steer import steer as steer
    from melbo_lens.imports import load as load
    from melbo_lens.measures.changes import ActivationChanges as ActivationChanges
    from melbo_lens.measures.changes import TargetEffects as TargetEffects
    from melbo_lens.measures.changes import activation_changes as activation_changes
    from melbo_lens.measures.changes import objective as objective
    from melbo_lens.measures.changes import target_effects as target_effects
    from melbo_lens.measures.controls import random_adapters as random_adapters
    from melbo_lens.measures.controls import random_like as random_like
    from melbo_lens.measures.controls import random_vectors as random_vectors
    from melbo_lens.measures.directions import closest_directions as closest_directions
    from melbo_lens.measures.directions import max_activating as max_activating
    from melbo_lens.measures.directions import top_tokens as top_tokens
    from melbo_lens.measures.next_tokens import NextTokens as NextTokens
    from melbo_lens.measures.next_tokens import next_tokens as next_tokens
    from melbo_lens.measures.output import Effects as Effects
    from melbo_lens.measures.output import output_effects as output_effects
    from melbo_lens.measures.radius import Calibration as Calibration
    from melbo_lens.measures.ranking import cluster_by_effect as cluster_by_effect
    from melbo_lens.measures.ranking import rank as rank
    from melbo_lens.measures.source import AdapterEffect as AdapterEffect
    from melbo_lens.measures.source import nearest_vectors as nearest_vectors
    from melbo_lens.measures.source import source_effects as source_effects
    from melbo_lens.methods.adapters import fit_adapters as fit_adapters
    from melbo_lens.methods.calibrate import calibrate_radius as calibrate_radius
    from melbo_lens.methods.contrastive import fit_contrastive as fit_contrastive
    from melbo_lens.methods.cpe import fit_cpe as fit_cpe
    from melbo_lens.methods.dct import fit_dct as fit_dct
    from melbo_lens.methods.jacobian import fit_jacobian as fit_jacobian
    from melbo_lens.methods.melbo import fit_vectors as fit_vectors
    from melbo_lens.methods.noise import noise_vectors as noise_vectors
    from melbo_lens.methods.planning import MemoryPlan as MemoryPlan
    from melbo_lens.methods.planning import plan_memory as plan_memory
    from melbo_lens.models.slices import SlicedModel as SlicedModel
    from melbo_lens.models.slicing import slice_model as slice_model
    from melbo_lens.perturbations.adapters import SteeringAdapters as SteeringAdapters
    from melbo_lens.perturbations.loading import from_pretrained as from_pretrained
    from melbo_lens.perturbations.perturbation import concatenate as concatenate
    from melbo_lens.perturbations.vectors import SteeringVectors as SteeringVectors
    from melbo_lens.plots.exploring import Explorer as Explorer
    from melbo_lens.plots.exploring import explore as explore
    from melbo_lens.reports.findings import Findings as Findings
    from melbo_lens.reports.report import report as report
    from melbo_lens.reports.report import report_directory as report_directory
    from melbo_lens.reports.report import save_results as save_results
    from melbo_lens.search.arms import make_plan as make_plan
    from melbo_lens.search.discovering import discover as discover
    from melbo_lens.search.discovery import Discovery as Discovery
    from melbo_lens.search.discovery import gather as gather
    from melbo_lens.search.layers import LayerScan as LayerScan
    from melbo_lens.search.layers import scan_layers as scan_layers
    from melbo_lens.sweeps.jobs import Job as Job
    from melbo_lens.sweeps.jobs import ModelKey as ModelKey
    from melbo_lens.sweeps.jobs import plan_jobs as plan_jobs
    from melbo_lens.sweeps.outcomes import Outcome as Outcome
    from melbo_lens.sweeps.sweep import merge as merge
    from melbo_lens.sweeps.sweep import status as status
    from melbo_lens.sweeps.sweep import sweep as sweep
    from melbo_lens.sweeps.trials import AdapterTrial as AdapterTrial
    from melbo_lens.sweeps.trials import ContrastiveTrial as ContrastiveTrial
    from melbo_lens.sweeps.trials import CpeTrial as CpeTrial
    from melbo_lens.sweeps.trials import DctTrial as DctTrial
    from melbo_lens.sweeps.trials import JacobianTrial as JacobianTrial
    from melbo_lens.sweeps.trials import NoiseTrial as NoiseTrial
    from melbo_lens.sweeps.trials import Trial as Trial

__version__ = "0.2.0"

# Where each public name lives. A module is imported when one of its names is first asked for, so
# `import melbo_lens` costs nothing.
_HOMES = {
    "evaluation.coherence": "coherence",
    "evaluation.judges": "judge",
    "evaluation.openai_client": "openai_client",
    "evaluation.rates": "evaluate select",
    "evaluation.words": "cluster_by_words",
    "exports": "export",
    "exports.plain_models": "on_transformers",
    "generation.completions": "Completions",
    "generation.generate": "generate",
    "generation.steer": "steer",
    "imports": "load",
    "measures.changes": "activation_changes objective target_effects",
    "measures.controls": "random_adapters random_like random_vectors",
    "measures.directions": "closest_directions max_activating top_tokens",
    "measures.next_tokens": "next_tokens",
    "measures.output": "output_effects",
    "measures.ranking": "cluster_by_effect rank",
    "measures.source": "nearest_vectors source_effects",
    "methods.adapters": "fit_adapters",
    "methods.calibrate": "calibrate_radius",
    "methods.contrastive": "fit_contrastive",
    "methods.cpe": "fit_cpe",
    "methods.dct": "fit_dct",
    "methods.jacobian": "fit_jacobian",
    "methods.noise": "noise_vectors",
    "methods.melbo": "fit_vectors",
    "methods.planning": "plan_memory",
    "models.slicing": "slice_model",
    "perturbations.adapters": "SteeringAdapters",
    "perturbations.loading": "from_pretrained",
    "perturbations.perturbation": "concatenate",
    "perturbations.vectors": "SteeringVectors",
    "plots.exploring": "explore",
    "reports.findings": "Findings",
    "reports.report": "report report_directory save_results",
    "search.discovering": "discover",
    "search.discovery": "gather",
    "search.layers": "scan_layers",
    "search.arms": "make_plan",
    "sweeps.jobs": "Job ModelKey plan_jobs",
    "sweeps.sweep": "merge status sweep",
    "sweeps.trials": "AdapterTrial ContrastiveTrial CpeTrial DctTrial JacobianTrial NoiseTrial Trial",
}
# What calls return: here for `isinstance` and annotations.
_RESULTS = {
    "evaluation.judges": "Agreement Judge",
    "evaluation.rates": "Evaluation",
    "measures.changes": "ActivationChanges TargetEffects",
    "measures.next_tokens": "NextTokens",
    "measures.output": "Effects",
    "measures.radius": "Calibration",
    "methods.planning": "MemoryPlan",
    "sweeps.outcomes": "Outcome",
    "measures.source": "AdapterEffect",
    "models.slices": "SlicedModel",
    "plots.exploring": "Explorer",
    "search.discovery": "Discovery",
    "search.layers": "LayerScan",
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
