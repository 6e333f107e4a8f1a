"""Where `prepare` keeps unfinished work, and how it becomes shards.  What a worker process runs.

Below OUT/.work: one folder per shard with one file per finished clip (record or reason), written under another name and renamed; when all
clips of a shard are there they become its ArrayRecord file and a line each in its summary, and the folder goes.  So at most the clips that
are being made are lost when everything dies, and any process can make any clip.
"""
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
from array_record.python import array_record_module

from data import motion
from data.clips import make_record
from data.datasets import Entry
from data.records import RecordError, example, features, read_manifest, shard_path, text_row
from data.video import BadClip, is_passing
from hawk_jax.config import HawkError, PrepareConfig

GROUPS = "group_size:1"         # one record a group: random access, as tfds writes it


class MakeClip(NamedTuple):
    """Task: the record of one entry, as clip number `position` of a shard."""
    split: str
    shard: int
    position: int
    entry: Entry


class MakeShard(NamedTuple):
    """Task: the file of a shard whose `clips` clips are done."""
    split: str
    shard: int
    clips: int


class Rejected(NamedTuple):
    video: str
    reason: str


@dataclass(frozen=True)
class WorkFolder:
    """Paths of unfinished work of the data set `out`."""
    out: Path

    @property
    def root(self) -> Path:
        return self.out / ".work"

    def clips(self, split: str, shard: int) -> Path:
        return self.root / f"{split}-{shard:05d}"

    def clip(self, split: str, shard: int, position: int) -> Path:
        return self.clips(split, shard) / f"{position:07d}"

    def summary(self, split: str, shard: int) -> Path:
        return self.root / f"{split}-{shard:05d}.jsonl"


def write_atomic(path: Path, *parts: bytes) -> None:
    """Writes a file that is either whole or not there, also after a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: Exception) -> HawkError:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    what = "the disk is full" if full else f"cannot be written ({' '.join(str(error).split())[:200]})"
    return HawkError(f"{path}: {what}; finished clips are kept: run the same command again when there is room")


def _machine_failed(source: str, error: Exception) -> HawkError:
    what = getattr(error, "strerror", None) or "out of memory"
    return HawkError(f"{source}: {what}; that is the machine and not the clip, which is not rejected. Finished clips are kept: run the "
                     "same command again, with fewer --workers if memory or open files ran out; a clip that never gets through can be "
                     "moved out of the video folder")


class Worker:
    """The function of a worker process: makes a clip or a shard, answers with Rejected or None."""

    def __init__(self, out: Path, videos: Path, config: PrepareConfig, spacy: str, flow: Callable = motion.farneback):
        from data.motion_text import MotionParser
        cv2.setNumThreads(1)            # clips run in parallel
        self.folder, self.videos, self.config, self.flow = WorkFolder(out), videos, config, flow
        self.features, self.parser = features(config), MotionParser(spacy)
        # held until this process is gone, so that the next `prepare` can wait for those that outlived a killed parent
        self._lock = open(self.folder.root / "workers.lock", "w")
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def __call__(self, task: MakeClip | MakeShard) -> Rejected | None:
        return self.clip(task) if isinstance(task, MakeClip) else self.shard(task)

    def clip(self, task: MakeClip) -> Rejected | None:
        path = self.folder.clip(task.split, task.shard, task.position)
        if not task.entry.description.strip() and not task.entry.questions:
            return write_rejected(path, task.entry.source, "no text: neither a description nor a question with its answer")
        try:
            record = make_record(task.entry, self.videos, self.config, self.parser, self.flow)
            stored = self.features.serialize_example(example(record))
        except BadClip as fault:
            return write_rejected(path, task.entry.source, str(fault))
        except HawkError:
            raise
        except Exception as error:      # one clip never stops the run; the reason says what it was
            if is_passing(error):       # but on another machine, or tomorrow, this clip would be good
                raise _machine_failed(task.entry.source, error) from error
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return write_rejected(path, task.entry.source, f"unexpected error: {what}")
        write_atomic(path, json.dumps(text_row(record)).encode(), b"\n", stored)
        return None

    def shard(self, task: MakeShard) -> None:
        """Clips in order of position -> ArrayRecord file and summary.  The file comes last: where it is, all is."""
        path = shard_path(self.folder.out, task.split, task.shard, self.config.shards)
        temporary = path.with_name(f"incomplete.{os.getpid()}.{path.name}")
        rows, sizes = [], []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            writer = array_record_module.ArrayRecordWriter(str(temporary), GROUPS)
            for position in range(task.clips):
                head, _, stored = self.folder.clip(task.split, task.shard, position).read_bytes().partition(b"\n")
                if stored:
                    writer.write(stored)
                rows.append(json.loads(head))
                sizes.append(len(stored))
            writer.close()
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            write_atomic(self.folder.summary(task.split, task.shard), summary_lines(rows, sizes))
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:        # the writer raises RuntimeError
            temporary.unlink(missing_ok=True)
            raise _cannot_write(path, error) from error
        shutil.rmtree(self.folder.clips(task.split, task.shard), ignore_errors=True)


def summary_lines(rows: list[dict], sizes: list[int]) -> bytes:
    """The summary of a shard: what is written of each clip, and the bytes of its record, 0 without one."""
    return "".join(json.dumps(row | ({"bytes": size} if size else {})) + "\n" for row, size in zip(rows, sizes)).encode()


def write_rejected(path: Path, source: str, reason: str) -> Rejected:
    write_atomic(path, json.dumps({"video": source, "reason": reason}).encode(), b"\n")
    return Rejected(source, reason)


def read_rejected(out: Path) -> list[dict]:
    """The lines of rejected.jsonl of a complete data set."""
    try:
        rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        if len(rows) != read_manifest(out)["rejected"]:
            raise ValueError("it has another number of lines than prepare.json says")
        return [{"video": row["video"], "reason": row["reason"]} for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RecordError(f"{out}/rejected.jsonl is missing or damaged; delete the data set and prepare it again") from error
