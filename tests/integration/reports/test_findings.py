"""Is a run's folder enough to write its page again?"""

import json
import re
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import melbo_lens as ml
from melbo_lens.cli import app
from melbo_lens.generation.completions import COLUMNS
from melbo_lens.reports import findings, saved
from tests.integration.reports.test_page import completions, data_of, everything, rows_of


def body(path):
    """The page without the names that are drawn anew each time."""
    return (
        pd.Series(path.read_text().split("\n"))
        .str.replace(r"tokens-\w{12}|[0-9a-f]{8}-[0-9a-f-]{27}|'sha256-[^']*' ?", "", regex=True)
        .tolist()
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run's folder and what it was made from."""
    folder = tmp_path_factory.mktemp("run")
    (vectors, written, behaviors), more = everything("it is <b>", scales=(1.0,))
    measured = {key: more[key] for key in ("changes", "effects", "control", "ranked")}
    ml.save_results(folder, vectors, written, behaviors, "a title", **measured)
    return folder, (vectors, written, behaviors), measured


@pytest.fixture
def folder(kept, tmp_path):
    """A copy of it, to be spoiled."""
    shutil.copytree(kept[0], tmp_path / "run")
    return tmp_path / "run"


def test_the_page_of_a_folder_is_the_page_of_the_values(kept, tmp_path):
    folder, (vectors, written, behaviors), measured = kept
    direct = ml.report(vectors, written, behaviors, tmp_path / "direct.html", "a title", **measured)
    assert body(folder / "report.html") == body(direct)


def test_texts_that_look_like_something_else_come_back_as_they_were(tmp_path):
    written = completions()
    written.table["text"] = ["", "NA", "1.0", "nan", 'a,b\n"c"', *["x"] * (len(written) - 5)]
    ml.save_results(tmp_path, ml.SteeringVectors(torch.randn(4, 6), 1), written)
    for table in (
        saved.table(tmp_path / "completions.csv"),
        ml.Completions.from_lines((tmp_path / "completions.jsonl").read_text(), {}).table,
    ):
        pd.testing.assert_frame_equal(table, written.table, check_dtype=False)


def test_any_text_and_any_number_come_back_through_the_folder(tmp_path):
    written = completions()
    strange = ["\r", "a\rb", "\0", "'\"\n", "nan", "\u2028", "\\r", "", "NaN", "null", "=1+1"]
    written.table["text"] = [*strange, *["x"] * (len(written) - len(strange))]
    written.table["log_probs"] = [
        [float("nan"), -1.5, float("-inf")] if i == 0 else [-0.1] for i in range(len(written))
    ]
    written.table["tokens"] = [[1, 2, 3] if i == 0 else [4] for i in range(len(written))]
    page = ml.save_results(tmp_path, ml.SteeringVectors(torch.randn(4, 6), 1), written)
    again = ml.Completions.from_lines((tmp_path / "completions.jsonl").read_text(), written.settings)
    assert (
        again.table.text.tolist() == written.table.text.tolist()
        and repr(again.table.log_probs[0]) == "[nan, -1.5, -inf]"
    )
    assert ml.report_directory(tmp_path) == page and len(
        pd.read_csv(tmp_path / "completions.csv", keep_default_na=False)
    ) == len(written)


def test_a_folder_keeps_everything_that_a_page_can_show(tmp_path):
    (vectors, written, behaviors), more = everything("it is <b>")
    ml.save_results(tmp_path, vectors, written, behaviors, "a title", **more)
    direct = ml.report(vectors, written, behaviors, tmp_path / "direct.html", "a title", **more)
    assert set(more) == {"changes", "effects", "control", "ranked", "calibration", "scan", "coherence", "views"}
    assert body(tmp_path / "report.html") == body(direct)


@pytest.mark.parametrize(
    "spoil",
    [
        {"name": "constructor"},
        {"still": "<script>x</script>"},
        {"still": "<span onclick='x'>"},
        {"still": "<div style='background:url(\"x\")'>"},
        {"still": None},
    ],
)
def test_a_view_from_a_file_brings_no_script(spoil):
    (_, _, _), more = everything("x")
    elements = more["views"].to_json()
    assert ml.plots.TokenView.from_json(elements).to_json() == elements
    with pytest.raises(ValueError, match="damaged"):
        ml.plots.TokenView.from_json([{**elements[0], **spoil}])


def test_a_text_without_a_verdict_has_none_in_the_folder(tmp_path):
    """Neither the judge nor its errors can be saved, so the folder says of each text which of the three it is."""

    def client(prompts):
        return ["perhaps" if "steered 0" in prompt else "yes" if "steered 1" in prompt else "no" for prompt in prompts]

    written = completions()
    words = {"steered": ("steered 0", "steered 1", "steered 2"), "random": ("steered 0", "c"), "unsteered": ("d",)}
    written.table["text"] = [words[kind][i % len(words[kind])] for i, kind in enumerate(written.table.kind)]
    behaviors = {"rude": ml.judge(client, "Is it rude?", progress=False), "two": "2"}
    findings.Findings(ml.SteeringVectors(torch.randn(4, 6), 1), written, behaviors).save(tmp_path)
    again = ml.Findings.load(tmp_path)
    before, after = ml.evaluate(written, behaviors), ml.evaluate(again.completions, again.behaviors)
    assert before.summary.errors.tolist()[0] > 0
    pd.testing.assert_frame_equal(after.summary, before.summary)
    pd.testing.assert_frame_equal(after.table, before.table)
    rude = again.behaviors["rude"]
    assert rude("steered 1") and not rude("d")
    for text in ("steered 0", "a text of another run"):
        with pytest.raises(ValueError, match="no verdict"):
            rude(text)
    again.save(tmp_path / "twice")
    twice = ml.Findings.load(tmp_path / "twice")
    pd.testing.assert_frame_equal(ml.evaluate(twice.completions, twice.behaviors).summary, before.summary)


@pytest.mark.parametrize("name", "control coherence calibration ranking scan groups judged looks twins".split())
def test_a_part_of_another_kind_is_a_damaged_file(folder, name):
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps({**about, name: ["x"]}))
    with pytest.raises(ValueError, match=r"about\.json is damaged"):
        ml.Findings.load(folder)


def test_a_second_run_leaves_no_measure_of_the_first(folder):
    bare = replace(ml.Findings.load(folder), changes=None, effects=None, ranked=None)
    (folder / "written.json").write_text("{}")
    bare.save(folder)
    again = ml.Findings.load(folder)
    assert again.changes is again.effects is again.ranked is again.written is None
    assert not (folder / "ranking.csv").exists()


def test_what_a_search_wrote_is_named_where_it_is_damaged(folder):
    (folder / "written.json").write_text('{"rows": 5}')
    with pytest.raises(ValueError, match=r"written\.json is damaged"):
        ml.Findings.load(folder)


def test_a_folder_of_version_0_1_0_is_read(folder, kept):
    """It had the CSV file alone, and the ranking in another."""
    (folder / "completions.jsonl").unlink()
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(
        json.dumps({key: about[key] for key in ("title", "texts_that_show", "settings", "control")})
    )
    before = body(folder / "report.html")
    assert body(ml.report_directory(folder)) == before


def test_behaviours_that_are_given_replace_those_of_the_run_also_by_none(folder):
    assert ml.Findings.load(folder).behaviors and not ml.Findings.load(folder, {}).behaviors


def test_the_command_says_which_expression_is_none(folder):
    result = CliRunner().invoke(app, ["report", str(folder), "--behavior", "newly=("])
    assert result.exit_code == 1 and "error: behaviors['newly']='(' is no regular expression" in result.output


def test_the_command_writes_the_page_again_with_other_behaviors(folder):
    (folder / "report.html").unlink()
    result = CliRunner().invoke(app, ["report", str(folder), "--behavior", "newly=steered 2"])
    assert result.exit_code == 0 and "report.html" in result.output
    assert "newly" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("spoil", "said"), [("vectors.safetensors", "has no vectors.safetensors"), ("completions.jsonl", "is damaged")]
)
def test_a_folder_without_its_files_is_refused_in_a_sentence(folder, spoil, said):
    if said.startswith("has no"):
        (folder / spoil).unlink()
    else:
        (folder / spoil).write_text("nothing\n1\n")
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 1 and said in " ".join(result.output.split()) and "Traceback" not in result.output
    result = CliRunner().invoke(app, ["report", str(folder), "--behavior", "newly"])
    assert result.exit_code == 2


def test_a_search_is_a_page_with_its_groups_and_comes_back_from_its_folder(tmp_path):
    organism = ml.organisms.load("modes")
    prompt = organism.prompts["clean"][2]
    plan = ml.make_plan(organism.model, prompt)[3:8]
    found = ml.discover(organism.model, prompt, plan=plan, progress=False)
    kept = ml.Findings.of_discovery(organism.model, prompt, found)
    layer = found.table.source_layer.head(20).value_counts().index[0]
    rows = found.table.index[:20][found.table.source_layer.head(20) == layer]
    assert len(kept.vectors) == len(rows)
    for vector, row in zip(kept.vectors, rows, strict=True):
        torch.testing.assert_close(vector.values, found.vector(row).values)
    kept.save(tmp_path)
    again = ml.Findings.load(tmp_path)
    pd.testing.assert_frame_equal(again.groups, found.table, check_dtype=False)
    page = ml.report(again, path=tmp_path / "page.html").read_text()
    assert body(tmp_path / "page.html") == body(ml.report(kept, path=tmp_path / "direct.html"))
    for share in found.shares.values():
        assert f"{share:.0%}".replace("%", "\u00a0%") in page
    assert page.count('<article class="card"') == len(found.table) and len(kept.looks) == min(len(found.table), 12)
    assert len(rows_of(page)) == len(found.rows) + 1
    assert "Not drawn" not in page  # vectors of several trials have no history, which is no news
    assert "<b>1.4\u202f+</b> is vector 4 of trial 1" in page
    # every direction has its point on the map, and the card names the vector that wrote its example
    data = data_of(page)["directions"]
    assert None not in data["x"] and len(data["x"]) == 2 * sum(map(len, found.vectors))
    best = data["anchor"].index(re.search(r'<p class="said">With vector <a href="#([^"]*)"', page)[1])
    row = found.table.iloc[0]
    assert (data["trial"][best], data["vector"][best], data["sign"][best]) == (row.trial, row.vector, row.sign)


def test_a_twin_of_a_search_is_counted_on_the_cards(tmp_path):
    organism, twin = ml.organisms.load("modes"), ml.organisms.load("modes-twin")
    prompt = organism.prompts["clean"][2]
    plan = ml.make_plan(organism.model, prompt)[3:5]
    found, other = (ml.discover(one.model, prompt, plan=plan, progress=False) for one in (organism, twin))
    counts = found.twins(other, {})
    texts = other.rows.text[other.rows.kind == "steered"]
    assert {n for _, n in counts.values()} == {len(texts)}
    for number, (k, _) in counts.items():
        assert k >= int((texts == found.table.example[number]).sum())
    assert sum(k for k, _ in counts.values()) > 0
    named = found.twins(other, {"all": ".*"})  # what has a name is in no group that has none
    assert not any(k for k, _ in named.values())
    alike = replace(other, rows=other.rows.assign(change="same"))  # what no vector changed is of no group
    assert not any(k for k, _ in found.twins(alike, {}).values())
    page = ml.report(ml.Findings.of_trials(found, twin=other), path=tmp_path / "page.html").read_text()
    k, n = counts[0]
    assert f"<dt>Twin model</dt><dd>{k} of {n} (" in page and "no twin was measured" not in page
    page = ml.report(ml.Findings.of_trials(found, twin=found), path=tmp_path / "alike.html").read_text()
    assert "No group of completions is commoner under the vectors than under random ones, and than in the twin" in page
    assert f"<summary>{len(found.table)} groups are no commoner than under random vectors of equal norm, or" in page
    assert sum(found.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("refused", [{"behaviors": {"x": "("}}, {"ranked": pd.DataFrame({"vector": [object()]})}])
def test_findings_that_can_not_be_written_leave_a_folder_as_it_was(tmp_path, refused):
    vectors = ml.SteeringVectors(torch.eye(3), 1)
    rows = [(0, "p", "steered", k, 1, 1.0, 0, "text", [1], [-0.1]) for k in range(3)]
    completions = ml.Completions(pd.DataFrame(rows, columns=COLUMNS).astype({"vector": "Int64"}))
    ml.Findings(vectors, completions, title="one").save(tmp_path)
    wrote = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises((ValueError, TypeError, re.error)):
        ml.Findings(2 * vectors, completions, title="two", **refused).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == wrote
