"""The embedded synthetic surveillance world: scenes -> h264 clips, annotations in the authors' format, labels only the renderer knows.

    OUT/videos/{split}/{index:05d}.mp4      h264, world.width x world.height, world.fps
    OUT/annotations_{split}.json            [{"video", "QA": [{"q", "a"}], "description", "split"}]
    OUT/labels.jsonl                        one row per clip: class, place, colours, actors' tracks; used by the toy pre-training
    OUT/world.json                          which world this is

A clip is a pure function of (world.seed, split, index): the same bytes on one machine for any number of processes.  MOTION_PAIRS show
the same objects in the same places and differ in movement only; APPEARANCE_PAIRS move alike and differ in what moves.
`python -m data.synthetic [PNG]` draws docs/world.png, a picture of every class.
"""
import argparse
import contextlib
import difflib
import functools
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import av
import cv2
import numpy as np
from tqdm import tqdm

from data.world_places import background
from data.world_scenes import SCENES_PER_SPLIT, SPLITS, Scene, draw_actors, label_row, make_scene, scene_seed
from data.world_text import CLASS_PHRASES, CLASS_WORDS, CLASSES, NORMAL, QUESTIONS, all_texts, answer, class_named, describe, references
from hawk_jax.config import ConfigError, HawkError, WorldConfig, differences, digest, to_dict

__all__ = ["APPEARANCE_PAIRS", "CLASSES", "CLASS_PHRASES", "MOTION_PAIRS", "NORMAL", "ORDER_PAIRS", "all_texts", "class_named",
           "contact_sheet", "references", "render", "render_frames"]

ORDER_PAIRS = (("driving", "wrong_way"), ("standing_up", "falling"))       # the same frames in reversed order
MOTION_PAIRS = (*ORDER_PAIRS, ("walking", "running"), ("walking", "loitering"), ("collision", "jaywalking"))
APPEARANCE_PAIRS = (("pavement_cycling", "pavement_car"), ("empty", "fire"))
VERSION = 1                             # of the drawing: raised when the same configuration gives other clips
NOISE_PLANES = 16                       # noise repeats after a random walk through so many planes
_CRF = "25"                             # constant quality of x264: noise mostly smoothed away, edges kept


@functools.lru_cache(maxsize=4)
def _noise(height: int, width: int, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative parts of luminance noise, two u8 [planes, height, width]: saturating adds are faster than floats."""
    noise_NHW = np.random.default_rng(7).normal(0, sigma, (NOISE_PLANES, height, width))
    return np.clip(np.round(noise_NHW), 0, 255).astype(np.uint8), np.clip(np.round(-noise_NHW), 0, 255).astype(np.uint8)


def _shaken(frame_HWC: np.ndarray, dx: float, dy: float) -> np.ndarray:
    size = frame_HWC.shape[1::-1]
    return cv2.warpAffine(frame_HWC, np.float32([[1, 0, dx], [0, 1, dy]]), size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _shake_path(scene: Scene, width: int, rng: np.random.Generator) -> np.ndarray:
    """Slow swing of a pole in the wind with short gusts: offsets in pixels, [frames, 2]."""
    if not scene.view.shake:
        return np.zeros((scene.frames, 2))
    phase_2, time_T = rng.uniform(0, 2 * np.pi, 2), np.arange(scene.frames) / scene.fps
    gust_T = np.clip(np.sin(2 * np.pi * 0.25 * time_T + phase_2[0]), 0, 1)
    swing_T2 = np.sin(2 * np.pi * np.array((0.9, 1.3)) * time_T[:, None] + phase_2)
    return scene.view.shake * width / 320 * gust_T[:, None] * swing_T2


def render_frames(scene: Scene, width: int, height: int):
    """Yields the frames of a scene as I420 pictures, u8 [height * 3 / 2, width], sensor noise included."""
    rng = np.random.default_rng(scene.noise)
    base_HWC = cv2.convertScaleAbs(background(scene.place, scene.camera, scene.night, width, height), alpha=scene.gain)
    more_NHW, less_NHW = _noise(height, width, 2.2 if scene.night else 1.5)
    shake_T2 = _shake_path(scene, width, rng)
    for i, plane in enumerate(rng.integers(NOISE_PLANES, size=scene.frames)):
        frame_HWC = base_HWC.copy()
        draw_actors(frame_HWC, scene, i)
        if scene.view.shake:
            frame_HWC = _shaken(frame_HWC, *shake_T2[i])
        yuv_HW = cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2YUV_I420)
        luma_HW = yuv_HW[:height]
        cv2.add(luma_HW, more_NHW[plane], dst=luma_HW)
        cv2.subtract(luma_HW, less_NHW[plane], dst=luma_HW)
        yield yuv_HW


def _encode(scene: Scene, width: int, height: int, path: Path) -> None:
    """Writes the clip under a temporary name first: a file with its final name is whole."""
    part = path.with_name(f".{path.stem}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(part), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=scene.fps, options={"preset": "ultrafast", "crf": _CRF, "threads": "1"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for yuv_HW in render_frames(scene, width, height):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(yuv_HW, format="yuv420p")))
            container.mux(stream.encode(None))
    except OSError as error:            # also FFmpeg's own, such as a full disk
        with contextlib.suppress(OSError):
            part.unlink()
        raise HawkError(f"{path} cannot be written: {error.strerror}; finished clips are kept: run the same command again") from error
    part.replace(path)


def _check(world: WorldConfig) -> None:
    if not 0 < world.seconds[0] <= world.seconds[1]:
        raise ConfigError(f"world.seconds={world.seconds}: expected a shortest and a longest length, both above 0")
    for split in SPLITS:
        if not 0 <= (count := getattr(world, f"{split}_clips")) <= SCENES_PER_SPLIT:
            raise ConfigError(f"world.{split}_clips={count}: expected 0..{SCENES_PER_SPLIT}, one scene seed each")


def _classes(world: WorldConfig) -> tuple[str, ...]:
    for name in world.classes:
        if name not in CLASSES:
            near = difflib.get_close_matches(name, CLASSES, 1, 0.4)
            hint = f"did you mean {near[0]!r}?" if near else "there is: " + ", ".join(CLASSES)
            raise ConfigError(f"world.classes: no class {name!r} in the synthetic world; {hint}")
    return tuple(dict.fromkeys(world.classes)) or CLASSES


def _plan(world: WorldConfig) -> list[tuple[str, int, str]]:
    """(split, index, class) of every clip; within a split the classes are as equally frequent as its size allows."""
    names, plan = _classes(world), []
    for number, split in enumerate(SPLITS):
        count = getattr(world, f"{split}_clips")
        order = np.random.default_rng([world.seed, number]).permutation(count)
        plan += [(split, index, names[place % len(names)]) for index, place in enumerate(order)]
    return plan


def _texts(row: dict, split: str) -> dict:
    """The annotation of a labelled clip: one of its descriptions and two to four question-answer pairs."""
    rng = np.random.default_rng([row["scene"], 1])
    templates = len(CLASS_WORDS[row["class"]].descriptions)
    text = describe(row["class"], row["colours"], row["place"], row["night"], int(rng.integers(templates)), int(rng.integers(2)))
    kinds = rng.permutation(list(QUESTIONS))[:rng.integers(2, 5)]
    pairs = [{"q": QUESTIONS[kind][rng.integers(2)], "a": answer(str(kind), row, int(rng.integers(2)))} for kind in kinds]
    return {"video": row["video"], "QA": pairs, "description": text, "split": split}


def _clip(task: tuple[WorldConfig, str, str, int, str]) -> tuple[dict, dict]:
    """Renders one clip unless its file is there already; returns its label row and its annotation."""
    world, out, split, index, name = task
    video = f"videos/{split}/{index:05d}.mp4"
    seed = scene_seed(world.seed, split, index)
    scene = make_scene(seed, name, world.width, world.height, world.fps, world.seconds)
    if not (path := Path(out) / video).exists():
        _encode(scene, world.width, world.height, path)
    row = label_row(scene, video, seed, world.width / world.height)
    return row, _texts(row, split)


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _claim(world: WorldConfig, out: Path, force: bool) -> None:
    """Marks `out` as the folder of this world; refuses the clips of another one, or deletes them if forced."""
    mark, mine = out / "world.json", {"version": VERSION, "digest": digest(world), "world": json.loads(json.dumps(to_dict(world)))}
    if not mark.exists() and (out / "videos").exists():
        raise HawkError(f"{out}/videos was made by something else (there is no world.json); give another folder")
    if what := _other_world(mark, mine):
        if not force:
            raise HawkError(f"{out} holds another synthetic world ({'; '.join(what)}); give another folder, or --force to replace it")
        shutil.rmtree(out / "videos", ignore_errors=True)
    for part in out.glob("videos/*/.*.part"):    # of a run that was killed
        part.unlink()
    out.mkdir(parents=True, exist_ok=True)
    _write(mark, json.dumps(mine, indent=1))


def _other_world(mark: Path, mine: dict) -> list[str]:
    """How the world that a folder holds differs from ours; [] if it holds ours or none."""
    try:
        other = json.loads(mark.read_text()) if mark.exists() else mine
        return [] if other == mine else differences(other["world"], mine["world"]) or [f"renderer version: {other['version']} -> {VERSION}"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return ["its world.json is damaged"]


def _start_worker() -> None:
    cv2.setNumThreads(1)                # one process per core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C reaches every process of the terminal; the parent decides


def _results(tasks: list, workers: int):
    if workers == 1:
        yield from map(_clip, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker) as pool:
        yield from pool.imap(_clip, tasks, chunksize=8)


def render(world: WorldConfig, out: Path | str, workers: int | None = None, progress: bool = True, force: bool = False) -> dict:
    """Renders the world into `out`; clips that are there already are kept.  Returns {"clips", "rendered", "classes", "bytes"}.

    `workers` processes (None: one per available core); they are spawned, so a calling script needs its `__main__` guard.
    Raises ConfigError for an unknown class or impossible lengths and counts, HawkError if `out` holds another world and `force` is off,
    holds videos of another origin, or cannot be written.
    """
    _check(world)
    out, plan = Path(out), _plan(world)
    _claim(world, out, force)
    before = sum((out / f"videos/{split}/{index:05d}.mp4").exists() for split, index, _ in plan)
    tasks = [(world, str(out), *clip) for clip in plan]
    workers = min(workers or len(os.sched_getaffinity(0)), max(1, len(tasks) - before))
    results = list(tqdm(_results(tasks, workers), total=len(tasks), desc="render", unit="clip", disable=not progress))
    _write(out / "labels.jsonl", "".join(json.dumps(row) + "\n" for row, _ in results))
    for split in SPLITS:
        _write(out / f"annotations_{split}.json", json.dumps([text for _, text in results if text["split"] == split], indent=1))
    size = sum((out / row["video"]).stat().st_size for row, _ in results)
    return {"clips": len(plan), "rendered": len(plan) - before, "classes": list(_classes(world)), "bytes": size}


def contact_sheet(out_png: Path | str, world: WorldConfig | None = None, columns: int = 8, width: int = 72) -> None:
    """A picture of one clip of each class, `columns` frames side by side, for the documentation; 16 levels a channel keep it small."""
    world = world or WorldConfig()
    height, rows = width * world.height // world.width, []
    for number, name in enumerate(CLASSES):
        scene = make_scene(scene_seed(world.seed, "test", number), name, world.width, world.height, world.fps, world.seconds)
        chosen = set(np.linspace(0, scene.frames - 1, columns).round().astype(int).tolist())
        frames = [cv2.resize(cv2.cvtColor(f_HW, cv2.COLOR_YUV2BGR_I420), (width, height), interpolation=cv2.INTER_AREA) & 0xF0 | 8
                  for i, f_HW in enumerate(render_frames(scene, world.width, world.height)) if i in chosen]
        title_HWC = np.full((height, 140, 3), 255, np.uint8)
        colour = (0, 110, 0) if name in NORMAL else (0, 0, 170)
        cv2.putText(title_HWC, name.replace("_", " "), (4, height // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, 1, cv2.LINE_AA)
        white = dict.fromkeys(("top", "bottom", "left", "right"), 1) | {"borderType": cv2.BORDER_CONSTANT, "value": (255, 255, 255)}
        rows.append(np.concatenate([cv2.copyMakeBorder(part_HWC, **white) for part_HWC in (title_HWC, *frames)], axis=1))
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(out_png), np.concatenate(rows, axis=0), [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(prog="python -m data.synthetic", description="Draws one clip of each class as a picture.")
    arguments.add_argument("out", nargs="?", type=Path, default=Path("docs/world.png"), help="a .png file (default: docs/world.png)")
    contact_sheet(arguments.parse_args().out)
