"""Safetensors files as PyTorch programs read and write them.  Never pickle: reading weights must not be able to run code."""
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hawk_jax.config import HawkError

SHARD_BYTES = 5 * 10**9     # files of a big model; what is being written exists twice in memory


class TorchFileError(HawkError):
    """A weights file that is missing, damaged, or not what its manifest says."""


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shards(tensors: Mapping[str, np.ndarray], most: int) -> Iterator[list[str]]:
    names, size = [], 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def write(folder: Path, stem: str, tensors: Mapping[str, np.ndarray], shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Writes STEM.safetensors, or shards with an index in the layout of `transformers`; returns the files.

    Tensors may be views of any strides; they are copied shard by shard.
    """
    shards = list(_shards(tensors, shard_bytes))
    files = [folder / (f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors")
             for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards):
        # transformers refuses files without this mark
        save_file({name: np.ascontiguousarray(tensors[name]) for name in names}, file, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                 "weight_map": {name: file.name for file, names in zip(files, shards) for name in names}}
        files.append(folder / f"{stem}.safetensors.index.json")
        files[-1].write_text(json.dumps(index, indent=1))
    return files


def read(files: Iterable[Path]) -> dict[str, np.ndarray]:
    """All tensors of some safetensors files.  TorchFileError if one cannot be read or a name comes twice."""
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                names = list(opened.keys())
                if twice := sorted(tensors.keys() & names):
                    raise TorchFileError(f"{file} holds {twice[0]}, which another of the files holds too")
                tensors |= {name: opened.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise TorchFileError(f"{file} cannot be read as safetensors: {error}") from error
    return tensors


def check(folder: Path, files: Mapping[str, dict]) -> None:
    """Compares sizes and sha256 of files with a manifest's entries {relative name: {"bytes", "sha256"}}."""
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise TorchFileError(f"{path} is missing or not {entry['bytes']} bytes long; export again or copy it whole")
        if sha256(path) != entry["sha256"]:
            raise TorchFileError(f"{path} is not the file that was written (sha256 differs); export again or copy it again")
