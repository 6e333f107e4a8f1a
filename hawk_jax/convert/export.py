"""A run's weights for PyTorch: a Hugging Face folder that answers from a video file, and the authors' own .pth file.

  OUT/config.json, model*.safetensors   encoder and branches under the authors' names; what serves both branches is there once
  OUT/llama/                            the decoder alone, in the names, files and settings of `LlamaForCausalLM`
  OUT/*_hawk.py, preprocessor_config.json, tokenizer.model, README.md      model and processor in plain PyTorch: convert/hf_folder.py
  OUT/hawk.pth                          {"model": 165 tensors} as the authors' code saves and loads them (`pth="full"`: all of them)
  OUT/hawk_config.json, manifest.json   the run's configuration; every file and tensor with its sha256
  OUT/proof.safetensors, PROOF.json     inputs and what JAX made of them; what a fresh process found when it read the folder again
Leaves leave their devices one at a time, on any mesh, on one process or several (process 0 writes).  The folder appears whole and proven
or not at all; one that does not pass is kept as OUT.differs.
"""
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save
from tqdm import tqdm

from hawk_jax.config import HawkConfig, HawkError, ModelConfig, digest, to_dict
from hawk_jax.convert import torch_files
from hawk_jax.convert.blocks import finite
from hawk_jax.convert.expected import EXPECTED, expected_values
from hawk_jax.convert.hf_folder import write_folder
from hawk_jax.convert.keys import TO_TORCH, Entry, buffers, table, to_torch
from hawk_jax.convert.lazy import open_safetensors
from hawk_jax.convert.proof import BYTES_EQUAL, DIFFERS, PROOF, UNPROVEN
from hawk_jax.convert.pth import write_pth
from hawk_jax.models.build import abstract_params, flatten
from hawk_jax.training.frozen import put_in_place

FORMAT = 2              # 1: trainables and encoder in files of their own, no model code
LLAMA = "llama_model."  # prefix of the decoder's names, which its own folder does without
Pth = Literal["released", "full", "none"]


class Written(NamedTuple):
    """One tensor of the folder."""
    entry: Entry
    part: str           # "model" or "llama": which files
    name: str           # in them


# ------------------------------------------------------------------------------------------------ what goes where
def plan(config: ModelConfig) -> tuple[dict[tuple, list[Written]], dict[str, str]]:
    """({path of a leaf: its tensors}, {state-dict name: the name under which its values are written}).

    Two names have one set of values where one copy of the encoder serves both branches.
    """
    leaves, first, alias = {}, {}, {}
    for entry in table(config):
        place = (entry.path, entry.index)
        alias[entry.key] = first.setdefault(place, entry.key)
        if alias[entry.key] == entry.key:
            part = "llama" if entry.path[0] == "llama" else "model"
            leaves.setdefault(entry.path, []).append(Written(entry, part, entry.key.removeprefix(LLAMA)))
    return leaves, alias


def released_names(config: ModelConfig) -> list[str]:
    """State-dict names that the authors' code saves: what trains there (query_tokens_motion by a naming slip), whatever trains here."""
    return [e.key for e in table(config) if e.path[0] in ("video", "motion") or e.key == "query_tokens_motion"]


def to_host(leaf) -> np.ndarray:
    """A whole array in this process's memory.  On several processes all must call it, in the same order."""
    if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    return multihost_utils.process_allgather(leaf, tiled=True)


# ------------------------------------------------------------------------------------------------ writing
class _Weights:
    """model*.safetensors and llama/model*.safetensors of a folder, filled leaf by leaf."""

    def __init__(self, folder: Path, shapes: dict, leaves: dict[tuple, list[Written]], shard_bytes: int):
        self.leaves, self.parts = leaves, {}
        for part in ("model", "llama"):
            specs = {w.name: shapes[w.entry.key] for ws in leaves.values() for w in ws if w.part == part}
            (home := folder if part == "model" else folder / part).mkdir(exist_ok=True)
            self.parts[part] = torch_files.Shards(home, "model", specs, shard_bytes)

    def put(self, path: tuple, leaf: np.ndarray) -> None:
        for w in self.leaves[path]:
            tensor = TO_TORCH[w.entry.kind](leaf[w.entry.index])
            if not finite(tensor):
                raise HawkError(f"{w.entry.key} ({'/'.join(path)}) holds values that are not finite: such weights are not exported; "
                                "go back to an earlier checkpoint")
            self.parts[w.part].put(w.name, tensor)

    def abandon(self) -> None:
        for part in self.parts.values():
            part.abandon()

    def close(self) -> dict[str, dict]:
        for part in self.parts.values():
            part.close()
        return {name: dict(part.described) for name, part in self.parts.items()}


def _write_weights(folder: Path | None, params: dict, config: ModelConfig, shard_bytes: int) -> dict[str, dict]:
    """{part: {tensor: description}}; folder None (processes other than the first): takes part in gathering only."""
    leaves, _ = plan(config)
    flat, shapes = flatten(params), jax.eval_shape(lambda p: to_torch(p, config), params)
    weights = failure = None
    with tqdm(total=sum(leaf.nbytes for leaf in flat.values()), unit="B", unit_scale=True, desc="weights", disable=folder is None) as bar:
        for path in leaves:
            host = to_host(flat[path])
            try:
                if folder and failure is None:
                    weights = weights or _Weights(folder, shapes, leaves, shard_bytes)
                    weights.put(path, host)
            except Exception as error:
                failure = error
                if jax.process_count() == 1:    # else the others wait for this one at the next leaf
                    break
            bar.update(host.nbytes)
    if failure is not None:
        if weights:
            weights.abandon()
        raise failure
    return weights.close() if weights else {}


def _write_pth(folder: Path, config: ModelConfig, which: Pth, described: dict[str, dict]) -> dict[str, dict]:
    """Writes hawk.pth from the safetensors files beside it; {tensor: description}."""
    opened = {part: {} for part in described}
    for part, home in (("model", folder), ("llama", folder / "llama")):
        for file in sorted(home.glob("model*.safetensors")):
            opened[part] |= open_safetensors(file)
    _, alias = plan(config)
    names = list(alias) if which == "full" else released_names(config)
    tensors, found = {}, {}
    for name in names:
        part = "llama" if name.startswith(LLAMA) else "model"
        source = alias[name].removeprefix(LLAMA)
        tensors[name] = opened[part][source]
        found[name] = {k: described[part][source][k] for k in ("dtype", "shape", "sha256")}
    constants = buffers(config)
    write_pth(folder / "hawk.pth", {"model": tensors | constants})
    return found | {name: torch_files.describe_array(value) for name, value in constants.items()}


def _write_all(folder: Path | None, params: dict, config: HawkConfig, expected: dict, pth: Pth, shard_bytes: int) -> None:
    described = _write_weights(folder, params, config.model, shard_bytes)
    if folder is None:
        return
    if pth != "none":
        described["pth"] = _write_pth(folder, config.model, pth, described)
    (folder / EXPECTED).write_bytes(save({name: np.ascontiguousarray(value) for name, value in expected.items()}))
    write_folder(folder, config)
    (folder / "hawk_config.json").write_text(json.dumps(to_dict(config), indent=1))
    files = torch_files.describe(folder, (f for f in folder.rglob("*") if f.is_file()))
    manifest = {"format": FORMAT, "names": "state dict of the authors' PyTorch code", "config_digest": digest(config), "files": files,
                "tensors": described}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


# ------------------------------------------------------------------------------------------------ the command
def is_export(folder: Path) -> bool:
    """Whether a folder holds an export.  A frozen tree has a manifest of the same name, and must not be replaced."""
    try:
        return {"format", "files"} <= json.loads((folder / "manifest.json").read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _check(params: dict, config: HawkConfig, out: Path) -> None:
    for folder in (out, aside(out, DIFFERS), aside(out, UNPROVEN)):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not is_export(folder):
            raise HawkError(f"{folder} exists and holds no export; name another folder")
    if missing := sorted(flatten(abstract_params(config.model)).keys() - flatten(params).keys()):
        raise HawkError(f"the parameters lack {'/'.join(missing[0])} and {len(missing) - 1} more: an export needs the whole model")


def aside(out: Path, verdict: str) -> Path:
    """Where a folder that did not pass its proof is left."""
    return out.with_name(f"{out.name}.{verdict}")


def prove_afresh(folder: Path, compute: bool) -> dict:
    """PROOF.json of a folder, made by a process that knows nothing of this one; {"verdict": ...} at least."""
    # the accelerator is this process's; transformers must not go looking in the network or in copies of another folder's code
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    for name in [n for n in environment if n.startswith(("JAX_COORDINATOR", "JAX_NUM_PROC", "JAX_PROCESS_ID", "SLURM_STEP", "OMPI_"))]:
        del environment[name]
    command = [sys.executable, "-m", "hawk_jax.convert.proof", str(folder.resolve()), *([] if compute else ["--bytes"])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          cwd=Path(__file__).parents[2])
    try:
        return json.loads((folder / PROOF).read_text())
    except (OSError, ValueError):
        why = f"ended with status {done.returncode} (-9: probably out of memory; --proof bytes computes nothing)"
        return {"verdict": UNPROVEN, "differences": [f"the process that reads it again {why} {done.stdout.strip()[-300:]}"]}


def export(params: dict, config: HawkConfig, out: Path, *, mesh=None, pth: Pth = "released",
           shard_bytes: int = torch_files.SHARD_BYTES, compute: bool = True) -> str:
    """Writes a whole parameter tree to `out`, proves what was written, and returns lines that say what that was.

    params: tree of arrays on `mesh` (None: one device, or numpy).  compute=False: only bytes are compared, even where torch is installed,
    which at 7B needs some 30 GB of memory.  An earlier export in `out` is replaced at the end.  Raises HawkError if `out` holds anything
    else, the tree is incomplete or not finite, the disk is full, what was read back differs (the folder is then at OUT.differs), or it
    could not be read to the end (OUT.unproven).  On several processes every one must call it, and all see the same files.
    """
    out, first = Path(out), jax.process_index() == 0
    new, outcome = out.with_name(f".{out.name}.writing"), []

    def begin():
        _check(params, config, out)
        with _to(out):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
    _together(begin, first)
    expected = expected_values(params, config.model, config.prepare.size, mesh, config.mesh.strategy)

    def work():
        try:
            with _to(out):
                _write_all(new if first else None, params, config, expected, pth, shard_bytes)
                if first:
                    outcome.append(_finish(new, out, compute))
        finally:
            if first:
                shutil.rmtree(new, ignore_errors=True)
    _together(work, True)
    return outcome[0] if first else ""


@contextlib.contextmanager
def _to(out: Path):
    """Whatever the machine refuses as one line."""
    try:
        yield
    except OSError as error:
        raise HawkError(f"the export could not be written to {out} ({error.strerror or error}); nothing was left there") from error


def _together(work, here: bool) -> None:
    """work() on this process if `here`; raises on every process if it failed on the first one."""
    failure = None
    try:
        if here:
            work()
    except Exception as error:      # of any kind: the others would wait for this process
        failure = error
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failure is not None)))
        if failed and failure is None:
            failure = HawkError("the export failed on process 0, which says why")
    if failure is not None:
        raise failure


def _finish(new: Path, out: Path, compute: bool) -> str:
    """Proves the folder and puts it in place; what to tell a person."""
    manifest = json.loads((new / "manifest.json").read_text())
    proof, count = prove_afresh(new, compute), sum(map(len, manifest["tensors"].values()))
    if (verdict := proof["verdict"]) in (DIFFERS, UNPROVEN):
        put_in_place(new, place := aside(out, verdict))
        what = "what was written does not read back equal" if verdict == DIFFERS else "what was written is not proven"
        raise HawkError(f"{what}: {proof['differences'][0]}; the folder is kept as {place}")
    replaced = out.exists()
    put_in_place(new, out)
    for old in (aside(out, DIFFERS), aside(out, UNPROVEN)):
        shutil.rmtree(old, ignore_errors=True)          # of an earlier attempt
    files = [f for f in out.rglob("*") if f.is_file()]
    size = sum(f.stat().st_size for f in files)
    instead = ", in place of an earlier export" if replaced else ""
    lines = [f"{count} tensors in {len(files)} files, {size / 1e6:.1f} MB, in {out}{instead}", f"proof: {verdict}"]
    if verdict == BYTES_EQUAL:
        lines.append(f"where torch and transformers are installed: python -m hawk_jax prove {out}")
    return "\n".join(lines)
