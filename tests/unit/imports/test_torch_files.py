"""Are `.pt` files of other tools read exactly, and is nothing that they say ever run?"""

import io
import pickle
import sys
import types
import zipfile
from dataclasses import dataclass, field

import pytest
import torch

import melbo_lens as ml
from melbo_lens.imports import torch_files

ROWS = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "v.pt"


def check(loaded, values, layer, site):
    assert isinstance(loaded, ml.SteeringVectors) and loaded.source_layer == layer and loaded.site == site
    torch.testing.assert_close(loaded.values, values.float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_stack_of_the_post_is_read_bit_by_bit(path, dtype):
    torch.save(ROWS.to(dtype), path)
    check(ml.load(path, layer=7), ROWS.to(dtype), 7, "mlp_out")
    torch.save(ROWS[1].to(dtype), path)
    check(ml.load(path, layer=0, site="resid_post"), ROWS[1:2].to(dtype), 0, "resid_post")
    torch.save([row.to(dtype) for row in ROWS], path)
    check(ml.load(path, layer=7), ROWS.to(dtype), 7, "mlp_out")
    torch.save(torch.nn.Parameter(ROWS.to(dtype)), path)
    check(ml.load(path, layer=7, model="some/model"), ROWS.to(dtype), 7, "mlp_out")
    assert ml.load(path, layer=7, model="some/model").provenance["model"] == "some/model"


def test_rows_of_zeros_are_layers_without_a_vector(path):
    """As hotwire-vllm keeps vectors of several layers: [n_layers d_model]."""
    held = torch.zeros(6, 5)
    held[2], held[4] = ROWS[0], ROWS[1]
    torch.save(held, path)
    check(ml.load(path, layer=2), ROWS[:1], 2, "resid_post")
    check(ml.load(path, layer=4, site="mlp_out"), ROWS[1:2], 4, "mlp_out")
    assert ml.load(path, layer=4).provenance["source"] == "hotwire-vllm"
    with pytest.raises(ValueError, match=r"has vectors of the layers \[2, 4\]: pass layer=, one of them"):
        ml.load(path)
    for layer in (1, 9):
        with pytest.raises(ValueError, match=rf"layer={layer} must be one of \[2, 4\], .* save them without the zeros"):
            ml.load(path, layer=layer)
    held[2] = 0
    torch.save(held, path)
    check(ml.load(path), ROWS[1:2], 4, "resid_post")


def test_a_view_of_a_larger_tensor_is_read(path):
    torch.save(ROWS.T[:4, 1:].T, path)
    check(ml.load(path, layer=1), ROWS.T[:4, 1:].T, 1, "mlp_out")


def test_what_is_read_does_not_change_with_the_file(path):
    torch.save(ROWS, path)
    loaded = ml.load(path, layer=1)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(loaded.values, ROWS)


def test_a_file_that_names_no_layer_asks_for_it(path):
    torch.save(ROWS, path)
    with pytest.raises(ValueError, match=r"doesn't say at which layer its vectors act: pass layer="):
        ml.load(path)
    for layer in (-1, True):
        with pytest.raises(ValueError, match=r"layer=.* must be an integer"):
            ml.load(path, layer=layer)
    with pytest.raises(ValueError, match="site='head' must be one of"):
        ml.load(path, layer=1, site="head")


def test_power_steerings_file_says_where_its_vectors_act(path):
    said = {"vectors": ROWS, "model": "Qwen/Qwen3-1.7B", "method": "pi", "source_layer": 6, "target_layer": 22}
    torch.save({**said, "capture_site": "down_proj", "sigmas": [3.0, 2.0, 1.0], "prompt": "hi", "seed": 0}, path)
    loaded = ml.load(path)
    check(loaded, ROWS, 6, "mlp_out")
    assert loaded.provenance["model"] == "Qwen/Qwen3-1.7B" and loaded.provenance["found_by"] == "pi"
    torch.save({**said, "capture_site": "layer_output", "source_layer": 9}, path)
    check(ml.load(path), ROWS, 9, "resid_post")
    with pytest.raises(ValueError, match=r"layer=3 was given, but .* says layer 9"):
        ml.load(path, layer=3)
    torch.save({"steering": ROWS}, path)
    check(ml.load(path, layer=4), ROWS, 4, "mlp_out")
    torch.save({**said, "capture_site": "q_proj"}, path)
    with pytest.raises(ValueError, match="acts at 'q_proj'"):
        ml.load(path)
    torch.save({**said, "source_layer": "six"}, path)
    with pytest.raises(ValueError, match="says layer 'six', which is no number of a block: pass layer="):
        ml.load(path)
    check(ml.load(path, layer=5), ROWS, 5, "mlp_out")


@pytest.fixture
def theirs(monkeypatch):
    """The class of steering-vectors, as its module defines it, without the package."""
    module = types.ModuleType("steering_vectors.steering_vector")

    @dataclass
    class SteeringVector:
        layer_activations: dict = field(default_factory=dict)
        layer_type: str = "decoder_block"

    SteeringVector.__module__, SteeringVector.__qualname__ = module.__name__, "SteeringVector"
    module.SteeringVector = SteeringVector
    monkeypatch.setitem(sys.modules, "steering_vectors", types.ModuleType("steering_vectors"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return SteeringVector


def test_a_steering_vector_of_steering_vectors_is_read_without_its_code(path, theirs, monkeypatch):
    torch.save(theirs({7: ROWS[0]}), path)
    monkeypatch.delitem(sys.modules, "steering_vectors.steering_vector")
    check(ml.load(path), ROWS[:1], 7, "resid_post")
    with pytest.raises(ValueError, match=r"layer=8 must be one of \[7\]"):
        ml.load(path, layer=8)


@pytest.mark.parametrize(("place", "site"), [("mlp", "mlp_out"), ("self_attn", "attn_out")])
def test_one_layer_of_several_is_chosen(path, theirs, place, site):
    torch.save(theirs({7: ROWS[0], 9: ROWS[1]}, place), path)
    check(ml.load(path, layer=9), ROWS[1:2], 9, site)
    with pytest.raises(ValueError, match=r"has vectors of the layers \[7, 9\]: pass layer="):
        ml.load(path)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (({}, "mlp"), "without layer_activations"),
        (({7: ROWS[0]}, "input_layernorm"), "acts at 'input_layernorm'"),
        (({7: "text"}, "mlp"), "holds str where a tensor"),
    ],
)
def test_what_steering_vectors_says_beyond_that_is_refused(path, theirs, value, said):
    torch.save(theirs(*value), path)
    with pytest.raises(ValueError, match=said):
        ml.load(path)


def test_a_file_of_lm_eval_is_read_back(path):
    entry = {"action": "add", "steering_vector": ROWS[0], "steering_coefficient": -2.0, "bias": None}
    torch.save({"layers.7": entry}, path)
    check(ml.load(path), -2.0 * ROWS[:1], 7, "resid_post")
    with pytest.raises(ValueError, match=r"layer=3 was given, but .* says layer 7"):
        ml.load(path, layer=3)
    for changed, said in (({"action": "clamp"}, "clamp"), ({"steering_coefficient": "2"}, "decoder layer")):
        torch.save({"layers.7": {**entry, **changed}}, path)
        with pytest.raises(ValueError, match=said):
            ml.load(path)
    torch.save({"layers.7.mlp": entry}, path)
    with pytest.raises(ValueError, match=r"layers\.7\.mlp"):
        ml.load(path)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(3, 5, dtype=torch.long), "must be floating-point"),
        (torch.ones(3, 5, dtype=torch.bool), "must be floating-point"),
        (torch.ones(3, 5, dtype=torch.complex64), "must be floating-point"),
        (torch.ones(2, 3, 5), "must be floating-point numbers"),
        (torch.ones(()), "must be floating-point numbers"),
        (torch.ones(0, 5), "must be floating-point numbers"),
        (torch.tensor([1.0, float("nan")]), "NaN or infinity"),
        (torch.tensor([1.0, float("inf")]), "NaN or infinity"),
        (torch.ones(1).expand(100_000, 100_000), "own bytes in the file"),
        ([ROWS[0]] * 10_000, "same vectors many times"),
        ([ROWS[0], ROWS[1, :3]], "different lengths"),
        ([], "where a tensor"),
        ("text", "where a tensor"),
        ({"vectors": {"a": ROWS}}, "where a tensor"),
        ({"other": ROWS, 3: 4}, "holds a dict with 3, other"),
    ],
)
def test_what_is_no_vector_is_refused_in_a_sentence(path, value, said):
    torch.save(value, path)
    with pytest.raises(ValueError, match=said):
        ml.load(path, layer=1)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("place", ["alone", "beside a tensor", "as a key"])
def test_a_pickle_that_runs_something_is_refused_and_runs_nothing(path, tmp_path, protocol, place):
    bomb = Bomb(tmp_path / "ran")
    value = {"alone": bomb, "beside a tensor": {"vectors": ROWS, "x": [bomb]}, "as a key": {(bomb,): 1}}[place]
    torch.save(value, path, pickle_protocol=protocol)
    with pytest.raises(ValueError, match="Nothing was run"):
        ml.load(path, layer=1)
    path.write_bytes(pickle.dumps(value, protocol))
    with pytest.raises(ValueError, match="is a pickle"):
        ml.load(path, layer=1)
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="is a pickle"):
        ml.load(path, layer=1)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(bomb, protocol))
    assert (tmp_path / "ran").exists()  # it would have


def archive(path, pickled, data=b"", compression=zipfile.ZIP_STORED, names=("data.pkl",)):
    """An archive as torch writes it, with any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name in names:
            file.writestr(f"archive/{name}", pickled)
        file.writestr("archive/data/0", data)
        file.writestr("archive/version", "3\n")


def call(module, name, number):
    """A pickle that calls a function with a number."""
    return f"\x80\x02c{module}\n{name}\nq\0".encode() + b"\x8a\x08" + number.to_bytes(8, "little") + b"\x85R."


@pytest.mark.parametrize("name", ["builtins bytearray", "torch Tensor", "torch.storage UntypedStorage", "os system"])
def test_a_call_that_would_take_memory_is_refused(path, name):
    archive(path, call(*name.split(), 10**12))
    with pytest.raises(ValueError, match=r"Nothing was run|damaged"):
        ml.load(path, layer=1)


def tensor_pickle(stored, shape):
    """The pickle of a tensor of float32, whose storage claims `stored` numbers."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(251, 1), buffer)
    with zipfile.ZipFile(buffer) as file:
        (name,) = [name for name in file.namelist() if name.endswith("data.pkl")]
        data = file.read(name)
    # 251 is BININT1 "K\xfb", both in the storage and in the shape
    first, rest = data.split(b"K\xfb", 1)
    before, after = rest.split(b"K\xfb", 1)
    number = [b"J" + n.to_bytes(4, "little") for n in (stored, shape)]
    return first + number[0] + before + number[1] + after


def test_a_tensor_that_claims_more_than_the_file_has_is_refused(path):
    for stored in (251, 2**30):  # no byte outside the file is read, whatever is claimed
        archive(path, tensor_pickle(stored, 251), bytes(4 * 251))
        check(ml.load(path, layer=1), torch.zeros(251, 1), 1, "mlp_out")
    for stored, shape in ((2**30, 2**30), (251, 252), (251, 2**30), (10_000, 10_000)):
        archive(path, tensor_pickle(stored, shape), bytes(4 * 251))
        with pytest.raises(ValueError, match=r"damaged|own bytes in the file"):
            ml.load(path, layer=1)


def test_archives_that_are_not_torchs_are_refused(path):
    buffer = io.BytesIO()
    torch.save(ROWS, buffer)
    with zipfile.ZipFile(buffer) as file:
        (name,) = [name for name in file.namelist() if name.endswith("data.pkl")]
        whole = file.read(name)
    archive(path, whole, bytes(60), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="it is compressed"):
        ml.load(path, layer=1)
    archive(path, whole, bytes(60), names=("one/data.pkl", "two/data.pkl"))
    with pytest.raises(ValueError, match=r"no data\.pkl"):
        ml.load(path, layer=1)
    archive(path, b"nothing", bytes(60))
    with pytest.raises(ValueError, match="damaged"):
        ml.load(path, layer=1)


def test_every_truncation_is_refused(path):
    torch.save(ROWS, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"damaged|truncated"):
            ml.load(path, layer=1) if length > 4 else ml.load(path)


def test_changed_bytes_are_refused_or_harmless(path):
    torch.save(ROWS, path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 29):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            loaded = ml.load(path, layer=1)
        except ValueError:
            continue
        assert loaded.values.numel() <= len(whole)


def test_a_large_file_is_refused_before_it_is_read(path, monkeypatch):
    torch.save(ROWS, path)
    monkeypatch.setattr(torch_files, "MAX_BYTES", 100)
    monkeypatch.setattr(torch_files, "_names", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="may have at most 100"):
        ml.load(path, layer=1)


def test_our_own_files_say_themselves_where_they_act(tmp_path):
    ml.SteeringVectors.from_tensor(ROWS, 3).save(tmp_path / "own.pt")  # the ending says nothing
    check(ml.load(tmp_path / "own.pt"), ROWS, 3, "mlp_out")
    with pytest.raises(ValueError, match="layer can't be chosen"):
        ml.load(tmp_path / "own.pt", layer=3)
    with pytest.raises(ValueError, match="model can't be chosen"):
        ml.load(tmp_path / "own.pt", model="x")
    with pytest.raises(FileNotFoundError, match="check the path"):
        ml.load(tmp_path / "missing.pt", layer=3)


def test_a_file_that_says_it_is_one_of_several_volumes_is_refused(path, monkeypatch):
    def several(_):
        raise zipfile.BadZipFile("zipfiles that span multiple disks are not supported")

    torch.save(ROWS, path)
    monkeypatch.setattr(zipfile, "is_zipfile", several)
    with pytest.raises(ValueError, match="or damaged"):
        ml.load(path, layer=1)
