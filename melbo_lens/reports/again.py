"""How is a run repeated?  As a few lines of Python, from the settings that it kept."""

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from melbo_lens.methods.adapters import fit_adapters
from melbo_lens.methods.contrastive import fit_contrastive
from melbo_lens.methods.cpe import fit_cpe
from melbo_lens.methods.dct import fit_dct
from melbo_lens.methods.jacobian import fit_jacobian
from melbo_lens.methods.melbo import fit_vectors
from melbo_lens.methods.noise import noise_vectors
from melbo_lens.reports.findings import Findings
from melbo_lens.sweeps.trials import trial_from

FITS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (fit_vectors, fit_adapters, fit_cpe, fit_dct, fit_jacobian, fit_contrastive, noise_vectors)
}
SETS = ("prompts", "positive_prompts", "negative_prompts")  # which a method takes, in its order
# given by hand, without consequence, or said by another setting (alpha by the scale)
LEFT_OUT = {"model", *SETS, "batch_size", "progress", "checkpoint", "init", "alpha"}
KEPT_AS = {"source_layers": "source_layer"}  # in the provenance
MOST_TRIALS = 60


def snippet(findings: Findings) -> str:
    """Returns Python that does the same once more; empty if the settings don't suffice.

    Prompts are given as the ids of their tokens where these are known and of one length, since a text would be
    tokenized again.
    """
    known = findings.vectors.provenance
    if "derived" in known and not findings.search:
        return ""
    parts = known.get("parts", [known])
    # a part of a search may be a difference of means, which was learned from other prompts than the search's
    first = next((part for part in parts if "prompts" in part), parts[0])
    sets = ["prompts"] if findings.search else [name for name in SETS if name in first]
    if findings.search:  # of several searches, each from prompts of its own?
        asked = {json.dumps(part["prompt_tokens"]) for part in parts if "prompt_tokens" in part}
        written = 0 if findings.written is None else findings.written.rows.prompt_text.nunique()
        if len(asked) > 1 or written > len(first.get("prompts", range(written))):
            return ""
    head = ["import torch", "", "import melbo_lens as ml", "", *_model(first)]
    head += [line for name in sets or ["prompts"] for line in _prompts(first, name)]
    if findings.search:
        return "\n".join([*head, *_search(findings.search)])
    method = FITS.get(str(known.get("method")))
    if method is None or "parts" in known or known.get("init") is not None:
        return ""
    wanted = inspect.signature(method).parameters
    if known.get("target_layer") is None and "target_layer" in wanted and "target_hook" not in wanted:
        return ""  # its slice was read at a hook, which it takes from a slice only
    left_out = LEFT_OUT | ({"target_hook"} if known.get("target_layer") is not None else {"target_layer"})
    given = {name: known.get(KEPT_AS.get(name, name)) for name in wanted if name not in left_out}
    lines = [f"    {name}={_literal(name, value)}," for name, value in given.items() if value is not None]
    asked = [f"    {name}," for name in ["model", *sets]]
    some = [f"vectors = vectors[{known['rows']!r}]"] if "rows" in known else []
    return "\n".join([*head, f"vectors = ml.{method.__name__}(", *asked, *lines, ")", *some])


def _model(known: Mapping[str, Any]) -> list[str]:
    name, dtype = known.get("model", "..."), known.get("dtype", "float32")
    rest = "" if dtype == "float32" else f", dtype={dtype!r}"
    expected = repr(known["fingerprint"]) if "fingerprint" in known else ""
    return [f"model = ml.ModelKey({name!r}{rest}).load({expected})  # or the same model, loaded in your own way"]


def _prompts(known: Mapping[str, Any], name: str) -> list[str]:
    ids = known.get(f"{name.removesuffix('s')}_tokens")
    if ids and len({len(row) for row in ids}) == 1:
        return [f"{name} = torch.tensor({ids!r})"]
    return [f"{name} = {known.get(name, '...')!r}"]


def _search(search: Mapping[str, Any]) -> list[str]:
    settings = search.get("settings", {})
    plan = [f"    ml.{trial_from(one)!r}," for one in search["plan"][:MOST_TRIALS]]
    if len(search["plan"]) > MOST_TRIALS:
        plan.append(
            f"    # and {len(search['plan']) - MOST_TRIALS} more, which the file about.json beside this page lists"
        )
    names = ("target_positions", "max_new_tokens", "seed")
    rest = [f"{name}={_literal(name, settings[name])}" for name in names if name in settings]
    return ["plan = [", *plan, "]", f"found = ml.discover({', '.join(['model', 'prompts', 'plan=plan', *rest])})"]


def _literal(name: str, value: Any) -> str:
    return str(value) if name.endswith("positions") else repr(value)  # positions are kept as Python writes them
