"""Tensors in files, known by dtype and shape and read when asked for; and those of safetensors files, without torch.

Headers are believed only after they were checked: every tensor inside the file, none overlapping, no holes, sizes that fit; whatever is in
a file, either its values come out or a LazyError of one line, without more memory taken than the file has bytes.  Values are
read into fresh buffers, never mapped: pages of a mapped file count as this process's memory.
Layout of a safetensors file: u64 header length, JSON {name: {dtype, shape, data_offsets}}, raw little-endian data.
"""
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from hawk_jax.config import HawkError

LONGEST_HEADER = 100_000_000        # bytes; the safetensors library's own limit
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
          "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}


class LazyError(HawkError):
    """A weights file that is missing, damaged, or not what it says."""


class Lazy(NamedTuple):
    """One tensor of a file."""
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]      # the values, in memory of their own


def shown(name) -> str:
    """A text from a file as a message can hold it: on one line, not long, nothing a terminal would obey."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 200 else ascii(text[:100])


def possible(shape: tuple, dtype: np.dtype) -> bool:
    """Whether an array can have this shape: numpy's limits on rank and bytes, which hold for empty arrays too."""
    return (len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in shape)
            and math.prod(n or 1 for n in shape) * dtype.itemsize < 2**63)


def read_at(file: Path, offset: int, dtype: np.dtype, count: int) -> np.ndarray:
    """`count` values from a place in a file; LazyError if it ends before."""
    try:
        values = np.fromfile(file, np.dtype(f"V{dtype.itemsize}"), count, offset=offset).view(dtype)
    except OSError as error:
        raise LazyError(f"{file} cannot be read: {error.strerror or error}") from error
    if values.size != count:
        raise LazyError(f"{file} was cut off while it was read; copy it again")
    return values


def _header(file: Path) -> tuple[dict, int, int]:
    """(header, place of the first data byte, bytes of data)."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise LazyError(f"{file} is no safetensors file, or was cut off: its header would have {length} bytes, the file has {size}"
                                "; copy it again")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise LazyError(f"{file}: no such file") from None
    except OSError as error:
        raise LazyError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise LazyError(f"{file} is no safetensors file, or its header is damaged: {shown(error)}") from error
    if not isinstance(header, dict):
        raise LazyError(f"{file} is no safetensors file: its header is not an object")
    header.pop("__metadata__", None)
    return header, 8 + length, size - 8 - length


def _entry(file: Path, name: str, entry) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, end) of a header's entry."""
    try:
        kind, shape, (first, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = isinstance(kind, str) and isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**63 for n in (first, end))
    except (KeyError, TypeError, ValueError):
        sound = False
    if sound and kind not in DTYPES:
        raise LazyError(f"{file}: {shown(name)} has dtype {shown(kind)}, which is not read here; known: {', '.join(DTYPES)}")
    if not sound or not possible(shape, dtype := np.dtype(DTYPES[kind])):
        raise LazyError(f"{file}: the entry of {shown(name)} is damaged; copy the file again")
    if end - first != math.prod(shape) * dtype.itemsize:
        raise LazyError(f"{file}: {shown(name)} has {end - first} bytes for {kind}{shape}; the header is damaged, copy the file again")
    return dtype, tuple(shape), first, end


def open_safetensors(file: Path) -> dict[str, Lazy]:
    """{name: tensor} of a file whose header fits it.  LazyError names the file, the tensor and the fault."""
    file = Path(file)
    header, start, size = _header(file)
    entries = {name: _entry(file, name, entry) for name, entry in header.items()}
    at, before = 0, "the header"
    for name, (_, _, first, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if first != at:
            fault = "overlaps" if first < at else "leaves a hole after"
            raise LazyError(f"{file}: {shown(name)} {fault} {before}; the header is damaged or forged")
        at, before = end, shown(name)
    if at != size:
        raise LazyError(f"{file} holds {size} bytes of data, its header speaks of {at}: it was cut off or damaged; copy it again")

    def lazy(dtype, shape, first, end):
        return Lazy(dtype, shape, lambda: read_at(file, start + first, dtype, math.prod(shape)).reshape(shape))
    return {name: lazy(*entry) for name, entry in entries.items()}
