"""How are findings shown?  `report` writes a page, and `save_results` a folder with its page."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from melbo_lens.arguments import public
from melbo_lens.evaluation.rates import Behavior
from melbo_lens.generation.completions import Completions
from melbo_lens.perturbations.perturbation import Perturbation
from melbo_lens.reports.comparison import compare
from melbo_lens.reports.findings import TITLE, Findings
from melbo_lens.reports.page import write_page
from melbo_lens.reports.saved import PAGE
from melbo_lens.search.discovery import Discovery


@public
def report(
    findings: Findings | Discovery | Perturbation | Sequence[Findings | Discovery],
    completions: Completions | None = None,
    behaviors: Mapping[str, Behavior] | None = None,
    path: str | os.PathLike[str] = "report.html",
    title: str = TITLE,
    **measured: Any,
) -> Path:
    """Writes one self-contained page.

    It opens with a card for each group of completions that was found; then come a map of all vectors, controls, a
    ladder of radii, figures, tables of vectors and completions, the settings, and what the page can't say. What is not
    given is left out of the page; no model runs here. Of several findings it shows what they found side by side.

    Args:
        findings: the findings of a run; or what a search or a sweep found (`discover`, `gather`); or a list of several
            of these, which are compared; or vectors alone, with the other fields of `Findings` after them.
        completions, behaviors, title, measured: the other fields of `Findings` (changes, effects, control, ...), to be
            given only with vectors; behaviours and a title also with what a search or a sweep found. Figures draw on
            these measures.
        path: the file to write; its folder must exist.

    Returns:
        The path written.

    Raises:
        TypeError: vectors are given without completions, or findings together with one of their own fields.
        ValueError: a list holds fewer than two findings.
    """
    if isinstance(findings, str | os.PathLike):
        raise TypeError(f"findings={str(findings)!r} is a path: ml.report_directory writes the page of a folder.")
    if isinstance(findings, Sequence) and not isinstance(findings, Perturbation):
        if completions is not None or measured:
            raise TypeError("several findings know their completions and measures themselves: give them and a path.")
        if len(findings) < 2:
            raise ValueError(f"{len(findings)} findings were given to compare: give at least two, or one by itself.")
        several = [
            Findings.of_trials(one, behaviors, f"search {number}") if isinstance(one, Discovery) else one
            for number, one in enumerate(findings, 1)
        ]
        return compare(several, path, "Side by side" if title == TITLE else title)
    if isinstance(findings, Discovery):
        if completions is not None or measured:
            raise TypeError("a search knows its completions and measures itself: give it, behaviours, path and title.")
        return write_page(Findings.of_trials(findings, behaviors, title), path)
    if isinstance(findings, Findings):
        if completions is not None or behaviors is not None or measured or title != TITLE:
            raise TypeError(
                "findings say their completions, behaviours, title and measures themselves: "
                "give the findings and a path alone."
            )
        return write_page(findings, path)
    if completions is None:
        raise TypeError(
            "completions is missing: give them beside the vectors, or in place of both Findings, or what ml.gather "
            "makes of the folder of a sweep."
        )
    return write_page(_findings(findings, completions, behaviors, title, measured), path)


def _findings(
    vectors: Perturbation,
    completions: Completions,
    behaviors: Mapping[str, Behavior] | None,
    title: str,
    measured: Mapping[str, Any],
) -> Findings:
    known = [field.name for field in fields(Findings)]
    for name in measured:
        if name not in known:
            meant = get_close_matches(name, known, 1)
            raise TypeError(
                f"{name} is no field of Findings: "
                + (f"did you mean {meant[0]}?" if meant else f"choose from {', '.join(known)}.")
            )
    return Findings(vectors, completions, behaviors or {}, title, **measured)


@public
def save_results(
    directory: str | os.PathLike[str],
    vectors: Perturbation,
    completions: Completions,
    behaviors: Mapping[str, Behavior] | None = None,
    title: str = TITLE,
    **measured: Any,
) -> Path:
    """Writes vectors, completions, measures and the page that shows them to a folder, which is made if it is missing.

    Args:
        directory: the folder to write to. Each file is written whole or not at all.
        vectors, completions, behaviors, title, measured: the fields of `Findings`.

    Returns:
        The path of the page.
    """
    _findings(vectors, completions, behaviors, title, measured).save(directory)
    return report_directory(directory)


@public
def report_directory(
    directory: str | os.PathLike[str],
    behaviors: Mapping[str, Behavior] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes the page of a folder again from the files in it.

    Args:
        directory: a folder that `Findings.save`, `save_results`, `melbo-lens fit` or a sweep wrote.
        behaviors: replaces the behaviours of the run.
        path: the page to write; `report.html` in the folder by default.

    Raises:
        FileNotFoundError: the folder lacks one of its files.
        ValueError: a file is damaged.
    """
    return write_page(Findings.load(directory, behaviors), Path(directory) / PAGE if path is None else path)
