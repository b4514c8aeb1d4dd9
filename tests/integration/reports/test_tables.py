"""Do the ladder, the comparison, the limits, the snippet and the columns of a page hold the numbers of their tables?"""

import math
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.reports import ladder
from melbo_lens.reports.again import snippet
from melbo_lens.reports.columns import columns
from melbo_lens.reports.comparison import matched
from melbo_lens.reports.limits import limits
from melbo_lens.reports.page import lead
from melbo_lens.search.cards import Rate, cards_of
from melbo_lens.search.written import ROWS, Written
from melbo_lens.sweeps.trials import trial_as
from tests.integration.reports.test_cards import CHEESE, PLAIN, ROME, written
from tests.integration.reports.test_page import completions

VECTORS = ml.SteeringVectors(torch.eye(3), 1)


def of(directions, steered):
    """Directions are (trial, vector, source layer, radius, effect), completions (trial, vector, scale, change, row)."""
    natural = {"noise": -7.0}
    rows = [
        ("steered", trial, vector, 1, scale, 0, 0, "p", change, change, 0.5, 5.0, natural.get(change, -0.1), group)
        for trial, vector, scale, change, group in steered
    ]
    facts = [
        (t, v, "melbo", source, 3, radius, radius / 8, effect, 2 * effect)
        for t, v, source, radius, effect in directions
    ]
    names = "trial vector method source_layer target_layer radius relative_radius effect minus_effect".split()
    groups = pd.DataFrame({"behavior": ["", "named"], "example": ["content", "x"]})
    table = pd.DataFrame(rows, columns=ROWS).astype({"vector": "Int64", "group": "Int64"})
    return Written(table, pd.DataFrame(facts, columns=names), groups)


def test_a_rung_counts_what_was_written_at_one_norm():
    found = of(
        [(0, 0, 1, 2.0, 0.2), (0, 1, 1, 2.0, 0.4), (0, 2, 1, 2.0, 0.9), (1, 0, 1, 1.0, 0.1), (2, 0, 0, 4.0, 0.8)],
        [
            (0, 0, 1.0, "content", 0),
            (0, 1, 1.0, "noise", pd.NA),
            (0, 2, 1.0, "same", pd.NA),
            (0, 0, 0.5, "content", 1),
            (1, 0, 1.0, "wording", 0),
            (2, 0, 1.0, "same", pd.NA),
        ],
    )
    table = ladder.ladder(found)
    names = ["source_layer", "radius", "relative_radius", "n", "readable", "changed", "group 0", "group 1"]
    assert table[names].to_numpy().tolist() == [
        [0, 4.0, 0.5, 1, 1, 0, 0, 0],
        [1, 1.0, 0.125, 2, 2, 2, 1, 1],  # half of the vector of norm 2, and the one of norm 1
        [1, 2.0, 0.25, 3, 2, 2, 1, 0],
    ]
    assert table.effect.tolist() == pytest.approx([0.8, 0.1, 0.4])  # of the norm at which each was learned
    minus = replace(found, rows=found.rows.assign(sign=-1))
    assert ladder.ladder(minus).effect.tolist() == pytest.approx([1.6, 0.2, 0.8])  # those of minus the vectors
    assert [row["layers"] for row in ladder.rows_of(table)] == ["0 to 3", "1 to 3", "1 to 3"]
    assert ladder.rows_of(table)[1]["shares"] == [0.5, 0.5]
    # the curves are those of the pair of layers with the most radii
    above, below = ladder.figure(table, found)
    assert above.title.endswith("layers 1 to 3") and [line.name for line in above.lines] == [
        "readable", "content", "named"
    ]  # fmt: skip
    readable = above.lines[0]
    assert readable.x.tolist() == [0.125, 0.25] and readable.y.tolist() == pytest.approx([1, 2 / 3])
    assert list(zip(readable.low, readable.high, strict=True)) == [Rate(2, 2).interval, Rate(2, 3).interval]
    assert below.lines[0].y.tolist() == pytest.approx([0.1, 0.4])


def test_many_radii_are_put_together_two_to_an_octave():
    radii = [1.0 + 0.02 * k for k in range(13)]
    found = of(
        [(0, k, 1, radius, 0.5) for k, radius in enumerate(radii)],
        [(0, k, 1.0, "content", 0) for k in range(len(radii))],
    )
    table = ladder.ladder(found)
    # up to 2 ** 0.25 = 1.19 they are 1, and from there on 2 ** 0.5
    assert table.radius.tolist() == pytest.approx([1, math.sqrt(2)]) and table.n.tolist() == [10, 3]


def test_groups_of_several_runs_are_matched_by_name_or_by_words():
    cheese, rome = cards_of(written())
    rude = replace(rome, example="qz qz qz", number=0)
    other = [rude, replace(rome, example=f"{ROME} now"), *(replace(cheese, number=number) for number in (2, 3))]
    rows = matched([[cheese, rome], other])
    assert [row["cards"] for row in rows] == [[cheese, other[2]], [None, rude], [rome, other[1]]]
    assert [row["title"] for row in rows] == ["cheese", "qz qz qz", ROME]


def test_runs_of_one_title_are_numbered_and_show_their_first_cards(tmp_path, monkeypatch):
    monkeypatch.setattr("melbo_lens.reports.comparison.MOST_CARDS", 1)
    one = ml.Findings(VECTORS, completions(), written=written())
    text = ml.report([one, one], path=tmp_path / "both.html").read_text()
    assert "<th>run 1</th><th>run 2</th>" in text and text.count('<article class="card"') == 2
    assert text.count("1 of 12") == 2  # the second group stands in the table


def test_a_page_counts_what_completions_became_and_the_vectors_of_all_trials(tmp_path, monkeypatch):
    monkeypatch.setattr("melbo_lens.reports.page.MOST_NOISE", 1)
    text = ml.report(ml.Findings(VECTORS, completions(), written=written()), path=tmp_path / "r.html").read_text()

    def cells(row):
        return [cell.replace("\u00a0", " ") for cell in re.findall("<td[^>]*>(.*?)</td>", row)]

    rows = {name: cells(row) for name, row in re.findall('<tr><th scope="row">(.*?)</th>(.*?)</tr>', text)}
    assert rows["learned vectors"] == ["12", "50.0 %", "8.3 %", "25.0 %", "16.7 %"]
    assert rows["random vectors of equal norm"] == ["4", "75.0 %", "25.0 %", "0.0 %", "0.0 %"]
    noise = text[text.index('<details id="noise"') :]
    assert noise[: noise.index("</details>")].count("<li>") == 1  # of two such texts
    found = of(
        [(0, 0, 1, 2.0, 0.2), (1, 0, 1, 2.0, 0.2)],
        [(0, 0, 1.0, "content", pd.NA), (1, 0, 1.0, "content", pd.NA), (1, 0, 1.0, "same", pd.NA)],
    )
    found = replace(found, groups=written().groups.head(0))
    findings = ml.Findings(VECTORS, completions(), {"x": "content"}, written=found)
    completed = ml.report(findings, path=tmp_path / "trials.html").read_text()
    (row,) = re.findall('<tr><th scope="row">x</th>(.*?)</tr>', completed)
    assert (cells(row)[0], cells(row)[4]) == ("66.7 %", "2")


def test_limits_are_those_of_what_was_measured():
    found, findings = written(), ml.Findings(VECTORS, completions(), {"cheese": "cheese"})
    said = " ".join(limits(findings, found))
    # Wilson's bound of 0 of 4 is z^2 / (n + z^2), z = 1.96
    assert "With 4 completions under random vectors, a share of up to 49.0 % can go unseen" in said
    assert "no twin was measured" in said and "none was measured on held-out prompts" in said
    assert "it wrote 2 completions" in said and "of more than 3 nats a token" in said
    assert "What comes after" not in said and "no behaviours were named" not in said
    tested = replace(found, groups=found.groups.assign(heldout_rate=0.5))
    said = " ".join(limits(replace(findings, twins={0: (0, 4)}, behaviors={}), tested))
    assert "the rates on held-out prompts are not" in said and "twin" not in said and "no behaviours were named" in said
    thrice = replace(found, rows=pd.concat([found.rows] * 3))
    assert "single vector" not in " ".join(limits(findings, thrice))
    assert "no model judged it" in " ".join(limits(findings, written(judged=False)))
    bare = replace(found, rows=found.rows[found.rows.kind != "random"])
    assert "none were tried" in " ".join(limits(findings, bare))


def test_the_first_sentences_count_what_random_vectors_write_as_well():
    said = lead(written())
    assert "6 directions of 3 vectors were tried on 2 prompts: 33\u00a0% change the content" in said
    assert "forms 2 groups, of which random vectors of equal norm write 1 as well. In their 4 completions" in said
    assert "a share of up to 49.0\u00a0% can go unseen" in said  # Wilson: z^2 / (n + z^2)
    found = written()
    assert "2 groups; no random" in lead(replace(found, rows=found.rows[found.rows.kind != "random"]))


def test_a_snippet_gives_every_setting_that_has_a_consequence():
    known = {
        "method": "fit_vectors", "model": "modes", "dtype": "bfloat16", "source_layer": 0, "target_layer": 4,
        "target_positions": "slice(-3, None)", "n_vectors": 3, "radius": 10.0, "seed": 5, "batch_size": 7,
        "prompts": ["a", "b c"], "prompt_tokens": [[1], [1, 2]],
    }  # fmt: skip
    text = snippet(ml.Findings(ml.SteeringVectors(torch.eye(3), 0, provenance=known), completions()))
    assert "ml.ModelKey('modes', dtype='bfloat16').load()" in text and "prompts = ['a', 'b c']" in text
    for line in ("target_positions=slice(-3, None),", "n_vectors=3,", "radius=10.0,", "seed=5,", "target_layer=4,"):
        assert f"    {line}" in text.splitlines()
    assert "batch_size" not in text
    plan = [ml.Trial(0, 4, 10.0, 3, False, seed, 4) for seed in range(70)]
    search = {"plan": [trial_as(trial) for trial in plan], "settings": {"max_new_tokens": 9, "seed": 2}}
    text = snippet(ml.Findings(ml.SteeringVectors(torch.eye(3), 0, provenance=known), completions(), search=search))
    assert text.count("ml.Trial(") == 60 and "# and 10 more" in text
    assert text.endswith("found = ml.discover(model, prompts, plan=plan, max_new_tokens=9, seed=2)")


def test_the_tables_of_a_page_hold_what_was_written():
    found = written()
    behaviors = {"rome": "rome", "cheese": "cheese"}
    data = columns(ml.Findings(VECTORS, completions(), behaviors, written=found), found)
    shown = {data["texts"][text]: numbers for text, numbers in data["shown"].items()}
    assert shown == {ROME: [0], CHEESE: [1]}
    changes = ("same", "wording", "content", "noise")
    assert [changes[code] for code in data["rows"]["change"]] == found.rows.change.tolist()
    assert data["rows"]["natural"] == [None if value != value else value for value in found.rows.natural]
    assert data["rows"]["group"] == found.rows.group.fillna(-1).tolist()
    directions = data["directions"]
    of_name = {name: i for i, name in enumerate(directions["name"])}
    for name, group, kind, text, changed in (
        ("0\u202f−", 0, "content", CHEESE, 0.5),
        ("1\u202f+", 1, "wording", ROME, 0.5),
        ("1\u202f−", -1, "noise", "qz qz qz qz", 1.0),
        ("2\u202f+", -1, "nothing", PLAIN, 0.0),
    ):
        i = of_name[name]
        assert (directions["group"][i], directions["kind"][i]) == (group, kind)
        assert data["texts"][directions["text"][i]] == text and directions["measures"]["changed"][i] == changed
    assert directions["measures"]["radius"] == [2.0] * 6
    effects = {name: directions["measures"]["effect"][i] for name, i in of_name.items()}
    assert (effects["0\u202f+"], effects["0\u202f−"], effects["2\u202f−"]) == (0.3, 0.6, 0.7)


def test_a_direction_is_of_the_group_that_it_writes_most_and_has_its_objective_where_it_was_learned():
    table = completions("it is", 1, ("p", "q", "r")).table
    texts = {0: "they said so then", 1: "wild horses ran away", 2: "wild horses ran away"}
    mine = (table.kind == "steered") & (table.sign == 1)
    table.loc[table.kind != "unsteered", "text"] = "it is"
    table.loc[mine, "text"] = table.prompt[mine].map(texts)
    vectors = ml.SteeringVectors(torch.eye(1, 6), 1, torch.tensor([[1.0], [3.0]]))
    findings = ml.Findings(vectors, ml.Completions(table))
    data = columns(findings, findings.everything)
    directions = data["directions"]
    plus = directions["name"].index("0\u202f+")
    assert data["texts"][directions["text"][plus]] == texts[1]
    assert findings.everything.groups.example[directions["group"][plus]] == texts[1]
    assert directions["measures"]["objective"][plus] == 3.0 and directions["measures"]["objective"][1 - plus] is None
