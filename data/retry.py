"""`prepare --retry-rejected`: a complete data set becomes unfinished work again, without the clips that the machine may have spoiled."""
import json
from collections.abc import Iterator
from pathlib import Path

from array_record.python import array_record_module

from data.datasets import Entry
from data.records import open_split, read_manifest, shard_path
from data.shards import WorkFolder, read_rejected, summary_lines, write_atomic

SPOILED = ("process died", "unexpected error")      # kinds of reasons that need not be the clip's fault


def reopen(shards: dict[tuple[str, int], list[Entry]], folder: WorkFolder, count: int, identity: dict) -> bool:
    """Puts the records of shards with spoiled clips back as finished clips, and removes those shards; `count`: shards of a split.

    False if no clip is spoiled; then nothing is done.  A kill leaves the complete data set or work that any `prepare` finishes.
    """
    rows = _rows(shards, folder.out)
    spoiled = [key for key, listed in rows.items() if any(map(_is_spoiled, listed))]
    if not spoiled:
        return False
    write_atomic(folder.root / "identity.json", json.dumps(identity).encode())
    for key, listed in rows.items():
        records = _records(shard_path(folder.out, *key, count))
        sizes = []
        for position, row in enumerate(listed):
            record = b"" if "reason" in row else next(records)
            sizes.append(len(record))
            if key in spoiled and not _is_spoiled(row):
                write_atomic(folder.clip(*key, position), json.dumps(row).encode(), b"\n", record)
        write_atomic(folder.summary(*key), summary_lines(listed, sizes))
    (folder.out / "prepare.json").unlink()
    for key in spoiled:
        shard_path(folder.out, *key, count).unlink()
    return True


def _is_spoiled(row: dict) -> bool:
    return row.get("reason", "").partition(":")[0] in SPOILED


def _rows(shards: dict[tuple[str, int], list[Entry]], out: Path) -> dict[tuple[str, int], list[dict]]:
    """What is written of each entry: the line of texts_SPLIT.jsonl or of rejected.jsonl, which has the same order."""
    texts, rejected = {}, iter(read_rejected(out))
    for split, held in read_manifest(out)["splits"].items():
        if held["clips"]:
            open_split(out, split)          # refuses shards and texts that do not belong together
        lines = (out / f"texts_{split}.jsonl").read_text().splitlines()
        texts[split] = {row["clip"]: row for row in map(json.loads, lines)}
    return {(split, shard): [texts[split].get(entry.clip) or next(rejected) for entry in entries]
            for (split, shard), entries in shards.items()}


def _records(path: Path) -> Iterator[bytes]:
    reader = array_record_module.ArrayRecordReader(str(path))
    for _ in range(reader.num_records()):
        yield reader.read()
    reader.close()
