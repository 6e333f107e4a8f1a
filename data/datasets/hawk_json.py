"""The authors' annotation form (hawk.md 5.1): a JSON list of {"video", "QA": [{"q", "a"}], "description"}.

Two optional keys are ours: "split", and "fps" for a video that is a folder of pictures.
"""
import json
import math
from pathlib import Path

from data.datasets import AnnotationError, Entry, split_name, text


def read(file: Path) -> list[Entry]:
    """Entries of one file.  AnnotationError names the entry, counted from 0."""
    try:
        items = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{file} is not JSON: {error}") from error
    except OSError as error:
        raise AnnotationError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(items, list):
        raise AnnotationError(f"{file}: expected a list of entries, got {type(items).__name__}")
    return [_entry(item, f"{file}, entry {number}") for number, item in enumerate(items)]


def _entry(item, place: str) -> Entry:
    if not isinstance(item, dict):
        raise AnnotationError(f"{place}: expected an object, got {type(item).__name__}")
    for key in ("video", "description", "QA"):
        if key not in item:
            raise AnnotationError(f"{place}: {key!r} is missing")
    source = text(item["video"], "'video'", place)
    every = _pairs(item["QA"], f"{place} ({source})")
    pairs = [(q, a) for q, a in every if q and a]
    return Entry(source=source, description=text(item["description"], "'description'", place, empty=True),
                 questions=tuple(q for q, _ in pairs), answers=tuple(a for _, a in pairs),
                 split=split_name(item.get("split"), place), fps=_fps(item.get("fps"), place), place=place,
                 empty_pairs=len(every) - len(pairs))


def _pairs(value, place: str) -> list[tuple[str, str]]:
    """Every pair without the white space around it, empty ones too."""
    if not isinstance(value, list):
        raise AnnotationError(f"{place}: 'QA' must be a list, got {type(value).__name__}")
    for number, pair in enumerate(value):
        if not isinstance(pair, dict) or not {"q", "a"} <= pair.keys():
            raise AnnotationError(f"{place}: 'QA' number {number} must be an object with 'q' and 'a'")
    return [tuple(text(pair[key], f"{key!r} of pair {n}", place, empty=True).strip() for key in "qa") for n, pair in enumerate(value)]


def _fps(value, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise AnnotationError(f"{place}: 'fps' must be a positive number, got {value!r}")
    return float(value)
