"""What does plain PyTorch load?  A safetensors file, and beside it the code that reads it and steers a model."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save as to_bytes
from torch import nn

from melbo_lens import files
from melbo_lens.exports import comparison, exporter, standalone
from melbo_lens.exports.plain_models import edits_of
from melbo_lens.methods.provenance import check_same_model, model_of
from melbo_lens.models.access import Model, host_of
from melbo_lens.models.host import Host
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.prompts import Prompts

VALUES, CODE = "steering.safetensors", "steer.py"


@exporter("transformers")
def to_transformers(
    perturbation: Perturbation,
    path: str | os.PathLike[str],
    model: Model | None = None,
    hf_model: nn.Module | None = None,
    prompts: Prompts | None = None,
) -> Path:
    """Writes `steering.safetensors` and `steer.py`, which steer a plain Hugging Face model without melbo_lens.

    `steer.py` imports torch and safetensors alone; its first lines say how it is used. What it does is compared with
    the steered model before anything is written.

    Args:
        perturbation: one vector, at any site, or one adapter.
        path: a folder, which is made if it is missing.
        model: the model that it was learned on. By default it is the remembered model, if that still lives.
        hf_model: the Hugging Face model to compare with. By default it is the model inside a bridge or, where
            TransformerLens processed the weights, the one in the model's own files.
        prompts: the prompts to compare on. By default those of the fit, or some tokens if none are known.

    Returns:
        The folder.

    Raises:
        ValueError: there isn't exactly one vector or adapter, it was learned on another model, or the comparison
            failed; nothing is written.

    Warns:
        UserWarning: there was no model, or no Hugging Face model, to compare with.
    """
    edits = edits_of(perturbation)
    known = model if model is not None else model_of(perturbation)
    if known is None:
        missing = "its model is not remembered here. Pass model="
    else:
        compared = _compare(perturbation, host_of(known), edits, hf_model, prompts)
        absent = (
            "its Hugging Face model's files are not on this machine or give other log-probabilities. Pass hf_model="
        )
        missing = "" if compared else absent
    if missing:
        warnings.warn(f"the export was not compared with a Hugging Face model: {missing} to compare.", stacklevel=2)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in standalone.tensors_of(edits).items()}
    code = Path(standalone.__file__).read_bytes()
    files.write_folder(path, {VALUES: to_bytes(tensors, {"format": "pt"}), CODE: code})
    return Path(path)


def _compare(
    perturbation: Perturbation,
    host: Host,
    edits: Sequence[standalone.Edit],
    hf_model: nn.Module | None,
    prompts: Prompts | None,
) -> bool:
    """Compares the steered model with the edited Hugging Face model; False if there is none to compare with.

    Raises:
        ValueError: the perturbation doesn't fit the model or was learned on another one, hf_model is another model, or
            the two differ.
    """
    check_same_model(perturbation, host)
    differences = comparison.steered_differences(
        host, [perturbation.on(host)], lambda network: standalone.steered(network, edits), hf_model, prompts
    )
    if differences is None:
        return False
    if not differences.steered <= differences.allowed:
        raise ValueError(
            "the log-probabilities of the steered model and of the Hugging Face model that steer.py steers differ by "
            f"{differences.steered:.1e} (allowed: {differences.allowed:.0e}), unsteered by "
            f"{differences.unsteered:.1e}: this architecture "
            f"({host.architecture}) is not known there."
        )
    return True
