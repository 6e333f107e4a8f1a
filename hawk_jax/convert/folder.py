"""Weights as they lie on disk, whatever wrote them: a safetensors file, a file of torch, or a Hugging Face folder of either, in shards.

An index is a file from elsewhere: it may name nothing but files of its own folder, and every tensor has to be where it says.
"""
import json
from pathlib import Path

from hawk_jax.convert.lazy import Lazy, LazyError, open_safetensors, shown
from hawk_jax.convert.pth import PthError, open_pth

LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def open_torch(file: Path) -> dict[str, Lazy]:
    """{name: tensor} of a .pth or .bin file: a flat dict, or the dict under "model" as training codes save it."""
    tree = open_pth(file)
    if isinstance(tree, dict) and isinstance(tree.get("model"), dict):
        tree = tree["model"]
    if not isinstance(tree, dict):
        raise PthError(f"{file} holds a {type(tree).__name__}, not a dict of tensors")
    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, Lazy):
            raise PthError(f"{file}: {shown(name)} is a {type(value).__name__}, not a tensor; a file of weights is a dict of names and "
                           'tensors, or has one under "model"')
    return tree


def _open_file(file: Path) -> dict[str, Lazy]:
    return open_safetensors(file) if file.suffix == ".safetensors" else open_torch(file)


def _shard(folder: Path, name, index: Path) -> Path:
    """The shard of that name; LazyError if it is missing, or the name is anything but that of a file in the folder.

    The file itself may be a link to anywhere: only who owns the folder can make one, and download caches keep each file as a link to a
    blob elsewhere in the cache.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0") or len(name) > 200:
        raise LazyError(f"{index} names {shown(name)} as a shard, which is no plain file name in its folder; refused")
    if not (folder / name).is_file():
        raise LazyError(f"{index} names {shown(name)}, which is missing in {folder}; copy the whole folder again")
    return folder / name


def _places(index: Path) -> dict[str, str]:
    """{tensor: shard} of an index, whose names are not checked yet."""
    try:
        places = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LazyError(f"{index} is damaged ({type(error).__name__}: {shown(error)}); copy it again") from error
    if not isinstance(places, dict) or not places:
        raise LazyError(f"{index} is damaged: its weight_map is no object with entries; copy it again")
    return places


def _open_shards(folder: Path, index: Path) -> dict[str, Lazy]:
    places, shards, tensors = _places(index), {}, {}
    for name in places.values():
        if not isinstance(name, str) or name not in shards:
            file = _shard(folder, name, index)
            shards[name] = _open_file(file)
    for name, shard in places.items():
        if name not in shards[shard]:
            raise LazyError(f"{index} says that {shown(name)} is in {shown(shard)}, but it is not; copy the whole folder again")
        tensors[name] = shards[shard][name]
    for shard, held in shards.items():
        if unknown := sorted(name for name in held if places.get(name) != shard):
            fault = "places elsewhere" if unknown[0] in places else "lacks"
            raise LazyError(f"{folder / shard} holds {shown(unknown[0])}, which {index.name} {fault}; copy the whole folder again")
    return tensors


def files_of(place: Path) -> list[Path]:
    """The files that `open_weights` reads, as far as they can be told before it checks them."""
    place = Path(place)
    if not place.is_dir():
        return [place]
    for name in LAYOUTS:
        if (file := place / name).is_file():
            if not name.endswith(".json"):
                return [file]
            return [file, *sorted({_shard(place, shard, file) for shard in _places(file).values()})]
    return []


def open_folder(folder: Path) -> dict[str, Lazy]:
    """{name: tensor} of a Hugging Face folder: one file or shards with an index, safetensors before torch's.  Raises LazyError."""
    folder = Path(folder)
    for name in LAYOUTS:
        if (file := folder / name).is_file():
            return _open_shards(folder, file) if name.endswith(".json") else _open_file(file)
    raise LazyError(f"{folder} holds none of {', '.join(LAYOUTS)}: is it a Hugging Face folder?")


def open_weights(place: Path) -> dict[str, Lazy]:
    """{name: tensor} of a file or folder.  Nothing but headers is read.  Raises LazyError."""
    place = Path(place)
    return open_folder(place) if place.is_dir() else _open_file(place)
