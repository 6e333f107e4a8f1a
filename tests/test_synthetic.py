"""The synthetic world: its language names one class, its pictures agree with its labels, its files are the same for any process count."""
import dataclasses
import json

import av
import cv2
import numpy as np
import pytest

from data import synthetic
from data.world_places import CAMERAS, background
from data.world_scenes import SCRIPTS, SPLITS, draw_actors, label_row, make_scene, scene_seed
from data.world_text import CLASS_WORDS, COLOURS, PLACES, QUESTIONS, answer
from hawk_jax.config import ConfigError, HawkError, WorldConfig

SMALL = WorldConfig(train_clips=5, validation_clips=1, test_clips=2, seconds=(0.8, 1.2), classes=("walking", "fire", "collision"))


def scene(name: str, seed: int, seconds=(3.0, 3.0), **changes):
    return dataclasses.replace(make_scene(seed, name, 320, 240, 15, seconds), **changes)


def picture(s, i: int) -> np.ndarray:
    frame_HWC = background(s.place, s.camera, s.night, 320, 240).copy()
    draw_actors(frame_HWC, s, i)
    return frame_HWC


def rows_of(name: str):
    for place in PLACES:
        for night in (False, True):
            yield {"class": name, "place": place, "night": night, "colours": ["red", "blue"], "abnormal": name not in synthetic.NORMAL}


def decode(path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


# ---------------------------------------------------------------------------------------------------------------- language
def test_scripts_words_and_phrases_cover_the_same_classes():
    assert tuple(SCRIPTS) == synthetic.CLASSES == tuple(synthetic.CLASS_PHRASES) and len(synthetic.CLASSES) == 18
    assert len([c for c in synthetic.CLASSES if c not in synthetic.NORMAL]) == 14


def test_every_text_names_its_own_class_and_no_other():
    for name in synthetic.CLASSES:
        phrases = {p: n for n, many in synthetic.CLASS_PHRASES.items() for p in many}
        for row in rows_of(name):
            for text in (*synthetic.references(row), answer("what", row), answer("why", row)):
                held = [phrases[p] for p in phrases if p in text.lower()]      # not by class_named: it is what is tested
                assert held == [name], text
                assert synthetic.class_named(text) == name
            for kind in set(QUESTIONS) - {"what", "why"}:
                assert synthetic.class_named(answer(kind, row)) is None


def test_class_named_refuses_two_classes_and_none():
    both = "A person runs away in panic and a car drives against the traffic."
    assert synthetic.class_named(both) is None and synthetic.class_named("A red car.") is None
    assert synthetic.class_named("He  Runs away\nin panic, he runs away in panic") == "running"


def test_texts_have_readable_lengths_and_no_open_slots():
    for name in synthetic.CLASSES:
        for row in rows_of(name):
            assert len(set(synthetic.references(row))) == 6
            assert all(8 <= len(text.split()) <= 22 for text in synthetic.references(row))
            assert all(3 <= len(answer(kind, row, v).split()) <= 14 for kind in QUESTIONS for v in (0, 1))
    assert not any("{" in text or "  " in text for text in synthetic.all_texts())


def test_colours_of_the_text_are_those_of_actors():
    for name, words in CLASS_WORDS.items():
        row = label_row(scene(name, 3), "x", 3, 4 / 3)
        for slot, colour in zip(("{c1}", "{c2}"), row["colours"]):
            assert all((slot in t) == bool(colour) for t in words.descriptions), name
        assert [a["colour"] for a in row["actors"] if a["colour"]] == [c for c in row["colours"] if c]     # the first actor is the main one


# ---------------------------------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize("pair", synthetic.ORDER_PAIRS)
def test_order_pairs_show_the_same_pictures_in_reversed_order(pair):
    one, other = scene(pair[0], 11), scene(pair[1], 11)
    last = one.frames - 1
    assert np.array_equal(picture(one, 5), picture(other, last - 5)) and np.array_equal(picture(one, last - 9), picture(other, 9))
    assert not np.array_equal(picture(one, 5), picture(other, 5))


def test_motion_pairs_show_the_same_kinds_and_appearance_pairs_move_alike():
    for a, b in synthetic.MOTION_PAIRS:
        kinds = [sorted(t.kind for t in scene(name, 4).tracks) for name in (a, b)]
        assert kinds[0] == kinds[1]
    bicycle, car = (scene(name, 9).tracks[0] for name in ("pavement_cycling", "pavement_car"))
    assert bicycle.kind != car.kind and np.array_equal(bicycle.x_T, car.x_T)


@pytest.mark.parametrize("name", ["walking", "driving", "falling", "pavement_cycling", "fence_climbing"])
def test_labels_lie_where_the_pixels_of_the_actor_are(name):
    """The middle of the pixels in the actor's colour, measured in the drawn picture, against the label."""
    s = scene(name, 5, night=False, place="park", colours=("purple", ""))    # purple occurs in no background
    s.tracks[0].colour = "purple"
    actor = label_row(s, "x", 5, 4 / 3)["actors"][0]
    for i in (4, s.frames // 2, s.frames - 4):
        near_HW = np.abs(picture(s, i).astype(int) - COLOURS["purple"]).sum(-1) < 60
        ys, xs = np.nonzero(near_HW)
        assert len(xs) > 300                                                 # large enough to be seen at 56 x 56
        # the torso stands for a person and is a seventh of the picture's height above the middle of the body at most
        assert abs(xs.mean() / 320 - actor["x"][i]) < 0.05 and abs(ys.mean() / 240 - actor["y"][i]) < 0.09


def test_distances_separate_walking_from_running():
    for seed in range(20):
        walked, ran = (np.ptp(scene(name, seed).tracks[0].x_T) for name in ("walking", "running"))
        assert walked < 0.45 < 0.8 < ran


def test_traffic_goes_to_the_right_and_brakes_before_the_jaywalker_only():
    for seed in range(10):
        assert np.all(np.diff(scene("driving", seed).tracks[0].x_T) > 0) and np.all(np.diff(scene("wrong_way", seed).tracks[0].x_T) < 0)
        for name, touches in (("collision", True), ("jaywalking", False)):
            s = scene(name, seed)
            car, person = (next(t for t in s.tracks if t.kind == kind) for kind in ("car", "person"))
            on_road_T = np.abs(person.y_T - car.y_T) < 0.06
            gap = np.min((np.abs(person.x_T - car.x_T))[on_road_T]) * 320 - 0.79 * 0.32 * CAMERAS[s.camera].zoom * 240   # from the bumper
            assert (gap < 8) == touches, (name, seed, gap)


def test_static_pictures_keep_optical_flow_at_rest_after_h264(tmp_path):
    """Farneback as the motion mask uses it, on the decoded clip at 112 x 112: by day and without shake, the mask stays empty."""
    s = scene("empty", 2, seconds=(1.0, 1.0), camera=0, night=False, tracks=[])
    synthetic._encode(s, 320, 240, tmp_path / "a.mp4")
    grey = [cv2.cvtColor(cv2.resize(f, (112, 112), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY) for f in decode(tmp_path / "a.mp4")]
    flows = [cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 10, 3, 5, 1.2, 0) for a, b in zip(grey, grey[1:])]
    moving = [float((np.hypot(f[..., 0], f[..., 1]) > 0.2).mean()) for f in flows]
    assert np.mean(moving) < 0.02


def test_places_cameras_and_nights_look_different():
    pictures = [background(p, c, n, 320, 240).astype(int) for p in PLACES for c in range(len(CAMERAS)) for n in (False, True)]
    gaps = [np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert len(pictures) == 24 and min(gaps) > 5


# ---------------------------------------------------------------------------------------------------------------- files
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    assert synthetic.render(SMALL, out, workers=1, progress=False)["rendered"] == 8
    return out


def content(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_bytes_do_not_depend_on_the_number_of_processes(world, tmp_path):
    synthetic.render(SMALL, tmp_path, workers=2, progress=False)
    assert content(tmp_path) == content(world)


def test_annotations_are_the_authors_format_and_agree_with_labels_and_videos(world):
    rows = {row["video"]: row for row in map(json.loads, (world / "labels.jsonl").read_text().splitlines())}
    items = [item for split in SPLITS for item in json.loads((world / f"annotations_{split}.json").read_text())]
    assert [i["video"] for i in items] == list(rows) and [i["split"] for i in items].count("train") == 5
    for item in items:
        row = rows[item["video"]]
        assert item["description"] in synthetic.references(row) and synthetic.class_named(item["description"]) == row["class"]
        assert 2 <= len(item["QA"]) <= 4 and len({pair["q"] for pair in item["QA"]}) == len(item["QA"])
        kinds = {question: kind for kind, questions in QUESTIONS.items() for question in questions}
        assert all(pair["a"] in (answer(kinds[pair["q"]], row, 0), answer(kinds[pair["q"]], row, 1)) for pair in item["QA"])
        frames = decode(world / item["video"])
        assert len(frames) == row["frames"] and frames[0].shape == (240, 320, 3)
        assert all(len(actor[key]) == row["frames"] for actor in row["actors"] for key in ("x", "y", "angle"))
    with av.open(str(world / "videos/train/00000.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.average_rate == 15 and stream.pix_fmt == "yuv420p"


def test_interrupted_rendering_goes_on_with_what_is_missing(world, tmp_path):
    synthetic.render(SMALL, tmp_path, workers=1, progress=False)
    kept, lost = tmp_path / "videos/train/00000.mp4", tmp_path / "videos/train/00003.mp4"
    time = kept.stat().st_mtime_ns
    lost.unlink()
    lost.with_name(".00003.1.part").write_bytes(b"half a clip")
    assert synthetic.render(SMALL, tmp_path, workers=1, progress=False)["rendered"] == 1
    assert kept.stat().st_mtime_ns == time and content(tmp_path) == content(world)


def test_another_world_in_the_folder_is_refused_unless_forced(tmp_path):
    tiny = dataclasses.replace(SMALL, train_clips=1, validation_clips=0, test_clips=0)
    synthetic.render(tiny, tmp_path, workers=1, progress=False)
    before = (tmp_path / "videos/train/00000.mp4").read_bytes()
    other = dataclasses.replace(tiny, seed=1)
    with pytest.raises(HawkError, match="seed: 0 -> 1"):
        synthetic.render(other, tmp_path, workers=1, progress=False)
    assert synthetic.render(other, tmp_path, workers=1, progress=False, force=True)["rendered"] == 1
    assert (tmp_path / "videos/train/00000.mp4").read_bytes() != before


def test_folders_that_are_no_world_are_left_alone(tmp_path):
    tiny = dataclasses.replace(SMALL, train_clips=1, validation_clips=0, test_clips=0)
    (tmp_path / "mine/videos").mkdir(parents=True)
    for force in (False, True):
        with pytest.raises(HawkError, match="made by something else"):
            synthetic.render(tiny, tmp_path / "mine", progress=False, force=force)
    for content in ("{", "[]", "{}"):
        (tmp_path / "world.json").write_text(content)
        with pytest.raises(HawkError, match="world.json is damaged"):
            synthetic.render(tiny, tmp_path, progress=False)
    with pytest.raises(HawkError, match="cannot be written"):       # a file where the folder should be
        synthetic._encode(scene("empty", 0, (0.2, 0.2)), 320, 240, tmp_path / "world.json" / "a.mp4")


def test_classes_are_balanced_and_splits_share_no_scene():
    plan = synthetic._plan(WorldConfig(train_clips=100, validation_clips=18, test_clips=40))
    for split, size in (("train", 100), ("validation", 18), ("test", 40)):
        counts = [sum(s == split and n == name for s, _, n in plan) for name in synthetic.CLASSES]
        assert sum(counts) == size and max(counts) - min(counts) <= 1
    seeds = [scene_seed(world, split, index) for world in (0, 1) for split in SPLITS for index in (0, 1, 999_999)]
    assert len(set(seeds)) == len(seeds)
    tracks = [make_scene(scene_seed(0, split, 0), "walking", 320, 240, 15, (5.0, 8.0)).tracks[0].x_T[0] for split in SPLITS]
    assert len(set(tracks)) == 3


@pytest.mark.parametrize("change, message", [
    ({"classes": ("walkin",)}, "did you mean 'walking'"), ({"seconds": (3.0, 2.0)}, "seconds"), ({"test_clips": -1}, "test_clips=-1")])
def test_impossible_worlds_are_named(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        synthetic.render(dataclasses.replace(SMALL, **change), tmp_path, progress=False)
    assert not any(tmp_path.iterdir())


def test_contact_sheet_has_a_row_of_frames_for_each_class(tmp_path):
    synthetic.contact_sheet(tmp_path / "sheet.png", WorldConfig(seconds=(0.6, 0.6)), columns=4, width=64)
    sheet_HWC = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet_HWC.shape == (18 * 50, 142 + 4 * 66, 3)                     # one white pixel around each part
    assert all(row_HWC.std() > 10 for row_HWC in np.split(sheet_HWC[:, 142:], 18))
