"""Is a figure of a paper as wide as a column, legible, and vector graphics with its letters in it?"""

import builtins
import copy
import pickle
import re

import plotly.graph_objects as go
import pytest

import melbo_lens as ml
from melbo_lens.plots import paper
from tests import browser
from tests.unit.plots.test_figures import changes, completions

LEAST = 7  # points


def figure():
    return ml.plots.token_heatmap(changes(3, 30), completions=completions(text="שלום <b> é ∅"))


def sizes(value, name=""):
    """Every size of letters that a figure sets, with its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from sizes(inner, f"{name}.{key}")
    elif name.endswith("font.size"):
        yield name, value


@pytest.mark.parametrize(("columns", "inches"), [(1, 3.25), (2, 6.75)])
def test_it_has_a_columns_width_serif_letters_of_seven_points_and_no_title(columns, inches):
    for drawn in (figure(), ml.plots.behavior_rates(ml.evaluate(completions(), {"loud": "loud"}))):
        before = str(drawn.to_dict())
        made = drawn.to_paper(columns=columns)
        assert made.layout.width == pytest.approx(inches * 96) and "serif" in made.layout.font.family
        assert made.layout.title.text is None and made.layout.title.subtitle.text is None
        said = made.to_dict()
        said["layout"].pop("template")
        shown = [(name, size) for name, size in sizes(said) if "hoverlabel" not in name]
        assert len(shown) >= 4 and min(size for _, size in shown) * 72 / 96 >= LEAST, shown
        assert str(drawn.to_dict()) == before  # what it was made of stays as it was


def test_rows_keep_room_for_their_labels():
    vectors = ml.SteeringVectors.from_tensor(changes(60).change[:, 0], source_layer=0)
    made = ml.plots.cosine_similarity(vectors, completions(60, "text")).to_paper()
    low, high = made.layout.yaxis2.domain
    assert len(made.layout.yaxis2.categoryarray) == 60
    assert (made.layout.height - 60) * (high - low) >= 60 * 9.5  # but for the labels below


def test_every_figure_is_one_of_plotly_and_survives_copies():
    drawn = figure()
    assert isinstance(drawn, go.Figure) and isinstance(drawn, ml.plots.Figure)
    for copied in (copy.deepcopy(drawn), pickle.loads(pickle.dumps(drawn))):
        assert isinstance(copied, ml.plots.Figure) and copied.to_dict().keys() == drawn.to_dict().keys()
    cosines = ml.plots.cosine_similarity(ml.SteeringVectors.from_tensor(changes().change[:, 0], source_layer=0))
    assert isinstance(cosines, ml.plots.Figure)


def test_errors_say_what_to_do_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "_drawn", lambda *given: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=r"must end in \.pdf or \.svg"):
        figure().to_paper(tmp_path / "figure.png")
    with pytest.raises(ValueError, match=r"columns=3 must be one of \[1, 2\]"):
        figure().to_paper(tmp_path / "figure.pdf", columns=3)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_said_in_a_sentence(tmp_path, monkeypatch):
    import kaleido
    from kaleido.errors import ChromeNotFoundError

    def none(*given, **more):
        raise ChromeNotFoundError("no chrome")

    monkeypatch.setattr(kaleido, "calc_fig_sync", none)
    with pytest.raises(RuntimeError, match="found neither: install one"):
        figure().to_paper(tmp_path / "figure.pdf")
    real = builtins.__import__

    def refuse(name, *given, **more):
        if name.startswith("kaleido"):
            raise ModuleNotFoundError(name)
        return real(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'melbo-lens\[paper\]'"):
        figure().to_paper(tmp_path / "figure.pdf")
    assert list(tmp_path.iterdir()) == []


def fonts(page):
    """The fonts of a page, also of the forms that it draws, as (name, whether the file is within)."""
    found = {}

    def visit(resources):
        resources = resources.get_object()
        for name, font in resources.get("/Font", {}).items():
            font = font.get_object()
            inner = font.get("/DescendantFonts", [font])[0].get_object()
            described = inner.get("/FontDescriptor", {})
            within = font["/Subtype"] == "/Type3" or {"/FontFile", "/FontFile2", "/FontFile3"} & set(described)
            found[name] = (str(font.get("/BaseFont", "Type3")), bool(within))
        for form in resources.get("/XObject", {}).values():
            if "/Resources" in form.get_object():
                visit(form.get_object()["/Resources"])

    visit(page["/Resources"])
    return list(found.values())


@pytest.mark.browser
def test_a_pdf_has_the_size_of_its_column_its_fonts_and_readable_letters(tmp_path):
    browser.require()
    import pypdf

    figure().to_paper(tmp_path / "figure.pdf")
    document = pypdf.PdfReader(tmp_path / "figure.pdf")
    assert len(document.pages) == 1
    page = document.pages[0]
    assert float(page.mediabox.width) == pytest.approx(3.25 * 72, abs=1)
    embedded = fonts(page)
    assert embedded and all(within for _, within in embedded), embedded
    assert any(re.search("Serif|Times|Roman|Termes", name) for name, _ in embedded), embedded
    heights = []

    def look(text, current, matrix, font, size):
        if text.strip():
            across = [sum(matrix[2 + k] * current[2 * k + i] for k in (0, 1)) for i in (0, 1)]
            heights.append((abs(size) * (across[0] ** 2 + across[1] ** 2) ** 0.5, text))

    page.extract_text(visitor_text=look)
    assert len(heights) > 10 and min(heights)[0] == pytest.approx(paper.TEXT * 72 / 96, abs=0.01), min(heights)
    assert min(heights)[0] >= LEAST
    assert "token" in page.extract_text() and "Change at each" not in page.extract_text()


@pytest.mark.browser
def test_an_svg_is_vector_graphics_of_the_same_size(tmp_path):
    browser.require()
    ml.plots.behavior_rates(ml.evaluate(completions(), {"loud": "loud"})).to_paper(tmp_path / "figure.svg", columns=2)
    text = (tmp_path / "figure.svg").read_text()
    assert text.startswith("<svg") and 'width="648"' in text and "serif" in text and "<image" not in text
