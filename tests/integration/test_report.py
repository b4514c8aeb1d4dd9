"""Is the page one file that asks no host, holds what was found, and trusts no text?"""

import re

import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.completions import COLUMNS

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"


def completions(text="it is", n=4):
    rows = [(0, EVIL, "unsteered", None, 0, 0.0, 0, text, [1], [-0.1])]
    rows += [
        (0, EVIL, kind, k, sign, 1.0, 0, f"{text} {kind} {k}", [1], [-0.1]) for kind in ("steered", "random") for k in range(n) for sign in (1, -1)
    ]
    return ml.Completions(pd.DataFrame(rows, columns=COLUMNS).astype({"vector": "Int64"}))


@pytest.fixture
def page(tmp_path):
    vectors = ml.SteeringVectors(torch.randn(4, 6), 1, torch.rand(3, 4) + 1, {"model": EVIL, "prompts": [EVIL]})
    path = ml.report(vectors, completions(EVIL), {EVIL: "steered"}, tmp_path / "report.html", title=EVIL)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return path.read_text()


def test_text_is_escaped_everywhere(page):
    assert "alert" in page
    assert "<script>alert" not in page and "<img src=x" not in page and "onerror=alert(1)>" not in page


def test_it_loads_nothing_from_anywhere(page):
    outside = page[: page.index("plotly.js v")] + page[page.rindex("</script>") :] if "plotly.js v" in page else page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", outside)
    assert page.count("plotly.js v") == 1  # the library, once


def test_it_holds_rates_figures_and_every_completion(page):
    assert page.count("plotly-graph-div") == 3 and page.count('data-kind="steered"') == 8 and page.count('data-kind="random"') == 8
    assert "100.0 %" in page


def test_a_page_without_behaviours_or_history_is_a_page_too(tmp_path):
    vectors = ml.SteeringVectors(torch.randn(4, 6), 1)
    text = ml.report(vectors, completions(), path=tmp_path / "r.html").read_text()
    assert text.count("plotly-graph-div") == 1 and "Behaviours" not in text
