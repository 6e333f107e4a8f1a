"""Safetensors files and Hugging Face folders: read as the safetensors library reads them, and refused where they lie."""
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hawk_jax.convert.folder import open_folder
from hawk_jax.convert.lazy import DTYPES, LazyError, open_safetensors


def write(file: Path, header, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def test_reads_what_the_library_writes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"{name}.{n}": np.asarray(rng.normal(size=shape) * 50).astype(dtype) for name, dtype in DTYPES.items()
               for n, shape in enumerate([(3, 4), (), (0, 2), (5,)])}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    ours, theirs = open_safetensors(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert ours.keys() == theirs.keys()
    for name, lazy in ours.items():
        value = lazy.read()
        assert value.dtype == lazy.dtype == theirs[name].dtype and value.shape == lazy.shape == theirs[name].shape
        assert value.tobytes() == theirs[name].tobytes() and value.flags.writeable
    assert ours["BF16.0"].dtype == ml_dtypes.bfloat16


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}


@pytest.mark.parametrize("header, data, words", [
    (GOOD, 11, "was cut off or damaged"),
    (GOOD, 13, "holds 13 bytes of data"),
    (GOOD | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8, "b overlaps a"),
    (GOOD | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}, 16, "b leaves a hole after a"),
    (GOOD | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 12]}}, 12, "b has 4 bytes for F32[2]"),
    (GOOD | {"b": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [8, 12]}}, 12, "b has dtype F8_E4M3"),
    (GOOD | {"b": {"dtype": "F32", "shape": [-1], "data_offsets": [8, 4]}}, 12, "the entry of b is damaged"),
    (GOOD | {"b": {"dtype": "F32", "shape": [1]}}, 12, "the entry of b is damaged"),
    (GOOD | {"b": [1, 2]}, 12, "the entry of b is damaged"),
    (GOOD | {"b": {"dtype": "F32", "shape": [True], "data_offsets": [8, 12]}}, 12, "the entry of b is damaged"),
    ([1], 0, "its header is not an object"),
    (b"{", 0, "header is damaged"),
    (b"[" * 100_000, 0, "header is damaged"),
])
def test_headers_are_checked(tmp_path, header, data, words):
    file = write(tmp_path / "x.safetensors", header, b"\0" * data)
    with pytest.raises(LazyError) as error:
        open_safetensors(file)
    assert words in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_lengths_are_checked(tmp_path):
    for length in (10**6, 2**63):
        with pytest.raises(LazyError, match="its header would have"):
            open_safetensors(write(tmp_path / "x.safetensors", GOOD, b"\0" * 12, length))
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    with pytest.raises(LazyError, match="was cut off"):
        open_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(LazyError, match="no such file"):
        open_safetensors(tmp_path / "y.safetensors")


def test_a_file_that_shrinks_meanwhile_is_noticed(tmp_path):
    file = write(tmp_path / "x.safetensors", GOOD, b"\0" * 12)
    tensors = open_safetensors(file)
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(LazyError, match="was cut off while it was read"):
        tensors["b"].read()


# ------------------------------------------------------------------------------------------------ folders
def shards(folder: Path) -> dict:
    """Two shards and their index, as a dict that a test may spoil."""
    for number, name in enumerate(("a", "b")):
        save_file({name: np.full(3, number, np.float32)}, folder / f"{name}.safetensors")
    return {"a": "a.safetensors", "b": "b.safetensors"}


def index(folder: Path, places) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards_and_single_files(tmp_path):
    index(tmp_path, shards(tmp_path))
    assert {k: v.read()[0] for k, v in open_folder(tmp_path).items()} == {"a": 0, "b": 1}
    save_file({"c": np.ones(1, np.float32)}, tmp_path / "model.safetensors")       # comes first, as in transformers
    assert set(open_folder(tmp_path)) == {"c"}


def test_folders_that_do_not_hold_together(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    places = shards(folder)
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "secret.safetensors")

    def fails(words: str, places) -> None:
        index(folder, places)
        with pytest.raises(LazyError) as error:
            open_folder(folder)
        assert words in str(error.value) and "\n" not in str(error.value), str(error.value)
    for outside in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "", 3, ["a"], None):
        fails("no plain file name in its folder", places | {"a": outside})
    fails("names c.safetensors, which is missing", places | {"c": "c.safetensors"})
    fails("says that c is in b.safetensors, but it is not", places | {"c": "b.safetensors"})
    save_file({"b": np.ones(3, np.float32), "d": np.ones(3, np.float32)}, folder / "b.safetensors")
    fails("holds d, which model.safetensors.index.json lacks", places)
    fails("is damaged", ["a"])
    fails("is damaged", {})
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(LazyError, match="holds none of model.safetensors"):
        open_folder(folder)


def test_a_download_caches_links_are_followed(tmp_path):
    """snapshots/REVISION/model.safetensors -> ../../blobs/HASH"""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    save_file({"a": np.ones(3, np.float32)}, blobs / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert set(open_folder(snapshot)) == {"a"}
