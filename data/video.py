"""Video files and folders of pictures -> frames in order, and which of them a view shows.

Headers lie about length, frame rate and end: frames are counted by demuxing and then by decoding, times come from presentation time
stamps.  Decoding is sequential and holds one frame.  Pictures are resized by OpenCV to a square without keeping the aspect, as the
released code (decord, 224 x 224) does: INTER_AREA when shrinking, since a bilinear kernel would skip pixels and alias, and aliasing
flickers, which Farneback takes for motion; INTER_LINEAR when a side grows.
"""
import errno
import hashlib
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from PIL import Image

from data.draws import permutation

PICTURES = {".jpg", ".jpeg", ".png"}
# demuxers that only list other files, which may lie anywhere
PLAYLISTS = {"hls", "concat", "dash", "imf", "sdp", "rtsp", "webm_dash_manifest"}
# what a machine refuses at times: disk or network, its open files, its memory
PASSING = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
Image.MAX_IMAGE_PIXELS = None       # of pictures only the header is read by Pillow; their limit is prepare.max_pixels
SPARE = 1 << 30         # bytes; more than decoding 4096 x 2304 takes, whose 17 pictures at a time are 14 MB each


class BadClip(Exception):
    """A clip that cannot become a record.  The text before the first colon is the kind of fault, what follows the detail."""


def is_passing(error: Exception) -> bool:
    """Whether an error is a fault of the machine that may pass: no clip may be rejected for it."""
    if isinstance(error, cv2.error):
        return getattr(error, "code", None) == cv2.Error.StsNoMem
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in PASSING


class Frame(NamedTuple):
    time: float | None          # seconds from the start of the stream
    width: int                  # as shown, after rotation
    height: int
    pixels: object              # () -> RGB u8 [H, W, 3] as shown; converting is half the work, so only on demand


def locate(videos: Path, source: str) -> Path:
    """Path of a source below `videos`.  BadClip if it is missing or leaves the folder, through `..` and links too."""
    root = videos.resolve()
    try:
        path = (root / source).resolve()
        if not source or path == root or not path.is_relative_to(root):
            raise BadClip("path leaves the video folder")
        if not path.exists():
            raise BadClip("missing file")
    except (OSError, ValueError, RuntimeError) as error:      # a NUL byte, a name too long, a circle of links
        if is_passing(error):
            raise
        raise BadClip(f"path cannot be used: {_reason(error)}") from error
    return path


def open_source(path: Path, fps: float | None, max_pixels: int) -> "VideoFile | PictureFolder":
    """The source at a path.  `fps` (frames per second) is used for folders of pictures and where a file has no time stamps."""
    return PictureFolder(path, fps or 1.0, max_pixels) if path.is_dir() else VideoFile(path, fps, max_pixels)


def _too_large(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadClip(f"picture too large: {width}x{height} is more than {max_pixels} pixels")


class VideoFile:
    """A file that FFmpeg reads.  `frames()` may be called again and starts from the beginning each time."""

    def __init__(self, path: Path, fps: float | None, max_pixels: int):
        self.path, self.max_pixels = path, max_pixels
        if not path.stat().st_size:
            raise BadClip("empty file")
        with self._open() as container:
            stream = _video_stream(container)
            _too_large(stream.codec_context.width, stream.codec_context.height, max_pixels)
            self.fps = float(fps or stream.average_rate or stream.guessed_rate or 1.0)
        self.faults = 0             # packets and frames that the last `frames()` found damaged

    def _open(self):
        try:
            # a path could name a protocol or a playlist of other files; damage in tags is not damage of pictures
            return av.open(str(self.path), metadata_errors="ignore", options={"protocol_whitelist": "file"})
        except (av.FFmpegError, ValueError, OSError) as error:
            self._clear_machine(error)
            raise BadClip(f"cannot be opened: {_reason(error)}") from error

    def _clear_machine(self, error: Exception) -> None:
        """Raises OSError or MemoryError if `error` is a fault of the machine; returns if it is the file's.

        FFmpeg has EIO and ENOMEM for damaged files too, whose lengths lead nowhere or are absurd: so it is tried whether the file can be
        read and memory be had.
        """
        code = getattr(error, "errno", None)
        if code == errno.EIO:
            self.content_hash()
        elif code == errno.ENOMEM:
            mmap.mmap(-1, SPARE).close()
        elif is_passing(error):
            raise error

    def content_hash(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def expected_frames(self) -> int:
        """Packets of the video stream: what decoding gives, unless packets are damaged, hidden or cut away by an edit list."""
        with self._open() as container:
            try:
                return sum(packet.size > 0 for packet in container.demux(_video_stream(container)))
            except av.FFmpegError:
                return 0            # unknown: the count comes from decoding

    def frames(self) -> Iterator[Frame]:
        """Every frame that can be decoded, in order of presentation; what is damaged is left out and counted."""
        self.faults = 0
        with self._open() as container:
            stream = _video_stream(container)
            stream.codec_context.thread_count = 1       # clips run in parallel instead, and results cannot depend on timing
            for packet in self._packets(container, stream):
                try:
                    decoded = packet.decode()
                except av.FFmpegError as error:
                    self._clear_machine(error)
                    self.faults += 1
                    continue
                for frame in decoded:
                    self.faults += frame.is_corrupt
                    yield self._frame(frame)

    def _packets(self, container, stream):
        packets = container.demux(stream)
        while True:
            try:
                yield next(packets)
            except StopIteration:
                return
            except av.FFmpegError as error:     # the file ends in the middle of something
                self._clear_machine(error)
                self.faults += 1
                return

    def _frame(self, frame) -> Frame:
        _too_large(frame.width, frame.height, self.max_pixels)     # streams may change size half way
        turns = round(frame.rotation / 90) % 4                     # counter-clockwise, from the display matrix
        size = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
        return Frame(frame.time, *size, lambda: np.rot90(frame.to_ndarray(format="rgb24"), turns))


class PictureFolder:
    """A folder of jpg and png pictures, one a frame, in the natural order of their names (2.jpg before 10.jpg)."""

    def __init__(self, path: Path, fps: float, max_pixels: int):
        self.fps, self.max_pixels, self.faults = float(fps), max_pixels, 0
        files = [p for p in path.iterdir() if p.suffix.lower() in PICTURES and p.resolve().is_relative_to(path)]
        self.files = sorted(files, key=lambda p: ([int(x) if x.isdigit() else x for x in re.split(r"([0-9]+)", p.name)], p.name))
        if not self.files:
            raise BadClip("folder without pictures: expected jpg or png files")

    def content_hash(self) -> str:
        whole = hashlib.sha256()
        for path in self.files:
            whole.update(hashlib.sha256(path.read_bytes()).digest())
        return whole.hexdigest()

    def expected_frames(self) -> int:
        return len(self.files)

    def frames(self) -> Iterator[Frame]:
        self.faults = 0
        for number, path in enumerate(self.files):
            picture_HWC = self._picture(path)
            if picture_HWC is None:
                self.faults += 1
                continue
            height, width = picture_HWC.shape[:2]
            yield Frame(number / self.fps, width, height, lambda picture_HWC=picture_HWC: picture_HWC)

    def _picture(self, path: Path) -> np.ndarray | None:
        """RGB u8 [H, W, 3]; None if damaged.  The header comes first: a file of a megabyte may hold a gigabyte of pixels."""
        size = _header_size(path)
        if size is None:
            return None
        _too_large(*size, self.max_pixels)
        return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR_RGB)


def _header_size(path: Path) -> tuple[int, int] | None:
    """Width and height in the header of a picture; None if it is damaged."""
    try:
        with Image.open(path) as header:
            return header.size
    except Exception as error:      # Pillow has several for damaged files, OSError without a number among them
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise
        return None


def _video_stream(container):
    if container.format.name.split(",")[0] in PLAYLISTS:
        raise BadClip(f"not a video: a {container.format.name} playlist names other files")
    # a cover picture in an audio file is a "video stream" of one attached picture
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise BadClip("no video stream")
    if streams[0].codec_context is None:
        raise BadClip("cannot be decoded: no decoder for its codec")
    return streams[0]


def _reason(error: Exception) -> str:
    """The words of FFmpeg or the system without the path: reasons are the same on every machine."""
    return getattr(error, "strerror", None) or type(error).__name__


def resize(picture_HWC: np.ndarray, size: int) -> np.ndarray:
    """RGB u8 of any size -> [size, size, 3]; see the head of this file for the choice of kernel."""
    height, width = picture_HWC.shape[:2]
    kernel = cv2.INTER_AREA if min(height, width) >= size else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(picture_HWC), (size, size), interpolation=kernel)


# ------------------------------------------------------------------------------------------------ which frames a view shows
def uniform(length: int, frames: int) -> np.ndarray:
    """int32 [frames]: floor(t x length / frames), hawk.md 5.2; frames repeat when the video is shorter."""
    return (np.arange(frames, dtype=np.int64) * length // frames).astype(np.int32)


def head_tail(length: int, frames: int, *key) -> np.ndarray:
    """int32 [frames]: frames // 2 random distinct ones of the first half of the video, the rest from its second half, each sorted.

    `key` names the draw.  A half that is too short gives all of its frames, evenly repeated.
    """
    middle = length // 2
    halves = [(0, middle, frames // 2), (middle, length, frames - frames // 2)]
    if not middle:                  # one frame: both halves are that frame
        halves[0] = (0, length, frames // 2)
    drawn = [start + _some(end - start, count, *key, start) for start, end, count in halves]
    return np.concatenate(drawn).astype(np.int32)


def _some(length: int, count: int, *key) -> np.ndarray:
    return uniform(length, count) if length < count else np.sort(permutation(length, *key)[:count])


def frame_sets(length: int, frames: int, views: int, seed: int, content: str) -> tuple[np.ndarray, np.ndarray]:
    """Frame numbers of every view for the video and the motion branch, int32 [V, T] each.

    View 0 is uniform and common to both; the others are head-tail draws that belong to (seed, content of the source, view, branch).
    """
    first = uniform(length, frames)
    video, motion = ([head_tail(length, frames, seed, "frames", content, view, branch) for view in range(1, views)]
                     for branch in ("video", "motion"))
    return np.stack([first, *video]), np.stack([first, *motion])
