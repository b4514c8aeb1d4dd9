"""Can another package add a kind of perturbation and a format, and does everything that all kinds share follow?"""

import copy
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import melbo_lens as ml
from melbo_lens.exports import EXPORTERS, exporter
from melbo_lens.perturbations.perturbation import KINDS, Perturbation, checked_history, concatenate, no_history


@dataclass(frozen=True, eq=False)
class Gains(Perturbation):
    """Multiplies the stream that leaves one block by 1 + gain: a kind that this library does not have."""

    gains: torch.Tensor
    layer: int
    history: torch.Tensor = field(default_factory=lambda: no_history(0))
    provenance: Mapping[str, Any] = field(default_factory=dict)
    word = "gain"

    def __post_init__(self):
        object.__setattr__(self, "history", checked_history(self.history, len(self.gains), self.word))

    def parts(self):
        return {"gains": self.gains, "history": self.history}, {"layer": self.layer}

    @classmethod
    def of_parts(cls, tensors, header, provenance):
        return cls(tensors["gains"], header["layer"], tensors["history"], provenance)

    def row_hooks(self, index, coefficients):
        gains = self.gains[list(index)] * coefficients
        return [(f"blocks.{self.layer}.hook_resid_post", lambda stream, hook=None: stream * (1 + gains[:, None, None]))]

    def on(self, host):
        return self

    def scaled_parts(self, tensors, coefficients):
        return {**tensors, "gains": tensors["gains"] * coefficients}

    @property
    def source_layers(self):
        return (self.layer,)

    @classmethod
    def check_joinable(cls, several):
        if len({one.layer for one in several}) > 1:
            raise ValueError("gains of different layers can't be joined")

    def measures(self):
        return {"gain": self.gains.tolist()}

    def __len__(self):
        return len(self.gains)


def made():
    return Gains(torch.tensor([0.5, -0.25, 2.0]), 1, torch.arange(6.0).view(2, 3), {"seed": 4})


def test_rows_signs_and_multiples_follow():
    gains = made()
    assert gains[1].gains.tolist() == [-0.25] and gains[[2, 0]].history.tolist() == [[2.0, 0.0], [5.0, 3.0]]
    assert (-gains).gains.tolist() == [-0.5, 0.25, -2.0] and (2 * gains / 4).gains.tolist() == [0.25, -0.125, 1.0]
    assert (gains * torch.tensor([1.0, 2.0, 3.0])).gains.tolist() == [0.5, -0.5, 6.0] and len(list(gains)) == 3
    assert (
        gains[[2, 0]].provenance["rows"] == [2, 0]
        and (-gains).provenance["derived"] == ["negated"]
        and len((-gains).history) == 0
    )
    joined = concatenate([gains, gains[0]])
    assert joined.gains.tolist() == [0.5, -0.25, 2.0, 0.5] and joined.history.shape == (2, 4)
    with pytest.raises(ValueError, match="different layers"):
        concatenate([gains, Gains(torch.ones(1), 2)])
    with pytest.raises(IndexError, match="gain 3 was asked for, there are 3"):
        gains[3]


def test_files_pickles_copies_and_devices_follow(tmp_path):
    gains = made()
    gains.save(tmp_path / "g.safetensors")
    assert KINDS["Gains"] is Gains
    for again in (
        ml.load(tmp_path / "g.safetensors"),
        pickle.loads(pickle.dumps(gains)),
        copy.deepcopy(gains),
        gains.to("cpu"),
    ):
        assert (
            type(again) is Gains and torch.equal(again.gains, gains.gains) and torch.equal(again.history, gains.history)
        )
        assert again.layer == 1 and again.provenance["seed"] == 4


def test_the_model_runs_under_it_and_measures_take_it(model):
    gains = made()
    tokens = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        clean = model.run_with_hooks(
            tokens, fwd_hooks=[("blocks.1.hook_resid_post", lambda stream, hook: stream * 1.5)]
        )
        with ml.steer(model, gains[0]):
            assert torch.allclose(model(tokens), clean, atol=1e-5)
    table = ml.generate(model, tokens, gains, 3, signs=(1, -1), include_random=False, progress=False).table
    assert len(table) == 7 and table[table.kind == "steered"].vector.nunique() == 3
    assert ml.target_effects(model, tokens, gains, target_layer=3).values.shape[0] == 3
    assert ml.activation_changes(model, tokens, gains).change.shape[0] == 3


def test_a_format_of_ones_own_is_known_to_export(tmp_path):
    @exporter("names")
    def names(perturbation: Perturbation, path: Any, suffix: str = "") -> Path:
        Path(path).write_text(type(perturbation).__name__ + suffix)
        return Path(path)

    try:
        assert ml.export(made(), "names", tmp_path / "n.txt", suffix="!").read_text() == "Gains!"
        with pytest.raises(ValueError, match=r"format='nothing' must be one of \[.*'names', .*'peft'.*\]"):
            ml.export(made(), "nothing", tmp_path / "x")
    finally:
        del EXPORTERS["names"]


def test_a_site_is_part_of_a_vector(tmp_path):
    values = torch.ones(2, 4)
    for site, hook in (("mlp_out", "hook_mlp_out"), ("resid_post", "hook_resid_post"), ("attn_out", "hook_attn_out")):
        vectors = ml.SteeringVectors(values, 3, site=site)
        vectors.save(tmp_path / "v.safetensors")
        random = ml.random_vectors(vectors)
        for one in (
            vectors,
            ml.load(tmp_path / "v.safetensors"),
            pickle.loads(pickle.dumps(vectors)),
            vectors[0],
            -vectors,
            vectors.mean(),
            random,
        ):
            assert one.site == site and one.hook_name == f"blocks.3.{hook}" and one.hooks()[0][0] == f"blocks.3.{hook}"
    with pytest.raises(ValueError, match=r"sites \['attn_out', 'mlp_out'\]"):
        _ = ml.SteeringVectors(values, 3) + vectors
    with pytest.raises(ValueError, match=r"site='mlp' must be one of \['attn_out', 'mlp_out', 'resid_post'\]"):
        ml.SteeringVectors(values, 3, site="mlp")


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, pd.Series])
def test_rows_are_scaled_and_chosen_by_sequences_of_any_kind(make):
    vectors = ml.SteeringVectors(torch.ones(2, 4), 0)
    assert (vectors * make([1.0, 2.0])).radii.tolist() == [2.0, 4.0] and (
        vectors / make([1.0, 2.0])
    ).radii.tolist() == [2.0, 1.0]
    assert made()[make([2, 0])].gains.tolist() == [2.0, 0.5]
    with pytest.raises(ValueError, match="3 factors were given for 2 vectors"):
        _ = vectors * make([1.0, 2.0, 3.0])


def test_what_is_no_index_is_refused():
    with pytest.raises(IndexError, match="True is no index"):
        made()[True]


def test_a_sum_of_vectors_for_different_targets_has_none():
    a, b = (ml.SteeringVectors(torch.ones(1, 4), 0, provenance={"target_layer": layer}) for layer in (3, 4))
    assert "target_layer" not in (a - b).provenance and (a + a).provenance["target_layer"] == 3


def test_another_packages_kind_has_no_control_and_is_told_so():
    with pytest.raises(TypeError, match="no random control is known for Gains: generate with include_random=False"):
        ml.random_like(Gains(torch.ones(2, 4), 1), None)
