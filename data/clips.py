"""One clip -> one Record.  Everything about a clip happens here, in whichever process; who calls it, and when, changes nothing."""
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np

from data import motion, video
from data.datasets import Entry
from data.records import Record, content_hash
from hawk_jax.config import PrepareConfig, digest

FLOW_CHUNK = 32         # pairs per call of the flow function: bounds memory, 13 MB of f32 flow at 224 pixels


class _Frames(NamedTuple):
    """What one pass over a video keeps."""
    count: int
    times: list[float | None]               # of every frame
    size: tuple[int, int]                   # width, height of the first frame
    jpeg: dict[int, bytes]                  # by raw frame number, of the wanted frames
    gray: dict[int, np.ndarray]             # u8 [S, S], of wanted frames and their predecessors


def make_record(entry: Entry, videos: Path, config: PrepareConfig, parser, flow: Callable = motion.farneback) -> Record:
    """The record of an entry.  `parser`: a MotionParser; `flow`: signature of `motion.farneback`.  Raises BadClip."""
    source = video.open_source(video.locate(videos, entry.source), entry.fps, config.max_pixels)
    content = source.content_hash()
    frames, (view_VT, motion_view_VT) = _read(source, content, config)
    first_motion = min(1, frames.count - 1)
    number_N = np.unique(np.concatenate([view_VT.ravel(), motion_view_VT.ravel(), [first_motion]])).astype(np.int32)
    bits_NHW8, magnitude_NHW, flow_max_N = _masks(frames, number_N, config, flow)
    times, fps = _clock(frames.times, source.fps)
    phrases, direct = parser.phrases(entry.description)
    record = Record(
        clip=entry.clip, source=entry.source, split=entry.split, content_hash="",
        frames=[frames.jpeg[n] for n in number_N.tolist()], frame_index_N=number_N, times_N=times[number_N],
        mask_bits_NHW8=bits_NHW8, magnitude_NHW=magnitude_NHW, flow_max_N=flow_max_N,
        view_VT=np.searchsorted(number_N, view_VT).astype(np.int32),
        motion_view_VT=np.searchsorted(number_N, motion_view_VT).astype(np.int32),
        first_motion=int(np.searchsorted(number_N, first_motion)), fps=fps, raw_frames=frames.count,
        width=frames.size[0], height=frames.size[1], description=entry.description, questions=list(entry.questions),
        answers=list(entry.answers), phrases=list(phrases), direct_phrases=list(direct),
        provenance=_provenance(content, source.faults, parser, config))
    return replace(record, content_hash=content_hash(record))


def _read(source, content: str, config: PrepareConfig) -> tuple[_Frames, tuple[np.ndarray, np.ndarray]]:
    """Decodes with the number of packets as expected length; if another number of frames comes out, once more with that number."""
    expected = source.expected_frames()
    for _ in range(2):
        if expected > config.max_frames:
            raise video.BadClip(f"too long: more than {config.max_frames} frames")
        sets = video.frame_sets(max(expected, 1), config.frames, config.views, config.view_seed, content)
        frames = _decode(source, np.unique(np.concatenate([s.ravel() for s in sets])), config)
        if not frames.count:
            raise video.BadClip("no frame can be decoded")
        if frames.count == expected:
            return frames, sets
        expected = frames.count
    raise video.BadClip("cannot be decoded: two passes gave different numbers of frames")


def _decode(source, wanted: np.ndarray, config: PrepareConfig) -> _Frames:
    """One pass in order.  Frames 0 and 1 are wanted always: their flow is that of frame 0, their mask that of `first_motion`."""
    keep = {*wanted.tolist(), 0, 1}
    times, size, jpeg, gray = [], (0, 0), {}, {}
    for number, frame in enumerate(source.frames()):
        if number >= config.max_frames:
            raise video.BadClip(f"too long: more than {config.max_frames} frames")
        size = size if number else (frame.width, frame.height)
        times.append(frame.time)
        if number in keep or number + 1 in keep:
            picture_HWC = video.resize(frame.pixels(), config.size)
            gray[number] = motion.gray(picture_HWC)
            if number in keep:
                jpeg[number] = _jpeg(picture_HWC, config.jpeg_quality)
    return _Frames(len(times), times, size, jpeg, gray)


def _jpeg(picture_HWC: np.ndarray, quality: int) -> bytes:
    return cv2.imencode(".jpg", picture_HWC[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def _masks(frames: _Frames, number_N: np.ndarray, config: PrepareConfig, flow: Callable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask planes of the frames `number_N`; a video of one frame does not move."""
    if frames.count == 1:
        magnitude_NHW = np.zeros((1, config.size, config.size), np.float32)
        return motion.pack(motion.binary_mask(magnitude_NHW, config.mask_threshold)), *motion.quantise(magnitude_NHW)
    pairs = sorted({motion.pair_of(n) for n in number_N.tolist()})
    chunks = [pairs[i:i + FLOW_CHUNK] for i in range(0, len(pairs), FLOW_CHUNK)]
    parts = [motion.masks(np.stack([frames.gray[p - 1] for p in chunk]), np.stack([frames.gray[p] for p in chunk]), flow,
                          config.mask_threshold) for chunk in chunks]
    place_N = np.searchsorted(pairs, [motion.pair_of(n) for n in number_N.tolist()])
    return tuple(np.concatenate(part)[place_N] for part in zip(*parts))


def _clock(stamps: list[float | None], fps: float) -> tuple[np.ndarray, float]:
    """Seconds of every frame from the first, f32, and mean frames per second.

    Time stamps that are missing or run backwards are not used: then frames are taken as even, `fps` apart.
    """
    if None in stamps or any(b <= a for a, b in zip(stamps, stamps[1:])):
        stamps = [n / fps for n in range(len(stamps))]
    times = np.array(stamps, np.float64) - stamps[0]
    mean = (len(times) - 1) / times[-1] if len(times) > 1 else fps
    return times.astype(np.float32), float(np.float32(mean))       # as it is stored: protobuf examples have no float64


def _provenance(content: str, faults: int, parser, config: PrepareConfig) -> str:
    return json.dumps({"source_sha256": content, "damaged_packets": faults, "phrases": parser.describe(), "prepare": digest(config),
                       "versions": _versions()}, sort_keys=True)


@cache
def _versions() -> dict[str, str]:
    return {"opencv": cv2.__version__, "pyav": av.__version__, "numpy": np.__version__, "tfds": version("tensorflow-datasets"),
            "libavcodec": ".".join(map(str, av.library_versions["libavcodec"]))}
