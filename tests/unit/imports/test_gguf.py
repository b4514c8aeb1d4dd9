"""Are control vectors of other tools read as they were meant, and damaged files refused before memory is taken?

The files are made by the `gguf` package, which shares no code with the reader; hostile ones are made byte by byte.
"""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch

import melbo_lens as ml
from melbo_lens.imports import gguf as reader

WIDTH = 6


def direction(layer, width=WIDTH):
    return np.random.default_rng(layer).standard_normal(width).astype(np.float32)


def written(path, tensors, architecture="controlvector", **metadata):
    """A file as repeng's `export_gguf` and llama.cpp's `cvector-generator` write it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for key, value in metadata.items():
        writer.add_array(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path):
    return written(tmp_path / "honest.gguf", {f"direction.{layer}": direction(layer) for layer in (3, 1, 2)})


def test_a_layer_of_repengs_file_is_a_vector_of_the_stream_that_leaves_it(path):
    vectors = reader.read(path, layer=2)
    assert isinstance(vectors, ml.SteeringVectors) and vectors.values.shape == (1, WIDTH)
    assert vectors.values[0].tolist() == direction(2).tolist()
    assert vectors.source_layer == 2 and vectors.site == "resid_post"
    assert vectors.hook_name == "blocks.2.hook_resid_post"
    assert vectors.provenance == {"method": "control vector", "model_hint": "mistral", "file": "honest.gguf"}


def test_all_layers_are_read_in_order(path):
    found = reader.read_all(path)
    assert [one.source_layer for one in found] == [1, 2, 3]
    assert all(one.values[0].tolist() == direction(one.source_layer).tolist() for one in found)


def test_a_file_of_123_tensors_is_no_safetensors_file(tmp_path):
    """Their number is the ninth byte, and 123 is that of the brace with which a JSON header begins."""
    file = written(tmp_path / "deep.gguf", {f"direction.{layer}": direction(layer) for layer in range(1, 124)})
    assert file.read_bytes()[8:9] == b"{"
    assert ml.load(file, layer=99).values[0].tolist() == direction(99).tolist()


def test_one_value_holds_one_layer_so_several_must_be_chosen_from(path, tmp_path):
    with pytest.raises(
        ValueError, match=r"has control vectors of layers 1 to 3, .* name it, as ml.load\(path, layer=2\)"
    ):
        reader.read(path)
    with pytest.raises(ValueError, match="no control vector of layer 7: it has those of layers 1 to 3"):
        reader.read(path, layer=7)
    with pytest.raises(ValueError, match="layer=-1 must be an integer of at least 0"):
        reader.read(path, layer=-1)
    gaps = written(tmp_path / "gaps", {f"direction.{layer}": direction(layer) for layer in (0, 4, 9)})
    with pytest.raises(ValueError, match="of layers 0, 4, 9, "):
        reader.read(gaps)
    assert reader.read(gaps, layer=0).source_layer == 0
    only = written(tmp_path / "only", {"direction.5": direction(5)})
    assert reader.read(only).source_layer == 5 and torch.equal(reader.read(only).values, reader.read(only, 5).values)


def test_other_metadata_and_alignments_are_passed_over(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x", "controlvector")
    writer.add_custom_alignment(256)
    writer.add_array("some.words", ["a", "", "été"])
    writer.add_array("some.numbers", [1.5, 2.5])
    writer.add_bool("a.flag", True)
    writer.add_float64("a.double", 0.1)
    writer.add_string("controlvector.method", "pca")
    writer.add_tensor("direction.1", direction(1))
    writer.add_tensor("direction.2", direction(2))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    vectors = reader.read(tmp_path / "x", layer=2)
    assert vectors.values[0].tolist() == direction(2).tolist()
    assert vectors.provenance["method"] == "pca" and vectors.provenance["model_hint"] == "unknown"
    header = reader.read_header(tmp_path / "x").metadata
    assert header["a.flag"] is True and header["a.double"] == 0.1 and header["some.words"] is None


def test_every_truncation_is_refused(path):
    whole = path.read_bytes()
    # padding after the last vector may be missing
    for length in range(0, len(whole) - 8, 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"truncated|damaged|no GGUF"):
            reader.read_all(path)


def test_every_flipped_byte_is_read_or_refused_in_a_sentence(path):
    whole = path.read_bytes()
    for place in range(len(whole)):
        for value in (0x00, 0x7F, 0xFF):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            found, said = [], f"{path} is read."
            try:
                found = reader.read_all(path)
            except ValueError as error:
                said = str(error)
            assert said.startswith(f"{path} ") and said.endswith("."), said
            assert all(torch.isfinite(one.values).all() and one.d_model <= len(whole) for one in found)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"direction.1": direction(1), "direction.2": direction(2, WIDTH + 1)}, r"several widths, \[6, 7\]"),
        ({"direction.1": direction(1).astype(np.float16)}, "of type 1 with axes"),
        ({"direction.1": np.ones((2, 3), np.float32)}, r"with axes \[3, 2\]"),
        ({"direction.one": direction(1)}, "has 'direction.one' of type 0"),
        ({"direction.1": direction(1), "bias": direction(2)}, "has 'bias' of type 0"),
        ({"direction.-1": direction(1)}, "has 'direction.-1'"),
        ({"direction.1": direction(1), "direction.01": direction(1)}, "two tensors of layer 1"),
        ({"direction.1": np.full(WIDTH, np.nan, np.float32)}, "hold NaN or infinity"),
        ({}, "its vectors are missing"),
    ],
)
def test_what_is_no_control_vector_is_refused(tmp_path, tensors, said):
    with pytest.raises(ValueError, match=said):
        reader.read(written(tmp_path / "x", tensors))


def test_a_model_and_an_adapter_are_named(tmp_path):
    model = written(tmp_path / "m", {"blk.0.ffn_down.weight": np.ones((2, 3), np.float32)}, "llama")
    with pytest.raises(ValueError, match=r"holds a model or an adapter \('llama'\), no control vectors"):
        reader.read(model)


def test_files_that_are_none_of_these_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        reader.read(tmp_path / "missing")
    (tmp_path / "zip").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="no GGUF file"):
        reader.read(tmp_path / "zip")
    (tmp_path / "old").write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ValueError, match="has GGUF version 1: versions 2 and 3, little-endian, are read"):
        reader.read(tmp_path / "old")
    writer = gguf.GGUFWriter(tmp_path / "big", "controlvector", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("direction.1", direction(1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="little-endian"):
        reader.read(tmp_path / "big")


def text(value):
    return struct.pack("<Q", len(value)) + value


def header(n_tensors=1, n_keys=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


def tensor(name=b"direction.1", shape=(WIDTH,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 2**62
HOSTILE = {
    "tensors": header(n_tensors=HUGE) + bytes(64),
    "keys": header(n_keys=HUGE) + bytes(64),
    "a key's length": header(n_keys=1) + struct.pack("<Q", HUGE) + bytes(64),
    "a text's length": header(n_keys=1) + text(b"k") + struct.pack("<IQ", 8, HUGE) + bytes(64),
    "an array's length": header(n_keys=1) + text(b"k") + struct.pack("<IIQ", 9, 0, HUGE) + bytes(64),
    "an array of texts": header(n_keys=1) + text(b"k") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(64),
    "arrays in arrays": header(n_keys=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64),
    "a type": header(n_keys=1) + text(b"k") + struct.pack("<I", 77) + bytes(64),
    "axes": header() + text(b"direction.1") + struct.pack("<I", 2**31) + bytes(64),
    "a width": header() + tensor(shape=(HUGE,)) + bytes(64),
    "an empty vector": header() + tensor(shape=(0,)) + bytes(64),
    "an offset": header() + tensor(offset=HUGE) + bytes(64),
    "a layer": header() + tensor(name=b"direction.99999999") + bytes(64),
    "an alignment": header(n_keys=1) + text(b"general.alignment") + struct.pack("<II", 4, 0) + tensor() + bytes(99),
    "a vast alignment": header(n_keys=1)
    + text(b"general.alignment")
    + struct.pack("<II", 4, 2**31)
    + tensor()
    + bytes(99),
    "vectors in one place": header(n_tensors=9)
    + b"".join(tensor(f"direction.{layer}".encode()) for layer in range(1, 10))
    + bytes(64),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_before_memory_is_taken(tmp_path, name):
    (tmp_path / "x").write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"truncated|damaged|no file of control vectors"):
            reader.read_all(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_hollow_file_takes_no_memory(tmp_path):
    """A sparse file claims any size and holds nothing."""
    with (tmp_path / "x").open("wb") as file:
        file.write(header() + tensor(shape=(2**33,)))
        file.truncate(2**36)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="no file of control vectors"):
            reader.read(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] < 3 * reader.MOST_HEADER
    finally:
        tracemalloc.stop()
