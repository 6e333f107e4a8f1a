"""PyTorch's checkpoint files (.pth, .bin), read and written without torch and without running anything.

A file is a zip archive: NAME/data.pkl, a pickle whose tensors refer to storages, and NAME/data/KEY, the raw bytes of each storage.  The
pickle is read by convert/opcodes.py, tensors when they are asked for (convert/lazy.py).
Source of the format: torch.save since version 1.6.
"""
import math
import struct
import zipfile
from pathlib import Path

import numpy as np

from hawk_jax.convert.lazy import Lazy, read_at, shown
from hawk_jax.convert.opcodes import MARK, STORAGES, Global, PthError, Reader, Storage, Tensor

STORAGE_OF = {np.dtype(dtype): name for name, dtype in STORAGES.items()}
LONGEST_PICKLE = 1 << 25        # bytes; that of a 7B model takes less than one million, and each byte may become an object of 64
CONVERT = "python -c \"import torch; torch.save(torch.load('OLD', weights_only=True), 'NEW')\""
ALIGNMENT = 64                  # bytes, of storages that are written, as torch aligns them


# ------------------------------------------------------------------------------------------------ reading
class _Archive:
    """Members of a zip file that are stored as they are."""

    def __init__(self, file: Path):
        self.file = file
        try:
            self.size = file.stat().st_size
            with open(file, "rb") as stream, zipfile.ZipFile(stream) as archive:
                self.members = {info.filename: info for info in archive.infolist()}
                self.prefix = self._prefix()
                self.pickle = self._small(archive, "data.pkl", LONGEST_PICKLE)
                if f"{self.prefix}byteorder" in self.members and self._small(archive, "byteorder", 100).strip() != b"little":
                    raise PthError(f"{file} was written on a big-endian machine; convert it there")
        except FileNotFoundError:
            raise PthError(f"{file}: no such file") from None
        except OSError as error:
            raise PthError(f"{file} cannot be read: {error.strerror or error}") from error
        except PthError:
            raise
        except Exception as error:      # what zipfile makes of damaged bytes: BadZipFile, ValueError, NotImplementedError, zlib.error, ...
            raise PthError(f"{file} is no checkpoint in torch's zip format, or was cut off ({shown(error)}). Copy it again; a file of "
                           f"torch before 1.6 is converted by: {CONVERT}") from error

    def _prefix(self) -> str:
        found = [name for name in self.members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(found) != 1:
            raise PthError(f"{self.file} is a zip archive, but no checkpoint: it holds {len(found)} data.pkl")
        return found[0].removesuffix("data.pkl")

    def _small(self, archive: zipfile.ZipFile, name: str, most: int) -> bytes:
        if self.members[self.prefix + name].file_size > most:
            raise PthError(f"{self.file}: its {name} is larger than {most} bytes; that of no checkpoint is")
        return archive.read(self.prefix + name)

    def place(self, storage: Storage) -> int:
        """First byte of a storage."""
        name = f"{self.prefix}data/{storage.key}"
        info = self.members.get(name)
        if info is None:
            raise PthError(f"{self.file}: {shown(name)} is missing; the file was cut off or put together wrongly")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise PthError(f"{self.file}: {shown(name)} is compressed or encrypted; save the checkpoint with torch again")
        if info.file_size < storage.count * storage.dtype.itemsize:
            raise PthError(f"{self.file}: {shown(name)} has {info.file_size} bytes, {storage.count} {storage.dtype.name} were claimed")
        first = self._data_of(info) if 0 <= info.header_offset <= self.size - 30 else self.size
        if first + info.file_size > self.size:
            raise PthError(f"{self.file}: {shown(name)} reaches beyond the end of the file; it is damaged, copy it again")
        return first

    def _data_of(self, info: zipfile.ZipInfo) -> int:
        """Where a member's bytes begin: behind its own header, whose extra field may differ from the directory's."""
        header = read_at(self.file, info.header_offset, np.dtype(np.uint8), 30).tobytes()
        if not header.startswith(b"PK\3\4"):
            raise PthError(f"{self.file}: {shown(info.filename)} is not where the directory says; the file is damaged, copy it again")
        return info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))


def _lazy(archive: _Archive, places: dict, tensor: Tensor) -> Lazy:
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    if storage not in places:
        places[storage] = archive.place(storage)
    extent = sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1 if math.prod(shape) else 0
    if tensor.offset + extent > storage.count:
        raise PthError(f"{archive.file} describes a tensor of {list(shape)} that reaches beyond its storage of {storage.count} values")
    first = places[storage] + tensor.offset * storage.dtype.itemsize

    def read() -> np.ndarray:
        values = read_at(archive.file, first, storage.dtype, extent)
        in_bytes = [stride * storage.dtype.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(values, shape, in_bytes) if extent else values.reshape(shape)
        return values.reshape(shape) if view.flags.c_contiguous else np.ascontiguousarray(view)
    return Lazy(storage.dtype, shape, read)


def open_pth(file: Path):
    """What torch.load would give: dicts, lists, numbers and texts, with every tensor as a Lazy.

    PthError names the file and what is wrong; a pickle that names any callable but those of tensors and dicts is refused, and nothing of
    it was run.
    """
    file, places, done = Path(file), {}, {}
    archive = _Archive(file)
    try:
        tree = Reader().run(archive.pickle)
    except PthError as error:
        raise PthError(f"{file} {error}") from error
    except Exception as error:      # whatever a damaged pickle makes of a stack: IndexError, KeyError, TypeError, ValueError, ...
        raise PthError(f"{file}: its data.pkl is damaged ({type(error).__name__}: {shown(error)}); copy the file again") from error

    def resolve(value):
        if isinstance(value, (Global, Storage)) or value is MARK:
            raise PthError(f"{file} holds a bare {type(value).__name__.lower()} where a value should be")
        if not isinstance(value, (dict, list, tuple)):
            return value
        if id(value) not in done:       # once, however often it is referred to
            if isinstance(value, Tensor):
                done[id(value)] = _lazy(archive, places, value)
            elif isinstance(value, dict):
                done[id(value)] = {key: resolve(inner) for key, inner in value.items()}
            else:
                done[id(value)] = type(value)(map(resolve, value))
        return done[id(value)]
    try:
        return resolve(tree)
    except RecursionError as error:
        raise PthError(f"{file}: its data.pkl is nested too deeply or refers to itself; no checkpoint does") from error


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
    if np.dtype(tensor.dtype) not in STORAGE_OF:
        raise TypeError(f"a checkpoint cannot hold a tensor of {tensor.dtype}; known: {', '.join(d.name for d in STORAGE_OF)}")
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
            begin = stream.tell() + 30 + len(info.filename.encode()) + 4 + (20 if large else 0)
            filling = -begin % ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", filling) + b"Z" * filling
            with archive.open(info, "w", force_zip64=large) as member:
                member.write(values)
