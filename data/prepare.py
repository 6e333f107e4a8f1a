"""`prepare`: videos and annotations -> a data set of records, over processes, resumable, the same for any number of workers.

Which clip goes where is decided by sha256(source) alone: shard = hash modulo `prepare.shards`, order inside a shard = by hash.  Processes
make clips in any order (data/shards.py); a last step writes what tfds needs to open the data set.
"""
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import tensorflow_datasets as tfds
from tqdm import tqdm

from data import motion
from data.datasets import Entry, read_annotations
from data.pool import Crash, work
from data.records import FORMAT, NAME, VERSION, RecordError, check_prepared, features, hash_of, read_json, read_manifest, shard_path
from data.retry import reopen
from data.shards import MakeClip, MakeShard, Rejected, Worker, WorkFolder, read_rejected, write_atomic, write_rejected
from hawk_jax.config import HawkConfig, HawkError, PrepareConfig, differences, digest, to_dict

# what write_atomic and the writer of a shard leave when they are killed; nothing else in --out is ours to delete
LEFT_OVERS = ("prepare.json.*.tmp", "rejected.jsonl.*.tmp", "texts_*.jsonl.*.tmp", f"{NAME}/{VERSION}/incomplete.*")
NO_TRACE = ("place", "empty_pairs")             # fields of an entry that no record depends on
Shards = dict[tuple[str, int], list[Entry]]     # (split, shard) -> its entries in order


def prepare(*, videos: Path, annotations: Path, out: Path, spacy: str, config: HawkConfig, workers: int | None = None,
            split: str | None = None, retry_rejected: bool = False, flow: Callable = motion.farneback, progress: bool = True) -> dict:
    """Prepares a data set, or goes on with one, and prints a table.  Returns the summary that the table shows.

    `split` names the split of entries that name none; `workers` = processes (None: all cores); `flow` = signature of `motion.farneback`;
    `retry_rejected`: when all is done, clips whose process died or that met an unexpected error are made again.
    HawkError if annotations are malformed, the configuration differs from that of `out`, the disk is full, or no clip can be used.
    """
    started, settings, out = time.time(), config.prepare, Path(out)
    if not Path(videos).is_dir():
        raise HawkError(f"--videos {videos} is not a folder")
    entries = read_annotations(Path(annotations), split, settings.validation_share)
    shards = plan(entries, settings.shards)
    identity = _identity(settings, spacy, shards, flow)

    def finish():
        _make(shards, WorkFolder(out), workers, progress, (out, Path(videos), settings, spacy, flow))
        _write_metadata(shards, out, settings, identity)
    try:
        with _only_one(out):
            if not _finished(out, settings, identity):
                finish()
            elif not retry_rejected:
                print(f"{out} is complete already; to prepare it again delete it")
            if retry_rejected and reopen(shards, WorkFolder(out), settings.shards, identity):
                finish()
    except KeyboardInterrupt:
        raise HawkError(f"interrupted; finished clips are kept in {out}: run the same command to go on") from None
    summary = _summary(out) | {"empty_pairs": sum(e.empty_pairs for e in entries), "seconds": time.time() - started}
    print(table(summary))
    if not summary["clips"]:
        raise HawkError(f"no clip of {annotations} could be used, see {out}/rejected.jsonl; is --videos {videos} the folder "
                        "that the paths in the annotations start from?")
    return summary


def plan(entries: list[Entry], shards: int) -> Shards:
    """Which entries make up each shard of each split, in order."""
    placed: Shards = {(split, shard): [] for split in sorted({e.split for e in entries}) for shard in range(shards)}
    keyed = sorted((hashlib.sha256(e.source.encode()).hexdigest(), i) for i, e in enumerate(entries))
    for key, i in keyed:
        placed[entries[i].split, int(key, 16) % shards].append(entries[i])
    return placed


def _identity(config: PrepareConfig, spacy: str, shards: Shards, flow: Callable) -> dict:
    """What a data set is made from.  Work begun with another identity is not continued."""
    from data.motion_text import MotionParser
    entries = [{k: v for k, v in asdict(e).items() if k not in NO_TRACE} for listed in shards.values() for e in listed]
    return {"prepare": json.loads(json.dumps(to_dict(config))), "phrases": MotionParser(spacy).describe(),
            "annotations_sha256": hashlib.sha256(json.dumps(entries).encode()).hexdigest(), "flow": f"{flow.__module__}.{flow.__name__}"}


@contextmanager
def _only_one(out: Path):
    """Holds the data set's lock; waits for worker processes that outlived a killed run, and removes what they left half written."""
    folder = WorkFolder(out).root
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock, workers = open(folder / "lock", "w"), open(folder / "workers.lock", "w")
    except OSError as error:
        raise HawkError(f"--out {out} cannot be written: {error.strerror}") from error
    with lock, workers:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HawkError(f"another prepare is writing to {out}") from None
        fcntl.flock(workers, fcntl.LOCK_EX)         # they end after the clip they are at
        fcntl.flock(workers, fcntl.LOCK_UN)
        for left in (p for pattern in LEFT_OVERS for p in out.glob(pattern)):
            left.unlink()
        yield
    if (out / "prepare.json").exists():
        shutil.rmtree(folder, ignore_errors=True)


def _finished(out: Path, config: PrepareConfig, identity: dict) -> bool:
    """Whether `out` is complete.  HawkError if it, or work begun in it, has another identity."""
    begun, made_from = WorkFolder(out).root / "identity.json", {"prepare", "phrases", "annotations_sha256", "flow"}
    complete = (out / "prepare.json").exists()
    if complete:
        check_prepared(out, config)
        held = read_json(out / "prepare.json", made_from)
    else:
        held = read_json(begun, made_from)
    if held is None:
        write_atomic(begun, json.dumps(identity).encode())
        return False
    for key, what in (("prepare", "prepare options"), ("phrases", "language pipeline (--spacy)"), ("annotations_sha256", "annotations"),
                      ("flow", "flow function")):
        if held[key] != identity[key]:
            change = "; ".join(differences({key: held[key]}, {key: identity[key]}))
            raise RecordError(f"{out} was begun with other {what} (then -> now): {change}; choose another --out or delete it")
    return complete


# ------------------------------------------------------------------------------------------------ work
def _make(shards: Shards, folder: WorkFolder, workers: int | None, progress: bool, arguments: tuple) -> None:
    """Makes every clip and shard that is not there yet."""
    open_shards = {key: entries for key, entries in shards.items() if not shard_path(folder.out, *key, arguments[2].shards).exists()}
    todo = {key: _missing(key, entries, folder) for key, entries in open_shards.items()}
    tasks = deque(task for key in todo for task in (todo[key] or [MakeShard(*key, len(open_shards[key]))]))
    clips, missing = sum(map(len, shards.values())), sum(map(len, todo.values()))
    if not tasks:
        return
    left, rejected = {key: len(t) for key, t in todo.items()}, 0
    crew = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    with tqdm(total=clips, initial=clips - missing, unit="clip", desc="prepare", disable=not progress, dynamic_ncols=True) as bar:
        for task, result in work(tasks, crew, Worker, arguments):
            if isinstance(result, Crash):
                result = _after_crash(task, result, folder)
            if isinstance(task, MakeShard):
                continue
            key = task.split, task.shard
            left[key] -= 1
            if not left[key]:
                tasks.appendleft(MakeShard(*key, len(open_shards[key])))
            rejected += isinstance(result, Rejected)
            bar.set_postfix(rejected=rejected, refresh=False)
            bar.update()


def _missing(key: tuple[str, int], entries: list[Entry], folder: WorkFolder) -> list[MakeClip]:
    done = {p.name for p in folder.clips(*key).glob("*")}
    return [MakeClip(*key, i, entry) for i, entry in enumerate(entries) if folder.clip(*key, i).name not in done]


def _after_crash(task: MakeClip | MakeShard, crash: Crash, folder: WorkFolder) -> Rejected:
    if isinstance(task, MakeShard):
        raise HawkError(f"shard {task.shard} of split {task.split} cannot be written: its process died twice ({crash.cause})")
    path = folder.clip(task.split, task.shard, task.position)
    return write_rejected(path, task.entry.source, f"process died: {crash.cause}, twice (--retry-rejected tries again)")


# ------------------------------------------------------------------------------------------------ the last step
def _write_metadata(shards: Shards, out: Path, config: PrepareConfig, identity: dict) -> None:
    """Text files, what tfds needs, and last prepare.json, which says that the data set is complete."""
    folder, rejected, hashes, splits, infos = WorkFolder(out), [], {}, {}, []
    for split in sorted({split for split, _ in shards}):
        rows = [[json.loads(line) for line in open(folder.summary(split, shard))] for shard in range(config.shards)]
        rejected += [row for shard in rows for row in shard if "reason" in row]
        kept = [[row for row in shard if "reason" not in row] for shard in rows]
        flat = [row for shard in kept for row in shard]
        size = sum(row.pop("bytes") for row in flat)
        write_atomic(out / f"texts_{split}.jsonl", "".join(f"{json.dumps(row)}\n" for row in flat).encode())
        hashes[split] = [row["content_hash"] for row in flat]
        splits[split] = {"clips": len(flat), "bytes": size, "hash": hash_of({split: hashes[split]})}
        if flat:
            infos.append(_split_info(out, split, [len(shard) for shard in kept], size))
        else:                   # tfds has no splits without records, and refuses a folder with files of one
            for shard in range(config.shards):
                shard_path(out, split, shard, config.shards).unlink(missing_ok=True)
    write_atomic(out / "rejected.jsonl", "".join(f"{json.dumps(row)}\n" for row in rejected).encode())
    if infos:
        tfds.folder_dataset.write_metadata(
            data_dir=out / NAME / VERSION, features=features(config), split_infos=infos, version=VERSION, check_data=False,
            description="Video clips with motion masks and texts, for hawk_jax.",
            metadata=tfds.core.MetadataDict(prepare=identity["prepare"], digest=digest(config)))
    manifest = identity | {"format": FORMAT, "digest": digest(config), "splits": splits, "rejected": len(rejected), "hash": hash_of(hashes)}
    write_atomic(out / "prepare.json", json.dumps(manifest, indent=1).encode())


def _split_info(out: Path, split: str, lengths: list[int], size: int) -> tfds.core.SplitInfo:
    template = tfds.core.ShardedFileTemplate(data_dir=str(out / NAME / VERSION), dataset_name=NAME, split=split,
                                             filetype_suffix="array_record")
    return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)


def _summary(out: Path) -> dict:
    manifest = read_manifest(out)
    reasons = Counter(row["reason"].partition(":")[0] for row in read_rejected(out))
    return {"clips": sum(s["clips"] for s in manifest["splits"].values()), "splits": {n: s["clips"] for n, s in manifest["splits"].items()},
            "rejected": manifest["rejected"], "reasons": dict(reasons.most_common()), "phrases": manifest["phrases"],
            "bytes": sum(p.stat().st_size for p in out.rglob("*") if p.is_file()), "hash": manifest["hash"]}


def table(summary: dict) -> str:
    """The summary as lines for people."""
    rows = [("clips", summary["clips"]), *((f"  {split}", n) for split, n in summary["splits"].items()), ("rejected", summary["rejected"]),
            *((f"  {reason}", n) for reason, n in summary["reasons"].items()),
            *([("empty question-answer pairs", f"{n}, left out")] if (n := summary["empty_pairs"]) else []),
            ("phrases by", summary["phrases"]), ("seconds", f"{summary['seconds']:.1f}"), ("bytes", f"{summary['bytes']:,}"),
            ("hash", summary["hash"])]
    return "\n".join(f"{name:32} {value}" for name, value in rows)
