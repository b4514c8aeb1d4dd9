"""Is a saved file exact, whole at every instant, and read with suspicion?"""

import json
import os
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

import melbo_lens as ml
from melbo_lens import files


@pytest.fixture
def vectors():
    return ml.SteeringVectors(
        torch.randn(3, 5), 1, torch.rand(4, 3), {"method": "test", "prompts": ["é </script>"], "radius": 0.1}
    )


def test_a_round_trip_is_bit_exact(vectors, tmp_path):
    vectors.save(tmp_path / "x.safetensors")
    loaded = ml.load(tmp_path / "x.safetensors")
    assert torch.equal(loaded.values, vectors.values) and torch.equal(loaded.history, vectors.history)
    assert loaded.provenance == vectors.provenance and loaded.source_layer == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_every_truncation_is_refused(vectors, tmp_path):
    path = tmp_path / "x.safetensors"
    vectors.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            ml.load(path)


def rewrite(path, **changes):
    """Changes the metadata of a file that is otherwise whole."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "not written by melbo_lens"),
        ({"schema": "99"}, "newer melbo_lens"),
        ({"schema": "one"}, "schema"),
        ({"kind": "SteeringStones"}, "SteeringStones"),
        ({"header": "{"}, "no JSON"),
        ({"header": "[]"}, "JSON object"),
        ({"header": "[" * 100_000}, "no JSON"),
        ({"header": "{}"}, "damaged"),
    ],
)
def test_foreign_newer_and_damaged_files_are_refused(vectors, tmp_path, changes, said):
    path = tmp_path / "x.safetensors"
    vectors.save(path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=said):
        ml.load(path)


def test_other_safetensors_pickles_and_missing_files_are_refused(vectors, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="not written by melbo_lens"):
        ml.load(tmp_path / "foreign.safetensors")
    torch.save({"values": torch.ones(2)}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="holds a dict with values"):
        ml.load(tmp_path / "pickle.pt")
    with pytest.raises(FileNotFoundError, match="no file"):
        ml.load(tmp_path / "missing")


def counting(monkeypatch):
    """Counts the tensors that are read."""
    opened, read = files.safe_open, []

    class Counting:
        def __init__(self, *arguments, **settings):
            self.file = opened(*arguments, **settings)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(files, "safe_open", Counting)
    return read


def test_nothing_of_a_file_that_is_refused_is_read(vectors, tmp_path, monkeypatch):
    """A shard of a model may have forty gigabytes."""
    read = counting(monkeypatch)
    save_file({"a": torch.ones(2)}, tmp_path / "shard.safetensors")
    vectors.save(tmp_path / "v.safetensors")
    for path, kinds in (("shard.safetensors", ["SteeringVectors"]), ("v.safetensors", ["SteeringAdapters"])):
        with pytest.raises(ValueError, match=r"not written by melbo_lens|holds 'SteeringVectors', not"):
            files.read_any(tmp_path / path, kinds)
    rewrite(tmp_path / "v.safetensors", schema="99")
    with pytest.raises(ValueError, match="newer melbo_lens"):
        ml.load(tmp_path / "v.safetensors")
    assert not read


def test_a_hollow_file_larger_than_the_memory_is_refused_before_it_is_read(vectors, tmp_path, monkeypatch):
    path, size = tmp_path / "v.safetensors", 1 << 41
    vectors.save(path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = {"__metadata__": json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]}
    header["values"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)
    read = counting(monkeypatch)
    with pytest.raises(ValueError, match="more than the memory of this machine"):
        ml.load(path)
    assert not read
    vectors.save(path)
    ml.load(path)
    assert sorted(read) == ["history", "values"]


def test_shapes_that_do_not_fit_each_other_are_refused(tmp_path):
    files.write(
        tmp_path / "x",
        "SteeringVectors",
        {"values": torch.ones(2, 3), "history": torch.ones(4, 5)},
        {"source_layer": 0},
    )
    with pytest.raises(ValueError, match="damaged"):
        ml.load(tmp_path / "x")


def test_an_unwritable_place_is_named(vectors, tmp_path):
    with pytest.raises(OSError, match="can't be written"):
        vectors.save(tmp_path / "no such folder" / "x")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(vectors, tmp_path, monkeypatch):
    path = tmp_path / "x"
    vectors.save(path)
    old = path.read_bytes()

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        (2 * vectors).save(path)
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_through_a_link_the_file_that_it_names_is_written(vectors, tmp_path):
    vectors[0].save(tmp_path / "there")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    vectors.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and len(ml.load(tmp_path / "there")) == len(vectors)


def test_files_that_belong_together_are_written_as_one(tmp_path, monkeypatch):
    """Where the file system knows links, and where it knows none."""
    for linked in (True, False):
        folder = tmp_path / str(linked)
        files.write_folder(folder / "deep", {"a": b"1", "b": b"2", "c": b"3"})
        replace = os.replace

        def replaced(source, target, replace=replace):
            if target.name == "c":
                raise KeyboardInterrupt
            replace(source, target)

        def unlinked(*_):
            raise OSError("no links here")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replaced)
            if not linked:
                patch.setattr(os, "link", unlinked)
            with pytest.raises(KeyboardInterrupt):
                files.write_folder(folder / "deep", {"a": b"4", "new": b"5", "c": b"6"})
            with pytest.raises(KeyboardInterrupt):
                files.write_folder(folder / "other" / "deep", {"a": b"4", "c": b"6"})
        assert {path.name: path.read_bytes() for path in (folder / "deep").iterdir()} == {
            "a": b"1",
            "b": b"2",
            "c": b"3",
        }
        assert not (folder / "other").exists()


KILLED = """
import os, sys, torch, melbo_lens as ml
vectors = [ml.SteeringVectors(torch.full((200, 500), float(k)), k) for k in range(2)]
for _ in sys.stdin:  # a child of its own for each kill: importing takes seconds
    child = os.fork()
    if child:
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)
    while not child:
        for v in vectors:
            v.save(sys.argv[1])
"""


def test_a_kill_at_any_instant_leaves_a_whole_file(tmp_path):
    path = tmp_path / "x"
    ml.SteeringVectors(torch.zeros(200, 500), 0).save(path)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        for delay in (0.0, 0.004, 0.011, 0.023):
            process.stdin.write("save\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "dead\n"
            loaded = ml.load(path)
            assert (loaded.values == loaded.source_layer).all()


def test_a_fresh_process_loads_a_file_and_no_model_library(tmp_path):
    """What a server does: it has the file, and neither TransformerLens nor a plot."""
    ml.SteeringVectors(torch.ones(2, 4), 1).save(tmp_path / "v.safetensors")
    code = (
        "import sys, melbo_lens as ml\n"
        f"print(len(ml.load({str(tmp_path / 'v.safetensors')!r})))\n"
        "print([name for name in ('transformer_lens', 'transformers', 'plotly', 'sklearn') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["2", "[]"]
