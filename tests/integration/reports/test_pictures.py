"""Do the figures of a page have the vectors of its cards, by their names and in their colours?"""

import json
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.plots import numbers
from melbo_lens.reports import ladder
from melbo_lens.reports.pictures import Rows, completions_of, figures, how_found, which_rows
from melbo_lens.search.cards import COLORS, OTHER, cards_of, color_of
from tests.integration.reports.test_cards import written
from tests.integration.reports.test_page import data_of


@pytest.fixture(scope="module")
def search():
    """A search whose groups were found at two source layers, its prompt, and what was measured of it."""
    organism = ml.organisms.load("modes")
    prompt = organism.prompts["clean"][2]
    at = {0: (10.5,), 1: (25.7, 38.5)}  # radii at which each source layer writes something else
    every = ml.make_plan(organism.model, prompt, n_vectors=12)
    first = {source: next(trial for trial in every if trial.source_layer == source) for source in at}
    plan = [replace(first[source], radius=radius) for source in at for radius in at[source]]
    plan.append(replace(plan[1], target_layer=3, seed=1))  # stands beside those of the same source
    found = ml.discover(organism.model, prompt, plan=plan, progress=False)
    return organism.model, prompt, found, ml.Findings.of_discovery(organism.model, prompt, found)


def in_json(text):
    """The text as a figure in a page has it."""
    return json.dumps(text)[1:-1]


def drawn(findings):
    everything = findings.everything
    rungs, cards = ladder.ladder(everything), cards_of(everything)
    return {one.anchor: one for one in figures(findings, everything, None, rungs, cards)}


def test_what_is_measured_are_the_directions_of_the_first_groups_whatever_their_layer(search):
    model, prompt, found, kept = search
    table = found.table.head(20)
    keys = list(zip(table.trial, table.vector, table.sign, strict=True))
    assert table.source_layer.nunique() == 2 and kept.search["measured"] == list(dict.fromkeys(keys))
    assert kept.changes.layers == tuple(range(1, 5)) and set(kept.effects.signs) == {1}
    kl = dict(zip(kept.ranked.vector, kept.ranked.kl, strict=True))
    said, of_key = kept.ranked.set_index("vector").effect, table.set_index(["trial", "vector", "sign"]).effect
    assert {key[2] for key in kept.search["measured"]} == {1, -1}
    assert said.sort_index().tolist() == [of_key[key] for key in kept.search["measured"]]
    for number, key in enumerate(kept.search["measured"]):
        one = found.vector(keys.index(key))
        change = ml.activation_changes(model, prompt, one, range(1, 5)).change[0]
        torch.testing.assert_close(kept.changes.change[number], change)
        assert (change[: one.source_layer] == 0).all() and (change[one.source_layer :] > 0).any()
        torch.testing.assert_close(kept.effects.values[number], ml.target_effects(model, prompt, one, 4).values[0])
        effects = ml.output_effects(model, prompt, one, signs=(1,))
        assert kl[number] == pytest.approx(effects.table.kl[0], abs=1e-5)


def test_the_figure_of_layers_is_that_of_the_first_card_and_has_its_name(search):
    _, _, found, kept = search
    everything = kept.everything
    cards, rungs = cards_of(everything), ladder.ladder(everything)
    for first in (0, 1):  # the page may have folded the first group
        picture = {one.anchor: one for one in figures(kept, everything, None, rungs, cards[first:])}["layers"]
        card = cards[first]
        assert picture.caption.startswith(f"Vector {card.direction}, of card {first + 1} (“{card.title}”)")
        name = card.direction.replace("\u202f", " ")
        assert in_json(f"token, vector {name}") in picture.html
        assert Rows(kept, everything).direction(first) == (
            found.table.trial[first],
            found.table.vector[first],
            found.table.sign[first],
        )


def test_a_row_shows_the_example_of_its_group(search):
    _, _, found, kept = search
    rows = Rows(kept, kept.everything)
    matrix = numbers.token_heatmap(kept.changes, completions=rows.completions, names=rows.names(len(kept.changes)))
    first = found.table.drop_duplicates(["trial", "vector", "sign"]).head(len(matrix.rows))
    assert list(matrix.texts) == [text.strip() for text in first.example]
    signs = {1: "+", -1: "−"}
    assert list(matrix.rows) == [f"{row.trial}.{row.vector} {signs[row.sign]}" for row in first.itertuples()]
    assert which_rows(kept).startswith("The vectors here, each with its sign, wrote the examples of ")


def test_vectors_of_one_layer_are_compared_each_once_and_missing_groups_are_named(search):
    _, _, found, kept = search
    caption = drawn(kept)["cosines"].caption
    layer = kept.vectors.source_layer
    missing = [n + 1 for n, other in enumerate(found.table.source_layer.head(20)) if other != layer]
    assert f"These vectors are added at layer {layer}." in caption
    assert re.findall(r"\d+", caption[caption.index("Group") : caption.index("missing")]) == list(map(str, missing))
    # a vector that stands for two groups, with its two signs, is one row
    trial, vector, sign = kept.search["shown"][0]
    twice = {**kept.search, "shown": [(trial, vector, sign), (trial, vector, -sign)]}
    pair = ml.Findings(
        ml.SteeringVectors(torch.stack([torch.ones(3), -torch.ones(3)]), 0), kept.completions, written=kept.written,
        groups=kept.groups, search=twice,
    )  # fmt: skip
    html = drawn(pair)["cosines"].html
    names = [in_json(Rows(pair, kept.written).call(trial, vector, one).replace("\u202f", " ")) for one in (1, -1)]
    assert [name in html for name in names] == [sign == 1, sign == -1]


def test_a_group_has_one_colour_on_its_card_on_the_map_and_in_the_figure_of_radii(search, tmp_path):
    _, _, found, kept = search
    everything = kept.everything
    page = ml.report(kept, path=tmp_path / "page.html").read_text()
    cards = {card.number: card.color for card in cards_of(everything)}
    colors = data_of(page)["colors"]
    assert colors == [cards[number] for number in range(len(found.table))]
    for number, color in cards.items():
        assert f'id="group-{number}" style="border-left-color:{color}"' in page
    above, _ = ladder.figure(ladder.ladder(everything), everything)
    assert [line.color for line in above.lines if not line.control] == list(cards.values())[: len(above.lines) - 1]
    # no colour stands for two groups, but those after the last one share one of their own
    assert [color_of(n) for n in range(9)] == [*COLORS, OTHER, OTHER] and len({*COLORS, OTHER}) == len(COLORS) + 1


def test_the_caption_of_a_radius_says_how_it_follows_from_the_curve():
    curve = ((4.0, 1.0), (8.0, 0.9), (16.0, 0.5))
    said = how_found(ml.Calibration(8 * 2**0.5, curve, "readable", 0.75, layers=(0, 4)))
    assert "of layers 0 to 4" in said and "readable falls through 75%" in said
    assert "passed between 8 and 16" in said and "by ratio is taken, 11.3," in said
    assert said.endswith("The axis of the radius is logarithmic.")
    short_of = how_found(ml.Calibration(4 * 2**0.5, curve, "nonlinearity", 0.5, share=0.5))
    assert "passed between 8 and 16" in short_of and "The radius is 0.5 of it. Both axes" in short_of
    assert "between" not in how_found(ml.Calibration(4.0, ((4.0, 4.0),), "stream", 0.05))


def test_the_pair_of_layers_of_an_edge_is_known_and_kept(search, tmp_path):
    model, prompt, _, kept = search
    edge = ml.calibrate_radius(model, prompt, 0, 4)
    assert edge.layers == (0, 4)
    replaced = ml.Findings(kept.vectors, kept.completions, calibration=edge)
    replaced.save(tmp_path)
    assert ml.Findings.load(tmp_path).calibration == edge


def test_completions_of_directions_are_numbered_in_their_order_with_the_example_first():
    bare = written()
    row = bare.groups.iloc[0]
    key = (int(row.trial), int(row.vector), int(row.sign))
    own = (bare.rows.trial == key[0]) & (bare.rows.vector == key[1]) & (bare.rows.sign == key[2])
    before = bare.rows[own & (bare.rows.kind == "steered")].head(1).assign(text="something else")
    found = replace(bare, rows=pd.concat([before, bare.rows], ignore_index=True))
    table = completions_of(found, [(9, 9, 1), key]).table
    mine = table[table.kind == "steered"]
    assert set(mine.vector) == {1} and set(mine.sign) == {1} and mine.text.iloc[0] == row.example
    every = found.steered
    same = (every.trial == key[0]) & (every.vector == key[1]) & (every.sign == key[2])
    assert sorted(mine.text) == sorted(every.text[same]) and "something else" in set(mine.text)
