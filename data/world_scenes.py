"""Scripts of the synthetic world: one function per class moves its actors.

Time runs 0..1 over a clip (`t_T`), positions are shares of the picture's width and height, x at the actor's middle, y where it touches the
ground.  Events are slow and central enough that eight frames spread over the clip show them; how far an actor gets is fixed as a
share of the clip, so that a walker and a runner differ in every clip, however long.
"""
import math
from dataclasses import dataclass, field

import numpy as np

from data import world_actors as draw
from data.world_places import CAMERAS, Camera
from data.world_text import COLOURS, NORMAL, PLACES

SPLITS = ("train", "validation", "test")
PERSON = 0.32                           # height of a standing person, share of the picture's height, at zoom 1
SCENES_PER_SPLIT = 1_000_000            # seeds of a split are consecutive; more clips than this would reach into the next split


@dataclass
class Track:
    """One actor over the clip."""
    kind: str
    colour: str
    x_T: np.ndarray
    y_T: np.ndarray
    angle_T: np.ndarray                 # -1..1, lying left .. right
    reach_T: np.ndarray                 # stretched arm, see world_actors.person
    front_T: np.ndarray                 # drawing order: larger is nearer to the camera
    lift: float = 0.0                   # height of the labelled middle above y, in person heights


@dataclass
class Scene:
    """Everything that decides the pictures of a clip."""
    name: str                           # class
    place: str
    camera: int
    night: bool
    frames: int
    fps: int
    noise: int                          # seed of sensor noise and shake
    gain: float                         # brightness of the day
    colours: tuple[str, str] = ("", "")
    tracks: list[Track] = field(default_factory=list)

    @property
    def view(self) -> Camera:
        return CAMERAS[self.camera]


class Script:
    """What a class function needs: the clock, the camera's lines on the ground, random draws, and `add` for actors."""

    def __init__(self, scene: Scene, aspect: float, rng: np.random.Generator):
        self.scene, self.rng = scene, rng
        self.t_T = np.linspace(0, 1, scene.frames)
        self.walk, self.drive = scene.view.walk, scene.view.drive
        self.tall = PERSON * scene.view.zoom                # of a person, share of the height
        self.wide = self.tall / aspect                      # the same length as share of the width

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def side(self) -> int:
        return int(self.rng.choice((-1, 1)))

    def ramp(self, start: float, end: float) -> np.ndarray:
        """0 before `start`, 1 after `end`, linear between."""
        return np.clip((self.t_T - start) / (end - start), 0, 1)

    def add(self, kind: str, actor: int, x, y, angle=0.0, reach=0.0, front=None, lift: float = 0.5):
        full = [np.broadcast_to(np.asarray(v, np.float64), self.t_T.shape) for v in (x, y, angle, reach, y if front is None else front)]
        self.scene.tracks.append(Track(kind, self.scene.colours[actor] if actor < 2 else "", *full, lift))

    def crossing(self, distance: float) -> np.ndarray:
        """x of a steady way of that length, anywhere in the picture, to either side."""
        free = max(0.0, 0.84 - distance)                    # what is left of the width between margins of 0.08
        x_T = 0.5 - distance / 2 + self.between(-free / 2, free / 2) + distance * self.t_T
        return x_T if self.side() > 0 else x_T[::-1]


def walking(s: Script):
    s.add("person", 0, s.crossing(s.between(0.34, 0.42)), s.walk)


def running(s: Script):
    s.add("person", 0, s.crossing(s.between(0.85, 1.0)), s.walk)


def loitering(s: Script):
    middle, half, turns = s.between(0.25, 0.75), s.between(0.085, 0.105), s.between(4.0, 5.0)
    swing_T = np.arcsin(np.sin(np.pi * (turns * s.t_T + s.between(0, 2)))) * 2 / np.pi
    s.add("person", 0, middle + half * swing_T, s.walk)


def driving(s: Script):
    s.add("car", 0, s.between(0.02, 0.12) + s.between(0.8, 0.9) * s.t_T, s.drive, lift=0.34)


def wrong_way(s: Script):
    driving(s)
    s.scene.tracks[0].x_T = s.scene.tracks[0].x_T[::-1]


def falling(s: Script):
    start, lean = s.between(0.38, 0.48), s.side()
    x = s.between(0.35, 0.65)
    x_T = x + s.side() * 0.2 * (s.ramp(0.0, start) - 1)
    s.add("person", 0, x_T, s.walk, angle=lean * s.ramp(start, start + 0.12) ** 1.5)


def standing_up(s: Script):
    falling(s)
    track = s.scene.tracks[0]
    track.x_T, track.angle_T = track.x_T[::-1], track.angle_T[::-1]


def empty(s: Script):
    """Nothing happens."""


def pavement_cycling(s: Script):
    s.add("bicycle", 0, s.crossing(s.between(0.8, 0.9)), s.walk)


def pavement_car(s: Script):
    s.add("car", 0, s.crossing(s.between(0.8, 0.9)), s.walk + 0.03, lift=0.34)


def fire(s: Script):
    grown_T = 0.45 + 0.55 * s.ramp(0.0, s.between(0.3, 0.6))
    s.add("fire", 2, s.between(0.2, 0.8), s.between(s.walk, s.drive), reach=grown_T, lift=0.35)


def explosion(s: Script):
    begin = s.between(0.25, 0.4)
    age_T = (s.t_T - begin) * s.scene.frames / s.scene.fps
    s.add("explosion", 2, s.between(0.25, 0.75), s.between(s.walk, s.drive), reach=age_T, lift=0.3)


def _road_crossing(s: Script, contact: float):
    """x and y of a person who walks straight over the road and is in the middle of the lane at time `contact`."""
    x, first, pace = s.between(0.52, 0.62), s.walk, (s.drive - 0.03 - s.walk) / (contact - 0.08)
    y_T = first + pace * np.clip(s.t_T - 0.08, 0, None)
    return x, np.minimum(y_T, 1.06)


def collision(s: Script):
    contact = s.between(0.42, 0.5)
    x, y_T = _road_crossing(s, contact)
    thrown_T = s.ramp(contact, contact + 0.1)
    hit_T = s.t_T > contact
    s.add("person", 1, x + 0.10 * thrown_T, np.where(hit_T, s.drive - 0.03, y_T), angle=thrown_T)
    before = x - 0.8 * s.wide
    x_T = np.where(hit_T, before + 0.03 * s.ramp(contact, contact + 0.06), 0.02 + (before - 0.02) * s.ramp(0, contact))
    s.add("car", 0, x_T, s.drive, front=s.drive - 0.04, lift=0.34)
    s.scene.tracks.reverse()            # the car is the main actor


def jaywalking(s: Script):
    x, y_T = _road_crossing(s, s.between(0.42, 0.5))
    s.add("person", 0, x, y_T)
    stop = x - 1.15 * s.wide
    brake_T = 1 - (1 - s.ramp(0.0, s.between(0.45, 0.55))) ** 1.8
    s.add("car", 1, -0.05 + (stop + 0.05) * brake_T, s.drive, lift=0.34)


def fight(s: Script):
    middle, seconds = s.between(0.35, 0.65), s.scene.frames / s.scene.fps
    for actor, side in ((0, -1), (1, 1)):
        beat_T = 2 * np.pi * (s.between(1.1, 1.5) * seconds * s.t_T + s.between(0, 1))
        x_T = middle + side * s.wide * (0.30 + 0.10 * np.sin(beat_T)) + 0.02 * np.sin(2 * np.pi * 2 * s.t_T)
        s.add("person", actor, x_T, s.walk + 0.01 * side, angle=-0.12 * side * np.sin(beat_T), reach=-side * (0.28 + 0.16 * np.cos(beat_T)))


def chase(s: Script):
    gap_T = 0.24 - 0.06 * s.t_T
    x_T = s.between(0.0, 0.05) + s.between(0.72, 0.8) * s.t_T
    ways = (x_T, x_T + gap_T) if s.side() > 0 else (1 - x_T, 1 - x_T - gap_T)
    for actor in (0, 1):
        s.add("person", actor, ways[actor], s.walk)


def abandoned_bag(s: Script):
    down, side, x = s.between(0.33, 0.42), s.side(), s.between(0.42, 0.58)
    person_T = x - side * (0.06 + 0.22 * (1 - s.ramp(0, down))) + s.side() * 0.5 * s.ramp(down + 0.1, 1.05)
    bag_T = np.where(s.t_T < down, person_T + side * 0.06, x)
    carried_T = 1 - s.ramp(down, down + 0.08)
    s.add("person", 0, person_T, s.walk)
    s.add("bag", 1, bag_T, s.walk + 0.02 - 0.35 * s.tall * carried_T, front=s.walk + 0.02, lift=0.16)


def fence_climbing(s: Script):
    x, side, up, over = s.between(0.35, 0.65), s.side(), s.between(0.18, 0.25), s.between(0.55, 0.62)
    way_T = 0.16 * (s.ramp(0, up) - 1) + 0.26 * s.ramp(0.86, 1.1)
    raised_T = s.ramp(up, over) - s.ramp(over + 0.08, 0.86)
    s.add("person", 0, x + side * way_T, s.walk - 0.76 * s.tall * raised_T, front=np.where(s.t_T < over + 0.04, 0.02, -0.04) + s.walk)
    s.add("fence", 2, x, s.walk, lift=0.38)


SCRIPTS = {script.__name__: script for script in (
    walking, driving, standing_up, empty, wrong_way, running, falling, pavement_cycling, pavement_car, fire, explosion, collision, fight,
    chase, abandoned_bag, loitering, fence_climbing, jaywalking)}


def scene_seed(world_seed: int, split: str, index: int) -> int:
    """The number all draws of a clip come from; no two splits share one."""
    return (world_seed * len(SPLITS) + SPLITS.index(split)) * SCENES_PER_SPLIT + index


def make_scene(seed: int, name: str, width: int, height: int, fps: int, seconds: tuple[float, float]) -> Scene:
    """The scene of class `name` drawn from `seed`."""
    rng = np.random.default_rng(seed)
    frames = max(2, round(fps * rng.uniform(*seconds)))
    scene = Scene(name, str(rng.choice(list(PLACES))), int(rng.integers(len(CAMERAS))), bool(rng.random() < 0.4), frames, fps,
                  int(rng.integers(2 ** 31)), float(rng.uniform(0.92, 1.06)))
    scene.colours = tuple(str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
    script = Script(scene, width / height, rng)
    SCRIPTS[name](script)
    if name != "fence_climbing" and rng.random() < 0.2:     # a fence alone must not mean climbing
        script.add("fence", 2, script.between(0.15, 0.85), script.walk - 0.03, lift=0.38)
    scene.colours = tuple(c if any(t.colour == c for t in scene.tracks) else "" for c in scene.colours)
    return scene


def _draw_track(frame_HWC, track: Track, i: int, scene: Scene, light: float):
    height, width = frame_HWC.shape[:2]
    h = PERSON * scene.view.zoom * height
    x, y, time = track.x_T[i] * width, track.y_T[i] * height, i / scene.fps
    colour = tuple(round(v * light) for v in COLOURS.get(track.colour, (0, 0, 0)))
    walked = (x + y) / h                # steps belong to places on the ground: played backwards, the same pictures appear
    angle = float(track.angle_T[i])
    if track.kind in ("person", "car", "bicycle"):
        reach = {"person": 0.22 + 0.3 * abs(angle), "car": 0.8, "bicycle": 0.5}[track.kind]
        draw.shadow(frame_HWC, x + 0.5 * h * math.sin(angle * math.pi / 2), track.y_T[i] * height, reach * h, h)
    if track.kind == "person":
        draw.person(frame_HWC, x, y, h, colour, angle, math.sin(2 * math.pi * walked / 0.9) * (1 - abs(angle)), float(track.reach_T[i]))
    elif track.kind == "car":
        draw.car(frame_HWC, x, y, h, colour)
    elif track.kind == "bicycle":
        draw.bicycle(frame_HWC, x, y, 0.88 * h, colour, 2 * math.pi * walked / 1.6)
    elif track.kind == "bag":
        draw.bag(frame_HWC, x, y, h, colour)
    elif track.kind == "fence":
        draw.fence(frame_HWC, x, y, h)
    elif track.kind == "fire":
        draw.fire(frame_HWC, x, y, h, float(track.reach_T[i]), time)
    elif track.kind == "explosion":
        draw.explosion(frame_HWC, x, y, h, float(track.reach_T[i]))


def draw_actors(frame_HWC: np.ndarray, scene: Scene, i: int) -> None:
    """Draws all actors of raw frame `i` onto the background, the farthest first."""
    light = 0.86 if scene.night else 1.0
    for track in sorted(scene.tracks, key=lambda t: (t.kind == "explosion", t.front_T[i])):
        _draw_track(frame_HWC, track, i, scene, light)


def label_row(scene: Scene, video: str, seed: int, aspect: float) -> dict:
    """The row of labels.jsonl: what only the renderer knows."""
    tall = PERSON * scene.view.zoom
    actors = []
    for track in scene.tracks:
        lean_T = track.angle_T * np.pi / 2
        x_T = track.x_T + track.lift * tall / aspect * np.sin(lean_T)
        y_T = track.y_T - track.lift * tall * np.cos(lean_T)
        away_T = (x_T < -0.1) | (x_T > 1.1) | (y_T > 1.05)
        if track.kind == "explosion":
            away_T = away_T | (track.reach_T <= 0)
        values = {"x": x_T, "y": y_T, "angle": np.abs(track.angle_T)}
        actors.append({"kind": track.kind, "colour": track.colour,
                       **{key: [None if away and key != "angle" else round(float(v), 3) for v, away in zip(v_T, away_T)]
                          for key, v_T in values.items()}})
    return {"video": video, "class": scene.name, "abnormal": scene.name not in NORMAL, "place": scene.place, "night": scene.night,
            "colours": list(scene.colours), "camera": scene.camera, "scene": seed, "fps": scene.fps, "frames": scene.frames,
            "actors": actors}
