"""Whether an exported folder is what was exported: read again by a process that knows nothing of the one that wrote it.

    python -m hawk_jax prove FOLDER        (`export` runs it by itself, as python -m hawk_jax.convert.proof FOLDER)

Always: every file's sha256, every tensor's name, dtype, shape and bytes, read back with the safetensors library.  Where torch and
transformers are installed: the folder opened as a user would, with AutoModel, in float32; visual tokens, logits and 32 greedy tokens
for random clips and prompts against JAX's, which the folder keeps in proof.safetensors; hawk.pth read by torch.load; vision.pt2 made,
read back and compared.  The result is PROOF.json in the folder.
"""
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from hawk_jax.config import HawkError
from hawk_jax.convert import torch_files
from hawk_jax.convert.expected import CLIPS, EXPECTED
from hawk_jax.convert.hf_folder import AUTO_MAP, CODE
from hawk_jax.convert.pth import open_pth

PROOF, GRAPH = "PROOF.json", "vision.pt2"
EQUAL, BYTES_EQUAL, DIFFERS, UNPROVEN = "equal", "bytes equal; nothing was computed", "differs", "unproven"
# float32 on both sides, sums in another order; the authors' modules in float32 and float64 are 1e-6 apart over 3 layers, and rounding
# grows about with the root of the depth: 39 + 12 + 2 + 32 layers
TOLERANCE = 2e-5


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
    ours, theirs = ({str(file.relative_to(home)): file.read_bytes() for file in home.rglob("*.py")} for home in (CODE, folder))
    lines = [f"{name} is not what this version of hawk_jax writes: it is not run" for name in sorted(ours.keys() | theirs.keys())
             if ours.get(name) != theirs.get(name)]
    # transformers runs what `auto_map` names, which may lie anywhere
    for file, expected in (("config.json", AUTO_MAP), ("llama/config.json", None)):
        try:
            named = json.loads((folder / file).read_text()).get("auto_map")
        except (OSError, ValueError, AttributeError) as error:
            named = f"{type(error).__name__}: {error}"
        if named != expected:
            lines.append(f"{file} names other code than this version of hawk_jax does: nothing is run")
    return lines


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
        model.llama_model.generation_config.eos_token_id = None     # all of them, past an end symbol too
        ids_RN = model.llama_model.generate(inputs_embeds=x_RSD, attention_mask=ones_RS, max_new_tokens=count, do_sample=False,
                                            pad_token_id=0)
    errors = [_error(name, value, values[f"jax/{name}"]) for name, value in
              (*zip(("visual_BQD", "video_BQZ", "motion_BQZ"), seen), ("logits_RSV", logits_RSV))]
    lines += [f"{e['name']} differs from JAX's by {e['relative']:.1e} of its largest value (tolerance {e['tolerance']:.0e})"
              for e in errors if not e["relative"] <= e["tolerance"]]
    equal = int((ids_RN == values["jax/greedy_RN"]).sum()) if ids_RN.shape[1] == count else 0
    if equal != CLIPS * count:
        lines.append(f"greedy tokens: {equal} of {CLIPS * count} equal JAX's")
    report = {"forward": errors, "greedy": {"tokens": CLIPS * count, "equal": equal}}
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
    """Reads vision.pt2 (torch.export of the vision side) and compares; makes it first where it is missing."""
    from hawk_jax.convert.vision_graph import check_vision, export_vision
    made = not (folder / GRAPH).is_file()
    if made:
        export_vision(folder)
    error = check_vision(folder)
    lines = [] if error <= TOLERANCE else [f"{GRAPH} differs from the model by {error:.1e} of its largest value"]
    file = torch_files.describe(folder, [folder / GRAPH])[GRAPH]
    return {GRAPH: {"made": made, "relative": error, "tolerance": TOLERANCE, **file}}, lines


class Asked(NamedTuple):
    """What `evaluate` asked about one video, and what JAX said."""
    video: Path
    questions: list[str | None]
    said: list[str]


def read_asked(evaluation: Path, videos: Path) -> list[Asked]:
    """The rows of outputs.jsonl in `evaluation`; sources start from `videos`.  Raises HawkError for what is not there."""
    try:
        rows = [json.loads(line) for line in (evaluation / "outputs.jsonl").read_text().splitlines()]
        asked = [Asked(videos / row["source"], [None, *(a["question"] for a in row["answers"])],
                       [row["description"], *(a["answer"] for a in row["answers"])]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HawkError(f"--evaluation {evaluation} is not what `evaluate` wrote (outputs.jsonl: {type(error).__name__} "
                        f"{error})") from error
    if not asked:
        raise HawkError(f"--evaluation {evaluation}: outputs.jsonl is empty, nothing would be asked")
    if missing := [one.video for one in asked if not one.video.exists()]:
        raise HawkError(f"--videos {videos} lacks {missing[0].relative_to(videos)} and {len(missing) - 1} more of {len(asked)} videos; "
                        "name the folder that the annotations' paths start from")
    return asked


def check_answers(folder: Path, asked: list[Asked]) -> tuple[dict, list[str]]:
    """Asks the folder's model what `evaluate` asked JAX's, from the video files themselves; texts must be the same word for word."""
    from transformers import AutoModel
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="float32", local_files_only=True).eval()
    texts, equal, lines = 0, 0, []
    for video, questions, said in tqdm(asked, desc="asking", unit="clip"):
        for question, theirs, ours in zip(questions, said, model.generate(str(video), questions), strict=True):
            texts, equal = texts + 1, equal + (theirs == ours)
            if theirs != ours and not lines:
                lines.append(f"{video}, {question or 'description'}: JAX said {theirs!r}, the folder says {ours!r}")
    computed = json.loads((folder / "hawk_config.json").read_text())["model"]["compute_dtype"]
    found = {"texts": texts, "equal": equal, "distinct": len({t for one in asked for t in one.said}), "evaluated_in": computed}
    # bfloat16 rounds otherwise in every program: some texts then part at a near tie, which is no fault of the folder
    return {"answers": found}, lines if computed == "float32" else []


# ------------------------------------------------------------------------------------------------ together
def _installed(*names: str) -> bool:
    try:
        return all(importlib.import_module(name) for name in names)
    except ImportError:
        return False


def _manifest(folder: Path) -> dict:
    if not folder.is_dir():
        raise HawkError(f"{folder}: no such folder")
    if not (folder / "manifest.json").is_file():
        raise HawkError(f"{folder} is not an export: it has no manifest.json (folders of save_pretrained cannot be proven)")
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"], manifest["tensors"]["model"], manifest["tensors"]["llama"]
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HawkError(f"{folder} is not an export of this version (manifest.json: {type(error).__name__} {error}); "
                        "export again") from error


def _earlier(folder: Path) -> dict:
    """PROOF.json as it is, {} without one."""
    try:
        found = json.loads((folder / PROOF).read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _check_graph_file(folder: Path, earlier: dict) -> list[str]:
    """vision.pt2 against what an earlier proof made."""
    known = earlier.get(GRAPH, {})
    if "sha256" not in known or not (folder / GRAPH).is_file() or torch_files.sha256(folder / GRAPH) == known["sha256"]:
        return []
    return [f"{GRAPH} is not the file that was proven (sha256 differs); delete it and prove again, where torch is installed"]


def prove(folder: Path, evaluation: Path | None = None, videos: Path | None = None, compute: bool = True) -> dict:
    """Makes PROOF.json and writes it.  Raises HawkError if the folder is no export of this version, or there is nothing to ask about.

    evaluation, videos: as in `read_asked`; without them no questions are asked.  compute=False: bytes only, as without torch.  Where
    nothing can be computed for want of torch, or nothing was asked, what an earlier proof of the same files found stays.
    """
    folder, start = Path(folder), time.perf_counter()
    manifest, asked, earlier = _manifest(folder), read_asked(evaluation, videos) if evaluation else [], _earlier(folder)
    counts, lines = check_bytes(folder, manifest)
    lines = lines or check_code(folder) or _check_graph_file(folder, earlier)
    # what is known of the graph outlives a proof that did not come to it: else the next one would take another file for it
    report, computed = {"bytes": counts} | {key: value for key, value in earlier.items() if key == GRAPH}, False
    if not lines and compute and _installed("torch", "transformers"):
        computed = True
        from transformers.utils import logging
        logging.disable_progress_bar()
        checks = [lambda: check_values(folder, manifest), lambda: check_graph(folder)]
        for check in [*checks, lambda: check_answers(folder, asked)] if asked else checks:
            try:
                found, wrong = check()
            except Exception as error:      # whatever torch or transformers raise: the folder does not open
                found, wrong = {}, [f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"]
            report, lines = report | found, lines + wrong
    verdict = DIFFERS if lines else EQUAL if computed else BYTES_EQUAL
    packages = {name: version(name) for name in ("numpy", "safetensors", "torch", "transformers") if _installed(name)}
    proof = {"verdict": verdict, "differences": lines, **report, "seconds": round(time.perf_counter() - start, 1),
             "versions": {"python": platform.python_version(), **packages}, "machine": platform.machine(),
             "again": "python -m hawk_jax prove FOLDER"}
    if verdict == EQUAL and earlier.get("verdict") == EQUAL:
        proof = {key: value for key, value in earlier.items() if key == "answers"} | proof
    if verdict != BYTES_EQUAL or earlier.get("verdict") != EQUAL:
        (folder / PROOF).write_text(json.dumps(proof, indent=1) + "\n")
    return proof


def report_text(proof: dict) -> str:
    """What a person reads of a proof."""
    rows = [f"{'read back':28} {', '.join(f'{n} {what}' for what, n in proof['bytes'].items()) or 'no'}"]
    rows += [f"{e['name']:28} {e['relative']:.1e} of the largest value (tolerance {e['tolerance']:.0e})" for e in proof.get("forward", [])]
    if greedy := proof.get("greedy"):
        rows.append(f"{'greedy tokens':28} {greedy['equal']} of {greedy['tokens']} equal")
    if graph := proof.get(GRAPH):
        made = "made here, " if graph["made"] else ""
        rows.append(f"{GRAPH:28} {made}{graph['relative']:.1e} of the largest value (tolerance {graph['tolerance']:.0e})")
    if answers := proof.get("answers"):
        rows.append(f"{'answers from video files':28} {answers['equal']} of {answers['texts']} word for word, {answers['distinct']} "
                    "distinct" + (f" (evaluated in {t}: some may differ)" if (t := answers["evaluated_in"]) != "float32" else ""))
    return "\n".join([*rows, *proof["differences"], f"verdict: {proof['verdict']}"])


def prove_here(folder: Path, *asked) -> dict:
    """`prove` in a process that did not import transformers before: it copies a folder's code, here to a place that goes away."""
    with tempfile.TemporaryDirectory() as modules:
        os.environ |= {"HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}
        return prove(folder, *asked)


if __name__ == "__main__":
    sys.exit(prove_here(Path(sys.argv[1]), None, None, "--bytes" not in sys.argv[2:])["verdict"] == DIFFERS)
