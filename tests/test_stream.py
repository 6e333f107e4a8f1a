"""The input against its own promises: any number of hosts, threads and workers, any start; and against the records read by hand."""
import dataclasses
import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from data.digest import batch_hash, data_digest
from data.records import Record, content_hash, example, features, open_split, shard_path, text_row
from data.rows import clip_row
from data.stream import Input
from data.text import Tokenizer
from hawk_jax.config import ConfigError, DataSource, HawkConfig, HawkError, InputConfig, PrepareConfig, override, to_dict

PREPARE = PrepareConfig(size=32, frames=4, views=3, shards=2)
COUNTS = {"train": 10, "validation": 5}
WORDS = "a red car drives the wrong way along a busy street while two people fight near a shop".split()


def made_up(number: int, split: str, prefix: str) -> Record:
    """A record of random pictures: what is in them does not matter here, only that each differs."""
    rng = np.random.default_rng([number, len(split), len(prefix)])
    N, S = 7, PREPARE.size
    pictures_NHWC = rng.integers(0, 256, (N, S, S, 3), np.uint8)
    flow_NHW, flow_max_N = rng.random((N, S, S)).astype(np.float32), np.float32([0.1, *rng.uniform(0.5, 4, N - 1)])
    flow_NHW *= (flow_max_N / flow_NHW.max((1, 2)))[:, None, None]
    record = Record(
        clip=f"{prefix}{split}/{number:03d}.mp4", source=f"{prefix}{split}/{number:03d}.mp4", split=split, content_hash="",
        frames=[cv2.imencode(".jpg", p)[1].tobytes() for p in pictures_NHWC], frame_index_N=np.arange(N, dtype=np.int32) * 9,
        times_N=np.arange(N, dtype=np.float32) * 0.6, mask_bits_NHW8=np.packbits(flow_NHW > PREPARE.mask_threshold, axis=-1),
        magnitude_NHW=np.round(255 * flow_NHW / flow_max_N[:, None, None]).astype(np.uint8), flow_max_N=flow_max_N,
        view_VT=np.sort(rng.integers(0, N, (3, 4)), axis=1).astype(np.int32),
        motion_view_VT=np.sort(rng.integers(0, N, (3, 4)), axis=1).astype(np.int32), first_motion=1,
        fps=15.0, raw_frames=60, width=320, height=240, description=" ".join(rng.permutation(WORDS)[:rng.integers(4, 17)]),
        questions=["What happens?", "Where is it?"], answers=[" ".join(rng.permutation(WORDS)[:6]), "In a street."],
        phrases=["car drives", "people fight"], direct_phrases=["car drives"], provenance="{}")
    return dataclasses.replace(record, content_hash=content_hash(record))


def write(folder, prefix="", counts=COUNTS, shards=2):
    """A data set as prepare leaves it."""
    infos, kinds, out = [], features(PREPARE), folder / "hawk_clips" / "1.0.0"
    out.mkdir(parents=True)
    for split, count in counts.items():
        records = [made_up(i, split, prefix) for i in range(count)]
        halves = [records[:count // 3], records[count // 3:]]
        for shard, half in enumerate(halves):
            writer = ArrayRecordWriter(str(shard_path(folder, split, shard, shards)), "group_size:1")
            for record in half:
                writer.write(kinds.serialize_example(example(record)))
            writer.close()
        (folder / f"texts_{split}.jsonl").write_text("".join(json.dumps(text_row(r)) + "\n" for r in records))
        names = tfds.core.ShardedFileTemplate(out, dataset_name="hawk_clips", split=split, filetype_suffix="array_record")
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=list(map(len, halves)), num_bytes=0, filename_template=names))
    tfds.folder_dataset.write_metadata(data_dir=out, features=kinds, split_infos=infos, version="1.0.0", check_data=False)
    splits = {split: {"clips": count} for split, count in counts.items()}
    (folder / "prepare.json").write_text(json.dumps({"prepare": to_dict(PREPARE), "splits": splits}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def config(folder):
    return HawkConfig(prepare=PREPARE, input=InputConfig(
        datasets=(DataSource(str(folder)),), clips=4, tokenizer="embedded", max_caption_tokens=64, conversation_share=0.5))


def reading(config, *folders):
    sources = tuple(DataSource(str(f)) for f in folders)
    return dataclasses.replace(config, input=dataclasses.replace(config.input, datasets=sources))


def first(config, steps=6, start=0, **which):
    with Input(config).train_batches(start, **which) as batches:
        return [next(batches) for _ in range(steps)]


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ------------------------------------------------------------------------------------------------ one stream, however it is read
VARIANTS = {
    "captions": [],
    "released": ["input.mask=binary", "input.branch_crops=independent", "input.branch_frames=independent", "input.prompt=released",
                 "input.first_motion_index=one", "input.description_replacement=in_place"],
    "views": ["input.views=2"],
}


def bucketed(config):
    """Half of the clips in the shorter of two buckets, whatever the tokenizer makes of their words."""
    bound_N = Input(config).train_set.bound_N
    return override(config, [f"input.buckets=({int(np.median(bound_N))}, {bound_N.max()})"])


@pytest.mark.parametrize("variant", [*VARIANTS, "buckets"])
def test_digest_is_that_of_one_host(config, variant):
    config = bucketed(config) if variant == "buckets" else override(config, VARIANTS[variant])
    one = [batch_hash(Input(config).train_batch(step)) for step in range(5)]
    assert len(set(one)) == 5
    for hosts in (1, 2, 4):
        assert list(data_digest(config, range(5), hosts)) == one
    assert list(data_digest(config, range(3, 5), 2)) == one[3:]


def test_threads_and_workers_do_not_change_the_stream(config):
    expected = first(config)
    for options in (["input.threads=0", "input.buffer=1"], ["input.threads=4", "input.buffer=4"],
                    ["input.workers=2", "input.threads=1"]):
        for a, b in zip(expected, first(override(config, options))):
            same(a, b)


def test_random_access_and_start_equal_reading_on(config):
    stream, input = first(config, 8), Input(config)
    same(input.train_batch(5), stream[5])
    same(first(config, 2, start=5 * 4)[1], stream[6])
    names = [n for batch in stream[:5] for n in input.clip_names(batch["clip_id_B"])]
    assert sorted(names[:10]) == sorted(names[10:]) == sorted(input.clips("train")) and names[:10] != names[10:]


def test_another_batch_size_goes_on_from_the_same_clip(config):
    rows = [batch["tokens_RS"] for batch in first(config, 8)]
    six = override(config, ["input.clips=6"])
    assert Input(six).resume_samples(20, 4) == 20
    np.testing.assert_array_equal(np.concatenate([b["tokens_RS"] for b in first(six, 2, start=20)]), np.concatenate(rows[5:]))
    input = Input(bucketed(six))
    assert input.resume_samples(Input(bucketed(config)).steps_per_epoch * 4, 4) == input.steps_per_epoch * 6
    with pytest.raises(ConfigError, match="begin an epoch"):
        input.resume_samples(4, 4)
    with pytest.raises(ConfigError, match="no multiple"):
        input.train_batches(4)


# ------------------------------------------------------------------------------------------------ what is in a batch
def by_hand(config, source, number):
    """Pictures of view 0 straight from the record."""
    record = source[number]
    frames = [cv2.cvtColor(cv2.imdecode(np.frombuffer(record.frames[n], np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
              for n in record.view_VT[0]]
    moves = record.flow_max_N[record.view_VT[0]] >= 0.2
    return np.stack(frames), record.magnitude_NHW[record.view_VT[0]] * moves[:, None, None].astype(np.uint8)


def test_evaluation_pass_holds_every_clip_once_then_padding(config, folder):
    source, tokenizer, input = open_split(folder, "validation"), Tokenizer("embedded"), Input(config)
    batches = list(input.eval_batches("validation"))
    assert [b["weight_B"].tolist() for b in batches] == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert np.concatenate([b["clip_id_B"] for b in batches]).tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    for n in range(5):
        batch, row = batches[n // 4], n % 4
        frames_THWC, mask_THW = by_hand(config, source, n)
        np.testing.assert_array_equal(batch["frames_BTHWC"][row], frames_THWC)
        np.testing.assert_array_equal(batch["mask_BTHW"][row], mask_THW)
        assert batch["crop_B4"][row].tolist() == [0, 0, 1, 1]
        tokens = clip_row(source.texts[n], tokenizer, config.input, 32, clip=source.texts[n].content_hash, epoch=0)
        used = len(tokens["tokens"])
        for key, values in tokens.items():
            np.testing.assert_array_equal(batch[f"{key}_RS"][row, :used], values)
        assert not batch["segment_RS"][row, used:].any() and (batch["slot_RS"][row, used:] == -1).all()
        assert (batch["clip_RS"][row] == row).all()
    pads = {k: v[1:] for k, v in batches[1].items()}
    assert not pads["frames_BTHWC"].any() and not pads["segment_RS"].any() and not pads["loss_RS"].any()
    assert (pads["crop_B4"] == [0, 0, 1, 1]).all()
    assert input.clip_names(batches[1]["clip_id_B"], "validation") == [source.texts[4].clip]
    halves = [np.concatenate([b["tokens_RS"] for b in Input(config).eval_batches("validation", host=h, hosts=2)]) for h in (0, 1)]
    assert [len(h) for h in halves] == [4, 4]


def test_released_options_show_the_motion_branch_its_own_frames(config, folder):
    config = override(config, VARIANTS["released"])
    source = open_split(folder, "train")
    for batch in first(config, 3):
        differ = 0
        for row, number in enumerate(batch["clip_id_B"]):
            record = source[int(number)]
            first_motion = cv2.imdecode(np.frombuffer(record.frames[record.first_motion], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            np.testing.assert_array_equal(batch["motion_frames_BTHWC"][row, 0], first_motion)
            bits_HW = np.unpackbits(record.mask_bits_NHW8[record.first_motion], axis=-1)
            np.testing.assert_array_equal(batch["mask_BTHW"][row, 0], bits_HW * 255)
            differ += not np.array_equal(batch["crop_B4"][row], batch["motion_crop_B4"][row])
        assert differ == 4
    own = ["input.branch_crops=shared", "input.branch_frames=shared", "input.first_motion_index=own"]
    shared = first(override(config, own), 1)[0]
    assert "motion_crop_B4" not in shared and "motion_frames_BTHWC" not in shared


def test_texts_are_drawn_anew_at_every_visit(config, folder):
    source, tokenizer, visits = open_split(folder, "train"), Tokenizer("embedded"), {}
    for batch in first(config, 10):
        for row, clip in enumerate(batch["clip_id_B"].tolist()):
            seen = visits.setdefault(clip, [])
            tokens = clip_row(source.texts[clip], tokenizer, config.input, 32, clip=source.texts[clip].content_hash, epoch=len(seen))
            seen.append(batch["tokens_RS"][row].tobytes())
            np.testing.assert_array_equal(batch["tokens_RS"][row, :len(tokens["tokens"])], tokens["tokens"])
    assert any(len(set(seen)) > 1 for seen in visits.values())


def test_rows_fit_their_bucket_and_no_shorter_one(config):
    config = bucketed(config)
    input = Input(config)
    steps, lengths = input.steps_per_epoch, set()
    seen = []
    for step in range(steps):
        batch = input.train_batch(step)
        lengths.add(batch["tokens_RS"].shape[1])
        seen += [i for i in batch["clip_id_B"].tolist() if i >= 0]
        for clip in batch["clip_id_B"][batch["clip_id_B"] >= 0]:
            bound = input.train_set.bound_N[clip]
            assert batch["tokens_RS"].shape[1] == min(b for b in config.input.buckets if b >= bound)
    assert sorted(seen) == list(range(10)) and len(lengths) > 1
    with pytest.raises(HawkError, match="longest of input.buckets is 5"):
        Input(override(config, ["input.buckets=(5,)"])).steps_per_epoch  # noqa: B018


def test_fixed_views_repeat_and_free_ones_do_not(config):
    def pictures(options, epochs):
        input, found = Input(override(config, ["input.clips=10", *options])), {}
        for epoch in range(epochs):
            batch = input.train_batch(epoch)
            for row, clip in enumerate(batch["clip_id_B"].tolist()):
                found.setdefault(clip, []).append(batch["crop_B4"][row].tobytes() + batch["frames_BTHWC"][row].tobytes())
        return list(found.values())
    for shown in pictures(["input.views=2"], 4):
        assert shown[:2] == shown[2:] and shown[0] != shown[1]
    for shown in pictures(["input.views=1"], 3):
        assert len(set(shown)) == 1
    other_seed = sorted(pictures(["input.views=1", "input.seed=7"], 1))
    assert other_seed == sorted(pictures(["input.views=1"], 1))             # kept features outlive the seed of the order
    for shown in pictures([], 3):
        assert len(set(shown)) == 3


def test_features_take_the_place_of_the_view_they_were_made_from(config):
    config = override(config, ["input.views=2", "input.features=memory"])
    live = Input(override(config, ["input.features=live"]))
    kept = {}
    for split in ("train", "validation"):       # a stand-in for the encoder: the mean of each picture, and its crop
        views = []
        for view in range(2):
            batches = list(live.view_batches(split, view))
            real = np.concatenate([b["weight_B"] for b in batches]) > 0
            mean_BT = np.concatenate([b["frames_BTHWC"].mean((2, 3, 4)) for b in batches])[real]
            crop_B4 = np.concatenate([b["crop_B4"] for b in batches])[real]
            views.append(np.concatenate([mean_BT, crop_B4], axis=1))
        x_NKTQE = np.stack(views, axis=1)[..., None, None].astype(np.float32)
        kept[split] = {"video_NKTQE": x_NKTQE, "motion_NKTQE": -x_NKTQE}
    cached = Input(config, features=kept)
    for step in range(6):
        a, b = live.train_batch(step), cached.train_batch(step)
        same({k: v for k, v in a.items() if k.endswith("_RS")}, {k: v for k, v in b.items() if k.endswith("_RS")})
        assert "frames_BTHWC" not in b
        expected = np.concatenate([a["frames_BTHWC"].mean((2, 3, 4)), a["crop_B4"]], axis=1).astype(np.float32)
        np.testing.assert_array_equal(b["video_BTQE"][..., 0, 0], expected)
        np.testing.assert_array_equal(b["motion_BTQE"], -b["video_BTQE"])
    last = list(cached.eval_batches("validation"))[-1]
    np.testing.assert_array_equal(last["video_BTQE"][0], kept["validation"]["video_NKTQE"][4, 0])
    assert not last["video_BTQE"][1:].any()
    with pytest.raises(ConfigError, match="no features of split 'train'"):
        Input(config).train_batch(0)


# ------------------------------------------------------------------------------------------------ mixtures and faults
def test_more_pieces_than_rows_of_the_decoder_are_refused(config):
    size = Tokenizer("embedded").size
    Input(override(config, [f"model.llama.vocab={size}"]))
    with pytest.raises(ConfigError, match=f"{size} pieces, model.llama.vocab={size - 1}"):
        Input(override(config, [f"model.llama.vocab={size - 1}"]))


def test_mixture_holds_its_shares(config, folder, tmp_path):
    other = write(tmp_path, prefix="other/", counts={"train": 4})
    mixed = reading(config, folder, other)
    input, ids = Input(mixed), []
    for step in range(7):                       # two epochs of 14 clips
        ids += input.train_batch(step)["clip_id_B"].tolist()
    assert [sum(i >= 10 for i in ids[e:e + 14]) for e in (0, 14)] == [7, 7]
    assert str(other) in input.clip_names([12])[0]
    assert input.clips("validation") == Input(config).clips("validation")       # only one of the two has that split
    with pytest.raises(HawkError, match="test"):
        input.clips("test")


def test_faults_are_named(config, folder, tmp_path):
    with pytest.raises(ConfigError, match="multiple of 3"):
        Input(config).train_batches(0, host=0, hosts=3)
    with pytest.raises(HawkError, match="prepare.jpeg_quality: 95 -> 90"):
        Input(override(config, ["prepare.jpeg_quality=90"])).clips("train")
    with pytest.raises(ConfigError, match="datasets is empty"):
        Input(override(config, ["input.datasets=()"])).clips("train")
    with pytest.raises(ConfigError, match="below input.views=0"):
        Input(config).view_batches("train", 0)


@pytest.mark.parametrize("option", ["clips=0", "buffer=0", "threads=-1", "buckets=(0, 9)", "crop_scale=(0.0, 1.0)",
                                    "crop_ratio=(2.0, 1.0)"])
def test_options_that_cannot_work_are_refused(config, option):
    with pytest.raises(ConfigError, match="must be at least|share of the area"):
        override(config, [f"input.{option}"])


def test_reading_never_starts_a_jax_device(config, folder):
    """Devices belong to the training process; Grain imports jax, which is harmless until somebody asks it for one."""
    script = f"""
from jax._src import xla_bridge
from data.stream import Input
from hawk_jax.config import DataSource, HawkConfig, InputConfig, PrepareConfig
config = HawkConfig(prepare={PREPARE!r}, input=InputConfig(datasets=(DataSource({str(folder)!r}),), clips=4, tokenizer="embedded"))
with Input(config).train_batches() as batches:
    next(batches)
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_record_names_step_clip_and_file(config, tmp_path, workers):
    broken = write(tmp_path)
    shard = sorted((broken / "hawk_clips").rglob("*train*array_record-00000*"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 8] ^= 1                     # one bit inside a record
    shard.write_bytes(content)
    config = override(reading(config, broken), [f"input.workers={workers}"])
    with pytest.raises(Exception, match=r"step \d+, clip train/\d+.mp4: record \d+ of .*array_record-00000.*hash mismatch"):
        first(config, 3)
