"""Safetensors shards as `transformers` reads them, written tensor by tensor as they arrive, and the manifest that names files.

Never pickle: reading weights must not be able to run code.
"""
import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hawk_jax.config import HawkError
from hawk_jax.training.frozen import describe as describe_array
from hawk_jax.training.frozen import safetensors_header

SHARD_BYTES = 5 * 10**9     # files of a big model


class TorchFileError(HawkError):
    """A weights file that is missing, damaged, or not what its manifest says."""


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cut(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names, in order, in groups of at most `most` bytes (a larger tensor is a group of its own)."""
    groups, size = [[]], 0
    for name, count in sizes.items():
        if groups[-1] and size + count > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += count
    return groups


class Shards:
    """STEM.safetensors in `folder`, or shards with an index, for tensors that arrive one at a time in any order.

    specs: {name: shape with dtype} of every tensor (jax.ShapeDtypeStruct).  Space is taken at the start, so that a full disk is known
    before the work.
    """

    def __init__(self, folder: Path, stem: str, specs: Mapping, shard_bytes: int = SHARD_BYTES):
        self.folder, self.stem, self.specs = Path(folder), stem, specs
        sizes = {name: spec.size * np.dtype(spec.dtype).itemsize for name, spec in specs.items()}
        groups = _cut(sizes, shard_bytes)
        names = [f"{stem}.safetensors"] if len(groups) == 1 else [f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors"
                                                                  for i in range(1, len(groups) + 1)]
        self.total, self.described, self._place, self._open = sum(sizes.values()), {}, {}, []
        try:
            for file, group in zip(names, groups):
                self._begin(file, group)
        except OSError:
            self.abandon()
            raise

    def _begin(self, file: str, names: list[str]) -> None:
        # transformers refuses files without this mark
        header, places, length = safetensors_header({name: self.specs[name] for name in names}, {"format": "pt"})
        handle = open(self.folder / file, "wb")
        self._open.append(handle)
        handle.write(header)
        os.posix_fallocate(handle.fileno(), 0, length)
        self._place |= {name: (handle, file, at) for name, at in places.items()}

    def put(self, name: str, tensor: np.ndarray) -> None:
        """Writes one tensor (any strides)."""
        spec = self.specs[name]
        if (tensor.dtype, tensor.shape) != (spec.dtype, spec.shape) or name in self.described:
            raise TorchFileError(f"{name} is {tensor.dtype.name}{list(tensor.shape)} or comes twice; announced was {spec}")
        handle, _, at = self._place[name]
        data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        handle.seek(at)
        data.tofile(handle)
        self.described[name] = describe_array(tensor)

    def close(self) -> list[Path]:
        """The finished files.  Raises TorchFileError if a tensor never came."""
        for handle in self._open:
            handle.flush()
            os.fsync(handle.fileno())
            handle.close()
        if missing := sorted(self.specs.keys() - self.described.keys()):
            raise TorchFileError(f"{self.folder}/{self.stem}: {missing[0]} and {len(missing) - 1} more were never written")
        files = [Path(handle.name) for handle in self._open]
        if len(files) > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": {n: self._place[n][1] for n in self.specs}}
            files.append(self.folder / f"{self.stem}.safetensors.index.json")
            files[-1].write_text(json.dumps(index, indent=1))
        return files

    def abandon(self) -> None:
        """Closes the files, whatever is in them."""
        for handle in self._open:
            with contextlib.suppress(OSError):      # on a full disk closing fails once more
                handle.close()


def describe(folder: Path, files) -> dict[str, dict]:
    """Manifest entries {name relative to the folder: {"bytes", "sha256"}}."""
    return {str(Path(f).relative_to(folder)): {"bytes": Path(f).stat().st_size, "sha256": sha256(f)} for f in sorted(files)}


def check(folder: Path, files: Mapping[str, dict]) -> None:
    """Compares sizes and sha256 of files with a manifest's entries {relative name: {"bytes", "sha256"}}."""
    for name, entry in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise TorchFileError(f"{folder}/manifest.json names {name}, which lies outside the folder; it was changed")
        if not path.is_file():
            raise TorchFileError(f"{path} is missing; export again or copy the folder whole")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise TorchFileError(f"{path} has {size} bytes, written were {entry['bytes']}; export again or copy it again")
        if sha256(path) != entry["sha256"]:
            raise TorchFileError(f"{path} is not the file that was written (sha256 differs); export again or copy it again")
