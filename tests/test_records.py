"""Records made from pictures whose frames, flow and masks are known from elsewhere, stored and read back without TensorFlow."""
import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from safetensors.numpy import load_file

from data.clips import make_record
from data.datasets import Entry
from data.inspect import inspect
from data.prepare import prepare
from data.records import NAME, HawkClips, check_prepared, content_hash, dataset_hash, open_split, read_manifest, tfds_folder
from hawk_jax.config import HawkConfig, HawkError, ModelConfig, PrepareConfig

CONFIG = PrepareConfig(size=64, frames=4, views=3, shards=2, jpeg_quality=100)


class Phrases:
    """In place of the parser: what it is asked for is part of the record."""

    def phrases(self, text):
        return ([f"all of {text}"], []) if text else ([], [])

    def describe(self):
        return "test"


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared / "goldens/hawk/farneback_64.safetensors")


def write_pictures(folder, frames_THWC):
    folder.mkdir(parents=True)
    for t, frame_HWC in enumerate(frames_THWC):
        cv2.imwrite(str(folder / f"{t}.png"), frame_HWC[..., ::-1])


@pytest.fixture(scope="module")
def record(golden, tmp_path_factory):
    """The golden clip of 7 frames of 64 x 64 as a folder of pictures: resizing to 64 changes nothing."""
    videos = tmp_path_factory.mktemp("videos")
    write_pictures(videos / "clip", golden["inputs/frames"])
    entry = Entry("clip", "a square moves – schräg", ("who?", "why?"), ("a square", ""), "train", 5.0, "clip")
    return make_record(entry, videos, CONFIG, Phrases())


def masks_of(golden, raw):
    """The released code's mask (K) of raw frames; it has frames 1, 2, ... in `indices_used`."""
    used = golden["outputs/indices_used"].tolist()
    return [golden["outputs/mask"][used.index(max(n, 1))] if max(n, 1) in used else None for n in raw]


@pytest.mark.parametrize("options", [{}, {"branch_frames": "independent"}, {"first_motion_index": "one"}])
def test_views_give_frames_and_masks_of_the_released_code(record, golden, options):
    compared = 0
    for view in range(3):
        pictures = record.decode(view, mask="binary", **options)
        video_raw = record.frame_index_N[record.view_VT[view]]
        motion_raw = record.frame_index_N[(record.motion_view_VT if "branch_frames" in options else record.view_VT)[view]].copy()
        if "first_motion_index" in options:
            motion_raw[0] = 1
        motion_THWC = pictures.frames_THWC if pictures.motion_frames_THWC is None else pictures.motion_frames_THWC
        for raw, shown_THWC in ((video_raw, pictures.frames_THWC), (motion_raw, motion_THWC)):
            # JPEG keeps colour at half resolution, so brightness is compared; neighbouring frames differ by more than 3 levels
            for shown_HWC, gray_HW in zip(shown_THWC, golden["outputs/gray"][raw]):
                assert abs(cv2.cvtColor(shown_HWC, cv2.COLOR_RGB2GRAY).astype(int) - gray_HW).mean() < 1.5
        for mask_HW, theirs_HW in zip(pictures.mask_THW, masks_of(golden, motion_raw)):
            if theirs_HW is not None:
                np.testing.assert_array_equal(mask_HW, theirs_HW * 255)
                compared += 1
    assert compared >= 6
    assert record.frame_index_N[record.view_VT[0]].tolist() == [0, 1, 3, 5]         # floor(t x 7 / 4)
    assert record.times_T(0).tolist() == pytest.approx([0, 0.2, 0.6, 1.0]) and record.fps == 5


def test_magnitude_is_the_share_of_the_maximum(record, golden):
    pictures = record.decode(0)
    used, flow_KHW2 = golden["outputs/indices_used"].tolist(), golden["outputs/flow"]
    for mask_HW, raw in zip(pictures.mask_THW, (1, 1, 3, 5)):
        if raw in used:
            size_HW = np.linalg.norm(flow_KHW2[used.index(raw)], axis=-1)
            np.testing.assert_allclose(mask_HW / 255, size_HW / size_HW.max(), atol=1 / 509)


def test_still_frames_have_no_mask_and_one_frame_is_a_clip(tmp_path, golden):
    write_pictures(tmp_path / "still", [golden["inputs/frames"][0]] * 3)
    write_pictures(tmp_path / "one", golden["inputs/frames"][:1])
    for name, raw in (("still", 3), ("one", 1)):
        made = make_record(Entry(name, "", split="train", clip=name), tmp_path, CONFIG, Phrases())
        assert made.raw_frames == raw and not any(made.decode(v, mask=m).mask_THW.any() for v in range(3) for m in ("binary", "magnitude"))
        assert made.decode(2, first_motion_index="one").frames_THWC.shape == (4, 64, 64, 3)


# ------------------------------------------------------------------------------------------------ storage
@pytest.fixture(scope="module")
def stored(tmp_path_factory, golden, shared, no_torch):
    """A data set of three folders of pictures, two in train, one in test; four shards, so some are empty."""
    root = tmp_path_factory.mktemp("stored")
    for n in range(3):
        write_pictures(root / f"videos/{n}", np.roll(golden["inputs/frames"], 7 * n, axis=2))
    rows = [{"video": str(n), "description": "a man pushes a cart", "QA": [{"q": "why?", "a": "füßt – 因为"}] * n,
             "split": "train" if n else "test"} for n in range(3)]
    (root / "a.json").write_text(json.dumps(rows))
    config = HawkConfig(prepare=dataclasses.replace(CONFIG, shards=4), model=ModelConfig(frame_positions=4))
    prepare(videos=root / "videos", annotations=root / "a.json", out=root / "out", spacy=str(shared / "data/spacy_en_ud"), config=config,
            workers=1, progress=False)
    return root


@pytest.fixture
def copy(stored, tmp_path):
    return shutil.copytree(stored / "out", tmp_path / "out")


def test_what_is_read_is_what_was_made(stored):
    train, test = open_split(stored / "out", "train"), open_split(stored / "out", "test")
    assert (len(train), len(test)) == (2, 1)
    for source in (train, test, pickle.loads(pickle.dumps(train))):
        for number, row in enumerate(source.texts):
            got = source[number]
            got.verify()
            assert got.content_hash == row.content_hash and got.questions == row.questions == ["why?"] * int(got.clip)
            assert got.answers == ["füßt – 因为"] * int(got.clip) and "man pushes cart" in got.direct_phrases
            assert row.times_VT[0] == [0, 1, 3, 5] and row.seconds == 7     # one frame a second unless the annotations say otherwise
            assert [type(getattr(got, f.name)) for f in dataclasses.fields(got)][4:11] == [list, *[np.ndarray] * 6]
    with ThreadPoolExecutor(8) as pool:         # shared between threads
        assert {r.content_hash for r in pool.map(train.__getitem__, [0, 1] * 40)} == {r.content_hash for r in train.texts}
    with pytest.raises(IndexError):
        train[2]


def test_verify_sees_a_change_of_any_field(record):
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        other = {str: "x", int: 99, float: 99.0, list: [b"x"] if field.name == "frames" else ["x"]}.get(type(value))
        other = value + 1 if isinstance(value, np.ndarray) else other
        changed = dataclasses.replace(record, **{field.name: other})
        assert (content_hash(changed) == record.content_hash) == (field.name in ("content_hash", "provenance")), field.name
    with pytest.raises(HawkError, match="clip"):
        dataclasses.replace(record, raw_frames=8).verify()


def test_tfds_opens_it_without_tensorflow(stored):
    program = """if 1:
        import sys, tensorflow_datasets as tfds
        builder = tfds.builder_from_directory(sys.argv[1])
        clips = builder.as_data_source("train")
        print(len(clips), clips[1]["frames"][0].shape, clips[1]["view_VT"].shape, "tensorflow" in sys.modules)
    """
    folder = stored / "out" / NAME / "1.0.0"
    answer = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=60)
    assert answer.stdout.split("\n")[0] == "2 (64, 64, 3) (3, 4) False", answer.stderr


def test_tfds_own_way_of_preparing_gives_the_same_records(stored, tmp_path):
    source = open_split(stored / "out", "train")
    builder = HawkClips(prepare=PrepareConfig(**read_manifest(stored / "out")["prepare"]), records={"train": [source[0], source[1]]},
                        data_dir=tmp_path)
    builder.download_and_prepare()
    hashes = {x["content_hash"].decode() for x in builder.as_data_source("train")}
    assert hashes == {row.content_hash for row in source.texts}


def test_another_configuration_is_refused_field_by_field(stored):
    good = PrepareConfig(**read_manifest(stored / "out")["prepare"])
    check_prepared(stored / "out", good)
    with pytest.raises(HawkError, match=r"prepare\.mask_threshold: 0\.2 -> 0\.3; prepare\.size: 64 -> 56"):
        check_prepared(stored / "out", dataclasses.replace(good, size=56, mask_threshold=0.3))


def test_the_hash_of_a_data_set_follows_its_records(stored, copy):
    assert dataset_hash(copy) == read_manifest(copy)["hash"] == dataset_hash(stored / "out")
    texts = copy / "texts_train.jsonl"
    texts.write_text("\n".join(reversed(texts.read_text().splitlines())) + "\n")
    assert dataset_hash(copy) != dataset_hash(stored / "out")           # order counts


def shards(folder, split="train"):
    """(largest, smallest) file of a split: one with records, one without."""
    files = sorted((folder / NAME / "1.0.0").glob(f"*-{split}.*"), key=lambda p: p.stat().st_size)
    return files[-1], files[0]


@pytest.mark.parametrize("damage, message", [
    (lambda path, empty: path.unlink(), "missing"),
    (lambda path, empty: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
    (lambda path, empty: path.write_bytes(b""), "damaged"),
    (lambda path, empty: shutil.copy(empty, path), "holds 0 records, dataset_info.json says"),
])
def test_a_damaged_file_is_named_when_the_split_is_opened(copy, damage, message):
    path, empty = shards(copy)
    damage(path, empty)
    with pytest.raises(HawkError, match=f"{path.name}.*{message}"):
        open_split(copy, "train")


def test_a_damaged_record_is_named_when_it_is_read(copy):
    path, _ = shards(copy)
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xd8\xff\xe0")            # the first JPEG
    data[at + 500] ^= 4
    path.write_bytes(data)
    source = open_split(copy, "train")
    with pytest.raises(HawkError, match=rf"record \d of .*{path.name}.*number \d of split train.*hash mismatch"):
        [source[n] for n in range(len(source))]


@pytest.mark.parametrize("content, message", [
    ("", "is damaged"), ("[]", "not an object with prepare, splits"), ('{"prepare": {}}', "not an object with prepare, splits"),
    ('{"prepare": {}, "splits": {}, "format": 2}', "format 2, this version reads up to 1"), (None, "not a finished data set")])
def test_a_damaged_or_newer_manifest_is_named(copy, content, message):
    path = copy / "prepare.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(HawkError, match=message):
        check_prepared(copy, CONFIG)
    with pytest.raises(HawkError, match="not a finished data set"):
        check_prepared(path, CONFIG)        # below a file


def test_folders_that_cannot_be_read_say_why(copy, tmp_path):
    with pytest.raises(HawkError, match="no records in split 'validation'; it has: test, train"):
        open_split(copy, "validation")
    with pytest.raises(HawkError, match="no hawk_clips folder"):
        open_split(tmp_path / "nothing", "train")
    (copy / "texts_train.jsonl").write_text("")
    with pytest.raises(HawkError, match="0 lines for 2 records"):
        open_split(copy, "train")
    (copy / NAME / "1.0.0").rename(copy / NAME / "2.0.0")
    with pytest.raises(HawkError, match=r"records of version 2\.0\.0; this hawk_jax reads 1\.x"):
        open_split(copy, "train")


def test_the_newest_readable_version_is_taken_by_its_numbers(tmp_path):
    for version in ("1.9.0", "1.10.0", "1.2.30", "2.0.0", "1.11.0.incompleteX7", "1.x.0"):      # tfds renames what it has finished
        (tmp_path / NAME / version).mkdir(parents=True)
    assert tfds_folder(tmp_path).name == "1.10.0"


def test_inspect_draws_a_record(stored, tmp_path):
    text = inspect(stored / "out", "train", "2", tmp_path / "new" / "a.png")        # by name: there is no third clip
    picture_HWC = cv2.imread(str(tmp_path / "new" / "a.png"))
    assert picture_HWC.shape[1] > 1000 and picture_HWC.std() > 10 and "a man pushes a cart" in text and "Q: why?" in text
    assert "view 1 of 3" in inspect(stored / "out", "train", "2", tmp_path / "b.png", 1)
    assert (cv2.imread(str(tmp_path / "b.png")) != picture_HWC).any()
    with pytest.raises(HawkError, match="views 0 to 2, not 3"):
        inspect(stored / "out", "train", "2", tmp_path / "b.png", 3)
    with pytest.raises(HawkError, match="no clip '9'"):
        inspect(stored / "out", "train", "9", tmp_path / "a.png")
