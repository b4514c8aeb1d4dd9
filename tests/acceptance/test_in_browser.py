"""Does the page work as a person uses it?  Headless Chromium opens it, looks, filters and follows links.

Nothing in the page may run a model's text or ask for anything.
"""

import io

import pytest
from PIL import Image

import melbo_lens as ml
from tests import browser
from tests.integration.reports.test_page import everything
from tests.unit.plots.test_tokens import HARD, hard_changes

pytestmark = pytest.mark.browser
# every way in which text could become a program; each would set window.hacked
ATTACKS = (
    "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2><svg onload=window.hacked=3>"
    "\"'&<a href='javascript:hacked=4'>b</a>"
    "<img/src='x'/onerror=window.hacked=5>"
)
VISIBLE = "[...document.querySelectorAll('#table tbody tr')].filter(row => row.offsetParent !== null)"


@pytest.fixture(scope="module")
def open_browser():
    browser.require()
    with browser.browse() as page:
        yield page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    given, more = everything("it is athens")
    return ml.report(*given, tmp_path_factory.mktemp("page") / "report.html", title="A page", **more)


@pytest.fixture
def page(open_browser, written):
    """The page, just opened at the usual width; at the end nothing may have been logged or asked for."""
    open_browser.dark(False)
    open_browser.resize(1400)
    open_browser.open(written)
    yield open_browser
    assert open_browser.logged() == [] and open_browser.requests() == []


def ink(page, selector):
    """How many colours a thing shows, once it is scrolled to: an empty box has one."""
    element = page.driver.find_element("css selector", selector)
    page.run("arguments[0].scrollIntoView()", element)
    return len(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB").getcolors(1_000_000))


def test_every_figure_is_drawn(page):
    page.wait("document.querySelectorAll('.plotly-graph-div .main-svg').length >= 11")
    names = page.run("return [...document.querySelectorAll('figure')].map(figure => figure.id)")
    assert len(names) == 11
    for name in names:
        marks = "[...document.querySelectorAll('#%s .heatmaplayer image, #%s .trace path, #%s .bars path')].length" % (
            (name,) * 3
        )
        page.wait(f"{marks} > 0")
        assert ink(page, f"#{name} .figure") > 20, name
        box = page.run(
            f"const b = document.querySelector('#{name} .plotly-graph-div').getBoundingClientRect();"
            " return [b.width, b.height]"
        )
        assert box[0] > 900 and box[1] > 250


def test_hovering_shows_the_exact_number_and_the_completion(page):
    page.wait("document.querySelectorAll('#figure-changes .heatmaplayer image').length > 0")
    page.point("#figure-changes .nsewdrag", 0.5, 0.6)
    page.wait("document.querySelector('#figure-changes .hoverlayer')?.textContent.includes('it is athens')")
    value = float(everything("it is athens")[1]["changes"].relative[2, -1, 1])
    assert f"{value:.6g}"[:6] in page.run("return document.querySelector('#figure-changes .hoverlayer').textContent")


def test_the_table_is_filtered_by_vector_sign_behavior_kind_and_search(page):
    def choose(**fields):
        for name, value in fields.items():
            page.run("const f = document.getElementById(arguments[0]); f.value = arguments[1]", name, value)
            page.run("document.getElementById(arguments[0]).dispatchEvent(new Event('input', {bubbles: true}))", name)
        return page.run(
            f"return {VISIBLE}.map(row => [row.dataset.k, row.dataset.v, row.dataset.s, row.dataset.b ?? ''])"
        )

    everyone = choose()
    assert len(everyone) == 33
    assert {row[1] for row in choose(vector="2")} == {"2"} and len(choose()) == 8
    assert {(row[1], row[2]) for row in choose(sign="-1")} == {("2", "-1")} and len(choose()) == 4
    assert {row[0] for row in choose(kind="steered")} == {"steered"} and len(choose()) == 2
    assert "2 of 33" in page.run("return document.getElementById('count').textContent")
    assert len(choose(vector="", sign="", kind="", behavior="0")) == 16 and {row[0] for row in choose()} == {"steered"}
    assert len(choose(behavior="none")) == 33 - 16 - 4
    assert len(choose(behavior="", search="RANDOM 3")) == 4
    page.driver.find_element("css selector", "#filters button").click()
    page.wait(f"{VISIBLE}.length === 33")


def test_completions_stand_beside_the_unsteered_ones(page):
    assert page.run("return getComputedStyle(document.querySelector('#table th.beside')).display") == "none"
    page.driver.find_element("id", "side").click()
    texts = page.run(f"return {VISIBLE}.map(row => row.querySelector('.beside').textContent)")
    assert set(texts) == {"it is athens"} and len(texts) == 33


def test_an_anchor_opens_the_section_of_its_vector(page, written):
    page.run("document.querySelector('#ranking ~ .scroll a[href=\"#vector-3\"]').click()")
    page.wait(
        "document.getElementById('vector-3').open"
        " && document.getElementById('vector-3').getBoundingClientRect().top < 200"
    )
    page.driver.get("about:blank")
    page.open(written, "#vector-1")
    page.wait(
        "document.getElementById('vector-1').open"
        " && document.getElementById('vector-1').getBoundingClientRect().top < 200"
    )
    assert page.run("return document.getElementById('vector-2').open") is False
    assert "unsteered" in page.run("return document.getElementById('vector-1').innerText")


def test_the_keyboard_is_enough(page):
    from selenium.webdriver.common.keys import Keys

    keys = page.driver.switch_to.active_element
    keys.send_keys(Keys.TAB)
    assert page.run("return document.activeElement.className") == "skip"
    page.run("document.getElementById('search').focus()")
    page.driver.switch_to.active_element.send_keys("random 3")
    page.wait(f"{VISIBLE}.length === 4")
    page.run("document.querySelector('#vector-2 summary').focus()")
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    page.wait("document.getElementById('vector-2').open")
    reachable = (
        "[...document.querySelectorAll('.scroll, .figure')]"
        ".every(part => part.tabIndex === 0 && part.getAttribute('aria-label'))"
    )
    assert page.run(f"return {reachable}")
    assert page.run(
        "return [...document.querySelectorAll('#filters input, #filters select')]"
        ".every(field => field.labels.length === 1)"
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 400])
def test_it_is_readable_wide_narrow_light_and_dark(page, written, width, dark):
    page.resize(width)
    page.dark(dark)
    page.open(written)
    page.wait("document.querySelectorAll('.plotly-graph-div .main-svg').length >= 11")
    assert page.run("return document.documentElement.scrollWidth") <= width  # nothing pushes the page itself sideways
    contrast = """
      const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
      const light = color => {
        const [r, g, b] = color.match(/[\\d.]+/g).map(v => linear(v / 255));
        return .2126 * r + .7152 * g + .0722 * b };
      const ratio = (a, b) => {
        const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
        return (x + .05) / (y + .05) };
      const page = getComputedStyle(document.body).backgroundColor;
      const color = e => e instanceof SVGElement ? getComputedStyle(e).fill : getComputedStyle(e).color;
      const texts = 'main p, main td, main th, main a, summary, figcaption, .gtitle, .xtick text';
      return [...document.querySelectorAll(texts)]
        .filter(e => (e.offsetParent !== null || e instanceof SVGElement) && !e.closest('.tokens'))
        .map(e => [ratio(color(e), page), e.outerHTML.slice(0, 90)]).sort((a, b) => a[0] - b[0])[0]"""
    if dark:
        page.wait("getComputedStyle(document.querySelector('.gtitle')).fill !== 'rgb(42, 63, 95)'")
    least = page.run(contrast)
    assert least[0] >= 4.5, least
    assert ink(page, "#figure-cosines .figure") > 20 and ink(page, "#table") > 20


def test_nothing_that_a_model_wrote_is_run(open_browser, tmp_path):
    given, more = everything(ATTACKS)
    page = open_browser.open(ml.report(*given, tmp_path / "attacked.html", title=ATTACKS, **more))
    page.wait("document.querySelectorAll('.plotly-graph-div .main-svg').length >= 11")
    page.wait("document.querySelectorAll('.tokens').length === 5")
    page.run("document.querySelectorAll('details').forEach(part => { part.open = true })")
    page.driver.find_element("id", "side").click()
    for name in ("changes", "effects", "rates"):
        page.point(f"#figure-{name} .nsewdrag", 0.17, 0.93)
    page.point(".tokens span span")
    page.run("return new Promise(done => setTimeout(done, 500))")
    assert page.run("return window.hacked") is None
    assert page.run("return document.querySelectorAll('main img, main svg[onload], a[href^=javascript]').length") == 0
    assert page.run("return document.querySelector('#table tbody td.text:last-child').textContent").startswith(
        "</script><script>"
    )
    assert page.logged() == [] and page.requests() == []


def test_token_views_are_drawn_with_any_token_and_without_a_request(open_browser, tmp_path):
    view = (
        ml.plots.colored_tokens(hard_changes())
        + ml.plots.colored_tokens_multi(hard_changes())
        + ml.plots.text_neuron_activations(hard_changes())
    )
    page = open_browser.open(view.save(tmp_path / "view.html"))
    page.wait("document.querySelectorAll('.tokens .colored-tokens, .tokens select').length >= 2")
    text = page.run("return document.querySelector('.tokens').innerText")
    for token in HARD:
        assert ml.plots.text.visible(token) in text, token
    page.run("document.querySelectorAll('.tokens')[1].querySelectorAll('div div div')[1].click()")
    assert ink(page, ".tokens") > 10 and page.run("return document.querySelectorAll('.tokens').length") == 3
    assert page.logged() == [] and page.requests() == []


def test_a_request_would_be_seen(open_browser, tmp_path):
    """The browser's records are no blind spot: a page that asks and fails is caught by both."""
    (tmp_path / "asks.html").write_text(
        "<script src='https://example.org/x.js'></script><script>throw Error('broken')</script>"
    )
    page = open_browser.open(tmp_path / "asks.html")
    assert page.requests() == ["https://example.org/x.js"] and any("broken" in line for line in page.logged())
