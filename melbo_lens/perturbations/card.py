"""What should a person know who finds a value on the hub?  `card` writes it from the value and its provenance."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import yaml

from melbo_lens.perturbations.rows import at_the_fit

MOST_ROWS = 64
# Entries of the provenance that have a section of their own, or say nothing to a reader.
ELSEWHERE = {
    *("prompts", "prompt_tokens", "effects", "sinks", "status", "rows", "parts", "matched_to", "derived", "versions"),
    *("method", "model", "fingerprint"),
    *("positive_prompts", "positive_prompt_tokens", "negative_prompts", "negative_prompt_tokens"),
}


def card(value: Any, repo_id: str) -> str:
    """Returns the `README.md` of a value: YAML for the hub, and what it is, how it was learned and what is not known.

    Args:
        value: any perturbation.
        repo_id: where it will lie, for the lines that load it.
    """
    provenance: Mapping[str, Any] = value.provenance
    model = provenance.get("model")
    head: dict[str, Any] = {"library_name": "melbo_lens", "tags": ["melbo_lens", "activation-steering", "melbo"]}
    if isinstance(model, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        head["base_model"] = model
    layers = ", ".join(map(str, value.source_layers))
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {type(value).__name__}: {len(value)} {value.word}{'s' if len(value) > 1 else ''} of layer {layers}",
        f"Made by {_plain(provenance.get('method', 'unknown'))} of melbo\\_lens"
        + (f" on {_plain(model)}." if model else "; for which model is not known."),
        _usage(value, repo_id),
        "## Settings",
        _table(["setting", "value"], [[key, json.dumps(provenance[key])] for key in _settings(provenance)])
        or "None are recorded.",
        "## Learned from",
        *_learned_from(provenance),
        "## Controls",
        _controls(value.word, provenance),
        "## Figures",
        _figures(value),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(value)),
    ]
    return "\n\n".join(sections) + "\n"


def _learned_from(provenance: Mapping[str, Any]) -> list[str]:
    """The prompts of a fit, or the two sets of a difference of means."""
    sides = [side for side in ("positive", "negative") if f"{side}_prompts" in provenance]
    if not sides:
        return [_prompts(_listed(provenance.get("prompts")))]
    return [
        line for side in sides for line in (f"The {side} prompts:", _prompts(_listed(provenance[f"{side}_prompts"])))
    ]


def _usage(value: Any, repo_id: str) -> str:
    return (
        "```python\n"
        "import melbo_lens as ml\n\n"
        f'{value.word}s = ml.from_pretrained("{repo_id}")\n'
        f"with ml.steer(model, {value.word}s[0]):  # a model of TransformerLens\n"
        "    model.generate(...)\n"
        f"with ml.on_transformers(hf_model, {value.word}s[0]):  # a plain Hugging Face model\n"
        "    hf_model.generate(...)\n"
        "```"
    )


def _settings(provenance: Mapping[str, Any]) -> list[str]:
    return [
        key
        for key, entry in provenance.items()
        if key not in ELSEWHERE and not isinstance(entry, Mapping) and len(json.dumps(entry)) <= 200
    ]


def _listed(entry: Any) -> list[Any]:
    """Returns a list in the provenance, or an empty one where there is none."""
    return list(cast(Sequence[Any], entry)) if isinstance(entry, list | tuple) else []


def _prompts(prompts: list[Any]) -> str:
    if not prompts:
        return "No prompts are recorded."
    shown = "\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts[:MOST_ROWS])
    fence = "`" * (3 + max([0, *map(len, re.findall("`+", shown))]))  # no prompt can end the block
    more = f"\n\nand {len(prompts) - MOST_ROWS} more." if len(prompts) > MOST_ROWS else ""
    return f"{fence}json\n{shown}\n{fence}{more}"


def _controls(word: str, provenance: Mapping[str, Any]) -> str:
    if "matched_to" in provenance:
        return f"These are themselves a control: random {word}s of the same norms as learned ones."
    return (
        f"Compare with random {word}s of equal norm, `ml.random_like({word}s, model)`, and with the unsteered model: "
        f"`ml.generate` writes both beside the steered completions. No result of that comparison is in this file."
    )


def _figures(value: Any) -> str:
    """A row for each vector or adapter: its norm or scale, its objective, and its effect, as far as they are known."""
    columns: dict[str, Sequence[float]] = dict(value.measures())
    if len(value.history):
        columns["objective, last"] = value.history[-1].tolist()
        columns["objective, first"] = value.history[0].tolist()
    for name, sign in (("effect (change / norm of the target)", 1), ("effect of minus it", -1)):
        effects, _ = at_the_fit(value.provenance, len(value), sign)
        if not any(map(math.isnan, effects)):
            columns[name] = effects
    rows = [[str(k), *(f"{column[k]:.4g}" for column in columns.values())] for k in range(min(len(value), MOST_ROWS))]
    more = f"\n\nand {len(value) - MOST_ROWS} more." if len(value) > MOST_ROWS else ""
    return _table([value.word, *columns], rows) + more


def _limits(value: Any) -> list[str]:
    provenance: Mapping[str, Any] = value.provenance
    prompts = _listed(provenance.get("prompts"))
    lines: list[str] = []
    if prompts:
        lines.append(
            f"Learned on {len(prompts)} prompt{'s' if len(prompts) > 1 else ''}; what others show is not said."
        )
    if provenance.get("status"):
        lines.append(f"How the fit ended: {_plain(provenance['status'])}")
    sides = ((prefix, at_the_fit(provenance, len(value), sign)[1]) for prefix, sign in (("", 1), ("minus ", -1)))
    sinks = [f"{prefix}{k}" for prefix, sunk in sides for k, one in enumerate(sunk) if one]
    if sinks:
        lines.append(f"Rows that end in an attention sink, whose effect is no behaviour: {', '.join(sinks)}.")
    if provenance.get("derived"):
        lines.append(f"Not as they were learned: {_plain(', '.join(map(str, provenance['derived'])))}.")
    if not len(value.history):
        lines.append("No objective is recorded: the values were derived, or were made elsewhere.")
    if provenance.get("versions"):
        lines.append(f"Made with {_plain(', '.join(f'{k} {v}' for k, v in provenance['versions'].items()))}.")
    lines.append(f"The sign of a {value.word} matters: look at both, and at several scales.")
    lines.append("They fit the model that they were learned on; another one of the same shape is not refused.")
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: Any) -> str:
    """Returns text that Markdown and HTML leave as it is, in one line."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~!&$])", r"\\\1", str(text))
    return " ".join(escaped.split())
