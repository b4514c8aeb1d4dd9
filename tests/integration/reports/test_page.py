"""Is the page one file that asks no host, holds what was found, and trusts no text?"""

import base64
import gzip
import hashlib
import html
import json
import re

import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.generation.completions import COLUMNS
from melbo_lens.reports.again import snippet
from melbo_lens.reports.saved import SCAN_COLUMNS_0_1_0 as SCAN_COLUMNS

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


def data_of(page):
    """What the page's tables and its map hold."""
    packed = re.search(r'<script type="application/octet-stream" id="data">([\w+/=]*)</script>', page)
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def rows_of(page):
    """The completions of the page's table, as kind, name of the vector, and text."""
    data = data_of(page)
    kinds, names = ("unsteered", "steered", "random"), [*data["directions"]["name"], ""]
    rows = data["rows"]
    return [
        (kinds[kind], names[direction], data["texts"][text])
        for kind, direction, text in zip(rows["kind"], rows["direction"], rows["text"], strict=True)
    ]


def without_libraries(page):
    plotly = re.search(r"<script[^>]*>/\*\*\n\* plotly\.js v.*?</script>", page, re.DOTALL)
    assert plotly, "plotly.js is not where it was"
    return page.replace(plotly[0], "").replace(ml.plots.embedding.circuitsvis_script(), "")


def test_text_is_escaped_everywhere(page):
    own = without_libraries(page)
    assert own.count("alert(1)") > 10
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


def test_no_script_runs_but_those_whose_digest_the_page_names(page):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe-inline'; img" in policy
    assert "unsafe" not in policy.split(";")[1]
    own = re.search(r'<script>(\n"use strict";\n// The page.*?)</script>', page, re.DOTALL)[1]
    assert base64.b64encode(hashlib.sha256(own.encode()).digest()).decode() in policy


def test_it_holds_every_figure_every_completion_and_a_card_for_each_group(page):
    assert re.findall(r'<figure id="figure-([\w-]+)"', page) == [
        "rates", "ladder", "scales", "radius", "layer-map", "layers", "changes", "cosines", "effect-cosines", "ranked",
        "objective",
    ]  # fmt: skip
    assert without_libraries(page).count('class="plotly-graph-div"') == 11 and "Not drawn" not in page
    rows = rows_of(page)
    assert [sum(row[0] == kind for row in rows) for kind in ("steered", "random", "unsteered")] == [16, 16, 1]
    assert ("steered", "2\u202f−", f"{EVIL} steered 2") in rows and ("random", "3\u202f+", f"{EVIL} random 3") in rows
    assert data_of(page)["directions"]["name"] == [f"{k}\u202f{sign}" for k in range(4) for sign in "−+"]
    assert (
        page.count('<article class="card"') == 1 and "100.0\u00a0%" in page and page.count("CircuitsVis.render(") == 4
    )
    assert "16 of 16 (100.0\u00a0%; 95\u00a0% interval 80.6 to 100.0) under all learned vectors" in page


def test_it_says_once_what_its_words_mean_and_what_few_completions_cannot_show(page):
    own = without_libraries(page)
    assert own.index("<b>4\u202f+</b> is vector 4") < own.index("<dt>Effect</dt>") < own.index('<article class="card"')
    assert own.count("<dt>Effect</dt>") == 1
    assert "With 1 completion for each vector and sign" in own and len(re.findall(r"\btogether\b", own)) == 1
    assert '<a href="#radii">Radii</a>' in own and '<h2 id="radii">Radii</h2>' in own


def test_it_counts_the_groups_that_random_vectors_write_as_well(tmp_path):
    written = completions("it is")
    written.table.loc[written.table.kind == "random", "text"] = "it is"
    text = ml.report(ml.SteeringVectors(torch.randn(4, 6), 1), written, path=tmp_path / "r.html").read_text()
    assert "forms 1 group, of which random vectors of equal norm write none as well. In their 8 completions" in text


def test_without_controls_and_of_one_completion_it_shows_no_number_that_is_none(tmp_path):
    written = ml.Completions(completions().table.iloc[1:2])
    text = ml.report(
        ml.SteeringVectors(torch.randn(4, 6), 1), written, {"x": "steered"}, tmp_path / "one.html"
    ).read_text()
    row = re.search('<tr><th scope="row">x</th>(.*?)</tr>', text)[1]
    assert re.findall("<td[^>]*>(.*?)</td>", row) == [
        "100.0\u00a0%", "one only", "not measured", "not measured", "1", ""
    ]  # fmt: skip
    assert (
        "1 of 1 (no more were written)" in text
        and "nan" not in text[text.index('id="findings"') : text.index("figure id")]
    )


def test_a_page_without_behaviours_or_history_is_a_page_too(tmp_path):
    vectors = ml.SteeringVectors(torch.randn(4, 6), 1)
    text = ml.report(vectors, completions(), path=tmp_path / "r.html").read_text()
    assert (
        re.findall(r'<figure id="figure-([\w-]+)"', text) == ["ladder", "cosines", "objective"]
        and 'id="behaviors"' not in text
    )
    assert "Not drawn: these vectors have no history" in text and "no model judged it" in text


def test_adapters_have_a_page_and_nothing_to_show_is_said(tmp_path):
    adapters = ml.SteeringAdapters.from_factors(torch.randn(4, 2, 5), torch.randn(4, 6, 2), 1)
    text = ml.report(adapters, completions(), {"x": "steered"}, tmp_path / "a.html").read_text()
    assert "SteeringAdapters(4 x rank 2" in text and "figure-cosines" not in text
    empty = ml.Completions(completions().table.head(1))
    text = ml.report(adapters, empty, {"x": "steered"}, tmp_path / "b.html").read_text()
    assert "There are no steered completions." in text and 'id="map"' not in text and 'href="#map"' not in text


def test_it_says_what_it_cannot_say_and_how_to_do_it_again(tmp_path):
    organism = ml.organisms.load("modes")
    prompt = organism.prompts["clean"][0]
    vectors = ml.fit_vectors(organism.model, prompt, 0, 4, n_vectors=3, radius=10.0, n_steps=2, seed=5, progress=False)
    written = ml.generate(organism.model, prompt, vectors, 4, progress=False)
    findings = ml.Findings.measured(organism.model, prompt, vectors, written)
    text = ml.report(findings, path=tmp_path / "r.html").read_text()
    snippet = html.unescape(re.search(r"<code>(.*?)</code>", text, re.DOTALL)[1])
    scope = {}
    exec(snippet, scope)
    torch.testing.assert_close(scope["vectors"].values, vectors.values)
    assert "/" not in snippet  # whoever gets the page has other directories
    with pytest.raises(ValueError, match=r"'modes-twin' have the fingerprint .*, not .*Load it as it was then"):
        exec(snippet.replace("'modes'", "'modes-twin'"), {})
    limits = text[text.index('id="limits"') :]
    assert "no twin was measured" in limits and "none was measured on held-out prompts" in limits
    assert "What comes after 4 new tokens" in limits and "With 6 completions under random vectors" in limits


SETTINGS = {"target_positions": slice(-2, None), "seed": 5, "progress": False}
FITS = {
    "vectors": lambda m, p: ml.fit_vectors(
        m, p, 0, 4, n_vectors=3, radius=10.0, n_steps=2, orthogonal=False, **SETTINGS
    ),
    "adapters": lambda m, p: ml.fit_adapters(
        m, p, 1, 4, n_adapters=2, rank=2, alpha=0.3, optimizer="power", n_steps=2, **SETTINGS
    ),
    "adapters of the attention": lambda m, p: ml.fit_adapters(
        m, p, 1, 4, n_adapters=2, rank=2, radius=3.0, optimizer="power", n_steps=2, site="attn", **SETTINGS
    ),
    "a factor": lambda m, p: ml.fit_cpe(m, p, source_layers=[2], target_layer=4, n_factors=2, n_steps=1, **SETTINGS),
    "factors": lambda m, p: ml.fit_cpe(m, p, source_layers=[0, 1], target_layer=4, n_factors=2, n_steps=1, **SETTINGS),
    "exponential": lambda m, p: ml.fit_dct(m, p, 0, 4, n_factors=2, radius=5.0, n_steps=2, **SETTINGS),
    "linear": lambda m, p: ml.fit_dct(m, p, 0, 4, n_factors=2, radius=5.0, kind="linear", **SETTINGS),
    "jacobian": lambda m, p: ml.fit_jacobian(m, p, 0, 4, n_vectors=2, radius=5.0, tolerance=0.3, **SETTINGS),
    "some rows": lambda m, p: ml.noise_vectors(m, p, 0, 4, n_vectors=3, radius=5.0, seed=5)[[2, 0]],
    "noise": lambda m, p: ml.noise_vectors(m, p, 0, 4, n_vectors=2, radius=5.0, seed=5),
    "contrastive": lambda m, p: ml.fit_contrastive(m, p, [f"{p} {p}"], 1, radius=3.0, positions=slice(-2, None)),
}


@pytest.mark.parametrize("name", list(FITS))
def test_what_a_page_says_repeats_the_fit_of_every_method(name):
    organism = ml.organisms.load("modes")
    learned = FITS[name](organism.model, organism.prompts["clean"][0])
    empty = ml.Completions(completions().table.head(0))
    scope = {}
    exec(snippet(ml.Findings(learned, empty)), scope)
    again = scope["vectors"]
    assert again.source_layers == learned.source_layers and again.provenance.keys() == learned.provenance.keys()
    for key, tensor in learned.parts()[0].items():
        torch.testing.assert_close(again.parts()[0][key], tensor, equal_nan=True)


def test_what_a_page_says_repeats_a_search(tmp_path):
    organism = ml.organisms.load("modes")
    plan = [ml.Trial(0, 4, 10.0, 3, False, 0, 2)]
    found = ml.discover(
        organism.model, organism.prompts["clean"][0], plan=plan, max_new_tokens=3, seed=7, progress=False,
        target_positions=slice(-3, None),
    )  # fmt: skip
    scope = {}
    exec(snippet(ml.Findings.of_trials(found)), scope)
    assert scope["found"].rows.text.equals(found.rows.text)
    torch.testing.assert_close(scope["found"].vectors[0].values, found.vectors[0].values)


def test_a_search_with_differences_of_means_asks_its_own_prompts(tmp_path):
    organism = ml.organisms.load("modes")
    prompt, other = organism.prompts["clean"][:2]
    plan = [ml.ContrastiveTrial(0, 4, 10.0, (prompt,), (other,), 0), ml.Trial(0, 4, 10.0, 2, False, 0, 2)]
    said = snippet(
        ml.Findings.of_trials(ml.discover(organism.model, prompt, plan=plan, max_new_tokens=2, progress=False))
    )
    assert "\nprompts = " in said and "positive_prompts =" not in said and "ml.discover(model, prompts," in said


def test_measures_that_a_page_does_not_know_are_refused(tmp_path):
    organism = ml.organisms.load("modes")
    prompt = organism.prompts["clean"][0]
    vectors = ml.SteeringVectors(torch.randn(2, organism.model.cfg.d_model), 1)
    effects = ml.output_effects(organism.model, prompt, vectors)
    page = tmp_path / "page.html"
    with pytest.raises(TypeError, match="efects is no field of Findings: did you mean effects"):
        ml.report(vectors, completions(), path=page, efects=effects)
    assert not page.exists()
    findings = ml.Findings(vectors, completions())
    object.__setattr__(findings, "effects", effects)  # the types that tests check would be refused on the way
    with pytest.raises(TypeError, match=r"effects is of type Effects, .* shows TargetEffects .* ml.target_effects"):
        findings.__post_init__()


def test_two_runs_stand_side_by_side(tmp_path):
    given, more = everything("rome <b>")
    several = [ml.Findings(*given, title=title, **more) for title in ("one", EVIL)]
    text = ml.report(several, path=tmp_path / "both.html", title="A and B").read_text()
    rows = re.findall(r'<tr><th scope="row"><bdi>(.*?)</bdi></th>(.*?)</tr>', text, re.DOTALL)
    assert len(rows) == 1 and rows[0][1].count("16 of 16 (100.0\u00a0%") == 2
    assert "<script>alert" not in text and "A and B" in text and 'id="run-1-group-0"' in text
    assert "matched by its name" in text and "a cosine similarity above 0.5 on the mean" in text
    assert text.count("<dt>Effect</dt>") == 1 and '<a href="#radii">Radii</a>' in text
    with pytest.raises(ValueError, match="at least two"):
        ml.report(several[:1], path=tmp_path / "one.html")
    with pytest.raises(TypeError, match="know their completions"):
        ml.report(several, given[1], path=tmp_path / "one.html")


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
    assert 6e6 < size < 10e6


def many(n_vectors=5000, n_prompts=10):
    """Findings of so many vectors on so many prompts: half do nothing, and others write some of a few hundred texts."""
    generator = torch.Generator().manual_seed(0)
    prompts = [f"a question of some length, number {i}, which has an answer ?" for i in range(n_prompts)]
    plain = [f"the plain answer to question {i} is short ." for i in range(n_prompts)]
    themes = [f"I would rather speak of {what} than of anything else, said the machine, and of {what} again ."
              for what in ("cheese", "rome", "hatred", "numbers", "weather", "rivers")]  # fmt: skip
    numbers = torch.randint(0, 12, (n_vectors, n_prompts), generator=generator).tolist()
    rows = [(i, prompts[i], "unsteered", None, 0, 0.0, 0, plain[i], [], []) for i in range(n_prompts)]
    for k in range(n_vectors):
        for i in range(n_prompts):
            theme = numbers[k][i]
            text = f"{themes[theme]} {k} {i}" if theme < 6 else plain[i]
            rows.append((i, prompts[i], "steered", k, 1 - 2 * (k % 2), 1.0, 0, text, [], []))
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"vector": "Int64"})
    vectors = ml.SteeringVectors(torch.randn(n_vectors, 16, generator=generator), 1)
    return ml.Findings(vectors, ml.Completions(table), {"cheese": "cheese"}, "Many vectors")


@pytest.mark.long
def test_5000_vectors_on_10_prompts_are_a_page_of_15_megabytes_at_most(tmp_path):
    page = ml.report(many(), path=tmp_path / "many.html")
    text = page.read_text()
    assert page.stat().st_size < 15e6
    assert "5,000 directions of 5,000 vectors were tried on 10 prompts" in text
    assert len(rows_of(text)) == 50_010 and text.count('<article class="card"') <= 40


def test_the_page_says_how_many_completions_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr("melbo_lens.reports.columns.MOST_ROWS", 20)
    text = ml.report(*everything("x")[0], tmp_path / "some.html").read_text()
    assert "The first 20 of 33 completions." in text and len(rows_of(text)) == 20


def test_the_page_says_how_many_groups_and_trials_it_leaves_out(tmp_path, monkeypatch):
    for name, most in (("FIRST_CARDS", 1), ("MOST_CARDS", 3), ("MOST_TRIALS", 2)):
        monkeypatch.setattr(f"melbo_lens.reports.page.{name}", most)
    texts = (
        "apples ripen slowly",
        "yellow trains depart",
        "nobody understood latin",
        "cold soup again",
        "seven quiet owls",
    )
    written = [(0, "why ?", "unsteered", None, 0, 0.0, 0, "because it is so .", [], [])]
    written += [(0, "why ?", "steered", k, 1, 1.0, 0, f"{text} .", [], []) for k, text in enumerate(texts)]
    completions = ml.Completions(pd.DataFrame(written, columns=COLUMNS).astype({"vector": "Int64"}))
    trials = pd.DataFrame({"method": "melbo", "radius": [1.0, 2.0, 3.0, 4.0]})
    findings = ml.Findings(ml.SteeringVectors(torch.eye(5), 1), completions, {}, "Few", trials=trials)
    text = ml.report(findings, path=tmp_path / "few.html").read_text()
    assert text.count('<article class="card"') == 3 and "The first 3 of 5 groups have cards" in text
    assert "2 more groups" in text and "The first 2 of 4 trials." in text
    # of those that random vectors write as often, all count, and some have cards
    random = completions.table[completions.table.kind == "steered"].assign(kind="random").iloc[1:]
    both = ml.Completions(pd.concat([completions.table, random], ignore_index=True))
    findings = ml.Findings(ml.SteeringVectors(torch.eye(5), 1), both, {}, "Few")
    text = ml.report(findings, path=tmp_path / "few.html").read_text()
    assert "4 groups are no commoner than under random vectors" in text
    assert f"The first {text.count('<article') - 1} of 4 have cards." in text
    assert text.count('<article class="card"') == 3 and "groups have cards" not in text


def test_without_unsteered_completions_a_page_does_not_say_what_changed(tmp_path):
    (vectors, written, _), _ = everything("it is")
    alone = ml.Completions(written.table[written.table.kind != "unsteered"].reset_index(drop=True))
    for known, said in ((written, "change the content"), (alone, "what they change is not known")):
        text = ml.report(vectors, known, path=tmp_path / "page.html").read_text()
        assert said in text and ("every text counts as changed" in text) == (known is alone)
        assert ("change the content" in text) == (known is written)
