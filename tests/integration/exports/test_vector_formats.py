"""Do files of vectors for other tools say what the steered model does?  Each is read by a decoder written for the test.

What a file says is done to the plain Hugging Face model by a forward hook, whose module the test names itself.
"""

import base64
import json
import math
import os
import socket
import struct
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import melbo_lens as ml
from melbo_lens import exports
from melbo_lens.models.access import host_of
from melbo_lens.models.counterparts import from_files
from tests import models

TOKENS = torch.tensor([[1, 5, 6, 7, 9]])
D_MODEL = models.D_MODEL
LAYERS = {"llama": "model.layers", "neox": "gpt_neox.layers", "gpt2": "transformer.h", "gemma2": "model.layers"}


def a_vector(layer=1, site="mlp_out", seed=0):
    values = 3 * torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return ml.SteeringVectors.from_tensor(values, layer, site)


def steered(model, vectors):
    with torch.no_grad(), ml.steer(model, vectors):
        return host_of(model).forward(TOKENS).log_softmax(-1)


def hooked(directory, added):
    """Log-probabilities of the plain model with vectors added to the outputs of modules, by name."""
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    modules = dict(network.named_modules())
    for name, vector in added.items():
        assert vector.shape == (D_MODEL,) and vector.dtype == torch.float32

        def add(module, arguments, output, vector=vector):
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        modules[name].register_forward_hook(add)
    with torch.no_grad():
        return network(TOKENS).logits.log_softmax(-1)


def vllm_lens(path, layers):
    """The fields of vllm-lens' SteeringVector, and its decoder of tensors, from its schema."""
    said = json.loads(path.read_text())
    assert set(said) == {"activations", "layer_indices", "scale", "norm_match", "position_indices"}
    assert said["norm_match"] is False and said["position_indices"] is None
    tensor = said["activations"]
    assert "compression" not in tensor and tensor["dtype"] == "float32"
    data, (n, width) = base64.b64decode(tensor["data"], validate=True), tensor["shape"]
    assert len(data) == 4 * n * width and n == len(said["layer_indices"])
    numbers = torch.tensor(struct.unpack(f"<{n * width}f", data)).view(n, width)
    return {f"{layers}.{i}": said["scale"] * row for i, row in zip(said["layer_indices"], numbers, strict=True)}


def easysteer(path, layers):
    """What EasySteer does with a SteeringSpec of "direct" vectors, whose GGUF file the gguf package reads."""
    gguf = pytest.importorskip("gguf")
    said = json.loads(path.read_text())
    (vector,) = said["vectors"]
    assert vector["algorithm"] == "direct" and vector["normalize"] is False and said["conflict"] == "priority"
    assert vector["apply"] == {"prompt": "all", "generation": "all"}
    reader = gguf.GGUFReader(vector["source"])
    assert bytes(reader.get_field("general.architecture").parts[-1]).decode() == "controlvector"
    found = {int(tensor.name.removeprefix("direction.")): tensor.data for tensor in reader.tensors}
    assert sorted(found) == vector["layers"]
    return {f"{layers}.{i}": vector["scale"] * torch.from_numpy(data.copy()) for i, data in found.items()}


def lm_eval(path, layers):
    (hookpoint, entry), *others = torch.load(path, weights_only=True).items()
    assert not others and entry["action"] == "add" and entry["bias"] is None
    base = layers.split(".")[0]  # the harness looks in the model without its head
    return {f"{base}.{hookpoint}": entry["steering_coefficient"] * entry["steering_vector"]}


def neuronpedia(path, layers):
    """Adding to the stream that enters a layer is adding to what the layer before gives."""
    said = json.loads(path.read_text())
    number, kind, strength = said["layerNumber"], said["hookType"], said["vectorDefaultSteerStrength"]
    assert isinstance(said["modelId"], str) and isinstance(said["vectorLabel"], str) and 0 < strength <= 300
    assert kind in ("hook_resid_pre", "hook_resid_post")
    vector = strength * torch.tensor(said["vector"])
    return {f"{layers}.{number - 1 if kind == 'hook_resid_pre' else number}": vector}


def hotwire(path, layers):
    tensor = torch.load(path, map_location="cpu", weights_only=True)
    if tensor.ndim == 1:
        return {f"{layers}.1": tensor}  # the layer is named by the request
    assert tensor.shape == (models.N_LAYERS, D_MODEL)
    return {f"{layers}.{i}": row for i, row in enumerate(tensor) if row.any()}


DECODERS = {
    "vllm-lens": (vllm_lens, "v.json"),
    "easysteer": (easysteer, "v.json"),
    "lm-eval": (lm_eval, "v.pt"),
    "neuronpedia": (neuronpedia, "v.json"),
    "hotwire": (hotwire, "v.pt"),
}
SEVERAL = ("vllm-lens", "easysteer", "hotwire")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an export sends nothing")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("format", DECODERS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_decoded_file_does_to_the_plain_model_what_steering_does(build, directories, tmp_path, recwarn, name, format):
    decode, file = DECODERS[format]
    model, vector = build(name, "bridge"), a_vector()
    path = ml.export(vector, format, tmp_path / file, model=model)
    assert not [one for one in recwarn if "not compared" in str(one.message)]  # it compared itself
    found = hooked(directories(name), decode(path, LAYERS[name]))
    torch.testing.assert_close(found, steered(model, vector), atol=1e-4, rtol=0)
    assert (found - hooked(directories(name), {})).abs().max() > 0.05


@pytest.mark.parametrize("format", SEVERAL)
def test_vectors_of_several_layers_act_together(build, directories, tmp_path, format):
    decode, file = DECODERS[format]
    model, several = build("llama", "bridge"), [a_vector(0, "resid_post"), a_vector(2, seed=1)]
    ml.export(several, format, tmp_path / file, model=model)
    found = hooked(directories("llama"), decode(tmp_path / file, LAYERS["llama"]))
    torch.testing.assert_close(found, steered(model, several), atol=1e-4, rtol=0)


def test_vectors_of_several_layers_come_back_from_hotwire_one_by_one(build, tmp_path):
    model, several = build("llama", "bridge"), [a_vector(0, "resid_post"), a_vector(2, seed=1)]
    ml.export(several, "hotwire", tmp_path / "v.pt", model=model)
    again = [ml.load(tmp_path / "v.pt", layer=layer) for layer in (0, 2)]
    assert [len(one) for one in again] == [1, 1]
    torch.testing.assert_close(steered(model, again), steered(model, several), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", [0, models.N_LAYERS - 1])
@pytest.mark.parametrize("format", DECODERS)
def test_the_first_and_the_last_layer_can_be_written(build, directories, tmp_path, format, layer):
    if format == "hotwire":
        return  # its file names no layer
    decode, file = DECODERS[format]
    model, vector = build("llama", "bridge"), a_vector(layer)
    ml.export(vector, format, tmp_path / file, model=model)
    found = hooked(directories("llama"), decode(tmp_path / file, LAYERS["llama"]))
    torch.testing.assert_close(found, steered(model, vector), atol=1e-4, rtol=0)


def test_a_strength_beyond_what_neuronpedia_takes_stays_in_the_vector(build, tmp_path):
    vector = a_vector().rescaled(900.0)
    ml.export(vector, "neuronpedia", tmp_path / "v.json", model=build("llama", "bridge"), model_id="x", label="y")
    said = json.loads((tmp_path / "v.json").read_text())
    assert said["vectorDefaultSteerStrength"] == 300 and said["modelId"] == "x" and said["vectorLabel"] == "y"
    torch.testing.assert_close(300 * torch.tensor(said["vector"]), vector.values[0])


def test_scales_are_written(build, directories, tmp_path):
    model, vector = build("llama", "bridge"), a_vector()
    ml.export(vector, "vllm-lens", tmp_path / "v.json", model=model, scale=-2.0)
    ml.export(vector, "easysteer", tmp_path / "e.json", model=model, scale=-2.0)
    ml.export(vector, "lm-eval", tmp_path / "v.pt", model=model, coefficient=-2.0)
    for decode, file in ((vllm_lens, "v.json"), (easysteer, "e.json"), (lm_eval, "v.pt")):
        found = hooked(directories("llama"), decode(tmp_path / file, "model.layers"))
        torch.testing.assert_close(found, steered(model, -2.0 * vector), atol=1e-4, rtol=0)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, True, torch.tensor(math.nan)], ids=str)
def test_a_scale_that_is_no_finite_number_is_refused_and_nothing_is_computed(build, tmp_path, monkeypatch, number):
    """JSON has no NaN, so a file would say null."""
    pytest.importorskip("gguf")
    model = build("llama", "bridge")
    monkeypatch.setattr(type(host_of(model)), "forward", None)
    for format, name in (("vllm-lens", "scale"), ("easysteer", "scale"), ("lm-eval", "coefficient")):
        with pytest.raises(ValueError, match=f"{name}=.* must be a finite number"):
            ml.export(a_vector(), format, tmp_path / DECODERS[format][1], model=model, **{name: number})
    assert not list(tmp_path.iterdir())


def test_easysteer_replaces_its_own_gguf_file_and_no_other(build, tmp_path):
    pytest.importorskip("gguf")
    model, path = build("llama", "bridge"), tmp_path / "v.json"
    for foreign in (b"a model", b"GGUF and so on"):
        (tmp_path / "v.gguf").write_bytes(foreign)
        for said in (None, "{}", "no JSON"):
            if said:
                path.write_text(said)
            with pytest.raises(ValueError, match=r"v\.gguf is there, and no earlier export to v\.json"):
                ml.export(a_vector(), "easysteer", path, model=model)
            assert (tmp_path / "v.gguf").read_bytes() == foreign
            path.unlink(missing_ok=True)
    ml.export(a_vector(), "gguf", tmp_path / "v.gguf", model=model)  # named by the user for something else
    with pytest.raises(ValueError, match="no earlier export"):
        ml.export(a_vector(), "easysteer", path, model=model)
    (tmp_path / "v.gguf").unlink()
    ml.export(a_vector(), "easysteer", path, model=model)
    ml.export(a_vector(2), "easysteer", path, model=model)
    assert list(easysteer(path, "model.layers")) == ["model.layers.2"]


def test_the_vectors_of_easysteer_are_those_of_llama_cpp(build, tmp_path):
    """Both count layers from 0; only llama.cpp has no place for the first."""
    pytest.importorskip("gguf")
    model, several = build("llama", "bridge"), [a_vector(1), a_vector(3, seed=1)]
    ml.export(several, "easysteer", tmp_path / "e.json", model=model)
    ml.export(several, "gguf", tmp_path / "v.gguf", model=model)
    assert (tmp_path / "e.gguf").read_bytes() == (tmp_path / "v.gguf").read_bytes()


TOGETHER = {  # format -> what it is written to, and the file that is put in place last
    "peft": ("out", "out/adapter_config.json"),
    "transformers": ("out", "out/steer.py"),
    "easysteer": ("v.json", "v.json"),
}


@pytest.mark.parametrize("format", TOGETHER)
@pytest.mark.parametrize("before", [False, True], ids=["into nothing", "over an old export"])
def test_a_second_file_that_fails_leaves_everything_as_it_was(build, tmp_path, monkeypatch, format, before):
    pytest.importorskip("gguf")
    model = build("llama", "bridge")
    first, second = a_vector(), a_vector(2)
    if format == "peft":
        first, second = (
            ml.SteeringAdapters.from_factors(scale * torch.ones(1, 2, 48), torch.ones(1, D_MODEL, 2), 1)
            for scale in (0.01, 0.02)
        )
    place, last = tmp_path / "new" / TOGETHER[format][0], tmp_path / "new" / TOGETHER[format][1]
    prompts = {"prompts": TOKENS}
    if format == "easysteer":
        place.parent.mkdir()
    if before:
        ml.export(first, format, place, model=model, **prompts)
    held = contents(tmp_path)
    replace, fsync, flushed = os.replace, os.fsync, []

    def replaced(source, target):
        if Path(target) == last:
            raise OSError("the disk is full")
        replace(source, target)

    def flushed_once(file):
        flushed.append(file)
        if len(flushed) > 1:
            raise OSError("the disk is full")
        fsync(file)

    for name, broken in (("replace", replaced), ("fsync", flushed_once)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, broken)
            with pytest.raises(OSError, match="the disk is full"):
                ml.export(second, format, place, model=model, **prompts)
        assert contents(tmp_path) == held
    last.unlink(missing_ok=True)
    if not before:
        last.mkdir(parents=True)
        held = contents(tmp_path)
        with pytest.raises(IsADirectoryError, match="is a folder: choose the path of a file"):
            ml.export(second, format, place, model=model, **prompts)
        assert contents(tmp_path) == held


def contents(folder):
    return {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")}


def fitted(model, **settings):
    prompts = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 4]])
    return ml.fit_vectors(model, prompts, 1, 3, n_vectors=2, radius=1.0, n_steps=1, progress=False, **settings)


@pytest.mark.parametrize("format", DECODERS)
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(build, tmp_path, format):
    model, other = build("llama", "bridge"), build("qwen2", "bridge")
    learned = fitted(model)
    path = tmp_path / DECODERS[format][1]
    adapter = ml.SteeringAdapters.from_factors(torch.ones(1, 2, 48), torch.ones(1, D_MODEL, 2), 1)
    for value, where, said in (
        (learned, model, "2 of layer 1 were given"),
        (adapter, model, "holds vectors, and SteeringAdapters were given"),
        (a_vector(site="attn_out"), model, "attn_out"),
        (a_vector(layer=9), model, "layer 9"),
        (ml.SteeringVectors.from_tensor(torch.ones(1, 16), 1), model, "d_model 16"),
        (learned[0], other, "with other weights"),
    ):
        with pytest.raises(ValueError, match=said):
            ml.export(value, format, path, model=where)
    assert not list(tmp_path.iterdir())


def test_a_model_that_writes_elsewhere_is_noticed(build, tmp_path, monkeypatch):
    """Here the hook at the source adds twice, as on an architecture that scales what its blocks write."""
    from melbo_lens.perturbations.vectors import SteeringVectors

    right = SteeringVectors.row_hooks
    monkeypatch.setattr(SteeringVectors, "row_hooks", lambda self, index, c: right(self, index, 2 * c))
    for format, (_, file) in DECODERS.items():
        with pytest.raises(ValueError, match="differ by"):
            ml.export(a_vector(), format, tmp_path / file, model=build("llama", "bridge"))
    assert not list(tmp_path.iterdir())


def test_a_processed_model_is_compared_with_its_files(build, directories, tmp_path, recwarn):
    """A bridge in compatibility mode has other weights; its directory is its name."""
    model = build("llama", "compatible")
    ml.export(a_vector(), "vllm-lens", tmp_path / "v.json", model=model)
    assert not [one for one in recwarn if "not compared" in str(one.message)]
    found = hooked(directories("llama"), vllm_lens(tmp_path / "v.json", "model.layers"))
    torch.testing.assert_close(found, steered(model, a_vector()), atol=1e-4, rtol=0)


def test_endings_and_missing_models_are_said_before_anything_is_written(build, tmp_path):
    model = build("llama", "bridge")
    for format, file, said in (
        ("lm-eval", "v.json", "must end in .pt"),
        ("hotwire", "v.json", "must end in .pt"),
        ("easysteer", "v.gguf", "end in .json"),
    ):
        with pytest.raises(ValueError, match=said):
            ml.export(a_vector(), format, tmp_path / file, model=model)
    with pytest.raises(ValueError, match="neuronpedia needs the model"):
        ml.export(a_vector(), "neuronpedia", tmp_path / "v.json")
    with pytest.warns(UserWarning, match="not compared"), pytest.raises(ValueError, match="hookpoint="):
        ml.export(a_vector(), "lm-eval", tmp_path / "v.pt")
    with (
        pytest.warns(UserWarning, match="not compared"),
        pytest.raises(ValueError, match="several layers need their model"),
    ):
        ml.export([a_vector(), a_vector(2)], "hotwire", tmp_path / "v.pt")
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match="not compared"):
        ml.export(a_vector(), "lm-eval", tmp_path / "v.pt", hookpoint="layers.1", dtype=torch.bfloat16)
    (entry,) = torch.load(tmp_path / "v.pt", weights_only=True).values()
    assert entry["steering_vector"].dtype == torch.bfloat16


def test_the_vector_of_lm_eval_has_the_dtype_of_the_model(directories, tmp_path):
    model = models.bridge(directories("llama"), dtype=torch.bfloat16)
    ml.export(a_vector(), "lm-eval", tmp_path / "v.pt", model=model)
    (entry,) = torch.load(tmp_path / "v.pt", weights_only=True).values()
    assert entry["steering_vector"].dtype == torch.bfloat16


def test_a_dtype_that_the_vector_overflows_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="not compared"), pytest.raises(ValueError, match=r"float16 can't hold"):
        ml.export(1e6 * a_vector(), "lm-eval", tmp_path / "v.pt", hookpoint="layers.1", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_plain_model_in_training_is_compared_without_dropout_and_goes_on_training(build, directories, tmp_path):
    network = AutoModelForCausalLM.from_pretrained(directories("gpt2"), dtype=torch.float32).train()
    network.transformer.drop.p = 0.5
    before = torch.get_rng_state()
    ml.export(a_vector(), "vllm-lens", tmp_path / "v.json", model=build("gpt2", "bridge"), hf_model=network)
    assert network.training and network.transformer.drop.training and torch.equal(torch.get_rng_state(), before)


def test_an_exporter_of_another_package_goes_before_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "EXPORTERS", {})
    monkeypatch.delitem(sys.modules, "melbo_lens.exports.vllm_lens", raising=False)
    exports.exporter("vllm-lens")(lambda vector, path, **settings: Path("theirs"))
    assert ml.export(a_vector(), "vllm-lens", tmp_path / "v.json") == Path("theirs")


def test_files_are_looked_for_on_this_machine_alone(build, monkeypatch):
    asked = {}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *names, **settings: asked.update(settings))
    with pytest.raises(AttributeError):  # nothing was loaded
        from_files(host_of(build("llama", "bridge")))
    assert asked["local_files_only"] and asked["adapter_kwargs"] == {"local_files_only": True}
