"""torch's checkpoint files without torch: read as torch.load reads them, refused where a pickle would run anything, written for torch."""
import collections
import io
import os
import pickletools
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_lazy_faults import mutated

from hawk_jax.config import HawkError
from hawk_jax.convert.folder import open_torch
from hawk_jax.convert.lazy import Lazy, open_safetensors
from hawk_jax.convert.opcodes import STORAGES
from hawk_jax.convert.pth import ALIGNMENT, PthError, open_pth, write_pth

torch = pytest.importorskip("torch")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
          torch.bool]


def as_numpy(tensor) -> np.ndarray:
    tensor = tensor.detach()
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def assert_same(found, expected) -> None:
    """A tree of open_pth against one of torch."""
    if isinstance(expected, torch.Tensor):
        value, wanted = found.read(), as_numpy(expected)
        assert (found.dtype, found.shape) == (value.dtype, value.shape) == (wanted.dtype, wanted.shape)
        assert value.tobytes() == np.ascontiguousarray(wanted).tobytes() and value.flags.c_contiguous and value.flags.writeable
    elif isinstance(expected, dict):
        assert type(found) is dict and list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert isinstance(found, list) == isinstance(expected, list) and len(found) == len(expected)
        for a, b in zip(found, expected):
            assert_same(a, b)
    else:
        assert type(found) is type(expected) and found == expected


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def checkpoint() -> dict:
    """What training codes save: the trained module's state dict, an optimizer's, and plain values."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    module(normal(2, 3)).square().sum().backward()
    optimizer.step()
    return {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "scaler": {}, "loss": -0.5, "done": True,
            "seed": 2**40, "negative": -7, "large": -2**70, "none": None, "name": "später\n", "size": torch.Size([2, 3]), 7: "number",
            "lists": [1, [2.5, None], (), (1,), (1, 2), (1, 2, 3, 4)], "big": list(range(2000)), "device": torch.device("cpu")}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "some.pth"


# ------------------------------------------------------------------------------------------------ reading
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_training_checkpoints_of_every_protocol(file, protocol):
    tree = checkpoint() | ({"bytes": b"ab"} if protocol > 2 else {})        # protocol 2 has no opcode for them
    assert tree["model"]._metadata      # an OrderedDict with attributes
    torch.save(tree, file, pickle_protocol=protocol)
    loaded = torch.load(file, weights_only=False)       # which reads protocol 2 only if True
    assert_same(open_pth(file), loaded | {"device": "cpu"})
    assert_same(open_torch(file), loaded["model"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_every_dtype(file, dtype):
    values = (50 * normal(3, 5)).to(dtype)
    torch.save({"w": values, "tail": values[1:], "scalar": values[1, 2].clone(), "empty": values[:0].clone()}, file)
    assert_same(open_pth(file), torch.load(file, weights_only=True))
    assert len(DTYPES) == len(STORAGES)


def test_reads_views_as_they_are_seen(file):
    """Storages that several tensors share, transposed, cut out, with steps, expanded; parameters; a tensor named twice."""
    base = normal(6, 8)
    tree = {"base": base, "transposed": base.T, "row": base[3], "column": base[:, 2], "cut": base[1:5, 2:7], "steps": base[::2, 1::3],
            "permuted": base.view(2, 3, 8).permute(2, 0, 1), "expanded": base[:1].expand(5, 8), "unsqueezed": base[:, None].transpose(0, 2),
            "one": base[2:3, 4:5], "none": base[2:2], "windows": base.flatten().unfold(0, 5, 2), "parameter": torch.nn.Parameter(base[0]),
            "buffer": torch.arange(512).expand((1, -1)), "twice": [base, base]}
    torch.save(tree, file)
    assert len(zipfile.ZipFile(file).namelist()) < 10
    assert_same(open_pth(file), tree)
    found = open_pth(file)
    found["row"].read()[:] = 0
    assert_same(found["base"], base)        # what is read belongs to who reads


def test_opening_reads_no_storage(file):
    torch.save({f"t{i}": torch.zeros(1 << 22) for i in range(4)}, file)     # 64 MB
    tracemalloc.start()
    found = open_pth(file)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    found["t1"].read()
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_no_torch_and_no_pickle_are_needed(file):
    """In a fresh process with both hidden."""
    torch.save({"w": normal(2)}, file)
    code = f"""if True:
        import sys
        sys.modules["torch"] = None
        from hawk_jax.convert.pth import open_pth
        import pickle
        def fail(*_): raise SystemExit("pickle was used")
        pickle.load = pickle.loads = pickle.Unpickler = pickle._Unpickler = fail
        print(open_pth({str(file)!r})["w"].read().tolist())"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert said.stdout.strip() == str(normal(2).tolist()), said.stderr


def test_only_dicts_of_tensors_are_weights(file):
    for tree, message in (([normal(2)], "holds a list, not a dict of tensors"), ({"a": normal(2), "b": 3}, "b is a int, not a tensor"),
                          ({"model": {"x": {"w": normal(2)}}}, "x is a dict, not a tensor")):
        torch.save(tree, file)
        with pytest.raises(PthError, match=message):
            open_torch(file)


# ------------------------------------------------------------------------------------------------ damaged files
def members(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(file: Path, content: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def changed(file: Path, **changes) -> None:
    """Members of a small checkpoint, some replaced (None: left out); names without the folder, _ for a slash."""
    torch.save({"w": normal(4, 3), "v": normal(5, seed=1).bfloat16()}, file)
    content = members(file)
    for name, data in changes.items():
        name = f"{file.stem}/{name.replace('_', '/')}"
        content = {k: v for k, v in content.items() if k != name} | ({} if data is None else {name: data})
    rewrite(file, content)


def refused(file: Path, message: str | None = None) -> str:
    with pytest.raises(PthError, match=message) as caught:
        for lazy in open_pth(file).values():
            lazy.read()
    said = str(caught.value)
    assert str(file) in said and len(said.splitlines()) == 1 and said.isprintable() and len(said) < 600
    return said


def test_missing_empty_and_foreign_files(file, tmp_path):
    refused(file, "no such file")
    file.write_bytes(b"")
    refused(file, "no checkpoint in torch's zip format, or was cut off")
    save_file({"a": np.zeros(2, np.float32)}, file)
    refused(file, "no checkpoint in torch's zip format")
    rewrite(file, {"a.txt": b"hello"})
    refused(file, "is a zip archive, but no checkpoint: it holds 0 data.pkl")
    rewrite(file, {"a/data.pkl": b"N.", "b/data.pkl": b"N."})
    refused(file, "it holds 2 data.pkl")
    with pytest.raises(PthError, match="cannot be read: Is a directory"):
        open_pth(tmp_path)


def test_a_legacy_file_says_how_it_is_converted(file, tmp_path):
    """The line that is given is run as it stands, and its result read."""
    tree = {"w": normal(3, 2)}
    torch.save(tree, file, _use_new_zipfile_serialization=False)
    said = refused(file, "a file of torch before 1.6 is converted by: python -c")
    code = said.split('python -c "')[1].split('"')[0].replace("OLD", str(file)).replace("NEW", str(tmp_path / "new.pth"))
    subprocess.run([sys.executable, "-c", code], check=True)
    assert_same(open_pth(tmp_path / "new.pth"), tree)


def test_cut_off_anywhere(file):
    torch.save({"w": normal(4, 3), "v": normal(5)}, file)
    content = file.read_bytes()
    for length in {*range(0, len(content), 37), *range(len(content) - 30, len(content))}:
        file.write_bytes(content[:length])
        refused(file)


def test_members_that_do_not_fit(file):
    changed(file, data_1=None)
    refused(file, "some/data/1 is missing")
    changed(file, data_0=b"x" * 47)
    refused(file, "some/data/0 has 47 bytes, 12 float32 were claimed")
    changed(file, byteorder=b"big")
    refused(file, "was written on a big-endian machine")
    changed(file, byteorder=b"little" * 100)
    refused(file, "its byteorder is larger than 100 bytes")
    changed(file)
    rewrite(file, members(file), zipfile.ZIP_DEFLATED)
    refused(file, "some/data/0 is compressed or encrypted; save the checkpoint with torch again")


def test_a_zip_bomb_is_not_unpacked(file):
    rewrite(file, {"a/data.pkl": b"\x80\x02" + b"N" * (40 << 20) + b"."}, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 1 << 17
    refused(file, "its data.pkl is larger than 33554432 bytes")


def test_a_directory_that_lies(file):
    """Sizes and places of the zip's own directory, which is at its end."""
    changed(file)
    content = bytearray(file.read_bytes())
    at = content.rindex(b"some/data/1") - 46        # the directory's entry; its header is 46 bytes long
    assert content[at:at + 4] == b"PK\1\2"

    def with_fields(**fields) -> None:
        lying = bytearray(content)
        for place, value in fields.items():
            lying[at + int(place[1:]):at + int(place[1:]) + len(value)] = value
        file.write_bytes(lying)
    with_fields(_20=struct.pack("<II", 1 << 30, 1 << 30))
    refused(file, "some/data/1 reaches beyond the end of the file")
    with_fields(_20=struct.pack("<II", 1 << 30, 10))
    refused(file, "is compressed or encrypted")
    with_fields(_42=struct.pack("<I", 7))
    refused(file, "some/data/1 is not where the directory says")
    with_fields(_42=struct.pack("<I", 1 << 30))
    refused(file, "some/data/1 reaches beyond the end of the file")
    with_fields(_8=b"\1")
    refused(file, "is compressed or encrypted")


# ------------------------------------------------------------------------------------------------ pickles, written by hand
def pushed(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def storage(key: str = "0", count: int = 12, kind: str = "FloatStorage") -> bytes:
    return pushed(text("storage"), f"ctorch\n{kind}\n".encode(), text(key), text("cpu"), number(count)) + b"Q"


def tensor(place: bytes, offset: int, shape, strides, *rest: bytes) -> bytes:
    numbers = [pushed(*map(number, x)) for x in (shape, strides)]
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + pushed(place, number(offset), *numbers, *rest) + b"R"


def holding(file: Path, opcodes: bytes) -> Path:
    """A checkpoint whose pickle is these opcodes, with one storage of 12 float32."""
    rewrite(file, {"some/data.pkl": opcodes, "some/data/0": np.arange(12, dtype=np.float32).tobytes()})
    return file


def test_tensors_written_by_hand(file):
    """The helpers below make what torch takes, so that what is refused is refused for its fault."""
    holding(file, b"\x80\x02}" + text("w") + tensor(storage(), 2, (2, 3), (1, 2), b"\x89", b"}") + b"s.")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("some/version", b"3\n")
    assert_same(open_pth(file), torch.load(file, weights_only=True))
    assert open_pth(file)["w"].read().tolist() == [[2, 4, 6], [3, 5, 7]]


CANNOT_BE = "describes a tensor that cannot be"
TENSORS = {
    "beyond its storage": (tensor(storage(), 0, (13,), (1,)), r"tensor of \[13\] that reaches beyond its storage of 12 values"),
    "offset beyond its storage": (tensor(storage(), 10, (3,), (1,)), "reaches beyond its storage"),
    "strides beyond its storage": (tensor(storage(), 0, (2, 2), (11, 1)), "reaches beyond its storage"),
    "storage shorter than claimed": (tensor(storage(count=13), 0, (13,), (1,)), "some/data/0 has 48 bytes, 13 float32 were claimed"),
    "storage of another dtype": (tensor(storage(kind="DoubleStorage"), 0, (12,), (1,)), "48 bytes, 12 float64 were claimed"),
    "no such storage": (tensor(storage("9"), 0, (2,), (1,)), "some/data/9 is missing"),
    "a key with a path": (tensor(storage("../data.pkl"), 0, (2,), (1,)), r"some/data/../data.pkl is missing"),
    "negative offset": (tensor(storage(), -1, (2,), (1,)), CANNOT_BE),
    "negative size": (tensor(storage(), 0, (-2,), (1,)), CANNOT_BE),
    "negative strides": (tensor(storage(), 5, (2,), (-1,)), CANNOT_BE),
    "shape and strides differ": (tensor(storage(), 0, (2, 2), (1,)), CANNOT_BE),
    "65 axes": (tensor(storage(), 0, [1] * 65, [1] * 65), CANNOT_BE),
    "a gigantic size": (tensor(storage(), 0, (2**62,), (0,)), CANNOT_BE),
    "gigantic, of no stride": (tensor(storage(), 0, (1 << 13, 1 << 13), (0, 0)), CANNOT_BE),
    "gigantic, of small strides": (tensor(storage(count=12), 0, (1 << 40, 1), (0, 1)), CANNOT_BE),
    "a gigantic stride": (tensor(storage(), 0, (1,), (2**62,)), CANNOT_BE),
    "a size of 1900 bits": (tensor(storage(), 0, (1 << 1900,), (1,)), CANNOT_BE),
    "empty, yet no array": (tensor(storage(), 0, (0, 2**62, 2**62), (1, 1, 1)), CANNOT_BE),
    "gigantic storage": (tensor(storage(count=2**61), 0, (2**61,), (1,)), "refers to something that is no storage"),
    "negative storage": (tensor(storage(count=-1), 0, (1,), (1,)), "refers to something that is no storage"),
    "size is a text": (b"ctorch._utils\n_rebuild_tensor_v2\n" + pushed(storage(), number(0), text("ab"), text("ab")) + b"R", CANNOT_BE),
    "no storage": (tensor(text("s"), 0, (2,), (1,)), CANNOT_BE),
    "too few arguments": (b"ctorch._utils\n_rebuild_tensor_v2\n(tR", "its data.pkl is damaged"),
    "conjugated": (tensor(storage(), 0, (2,), (1,), b"\x89", b"}", b"}" + text("conj") + b"\x88s"), "is to be changed when it is loaded"),
    "a bare storage": (storage(), "holds a bare storage where a value should be"),
    "a bare name": (b"ctorch\nFloatStorage\n", "holds a bare global where a value should be"),
    "a mark": (b"(", "holds a bare object where a value should be"),
    "an impossible torch.Size": (b"ctorch\nSize\n" + pushed(text("abc")) + b"R", "describes a torch.Size that cannot be"),
    "an impossible device": (b"ctorch\ndevice\n" + pushed(b"]") + b"R", "describes a torch.device that cannot be"),
    "no storage's kind": (pushed(text("storage"), b"ctorch\nSize\n", text("0"), text("cpu"), number(2)) + b"Q", "its data.pkl is damaged"),
    "a storage of no kind": (pushed(text("storage"), text("x"), text("0"), text("cpu"), number(2)) + b"Q", "something that is no storage"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_tensors_that_cannot_be(file, fault):
    opcodes, message = TENSORS[fault]
    refused(holding(file, b"\x80\x02}" + text("w") + opcodes + b"s."), message)


# ------------------------------------------------------------------------------------------------ malicious pickles
class Call:
    """Pickles as a call of `function`."""
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Attributes:
    pass


class Hooked(collections.OrderedDict):
    pass


def torch_saved(file: Path, value, protocol: int) -> None:
    """torch.save of something with a call in it, at a depth."""
    torch.save({"model": {"w": normal(2)}, "extra": [{"x": value}]}, file, pickle_protocol=protocol)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name, value", [
    ("os.system|posix.system", lambda mark: Call(os.system, f"touch {mark}")),
    ("builtins.eval|__builtin__.eval", lambda mark: Call(eval, f"open({str(mark)!r}, 'w')")),
    ("builtins.exec|__builtin__.exec", lambda mark: Call(exec, f"open({str(mark)!r}, 'w')")),
    ("builtins.getattr|__builtin__.getattr", lambda mark: Call(getattr, Call(__import__, "os"), "system")),
    ("builtins.open|io.open", lambda mark: Call(open, str(mark), "w")),
    ("subprocess.Popen|commands.Popen", lambda mark: Call(subprocess.Popen, ["touch", str(mark)])),
    ("torch.hub|torch.hub.load", lambda mark: Call(torch.hub.load, "x", "y")),
    ("pathlib.*|os.*", lambda mark: Call(os.makedirs, str(mark))),
    ("builtins.set|__builtin__.set", lambda mark: {1, 2}),
    ("test_pth.Attributes", lambda mark: Attributes()),
    ("test_pth.Hooked", lambda mark: Hooked(a=1)),
    ("collections.defaultdict", lambda mark: collections.defaultdict(list)),
    ("numpy.*", lambda mark: np.float64(1)),
], ids=lambda value: value.split("|")[0] if isinstance(value, str) else "")
def test_no_callable_is_called(file, tmp_path, protocol, name, value):
    """Whatever an object is rebuilt by is named, and was not run: it would have left a file."""
    mark = tmp_path / "ran"
    torch_saved(file, value(mark), protocol)
    names = "|".join(n.replace(".", r"\.").replace("*", ".*") for n in name.split("|"))
    refused(file, f"holds a pickle that would call ({names}|_codecs.encode)|with the operation EMPTY_SET")
    assert not mark.exists()


EXPONENT = 60       # a tree of 2^60 leaves, made by references to what is above


def doubled(first: bytes) -> bytes:
    """A tuple of two of what was made last, and so on: x = (x, x)."""
    return first + b"".join(b"q%ch%c\x86" % (i, i) for i in range(EXPONENT))


MALICIOUS = {
    "a chain by STACK_GLOBAL": (b"\x8c\x08builtins\x8c\x07getattr\x93\x8c\x02os\x8c\x06system\x86R.", "would call builtins.getattr"),
    "a name with a dot": (b"\x8c\x0ctorch._utils\x8c\x22_rebuild_tensor_v2.__globals__.get\x93.", "would call torch._utils._rebuild_ten"),
    "a name with line ends": (b"\x8c\x02os\x8c\x09sys\n\x1b[2Jm\x93.", r"would call 'os.sys\\n\\x1b\[2Jm'"),
    "a long name": (b"\x8c\x02osX" + struct.pack("<I", 100_000) + b"x" * 100_000 + b"\x93.", "would call 'os.xxx"),
    "a name that is none": (b"]]\x93.", "calls what has no name"),
    "names without end": (doubled(text("a")) + b"h\0\x93.", "calls what has no name"),
    "INST": (b"(S'true'\nios\nsystem\n.", "operation STRING|would call os.system|operation INST"),
    "OBJ": (b"(ctorch\nSize\no.", "with the operation OBJ, which no checkpoint of tensors needs"),
    "NEWOBJ": (b"ctorch\nSize\n)\x81.", "with the operation NEWOBJ"),
    "NEWOBJ_EX": (b"ctorch\nSize\n)}\x92.", "with the operation NEWOBJ_EX"),
    "EXT": (b"\x82\x01.", "with the operation EXT1"),
    "PERSID": (b"Psomething\n.", "with the operation PERSID"),
    "a longer number": (b"\x8b" + struct.pack("<i", 1000) + b"\x7f" * 1000 + b".", "with the operation LONG4"),
    "a call of a text": (text("os.system") + text("true") + b"\x85R.", "calls what is no function"),
    "a call of a storage": (b"ctorch\nFloatStorage\n)R.", "calls what is no function"),
    "a call of what a call gave": (b"ccollections\nOrderedDict\n)R)R.", "calls what is no function"),
    "nested calls": (b"ccollections\nOrderedDict\ncos\nsystem\n" + text("true") + b"\x85R\x85R.", "would call os.system"),
    "arguments that are a list": (b"ctorch\nSize\n]R.", "calls what is no function"),
    "attributes of a list": (b"]}b.", "sets attributes of what is no dict"),
    "attributes of a tensor": (tensor(storage(), 0, (2,), (1,)) + b"}b.", "sets attributes of what is no dict"),
    "attributes of a name": (b"ctorch\nSize\n}b.", "sets attributes of what is no dict"),
    "a list in itself": (b"]q\0h\0a.", "nested too deeply or refers to itself"),
    "a dict in itself": (b"}q\0" + text("a") + b"h\0s.", "nested too deeply or refers to itself"),
    "very deep": (b"]" * 100_000 + b"a" * 99_999 + b".", "nested too deeply or refers to itself"),
    "a list as a key": (b"}]Ns.", "has a list as a key of a dict"),
    "a key without end": (b"}" + doubled(text("a")) + b"Ns.", "has a tuple as a key of a dict"),
    "a device without end": (b"ctorch\ndevice\n" + doubled(text("a")) + b"\x85R.", "torch.device that cannot be"),
    "a size without end": (b"ctorch\nSize\n" + doubled(number(1)) + b"\x85R.", "torch.Size that cannot be"),
    "a storage's key without end": (pushed(text("storage"), b"ctorch\nFloatStorage\n", doubled(text("a")), text("cpu"), number(2)) + b"Q.",
                                    "refers to something that is no storage"),
    "metadata without end": (tensor(storage(), 0, (2,), (1,), b"\x89", b"}", doubled(text("a"))) + b".", "is to be changed when it is loa"),
    "arguments a hundredfold": (b"ctorch._utils\n_rebuild_parameter\n" + pushed(*[b"N"] * 100) + b"R.", "calls what is no function"),
    "half a pair": (b"}(" + text("a") + b"u.", "its data.pkl is damaged"),
    "nothing on the stack": (b"a.", "its data.pkl is damaged"),
    "no end": (b"N", "its data.pkl is damaged .*pickle exhausted"),
    "nothing": (b"", "its data.pkl is damaged"),
    "no opcode": (b"\xff.", "its data.pkl is damaged"),
    "a reference to nothing": (b"h\7.", "its data.pkl is damaged"),
    "a text of 2^40 bytes": (b"\x8d" + struct.pack("<Q", 1 << 40) + b"abc.", "its data.pkl is damaged"),
    "bytes of 4 GB": (b"B" + struct.pack("<I", 0xFFFFFFFF) + b"abc.", "its data.pkl is damaged"),
    "a decimal number without end": (b"I" + b"9" * 100_000 + b"\n.", "its data.pkl is damaged"),
    "half a text": (b"X\x02\0\0\0\xff\xff.", "its data.pkl is damaged"),
}


@pytest.mark.parametrize("kind", MALICIOUS)
def test_pickles_that_are_not_what_they_seem(file, kind):
    """One line each, at once, without the memory that they ask for."""
    opcodes, message = MALICIOUS[kind]
    tracemalloc.start()
    start = time.monotonic()
    refused(holding(file, b"\x80\x04" + opcodes), message)
    assert time.monotonic() - start < 20 and tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_references_without_end_are_read_once(file):
    """x = (x, x), sixty times: torch gives sixty tuples; so does this, in no time."""
    tree = open_pth(holding(file, b"\x80\x02}" + text("x") + doubled(tensor(storage(), 0, (2,), (1,))) + b"s."))["x"]
    for _ in range(EXPONENT):
        assert tree[0] is tree[1]
        tree = tree[0]
    assert tree.read().tolist() == [0, 1]


def test_mutated_pickles_end_in_one_line_or_in_values(file):
    """500 seeded mutations of torch's own pickles, protocols 2 and 4."""
    base, outcomes = normal(4, 3), {True: 0, False: 0}
    tree = {"model": collections.OrderedDict(w=base, t=base.T, p=torch.nn.Parameter(base[0].clone())), "n": [1, 2.5, None, "text"]}
    contents = []
    for protocol in (2, 4):
        torch.save(tree, file, pickle_protocol=protocol)
        contents.append(members(file))

    def read(value) -> None:
        if isinstance(value, Lazy):
            assert value.read().shape == value.shape
        elif isinstance(value, (dict, list, tuple)):
            for inner in value.values() if isinstance(value, dict) else value:
                read(inner)
    tracemalloc.start()
    for case in range(500):
        content = contents[case % 2]
        pickled = content["some/data.pkl"]
        rewrite(file, content | {"some/data.pkl": mutated(pickled, len(pickled), random.Random(case))})
        try:
            read(open_pth(file))
            outcomes[True] += 1
        except HawkError as error:
            assert len(str(error).splitlines()) == 1
            outcomes[False] += 1
    assert min(outcomes.values()) >= 20 and tracemalloc.get_traced_memory()[1] < 300 << 20, outcomes
    tracemalloc.stop()


def test_mutated_archives_end_in_one_line_or_in_values(file):
    """300 seeded mutations of the whole file; its directory is at the end, so half of them are there."""
    torch.save({"w": normal(4, 3), "v": normal(5)}, file)
    content, outcomes = file.read_bytes(), {True: 0, False: 0}
    directory = content.index(b"PK\1\2")
    for case in range(300):
        draw = random.Random(case)
        head = content[:directory]
        file.write_bytes(mutated(content, len(content), draw) if case % 2 else head + mutated(content[directory:], 1 << 30, draw))
        try:
            for lazy in open_pth(file).values():
                lazy.read()
            outcomes[True] += 1
        except HawkError as error:
            assert len(str(error).splitlines()) == 1
            outcomes[False] += 1
    assert min(outcomes.values()) >= 20, outcomes


# ------------------------------------------------------------------------------------------------ writing
def written() -> dict:
    draw = np.random.default_rng(0)
    arrays = {name: (50 * draw.normal(size=(3, 5))).astype(dtype) for name, dtype in STORAGES.items()}
    return {"model": arrays | {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float16), "transposed":
                               np.arange(12, dtype=np.int32).reshape(3, 4).T, "steps": np.arange(20, dtype=np.float32)[::3]},
            "n": 3, "large": [2**31, -2**31 - 1, 2**31 - 1, -2**31, 2**63, -2**100, 0], "x": -1e-300, "truths": [True, False, None],
            "text": "später", "nested": {"list": [[], {}, (), (1, "a")], 7: 0}}


@pytest.mark.parametrize("name", ["hawk.pth", "a.b.bin", "größer.pth"])
def test_torch_loads_what_was_written(tmp_path, name):
    """weights_only and mapped into memory alike; storages lie on 64-byte boundaries, as torch's own do."""
    file, tree = tmp_path / name, written()
    write_pth(file, tree)
    loaded, mapped = torch.load(file, weights_only=True), torch.load(file, weights_only=True, mmap=True)
    for found in (loaded, mapped):
        assert {k: v for k, v in found.items() if k != "model"} == {k: v for k, v in tree.items() if k != "model"}
        assert list(found["model"]) == list(tree["model"])
        for key, value in tree["model"].items():
            theirs = as_numpy(found["model"][key])
            assert theirs.dtype == value.dtype and theirs.shape == value.shape and found["model"][key].is_contiguous()
            assert theirs.tobytes() == np.ascontiguousarray(value).tobytes(), key
    assert_same(open_pth(file), loaded)
    aligned(file, len(tree["model"]))
    assert zipfile.ZipFile(file).testzip() is None
    assert mapped["model"]["FloatStorage"].data_ptr() % ALIGNMENT == 0


def aligned(file: Path, count: int) -> None:
    with open(file, "rb") as stream, zipfile.ZipFile(stream) as archive:
        storages = [info for info in archive.infolist() if "/data/" in info.filename]
        assert len(storages) == count
        for info in storages:
            stream.seek(info.header_offset + 26)
            assert (info.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4)))) % ALIGNMENT == 0 == info.compress_type


def test_lazy_sources_are_read_one_at_a_time(tmp_path):
    save_file({f"t{i}": np.full(1 << 20, i, np.float32) for i in range(6)}, tmp_path / "in.safetensors")
    tree, reads = open_safetensors(tmp_path / "in.safetensors"), []

    def watched(lazy: Lazy) -> Lazy:
        return lazy._replace(read=lambda: reads.append(tracemalloc.get_traced_memory()[0]) or lazy.read())
    tracemalloc.start()
    write_pth(tmp_path / "out.pth", {name: watched(lazy) for name, lazy in tree.items()})
    assert tracemalloc.get_traced_memory()[1] < 13 << 20      # two of 4 MB (the next is read before the last is let go), not six
    tracemalloc.stop()
    assert len(reads) == 6
    assert {k: v[7].item() for k, v in torch.load(tmp_path / "out.pth", weights_only=True).items()} == {f"t{i}": i for i in range(6)}
    write_pth(tmp_path / "again.pth", open_pth(tmp_path / "out.pth"))
    assert members(tmp_path / "again.pth")["again/data/3"] == members(tmp_path / "out.pth")["out/data/3"]


def test_writing_is_reproducible(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_pth(tmp_path / folder / "x.pth", written())
    assert (tmp_path / "a" / "x.pth").read_bytes() == (tmp_path / "b" / "x.pth").read_bytes()


def test_what_a_checkpoint_cannot_hold(file):
    for value, message in ((np.zeros(2, np.complex64), "a tensor of complex64; known: float32"), (np.zeros(2, np.uint32), "uint32"),
                           (np.zeros(2, ">f4"), "a tensor of >f4"), ({1, 2}, "cannot hold a set"), (np.int64(3), "cannot hold a int64")):
        with pytest.raises(TypeError, match=message):
            write_pth(file, {"a": value})


def test_the_pickle_is_of_protocol_two(file):
    """What torch.load of every version since 1.6 takes, by the library's own check of stack and memo."""
    write_pth(file, written())
    said = io.StringIO()
    pickletools.dis(members(file)["some/data.pkl"], said)
    assert "highest protocol among opcodes = 2" in said.getvalue()


class Hollow(io.FileIO):
    """A file of which large writes leave only the hole: gigabytes in no space."""

    def write(self, data):
        data = memoryview(data).cast("B")
        if len(data) < 1 << 20:
            return super().write(data)
        self.seek(len(data), os.SEEK_CUR)
        return len(data)


@pytest.mark.parametrize("count", [3 << 29, 9 << 29])
def test_storages_of_gigabytes(file, monkeypatch, count):
    """The first of three has 4.5 GiB: 64-bit sizes in its own header, and 64-bit places of the others in the directory; or 1.5 GiB, where
    zipfile would do without and the header's length must be known all the same."""
    crc32 = zlib.crc32
    monkeypatch.setattr("hawk_jax.convert.pth.open", Hollow, raising=False)
    monkeypatch.setattr("zipfile.crc32", lambda data, before=0: crc32(data, before) if memoryview(data).nbytes < 1 << 20 else 0)
    tail = np.arange(1000, dtype=np.float32)
    write_pth(file, {"huge": Lazy(np.dtype(np.uint8), (count,), lambda: np.zeros(count, np.uint8)), "tail": tail, "end": tail[::-1]})
    monkeypatch.undo()
    assert file.stat().st_size > count and file.stat().st_blocks * 512 < 1 << 20, "this file system knows no holes"
    aligned(file, 3)
    for found in (torch.load(file, weights_only=True, mmap=True), open_pth(file)):
        assert tuple(found["huge"].shape) == (count,)
        for name in ("tail", "end"):
            value = found[name].read() if isinstance(found[name], Lazy) else found[name].numpy()
            assert np.array_equal(value, tail if name == "tail" else tail[::-1])
