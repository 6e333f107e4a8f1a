"""`import`: foreign weights to a frozen tree, and to a checkpoint at step 0 where they hold trained values.

Layer by layer: what is read is converted, hashed, written and dropped, so that a 7B model needs the memory of a few tensors.  Everything
that can be known before (names, shapes, hashes of the sources, places to write to) is checked before anything is written.
"""
import contextlib
import dataclasses
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from hawk_jax.config import HawkConfig, HawkError, differences, to_dict
from hawk_jax.convert.folder import files_of
from hawk_jax.convert.keys import table
from hawk_jax.convert.layouts import Sources, gather, read_llama_config, streams
from hawk_jax.mesh import make_mesh
from hawk_jax.models import build
from hawk_jax.training import freeze
from hawk_jax.training.checkpoint import Checkpoints
from hawk_jax.training.frozen import IN_NO_SHAPE, Stream, check_place, read_manifest, save_frozen
from hawk_jax.training.state import INITIAL, init_state, random_key

CHUNK = 1 << 22     # bytes read at once for a hash


class ImportFault(HawkError):
    """What cannot be imported, or not to there."""


class Imported(NamedTuple):
    """What an import did."""
    config: HawkConfig              # with the decoder's options as its config.json states them
    changed: list[str]              # options of the decoder that were taken from there
    frozen_hash: str
    tensors: int
    bytes: int
    seconds: float
    passed: dict[str, list[str]]    # option: names that were passed over
    casts: dict[str, int]           # "float16 -> bfloat16": tensors
    checkpoint: Path | None
    notes: list[str]                # what a person might not expect


# ------------------------------------------------------------------------------------------------ configuration and sources
def with_decoder_of(config: HawkConfig, sources: Sources) -> tuple[HawkConfig, list[str]]:
    """(configuration with the decoder options of --llama, what changed by that)."""
    if sources.llama is None:
        return config, []
    if not Path(sources.llama).is_dir():
        raise ImportFault(f"--llama {sources.llama} is no folder: give the Hugging Face folder with config.json and the weights")
    stated, _ = read_llama_config(sources.llama)
    model = dataclasses.replace(config.model, llama=stated)
    changed = differences(to_dict(config.model.llama), to_dict(stated), "model.llama.")
    return dataclasses.replace(config, model=model), changed


def _sha256(file: Path, bar) -> str:
    hashed = hashlib.sha256()
    with open(file, "rb", buffering=0) as stream:
        while piece := stream.read(CHUNK):
            hashed.update(piece)
            bar.update(len(piece))
    return hashed.hexdigest()


def hash_sources(sources: Sources, expected: Mapping[str, str]) -> dict[str, dict]:
    """{option: {"place", "files": {name: {"bytes", "sha256"}}}}; ImportFault if a hash differs from the one expected.

    expected: {path or name of a file: sha256}.
    """
    files = {option: files_of(place) + ([place / "config.json"] if option == "--llama" else [])
             for option, place in sources.places().items()}
    left, described = set(expected), {}
    total = sum(file.stat().st_size for group in files.values() for file in group)
    with tqdm(total=total, unit="B", unit_scale=True, desc="sha256 of the sources") as bar:
        for option, group in files.items():
            described[option] = {"place": str(sources.places()[option]), "files": {}}
            for file in group:
                found = _sha256(file, bar)
                described[option]["files"][file.name] = {"bytes": file.stat().st_size, "sha256": found}
                for name in {str(file), file.name} & expected.keys():
                    left.discard(name)
                    if expected[name].lower() != found:
                        raise ImportFault(f"{file} has sha256 {found}, expected was {expected[name]}; nothing was written. Get the file "
                                          "again")
    if left:
        raise ImportFault(f"--expect-sha256 {min(left)}: no such file among the sources")
    return described


# ------------------------------------------------------------------------------------------------ leaves
def _split(leaves: Mapping[tuple, Stream], config: HawkConfig) -> tuple[dict, dict]:
    """(trainable, frozen) as {path: leaf}."""
    parts = {True: {}, False: {}}
    for path, leaf in leaves.items():
        parts[freeze.trains(path, config.model)][path] = leaf
    return parts[True], parts[False]


def whole(leaf: Stream) -> np.ndarray:
    """A leaf in memory."""
    values, at = np.empty(leaf.size, leaf.dtype), 0
    for block in leaf.blocks():
        values[at:at + block.size] = block.reshape(-1)
        at += block.size
    return values.reshape(leaf.shape)


def _watched(leaf: Stream, bar) -> Stream:
    def blocks() -> Iterator[np.ndarray]:
        for block in leaf.blocks():
            yield block
            bar.update(block.nbytes)
    return leaf._replace(blocks=blocks)


def _bytes_of(leaves: Mapping[tuple, Stream]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())


def load_foreign(sources: Sources, config: HawkConfig, mesh) -> dict:
    """The frozen tree on a mesh, straight from the files; config must have the decoder's options (`with_decoder_of`).

    One leaf at a time is in this process's memory.  Raises LazyError, KeyTableError or ImportFault for files that do not fit.
    """
    if changed := with_decoder_of(config, sources)[1]:      # heads, eps and rotary base show in no shape
        raise ImportFault(f"the decoder's config.json differs from the configuration: {'; '.join(changed)} (configuration -> there)")
    found, _ = gather(sources, config)
    _, frozen = _split(streams(found, config), config)
    places, values = build.flatten(build.shardings(config.model, mesh, config.mesh.strategy)), {}
    for path, leaf in frozen.items():
        host = whole(leaf)
        # copies: an array on a CPU may otherwise stay a window on parts of this one
        values[path] = jax.make_array_from_callback(leaf.shape, places[path], lambda index, host=host: np.array(host[index]))
    return unflatten_dict(values)


# ------------------------------------------------------------------------------------------------ the command
def _check_run(run: Path | None, trainable: Mapping, sources: Sources) -> None:
    if run is None:
        return
    if not trainable:
        raise ImportFault("--run needs trained values: give --hawk or --video-llama")
    if (run / "checkpoints").exists() and any((run / "checkpoints").iterdir()):
        raise ImportFault(f"{run} has checkpoints already; choose another folder for --run")


def _check_trainable(trainable: Mapping[tuple, Stream], run: Path | None) -> None:
    """Reads every trained value once: a fault in them must show before anything is written."""
    for leaf in trainable.values() if run else ():
        for _ in leaf.blocks():
            pass


def _save_run(config: HawkConfig, trainable: Mapping[tuple, Stream], run: Path, frozen_hash: str) -> Path:
    """A checkpoint at step 0; values that no file holds are the initial ones of run.seed."""
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, folder=str(run)))
    mesh, folder, fresh = make_mesh(config.mesh), run / "checkpoints", not run.exists()
    places = build.flatten(build.shardings(config.model, mesh, config.mesh.strategy))
    params = build.flatten(build.init_params(
        config.model, random_key(config.run.seed, INITIAL), build.shardings(config.model, mesh, config.mesh.strategy),
        wanted=lambda path: freeze.trains(path, config.model) and path not in trainable))
    for path, leaf in trainable.items():
        params[path] = jax.device_put(whole(leaf), places[path])
    try:
        with Checkpoints(config, run) as checkpoints:
            checkpoints.save(init_state(config, mesh, unflatten_dict(params)), 0, frozen_hash)
            checkpoints.wait()
    except BaseException:       # Ctrl-C too
        shutil.rmtree(run if fresh else folder, ignore_errors=True)
        raise
    return folder / "0"


def _casts(found: Mapping, config: HawkConfig) -> dict[str, int]:
    """How many tensors are stored in another dtype than they came in."""
    leaves, counts = build.flatten(build.abstract_params(config.model)), {}
    for entry in table(config.model):
        if entry.key in found and (old := found[entry.key].lazy.dtype.name) != (new := leaves[entry.path].dtype.name):
            counts[f"{old} -> {new}"] = counts.get(f"{old} -> {new}", 0) + 1
    return counts


def import_weights(sources: Sources, config: HawkConfig, out: Path, run: Path | None = None,
                   expected: Mapping[str, str] = {}) -> Imported:  # noqa: B006  (never changed)
    """Writes the frozen tree to `out` and, with `run`, the trained values as checkpoint 0 of that folder.

    expected: {file: sha256}.  Raises LazyError, KeyTableError, FrozenError, CheckpointError or ImportFault, one line each; what was in
    `out` and `run` before is then still there, and nothing else.
    """
    start, out = time.monotonic(), Path(out)
    if not sources.places():
        raise ImportFault("nothing to import: give --eva, --blip2, --llama, --hawk")
    config, changed = with_decoder_of(config, sources)
    check_place(out)
    found, passed = gather(sources, config)
    trainable, frozen = _split(streams(found, config), config)
    _check_run(run, trainable, sources)
    make_mesh(config.mesh)      # refuses a mesh that does not fit before hours of work, not after
    described = hash_sources(sources, expected)
    _check_trainable(trainable, run)
    motion = sources.motion or ("copy" if config.model.qformer_copies == 1 else "from --hawk")
    provenance = {"made_by": "hawk_jax import", "sources": described, "passed_over": passed, "casts": _casts(found, config),
                  "motion_qformer": motion + (" (unverified: see docs/weights.md)" if motion == "seeded" else "")}
    llama = config.model.llama
    decoder = {name: getattr(llama, name) for name in IN_NO_SHAPE} | {"kv_heads": llama.groups}
    notes = _notes(sources, trainable, run, out)
    with tqdm(total=_bytes_of(frozen), unit="B", unit_scale=True, desc="frozen tree") as bar:
        tree = unflatten_dict({path: _watched(leaf, bar) for path, leaf in sorted(frozen.items())})
        frozen_hash = save_frozen(out, tree, provenance, decoder)
    checkpoint = _save_run(config, trainable, Path(run), frozen_hash) if run else None
    return Imported(config, changed, frozen_hash, len(found), _bytes_of(frozen), time.monotonic() - start, passed, provenance["casts"],
                    checkpoint, notes)


def _notes(sources: Sources, trainable: Mapping, run: Path | None, out: Path) -> list[str]:
    """What a person should hear besides what was done."""
    notes = []
    if trainable and run is None:
        notes.append(f"{len(trainable)} trained parameters were NOT kept: give --run FOLDER for them")
    if sources.motion == "seeded":
        notes.append("the motion branch's image Q-Former was drawn from seed 42: unverified, see docs/weights.md")
    if out.exists() and any(out.iterdir()):
        with contextlib.suppress(HawkError):
            notes.append(f"replaced the frozen tree {read_manifest(out)['hash']}: runs that were trained on it no longer find it")
    return notes


def summary(done: Imported, out: Path) -> str:
    """What a person wants to know of an import."""
    lines = [f"taken from the decoder's config.json: {change} (CONFIG -> there)" for change in done.changed]
    lines += [f"passed over in {option}: {len(names)} names, {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
              for option, names in done.passed.items() if names]
    lines += [f"cast {cast}: {count} tensors" for cast, count in done.casts.items()]
    lines.append(f"{done.tensors} tensors, {done.bytes / 1e9:.3f} GB in {done.seconds:.1f} s; frozen tree {done.frozen_hash} in {out}")
    if done.checkpoint:
        lines.append(f"trained values: {done.checkpoint}")
    if done.changed:        # each is `option: old -> new`
        lines.append("set in CONFIG from now on: " + ", ".join(
            f"{option}={new}" for option, _, new in (change.replace(" -> ", ": ").split(": ") for change in done.changed)))
    lines += done.notes
    return "\n".join(lines)
