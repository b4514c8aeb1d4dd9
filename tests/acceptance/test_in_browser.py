"""Does the page work as a person uses it?  Headless Chromium opens it, looks, filters and follows links.

Nothing in the page may run a model's text or ask for anything.
"""

import base64
import io
import json
import re
import time
from importlib.resources import files
from urllib.parse import quote

import pytest
from PIL import Image

import melbo_lens as ml
from melbo_lens import tables
from tests import browser
from tests.integration.reports.test_page import everything, many
from tests.unit.plots.test_tokens import HARD, hard_changes

pytestmark = pytest.mark.browser
# every way in which text could become a program; each would set window.hacked
ATTACKS = (
    "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2><svg onload=window.hacked=3>"
    "\"'&<a href='javascript:hacked=4'>b</a>"
    "<img/src='x'/onerror=window.hacked=5>"
)
# what changes how text is seen: a right-to-left override, zero-width characters, a very long word, 100 kB
HIDDEN = "\u202egnp.exe\u200b\u2066\ufeff " + "w" * 500 + " " + "many words " * 9_000
READY = "document.documentElement.dataset.ready === 'yes'"
ROWS = "[...document.querySelectorAll('#table tbody tr')]"


@pytest.fixture(scope="module")
def open_browser():
    browser.require()
    with browser.browse() as page:
        yield page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    given, more = everything("it is athens")
    return ml.report(*given, tmp_path_factory.mktemp("page") / "report.html", title="A page", **more)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The page of a search of the modes organism, and what it found."""
    organism = ml.organisms.load("modes")
    prompt = organism.prompts["clean"][2]
    plan = ml.make_plan(organism.model, prompt)[1:6]
    found = ml.discover(organism.model, prompt, plan=plan, progress=False)
    findings = ml.Findings.of_discovery(organism.model, prompt, found, title="A search")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("melbo_lens.reports.page.FIRST_CARDS", 1)
        return ml.report(findings, path=tmp_path_factory.mktemp("search") / "report.html"), found


@pytest.fixture
def page(open_browser, written):
    """The page, just opened at the usual width; at the end nothing may have been logged or asked for."""
    open_browser.dark(False)
    open_browser.resize(1400)
    open_browser.driver.get("about:blank")
    open_browser.open(written).wait(READY)
    yield open_browser
    assert open_browser.logged() == [] and open_browser.requests() == []


@pytest.fixture
def search(open_browser, found):
    """The page of the search."""
    open_browser.dark(False)
    open_browser.resize(1400)
    open_browser.driver.get("about:blank")
    open_browser.open(found[0]).wait(READY)
    yield open_browser
    assert open_browser.logged() == [] and open_browser.requests() == []


def ink(page, selector):
    """How many colours a thing shows, once it is scrolled to: an empty box has one."""
    element = page.driver.find_element("css selector", selector)
    page.run("arguments[0].scrollIntoView()", element)
    return len(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB").getcolors(1_000_000))


def drawn(page, name):
    """Scrolls to a figure, which is drawn then, and waits for it."""
    page.run("document.getElementById(arguments[0]).scrollIntoView()", name)
    marks = ", ".join(f"#{name} {part}" for part in (".heatmaplayer image", ".trace path", ".bars path"))
    page.wait(f"document.querySelectorAll('{marks}').length > 0")


def choose(page, form="filters", **fields):
    """Sets fields of a form as a person does, and returns the texts of the rows that are left."""
    for name, value in fields.items():
        page.run(
            "const f = document.getElementById(arguments[0]).elements[arguments[1]];"
            " if (f.type === 'checkbox') f.checked = arguments[2]; else f.value = arguments[2];"
            " f.dispatchEvent(new Event('input', {bubbles: true}))",
            form,
            name,
            value,
        )
    return page.run(f"return {ROWS}.map(row => [...row.cells].map(cell => cell.textContent))")


def exported(page):
    """What the page exports of its marks."""
    page.run(
        "const make = URL.createObjectURL; URL.createObjectURL = blob => { window.kept = blob; return make(blob); };"
        " document.getElementById('export').click()"
    )
    return json.loads(page.run("return window.kept.text()"))


def test_every_figure_is_drawn_when_it_comes_into_view(page):
    names = page.run("return [...document.querySelectorAll('figure')].map(figure => figure.id)")
    assert len(names) == 11
    assert page.run("return document.querySelectorAll('.main-svg').length") < 3 * 11
    for name in names:
        drawn(page, name)
        assert ink(page, f"#{name} .figure") > 20, name
        box = page.run(
            f"const b = document.querySelector('#{name} .plotly-graph-div').getBoundingClientRect();"
            " return [b.width, b.height]"
        )
        assert box[0] > 900 and box[1] > 250


def test_hovering_shows_the_exact_number_and_the_completion(page):
    drawn(page, "figure-changes")
    page.point("#figure-changes .nsewdrag", 0.5, 0.6)
    page.wait("document.querySelector('#figure-changes .hoverlayer')?.textContent.includes('it is athens')")
    value = float(everything("it is athens")[1]["changes"].relative[2, -1, 1])
    assert f"{value:.6g}"[:6] in page.run("return document.querySelector('#figure-changes .hoverlayer').textContent")


def test_the_table_is_filtered_sorted_and_paged(page):
    everyone = choose(page)
    assert len(everyone) == 33
    kind, vector = 0, 1
    assert {row[vector][0] for row in choose(page, vector="2")} == {"2"} and len(choose(page)) == 8
    assert {row[vector] for row in choose(page, sign="-1")} == {"2\u202f−"} and len(choose(page)) == 4
    assert {row[kind] for row in choose(page, kind="1")} == {"steered"} and len(choose(page)) == 2
    assert "1 to 2 of 2 that match, of 33" in page.run("return document.getElementById('pages').textContent")
    rows = choose(page, vector="", sign="", kind="", behavior="0")
    assert len(rows) == 16 and {row[kind] for row in rows} == {"steered"}
    assert len(choose(page, behavior="none")) == 33 - 16 - 4
    assert len(choose(page, behavior="", search="RANDOM 3")) == 4
    page.driver.find_element("css selector", "#filters button[type=reset]").click()
    page.wait(f"{ROWS}.length === 33")
    heading = "[...document.querySelectorAll('#table th')].find(cell => cell.textContent === 'text')"
    page.run(f"{heading}.querySelector('button').click()")
    texts = [row[-1] for row in choose(page)]
    assert texts == sorted(texts) and page.run(f"return {heading}.getAttribute('aria-sort')") == "ascending"
    page.run(f"{heading}.querySelector('button').click()")
    assert [row[-1] for row in choose(page)] == texts[::-1]


def test_completions_stand_beside_the_unsteered_ones(page):
    assert page.run("return document.querySelector('#table td.beside')") is None
    choose(page, beside=True)
    texts = page.run(f"return {ROWS}.map(row => row.querySelector('td.beside').textContent)")
    assert set(texts) == {"it is athens"} and len(texts) == 33


def test_the_page_of_a_search_opens_with_cards_whose_vectors_lead_to_their_completions(search, found):
    table = found[1].table
    assert search.run("return document.querySelector('main h2').textContent") == "Findings"
    examples = search.run(
        "return [...document.querySelectorAll('.card .pair div:first-child .text')].map(e => e.innerText)"
    )
    assert examples[0] == table.example[0] and len(examples) == len(table)
    search.run("document.querySelector('#group-0 .said a').click()")
    search.wait("document.getElementById('completions').getBoundingClientRect().top < 200")
    row = table.iloc[0]
    name = f"{row.trial}.{row.vector}{'+' if row.sign > 0 else '−'}"
    assert search.run("return document.getElementById('filters').elements.vector.value") == name
    shown = choose(search)
    assert {line[1].replace("\u202f", "") for line in shown} == {name}
    assert table.example[0] in {line[-1] for line in shown}


def test_a_point_of_the_map_says_what_it_is_and_leads_to_its_card(search, found):
    from selenium.webdriver.common.keys import Keys

    plane = search.driver.find_element("id", "plane")
    assert ink(search, "#plane") > 8
    plane.send_keys(Keys.ARROW_RIGHT)
    said = search.run("return document.getElementById('point').textContent")
    assert said.startswith("vector ") and "1." in said
    plane.send_keys(Keys.ENTER)
    search.wait("location.hash === '#group-0'")
    search.wait("Math.abs(document.getElementById('group-0').getBoundingClientRect().top) < 200")
    spot = "const b = document.getElementById('plane').getBoundingClientRect(), t = document.getElementById('tip');"
    search.run("document.getElementById('plane').scrollIntoView({block: 'center'})")
    plane.send_keys(Keys.ARROW_RIGHT)
    x, y = search.run(f"{spot} return [parseFloat(t.style.left), parseFloat(t.style.top)]")
    assert x > 0 and y > 0 and search.run("return document.getElementById('tip').hidden") is False
    # the mouse finds a point, too, and a click on it leads somewhere
    search.run("location.hash = ''")
    said, place = search.run(
        "const box = document.getElementById('plane'), tip = document.getElementById('tip');"
        " const { left, top, width, height } = box.getBoundingClientRect();"
        " for (let y = 5; y < height; y += 10) for (let x = 5; x < width; x += 10) {"
        "   const where = { clientX: Math.round(left + x), clientY: Math.round(top + y) };"  # a click has whole pixels
        "   box.dispatchEvent(new PointerEvent('pointermove', where));"
        "   if (!tip.hidden) { box.dispatchEvent(new MouseEvent('click', where));"
        "     return [tip.textContent, location.hash]; } }"
        " return ['', '']"
    )
    assert said.startswith("vector ") and len(place) > 2
    legend = search.run("return [...document.querySelectorAll('#legend button')].map(b => b.textContent)")
    n = int(legend[0].rsplit("(", 1)[1][:-1])
    main = found[1].rows[found[1].rows.kind == "steered"].groupby(["trial", "vector", "sign"]).group.first()
    assert n == int((main == 0).sum())


def test_marks_and_names_are_kept_in_the_address_and_exported(search, found):
    search.run("document.querySelector('#group-0 .mark').click(); document.querySelector('#group-1 .mark').click()")
    field = search.driver.find_element("css selector", "#marked li input")
    field.send_keys("a <b>name</b> & more")
    search.wait("decodeURIComponent(location.hash).includes('a <b>name</b> & more')")
    address = search.run("return location.href")
    search.driver.get("about:blank")
    search.driver.get(address)
    search.wait(READY)
    search.wait("document.querySelectorAll('#marked li').length === 2")
    assert search.run("return document.querySelector('#marked input').value") == "a <b>name</b> & more"
    assert search.run("return document.querySelector('#group-0 .mark').getAttribute('aria-pressed')") == "true"
    # a link within the page loses no mark
    search.run("document.querySelector('nav a[href=\"#limits\"]').click()")
    search.wait("location.hash.startsWith('#limits&marks=')")
    said = exported(search)
    row = found[1].table.iloc[0]
    assert said["page"] == "A search" and said["marks"][0] == {
        "name": "a <b>name</b> & more",
        "trial": row.trial,
        "vector": row.vector,
        "sign": row.sign,
        "group": row.behavior or row.example,
        "example": row.example,
    }
    rows = "[...document.querySelectorAll('#vector-table tbody tr')]"
    choose(search, "vector-filters", marked=True)
    assert search.run(f"return {rows}.length") == 2
    search.run("document.getElementById('unmark').click()")
    search.wait("!location.hash.includes('marks')")
    # an address may name what the page doesn't have
    search.driver.get("about:blank")
    search.open(found[0], "#marks=" + quote(json.dumps({"v1.2n": "minus", "nowhere": "x"}))).wait(READY)
    assert [(mark["name"], mark["trial"], mark["vector"], mark["sign"]) for mark in exported(search)["marks"]] == [
        ("minus", 1, 2, -1)
    ]


def test_the_keyboard_is_enough(page):
    from selenium.webdriver.common.keys import Keys

    keys = page.driver.switch_to.active_element
    keys.send_keys(Keys.TAB)
    assert page.run("return document.activeElement.className") == "skip"
    page.run("document.getElementById('filters').elements.search.focus()")
    page.driver.switch_to.active_element.send_keys("random 3")
    page.wait(f"{ROWS}.length === 4")
    reachable = (
        "[...document.querySelectorAll('.scroll, .figure, #plane')]"
        ".every(part => part.tabIndex === 0 && part.getAttribute('aria-label'))"
    )
    assert page.run(f"return {reachable}")
    assert page.run(
        "return [...document.querySelectorAll('form input, form select')].every(field => field.labels.length === 1)"
    )


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_serious_fault(search, dark, width):
    search.dark(dark)
    search.resize(width)
    search.run("document.querySelectorAll('details').forEach(part => { part.open = true })")
    search.run(files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8") + ";window.axe = axe")
    # circuitsvis and plotly draw their own parts
    found = search.run(
        "return axe.run({ exclude: [['.tokens'], ['.plotly-graph-div']] }, { resultTypes: ['violations'] })"
        ".then(found => found.violations.filter(one => ['serious', 'critical'].includes(one.impact))"
        ".map(one => [one.id, one.nodes.slice(0, 3).map(node => node.html.slice(0, 200))]))"
    )
    assert found == []


def test_cards_after_the_first_ones_are_folded_and_open_for_whoever_is_led_there(search):
    opened = "document.getElementById('group-1').closest('details').open"
    assert search.run("return document.getElementById('group-0').closest('details')") is None
    assert search.run(f"return {opened}") is False
    search.run("location.hash = '#group-1'")
    search.wait(f"{opened} && Math.abs(document.getElementById('group-1').getBoundingClientRect().top) < 200")


def test_it_prints_every_card_and_every_figure(search, found):
    from pypdf import PdfReader

    printed = search.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    text = " ".join(page.extract_text() for page in PdfReader(io.BytesIO(base64.b64decode(printed["data"]))).pages)
    assert len(re.findall(r"nats\s+a\s+token\s+\(the\s+limit", text)) == len(found[1].table) > 1  # a line of each card
    n = search.run("return document.querySelectorAll('.plotly-graph-div').length")
    search.wait(f"document.querySelectorAll('.js-plotly-plot .main-svg').length >= {n}")


def test_runs_stand_side_by_side(open_browser, tmp_path):
    given, more = everything("it is <b>athens")
    several = [ml.Findings(*given, title=title, **more) for title in ("one", "two")]
    path = ml.report(several, path=tmp_path / "both.html")
    for width in (1400, 400):
        open_browser.resize(width)
        page = open_browser.open(path)
        assert page.run("return document.documentElement.scrollWidth") <= width
        page.run("document.getElementById('radii').scrollIntoView()")
        page.wait("document.querySelectorAll('.trace path').length > 0")
    page.dark()
    page.wait("getComputedStyle(document.querySelector('.main-svg')).backgroundColor === 'rgb(20, 23, 28)'")
    page.dark(False)
    assert page.logged() == [] and page.requests() == []


def test_at_400_pixels_no_section_is_out_of_sight_and_no_token_is_broken(search):
    search.resize(400)
    ends = search.run("return [...document.querySelectorAll('nav a')].map(link => link.getBoundingClientRect().right)")
    assert len(ends) >= 10 and max(ends) <= 400
    heights = search.run("return [...document.querySelectorAll('.card .token')].map(token => token.offsetHeight)")
    assert len(heights) > 50 and max(heights) < 2 * min(heights)
    words = search.run(
        "return [...document.querySelectorAll('.wide th[scope=row]')].map(cell => cell.getBoundingClientRect().width)"
    )
    assert min(words) >= 144
    # only what has a column for each token or vector is scrolled, and a table's row is folded
    for selector in (".figure:not(.broad)", ".stack"):
        cut = search.run(
            "return [...document.querySelectorAll(arguments[0])].filter(box => box.scrollWidth > box.clientWidth)"
            ".map(box => box.ariaLabel)",
            selector,
        )
        assert cut == []


def test_the_table_of_radii_fits_and_a_legend_stands_on_its_figure(search):
    boxes = search.run("const b = document.querySelector('#radii ~ .scroll'); return [b.scrollWidth, b.clientWidth]")
    assert boxes[0] <= boxes[1]
    search.run("document.querySelector('#figure-ladder').scrollIntoView()")
    search.wait("document.querySelector('#figure-ladder g.legend')")
    place = "document.querySelector('#figure-ladder {}').getBoundingClientRect().{}"
    legend, title, plot = (
        place.format(*of) for of in (("g.legend", "top"), (".gtitle", "bottom"), (".bglayer", "top"))
    )
    for width in (1400, 400):
        search.resize(width)
        search.wait(f"{legend} - {title} < 45")
        assert search.run(f"return {legend} >= {title} && {place.format('g.legend', 'bottom')} <= {plot} + 2")


def test_5000_vectors_on_10_prompts_open_in_three_seconds(open_browser, tmp_path):
    path = ml.report(many(), path=tmp_path / "many.html")
    open_browser.resize(1400)
    took = []
    for _ in range(3):  # the machine may do something else the first time
        open_browser.driver.get("about:blank")
        began = time.monotonic()
        page = open_browser.open(path)
        page.wait(READY)
        took.append(time.monotonic() - began)
    assert min(took) < 3
    assert len(choose(page)) == 50 and "of 50,010 completions" in page.run(
        "return document.getElementById('pages').textContent"
    )
    began = time.monotonic()
    assert len(choose(page, search="cheese")) == 50
    assert time.monotonic() - began < 1
    page.run("[...document.querySelectorAll('#pages button')].at(-1).click()")
    assert "51 to 100" in page.run("return document.getElementById('pages').textContent")
    page.run("document.querySelector('#pages button').click()")
    assert "1 to 50 of" in page.run("return document.getElementById('pages').textContent")
    assert page.logged() == [] and page.requests() == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 400])
def test_it_is_readable_wide_narrow_light_and_dark(page, written, width, dark):
    page.resize(width)
    page.dark(dark)
    page.open(written).wait(READY)
    drawn(page, "figure-cosines")
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
        .filter(e => (e.offsetParent !== null || e instanceof SVGElement) && !e.closest('.tokens, #tip'))
        .map(e => [ratio(color(e), page), e.outerHTML.slice(0, 90)]).sort((a, b) => a[0] - b[0])[0]"""
    if dark:
        page.wait("getComputedStyle(document.querySelector('.gtitle')).fill !== 'rgb(42, 63, 95)'")
    least = page.run(contrast)
    assert least[0] >= 4.5, least
    assert ink(page, "#figure-cosines .figure") > 20 and ink(page, "#table") > 20


def test_nothing_that_a_model_wrote_is_run(open_browser, tmp_path):
    given, more = everything(ATTACKS)
    page = open_browser.open(ml.report(*given, tmp_path / "attacked.html", title=ATTACKS, **more))
    page.wait(READY)
    page.wait("document.querySelectorAll('.tokens').length === 5")
    page.run("document.querySelectorAll('details').forEach(part => { part.open = true })")
    choose(page, beside=True)
    for name in ("changes", "effect-cosines", "rates"):
        drawn(page, f"figure-{name}")
        page.point(f"#figure-{name} .nsewdrag", 0.17, 0.93)
    for x in (0.1, 0.5, 0.9):
        page.point("#plane", x, 0.5)
    page.run("document.querySelectorAll('.card .mark').forEach(button => button.click())")
    page.point(".tokens span span")
    page.run("return new Promise(done => setTimeout(done, 500))")
    assert page.run("return window.hacked") is None
    assert page.run("return document.querySelectorAll('main img, main svg[onload], a[href^=javascript]').length") == 0
    assert page.run("return document.querySelector('#table tbody td:last-child').textContent").startswith(
        "</script><script>"
    )
    assert page.logged() == [] and page.requests() == []


def test_a_script_that_is_not_the_pages_own_is_refused(open_browser, written, tmp_path):
    """Even if a text became markup, the page's policy would not let it run."""
    spoiled = tmp_path / "spoiled.html"
    spoiled.write_text(written.read_text().replace("</main>", "<img src=x onerror=window.hacked=1></main>"))
    page = open_browser.open(spoiled)
    page.wait(READY)
    page.run("const s = document.createElement('script'); s.textContent = 'window.hacked=2'; document.body.append(s)")
    assert page.run("return window.hacked") is None
    assert any("Content Security Policy" in line for line in page.logged())
    page.requests()


@pytest.mark.parametrize("width", [1400, 400])
def test_text_that_hides_or_is_very_long_is_shown_and_pushes_nothing_aside(open_browser, tmp_path, width):
    given, more = everything(HIDDEN)
    more = {name: more[name] for name in ("ranked", "control")}
    open_browser.resize(width)
    page = open_browser.open(ml.report(*given, tmp_path / "hidden.html", title=HIDDEN[:300], **more))
    page.wait(READY)
    assert page.run("return document.documentElement.scrollWidth") <= width
    own = page.run("return document.querySelector('header').innerText + document.querySelector('main').innerText")
    assert "⟨U+202E⟩gnp.exe⟨U+200B⟩⟨U+2066⟩⟨U+FEFF⟩" in own
    assert not any(character in own for character in "\u202e\u200b\u2066\ufeff")
    assert len(own) < 200_000
    cell = "document.querySelector('#table tbody td:last-child')"
    assert page.run(f"return {cell}.textContent.length") < 800
    page.run(f"{cell}.querySelector('button').click()")
    assert page.run(f"return {cell}.textContent.length") > 99_000
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert page.logged() == [] and page.requests() == []


def test_its_script_spells_characters_out_as_its_cards_do(page):
    for text in (*HARD, HIDDEN[:40], "é\u202eé", "👩\u200d👧", "نمی\u200dخواهم", "I\u200dhate", "a\u00ad\u3164b\n\tc"):
        assert page.run("return seen(arguments[0])", text) == tables.seen(text)


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
