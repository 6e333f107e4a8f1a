"""One unit file of reference values (a .json, mostly with a .safetensors beside it), and the sheet on which comparisons are written.

Nothing here knows what a unit computes.  Whatever a file lacks, or holds in a form that cannot be used, raises UnitError with one line.
"""
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hawk_jax.config import HawkError

PREFIXES = ("weights/", "inputs/", "outputs/")


class UnitError(HawkError):
    """A file that cannot be verified."""


class Tolerance(NamedTuple):
    measure: str            # function in MEASURES
    bound: float            # an error above it fails
    reason: str


# The one table of tolerances: float32 on a CPU, against float32 values that were summed in another order.
TOLERANCES = {
    "forward": Tolerance("largest", 1e-5, "of the tensor's largest value: sums of some hundred terms in another order are off by 1e-6"),
    "loss": Tolerance("relative", 1e-6, "a mean of float32 logarithms holds seven digits"),
    "cosine": Tolerance("absolute", 1e-6, "1 - cosine subtracts two numbers near 1, so its rounding does not shrink with it"),
    "later loss": Tolerance("relative", 1e-5, "after an update: Adam turns the rounding of small gradients into full steps"),
    "later cosine": Tolerance("absolute", 1e-5, "both reasons"),
    "gradient": Tolerance("l2", 1e-4, "relative L2 of each tensor: backward sums are longer, small entries cancel"),
    "change": Tolerance("l2", 1e-3, "relative L2 of how far the optimiser moved a tensor, where Adam divides by the gradient's own size"),
    "rate": Tolerance("relative", 1e-6, "learning rates are float32 here and float64 there"),
    "exact": Tolerance("differing", 0, "text, indices, masks: equal or wrong"),
    "flow": Tolerance("absolute", 1e-4, "pixels; OpenCV sums in another order on other processors"),
    "resized": Tolerance("absolute", 1e-5 * 255, "grey levels: weights are differences of terms near 3, and eight multiply values of 255"),
    "grey": Tolerance("absolute", 1e-6, "of the range 0..1: a grey level divided by 255 in float32"),
    "scale": Tolerance("absolute", 3e-4, "of a weight as fitted to the outputs (verify_scale.py): rounding moves a clear fit by 1e-4"),
    "buffer": Tolerance("relative", 1e-6, "constants that are stored beside the weights: a float32 power"),
}


# ------------------------------------------------------------------------------------------------ measures
def _divided(error: float, by: float) -> float:
    return error / by if by else (0.0 if error == 0 else np.inf)


def _relative(ours, theirs):
    apart, size = np.abs(ours - theirs), np.abs(theirs)
    return float(np.where(apart == 0, 0, apart / np.where(size == 0, np.finfo(np.float64).tiny, size)).max(initial=0))


MEASURES = {
    "largest": lambda ours, theirs: _divided(float(np.abs(ours - theirs).max(initial=0)), float(np.abs(theirs).max(initial=0))),
    "relative": _relative,
    "absolute": lambda ours, theirs: float(np.abs(ours - theirs).max(initial=0)),
    "l2": lambda ours, theirs: _divided(float(np.linalg.norm(ours - theirs)), float(np.linalg.norm(theirs))),
    "differing": lambda ours, theirs: float((ours != theirs).sum()),
}


class Comparison(NamedTuple):
    tensor: str
    kind: str               # name in TOLERANCES; "left out": said why in the note, not compared
    absolute: float         # largest absolute error
    relative: float         # that, of the largest value
    error: float            # in the measure of the kind
    tolerance: float
    passed: bool
    note: str = ""

    @property
    def excess(self) -> float:
        """How many tolerances off; more than 1 fails.  Exact comparisons: the number of differences."""
        return self.error / self.tolerance if self.tolerance else self.error


# ------------------------------------------------------------------------------------------------ files
class Fields(dict):
    """Named things of a file; a missing one raises UnitError."""

    def __init__(self, values: dict, what: str):
        super().__init__(values)
        self.what = what

    def __missing__(self, name):
        raise UnitError(f"the {self.what} {name} is missing")


class Unit:
    """A unit's configuration `info` and its tensors by prefix; names without it."""

    def __init__(self, name: str, folder: Path, info: dict, tensors: dict[str, np.ndarray]):
        self.name, self.folder, self.info = name, folder, Fields(info, "field")
        self.weights, self.inputs, self.outputs = (
            Fields({k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)}, f"tensor {p}".rstrip("/")) for p in PREFIXES)

    def expect(self, field: str, value) -> None:
        """Raises UnitError where a field of the file says what this project cannot do; an absent one is not a fault."""
        if field in self.info and self.info[field] != value:
            raise UnitError(f"{field} is {json.dumps(self.info[field])}; this project computes with {json.dumps(value)} only")


def read_unit(folder: Path, name: str, with_tensors: bool) -> Unit:
    """NAME.json and, with tensors, NAME.safetensors, which must hold what the JSON lists, no more and no less."""
    info = read_json(folder / f"{name}.json")
    return Unit(name, folder, info, read_tensors(folder, name, info) if with_tensors else {})


def read_json(path: Path) -> dict:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnitError(f"{path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UnitError(f"{path.name} cannot be read: {_line(error)}") from error
    if not isinstance(info, dict):
        raise UnitError(f"{path.name} holds no JSON object")
    return info


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UnitError(f"{path.name} is missing") from None
    # a dtype that numpy lacks is a KeyError or a TypeError, depending on the library's version
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UnitError(f"{path.name} cannot be read, it is damaged or was cut off: {_line(error)}") from error


def read_tensors(folder: Path, name: str, info: dict) -> dict[str, np.ndarray]:
    tensors, listed = load_tensors(folder / f"{name}.safetensors"), Fields(info, "field")["tensors"]
    for key in sorted({*tensors, *listed}):
        if key not in tensors:
            raise UnitError(f"{name}.safetensors lacks {key}, which {name}.json lists")
        if key not in listed or not key.startswith(PREFIXES):
            raise UnitError(f"{name}.safetensors holds {key}, which " + (f"{name}.json does not list" if key not in listed else
                                                                         f"is none of {', '.join(PREFIXES)}"))
        dtype, shape = listed[key]
        if list(tensors[key].shape) != list(shape) or tensors[key].dtype.name != dtype:
            raise UnitError(f"{key} is {tensors[key].dtype} {list(tensors[key].shape)}, {name}.json lists {dtype} {list(shape)}")
    return tensors


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


# ------------------------------------------------------------------------------------------------ the sheet
class Enough(Exception):
    """The first failure, where one is all that was asked for."""


class Sheet:
    """Comparisons of one unit.  Each tensor under outputs/ must be compared or left out for a reason: `close` looks for others."""

    def __init__(self, unit: Unit, first_failure_ends: bool = False):
        self.unit, self.first_failure_ends = unit, first_failure_ends
        self.lines: list[Comparison] = []
        self.seen: set[str] = set()

    def output(self, kind: str, name: str, ours, *, keep=None, note: str = "") -> None:
        """Compares `ours` with outputs/NAME if the file has it; keep: mask of the leading axes, None = all of it."""
        if name not in self.unit.outputs:
            return
        theirs = self.unit.outputs[name]
        self.seen.add(name)
        ours = np.asarray(ours)
        if keep is not None and ours.shape == theirs.shape:
            ours, theirs = ours[keep], theirs[keep]
        self.compare(kind, f"outputs/{name}", ours, theirs, note=note)

    def compare(self, kind: str, tensor: str, ours, theirs, note: str = "") -> None:
        tolerance, ours, theirs = TOLERANCES[kind], np.asarray(ours), np.asarray(theirs)
        if ours.shape != theirs.shape:
            self._add(Comparison(tensor, kind, np.inf, np.inf, np.inf, tolerance.bound, False,
                                 f"shape {list(ours.shape)} here, {list(theirs.shape)} in the file"))
            return
        if kind == "exact":
            absolute = relative = error = MEASURES["differing"](ours, theirs)
        else:
            ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
            with np.errstate(all="ignore"):
                absolute, relative, error = (MEASURES[m](ours, theirs) for m in ("absolute", "largest", tolerance.measure))
        # written so that NaN fails
        self._add(Comparison(tensor, kind, absolute, relative, error, tolerance.bound, bool(error <= tolerance.bound), note))

    def equal(self, what: str, ours, theirs) -> None:
        """Two texts, or lists of numbers, that must be the same."""
        same = ours == theirs
        note = "" if same else _difference(ours, theirs)
        self._add(Comparison(what, "exact", float(not same), float(not same), float(not same), 0.0, same, note))

    def leave_out(self, name: str, why: str) -> None:
        if name in self.unit.outputs:
            self.seen.add(name)
            self._add(Comparison(f"outputs/{name}", "left out", 0.0, 0.0, 0.0, 0.0, True, why))

    def close(self) -> None:
        """Fails for outputs that nothing was compared with."""
        for name in sorted(self.unit.outputs.keys() - self.seen):
            self._add(Comparison(f"outputs/{name}", "exact", np.inf, np.inf, np.inf, 0.0, False, "nothing here computes this output"))
        if not any(line.kind != "left out" for line in self.lines):
            raise UnitError("the file holds nothing that could be compared")

    def _add(self, line: Comparison) -> None:
        self.lines.append(line)
        if self.first_failure_ends and not line.passed:
            raise Enough


def _difference(ours, theirs) -> str:
    """Where two values differ first."""
    if isinstance(ours, list) and isinstance(theirs, list):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        here, there = (_short(x[at]) if at < len(x) else "nothing" for x in (ours, theirs))
        return f"[{at}] is {here} here, {there} in the file"
    return f"{_short(ours)} here, {_short(theirs)} in the file"


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
