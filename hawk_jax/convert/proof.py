"""Whether an exported folder is what was exported: read again by a process that knows nothing of the one that wrote it.

    python -m hawk_jax prove FOLDER        (`export` runs it by itself, as python -m hawk_jax.convert.proof FOLDER)

Always: every file's sha256, every tensor's name, dtype, shape and bytes, read back with the safetensors library.  Where torch and
transformers are installed: the folder opened as a user would, with AutoModel, in float32; visual tokens, logits and 32 greedy tokens
for random clips and prompts against JAX's, which the folder keeps in proof.safetensors; hawk.pth read by torch.load; vision.pt2 made,
read back and compared.  The result is PROOF.json in the folder.
"""
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from data.text import EOS
from hawk_jax.config import HawkError, ModelConfig
from hawk_jax.convert import torch_files
from hawk_jax.convert.hf_folder import CODE
from hawk_jax.convert.pth import open_pth
from hawk_jax.inference.decode import Prompts, greedy_ids
from hawk_jax.mesh import replicated, use
from hawk_jax.models.build import bind

EXPECTED, PROOF = "proof.safetensors", "PROOF.json"
EQUAL, TORCH_ABSENT, DIFFERS = "equal", "bytes equal; no torch here, so nothing was computed", "differs"
CLIPS, FRAMES, WORDS, NEW = 2, 4, 12, 32
# float32 on both sides, sums in another order; the authors' modules in float32 and float64 are 1e-6 apart over 3 layers, and rounding
# grows about with the root of the depth: 39 + 12 + 2 + 32 layers
TOLERANCE = 2e-5


# ------------------------------------------------------------------------------------------------ what JAX makes of it
def random_inputs(config: ModelConfig, size: int) -> dict[str, np.ndarray]:
    """Clips, masks and prompts of random words, from a fixed seed; prompts hold all visual tokens."""
    draw, queries = np.random.default_rng(20241), config.video_qformer.queries
    times = min(FRAMES, config.frame_positions)
    words = min(WORDS, config.llama.max_positions - 2 * queries - 2)
    tokens_RS = np.zeros((CLIPS, 1 + 2 * queries + words), np.int64)
    tokens_RS[:, 0], tokens_RS[:, 1 + 2 * queries:] = 1, draw.integers(3, config.llama.vocab, (CLIPS, words))
    slots_RS = np.full(tokens_RS.shape, -1)
    slots_RS[:, 1:1 + 2 * queries] = np.arange(2 * queries)
    return {"frames_BTHWC": draw.integers(0, 256, (CLIPS, times, size, size, 3), np.uint8),
            "masks_BTHW": draw.integers(0, 256, (CLIPS, times, size, size), np.uint8), "tokens_RS": tokens_RS, "slots_RS": slots_RS}


def expected_values(params: dict, config: ModelConfig, size: int, mesh=None, strategy: str = "replicated") -> dict[str, np.ndarray]:
    """`random_inputs` and JAX's results: visual_BQD, video_BQZ, motion_BQZ, logits_RSV, greedy_RN, all computed in float32.

    Parameters keep their dtype where they lie and are widened layer by layer.  size: side of the pictures in pixels.
    """
    wide = dataclasses.replace(config, frozen_dtype="float32", compute_dtype="float32", remat="none")
    inputs = random_inputs(config, size)
    narrow = {k: v.astype(np.int32) if v.dtype == np.int64 else v for k, v in inputs.items()}
    new = min(NEW, config.llama.max_positions - inputs["tokens_RS"].shape[1])
    with use(mesh, strategy) if mesh is not None else contextlib.nullcontext(), jax.default_matmul_precision("highest"):
        outputs = _program(wide, new, replicated(mesh) if mesh is not None else None)(params, narrow)
    return inputs | {f"jax/{name}": np.asarray(value.addressable_data(0)) for name, value in outputs.items()}


@functools.lru_cache(8)
def _program(config: ModelConfig, new_tokens: int, place):
    """The jitted f(params, inputs) -> results of `expected_values`, each whole on every device of `place`."""
    def run(params, inputs):
        model, tokens_RS = bind(config, params), inputs["tokens_RS"]
        whole_B4 = np.tile(np.float32([0, 0, 1, 1]), (CLIPS, 1))
        tokens = model.image_tokens({"frames_BTHWC": inputs["frames_BTHWC"], "mask_BTHW": inputs["masks_BTHW"], "crop_B4": whole_B4})
        visual_BQD, video_BQZ, motion_BQZ = model.branch_tokens(*tokens)
        clip_RS = np.broadcast_to(np.arange(CLIPS)[:, None], tokens_RS.shape)
        x_RSD = model.embed_rows({"tokens_RS": tokens_RS, "slot_RS": inputs["slots_RS"], "clip_RS": clip_RS}, visual_BQD)
        ones_RS, position_RS = np.ones(tokens_RS.shape, np.int32), np.broadcast_to(np.arange(tokens_RS.shape[1]), tokens_RS.shape)
        logits_RSV = model.llama.logits(model.llama.hidden(x_RSD, ones_RS, position_RS))
        prompts = Prompts(x_RSD, ones_RS > 0, np.full(CLIPS, tokens_RS.shape[1], np.int32))
        return {"visual_BQD": visual_BQD, "video_BQZ": video_BQZ, "motion_BQZ": motion_BQZ, "logits_RSV": logits_RSV,
                "greedy_RN": greedy_ids(model.llama, prompts, new_tokens, (EOS,))}
    return jax.jit(run, out_shardings=place)


# ------------------------------------------------------------------------------------------------ bytes
def _read(file: Path) -> dict[str, dict]:
    """{tensor: description} of a safetensors file, by the safetensors library."""
    try:
        with safe_open(file, framework="numpy") as opened:
            return {name: torch_files.describe_array(opened.get_tensor(name)) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise HawkError(f"{file.name} cannot be read as safetensors: {error}") from error


def _compare(kind: str, here: dict, there: dict) -> list[str]:
    lines = [f"{kind}: {name} is {'missing' if name in there else 'not announced'}" for name in sorted(here.keys() ^ there.keys())]
    return lines + [f"{kind}: {name} is {here[name]}, written was {there[name]}" for name in sorted(here.keys() & there.keys())
                    if here[name] != there[name]]


def check_bytes(folder: Path, manifest: dict) -> tuple[dict, list[str]]:
    """({what was compared: how many}, differences)."""
    try:
        torch_files.check(folder, manifest["files"])
        found = {"model": {}, "llama": {}}
        for part, home in (("model", folder), ("llama", folder / "llama")):
            for file in sorted(home.glob("model*.safetensors")):
                found[part] |= _read(file)
        if "pth" in manifest["tensors"]:
            read = open_pth(folder / "hawk.pth")["model"]
            found["pth"] = {name: torch_files.describe_array(tensor.read()) for name, tensor in read.items()}
        lines = [line for part in found for line in _compare(part, found[part], manifest["tensors"][part])]
    except HawkError as error:
        return {}, [str(error)]
    counts = {"files": len(manifest["files"]), "tensors": len(found["model"]) + len(found["llama"])}
    return counts | ({"tensors in hawk.pth": len(found["pth"])} if "pth" in found else {}), lines


def check_code(folder: Path) -> list[str]:
    """What will be run must be the code that this version writes, not whatever lies in the folder."""
    ours, theirs = ({file.name: file.read_bytes() for file in home.glob("*.py")} for home in (CODE, folder))
    return [f"{name} is not what this version of hawk_jax writes: it is not run" for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)]


# ------------------------------------------------------------------------------------------------ values
def _error(name: str, ours, theirs) -> dict:
    """Largest difference, absolute and of the largest value."""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    apart = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
    return {"name": name, "absolute": apart, "relative": apart / float(np.abs(theirs).max()), "tolerance": TOLERANCE}


def check_values(folder: Path, manifest: dict) -> tuple[dict, list[str]]:
    """Opens the folder with transformers and compares with JAX's values; needs torch."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel
    values, lines = load_file(folder / EXPECTED), []
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        seen = model.vision(values["frames_BTHWC"], values["masks_BTHW"])
        ones_RS = torch.ones_like(values["tokens_RS"])
        x_RSD = model.embed(values["tokens_RS"], values["slots_RS"], seen.visual_BQD)
        logits_RSV = model.llama_model(inputs_embeds=x_RSD, attention_mask=ones_RS).logits
        count = values["jax/greedy_RN"].shape[1]
        ids_RN = model.llama_model.generate(inputs_embeds=x_RSD, attention_mask=ones_RS, max_new_tokens=count, do_sample=False,
                                            eos_token_id=2, pad_token_id=0)
    errors = [_error(name, value, values[f"jax/{name}"]) for name, value in
              (*zip(("visual_BQD", "video_BQZ", "motion_BQZ"), seen), ("logits_RSV", logits_RSV))]
    lines += [f"{e['name']} differs from JAX's by {e['relative']:.1e} of its largest value (tolerance {e['tolerance']:.0e})"
              for e in errors if not e["relative"] <= e["tolerance"]]
    ids_RN = torch.nn.functional.pad(ids_RN, (0, count - ids_RN.shape[1]))
    equal = int((ids_RN == values["jax/greedy_RN"]).sum())
    if equal != ids_RN.numel():
        lines.append(f"greedy tokens: {ids_RN.numel() - equal} of {ids_RN.numel()} differ from JAX's")
    report = {"forward": errors, "greedy": {"tokens": ids_RN.numel(), "equal": equal}}
    if "pth" in manifest["tensors"]:
        read = torch.load(folder / "hawk.pth", map_location="cpu", weights_only=True)["model"]
        lines += _compare("hawk.pth", {name: _described(tensor) for name, tensor in read.items()}, manifest["tensors"]["pth"])
        report["pth"] = {"tensors": len(read)}
    return report, lines


def _described(tensor) -> dict:
    """`describe_array` of a torch tensor; numpy has no bfloat16, so bytes are looked at as integers."""
    import torch
    array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
    return torch_files.describe_array(array) | {"dtype": str(tensor.dtype).removeprefix("torch.")}


def check_graph(folder: Path) -> tuple[dict, list[str]]:
    """Makes vision.pt2 (torch.export of the vision side), reads it back and compares."""
    from hawk_jax.convert.vision_graph import check_vision, export_vision
    file = export_vision(folder)
    error = check_vision(folder)
    lines = [] if error <= TOLERANCE else [f"{file.name} differs from the model by {error:.1e} of its largest value"]
    return {"vision.pt2": {"relative": error, "tolerance": TOLERANCE, "bytes": file.stat().st_size}}, lines


def check_answers(folder: Path, evaluation: Path, videos: Path) -> tuple[dict, list[str]]:
    """Asks the folder's model what `evaluate` asked JAX's, from the video files themselves; texts must be the same word for word.

    evaluation: folder with outputs.jsonl; videos: folder that its sources start from.
    """
    from transformers import AutoModel
    try:
        rows = [json.loads(line) for line in (evaluation / "outputs.jsonl").read_text().splitlines()]
        asked = [(row["source"], [None, *(a["question"] for a in row["answers"])],
                  [row["description"], *(a["answer"] for a in row["answers"])])
                 for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HawkError(f"{evaluation} is not what `evaluate` wrote (outputs.jsonl: {type(error).__name__} {error})") from error
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="float32", local_files_only=True).eval()
    texts, equal, lines = 0, 0, []
    for source, questions, expected in tqdm(asked, desc="asking", unit="clip"):
        for question, said, says in zip(questions, expected, model.generate(str(videos / source), questions)):
            texts, equal = texts + 1, equal + (said == says)
            if said != says and not lines:
                lines.append(f"{source}, {question or 'description'}: JAX said {said!r}, the folder says {says!r}")
    return {"answers": {"texts": texts, "equal": equal, "different ones": len({t for *_, expected in asked for t in expected})}}, lines


# ------------------------------------------------------------------------------------------------ together
def _installed(*names: str) -> bool:
    try:
        return all(importlib.import_module(name) for name in names)
    except ImportError:
        return False


def prove(folder: Path, evaluation: Path | None = None, videos: Path | None = None) -> dict:
    """Makes and writes PROOF.json.  Raises HawkError if the folder is no export of this version.

    evaluation, videos: as in `check_answers`; without them no questions are asked.
    """
    folder, start = Path(folder), time.perf_counter()
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"], manifest["tensors"]["model"], manifest["tensors"]["llama"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HawkError(f"{folder} is not an export of this version (manifest.json: {type(error).__name__} {error}); "
                        "export again") from error
    counts, lines = check_bytes(folder, manifest)
    report, computed, lines = {"bytes": counts}, False, lines or check_code(folder)
    if not lines and _installed("torch", "transformers"):
        computed = True
        checks = [lambda: check_values(folder, manifest), lambda: check_graph(folder)]
        for check in [*checks, lambda: check_answers(folder, evaluation, videos)] if evaluation else checks:
            try:
                found, wrong = check()
            except HawkError:
                raise
            except Exception as error:      # whatever torch or transformers raise: the folder does not open
                found, wrong = {}, [f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"]
            report, lines = report | found, lines + wrong
    verdict = DIFFERS if lines else EQUAL if computed else TORCH_ABSENT
    packages = {name: version(name) for name in ("numpy", "safetensors", "torch", "transformers") if _installed(name)}
    proof = {"verdict": verdict, "differences": lines, **report, "seconds": round(time.perf_counter() - start, 1),
             "versions": {"python": platform.python_version(), **packages}, "machine": platform.machine(),
             "again": "python -m hawk_jax prove FOLDER"}
    (folder / PROOF).write_text(json.dumps(proof, indent=1))
    return proof


def report_text(proof: dict) -> str:
    """What a person reads of a proof."""
    rows = [f"{'read back':28} {', '.join(f'{n} {what}' for what, n in proof['bytes'].items())}"]
    rows += [f"{e['name']:28} {e['relative']:.1e} of the largest value (tolerance {e['tolerance']:.0e})" for e in proof.get("forward", [])]
    if greedy := proof.get("greedy"):
        rows.append(f"{'greedy tokens':28} {greedy['equal']} of {greedy['tokens']} equal")
    if answers := proof.get("answers"):
        rows.append(f"{'answers from video files':28} {answers['equal']} of {answers['texts']} word for word")
    if graph := proof.get("vision.pt2"):
        rows.append(f"{'vision.pt2':28} {graph['relative']:.1e} of the largest value (tolerance {graph['tolerance']:.0e})")
    return "\n".join([*rows, *proof["differences"], f"verdict: {proof['verdict']}"])


def prove_here(folder: Path, *asked) -> dict:
    """`prove` in a process that did not import transformers before: it copies a folder's code, here to a place that goes away."""
    with tempfile.TemporaryDirectory() as modules:
        os.environ |= {"HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}
        return prove(folder, *asked)


if __name__ == "__main__":
    sys.exit(prove_here(Path(sys.argv[1]))["verdict"] == DIFFERS)
