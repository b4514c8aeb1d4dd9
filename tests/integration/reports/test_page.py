"""Is the page one file that asks no host, holds what was found, and trusts no text?"""

import re
import sys

import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.generation.completions import COLUMNS
from melbo_lens.reports.findings import SCAN_COLUMNS_0_1_0 as SCAN_COLUMNS

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


def completions(text="it is", n=4, prompts=(EVIL,), scales=(1.0,)):
    rows = [(i, prompt, "unsteered", None, 0, 0.0, 0, text, [1], [-0.1]) for i, prompt in enumerate(prompts)]
    rows += [
        (i, prompt, kind, k, sign, scale, 0, f"{text} {kind} {k}", [1], [-0.1])
        for i, prompt in enumerate(prompts)
        for kind in ("steered", "random")
        for k in range(n)
        for sign in (1, -1)
        for scale in scales
    ]
    return ml.Completions(pd.DataFrame(rows, columns=COLUMNS).astype({"vector": "Int64"}), {"stop": [EVIL]})


def everything(text=EVIL, n=4, prompts=(EVIL,), scales=(0.5, 1.0)):
    """What `report` takes, with the same text wherever text goes."""
    torch.manual_seed(0)
    vectors = ml.SteeringVectors(torch.randn(n, 6), 1, torch.rand(3, n) + 1, {"model": text, "prompts": [text]})
    written = completions(text, n, prompts, scales)
    best = tuple(tuple((text, "b") for _ in range(3)) for _ in range(2))
    expected = ml.NextTokens(
        (text, "</script>", "c"),
        -torch.rand(2, 2),
        torch.zeros(2, 2).long(),
        best,
        -torch.rand(2, 3, 2),
        ("unsteered", text),
    )
    pairs = [(0, 2, 1, 1.0, 6.0, 2.0, 0.1, 1.0), (0, 3, 1, 1.0, 3.0, 2.0, 0.1, 1.0)]
    promoted = pd.DataFrame(
        [(0, text, [(text, 1.0)], [(text, -1.0)])], columns=["vector", "route", "promoted", "suppressed"]
    )
    return (vectors, written, {text: "steered", "other": "random 0"}), {
        "changes": ml.ActivationChanges(torch.rand(n, 2, 3), torch.ones(2, 3), (text, "</script>", "🧀"), (2, 3)),
        "effects": ml.TargetEffects(torch.randn(2 * n, 5), tuple(range(n)) * 2, (1,) * n + (-1,) * n, 3),
        "control": torch.rand(n),
        "ranked": pd.DataFrame({"vector": range(n), "sign": 1, "kl": torch.rand(n).tolist(), "entropy_change": 0.5}),
        "calibration": ml.Calibration(2.0, ((1.0, 0.25), (4.0, 1.0)), text, 0.5),
        "scan": ml.LayerScan(pd.DataFrame(pairs, columns=SCAN_COLUMNS)),
        "coherence": torch.rand(len(written)),
        "views": ml.plots.token_log_probs(expected) + ml.plots.top_tokens(promoted),
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    given, more = everything()
    path = ml.report(*given, folder / "report.html", title=EVIL, **more)
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    return path.read_text()


def without_libraries(page):
    plotly = re.search(r"<script[^>]*>/\*\*\n\* plotly\.js v.*?</script>", page, re.DOTALL)
    assert plotly, "plotly.js is not where it was"
    return page.replace(plotly[0], "").replace(ml.plots.embedding.circuitsvis_script(), "")


def test_text_is_escaped_everywhere(page):
    own = without_libraries(page)
    assert own.count("alert(1)") > 20
    assert (
        "<script>alert" not in own
        and "<img" not in own
        and "onerror=alert(1)>" not in own
        and "49" not in re.findall(r"&amp;(\S*)", own)
    )


def test_it_loads_nothing_from_anywhere_and_brings_each_library_once(page):
    own = without_libraries(page)
    assert not re.search(r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//|@import|url\(""", own)
    assert page.count("plotly.js v") == 1 and page.count("var CircuitsVis=") == 1


def test_it_holds_every_figure_every_completion_and_a_section_for_each_vector(page):
    assert re.findall(r'<figure id="figure-([\w-]+)"', page) == [
        "rates", "ranked", "objective", "cosines", "effect-cosines", "effects", "changes", "layers", "scales", "radius",
        "layer-map",
    ]  # fmt: skip
    assert without_libraries(page).count('class="plotly-graph-div"') == 11 and "Not drawn" not in page
    assert [page.count(f"<td>{kind}</td>") for kind in ("steered", "random", "unsteered")] == [16, 16, 1]
    assert re.findall(r'<details id="(vector-\d+)"', page) == [f"vector-{k}" for k in range(4)]
    assert "100.0 %" in page and page.count("CircuitsVis.render(") == 4


def test_sections_put_both_signs_beside_the_unsteered_text(tmp_path):
    text = ml.report(
        ml.SteeringVectors(torch.randn(4, 6), 1), completions("words"), path=tmp_path / "r.html"
    ).read_text()
    section = re.search(r'<details id="vector-2">.*?</details>', text, re.DOTALL)[0]
    assert re.findall(r'<td class="text">(.*?)</td>', section) == ["words", "words steered 2", "words steered 2"]


def test_a_page_without_behaviours_or_history_is_a_page_too(tmp_path):
    vectors = ml.SteeringVectors(torch.randn(4, 6), 1)
    text = ml.report(vectors, completions(), path=tmp_path / "r.html").read_text()
    assert (
        re.findall(r'<figure id="figure-([\w-]+)"', text) == ["ranked", "objective", "cosines"]
        and 'id="behaviors"' not in text
    )
    assert "Not drawn: these vectors have no history" in text


def test_adapters_have_a_page_and_nothing_to_rank_is_said(tmp_path):
    adapters = ml.SteeringAdapters.from_factors(torch.randn(4, 2, 5), torch.randn(4, 6, 2), 1)
    text = ml.report(adapters, completions(), {"x": "steered"}, tmp_path / "a.html").read_text()
    assert "SteeringAdapters(4 x rank 2" in text and "figure-cosines" not in text
    empty = ml.Completions(completions().table.head(1))
    text = ml.report(adapters, empty, {"x": "steered"}, tmp_path / "b.html").read_text()
    assert "There are no steered completions to rank." in text and "Not drawn: there are no rows to draw." in text


def test_100_vectors_and_10_prompts_stay_below_10_megabytes(tmp_path):
    long = (
        "a completion of about thirty tokens, as a small model writes them when it is asked for something that it was "
        "not taught, or so "
    )
    (vectors, written, _), more = everything(long, 100, tuple(f"{i} {long}" for i in range(10)), scales=(1.0,))
    tokens = tuple(f" token{i}" for i in range(200))
    more["changes"] = ml.ActivationChanges(torch.rand(100, 24, 200), torch.ones(24, 200), tokens, tuple(range(1, 25)))
    size = (
        ml.report(vectors, written, {"long": "steered", "other": "random"}, tmp_path / "large.html", **more)
        .stat()
        .st_size
    )
    assert 7e6 < size < 10e6


def test_of_5000_vectors_the_page_says_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["melbo_lens.reports.page"], "MOST_ROWS", 2000)
    vectors = ml.SteeringVectors(torch.randn(5000, 4), 1)
    text = ml.report(
        vectors, completions("x", 5000, ("p",)).filter(kind="steered", sign=1), path=tmp_path / "many.html"
    ).read_text()
    assert "Sections of the first 300 of 5000 vectors." in text and "The first 2000 of 5000 completions." in text
    assert text.count("<details") == 300 and len(text) < 15e6
