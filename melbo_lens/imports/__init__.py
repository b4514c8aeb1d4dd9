"""How do values of other tools get in?  `load` reads our own files and theirs, and asks for what a file doesn't say.

Each foreign format is a file of this folder with a function `read(path, ...)`. Nothing in a file is ever run.
"""

import inspect
import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from melbo_lens.arguments import public
from melbo_lens.perturbations import loading
from melbo_lens.perturbations.perturbation import Perturbation

READERS = {  # what a file is -> the file of this folder that reads it
    "gguf": "gguf",
    "peft": "peft",
    "torch": "torch_files",
}


@public
def load(
    path: str | os.PathLike[str],
    *,
    layer: int | None = None,
    site: str | None = None,
    model: str | None = None,
) -> Perturbation:
    """Reads a file that `save` wrote, or one of another tool. Nothing in the file is run.

    What a file is, is seen from its first bytes.

    | file                                          | who writes it                         | what must be said |
    |-----------------------------------------------|---------------------------------------|-------------------|
    | `.safetensors` of melbo_lens                  | `vectors.save`, `adapters.save`       | nothing           |
    | `.pt`, a tensor [vector d_model] or [d_model] | the post's notebooks, hotwire-vllm    | layer             |
    | `.pt`, a tensor [n_layers d_model] with zeros | hotwire-vllm, several layers          | layer, if several |
    | `.pt`, a dict with "vectors"                  | power_steering                        | nothing, or layer |
    | `.pt`, a SteeringVector                       | `torch.save` of steering-vectors      | layer, if several |
    | `.pt`, a dict of hookpoints                   | lm-evaluation-harness                 | nothing           |
    | a folder with `adapter_config.json`           | peft: LoRA of o_proj, or of down_proj | nothing           |
    | `.gguf`                                       | llama.cpp, repeng, EasySteer          | layer, if several |

    A `.pt` file whose rows are those of all layers is known by its rows of zeros, at layers without a vector. One of
    hotwire-vllm without any can't be told from the post's, so save the rows that are meant.

    Sites are those of TransformerLens. "mlp_out" and "attn_out" lie after a norm that follows the MLP or the attention
    (Gemma 2 and 3, OLMo 2), where steering-vectors ("mlp", "self_attn") and power_steering ("down_proj") add before it,
    and a file doesn't say which model it is for. So on such a model their vectors do something else here, and only
    those of "decoder_block" and "layer_output" do the same.

    A value that was read so is a value like any other: it steers, is evaluated beside random controls, and is shown on
    the page. It knows no prompts and no objective, so measures that need these ask for them.

    Args:
        path: the file, or the folder of a peft adapter.
        layer: the block at which vectors act, counted from 0; of a file with several layers, the one to read.
        site: "mlp_out", "resid_post" or "attn_out"; by default what the file says, or else "mlp_out", where a vector
            does the same as at "resid_post".
        model: the name of the model that the values belong to, for the provenance; by default what the file says.

    Returns:
        `SteeringVectors` or `SteeringAdapters`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of an unknown kind or too large, holds what can't be expressed here, or doesn't
            say something that was not given either.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}: check the path.")
    kind = kind_of(path)
    given = {name: value for name, value in {"layer": layer, "site": site}.items() if value is not None}
    if kind is None:
        if given or model is not None:
            raise ValueError(
                f"{path} is no file of another tool, and files of melbo_lens say themselves where they act: "
                f"{', '.join([*given] or ['model'])} can't be chosen."
            )
        return loading.load(path)
    if isinstance(layer, bool) or (layer is not None and (not isinstance(layer, int) or layer < 0)):
        raise ValueError(f"layer={layer!r} must be an integer and must not be negative: count blocks from 0.")
    read = import_module(f"melbo_lens.imports.{READERS[kind]}").read
    known = inspect.signature(read).parameters
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{path} is a {kind} file, for which {unknown} can't be chosen: leave it out.")
    value = read(path, **given)
    return value if model is None else replace(value, provenance={**value.provenance, "model": model})


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Returns "gguf", "peft" or "torch"; None for what is not a known file of another tool."""
    path = Path(path)
    if path.is_dir():
        return "peft"
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"GGUF":  # first, since byte 8 counts its tensors, of which there may be 123: "{"
        return "gguf"
    if start[8:] == b"{":  # safetensors: the length of a JSON header, and the header
        return None
    # a zip archive, or a pickle, as versions of torch before 1.6 wrote
    return "torch" if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5") else None
