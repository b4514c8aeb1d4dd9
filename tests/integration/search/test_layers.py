"""Does the scan measure each pair as it would be measured alone, and go on after a kill?"""

import hashlib
import json

import pytest
import torch

import melbo_lens as ml
from melbo_lens.measures.radius import median_norm
from melbo_lens.methods.automatic import automatic
from melbo_lens.methods.provenance import fingerprint
from melbo_lens.models.access import host_of
from melbo_lens.search import layers as layer_scan
from melbo_lens.sweeps import tasks
from tests import models
from tests.builders import of_vectors

PROMPTS = ["w1 w2 w3", "w4 w5"]
FAST = {"radius": 2.0, "n_vectors": 2, "n_steps": 4, "progress": False}


def kept(folder):
    """The files of pairs."""
    return sorted(path for path in folder.glob("*-*.json") if "share" not in path.name)


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
    original = tasks.slice_model
    monkeypatch.setattr(tasks, "slice_model", lambda *arguments: made.append(arguments[2]) or original(*arguments))
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
    assert len(kept(tmp_path / "scan")) == 3 and ml.status(tmp_path / "scan").n_done == 3
    resumed = ml.scan_layers(model, PROMPTS, directory=tmp_path / "scan", **FAST).table
    assert calls[0] == 4 + 3 and resumed.equals(whole)
    assert (ml.status(tmp_path / "scan").n_done, ml.status(tmp_path / "scan").n_asked) == (6, 6)


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
    if change == "weights":
        with torch.no_grad():
            model.blocks[2].mlp.out.original_component.weight[0, 0] += 1e-3  # one number of one matrix
    else:
        model = models.bridge(directories("gpt2"), dtype=torch.bfloat16)
    names = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="with other weights"):
        ml.scan_layers(model, PROMPTS, directory=tmp_path, **FAST)
    assert names == sorted(path.name for path in tmp_path.rglob("*"))


def test_a_pair_that_an_earlier_version_kept_is_not_measured_again(model, tmp_path, monkeypatch):
    """It kept each pair of a given radius under this name, in this form, in a folder that had nothing else."""
    whole = ml.scan_layers(model, PROMPTS, **FAST).table
    said = [[[1, 5, 6, 7], [1, 8, 9]], 2.0, 2, 4, None, 0, fingerprint(host_of(model))]
    name = hashlib.blake2b(json.dumps(said).encode(), digest_size=8).hexdigest()
    for (source, target), rows in whole.groupby(["source_layer", "target_layer"]):
        (tmp_path / f"{name}-{source}-{target}.json").write_text(json.dumps(rows.to_numpy().tolist()))
    monkeypatch.setattr(layer_scan, "_scan_pair", lambda *_: pytest.fail("it was measured again"))
    assert ml.scan_layers(model, PROMPTS, directory=tmp_path, **FAST).table.astype(float).equals(whole.astype(float))


def test_an_automatic_radius_is_found_once_and_belongs_to_the_pairs_of_its_scan(model, tmp_path, monkeypatch):
    """Pairs of another scan, whose radius was calibrated elsewhere, are not mixed with its own."""
    auto = FAST | {"radius": "auto"}
    whole = ml.scan_layers(model, PROMPTS, **auto).table
    found, real = [], layer_scan.automatic
    monkeypatch.setattr(layer_scan, "automatic", lambda *a: found.append(a[0].source_layer) or real(*a))
    ml.scan_layers(model, PROMPTS, [2], directory=tmp_path, **auto)
    assert ml.scan_layers(model, PROMPTS, directory=tmp_path, **auto).table.equals(whole) and found == [2, 1]
    kept(tmp_path)[0].unlink()
    assert ml.scan_layers(model, PROMPTS, directory=tmp_path, **auto).table.equals(whole) and found == [2, 1]


def test_a_scan_without_a_valid_pair_writes_nothing(model, tmp_path):
    with pytest.raises(ValueError, match="no valid pair"):
        ml.scan_layers(model, PROMPTS, [3], [4], directory=tmp_path / "new", **FAST)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "dask"}, "engine"),
        ({"engine": "ray"}, "give directory"),
        ({"engine": "ray", "directory": "x"}, "ModelKey"),
    ],
)
def test_an_engine_that_can_not_do_it_is_refused_at_once(model, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ml.scan_layers(model, PROMPTS, **FAST, **settings)


def test_a_model_may_be_given_by_its_name(directories):
    key = ml.ModelKey(directories("gpt2"), device="cpu")
    one, other = (
        ml.scan_layers(model, PROMPTS, [0], **FAST).table for model in (key, models.bridge(directories("gpt2")))
    )
    assert one.equals(other)


def test_a_damaged_pair_is_named_and_measured_again(model, tmp_path):
    whole = ml.scan_layers(model, PROMPTS, directory=tmp_path, **FAST).table
    damaged = kept(tmp_path)[1]
    for text in ("[[0, 2", "[]", '{"a": 1}', "[[1, 2], [3]]"):
        damaged.write_text(text)
        with pytest.warns(UserWarning, match=f"{damaged.name} is damaged"):
            assert ml.scan_layers(model, PROMPTS, directory=tmp_path, **FAST).table.equals(whole)
    assert ml.scan_layers(model, PROMPTS, directory=tmp_path, **FAST).table.equals(whole)


def test_a_first_position_that_becomes_a_sink_later_counts_at_the_targets_before(directories):
    model = models.bridge(directories("gpt2"))
    network = model.original_model.transformer
    mlp, usual = network.h[2].mlp, ml.slice_model(model, PROMPTS, 0, 2).usual_norm
    with torch.no_grad():  # the first position alone has the direction that sets off one neuron of block 2
        network.wpe.weight[0, 0] += 5 * usual
        mlp.c_fc.weight[:, 0], mlp.c_fc.weight[0, 0], mlp.c_fc.bias[0] = 0, 8, -30
        mlp.c_proj.weight[0], mlp.c_proj.weight[0, 1] = 0, 3000
    sinks = {target: ml.slice_model(model, PROMPTS, 0, target).begins_with_a_sink for target in (2, 4)}
    assert sinks == {2: False, 4: True}
    alone, together = (ml.scan_layers(model, PROMPTS, [0], targets, **FAST).table for targets in ([2], [2, 4]))
    assert together[together.target_layer == 2].to_numpy().tolist() == alone.to_numpy().tolist()
