"""What is on a page?  Findings as cards, a map, controls, figures and tables, in a single HTML file that opens offline.

All text that a model wrote is escaped, and what can't be seen in it is spelled out.
"""

import base64
import hashlib
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from melbo_lens.evaluation.departures import KINDS, NATURAL, kinds_of
from melbo_lens.evaluation.rates import overall
from melbo_lens.files import write_text
from melbo_lens.reports import ladder
from melbo_lens.reports.again import snippet
from melbo_lens.reports.columns import columns, map_says, packed
from melbo_lens.reports.findings import Findings
from melbo_lens.reports.limits import limits
from melbo_lens.reports.pictures import as_completions, figures, token_views, which_rows
from melbo_lens.search.cards import (
    COLORS,
    Rate,
    anchor,
    cards_of,
    color_of,
    html,
    namer,
    of_several,
    percent,
    short,
    words,
)
from melbo_lens.search.written import Written
from melbo_lens.tables import seen

HIDDEN_SETTINGS = (
    *("prompts", "prompt_tokens", "positive_prompts", "positive_prompt_tokens"),
    *("negative_prompts", "negative_prompt_tokens", "parts", "rows", "matched_to", "effects", "minus"),
)
FIRST_CARDS, MOST_CARDS, MOST_TRIALS, MOST_NOISE = 12, 40, 1000, 20  # the cards after the first ones are folded
SECTIONS = (
    "Findings Map Controls Radii Layers Similarity Tokens Trials Vectors Completions Prompts Settings Limits".split()
)
# only the page's own scripts, named by their digests, are run, and nothing is asked for from anywhere
POLICY = (
    "default-src 'none'; script-src SCRIPTS; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'; "
    "base-uri 'none'"
)
WHOLE, SHARE = "{:.0f}", "{:.0%}"
TRIAL_CELLS = {
    "method": "{}",
    "failure": "{}",
    "radius": "{:.3g}",
    "seconds": "{:.1f}",
    **dict.fromkeys("source_layer target_layer seed n_vectors n_adapters n_factors".split(), WHOLE),
    **dict.fromkeys("readable nothing wording content noise".split(), SHARE),
}


def write_page(findings: Findings, path: str | os.PathLike[str]) -> Path:
    """Writes the page of findings, and returns its path."""
    written = findings.everything
    behaviors = findings.behaviors
    has_steered = len(written.steered) > 0
    evaluation = overall(as_completions(written), behaviors) if behaviors and has_steered else None
    table = ladder.ladder(written) if has_steered else pd.DataFrame()
    every = cards_of(written, findings.looks, findings.twins)
    n_usual, cards = sum(card.no_more_than_controls for card in every), every[:MOST_CARDS]
    shown, usual = ([card for card in cards if card.no_more_than_controls is folded] for folded in (False, True))
    drawn = figures(findings, written, evaluation, table, [*shown, *usual])
    pictures = {picture.anchor: picture for picture in drawn}
    tokens = token_views(findings, written)
    kinds = kinds_of(written.rows)
    data = columns(findings, written)
    trials = [] if findings.trials is None else _trial_rows(findings.trials.head(MOST_TRIALS))
    has = {"trials": bool(trials), "tokens": tokens is not None, "map": len(kinds) > 0}
    has |= {"controls": has["map"], "radii": has["map"]}
    has |= {"layers": bool({"layer-map", "layers", "changes"} & pictures.keys())}
    has |= {"similarity": bool({"cosines", "effect-cosines"} & pictures.keys())}
    known = findings.vectors.provenance
    page = rendered(
        "page",
        title=findings.title,
        lead=lead(written),
        summary=[repr(findings.vectors), repr(findings.completions)] if findings.written is None else [],
        sections=[(name.lower(), name) for name in SECTIONS if has.get(name.lower(), True)],
        words=words(of_several(written.directions)),
        cards=html(shown[:FIRST_CARDS]),
        more=html(shown[FIRST_CARDS:]),
        n_more=len(shown[FIRST_CARDS:]),
        n_cards=len(shown),
        usual=html(usual),
        n_usual=n_usual,
        n_usual_cards=len(usual),
        has_twin=bool(findings.twins),
        n_groups=len(every) - n_usual,
        shares=written.shares,
        has_plain=bool(written.plain),
        counts=kinds.value_counts().to_dict() | {"": 0},
        n_directions=len(kinds),
        noise=_noise(written),
        map_says=map_says(findings, written),
        controls=_controls(written),
        judged=written.judged,
        limit=-NATURAL,
        rates=[] if evaluation is None else evaluation.summary.to_dict("records"),
        note="" if evaluation is None else evaluation.note,
        pictures=list(pictures.values()),
        ladder=ladder.rows_of(table),
        ladder_names=[
            (short(row.behavior or row.example), color_of(number))
            for number, row in enumerate(written.groups.head(ladder.MOST_GROUPS).itertuples())
        ],
        which_rows=which_rows(findings),
        has_layers=has["layers"],
        has_cosines=has["similarity"],
        tokens=tokens.html() if tokens else "",
        trials=trials,
        n_trials=0 if findings.trials is None else len(findings.trials),
        behaviors=list(behaviors),
        prompts=data["prompts"],
        n_rows=len(written.rows),
        n_rows_shown=len(data["rows"]["kind"]),
        again=snippet(findings),
        settings=[
            *((key, value) for key, value in known.items() if key not in HIDDEN_SETTINGS),
            *findings.search.get("settings", {}).items(),
            *((key, value) for key, value in findings.completions.settings.items() if key != "perturbations"),
        ],
        limits=list(limits(findings, written)),
        data=packed(
            {
                **data,
                "groups": [short(row.behavior or row.example) for row in written.groups.itertuples()],
                "colors": [color_of(number) for number in range(len(written.groups))],
                "n_colors": len(COLORS),
                "cards": len(cards),
            }
        ),
        script=file_of("page.js"),
        later=file_of("later.js"),
    )
    write_text(path, page)
    return Path(path)


def rendered(name: str, **values: Any) -> str:
    """Returns a page from its template, with its style, and with a policy that lets no script run but its own."""
    environment = Environment(
        loader=PackageLoader("melbo_lens.reports", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"seen": seen, "percent": percent}
    style = file_of("page.css") + files("melbo_lens.search").joinpath("cards.css").read_text(encoding="utf-8")
    page = environment.get_template(f"{name}.html.jinja").render(style=style, policy=Markup(POLICY), **values)
    allowed = {
        base64.b64encode(hashlib.sha256(script.encode("utf-8", "backslashreplace")).digest()).decode()
        for kind, script in re.findall(r"<script([^>]*)>(.*?)</script", page, re.DOTALL)
        if "application/" not in kind
    }
    return page.replace(POLICY, POLICY.replace("SCRIPTS", " ".join(f"'sha256-{one}'" for one in sorted(allowed))), 1)


def file_of(name: str) -> str:
    """Returns the text of a file that lies beside this one."""
    return files("melbo_lens.reports").joinpath(name).read_text(encoding="utf-8")


def lead(written: Written) -> str:
    """Says in three sentences what was tried, what was found, and what random vectors can tell of it."""
    random = written.rows[written.rows.kind == "random"]
    n, by_random = len(written.groups), random.group.nunique()
    kinds, prompts = kinds_of(written.rows), written.rows.prompt.nunique()
    if not len(kinds):
        return "There are no steered completions."
    if not written.plain:
        return (
            f"{len(kinds):,} directions were tried without an unsteered completion beside them, so what they change is "
            "not known: generate with include_unsteered=True."
        )
    parts = {name: percent(share) for name, share in written.shares.items()}
    noise = f", {parts['noise']} write noise" if written.judged else ""
    tried = (
        f"{len(kinds):,} directions of {len(written.directions):,} vectors were tried on {prompts} "
        f"prompt{'s' if prompts != 1 else ''}: {parts['content']} change the content, {parts['wording']} the "
        f"wording{noise}, {parts['nothing']} do nothing. What they write forms {n} group{'s' if n != 1 else ''}"
    )
    if random.empty:
        return f"{tried}; no random vectors were tried."
    unseen = percent(Rate(0, len(random)).interval[1], 1)
    return (
        f"{tried}, of which random vectors of equal norm write {by_random or 'none'} as well. In their "
        f"{len(random):,} completions a share of up to {unseen} can go unseen."
    )


def _controls(written: Written) -> list[dict[str, Any]]:
    """The shares of completions that became what, under learned and under random vectors."""
    rows = written.rows[written.rows.kind != "unsteered"]
    names = {"steered": "learned vectors", "random": "random vectors of equal norm"}
    return [
        {"kind": name, "n": f"{len(part):,}", **part.change.value_counts(normalize=True).reindex(KINDS, fill_value=0.0)}
        for kind, name in names.items()
        if len(part := rows[rows.kind == kind])
    ]


def _noise(written: Written) -> list[tuple[str, str, str]]:
    """Some of what directions that write noise write: the direction, its anchor, and the text."""
    rows = written.steered[written.steered.change == "noise"].drop_duplicates("text").head(MOST_NOISE)
    name = namer(written.directions)
    return [
        (name(*key), anchor(*key), row.text)
        for row in rows.itertuples()
        for key in [(int(row.trial), int(row.vector), int(row.sign))]
    ]


def _trial_rows(trials: pd.DataFrame) -> list[dict[str, str]]:
    """Returns the cells of each trial as texts; a cell that says nothing of this kind of trial is empty."""

    def row_of(trial: dict[str, Any]) -> dict[str, str]:
        known = {name: value for name, value in trial.items() if value == value and value is not None}
        texts = {name: form.format(known[name]) for name, form in TRIAL_CELLS.items() if name in known}
        layers = " to ".join(texts[name] for name in ("source_layer", "target_layer") if name in texts)
        n = next((texts[name] for name in ("n_vectors", "n_adapters", "n_factors") if name in texts), "")
        return {**dict.fromkeys(TRIAL_CELLS, ""), **texts, "layers": layers, "n": n}

    return list(map(row_of, trials.to_dict("records")))
