"""Annotations of any supported form -> one list of entries.  A reader per form; none opens a video.

  hawk_json   the authors' JSON: [{"video", "QA": [{"q", "a"}], "description"}], with an optional "split" and "fps" (folders of frames)
  webvid_csv  WebVid: columns videoid, page_dir, name
  synthetic   the folder that `render` writes: annotations_SPLIT.json, the authors' form
"""
import hashlib
import posixpath
import re
from dataclasses import dataclass, replace
from pathlib import Path

from hawk_jax.config import HawkError

# what a file name may end in, before its suffix: annotations_train.json, all_videos_test.json
SPLIT_ENDINGS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
                 "test": "test", "testing": "test"}


class AnnotationError(HawkError):
    """Annotations that cannot be used: names file and entry."""


@dataclass(frozen=True)
class Entry:
    """One annotated clip.  `split` None: the annotations do not say."""
    source: str                     # path of the video below the video folder
    description: str
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    split: str | None = None
    fps: float | None = None        # frames per second of a folder of pictures; None: 1
    clip: str = ""                  # the source, with #2, #3, ... where it occurs again
    place: str = ""                 # file and entry, for messages
    empty_pairs: int = 0            # questions without answer or the reverse, left out


def read_annotations(path: Path, split: str | None = None, validation_share: float = 0.0) -> list[Entry]:
    """Entries of a file or of all files of a folder, each with a name and a split of its own.

    The split is the entry's own, else `split`, else what the file's name ends in, else "train"; in the last case a share of the sources,
    chosen by their hash, becomes "validation".  AnnotationError for anything malformed, or for a source in two splits.
    """
    from data.datasets import hawk_json, synthetic, webvid_csv
    path, split = Path(path), split_name(split, "--split")
    if not path.exists():
        raise AnnotationError(f"no annotations at {path}")
    readers = {".json": hawk_json.read, ".csv": webvid_csv.read}
    files = synthetic.files(path) or (sorted(p for p in path.iterdir() if p.suffix in readers) if path.is_dir() else [path])
    if not files:
        raise AnnotationError(f"no annotations in {path}: expected .json or .csv files")
    entries = []
    for file in files:
        if file.suffix not in readers:
            raise AnnotationError(f"{file}: expected a .json or .csv file")
        entries += [_with_split(entry, split or _split_of(file), validation_share) for entry in readers[file.suffix](file)]
    if not entries:
        raise AnnotationError(f"{path} has no entries")
    _no_leak(entries)
    return _named(entries)


def _split_of(file: Path) -> str | None:
    return SPLIT_ENDINGS.get(file.stem.rpartition("_")[2].lower())


def _with_split(entry: Entry, split: str | None, validation_share: float) -> Entry:
    if entry.split or split:
        return replace(entry, split=entry.split or split)
    draw = int(hashlib.sha256(f"validation|{entry.source}".encode()).hexdigest()[:13], 16) / 16 ** 13
    return replace(entry, split="validation" if draw < validation_share else "train")


def _no_leak(entries: list[Entry]) -> None:
    first: dict[str, Entry] = {}
    for entry in entries:
        other = first.setdefault(posixpath.normpath(entry.source), entry)     # ./a.mp4 is a.mp4
        if other.split != entry.split:
            raise AnnotationError(f"video {entry.source} is in split {other.split} ({other.place}) and in split {entry.split} "
                                  f"({entry.place}): what is learned would leak into the test; keep one of them")


def _named(entries: list[Entry]) -> list[Entry]:
    seen: dict[str, int] = {}
    named = []
    for entry in entries:
        seen[entry.source] = number = seen.get(entry.source, 0) + 1
        named.append(replace(entry, clip=entry.source if number == 1 else f"{entry.source}#{number}"))
    return named


def split_name(value, place: str) -> str | None:
    """`value` if it can name a split: it becomes part of file names, and tfds keeps "all" for itself."""
    if value is not None and not (isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_]+", value) and value != "all"):
        raise AnnotationError(f"{place}: 'split' must be a word of letters, digits and _ (and not 'all'), got {value!r}")
    return value


def text(value, what: str, place: str, empty: bool = False) -> str:
    """`value` if it is a text that UTF-8 can hold, else AnnotationError."""
    if not isinstance(value, str):
        raise AnnotationError(f"{place}: {what} must be a text, got {type(value).__name__}")
    if not value.strip() and not empty:
        raise AnnotationError(f"{place}: {what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise AnnotationError(f"{place}: {what} holds half a surrogate pair at position {error.start}") from error
    return value
