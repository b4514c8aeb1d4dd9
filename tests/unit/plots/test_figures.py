"""Do the figures show the numbers that they are given, and say what they leave out?"""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist

import melbo_lens as ml
from melbo_lens.generation.completions import COLUMNS as COMPLETION_COLUMNS
from melbo_lens.plots import numbers, rates
from melbo_lens.plots.arrays import QUANTILES
from melbo_lens.plots.drawing import log_axis
from melbo_lens.reports.saved import SCAN_COLUMNS_0_1_0 as COLUMNS

EVIL = "<b>loud</b> & <script>alert(1)</script>"


def changes(n=3, n_pos=5, n_layers=2):
    torch.manual_seed(0)
    tokens = tuple(f" token{i}" for i in range(n_pos))
    return ml.ActivationChanges(
        torch.rand(n, n_layers, n_pos), torch.rand(n_layers, n_pos) + 1, tokens, tuple(range(3, 3 + n_layers))
    )


def with_sinks():
    """Position 0 is a sink of the model, and vector 1 makes one of position 2."""
    change = torch.tensor([[300.0, 1.0, 0.5, 1.0], [300.0, 2.0, 5000.0, 1.0]])[:, None]
    return ml.ActivationChanges(change, torch.tensor([[900.0, 1.0, 2.0, 1.0]]), ("a", "b", "c", "d"), (1,))


def completions(n=3, text=EVIL, scales=(1.0,)):
    rows = [(0, "p", "unsteered", None, 0, 0.0, 0, "same", [1], [-0.1])]
    rows += [
        (0, "p", kind, k, sign, scale, 0, f"{text} {kind} {k}" if sign > 0 else "same", [1], [-0.1])
        for kind in ("steered", "random")
        for k in range(n)
        for sign in (1, -1)
        for scale in scales
    ]
    return ml.Completions(pd.DataFrame(rows, columns=COMPLETION_COLUMNS).astype({"vector": "Int64"}))


def test_token_heatmap_is_vectors_by_tokens_at_one_layer():
    measured = changes()
    matrix = numbers.token_heatmap(measured, layer=3, relative=False)
    np.testing.assert_allclose(matrix.values, measured.change[:, 0].numpy())
    assert matrix.rows == ("0", "1", "2") and matrix.columns[1] == "1 ·token1" and not matrix.signed
    np.testing.assert_allclose(
        numbers.token_heatmap(measured).values, (measured.change[:, 1] / measured.clean[1]).numpy()
    )
    figure = ml.plots.token_heatmap(measured, 3, relative=False)
    np.testing.assert_allclose(np.array(figure.data[0].z), matrix.values)
    with pytest.raises(ValueError, match=r"layer=9 was not measured: choose from \[3, 4\]"):
        ml.plots.token_heatmap(measured, 9)


def test_layer_heatmap_is_layers_by_tokens_of_one_vector():
    measured = changes()
    matrix = numbers.layer_heatmap(measured, 2)
    np.testing.assert_allclose(matrix.values, (measured.change[2] / measured.clean).numpy(), rtol=1e-6)
    assert matrix.rows == ("3", "4") and matrix.upward
    with pytest.raises(ValueError, match="vector=3 was asked for, there are 3"):
        ml.plots.layer_heatmap(measured, 3)


def test_cosines_are_drawn_around_zero_in_the_order_of_their_tree():
    torch.manual_seed(1)
    vectors = ml.SteeringVectors(torch.randn(6, 4), 0)
    clustered = numbers.cosine_similarity(vectors)
    cosines = vectors.cosine_similarity().numpy()
    np.testing.assert_allclose(clustered.matrix.values, cosines[np.ix_(clustered.order, clustered.order)], atol=1e-6)
    assert sorted(clustered.order) == list(range(6)) and clustered.matrix.rows == tuple(map(str, clustered.order))
    heights = linkage(pdist(vectors.values.numpy(), "cosine"), "average")[:, 2]  # another way to the same tree
    np.testing.assert_allclose(sorted(clustered.joins[:, :, 1].max(1)), sorted(heights), atol=1e-6)
    heatmap = ml.plots.cosine_similarity(vectors).data[0]
    assert (heatmap.zmin, heatmap.zmid, heatmap.zmax) == (-1, 0, 1)
    lowest = clustered.joins[clustered.joins[:, :, 1].max(1).argmin()]
    a, b = (
        clustered.order[round(float(x))] for x in (lowest[0, 0], lowest[3, 0])
    )  # the two leaves of the lowest join are the most alike pair
    assert cosines[a, b] == pytest.approx(np.max(cosines - 2 * np.eye(6)), abs=1e-6)


def test_cosines_between_effects_have_a_row_for_each_sign():
    effects = ml.TargetEffects(
        torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, -1.0]]), (0, 1, 0, 1), (1, 1, -1, -1), 4
    )
    clustered = numbers.cosine_similarity(effects)
    assert set(clustered.matrix.rows) == {"0+", "1+", "0−", "1−"}
    where = {name: i for i, name in enumerate(clustered.matrix.rows)}
    assert (
        clustered.matrix.values[where["0+"], where["0−"]] == pytest.approx(-1)
        and clustered.matrix.values[where["0+"], where["1+"]] == 0
    )


def test_histories_are_drawn_as_they_are_with_the_level_of_random_vectors():
    vectors = ml.SteeringVectors(torch.randn(3, 4), 0, torch.rand(5, 3) + 1)
    lines = numbers.objective_history(vectors, control=[1.0, 2.0])
    np.testing.assert_allclose(lines.lines[1].y, vectors.history[:, 1].numpy())
    assert lines.level == ("random vectors, mean", 1.5) and lines.log_y
    assert numbers.objective_history(vectors).level == (
        "at the start, mean",
        pytest.approx(float(vectors.history[0].mean())),
    )
    figure = ml.plots.objective_history(vectors, [1.0, 2.0])
    assert list(figure.data[1].y) == pytest.approx(vectors.history[:, 1].tolist()) and list(figure.data[1].x) == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert figure.layout.shapes[0].y0 == 1.5 and figure.layout.annotations[0].y == pytest.approx(np.log10(1.5))
    with pytest.raises(ValueError, match="no history"):
        ml.plots.objective_history(-vectors)


def test_ranking_keeps_the_order_of_its_table_and_every_measure():
    table = pd.DataFrame(
        {"vector": [2, 0], "sign": [1, -1], "kl": [3.0, 1.0], "rate of x": [0.5, np.nan], "cluster": [0, 0]}
    )
    panels = numbers.ranking(table, completions())
    assert panels.rows == ("2 +", "0 −") and panels.measures == ("KL, nats", "rate of x") and panels.texts[1] == "same"
    np.testing.assert_array_equal(panels.values, [[3.0, 1.0], [0.5, np.nan]])
    assert list(ml.plots.ranking(table).data[0].x) == [3.0, 1.0]


def test_rows_of_one_vector_have_bars_of_their_own():
    rows = {"vector": 0, "sign": 1, "behavior": ["a", "b", "b"], "scale": [1.0, 1.0, 2.0], "rate": [0.5, 0.2, 0.1]}
    table = pd.DataFrame(rows)
    assert numbers.ranking(table).rows == ("0 + a 1.0", "0 + b 1.0", "0 + b 2.0")
    assert numbers.ranking(table[:1]).rows == ("0 +",)


def test_effects_at_a_hook_name_it():
    effects = ml.TargetEffects(torch.randn(3, 4), (0, 1, 2), (1, 1, 1), None, "blocks.3.attn.hook_z")
    assert "blocks.3.attn.hook_z" in numbers.cosine_similarity(effects).matrix.title
    assert "blocks.3.attn.hook_z" in numbers.effect_scatter(effects).title


def test_the_layer_map_takes_the_larger_sign_and_leaves_untried_pairs_blank():
    rows = [(0, 2, 1, 1.0, 6.0, 2.0, 0.1, 1.0), (0, 2, -1, 1.0, 8.0, 2.0, 0.3, 2.0), (1, 3, 1, 1.0, 3.0, 3.0, 0.2, 1.5)]
    scan = ml.LayerScan(pd.DataFrame(rows, columns=COLUMNS))
    matrix = numbers.layer_map(scan)
    np.testing.assert_array_equal(matrix.values, [[4.0, np.nan], [np.nan, 1.0]])
    assert matrix.columns == ("2", "3") and matrix.rows == ("0", "1")
    assert numbers.layer_map(scan, "kl").values[0][0] == 0.3
    with pytest.raises(ValueError, match="value='loss'"):
        ml.plots.layer_map(scan, "loss")


def test_the_radius_curve_marks_target_and_solution():
    calibration = ml.Calibration(2.0, ((1.0, 0.25), (4.0, 1.0)), "nonlinearity", 0.5)
    figure = ml.plots.radius_curve(calibration)
    assert list(figure.data[0].x) == [1.0, 4.0] and list(figure.data[0].y) == [0.25, 1.0]
    assert {shape.x0 for shape in figure.layout.shapes} >= {2.0} and {shape.y0 for shape in figure.layout.shapes} >= {
        0.5
    }
    assert figure.layout.annotations[1].x == pytest.approx(
        np.log10(2.0)
    )  # so plotly places texts on a logarithmic axis


def test_effects_lie_along_their_principal_components_in_the_group_of_their_behavior():
    torch.manual_seed(0)
    values = torch.randn(6, 1) * torch.tensor([[3.0, 4.0, 0.0]]) + 1
    effects = ml.TargetEffects(values, (0, 1, 2, 0, 1, 2), (1, 1, 1, -1, -1, -1), 4)
    points = numbers.effect_scatter(effects, completions(), {"loud": "loud"})
    centred = (values - values.mean(0)).norm(dim=1).numpy()
    np.testing.assert_allclose(np.abs(points.x), centred, atol=1e-5)
    np.testing.assert_allclose(points.y, 0, atol=1e-5)
    assert points.groups == ("loud",) * 3 + ("none",) * 3 and points.x_axis == "component 1, 100% of the variance"
    figure = ml.plots.effect_scatter(effects, completions(), {"loud": "loud"})
    assert [trace.name for trace in figure.data] == ["loud", "none"]
    assert "&lt;b&gt;loud" in figure.data[0].customdata[0][1] and "<b>" not in str(figure.data[0].customdata)


def test_rates_stand_beside_their_controls_with_intervals():
    evaluation = ml.evaluate(completions(), {"loud": "loud"})
    bars = rates.behavior_rates(evaluation)
    assert bars.groups == ("steered", "random, same norms", "unsteered")
    np.testing.assert_allclose(bars.values[:, 0], [0.5, 0.5, 0])
    np.testing.assert_allclose(
        [bars.low[1, 0], bars.high[1, 0]], [0.1876, 0.8124], atol=1e-4
    )  # Wilson, 3 of 6, by hand
    np.testing.assert_allclose([bars.low[2, 0], bars.high[2, 0]], [0, 0.7935], atol=1e-4)  # 0 of 1
    drawn = ml.plots.behavior_rates(evaluation).data
    # too wide to draw, said on hovering: a whisker of no length would look exact
    assert np.isnan(drawn[2].error_y.array).all() and "79.35%" in drawn[2].customdata[0]
    said = ml.plots.behavior_rates(evaluation).layout.title.subtitle.text.replace("<br>", " ")
    assert said.endswith("An interval wider than half the scale is not drawn; hovering shows it.")


def test_a_scale_sweep_runs_over_signed_multiples_through_unsteered():
    swept = completions(scales=(0.5, 2.0))
    shares, coherence = rates.scale_sweep(swept, {"loud": "loud"}, coherence=np.arange(len(swept)))
    steered, random = shares.lines
    assert steered.x.tolist() == [-2.0, -0.5, 0.0, 0.5, 2.0] and steered.y.tolist() == [0, 0, 0, 1, 1]
    assert random.control and random.y.tolist() == [0, 0, 0, 1, 1]
    table = swept.table.assign(order=range(len(swept)))
    mean = table[(table.kind == "steered") & (table.sign == 1) & (table.scale == 2)].order.mean()
    assert coherence.lines[0].y[-1] == mean
    assert len(ml.plots.scale_sweep(swept, {"loud": "loud"}).data) == 4


def test_random_vectors_of_a_scale_sweep_have_one_curve_of_any_behaviour():
    swept = completions(1, scales=(1.0,))
    texts = {("steered", 1): "loud", ("steered", -1): "soft", ("random", 1): "soft unsure", ("random", -1): "unsure"}
    table = swept.table.assign(text=[texts.get((row.kind, row.sign), "plain") for row in swept.table.itertuples()])
    asked = {"loud": lambda text: None if "unsure" in text else "loud" in text, "soft": "soft"}
    shares, _ = rates.scale_sweep(ml.Completions(table), asked)
    steered_loud, steered_soft, random = shares.lines
    assert (steered_loud.y.tolist(), steered_soft.y.tolist()) == ([0, 0, 1], [1, 0, 0])
    assert random.name == "any, random" and random.control
    # where one has no verdict, the other decides if it is there; else nobody knows
    assert random.y[1:].tolist() == [0, 1] and np.isnan(random.y[0]) and np.isnan(random.low[0])


def test_examples_prefer_a_text_that_differs_and_a_scale_near_one():
    table = completions(1, scales=(0.5, 1.0)).table
    table.loc[(table.kind == "steered") & (table.sign == 1), "text"] = ["half", "whole"]
    assert ml.plots.labels.examples(ml.Completions(table), by_sign=True) == {(0, 1): "whole", (0, -1): "same"}
    assert ml.plots.labels.examples(ml.Completions(table)) == {0: "+ whole\n− same"}


def test_nothing_to_draw_is_said():
    none = ml.ActivationChanges(torch.zeros(0, 1, 3), torch.ones(1, 3), ("a", "b", "c"), (1,))
    empty = ml.TargetEffects(torch.zeros(0, 3), (), (), 2)
    no_rows = ml.Completions(completions().table.head(0))
    for draw in (
        lambda: ml.plots.token_heatmap(none),
        lambda: ml.plots.layer_heatmap(none),
        lambda: ml.plots.cosine_similarity(empty),
        lambda: ml.plots.effect_scatter(empty),
        lambda: ml.plots.ranking(pd.DataFrame({"vector": [], "sign": [], "kl": []})),
        lambda: ml.plots.layer_map(ml.LayerScan(pd.DataFrame(columns=COLUMNS))),
        lambda: ml.plots.scale_sweep(no_rows, {"x": "x"}),
        lambda: ml.plots.colored_tokens_multi(none),
        lambda: ml.plots.text_neuron_activations(none),
        lambda: ml.plots.top_tokens(pd.DataFrame(columns=["vector", "route", "promoted", "suppressed"])),
    ):
        with pytest.raises(ValueError, match="there are no"):
            draw()
    with pytest.raises(ValueError, match="there are 0"):
        ml.plots.colored_tokens(none)
    with pytest.raises(TypeError, match="compare what they do"):
        ml.plots.cosine_similarity(ml.SteeringAdapters.from_factors(torch.randn(1, 2, 3), torch.randn(1, 4, 2), 0))


def test_one_token_and_one_vector_are_drawn():
    one = changes(1, 1, 1)
    assert np.array(ml.plots.token_heatmap(one).data[0].z).shape == (1, 1)
    assert np.array(ml.plots.layer_heatmap(one).data[0].z).shape == (1, 1)
    assert len(ml.plots.cosine_similarity(ml.SteeringVectors(torch.randn(1, 4), 0)).data) == 1  # no tree
    assert len(ml.plots.effect_scatter(ml.TargetEffects(torch.randn(1, 4), (0,), (1,), 2)).data[0].x) == 1


def test_rows_with_nan_are_left_blank_and_named():
    measured = changes()
    measured.change[1, 1] = float("nan")
    assert numbers.token_heatmap(measured).note == "NaN or infinity in vectors 1."
    assert ml.plots.token_heatmap(measured).layout.title.subtitle.text == "NaN or infinity in vectors 1."
    effects = ml.TargetEffects(torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [2.0, 1.0]]), (0, 1, 2), (1, 1, 1), 4)
    clustered = numbers.cosine_similarity(effects)
    assert clustered.order[-1] == 1 and len(clustered.joins) == 1 and "rows 1." in clustered.matrix.note
    points = numbers.effect_scatter(effects)
    assert points.labels == ("vector 0 +", "vector 2 +") and "rows 1" in points.note
    assert len(numbers.effect_scatter(effects).x) == 2
    with pytest.raises(ValueError, match="rows without NaN"):
        ml.plots.effect_scatter(ml.TargetEffects(torch.full((2, 2), float("nan")), (0, 1), (1, 1), 4))


def test_a_sink_is_marked_and_left_out_of_the_scale():
    measured = with_sinks()
    for matrix in (numbers.token_heatmap(measured, relative=False), numbers.layer_heatmap(measured, 1, relative=False)):
        assert matrix.bound == 2.0
    marked = numbers.token_heatmap(measured).marked
    assert marked is not None and marked.tolist() == [[True, False, False, False], [True, False, True, False]]
    main, mark = ml.plots.token_heatmap(measured, relative=False).data
    assert main.zmax == 2.0 and np.isnan(main.z[1][2]) and mark.customdata[1][2] == 5000 and mark.z[1][2] == 1
    assert mark.name == "attention sink, left out of the scale" and np.isnan(mark.z[1][1]) and main.z[1][1] == 2.0
    assert len(ml.plots.token_heatmap(changes()).data) == 1


def test_what_is_large_everywhere_is_no_sink():
    """A radius that is far too large is drawn as it is."""
    everywhere = ml.ActivationChanges(torch.full((1, 1, 4), 50.0), torch.ones(1, 4), ("a", "b", "c", "d"), (1,))
    assert not everywhere.sinks.any() and numbers.token_heatmap(everywhere).bound == 50


def test_of_many_vectors_the_first_and_the_quantiles_of_all_are_drawn():
    measured = changes(500)
    measured.change[77] *= 3
    matrix = numbers.token_heatmap(measured)
    assert matrix.rows[0] == "77" and matrix.rows[10:] == tuple(QUANTILES.values()) and len(matrix.rows) == 15
    np.testing.assert_allclose(matrix.values[12], np.median(measured.relative[:, -1].numpy(), axis=0), rtol=1e-6)
    assert "10 of 500 vectors" in matrix.note
    history = torch.rand(3, 500) + 1
    history[-1, 42] = 9
    lines = numbers.objective_history(ml.SteeringVectors(torch.randn(500, 4), 0, history))
    assert [line.name for line in lines.lines][::3] == ["vector 42", "median of 500"] and len(lines.lines) == 4
    np.testing.assert_allclose(lines.lines[-1].y, np.median(history.numpy(), axis=1), rtol=1e-6)
    np.testing.assert_allclose(lines.bands[1].high, np.quantile(history.numpy(), 0.75, axis=1), rtol=1e-6)
    figure = ml.plots.objective_history(ml.SteeringVectors(torch.randn(500, 4), 0, history))
    assert [trace.name for trace in figure.data if trace.fill] == ["middle 90 %", "middle 50 %"]
    ranked = pd.DataFrame({"vector": range(500), "sign": 1, "kl": np.linspace(1, 0, 500)})
    panels = numbers.ranking(ranked, completions(500))
    assert len(panels.rows) == len(panels.texts) == 25 and panels.rows[22] == "median" and panels.n_summaries == 5
    assert panels.values[0, 22] == pytest.approx(0.5) and panels.values[0, 0] == 1
    assert set(ml.plots.ranking(ranked).data[0].marker.color[20:]) == {ml.plots.drawing.CONTROL}
    points = numbers.effect_scatter(ml.TargetEffects(torch.randn(500, 4), tuple(range(500)), (1,) * 500, 2))
    assert len(points.x) == 500 and 1 < len(points.named) <= 5  # a point is small
    assert np.hypot(points.x, points.y).argmax() == points.named[0]
    view = ml.plots.colored_tokens_multi(changes(500))
    assert len(view.elements[0].properties["labels"]) == 60 and "first 60 of 500" in view.elements[0].note


def test_cosines_of_many_vectors_are_means_over_clusters():
    torch.manual_seed(0)
    centres = torch.linalg.qr(torch.randn(80, 80)).Q[:60]
    vectors = ml.SteeringVectors(centres.repeat_interleave(5, 0) + 1e-3 * torch.randn(300, 80), 0)
    clustered = numbers.cosine_similarity(vectors, completions(300, "text"))
    assert clustered.matrix.values.shape == (60, 60) and {name.split(" ")[1] for name in clustered.matrix.rows} == {
        "×5"
    }
    np.testing.assert_allclose(clustered.matrix.values, np.eye(60), atol=0.01)
    first = [int(name.split()[0]) for name in clustered.matrix.rows]
    assert sorted(k // 5 for k in first) == list(range(60))
    assert f"steered {first[7]}" in clustered.matrix.texts[7] and "300 rows in 60 clusters" in clustered.matrix.note


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((61.0, 92.0), None),
        ((1.0, 900.0), ["1", "3", "10", "30", "100", "300"]),
        ((2.2, 18.0), ["2", "3", "5", "10"]),
        ((1e-9, 1e7), None),
        ((4.0, 4.0), None),
    ],
)
def test_ticks_of_a_logarithmic_axis_keep_their_distance(values, ticks):
    axis = log_axis(np.array([*values, np.nan, -1.0]))
    low, high = min(values) / 1.1, max(values) * 1.1
    shown = [(tick, text) for tick, text in zip(axis["tickvals"], axis["ticktext"], strict=True) if low <= tick <= high]
    places = np.log10([tick for tick, _ in shown]) / np.log10(high / low)
    assert len(shown) >= 2 and np.diff(places).min() >= 0.1
    if ticks is not None:
        assert [text for _, text in shown] == ticks
    assert all(len(text.replace("<sup>", "").replace("</sup>", "")) <= 7 for _, text in shown)


def test_no_button_of_a_figure_sends_data_to_a_host():
    assert {"sendChartToCloud", "sendcharttocloud"} <= set(ml.plots.layer_heatmap(changes()).layout.modebar.remove)


def test_text_of_a_model_is_no_markup_in_a_figure():
    figure = ml.plots.token_heatmap(changes(), completions=completions())
    labels = " ".join([*figure.data[0].y, *figure.layout.yaxis.ticktext, *figure.data[0].x])
    assert "<b>" not in labels and "<script>" not in labels and "&lt;script&gt;alert(1)" in labels
    assert len(figure.data[0].y) == 3 and figure.layout.yaxis.ticktext[0].startswith("0  + &lt;b&gt;loud")


def test_figures_are_readable_at_100_vectors_and_200_tokens():
    figure = ml.plots.token_heatmap(changes(100, 200), completions=completions(100, "text"))
    assert np.array(figure.data[0].z).shape == (15, 200) and figure.layout.height >= 15 * 16
    assert len(figure.to_json()) < 500_000  # completions are said once a row, not once a cell


def test_rows_have_the_names_that_are_given_and_the_text_of_their_own_sign():
    measured, names = changes(), ["0.3 +", "3.7 −", "1.1 +"]
    matrix = numbers.token_heatmap(measured, completions=completions(), names=names)
    assert matrix.rows == tuple(names) and matrix.texts[1] == f"{EVIL} steered 1"
    assert numbers.layer_heatmap(measured, 1, name="3.7 −").title == "Change by layer and token, vector 3.7 −"
    vectors = ml.SteeringVectors(torch.eye(3), 0)
    assert sorted(numbers.cosine_similarity(vectors, names=names).matrix.rows) == sorted(names)
    table = pd.DataFrame({"vector": [2, 0, 1], "sign": [1, -1, 1], "kl": [3.0, 1.0, 0.5]})
    assert numbers.ranking(table, names=names).rows == tuple(names)
    many = numbers.token_heatmap(changes(100), names=[f"name {k}" for k in range(100)])
    usual = numbers.token_heatmap(changes(100))
    assert many.rows[:10] == tuple(f"name {row}" for row in usual.rows[:10])
    for draw in (
        lambda: ml.plots.token_heatmap(measured, names=names[:2]),
        lambda: ml.plots.cosine_similarity(vectors, names=names[:2]),
        lambda: ml.plots.ranking(table, names=names[:2]),
        lambda: ml.plots.colored_tokens_multi(measured, names=names[:2]),
    ):
        with pytest.raises(ValueError, match="2 names were given for 3 rows"):
            draw()


def test_the_title_of_a_ranking_says_by_what_it_is_ordered():
    table = pd.DataFrame({"vector": [0, 1, 2], "sign": 1, "kl": [3.0, 1.0, 9.0], "sink": [False, False, True]})
    assert numbers.ranking(table).title == "Vectors, the largest KL first"
    assert numbers.ranking(table.assign(kl=[1.0, 2.0, 9.0])).title == "Vectors, in the order of the table"


def test_a_completion_without_text_is_called_empty_and_a_line_break_before_it_hides_nothing():
    written = completions()
    steered = written.table.kind == "steered"
    written.table.loc[steered & (written.table.vector == 0), "text"] = " \n"
    written.table.loc[steered & (written.table.vector == 1) & (written.table.sign == 1), "text"] = "\n\n it is"
    matrix = numbers.token_heatmap(changes(), completions=written, names=["0 +", "1 +", "2 +"])
    assert matrix.texts[:2] == ("(empty)", "it is")
    ticks = ml.plots.token_heatmap(changes(), completions=written).layout.yaxis.ticktext
    assert ticks[0].startswith("0  + (empty)") and ticks[1].startswith("1  + it is")
