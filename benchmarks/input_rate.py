"""Records to batches: threads, no threads, and a plain loop over the same records."""
import itertools
from pathlib import Path

import cv2
import numpy as np

from benchmarks import frame, small_world
from data.records import open_split
from data.stream import Input
from hawk_jax.config import HawkConfig

CLIPS, BATCH = 12, 4
THREADS = (0, 1, 2, 4)


def stream_rate(config: HawkConfig) -> frame.Rate:
    """Of clips of a running stream; what threads had ready before is not counted."""
    with Input(config).train_batches() as batches:
        for _ in range(1 + max(config.input.threads, config.input.buffer)):
            next(batches)
        return frame.rate(lambda: next(batches), BATCH)


def plain_rate(records: Path) -> frame.Rate:
    """Of clips for which we read a record, decode the view's JPEGs in turn and unpack the mask: no text, no crop, no batch."""
    source, numbers = open_split(records, "train"), itertools.count()

    def clip() -> None:
        record = source[next(numbers) % len(source)]
        for position in record.view_VT[0]:
            cv2.imdecode(np.frombuffer(record.frames[position], np.uint8), cv2.IMREAD_COLOR_RGB)
        np.unpackbits(record.mask_bits_NHW8[record.view_VT[0]], axis=-1)
    clip()
    return frame.rate(clip, 1)


@frame.benchmark("input", "records to batches, clips per second of one host by threads, beside a plain loop that only decodes")
def run(folder: Path, repeats: int) -> dict:
    world, _ = small_world.videos(folder / "world", CLIPS)
    figures, ratios = {}, {}
    for name, options in (("demo", small_world.DEMO), ("224x32", small_world.FULL)):
        out = folder / name
        small_world.prepared(world, out, options)
        works = {f"{t} threads": lambda t=t, o=out, p=options: stream_rate(small_world.reading(o, p, clips=BATCH, threads=t))
                 for t in THREADS}
        samples = frame.interleaved(works | {"plain loop": lambda o=out: plain_rate(o)}, repeats)
        figures, ratios = (a | b for a, b in zip((figures, ratios), frame.rates(name, samples, "clip", "plain loop")))
        speeds = {who: [r.per_second for r in values] for who, values in samples.items()}
        ratios[f"{name}, 2 threads against none"] = frame.ratio(speeds, "2 threads", "0 threads")
    return frame.report({"clips": CLIPS, "batch": BATCH, "demo": "8 frames of 112 pixels",
                         "224x32": "32 frames of 224 pixels"}, figures, ratios)
