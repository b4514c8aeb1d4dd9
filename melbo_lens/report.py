"""How does everything found fit on one page?  `report` writes a single HTML file that opens offline and trusts no text of a model."""

import os
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader

from melbo_lens import plots
from melbo_lens.completions import Completions
from melbo_lens.evaluation import Behavior, evaluate, shows
from melbo_lens.perturbations import SteeringVectors

HIDDEN_SETTINGS = ("prompt_tokens", "parts", "prompts")


def report(
    vectors: SteeringVectors,
    completions: Completions,
    behaviors: Mapping[str, Behavior] | None = None,
    path: str | os.PathLike[str] = "report.html",
    title: str = "What the vectors elicit",
) -> Path:
    """Writes one self-contained page: rates, figures, a table of completions with search and filters, and the settings.

    Args:
        vectors: what was learned.
        completions: from `generate`.
        behaviors: name -> regular expression or function of the text.
        path: where to write; its folder must exist.
        title: heading of the page.

    Returns:
        The path written.
    """
    behaviors = behaviors or {}
    evaluation = evaluate(completions, behaviors) if behaviors else None
    table = completions.table
    shown = {name: shows(table.text, behavior).tolist() for name, behavior in behaviors.items()}
    rows = table.assign(
        vector=table.vector.map(str).replace("<NA>", ""),
        sign=table.sign.map({1: "+", -1: "−", 0: ""}),
        scale=table.scale.map(lambda scale: f"{scale:g}" if scale else ""),
        behavior=[", ".join(name for name, hits in shown.items() if hits[i]) for i in range(len(table))],
    )
    environment = Environment(loader=PackageLoader("melbo_lens", "."), autoescape=True)
    page = environment.get_template("report.html.jinja").render(
        title=title,
        summary=f"{vectors!r}. {completions!r}.",
        rates=[] if evaluation is None else evaluation.summary.to_dict("records"),
        note="" if evaluation is None else evaluation.note,
        figures=plots.embed(_figures(vectors, evaluation)),
        behaviors=list(behaviors),
        rows=rows.to_dict("records"),
        prompts=list(dict.fromkeys(table.prompt_text)),
        settings=[(key, value) for key, value in vectors.provenance.items() if key not in HIDDEN_SETTINGS],
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _figures(vectors: SteeringVectors, evaluation: object) -> list[object]:
    made = [] if evaluation is None else [plots.behavior_rates(evaluation)]
    if vectors.history.shape[0]:
        made.append(plots.objective_history(vectors))
    return [*made, plots.cosine_similarity(vectors)]
