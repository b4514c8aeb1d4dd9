"""Do the built pages of docs/ work from a disk?  Headless Chromium opens them, searches, and asks no host."""

import os

import pytest

from tests import browser
from tests.readme import ROOT

SITE = ROOT / "build" / "site"
PAGES = [
    "index.html",
    "tutorial.html",
    "method.html",
    "results.html",
    "exports.html",
    "reference/learn.html",
    "notebooks/08_a_real_model.html",
    "notebooks/01_quickstart.html",
]
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def open_browser():
    browser.require()
    if not (SITE / "index.html").is_file():
        message = "there are no pages in build/site: run make docs first"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    with browser.browse() as page:
        yield page


@pytest.fixture
def page(open_browser):
    yield open_browser
    assert open_browser.logged() == [] and open_browser.requests() == []


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_without_errors_or_requests_and_fits_its_width(page, name, width):
    page.resize(width)
    page.open(SITE / name)
    page.wait("document.querySelector('article h1') !== null")
    assert page.run("return document.documentElement.scrollWidth") <= width + 1


def test_formulas_are_drawn_by_the_browser(page):
    page.open(SITE / "method.html")
    heights = page.run(
        "return [...document.querySelectorAll('math[display=block]')].map(f => f.getBoundingClientRect().height)"
    )
    assert len(heights) >= 6 and min(heights) > 20
    text = page.run("return document.querySelector('article').innerText")
    assert "$" not in text and "klzzwxh" not in text  # Markdown's mark of an escape, which a formula must not hold


def test_the_search_works_from_a_disk(page):
    page.resize(1400)
    page.open(SITE / "index.html")
    page.run("document.querySelector('label[for=__search]').click()")
    page.run(
        "const box = document.querySelector('.md-search__input'); box.focus(); box.value = 'calibrate_radius';"
        " box.dispatchEvent(new KeyboardEvent('keyup', {key: 's', bubbles: true}));"
        " box.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    page.wait("document.querySelectorAll('.md-search-result__item').length > 0")
    assert "radius" in page.run("return document.querySelector('.md-search-result__item').innerText").lower()
