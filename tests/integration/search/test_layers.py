"""Does the scan measure each pair as it would be measured alone, and go on after a kill?"""

import pytest
import torch

import melbo_lens as ml
from melbo_lens.measures.radius import median_norm
from melbo_lens.methods.automatic import automatic
from melbo_lens.search import layers as layer_scan
from tests import models
from tests.builders import of_vectors

PROMPTS = ["w1 w2 w3", "w4 w5"]
FAST = {"radius": 2.0, "n_vectors": 2, "n_steps": 4, "progress": False}


def test_every_valid_pair_has_both_signs(any_model):
    table = ml.scan_layers(any_model, PROMPTS, **FAST).table
    pairs = {(source, target) for source in range(4) for target in range(source + 2, 5)}
    assert set(zip(table.source_layer, table.target_layer, strict=True)) == pairs and len(table) == 2 * len(pairs)
    assert list(table.columns) == [
        "source_layer",
        "target_layer",
        "sign",
        "radius",
        "relative_radius",
        "objective",
        "random_objective",
        "effect",
        "random_effect",
        "kl",
        "entropy",
    ]
    assert (table[table.sign == 1].objective > table[table.sign == 1].random_objective).mean() > 0.8
    assert (table.kl >= 0).all() and table.notna().all().all()


def test_a_shortened_slice_is_the_slice_made_directly(any_model):
    long, direct = ml.slice_model(any_model, PROMPTS, 0, 4), ml.slice_model(any_model, PROMPTS, 0, 2)
    short = long.shorter(2)
    theta = torch.randn(2, models.D_MODEL, generator=torch.Generator().manual_seed(0))
    for a, b in zip(of_vectors(short, 2, 1, 9)(theta), of_vectors(direct, 2, 1, 9)(theta), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="target_layer=5"):
        long.shorter(5)


def test_the_prefix_runs_once_for_each_source(model, monkeypatch):
    made = []
    original = layer_scan.slice_model
    monkeypatch.setattr(layer_scan, "slice_model", lambda *arguments: made.append(arguments[2]) or original(*arguments))
    ml.scan_layers(model, PROMPTS, **FAST)
    assert made == [0, 1, 2]


def test_a_killed_scan_goes_on(model, tmp_path, monkeypatch):
    whole = ml.scan_layers(model, PROMPTS, **FAST).table
    original, calls = layer_scan._scan_pair, [0]

    def dying(*arguments):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(layer_scan, "_scan_pair", dying)
    with pytest.raises(KeyboardInterrupt):
        ml.scan_layers(model, PROMPTS, directory=tmp_path / "scan", **FAST)
    assert len(list((tmp_path / "scan").iterdir())) == 3
    resumed = ml.scan_layers(model, PROMPTS, directory=tmp_path / "scan", **FAST).table
    assert calls[0] == 4 + 3 and resumed.equals(whole)


def test_auto_gives_every_source_the_same_share_of_its_streams_norm(model):
    table = ml.scan_layers(model, PROMPTS, **FAST | {"radius": "auto"}).table
    sliced = ml.slice_model(model, PROMPTS, 1, 3)  # the pair nearest to a quarter and to .55 of four layers is (1, 3)
    expected = automatic(sliced, 0).relative
    assert table.relative_radius.to_numpy() == pytest.approx(expected)
    for source, rows in table.groupby("source_layer"):
        norm = median_norm(ml.slice_model(model, PROMPTS, source, 4))
        assert rows.radius.to_numpy() == pytest.approx(expected * norm)


def test_the_effect_is_the_change_relative_to_the_target(model):
    table = ml.scan_layers(model, PROMPTS, source_layers=[1], target_layers=[3], **FAST).table
    sliced = ml.slice_model(model, PROMPTS, 1, 3)
    target = float(sliced.target[sliced.batch.target_mask].norm())
    assert (table.effect > table.random_effect).all()
    # one position or many, the objective of p = 2 and q = 1 is the squared norm of the change
    assert table.effect.to_numpy() == pytest.approx((table.objective**0.5 / target).to_numpy(), rel=0.2)


def test_pairs_that_do_not_exist_are_refused(model):
    with pytest.raises(ValueError, match="no valid pair"):
        ml.scan_layers(model, PROMPTS, source_layers=[3], target_layers=[4], **FAST)


@pytest.mark.parametrize("change", ["weights", "dtype"])
def test_a_scan_does_not_go_on_with_another_models_pairs(directories, tmp_path, change):
    model = models.bridge(directories("gpt2"))
    before = ml.scan_layers(model, PROMPTS, directory=tmp_path, **FAST).table
    assert ml.scan_layers(models.bridge(directories("gpt2")), PROMPTS, directory=tmp_path, **FAST).table.equals(before)
    n_files = len(list(tmp_path.iterdir()))
    if change == "weights":
        with torch.no_grad():
            model.blocks[2].mlp.out.original_component.weight[0, 0] += 1e-3  # one number of one matrix
    else:
        model = models.bridge(directories("gpt2"), dtype=torch.bfloat16)
    after = ml.scan_layers(model, PROMPTS, directory=tmp_path, **FAST).table
    assert not after.equals(before) and len(list(tmp_path.iterdir())) == 2 * n_files


def test_a_damaged_pair_is_named_and_measured_again(model, tmp_path):
    whole = ml.scan_layers(model, PROMPTS, directory=tmp_path, **FAST).table
    damaged = sorted(tmp_path.iterdir())[1]
    for text in ("[[0, 2", "[]", '{"a": 1}', "[[1, 2], [3]]"):
        damaged.write_text(text)
        with pytest.warns(UserWarning, match=f"{damaged.name} is damaged"):
            assert ml.scan_layers(model, PROMPTS, directory=tmp_path, **FAST).table.equals(whole)
    assert ml.scan_layers(model, PROMPTS, directory=tmp_path, **FAST).table.equals(whole)
