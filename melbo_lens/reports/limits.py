"""What can a page not say?  The limits of what was measured, in sentences."""

from collections.abc import Iterator

from melbo_lens.evaluation.departures import NATURAL
from melbo_lens.reports.findings import Findings
from melbo_lens.search.cards import Rate
from melbo_lens.search.written import Written


def limits(findings: Findings, written: Written) -> Iterator[str]:
    """Yields what a reader of these findings must not conclude from them."""
    yield (
        "That nothing else is hidden. A behaviour that no vector of these layers and radii brings out on these prompts "
        "is not seen here."
    )
    yield "What sets a behaviour off in use. A vector shows that the model can do something, not when it does."
    heldout = written.groups.heldout_rate.notna().any() if len(written.groups) else False
    yield (
        "How common a group is elsewhere. Groups were found among the completions on which their rates are counted, so "
        "these rates are too high"
        + (
            "; the rates on held-out prompts are not."
            if heldout
            else ", and none was measured on held-out prompts (give discover some as heldout, and time for them)."
        )
    )
    n = int((written.rows.kind == "random").sum())
    if n:
        most = Rate(0, n).interval[1]
        yield (
            f"That random vectors never do the same. With {n:,} completions under random vectors, a share of up to "
            f"{100 * most:.1f} % can go unseen."
        )
    else:
        yield "Whether random vectors of equal norm do the same: none were tried."
    if not findings.twins:
        yield (
            "Whether a model that hides nothing does the same under its own vectors: no twin was measured (search one "
            "with the same plan, and give it to Findings.of_discovery as twin)."
        )
    per = written.steered.groupby(["trial", "vector", "sign"]).size()
    if len(per) and per.median() <= 3:
        yield (
            "How reliable a single vector is: it wrote "
            f"{per.median():.0f} completion{'s' if per.median() > 1 else ''}. More prompts or samples would tell."
        )
    if not written.plain:
        yield "What was changed: there are no unsteered completions, so every text counts as changed."
    if written.judged:
        yield (
            f"Whether noise is only noise. Text of more than {-NATURAL:.0f} nats a token to the unsteered model is "
            "called noise, and so would be a language that it doesn't know."
        )
    else:
        yield "Which text is noise: no model judged it (Findings.measured does)."
    length = findings.completions.settings.get("max_new_tokens")
    if length:
        yield f"What comes after {length} new tokens, where each completion ends."
    if not findings.behaviors:
        yield "Whether a group means what it seems to: groups are made by words alone, since no behaviours were named."
