"""Videos as the processor reads them: files, folders of pictures, decoded frames, frame by frame in order; pictures and motion masks.

Decoding is PyAV's, resizing, JPEG and Farneback flow are OpenCV's: the same calls as where the training data was prepared, so the same
bits with the same versions.  Headers lie about lengths, so frames are counted, and damaged ones are left out.
"""
import re
from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image

PICTURES = {".jpg", ".jpeg", ".png"}
PLAYLISTS = {"hls", "concat", "dash", "imf", "sdp", "rtsp", "webm_dash_manifest"}      # only list other files, which may lie anywhere
FARNEBACK = dict(pyr_scale=0.5, levels=3, winsize=10, iterations=3, poly_n=5, poly_sigma=1.2, flags=0)
Image.MAX_IMAGE_PIXELS = None       # only headers are read by Pillow; the limit is max_pixels


class HawkVideoError(ValueError):
    """A video that cannot be used: names it and says why."""


# ------------------------------------------------------------------------------------------------ sources: (seconds or None, () -> RGB u8)
class VideoFile:
    """A file that FFmpeg reads; what is damaged in it is left out."""

    def __init__(self, path: Path, max_pixels: int, fps: float | None):
        self.path, self.max_pixels = path, max_pixels
        if not path.stat().st_size:
            raise HawkVideoError("empty file")
        with self._open() as container:
            stream = self._stream(container)
            _check_size(stream.codec_context.width, stream.codec_context.height, max_pixels)
            self.fps = float(fps or stream.average_rate or stream.guessed_rate or 1.0)

    def _open(self):
        try:    # a path could name a protocol
            return av.open(str(self.path), metadata_errors="ignore", options={"protocol_whitelist": "file"})
        except (av.FFmpegError, ValueError, OSError) as error:
            raise HawkVideoError(f"cannot be opened ({getattr(error, 'strerror', None) or type(error).__name__})") from error

    def _stream(self, container):
        if container.format.name.split(",")[0] in PLAYLISTS:
            raise HawkVideoError("not a video: a playlist that names other files")
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise HawkVideoError("no video stream")
        if streams[0].codec_context is None:
            raise HawkVideoError("no decoder for its codec")
        return streams[0]

    def expected(self) -> int:
        """Packets of the stream: headers lie about lengths."""
        with self._open() as container:
            try:
                return sum(packet.size > 0 for packet in container.demux(self._stream(container)))
            except av.FFmpegError:
                return 0

    def __iter__(self) -> Iterator:
        with self._open() as container:
            stream = self._stream(container)
            stream.codec_context.thread_count = 1       # with several, which frames of a damaged file survive would vary
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets)
                except (StopIteration, av.FFmpegError):  # the file may end in the middle of something
                    return
                try:
                    decoded = packet.decode()
                except av.FFmpegError:
                    continue
                for frame in decoded:
                    _check_size(frame.width, frame.height, self.max_pixels)
                    turns = round(frame.rotation / 90) % 4
                    yield frame.time, lambda frame=frame, turns=turns: np.rot90(frame.to_ndarray(format="rgb24"), turns)


class PictureFolder:
    """jpg and png pictures in the natural order of their names; damaged ones are left out."""

    def __init__(self, path: Path, max_pixels: int, fps: float | None):
        self.fps, self.max_pixels = float(fps or 1.0), max_pixels
        files = [p for p in path.iterdir() if p.suffix.lower() in PICTURES]
        self.files = sorted(files, key=lambda p: ([int(x) if x.isdigit() else x for x in re.split(r"([0-9]+)", p.name)], p.name))
        if not self.files:
            raise HawkVideoError("folder without pictures: expected jpg or png files")

    def expected(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator:
        for number, path in enumerate(self.files):
            picture_HWC = self._picture(path)
            if picture_HWC is not None:
                yield number / self.fps, lambda picture_HWC=picture_HWC: picture_HWC

    def _picture(self, path: Path) -> np.ndarray | None:
        """RGB u8 [H, W, 3]; None if damaged.  The header comes first: a file of a megabyte may hold a gigabyte of pixels."""
        try:
            with Image.open(path) as header:
                size = header.size
        except Exception:           # Pillow has several for damaged files
            return None
        _check_size(*size, self.max_pixels)
        return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR_RGB)


class Frames:
    """Decoded RGB frames, u8 [T, H, W, 3] or a list: all of the video, not a selection, because flow is between neighbours."""

    def __init__(self, frames, max_pixels: int, fps: float | None):
        self.fps, self.frames = float(fps or 1.0), [np.asarray(frame) for frame in frames]
        for frame in self.frames:
            if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
                raise HawkVideoError(f"decoded frames are RGB u8 [height, width, 3], not {frame.dtype} {list(frame.shape)}")
            _check_size(frame.shape[1], frame.shape[0], max_pixels)

    def expected(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator:
        for number, frame_HWC in enumerate(self.frames):
            yield number / self.fps, lambda frame_HWC=frame_HWC: frame_HWC


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise HawkVideoError(f"picture too large: {width}x{height} is more than {max_pixels} pixels")


# ------------------------------------------------------------------------------------------------ pictures
def resize(picture_HWC: np.ndarray, size: int) -> np.ndarray:
    """RGB u8 of any size -> [size, size, 3]; area means when shrinking, because aliasing flickers and flickering looks like motion."""
    kernel = cv2.INTER_AREA if min(picture_HWC.shape[:2]) >= size else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(picture_HWC), (size, size), interpolation=kernel)


def jpeg(picture_HWC: np.ndarray, quality: int) -> np.ndarray:
    """The picture after a JPEG round trip."""
    coded = cv2.imencode(".jpg", picture_HWC[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(coded, cv2.IMREAD_COLOR_RGB)


def motion_mask(before_HW: np.ndarray, after_HW: np.ndarray, kind: str, threshold: float) -> np.ndarray:
    """u8 mask of gray u8 pictures: 255 where flow exceeds `threshold` pixels (binary), else flow as a share of its maximum.

    Zero everywhere where nothing exceeds the threshold: a share would blow up the noise of a still camera.
    """
    flow_HW2 = cv2.calcOpticalFlowFarneback(before_HW, after_HW, None, **FARNEBACK)
    size_HW = cv2.cartToPolar(flow_HW2[..., 0], flow_HW2[..., 1])[0]
    moves_HW = size_HW > threshold
    if kind == "binary":
        return moves_HW.astype(np.uint8) * np.uint8(255)
    share_HW = np.rint(size_HW * (255 / np.maximum(size_HW.max(), 1e-6))).astype(np.uint8)
    return share_HW * moves_HW.any()


def open_video(video, max_pixels: int, fps: float | None) -> "VideoFile | PictureFolder | Frames":
    """The source for a path or for decoded frames.  fps: frames per second of folders and frames (None: 1).  Raises HawkVideoError."""
    if not isinstance(video, (str, Path)):
        return Frames(video, max_pixels, fps)
    path = Path(video)
    if not path.exists():
        raise HawkVideoError("missing file")
    return PictureFolder(path, max_pixels, fps) if path.is_dir() else VideoFile(path, max_pixels, fps)


def clock(stamps: list, fps: float) -> np.ndarray:
    """f32 seconds from the first frame; where time stamps lack or run backwards, even steps."""
    if None in stamps or any(b <= a for a, b in zip(stamps, stamps[1:])):
        stamps = [n / fps for n in range(len(stamps))]
    return (np.array(stamps, np.float64) - stamps[0]).astype(np.float32)
