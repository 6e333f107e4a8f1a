"""Videos to records, beside the loop that anyone would write first."""
import tempfile
from pathlib import Path

import cv2
import numpy as np

from benchmarks import frame, small_world
from data import motion, video
from data.clips import make_record
from data.datasets import read_annotations
from data.motion_text import MotionParser
from hawk_jax.config import PrepareConfig

CLIPS = 8


def plain_loop(path: Path, options: PrepareConfig) -> None:
    """Decode all frames with cv2, resize the sampled ones and their predecessors, Farneback; nothing is stored."""
    capture, raw = cv2.VideoCapture(str(path)), []
    while True:
        ok, picture_HWC = capture.read()
        if not ok:
            break
        raw.append(picture_HWC)
    capture.release()
    square = options.size, options.size
    for n in np.maximum(video.uniform(len(raw), options.frames), 1):
        small = [cv2.cvtColor(cv2.resize(raw[m], square), cv2.COLOR_BGR2GRAY) for m in (n - 1, n)]
        flow_HW2 = cv2.calcOpticalFlowFarneback(*small, None, **motion.FARNEBACK)
        cv2.cartToPolar(flow_HW2[..., 0], flow_HW2[..., 1])[0] > options.mask_threshold  # noqa: B015  (its cost is what counts)


@frame.benchmark("prepare", "videos to records, clips per second; one core, beside a plain decode + resize + Farneback loop of cv2")
def run(folder: Path, repeats: int) -> dict:
    cv2.setNumThreads(1)
    world, paths = small_world.videos(folder / "world", CLIPS)
    entries = [e for e in read_annotations(world) if e.split == "train"]
    parser, figures, ratios = MotionParser("embedded"), {}, {}

    def rate(work, items):
        return lambda: frame.rate(lambda: [work(item) for item in items], len(items))
    for name, options in (("demo", small_world.DEMO), ("224x32", small_world.FULL)):
        samples = frame.interleaved({
            "ours": rate(lambda e, o=options: make_record(e, world, o, parser), entries),
            "plain loop": rate(lambda p, o=options: plain_loop(p, o), paths)}, repeats)
        figures, ratios = (a | b for a, b in zip((figures, ratios), frame.rates(name, samples, "clip", "plain loop")))
    commands = [_command(world) for _ in range(repeats)]
    figures[f"demo, command for {CLIPS + 2} clips"] = frame.figure(commands, "s, all cores, with the start of processes", "lower")
    size = np.mean([p.stat().st_size for p in paths]) / 1024
    return frame.report({"clips": CLIPS, "seconds_per_clip": 5.0, "video": "h264 320x240 15 fps", "KiB_per_clip": round(size, 1)},
                        figures, ratios)


def _command(world: Path) -> float:
    with tempfile.TemporaryDirectory(dir=world.parent) as out:
        # one clip each of validation and test besides
        return frame.seconds(lambda: small_world.prepared(world, Path(out) / "records", small_world.DEMO))
