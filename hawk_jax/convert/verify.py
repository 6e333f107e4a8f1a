"""`verify`: every file of reference values in a folder against what this project computes, one line each.

A file's kind is told by the `unit` text of its JSON, else by how its name begins; sizes, seeds and tables are read from it.  Whatever
cannot be verified is a failing line with its reason, and the others still run.  docs/verify.md explains the tolerances.
"""
import contextlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax

from hawk_jax.config import HawkError
from hawk_jax.convert import verify_decoder, verify_model, verify_motion, verify_text, verify_whole
from hawk_jax.convert.verify_unit import TOLERANCES, Comparison, Enough, Sheet, Unit, UnitError, read_json, read_unit

WORKERS = 4             # units at once; memory is no matter at the sizes of such files


class Kind(NamedTuple):
    unit: str               # how the text under `unit` begins
    stem: str               # how the file's name begins
    tensors: bool           # whether a .safetensors belongs to it
    verify: object          # function (Unit, Sheet)


KINDS = (
    Kind("EVA ViT", "eva_vit", True, verify_model.verify_vit),
    Kind("image Q-Former", "qformer", True, verify_model.verify_image_qformer),
    Kind("frame position embedding + video Q-Former", "video_qformer", True, verify_model.verify_video_qformer),
    Kind("projection", "projection", True, verify_model.verify_projection),
    Kind("LLaMA decoder", "llama", True, verify_decoder.verify_decoder),
    Kind("full_model", "full_model", True, verify_whole.verify_whole),
    Kind("motion extraction", "farneback", True, verify_motion.verify_motion),
    Kind("clip transforms", "video_transform", True, verify_motion.verify_transforms),
    Kind("learning-rate schedule", "lr_schedule", False, verify_text.verify_schedule),
    Kind("caption cleaning", "caption_cleaning", False, verify_text.verify_captions),
    Kind("motion phrase", "motion_phrases", False, verify_text.verify_phrases),
    Kind("uniform frame sampling", "frame_sampling", False, verify_text.verify_sampling),
    Kind("instruction formatting", "instruct_tokens", False, verify_text.verify_instructions),
    Kind("chat prompt", "chat_prompts", False, verify_text.verify_chat),
)


class Result(NamedTuple):
    """What became of one file."""
    unit: str               # name without ending
    kind: str               # Kind.unit, or ""
    lines: list[Comparison]
    reason: str             # why it could not be verified, or ""
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.reason and all(line.passed for line in self.lines)

    @property
    def worst(self) -> Comparison | None:
        """The comparison nearest to its tolerance, or farthest beyond it."""
        compared = [line for line in self.lines if line.kind != "left out"]
        # a NaN is no number to rank by
        return max(compared, key=lambda line: (not line.passed, line.excess == line.excess and line.excess), default=None)


# ------------------------------------------------------------------------------------------------ one file
def kind_of(name: str, info: dict) -> Kind:
    """By the unit text, else by the name; UnitError where neither is known."""
    text = str(info.get("unit", "")).casefold()
    for kind in KINDS:
        if text.startswith(kind.unit.casefold()):
            return kind
    for kind in KINDS:
        if name.startswith(kind.stem):
            return kind
    raise UnitError(f"no such kind of unit: {info['unit']!r}" if "unit" in info else 'its JSON says no "unit"')


def verify_unit(unit: Unit, kind: Kind, first_failure_ends: bool = False) -> list[Comparison]:
    """Comparisons of one unit in float32 on the CPU.  first_failure_ends: up to the first that fails."""
    sheet = Sheet(unit, first_failure_ends)
    # accelerators round products to fewer digits than the tolerances need
    with jax.default_device(jax.local_devices(backend="cpu")[0]), jax.default_matmul_precision("highest"):
        try:
            kind.verify(unit, sheet)
            sheet.close()
        except Enough:
            pass
    return sheet.lines


def _result(folder: Path, name: str, files: list[str]) -> Result:
    start, kind, lines, reason = time.perf_counter(), None, [], ""
    try:
        if other := [f for f in files if not f.endswith((".json", ".safetensors"))]:
            raise UnitError(f"{other[0]} is neither a .json nor a .safetensors file")
        info = read_json(folder / f"{name}.json")
        kind = kind_of(name, info)
        lines = verify_unit(read_unit(folder, name, kind.tensors), kind)
        if not kind.tensors and len(files) > 1:
            raise UnitError(f"{name}.safetensors belongs to no unit: {kind.unit!r} is JSON alone")
    except HawkError as error:
        reason = str(error)
    except Exception as error:      # a file may be wrong in ways nobody thought of; the others still run
        reason = f"cannot be verified: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return Result(name, kind.unit if kind else "", lines, reason, time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------ a folder
def _is_tokenizer(folder: Path) -> bool:
    return any(f.suffix == ".model" or f.name.startswith("tokenizer") for f in folder.iterdir())


def find(folder: Path) -> dict[str, list[str]]:
    """{unit: its files}; notes (.md) and tokenizers are none, anything else is one, known or not."""
    if not folder.is_dir():
        raise HawkError(f"--goldens {folder}: no such folder")
    units: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix == ".md" or path.name == "README" or (path.is_dir() and _is_tokenizer(path)):
            continue
        known = path.suffix in (".json", ".safetensors") and path.is_file()
        units.setdefault(path.stem if known else path.name, []).append(path.name)
    if not units:
        raise HawkError(f"--goldens {folder} holds no unit files (.json, .safetensors)")
    return units


@contextlib.contextmanager
def _quick_compile():
    """Programs run once here: fewer passes of the compiler halve the time and change sums by a rounding."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _say(line: str) -> None:
    print(line, flush=True)         # one line a minute: a pipe would keep them to the end


def verify(folder: Path, report: Path | None = None, show=_say) -> bool:
    """Verifies every unit in a folder, shows a line for each as it is done, and says whether all passed.

    report: JSON file for every tensor's errors.  Raises HawkError if there is no folder or nothing in it.
    """
    start, units, results = time.perf_counter(), find(folder), []
    width = max(map(len, [*units, "unit"]))
    show(f"{'unit':{width}}  tensors  largest error  relative  tolerance  verdict")
    # compiling takes nearly all of the time, and threads do that at once; those that compile most are begun first
    with _quick_compile(), ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        begun = {name: pool.submit(_result, folder, name, units[name])
                 for name in sorted(units, key=lambda name: -sum((folder / f).stat().st_size for f in units[name] if f.endswith(".json")))}
        for name in units:
            results.append(begun[name].result())
            show(_row(results[-1], width))
    passed = all(r.passed for r in results)
    compared = sum(len(r.lines) for r in results)
    failed = [r.unit for r in results if not r.passed]
    show(f"{len(results)} units, {compared} comparisons, {time.perf_counter() - start:.0f} s: "
         + ("all equal within tolerance" if passed else f"{len(failed)} FAILED: {', '.join(failed)}"))
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(_as_json(folder, results), indent=1))
    return passed


def _row(result: Result, width: int) -> str:
    worst, head = result.worst, f"{result.unit:{width}}  "
    if worst is None:
        return head + f"{'-':>7}  {'-':>13}  {'-':>8}  {'-':>9}  FAILED  {result.reason}"
    tolerance = f"{worst.tolerance:9.0e}" if worst.tolerance else f"{'exact':>9}"
    row = head + f"{len(result.lines):7}  {worst.absolute:13.2g}  {worst.relative:8.2g}  {tolerance}  "
    if result.passed:
        return row + "passed"
    failed = [line for line in result.lines if not line.passed]
    said = result.reason or f"{worst.tensor}" + (f": {worst.note}" if worst.note else "") + (
        f" (and {len(failed) - 1} more)" if len(failed) > 1 else "")
    return row + f"FAILED  {said}"


def _number(x: float):
    """JSON has neither NaN nor infinity."""
    return x if abs(x) < float("inf") else str(x)


def _as_json(folder: Path, results: list[Result]) -> dict:
    def of(result: Result) -> dict:
        return {"unit": result.unit, "kind": result.kind, "passed": result.passed, "reason": result.reason,
                "seconds": round(result.seconds, 3), "worst": result.worst.tensor if result.worst else None,
                "tensors": [{"name": x.tensor, "kind": x.kind, "absolute": _number(x.absolute), "relative": _number(x.relative),
                             "error": _number(x.error), "tolerance": x.tolerance, "passed": x.passed, "note": x.note}
                            for x in result.lines]}
    return {"goldens": str(folder), "passed": all(r.passed for r in results), "jax": jax.__version__,
            "tolerances": {name: t._asdict() for name, t in TOLERANCES.items()}, "units": [of(r) for r in results]}
