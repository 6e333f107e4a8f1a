"""`prepare` as a whole: real and broken clips, any number of workers, killed and gone on, crashes, full disk, malformed annotations."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from data import motion
from data.datasets import read_annotations
from data.prepare import plan, prepare
from data.records import NAME, VERSION, content_hash, dataset_hash, open_split, read_manifest
from data.shards import MakeClip, Worker, read_rejected
from hawk_jax.config import HawkConfig, HawkError, ModelConfig, PrepareConfig

pytestmark = pytest.mark.usefixtures("no_torch")
OPTIONS = ["prepare.size=56", "prepare.frames=8", "prepare.views=2", "prepare.shards=3", "prepare.max_pixels=1000000",
           "model.frame_positions=8"]
SMALL = HawkConfig(prepare=PrepareConfig(size=32, frames=4, views=2, shards=2), model=ModelConfig(frame_positions=4))


def annotate(file: Path, videos, **more) -> Path:
    rows = [{"video": v, "QA": [{"q": "what?", "a": "a car"}], "description": f"a man chases car {n}"} | more for n, v in enumerate(videos)]
    file.write_text(json.dumps(rows))
    return file


def write_audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode(None)])


@pytest.fixture(scope="module")
def world(shared, tmp_path_factory, write_mp4, no_torch):
    """The nine real clips, six broken ones, and three odd ones that can be decoded."""
    root = tmp_path_factory.mktemp("world")
    videos = root / "videos"
    videos.mkdir()
    real = [p for p in sorted((shared / "videos").iterdir()) if p.suffix in (".mp4", ".avi")]
    for path in real:
        shutil.copy(path, videos)
    write_mp4(root / "outside.mp4")
    write_mp4(videos / "one_frame.mp4", frames=1)
    write_mp4(videos / "variable.mp4", frames=12, milliseconds=[0, 10, 20, 500, 510, 900, 1500, 1510, 1520, 2000, 2010, 4000])
    part = write_mp4(videos / "part.mp4", frames=60, faststart=True)
    part.write_bytes(part.read_bytes()[:int(part.stat().st_size * 0.66)])
    half = write_mp4(videos / "truncated.mp4", frames=60)              # its index is at the end and is lost
    half.write_bytes(half.read_bytes()[:half.stat().st_size // 2])
    (videos / "zero.mp4").touch()
    write_audio(videos / "audio.mp4")
    write_mp4(videos / "large.mp4", frames=1, width=1280, height=800)
    (videos / "link.mp4").symlink_to(root / "outside.mp4")
    odd = ["one_frame.mp4", "variable.mp4", "part.mp4"]
    broken = ["truncated.mp4", "zero.mp4", "audio.mp4", "large.mp4", "link.mp4", "missing.mp4"]
    annotate(root / "a.json", [*broken, *odd, *(p.name for p in real)])
    return root, [p.name for p in real], odd


def command(root: Path, out: Path, shared: Path, workers: int) -> list[str]:
    return [sys.executable, "-m", "hawk_jax", "prepare", "--videos", str(root / "videos"), "--annotations", str(root / "a.json"),
            "--out", str(out), "--spacy", str(shared / "data/spacy_en_ud"), "--workers", str(workers), *OPTIONS]


def start_and_kill(arguments: list[str], out: Path, clips: int, everything: bool) -> None:
    """Runs until `clips` clips lie in the work folder; then SIGKILL for the whole process group or for the parent alone."""
    process = subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.DEVNULL)
    until = time.time() + 120
    while len([p for p in out.glob(".work/train-*/*") if p.suffix != ".tmp"]) < clips:
        assert process.poll() is None and time.time() < until, "it ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL) if everything else process.kill()
    process.wait()


@pytest.fixture(scope="module")
def prepared(world, shared) -> str:
    """The world prepared by one worker into ROOT/one: what the command printed."""
    root = world[0]
    done = subprocess.run(command(root, root / "one", shared, 1), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_good_clips_go_in_bad_ones_are_listed_and_neither_workers_nor_kills_change_the_result(world, prepared, shared):
    root, real, odd = world
    assert {r.clip for r in open_split(root / "one", "train").texts} == {*real, *odd}
    reasons = {r["video"]: r["reason"] for r in map(json.loads, (root / "one/rejected.jsonl").read_text().splitlines())}
    assert reasons == {"truncated.mp4": "cannot be opened: Invalid data found when processing input", "zero.mp4": "empty file",
                       "audio.mp4": "no video stream", "large.mp4": "picture too large: 1280x800 is more than 1000000 pixels",
                       "link.mp4": "path leaves the video folder", "missing.mp4": "missing file"}
    manifest = read_manifest(root / "one")
    lines = dict(line.rsplit(maxsplit=1) for line in prepared.splitlines())
    assert "phrases by                       en_ewt_captions_test 1.0.0 (spaCy" in prepared
    assert lines["clips"] == "12" and lines["rejected"] == "6" and lines["  missing file"] == "1" and lines["hash"] == manifest["hash"]

    start_and_kill(command(root, root / "two", shared, 1), root / "two", 2, everything=True)
    start_and_kill(command(root, root / "two", shared, 2), root / "two", 7, everything=False)
    (root / "two" / NAME / "1.0.0").mkdir(parents=True, exist_ok=True)
    (root / "two" / NAME / "1.0.0" / "incomplete.1.x").touch()          # as a kill while a shard is written leaves it
    two = subprocess.run(command(root, root / "two", shared, 2), capture_output=True, text=True, timeout=200)
    assert two.returncode == 0, two.stderr
    for name in ("texts_train.jsonl", "rejected.jsonl", "prepare.json"):
        assert (root / "one" / name).read_bytes() == (root / "two" / name).read_bytes()
    assert dataset_hash(root / "two") == dataset_hash(root / "one") == manifest["hash"]
    records = open_split(root / "two", "train")
    for number in range(len(records)):
        records[number].verify()
    assert not (root / "two/.work").exists() and not list((root / "two" / NAME / "1.0.0").glob("*incomplete*"))


def test_real_clips_have_the_frames_that_opencv_reads(world, prepared):
    root, *_ = world
    for record in open_split(root / "one", "train"):
        if record.clip not in ("aRo8x3xXeEA_3_8.avi", "RoadAccidents133_x264_270_451.mp4", "skateboarding_dog.mp4"):
            continue
        capture, frames = cv2.VideoCapture(str(root / "videos" / record.clip)), []
        while (answer := capture.read())[0]:
            frames.append(cv2.resize(answer[1], (56, 56), interpolation=cv2.INTER_AREA))
        assert record.raw_frames == len(frames) and (record.height, record.width) == (capture.get(4), capture.get(3))
        expected = [t * len(frames) // 8 for t in range(8)]
        assert record.frame_index_N[record.view_VT[0]].tolist() == expected
        for shown_HWC, number in zip(record.decode(0).frames_THWC, expected):
            # the difference is JPEG at quality 95, mean error below 4 levels; another frame of these clips differs more
            assert abs(shown_HWC[..., ::-1].astype(int) - frames[number]).mean() < 4
        # times of a constant rate are frame number / rate, to the resolution of the container's clock
        if record.clip != "skateboarding_dog.mp4":
            np.testing.assert_allclose(record.times_T(0), np.array(expected) / capture.get(cv2.CAP_PROP_FPS), atol=2e-3)


# ------------------------------------------------------------------------------------------------ what goes wrong
def fragile_flow(before_NHW, after_NHW):
    """Farneback that kills its process at a white clip, or finds the disk full at a bright one, if the environment says so."""
    if "HAWK_TEST_CRASH" in os.environ and before_NHW.mean() > 250:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "HAWK_TEST_FULL" in os.environ and before_NHW.mean() > 120:
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")
        os.fsync = full
    return motion.farneback(before_NHW, after_NHW)


@pytest.fixture
def folders(tmp_path):
    """Clips as folders of two pictures: one white, one bright, three dark."""
    for n, level in enumerate([255, 150, 20, 40, 60]):
        (tmp_path / f"videos/{n}").mkdir(parents=True)
        for t in range(2):
            cv2.imwrite(str(tmp_path / f"videos/{n}/{t}.png"), np.full((40, 40, 3), level, np.uint8))
    annotate(tmp_path / "a.json", "01234")
    return tmp_path


def run(root: Path, shared: Path, config=SMALL, **more) -> dict:
    return prepare(**{"videos": root / "videos", "annotations": root / "a.json", "out": root / "out", "workers": 1, "progress": False,
                      "spacy": str(shared / "data/spacy_en_ud"), "config": config} | more)


def test_full_disk_stops_with_a_reason_and_other_options_do_not_go_on(folders, shared, monkeypatch):
    monkeypatch.setenv("HAWK_TEST_FULL", "1")
    with pytest.raises(HawkError, match="disk is full; finished clips are kept"):
        run(folders, shared, flow=fragile_flow)
    monkeypatch.delenv("HAWK_TEST_FULL")
    with pytest.raises(HawkError, match=r"begun with other prepare options \(then -> now\): prepare\.size: 32 -> 24;"):
        run(folders, shared, HawkConfig(prepare=PrepareConfig(size=24, frames=4, views=2, shards=2), model=ModelConfig(frame_positions=4)))
    summary = run(folders, shared, flow=fragile_flow)
    assert summary["clips"] == 5 and summary["reasons"] == {}
    again = run(folders, shared, flow=fragile_flow)         # complete: nothing is made
    assert {k: again[k] for k in ("clips", "hash", "reasons")} == {k: summary[k] for k in ("clips", "hash", "reasons")}
    assert {p.name for p in (folders / "out").iterdir()} == {NAME, "prepare.json", "rejected.jsonl", "texts_train.jsonl"}
    with pytest.raises(HawkError, match=r"prepare\.size: 32 -> 24"):
        run(folders, shared, HawkConfig(prepare=PrepareConfig(size=24, frames=4, views=2, shards=2), model=ModelConfig(frame_positions=4)))
    annotate(folders / "a.json", "0123")
    with pytest.raises(HawkError, match="begun with other annotations"):
        run(folders, shared, flow=fragile_flow)
    (folders / "out/rejected.jsonl").unlink()
    annotate(folders / "a.json", "01234")
    with pytest.raises(HawkError, match="rejected.jsonl is missing or damaged"):
        run(folders, shared, flow=fragile_flow)


def test_a_split_of_which_every_clip_is_rejected_is_left_out(folders, shared):
    rows = json.loads((folders / "a.json").read_text())
    rows[4] |= {"video": "gone", "split": "validation"}
    (folders / "a.json").write_text(json.dumps(rows))
    summary = run(folders, shared)
    assert summary["clips"] == 4 and summary["reasons"] == {"missing file": 1}
    builder = tfds.builder_from_directory(str(folders / "out" / NAME / VERSION))
    assert list(builder.info.splits) == ["train"] and len(builder.as_data_source("train")) == 4
    assert run(folders, shared)["hash"] == summary["hash"]      # and it is complete


def test_a_crashing_clip_is_left_out_and_can_be_made_again_as_if_it_had_never_been_rejected(folders, shared, monkeypatch):
    rows = json.loads((folders / "a.json").read_text())
    rows[4]["video"] = "gone"
    (folders / "a.json").write_text(json.dumps(rows))
    monkeypatch.setenv("HAWK_TEST_CRASH", "1")
    first = run(folders, shared, flow=fragile_flow)
    assert first["clips"] == 3 and first["reasons"] == {"process died": 1, "missing file": 1}
    assert {"video": "0", "reason": "process died: SIGSEGV, twice (--retry-rejected tries again)"} in read_rejected(folders / "out")
    monkeypatch.delenv("HAWK_TEST_CRASH")

    unlink = Path.unlink

    def interrupted(path, **more):
        if "array_record" in path.name:
            raise KeyboardInterrupt
        unlink(path, **more)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(HawkError, match="interrupted"):
            run(folders, shared, flow=fragile_flow, retry_rejected=True)
    again = run(folders, shared, flow=fragile_flow)         # the same data set, from what lies there
    assert {k: again[k] for k in ("clips", "hash", "reasons")} == {k: first[k] for k in ("clips", "hash", "reasons")}

    summary = run(folders, shared, flow=fragile_flow, retry_rejected=True)
    assert summary["clips"] == 4 and summary["reasons"] == {"missing file": 1} and not (folders / "out/.work").exists()
    fresh = run(folders, shared, flow=fragile_flow, out=folders / "fresh")
    for name in ("texts_train.jsonl", "rejected.jsonl", "prepare.json"):
        assert (folders / "out" / name).read_bytes() == (folders / "fresh" / name).read_bytes()
    assert summary["hash"] == fresh["hash"] == dataset_hash(folders / "out")
    ours, theirs = open_split(folders / "out", "train"), open_split(folders / "fresh", "train")
    assert [content_hash(r) for r in ours] == [content_hash(r) for r in theirs]
    monkeypatch.setattr("data.prepare.work", None)          # nothing left to try: no process starts
    assert run(folders, shared, flow=fragile_flow, retry_rejected=True)["hash"] == fresh["hash"]


@pytest.mark.parametrize("fault", [OSError(code, os.strerror(code)) for code in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)] + [
    OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError(), cv2.error("flow")])
def test_a_fault_of_the_machine_stops_the_run_and_rejects_no_clip(folders, shared, monkeypatch, fault):
    def failing(*_):
        raise fault
    if isinstance(fault, cv2.error):
        fault.code = cv2.Error.StsNoMem         # as OpenCV's allocator sets it
    monkeypatch.setattr(cv2, "setNumThreads", lambda _: None)
    (folders / "out/.work").mkdir(parents=True)
    worker = Worker(folders / "out", folders / "videos", SMALL.prepare, "embedded", failing)
    entry, *_ = read_annotations(folders / "a.json")
    with pytest.raises(HawkError, match="^0: .*that is the machine and not the clip.* run the same command again") as error:
        worker(MakeClip("train", 0, 0, entry))
    assert "\n" not in str(error.value) and not list((folders / "out/.work").glob("train-*/*"))
    worker.flow = motion.farneback              # it passed
    assert worker(MakeClip("train", 0, 0, entry)) is None


def test_clips_without_any_text_are_left_out_and_files_of_others_stay(folders, shared, capsys):
    rows = json.loads((folders / "a.json").read_text())
    rows[2] |= {"description": " ", "QA": [{"q": "what?", "a": "\n"}]}
    rows[3] |= {"description": ""}
    (folders / "a.json").write_text(json.dumps(rows))
    (folders / "out/.work").mkdir(parents=True)
    (folders / "out/notes.tmp").write_text("mine")
    (folders / "out/prepare.json.7.tmp").write_text("left by a kill")
    (folders / "out/.work/identity.json").write_text("{")
    with pytest.raises(HawkError, match="identity.json is damaged"):
        run(folders, shared)
    (folders / "out/.work/identity.json").unlink()
    summary = run(folders, shared)
    assert summary["clips"] == 4 and summary["reasons"] == {"no text": 1}
    assert "\nempty question-answer pairs      1, left out\n" in capsys.readouterr().out
    rows[2]["QA"].clear()
    (folders / "a.json").write_text(json.dumps(rows))
    assert run(folders, shared)["hash"] == summary["hash"]          # a pair that leaves no trace makes no other data set
    assert (folders / "out/notes.tmp").exists() and not (folders / "out/prepare.json.7.tmp").exists()


def test_nothing_usable_and_unusable_arguments_are_errors(folders, shared):
    with pytest.raises(HawkError, match="no clip of .* could be used"):
        run(folders, shared, videos=folders)                # the paths do not start here
    with pytest.raises(HawkError, match="is not a folder"):
        run(folders, shared, videos=folders / "a.json")
    with pytest.raises(HawkError, match="cannot be written"):
        run(folders, shared, out=folders / "a.json" / "out")
    with pytest.raises(HawkError):
        run(folders, shared, spacy="no_such_pipeline", out=folders / "other")


def test_a_second_prepare_in_the_same_folder_is_refused(folders, shared):
    import fcntl
    (folders / "out/.work").mkdir(parents=True)
    with open(folders / "out/.work/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(HawkError, match="another prepare is writing"):
            run(folders, shared)


# ------------------------------------------------------------------------------------------------ annotations
GOOD = {"video": "a.mp4", "QA": [], "description": "d"}


@pytest.mark.parametrize("content, message", [
    ("{", "a.json is not JSON"), ("{}", "expected a list"), ("[]", "has no entries"), ("[3]", "entry 0: expected an object"),
    ([GOOD, {"video": "b.mp4", "QA": []}], "entry 1: 'description' is missing"), ([{**GOOD, "video": 3}], "0: 'video' must be a text"),
    ([{**GOOD, "QA": {}}], "'QA' must be a list"), ([{**GOOD, "QA": [{"q": "x"}]}], r"\(a.mp4\): 'QA' number 0 must be"),
    ([{**GOOD, "QA": [{"q": "x", "a": None}]}], "'a' of pair 0 must be a text"), ([{**GOOD, "split": "../x"}], "'split' must be a word"),
    ([{**GOOD, "fps": 0}], "'fps' must be a positive number"), ([{**GOOD, "description": "\ud800"}], "half a surrogate pair"),
    ([{**GOOD, "split": "all"}], "and not 'all'"),
    ([{**GOOD, "split": "train"}, {**GOOD, "video": "./x/../a.mp4", "split": "test"}], "is in split train .* and in split test"),
    ([{**GOOD, "split": "train"}, {**GOOD, "split": "test"}], r"a.mp4 is in split train \(.*entry 0\) and in split test \(.*entry 1\)"),
])
def test_malformed_annotations_name_file_and_entry(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(HawkError, match=message):
        read_annotations(tmp_path / "a.json")


def test_empty_pairs_are_left_out_and_white_space_around_the_others(tmp_path):
    pairs = [(" who?\n", "\ta man "), ("", "a"), ("what?", "  "), ("", ""), ("a  b?", "c")]
    (tmp_path / "a.json").write_text(json.dumps([{**GOOD, "QA": [{"q": q, "a": a} for q, a in pairs]}, GOOD]))
    entry, other = read_annotations(tmp_path / "a.json")
    assert entry.questions == ("who?", "a  b?") and entry.answers == ("a man", "c") and entry.empty_pairs == 3
    assert other.questions == () and other.empty_pairs == 0


def test_splits_come_from_the_entry_the_option_or_the_file_name(tmp_path):
    annotate(tmp_path / "all_videos_train.json", ["a", "b", "a"])
    annotate(tmp_path / "all_videos_val.json", ["c"])
    annotate(tmp_path / "more.json", ["d"], split="held_out")
    entries = read_annotations(tmp_path)
    assert " ".join(f"{e.clip}:{e.split}" for e in entries) == "a:train b:train a#2:train c:validation d:held_out"
    assert {e.split for e in read_annotations(tmp_path / "all_videos_train.json", split="mine")} == {"mine"}
    with pytest.raises(HawkError, match="--split"):
        read_annotations(tmp_path, split="../mine")         # it becomes part of file names
    annotate(tmp_path / "annotations_test.json", ["e"])         # a rendered world: only these files
    assert [(e.clip, e.split) for e in read_annotations(tmp_path)] == [("e", "test")]


def test_a_share_of_unsplit_sources_becomes_validation(tmp_path):
    annotate(tmp_path / "a.json", [str(n) for n in range(2000)])
    entries = read_annotations(tmp_path / "a.json", validation_share=0.1)
    moved = {e.source for e in entries if e.split == "validation"}
    assert 150 < len(moved) < 250           # 200 expected, standard deviation 13
    annotate(tmp_path / "b.json", [str(n) for n in range(1000, 3000)])
    again = {e.source for e in read_annotations(tmp_path / "b.json", validation_share=0.1) if e.split == "validation"}
    assert {m for m in moved if int(m) >= 1000} == {m for m in again if int(m) < 2000}      # by the source alone


def test_webvid(tmp_path):
    (tmp_path / "x_train.csv").write_text('videoid,contentUrl,page_dir,name\n7,u,p/q,"A man, running"\n8,u,,cat\n', encoding="utf-8-sig")
    assert [(e.source, e.description, e.split) for e in read_annotations(tmp_path)] == [
        ("p/q/7.mp4", "A man, running", "train"), ("8.mp4", "cat", "train")]
    (tmp_path / "x_train.csv").write_text("videoid,page_dir,name\n7,p,\n")
    assert read_annotations(tmp_path)[0].description == ""  # one clip without a caption does not stop the others
    (tmp_path / "x_train.csv").write_text("videoid,name\n7,x\n")
    with pytest.raises(HawkError, match="column 'page_dir' is missing"):
        read_annotations(tmp_path)
    (tmp_path / "x_train.csv").write_text("videoid,page_dir,name\n7,p\n")
    with pytest.raises(HawkError, match="line 2: column 'name' must be a text"):
        read_annotations(tmp_path)


def test_a_clip_stays_in_its_shard_when_others_come_and_go(tmp_path):
    few, many = (plan(read_annotations(annotate(tmp_path / "a.json", map(str, range(n)))), 4) for n in (50, 200))
    for key, entries in few.items():
        assert [e.source for e in many[key] if int(e.source) < 50] == [e.source for e in entries]
    sizes = [len(entries) for entries in many.values()]
    assert sum(sizes) == 200 and min(sizes) > 25           # 50 expected, standard deviation 6
