"""Weights files that lie, are cut off or were tampered with, beyond test_lazy.py; folders of torch's shards; what opening costs."""
import json
import random
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hawk_jax.config import HawkError
from hawk_jax.convert.folder import files_of, open_folder, open_weights
from hawk_jax.convert.lazy import DTYPES, Lazy, LazyError, open_safetensors, shown


def tensors() -> dict[str, np.ndarray]:
    """One of each dtype, and shapes that are easily got wrong."""
    draw = np.random.default_rng(1)
    found = {name: (50 * draw.normal(size=(2, 3))).astype(dtype) for name, dtype in DTYPES.items()}
    return found | {"scalar": np.array(draw.normal(), np.float32), "empty": np.zeros((0, 3), np.float32), "block.0.weight": draw.normal(
        size=(5, 1, 2)).astype(np.float32), "später": np.arange(4, dtype=np.int16)}


def assert_same(found: dict[str, Lazy], expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        read = found[name].read()
        assert (found[name].dtype, found[name].shape) == (read.dtype, read.shape) == (value.dtype, value.shape), name
        assert read.tobytes() == np.ascontiguousarray(value).tobytes(), name


def raw(header, data: bytes = b"") -> bytes:
    """A file of that header, text or object."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


# ------------------------------------------------------------------------------------------------ whole files
def test_reads_what_torch_wrote(file):
    """bfloat16 through torch, whose bits are compared as integers."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save
    value = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    save({"a": value.bfloat16(), "b": value.T.contiguous(), "c": value.half()}, file)
    found = open_safetensors(file)
    assert found["a"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(found["a"].read().view(np.int16), value.bfloat16().view(torch.int16).numpy())
    assert np.array_equal(found["b"].read(), value.T.numpy()) and np.array_equal(found["c"].read(), value.half().numpy())


def test_a_file_that_was_taken_away_says_so(file):
    save_file({"a": np.ones(3, np.float32)}, file)
    lazy = open_safetensors(file)["a"]
    file.unlink()
    with pytest.raises(LazyError, match="model.safetensors cannot be read: No such file"):
        lazy.read()


def test_opening_reads_headers_only(file):
    """64 MB of values: opening takes the memory of a header, reading one tensor that of one tensor."""
    save_file({f"t{i}": np.zeros(1 << 22, np.float32) for i in range(4)}, file)
    tracemalloc.start()
    found = open_safetensors(file)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    found["t3"].read()
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


# ------------------------------------------------------------------------------------------------ faults
FAULTS = {
    "not JSON": (raw(b"{'a': 1}"), "header is damaged: Expecting property name"),
    "not UTF-8": (raw(b'{"\xff\xfe": 1}'), "header is damaged"),
    "a number without end": (raw(b'{"a":' + b"9" * 10_000 + b"}"), "header is damaged"),
    "dtype is a list": (raw({"a": entry(["F32"])}, b"8" * 8), "the entry of a is damaged"),
    "shape is a text": (raw({"a": entry(shape="", offsets=(0, 4))}, b"4" * 4), "the entry of a is damaged"),
    "shape of halves": (raw({"a": entry(shape=[2.0])}, b"8" * 8), "the entry of a is damaged"),
    "too many axes": (raw({"a": entry(shape=[1] * 65, offsets=[0, 4])}, b"4" * 4), "the entry of a is damaged"),
    "empty, yet no array": (raw({"a": entry(shape=[0, 1 << 62, 1 << 62], offsets=[0, 0])}), "the entry of a is damaged"),
    "three offsets": (raw({"a": entry(offsets=[0, 8, 8])}, b"8" * 8), "the entry of a is damaged"),
    "ends before it begins": (raw({"a": entry(offsets=[8, 0])}, b"8" * 8), r"a has -8 bytes for F32\[2\]"),
    "the same bytes twice": (raw({"a": entry(), "b": entry()}, b"8" * 8), "b overlaps a"),
    "hole in front": (raw({"a": entry(offsets=[4, 12])}, b"h" * 12), "a leaves a hole after the header"),
    "far beyond the end": (raw({"a": entry(shape=[1 << 60], offsets=[0, 1 << 62])}), "its header speaks of 4611686018427387904"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(file, fault):
    content, message = FAULTS[fault]
    file.write_bytes(content)
    with pytest.raises(LazyError, match=message) as caught:
        open_safetensors(file)
    assert str(file) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_names_from_files_cannot_act_on_a_terminal(file):
    file.write_bytes(raw({"a\n\x1b[2J\ud800": entry(shape=[3])}, b"8" * 8))
    with pytest.raises(LazyError) as caught:
        open_safetensors(file)
    assert str(caught.value).isprintable() and r"\n\x1b[2J\ud800" in str(caught.value)
    assert len(shown("x" * 10_000)) < 150 and shown("llama.später") == "llama.später"
    with pytest.raises(LazyError, match="cannot be read: Is a directory"):
        open_safetensors(file.parent)


def test_cut_off_anywhere(file):
    save_file(tensors(), file)
    content = file.read_bytes()
    for length in {*range(0, 40), *range(40, len(content), 17), len(content) - 1}:
        file.write_bytes(content[:length])
        with pytest.raises(LazyError):
            open_safetensors(file)


def mutated(content: bytes, end: int, draw: random.Random) -> bytes:
    """content with a flipped bit (two cases in three) or up to three changes of any kind in its first `end` bytes."""
    changed, flip = bytearray(content), draw.random() < 2 / 3
    for _ in range(1 if flip else draw.randint(1, 3)):
        at, kind = draw.randrange(min(end, len(changed))), 0 if flip else draw.randrange(4)
        if kind == 0:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[at] = draw.randrange(256)
        elif kind == 2:
            del changed[at:at + draw.randint(1, 8)]
        else:
            changed[at:at] = changed[at:at + draw.randint(1, 8)]
    return bytes(changed)


def test_mutated_headers_end_in_one_line_or_in_values(file):
    """400 seeded mutations of the header and its length.  Whatever opens can be read."""
    save_file(tensors(), file)
    content, outcomes = file.read_bytes(), {True: 0, False: 0}
    end = 8 + struct.unpack("<Q", content[:8])[0]
    tracemalloc.start()
    for case in range(400):
        file.write_bytes(mutated(content, end, random.Random(case)))
        try:
            for lazy in open_safetensors(file).values():
                assert lazy.read().shape == lazy.shape
            outcomes[True] += 1
        except HawkError as error:
            assert len(str(error).splitlines()) == 1
            outcomes[False] += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert min(outcomes.values()) >= 5 and peak < 10 << 20, (outcomes, peak)


# ------------------------------------------------------------------------------------------------ folders
def shards(folder, kind: str) -> dict[str, np.ndarray]:
    """Two shards and their index, safetensors or torch's, and what they hold."""
    parts = {"a": np.ones(3, np.float32), "b": np.arange(4, dtype=np.int64)}, {"c": np.eye(2, dtype=np.float32)}
    stem, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    places = {}
    for number, part in enumerate(parts, 1):
        name = f"{stem}-{number:05d}-of-00002.{end}"
        places |= dict.fromkeys(part, name)
        if kind == "safetensors":
            save_file(part, folder / name)
        else:
            torch = pytest.importorskip("torch")
            torch.save({k: torch.from_numpy(v) for k, v in part.items()}, folder / name)
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {"total_size": 60}, "weight_map": places}))
    return parts[0] | parts[1]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_of_both_kinds(tmp_path, kind):
    expected = shards(tmp_path, kind)
    assert_same(open_weights(tmp_path), expected)
    assert len(files_of(tmp_path)) == 3 and all(f.is_file() for f in files_of(tmp_path))
    assert_same(open_weights(files_of(tmp_path)[2]), {"c": expected["c"]})


def test_safetensors_come_before_torchs_files(tmp_path):
    torch = pytest.importorskip("torch")
    assert files_of(tmp_path) == []
    shards(tmp_path, "bin")
    torch.save({"model": {"other": torch.zeros(2)}}, tmp_path / "pytorch_model.bin")
    assert_same(open_folder(tmp_path), {"other": np.zeros(2, np.float32)})
    expected = shards(tmp_path, "safetensors")
    assert_same(open_folder(tmp_path), expected)


def test_shards_that_transformers_saved(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(files_of(tmp_path)) > 2
    assert_same(open_folder(tmp_path), {k: v.numpy() for k, v in model.state_dict().items()})


@pytest.mark.parametrize("name", ["sub/x.safetensors", "./x.safetensors", "..", ".", "a\\b", "a\0b", "x" * 300, {"a": 1}])
def test_an_index_names_plain_files_only(tmp_path, name):
    """Even files that are there, below the folder."""
    shards(tmp_path, "safetensors")
    (tmp_path / "sub").mkdir()
    for place in (tmp_path, tmp_path / "sub"):
        save_file({"c": np.zeros(1, np.float32)}, place / "x.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["c"] = name
    index.write_text(json.dumps(content))
    for work in (open_folder, files_of):
        with pytest.raises(LazyError, match="as a shard, which is no plain file name in its folder; refused") as caught:
            work(tmp_path)
        assert len(str(caught.value).splitlines()) == 1


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    shards(tmp_path, "safetensors")
    save_file({"b": np.zeros(1, np.float32), "c": np.zeros(1, np.float32)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(LazyError, match="model-00002-of-00002.safetensors holds b, which model.safetensors.index.json places elsewhere"):
        open_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"weight_map": []}', b"\xff\xfe\0", b'{"weight_map":' + b"[" * 100_000])
def test_a_damaged_index_is_named(tmp_path, content):
    shards(tmp_path, "safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    for work in (open_folder, files_of):
        with pytest.raises(LazyError, match="model.safetensors.index.json is damaged.*copy it again") as caught:
            work(tmp_path)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind, message", [("safetensors", "holds 15 bytes of data, its header speaks of 16"), ("bin", "was cut off")])
def test_a_damaged_shard_is_named(tmp_path, kind, message):
    shards(tmp_path, kind)
    shard = files_of(tmp_path)[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(LazyError, match=message) as caught:
        open_folder(tmp_path)
    assert str(shard) in str(caught.value)
