"""The frozen tree in a folder of its own: one safetensors file per top-level part, and a manifest that proves what is in them.

manifest.json holds dtype, shape and sha256 of every leaf, the hash of the whole tree, and where the weights came from.  Leaves are
written and read one at a time, so a 7B tree needs no second copy in memory; on reading, every byte is checked.
Layout of a file (safetensors 0.x): u64 header length, JSON header {name: {dtype, shape, data_offsets}}, raw little-endian data.
"""
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hawk_jax.config import HawkError
from hawk_jax.models.build import flatten

FORMAT = 1
DTYPES = {"float32": "F32", "bfloat16": "BF16"}
READERS = 2         # threads that hash and read leaves: sha256 runs at 0.5-2 GB/s on a core; each holds one leaf in memory
IN_NO_SHAPE = ("heads", "kv_heads", "eps", "rope_theta")     # options of the decoder that wrong weights would fit all the same


class FrozenError(HawkError):
    """A frozen tree that is missing, damaged, or not the one asked for."""


class Stream(NamedTuple):
    """A leaf that is written while it is made: `blocks()` gives its values in C order, in pieces of any size."""
    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


# ------------------------------------------------------------------------------------------------ hashes
def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def describe(array: np.ndarray) -> dict:
    """What identifies an array: {"dtype", "shape", "sha256"} of its values in C order."""
    return {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": hashlib.sha256(_bytes(array)).hexdigest()}


def _tree_hash(leaves: dict[str, dict]) -> str:
    """16 hex digits over names, dtypes, shapes and contents, in the order of names."""
    lines = [f"{name} {leaf['dtype']} {leaf['shape']} {leaf['sha256']}\n" for name, leaf in sorted(leaves.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _named(tree: dict) -> dict:
    return {"/".join(path): leaf for path, leaf in flatten(tree).items()}


def tree_hash(tree: dict) -> str:
    """The hash that `save_frozen` would write for a tree of arrays."""
    return _tree_hash({name: describe(np.asarray(leaf)) for name, leaf in _named(tree).items()})


@jax.jit
def device_checksum(tree: dict):
    """u32 over all bits of a tree where it lies; the same on every mesh (sums of integers do not depend on their order).

    Compared at the start and the end of a run: frozen weights that changed in memory would spoil it unseen.
    """
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32 if leaf.dtype.itemsize == 4 else jnp.uint16).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis in range(leaf.ndim):       # position matters, so that exchanged rows are noticed
            place = place * jnp.uint32(31) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        total = total * jnp.uint32(1_000_003) + (bits * (2 * place + 1)).sum(dtype=jnp.uint32)
    return total


# ------------------------------------------------------------------------------------------------ writing
def safetensors_header(leaves: dict, metadata: dict | None = None) -> tuple[bytes, dict[str, int], int]:
    """(header of a file, place of each leaf's first byte in it, length of the file) of {name: array or shape with dtype and size}.

    Padded so that data starts on 8 bytes.  Raises FrozenError for a dtype that is neither float32 nor bfloat16.
    """
    table, offset, places = {"__metadata__": metadata} if metadata else {}, 0, {}
    for name, leaf in leaves.items():
        if (dtype := np.dtype(leaf.dtype)).name not in DTYPES:
            raise FrozenError(f"{name} has dtype {dtype.name}: weights are written as {', '.join(DTYPES)}")
        places[name], size = offset, leaf.size * dtype.itemsize
        table[name] = {"dtype": DTYPES[dtype.name], "shape": list(leaf.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + at for name, at in places.items()}, start + offset


def _write_leaf(out, name: str, leaf) -> dict:
    """Writes and hashes one leaf, block by block; returns {dtype, shape, sha256}."""
    hashed, written = hashlib.sha256(), 0
    for block in leaf.blocks() if isinstance(leaf, Stream) else (np.asarray(leaf),):
        if block.dtype != leaf.dtype:
            raise FrozenError(f"{name} is announced as {leaf.dtype.name}, a block of it came as {block.dtype.name}")
        data = _bytes(block)
        hashed.update(data)
        out.write(data)
        written += block.size
    if written != leaf.size:
        raise FrozenError(f"{name} has {leaf.size} values, {written} came")
    return {"dtype": leaf.dtype.name, "shape": list(leaf.shape), "sha256": hashed.hexdigest()}


def _write_part(file: Path, leaves: dict) -> dict[str, dict]:
    """Writes one file; returns {name: {dtype, shape, sha256}}."""
    described = {}
    with open(file, "wb") as out:
        out.write(safetensors_header(leaves)[0])
        for name, leaf in leaves.items():
            described[name] = _write_leaf(out, name, leaf)
        out.flush()
        os.fsync(out.fileno())
    return described


def _is_frozen(folder: Path) -> bool:
    """Whether a folder holds a frozen tree, be it damaged.  An export has a manifest of the same name, and must not be replaced."""
    try:
        return "leaves" in json.loads((folder / "manifest.json").read_text())
    except OSError:
        return False
    except ValueError:
        return True


def put_in_place(new: Path, folder: Path) -> None:
    """`new` becomes `folder`; what was there is set aside first and deleted last, so that a kill leaves one of the two whole."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def check_place(folder: Path) -> None:
    """Raises FrozenError if a folder holds anything that a frozen tree may not replace."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not _is_frozen(folder))):
        raise FrozenError(f"{folder} is not empty and holds no frozen tree; choose another folder")


def save_frozen(folder: Path, tree: dict, provenance: dict, decoder: dict | None = None) -> str:
    """Writes a tree of arrays or Streams (bfloat16 or float32) and returns its hash.

    The folder appears whole or not at all, and replaces a frozen tree that was there before.  provenance: what made it, for people.
    decoder: options of model.llama that the weights need, for `check_decoder`.  Whatever a Stream raises passes, and nothing is left.
    Raises FrozenError if the folder holds something else or cannot be written.
    """
    folder = Path(folder)
    check_place(folder)
    new = folder.with_name(f"{folder.name}.writing")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        leaves = {}
        for part, subtree in tree.items():
            leaves |= _write_part(new / f"{part}.safetensors", _named({part: subtree}))
        manifest = {"format": FORMAT, "hash": _tree_hash(leaves), "provenance": provenance,
                    **({"decoder": decoder} if decoder else {}), "leaves": leaves}
        (new / "manifest.json").write_text(json.dumps(manifest, indent=1))
        put_in_place(new, folder)
    except OSError as error:
        raise FrozenError(f"cannot write the frozen tree to {folder}: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return manifest["hash"]


# ------------------------------------------------------------------------------------------------ reading
def read_manifest(folder: Path) -> dict:
    """The manifest of a frozen tree.  Raises FrozenError if there is none, it is of something else, or a newer version wrote it."""
    file = Path(folder) / "manifest.json"
    if not file.is_file():
        raise FrozenError(f"no frozen tree at {folder} (manifest.json is missing); set run.frozen to what `pretrain` or an import wrote")
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise FrozenError(f"{file} is damaged: {error}; make the frozen tree again") from error
    if not {"format", "leaves", "hash"} <= manifest.keys():
        raise FrozenError(f"{file} is not that of a frozen tree; set run.frozen to what `pretrain` or an import wrote")
    if manifest["format"] > FORMAT:
        raise FrozenError(f"{file} has format {manifest['format']}, this version reads up to {FORMAT}; update hawk_jax")
    return manifest


def _check_leaves(folder: Path, leaves: dict, wanted: dict) -> None:
    """Names, shapes and dtypes, before anything is read."""
    for name in sorted(leaves.keys() ^ wanted.keys()):
        raise FrozenError(f"{folder} {'lacks' if name in wanted else 'holds'} {name}, which this model configuration "
                          f"{'needs' if name in wanted else 'does not freeze'}; set model.* to what the tree was made for")
    for name, leaf in sorted(leaves.items()):
        here, there = (leaf["dtype"], tuple(leaf["shape"])), (wanted[name].dtype.name, tuple(wanted[name].shape))
        if here != there:
            hint = f"; set model.frozen_dtype={here[0]}" if here[1] == there[1] else ""
            raise FrozenError(f"{folder}: {name} is {here[0]}{list(here[1])}, this model configuration needs {there[0]}{list(there[1])}"
                              f"{hint}")


def check_decoder(folder: Path, options) -> None:
    """Raises FrozenError where `model.llama` (options) differs from what imported weights need and no shape would show it."""
    needed, have = read_manifest(folder).get("decoder", {}), {"kv_heads": options.groups}
    for name in IN_NO_SHAPE:
        value = have.get(name, getattr(options, name))
        if name in needed and value != needed[name]:
            raise FrozenError(f"{folder} holds a decoder that needs model.llama.{name}={needed[name]}, the configuration has {value}; "
                              f"set model.llama.{name}={needed[name]}")


class _Place(NamedTuple):
    """Where the values of a leaf lie."""
    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        # read, not mapped: pages of a mapped file count as memory of this process for as long as the array lives
        return np.fromfile(self.file, np.uint8, math.prod(self.shape) * self.dtype.itemsize, offset=self.offset).view(self.dtype).reshape(
            self.shape)


def _open_part(file: Path) -> dict[str, _Place]:
    """{name: where its values lie}."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            table = json.loads(stream.read(length))
        size = file.stat().st_size - 8 - length
    except (OSError, ValueError, OverflowError) as error:
        raise FrozenError(f"{file} cannot be read: {error}; make the frozen tree again") from error
    kinds = {short: np.dtype(getattr(jnp, name)) for name, short in DTYPES.items()}
    places = {}
    for name, entry in table.items():
        first, end = entry["data_offsets"]
        if end > size:
            raise FrozenError(f"{file} ends before {name}: it was cut off; make the frozen tree again")
        places[name] = _Place(file, 8 + length + first, kinds[entry["dtype"]], tuple(entry["shape"]))
    return places


def load_frozen(folder: Path, abstract: dict, shardings: dict | None = None) -> tuple[dict, str]:
    """(tree of arrays, hash of the tree); every leaf's bytes are compared with the manifest.

    abstract: tree of ShapeDtypeStruct of exactly the frozen parameters (`freeze.split`); shardings: the same tree of NamedSharding,
    None for the default device.  Raises FrozenError that names the first leaf which is missing, unknown, or differs.
    """
    folder = Path(folder)
    manifest, wanted, places = read_manifest(folder), _named(abstract), _named(shardings or {})
    _check_leaves(folder, manifest["leaves"], wanted)
    if _tree_hash(manifest["leaves"]) != manifest["hash"]:
        raise FrozenError(f"{folder}/manifest.json was changed: its leaves do not have the hash it states")
    stored = {}
    for part in abstract:
        stored |= _open_part(folder / f"{part}.safetensors")

    def read(name: str):
        try:
            array = stored[name].read() if name in stored else None
        except (OSError, ValueError) as error:
            raise FrozenError(f"{folder}: {name} cannot be read: {error}; make the frozen tree again") from error
        if array is None or describe(array) != manifest["leaves"][name]:
            raise FrozenError(f"{folder}: {name} is not what the manifest says (sha256 differs): the file was damaged or changed; "
                              "make the frozen tree again")
        # copies: an array on a CPU may otherwise stay a window on this one, or on parts of it
        if name not in places:
            return jnp.array(array, copy=True)
        return jax.make_array_from_callback(array.shape, places[name], lambda index: np.array(array[index]))
    with ThreadPoolExecutor(READERS) as pool:
        values = dict(zip(wanted, pool.map(read, wanted)))
    return jax.tree_util.tree_map_with_path(lambda path, _: values["/".join(key.key for key in path)], abstract), manifest["hash"]
