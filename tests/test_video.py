"""Decoding against OpenCV's own reader, frame sets against the released code's golden values."""
import errno
import json
import mmap
import os
import resource
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest

from data import video
from data.video import BadClip

PIXELS = 10 ** 7


def opencv_frames(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while (answer := capture.read())[0]:
        frames.append(answer[1][..., ::-1])
    return frames


def decoded(path):
    source = video.open_source(path, None, PIXELS)
    return source, [(f, f.pixels()) for f in source.frames()]


def turned(path, matrix):
    """The file with another display matrix in its track header (version 0: 36 bytes in front, ISO 14496-12)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 36
    data[at:at + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_pixels_and_rotation_equal_those_of_opencv(tmp_path, write_mp4, turn):
    path, one = write_mp4(tmp_path / "a.mp4", frames=4), 1 << 16
    a, b = {0: (one, 0), 90: (0, one), 180: (-one, 0), 270: (0, -one)}[turn]
    turned(path, (a, b, 0, -b, a, 0, 0, 0, 1 << 30))
    source, frames = decoded(path)
    assert source.expected_frames() == len(frames) == 4
    for (frame, ours_HWC), theirs_HWC in zip(frames, opencv_frames(path)):
        assert (frame.height, frame.width) == theirs_HWC.shape[:2] == ((64, 48) if turn in (90, 270) else (48, 64))
        np.testing.assert_array_equal(ours_HWC, theirs_HWC)        # the same FFmpeg conversion: bit-exact


def test_times_are_the_time_stamps_of_a_variable_frame_rate(tmp_path, write_mp4):
    stamps = [0, 10, 400, 410, 1000, 2500, 2510, 4000]
    _, frames = decoded(write_mp4(tmp_path / "a.mp4", frames=8, milliseconds=stamps))
    np.testing.assert_allclose([f.time for f, _ in frames], np.array(stamps) / 1000, atol=1e-3)     # time base of the container: 1/16000


def test_a_truncated_file_gives_what_can_be_decoded(tmp_path, write_mp4):
    path = write_mp4(tmp_path / "a.mp4", frames=60, faststart=True)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * 0.66)])
    source, frames = decoded(path)
    assert 15 < len(frames) < source.expected_frames() < 60 and source.faults
    for (_, ours_HWC), theirs_HWC in zip(frames, opencv_frames(path)):
        np.testing.assert_array_equal(ours_HWC, theirs_HWC)
    assert len(list(source.frames())) == len(frames)


def test_a_playlist_is_not_followed(tmp_path, write_mp4):
    write_mp4(tmp_path / "a.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    with pytest.raises(BadClip, match="playlist"):
        video.open_source(tmp_path / "list.mp4", None, PIXELS)


# ------------------------------------------------------------------------------------------------ whose fault it is
def refusing(code):
    """A function that fails as FFmpeg does with this errno."""
    def refuse(*_, **__):
        av.error.err_check(-code)
    return refuse


@pytest.fixture
def clip(tmp_path, write_mp4) -> Path:
    return write_mp4(tmp_path / "a.mp4", frames=2)


@pytest.fixture
def no_files_left(clip):
    """The process may open no more files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.open("/", os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_without_a_free_file_the_clip_is_not_to_blame(clip, no_files_left):
    with pytest.raises(OSError) as error:
        video.VideoFile(clip, None, PIXELS)
    assert video.is_passing(error.value)


@pytest.mark.parametrize("code, machine", [(errno.EIO, (video.VideoFile, "content_hash")), (errno.ENOMEM, (mmap, "mmap"))])
def test_what_ffmpeg_says_of_damage_and_of_the_machine_alike_is_tried(clip, monkeypatch, code, machine):
    """Of 4000 damaged files libavformat 62 opened 5 with EIO and 3 with ENOMEM."""
    source = video.VideoFile(clip, None, PIXELS)
    monkeypatch.setattr(av, "open", refusing(code))
    with pytest.raises(BadClip, match=f"cannot be opened: {os.strerror(code)}"):
        source.expected_frames()

    def refused(*_):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(*machine, refused)
    with pytest.raises(OSError, match=os.strerror(code)):
        source.expected_frames()


@pytest.mark.parametrize("part", ["demux", "decode"])
def test_frames_are_not_left_out_because_the_machine_failed(clip, monkeypatch, part):
    source = video.VideoFile(clip, None, PIXELS)
    fail = SimpleNamespace(decode=refusing(errno.ENFILE), demux=lambda _: map(refusing(errno.ENFILE), "x"))
    if part == "decode":
        monkeypatch.setattr(source, "_packets", lambda *_: [fail])
    else:
        packets = source._packets
        monkeypatch.setattr(source, "_packets", lambda _, stream: packets(fail, stream))
    with pytest.raises(OSError, match="Too many open files in system"):
        list(source.frames())


def test_a_path_is_not_to_blame_for_a_stale_mount(tmp_path, monkeypatch):
    def stale(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle")
    monkeypatch.setattr(type(tmp_path), "exists", stale)
    with pytest.raises(OSError, match="Stale"):
        video.locate(tmp_path, "a.mp4")


def test_a_folder_of_pictures_in_natural_order(tmp_path):
    pictures = {f"{n}.png": np.full((6, 8, 3), 10 * n, np.uint8) for n in (1, 2, 10)}
    for name, picture_HWC in pictures.items():
        cv2.imwrite(str(tmp_path / name), picture_HWC)
    (tmp_path / "notes.txt").write_text("no picture")
    source = video.open_source(tmp_path, 4.0, PIXELS)
    frames = list(source.frames())
    assert [f.time for f in frames] == [0, 0.25, 0.5]
    assert [f.pixels()[0, 0, 0] for f in frames] == [10, 20, 100]
    (tmp_path / "2.png").write_bytes(b"broken")
    assert len(list(source.frames())) == 2 and source.faults == 1


def test_the_size_of_a_picture_is_checked_before_it_is_decoded(tmp_path, monkeypatch):
    ihdr, nothing = struct.pack(">IIBBBBB", 30000, 20000, 8, 2, 0, 0, 0), zlib.compress(b"")
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", ihdr), (b"IDAT", nothing), (b"IEND", b""))))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded: 1.8 GB"))
    with pytest.raises(BadClip, match=f"picture too large: 30000x20000 is more than {PIXELS} pixels"):
        next(video.open_source(tmp_path, None, PIXELS).frames())


@pytest.mark.parametrize("damaged", [b"", b"broken", b"\x89PNG\r\n\x1a\n\0\0\0\x01IHDR\0" + struct.pack(">I", zlib.crc32(b"IHDR\0"))])
def test_damaged_headers_are_damaged_pictures(tmp_path, damaged):
    (tmp_path / "1.png").write_bytes(damaged)
    source = video.open_source(tmp_path, None, PIXELS)
    assert not list(source.frames()) and source.faults == 1


@pytest.mark.parametrize("source, fault", [
    ("../secret.mp4", "leaves"), ("sub/../../secret.mp4", "leaves"), ("link.mp4", "leaves"), ("/etc/hostname", "leaves"), ("", "leaves"),
    ("gone.mp4", "missing"), ("a\0b", "cannot be used"), ("x" * 5000, "cannot be used"), ("circle", "cannot be used|missing")])
def test_a_path_stays_in_the_folder_and_exists(tmp_path, source, fault):
    (tmp_path / "videos" / "sub").mkdir(parents=True)
    (tmp_path / "secret.mp4").write_bytes(b"x")
    (tmp_path / "videos" / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (tmp_path / "videos" / "circle").symlink_to(tmp_path / "videos" / "circle")
    with pytest.raises(BadClip, match=fault):
        video.locate(tmp_path / "videos", source)


def test_shrinking_averages_over_all_pixels(tmp_path):
    stripes_HWC = np.zeros((64, 64, 3), np.uint8)
    stripes_HWC[:, ::2] = 200                       # a kernel that skips pixels would see all black or all white
    np.testing.assert_array_equal(video.resize(stripes_HWC, 16), np.full((16, 16, 3), 100))


# ------------------------------------------------------------------------------------------------ frame sets
def test_uniform_frames_are_those_of_the_released_code(shared):
    cases = json.loads((shared / "goldens/hawk/frame_sampling.json").read_text())["cases"]
    for case in cases:
        frames = min(case["n_frms"], case["video_frames"])      # the released code gives fewer frames for a short video, a record repeats
        assert video.uniform(case["video_frames"], frames).tolist() == case["indices"]
    assert video.uniform(3, 8).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_head_tail_draws_distinct_sorted_frames_from_each_half():
    seen = np.zeros(101, int)
    for draw in range(400):
        frames = video.head_tail(101, 9, "key", draw)
        head, tail = frames[:4], frames[4:]
        assert (np.diff(head) > 0).all() and (np.diff(tail) > 0).all() and head.max() < 50 <= tail.min() and tail.max() < 101
        seen[frames] += 1
    # head: 400 x 4 / 50 = 32 expected a frame, tail: 400 x 5 / 51 = 39; five standard deviations of a binomial count
    assert (abs(seen[:50] - 32) < 28).all() and (abs(seen[50:] - 39.2) < 31).all()


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_short_videos_repeat_frames(length):
    frames = video.head_tail(length, 8, "key")
    assert frames.shape == (8,) and frames.dtype == np.int32 and set(frames.tolist()) == set(range(length))


def test_frame_sets_belong_to_seed_content_view_and_branch():
    one = video.frame_sets(300, 8, 4, 0, "content")
    again = video.frame_sets(300, 8, 4, 0, "content")
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(one[0][0], one[1][0])         # view 0 is uniform in both branches
    sets = {row.tobytes() for part in (one, video.frame_sets(300, 8, 4, 1, "content"), video.frame_sets(300, 8, 4, 0, "other"))
            for branch in part for row in branch[1:]}
    assert len(sets) == 18                                      # all drawn sets differ
