"""Do values say in a line what they are, and show themselves in a notebook without trusting any text?"""

import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.reports.saved import SCAN_COLUMNS_0_1_0 as COLUMNS
from tests.unit.plots.test_figures import EVIL, completions


def values():
    vectors = ml.SteeringVectors(torch.randn(3, 4), 1, torch.rand(2, 3) + 1, {"target_hook": EVIL})
    scan = ml.LayerScan(pd.DataFrame([(0, 2, 1, 1.0, 6.0, 2.0, 0.1, 1.0)], columns=COLUMNS))
    measured = ml.Effects(pd.DataFrame({"vector": [0], "sign": [1], "prompt": [0], "kl": [0.25]}), torch.zeros(1, 2, 3))
    adapters = ml.SteeringAdapters.from_factors(torch.randn(2, 3, 5), torch.randn(2, 4, 3), 1)
    return {
        "vectors": (vectors, "SteeringVectors(3 x d_model 4, source_layer=1"),
        "adapters": (adapters, "SteeringAdapters(2 x rank 3"),
        "completions": (completions(), "Completions(13 rows: 6 steered, 6 random, 1 unsteered; 1 prompt)"),
        "evaluation": (ml.evaluate(completions(), {EVIL: "loud"}), "Evaluation(6 rows"),
        "scan": (scan, "LayerScan(1 pairs of layers)"),
        "calibration": (
            ml.Calibration(2.0, ((1.0, 0.25), (4.0, 1.0)), "nonlinearity", 0.5),
            "Calibration(radius 2: nonlinearity 0.5, 2 radii tried)",
        ),
        "effects": (measured, "Effects(1 rows, KL 0.25 to 0.25 nats; norm_change [1, 2, 3])"),
    }


@pytest.mark.parametrize("name", values())
def test_a_value_is_said_in_a_line_and_shown_as_a_table(name):
    value, said = values()[name]
    assert repr(value).startswith(said) and "\n" not in repr(value) and len(repr(value)) < 300
    shown = value._repr_html_()
    assert "<table" in shown and "<script>" not in shown and "<b>" not in shown
    assert "loud" not in repr(value) or "&lt;b&gt;loud" in shown


def test_long_tables_say_how_much_they_leave_out():
    shown = completions(40)._repr_html_()
    assert "the first 60 of 161 rows" in shown and shown.count("<tr") <= 62
    radii = ml.SteeringVectors(torch.eye(2) * 3, 0, torch.tensor([[1.0, 2.0], [5.0, 6.5]]))._repr_html_()
    assert "3.0" in radii and "6.5" in radii and "objective_at_start" in radii


def test_a_slice_is_said_in_a_line(model):
    assert repr(ml.slice_model(model, "w1 w2", 0, 3)).endswith("1 prompts, 2 blocks between)")
