"""Do the figures show the numbers that they are given?"""

import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.layer_scan import COLUMNS


def test_histories_are_drawn_as_they_are():
    vectors = ml.SteeringVectors(torch.randn(3, 4), 0, torch.rand(5, 3) + 1)
    figure = ml.plots.objective_history(vectors)
    assert len(figure.data) == 3
    assert list(figure.data[1].y) == pytest.approx(vectors.history[:, 1].tolist()) and list(figure.data[1].x) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="no history"):
        ml.plots.objective_history(-vectors)


def test_cosines_are_drawn_around_zero():
    vectors = ml.SteeringVectors(torch.randn(3, 4), 0)
    heatmap = ml.plots.cosine_similarity(vectors).data[0]
    torch.testing.assert_close(torch.tensor(heatmap.z), vectors.cosine_similarity())
    assert (heatmap.zmin, heatmap.zmid, heatmap.zmax) == (-1, 0, 1)


def test_the_layer_map_takes_the_larger_sign():
    rows = [(0, 2, 1, 1.0, 6.0, 2.0, 0.1, 1.0), (0, 2, -1, 1.0, 8.0, 2.0, 0.3, 2.0), (1, 3, 1, 1.0, 3.0, 3.0, 0.2, 1.5)]
    scan = ml.LayerScan(pd.DataFrame(rows, columns=COLUMNS))
    heatmap = ml.plots.layer_map(scan).data[0]
    assert heatmap.z[0][0] == 4.0 and heatmap.z[1][1] == 1.0 and list(heatmap.x) == [2, 3] and list(heatmap.y) == [0, 1]
    assert ml.plots.layer_map(scan, "kl").data[0].z[0][0] == 0.3
    with pytest.raises(ValueError, match="value='loss'"):
        ml.plots.layer_map(scan, "loss")


def test_the_radius_curve_marks_target_and_solution():
    calibration = ml.Calibration(2.0, ((1.0, 0.25), (4.0, 1.0)), "nonlinearity", 0.5)
    figure = ml.plots.radius_curve(calibration)
    assert list(figure.data[0].x) == [1.0, 4.0] and list(figure.data[0].y) == [0.25, 1.0]
    assert {shape.x0 for shape in figure.layout.shapes} >= {2.0} and {shape.y0 for shape in figure.layout.shapes} >= {0.5}
    assert "radius 2" in calibration._repr_html_()
