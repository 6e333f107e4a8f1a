"""PyTorch's checkpoint files (.pth, .bin), read and written without torch and without running anything.

A file is a zip archive: NAME/data.pkl, a pickle whose tensors refer to storages, and NAME/data/KEY, the raw bytes of each storage.  The
pickle is not loaded but read, opcode by opcode, on a stack of plain values: it can build dicts, lists, numbers, texts and descriptions of
tensors, and any other callable it names is refused by name.  Tensors are read when asked for (convert/lazy.py).
Source of the format: torch.save since version 1.6, and the documentation of pickletools.
"""
import math
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from hawk_jax.convert.lazy import Lazy, LazyError, read_at

STORAGES = {"FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16, "DoubleStorage": np.float64,
            "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
            "BoolStorage": np.bool_}
STORAGE_OF = {np.dtype(dtype): name for name, dtype in STORAGES.items()}
LONGEST_PICKLE = 1 << 28        # bytes; that of a 7B model takes less than one million
CONVERT = "python -c \"import torch; torch.save(torch.load('OLD', weights_only=True), 'NEW')\""
ALIGNMENT = 64                  # bytes, of storages that are written, as torch aligns them


class PthError(LazyError):
    """A checkpoint file that is damaged, of another kind, or would run code."""


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# ------------------------------------------------------------------------------------------------ what a pickle may call
def _rebuild_tensor(storage, offset, shape, strides, *_):
    if not isinstance(storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides)):
        raise PthError("describes a tensor that cannot be")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


ALLOWED = {
    "collections.OrderedDict": lambda pairs=(): dict(pairs),
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda *place: ":".join(map(str, place)),
    **{f"torch.{name}": None for name in STORAGES},         # named in references to storages, never called
}
MARK = object()
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
            "SHORT_BINBYTES", "INT", "LONG", "FLOAT", "UNICODE"}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
NOTHING = {"PROTO", "FRAME", "STOP"}


class _Reader:
    """Runs the opcodes of one pickle on `stack`; `memo` holds what the pickle refers to again."""

    def __init__(self):
        self.stack, self.memo = [], {}

    def run(self, content: bytes):
        for opcode, argument, _ in pickletools.genops(content):
            name = opcode.name
            if name in LITERALS:
                self.stack.append(argument)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name in EMPTY:
                self.stack.append(EMPTY[name]())
            elif name not in NOTHING:
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise PthError(f"holds a pickle with the operation {name}, which no checkpoint of tensors needs; refused, nothing "
                                   "was run")
                step(argument)
        return self.stack.pop()

    def _since_mark(self) -> list:
        at = len(self.stack) - 1 - next(i for i, value in enumerate(reversed(self.stack)) if value is MARK)
        values = self.stack[at + 1:]
        del self.stack[at:]
        return values

    def _mark(self, _):
        self.stack.append(MARK)

    def _tuple(self, _):
        self.stack.append(tuple(self._since_mark()))

    def _last(self, count: int) -> None:
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(values)

    def _tuple1(self, _):
        self._last(1)

    def _tuple2(self, _):
        self._last(2)

    def _tuple3(self, _):
        self._last(3)

    def _append(self, _):
        value = self.stack.pop()
        self.stack[-1].append(value)

    def _appends(self, _):
        values = self._since_mark()
        self.stack[-1].extend(values)

    def _setitem(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][key] = value

    def _setitems(self, _):
        values = self._since_mark()
        self.stack[-1].update(zip(values[::2], values[1::2]))

    def _memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def _binput(self, number):
        self.memo[number] = self.stack[-1]

    def _binget(self, number):
        self.stack.append(self.memo[number])

    _long_binput, _long_binget, _put, _get = _binput, _binget, _binput, _binget

    def _global(self, name: str):
        module, _, attribute = name.partition(" ")
        self._push_global(f"{module}.{attribute}")

    def _stack_global(self, _):
        attribute, module = self.stack.pop(), self.stack.pop()
        self._push_global(f"{module}.{attribute}")

    def _push_global(self, name: str) -> None:
        if name not in ALLOWED:
            raise PthError(f"holds a pickle that would call {name}; refused, nothing was run. Such a file is no plain checkpoint: get it "
                           "from its authors, as safetensors if they have it")
        self.stack.append(_Global(name))

    def _reduce(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or ALLOWED[function.name] is None or not isinstance(arguments, tuple):
            raise PthError("holds a pickle that calls what is no function; refused, nothing was run")
        self.stack.append(ALLOWED[function.name](*arguments))

    def _build(self, _):
        self.stack.pop()        # attributes of a dict: `_metadata` of state_dict(), which nothing here needs
        if not isinstance(self.stack[-1], dict):
            raise PthError("holds a pickle that sets attributes of what is no dict; refused, nothing was run")

    def _binpersid(self, _):
        kind, storage, key, _, count = self.stack.pop()
        if kind != "storage" or not isinstance(storage, _Global) or not isinstance(count, int) or count < 0:
            raise PthError("refers to something that is no storage")
        self.stack.append(_Storage(str(key), np.dtype(STORAGES[storage.name.removeprefix("torch.")]), count))


# ------------------------------------------------------------------------------------------------ reading
class _Archive:
    """Members of a zip file that are stored as they are."""

    def __init__(self, file: Path):
        self.file = file
        try:
            with open(file, "rb") as stream, zipfile.ZipFile(stream) as archive:
                self.members = {info.filename: info for info in archive.infolist()}
                self.prefix = self._prefix()
                self.pickle = self._pickle(archive)
                order = f"{self.prefix}byteorder"
                if order in self.members and archive.read(order).strip() != b"little":
                    raise PthError(f"{file} was written on a big-endian machine; convert it there")
        except FileNotFoundError:
            raise PthError(f"{file}: no such file") from None
        except zipfile.BadZipFile as error:
            raise PthError(f"{file} is no checkpoint in torch's zip format, or was cut off ({error}). Copy it again; a file of torch "
                           f"before 1.6 is converted by: {CONVERT}") from error
        except OSError as error:
            raise PthError(f"{file} cannot be read: {error.strerror or error}") from error

    def _prefix(self) -> str:
        found = [name for name in self.members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(found) != 1:
            raise PthError(f"{self.file} is a zip archive, but no checkpoint: it holds {len(found)} data.pkl")
        return found[0].removesuffix("data.pkl")

    def _pickle(self, archive: zipfile.ZipFile) -> bytes:
        if self.members[f"{self.prefix}data.pkl"].file_size > LONGEST_PICKLE:
            raise PthError(f"{self.file}: its data.pkl is larger than {LONGEST_PICKLE} bytes; no checkpoint of tensors is")
        return archive.read(f"{self.prefix}data.pkl")

    def place(self, storage: _Storage) -> int:
        """First byte of a storage."""
        name = f"{self.prefix}data/{storage.key}"
        info = self.members.get(name)
        if info is None:
            raise PthError(f"{self.file}: {name} is missing; the file was cut off or put together wrongly")
        if info.compress_type != zipfile.ZIP_STORED:
            raise PthError(f"{self.file}: {name} is compressed; save the checkpoint with torch again")
        if info.file_size < storage.count * storage.dtype.itemsize:
            raise PthError(f"{self.file}: {name} has {info.file_size} bytes, {storage.count} {storage.dtype.name} were claimed")
        header = read_at(self.file, info.header_offset, np.dtype(np.uint8), 30).tobytes()
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        return info.header_offset + 30 + name_length + extra_length


def _lazy(archive: _Archive, places: dict, tensor: _Tensor) -> Lazy:
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    if len(shape) != len(strides):
        raise PthError(f"{archive.file} describes a tensor that cannot be: shape {list(shape)}, strides {list(strides)}")
    if storage not in places:
        places[storage] = archive.place(storage)
    extent = sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1 if math.prod(shape) else 0
    if tensor.offset + extent > storage.count:
        raise PthError(f"{archive.file} describes a tensor of {list(shape)} that reaches beyond its storage of {storage.count} values")
    first = places[storage] + tensor.offset * storage.dtype.itemsize

    def read() -> np.ndarray:
        values = read_at(archive.file, first, storage.dtype, extent)
        in_bytes = [stride * storage.dtype.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(values, shape, in_bytes, writeable=False) if extent else values.reshape(shape)
        return view if view.flags.c_contiguous else np.ascontiguousarray(view)
    return Lazy(storage.dtype, shape, read)


def open_pth(file: Path):
    """What torch.load would give: dicts, lists, numbers and texts, with every tensor as a Lazy.

    PthError names the file and what is wrong; a pickle that names any callable but those of tensors and dicts is refused, and nothing of
    it was run.
    """
    file, places = Path(file), {}
    archive = _Archive(file)
    try:
        tree = _Reader().run(archive.pickle)
    except PthError as error:
        raise PthError(f"{file} {error}") from error
    except Exception as error:      # whatever a damaged pickle makes of a stack: IndexError, KeyError, TypeError, ValueError, ...
        raise PthError(f"{file}: its data.pkl is damaged ({type(error).__name__}: {str(error)[:100]}); copy the file again") from error

    def resolve(value):
        if isinstance(value, _Tensor):
            return _lazy(archive, places, value)
        if isinstance(value, dict):
            return {key: resolve(inner) for key, inner in value.items()}
        if isinstance(value, (_Global, _Storage)) or value is MARK:
            raise PthError(f"{file} holds a bare {type(value).__name__.strip('_').lower()} where a value should be")
        return type(value)(map(resolve, value)) if isinstance(value, (list, tuple)) else value
    try:
        return resolve(tree)
    except RecursionError as error:
        raise PthError(f"{file}: its data.pkl refers to itself; no checkpoint does") from error


# ------------------------------------------------------------------------------------------------ writing
def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(encoded := text.encode())) + encoded


def _number(number: int) -> bytes:
    if -2**31 <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    encoded = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def _tuple(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def _tensor(tensor, key: str) -> bytes:
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.insert(0, step)
        step *= size
    storage = b"ctorch\n" + STORAGE_OF[np.dtype(tensor.dtype)].encode() + b"\n"
    reference = _tuple(_text("storage"), storage, _text(key), _text("cpu"), _number(math.prod(tensor.shape))) + b"Q"
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple(reference, _number(0), _tuple(*map(_number, tensor.shape)),
                                                          _tuple(*map(_number, strides)), b"\x89", hooks) + b"R"


def _emit(value, tensors: list) -> bytes:
    """Opcodes of protocol 2 that build `value`; its tensors are appended to `tensors`, their place there is their storage's key."""
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, (Lazy, np.ndarray)):
        tensors.append(value)
        return _tensor(value, str(len(tensors) - 1))
    if isinstance(value, dict):
        return b"}(" + b"".join(_emit(k, tensors) + _emit(v, tensors) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(_emit(v, tensors) for v in value) + b"e"
    if isinstance(value, tuple):
        return _tuple(*(_emit(v, tensors) for v in value))
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return _number(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def write_pth(file: Path, tree) -> None:
    """Writes what torch.load(file, weights_only=True) gives back as `tree`, tensor by tensor.

    tree: dicts, lists, tuples, texts, numbers, None, and tensors as arrays or Lazy (which are read one at a time).
    """
    file, tensors = Path(file), []
    content = b"\x80\x02" + _emit(tree, tensors) + b"."
    with open(file, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("data.pkl", content), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(f"{file.stem}/{name}"), data)
        for key, tensor in enumerate(tensors):
            values = np.ascontiguousarray(tensor.read() if isinstance(tensor, Lazy) else tensor).reshape(-1).view(np.uint8)
            info = zipfile.ZipInfo(f"{file.stem}/data/{key}")
            info.file_size = values.size
            large = values.size > zipfile.ZIP64_LIMIT // 2
            # torch maps storages into memory where they begin on such a boundary: an extra field of the header fills up to it
            begin = stream.tell() + 30 + len(info.filename) + 4 + (20 if large else 0)
            filling = -begin % ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", filling) + b"Z" * filling
            with archive.open(info, "w", force_zip64=large) as member:
                member.write(values)
