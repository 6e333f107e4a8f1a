"""WebVid captions: CSV with the columns videoid, page_dir, name; the video is page_dir/videoid.mp4 (hawk.md 5.1)."""
import csv
from pathlib import Path

from data.datasets import AnnotationError, Entry, text

COLUMNS = ("videoid", "page_dir", "name")


def read(file: Path) -> list[Entry]:
    """Entries of one file.  AnnotationError names the line."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, strict=True)
            missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
            if missing:
                raise AnnotationError(f"{file}: column {missing[0]!r} is missing; there is: {', '.join(reader.fieldnames or ['nothing'])}")
            return [_entry(row, f"{file}, line {reader.line_num}") for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise AnnotationError(f"{file} is not CSV in UTF-8: {error}") from error
    except OSError as error:
        raise AnnotationError(f"{file} cannot be read: {error.strerror}") from error


def _entry(row: dict, place: str) -> Entry:
    video, page, name = (text(row[c], f"column {c!r}", place, empty=c != "videoid") for c in COLUMNS)
    return Entry(source=f"{page}/{video}.mp4" if page else f"{video}.mp4", description=name, place=place)
