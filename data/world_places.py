"""Static backgrounds of the synthetic world: four places, three cameras each, day and night.

A picture has three bands from top to bottom: scenery, pavement, road.  Traffic on the road goes from left to right: an arrow says so.
All positions are shares of the picture's width and height; colours are RGB.
"""
import functools
from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Camera:
    """How a camera sees its place; y values are shares of the picture's height."""
    zoom: float                         # size of actors relative to camera 0
    kerb: float                         # between pavement and road
    shake: float                        # amplitude in pixels at width 320
    gain: tuple[float, float, float]    # colour cast
    mirrored: bool = False              # sees the scenery from the other side; traffic still goes to the right

    @property
    def walk(self) -> float:            # where feet stand on the pavement
        return self.kerb - 0.05

    @property
    def drive(self) -> float:           # where wheels stand on the road
        return self.kerb + 0.21


CAMERAS = (Camera(1.0, 0.66, 0.0, (1.0, 1.0, 1.0)),
           Camera(0.92, 0.63, 0.0, (1.05, 1.0, 0.93), True),
           Camera(1.08, 0.69, 0.6, (0.94, 1.0, 1.06)))


class Canvas:
    """A picture one draws on in shares of its width and height."""

    def __init__(self, width: int, height: int):
        self.frame_HWC = np.zeros((height, width, 3), np.uint8)
        self.width, self.height = width, height

    def box(self, x0, y0, x1, y1, colour):
        w, h = self.width, self.height
        self.frame_HWC[max(0, round(y0 * h)):max(0, round(y1 * h)), max(0, round(x0 * w)):max(0, round(x1 * w))] = colour

    def shape(self, points, colour):
        points_N2 = np.round(np.array(points) * (self.width, self.height)).astype(np.int32)
        cv2.fillPoly(self.frame_HWC, [points_N2], colour, cv2.LINE_AA)

    def disc(self, x, y, radius, colour):
        cv2.circle(self.frame_HWC, (round(x * self.width), round(y * self.height)), round(radius * self.height), colour, -1, cv2.LINE_AA)


def _street(c: Canvas, k: float):
    """Red brick houses with shop windows, grey slabs."""
    c.box(0, 0, 1, k - 0.16, (150, 88, 72))
    for i in range(4):
        x = 0.02 + 0.25 * i
        c.box(x + 0.22, 0, x + 0.235, k - 0.16, (112, 62, 52))
        for row in (0.03, 0.19):
            c.box(x + 0.03, row, x + 0.09, row + 0.10, (205, 200, 170))
            c.box(x + 0.13, row, x + 0.19, row + 0.10, (205, 200, 170))
        c.box(x + 0.02, k - 0.31, x + 0.20, k - 0.18, (88, 96, 104))
        c.box(x + 0.01, k - 0.35, x + 0.21, k - 0.31, (70, 82, 74) if i % 2 else (118, 104, 66))
    c.box(0, k - 0.16, 1, k, (168, 164, 160))
    for i in range(9):
        c.box(0.05 + 0.115 * i, k - 0.16, 0.055 + 0.115 * i, k, (150, 147, 143))
    c.box(0, k, 1, 1, (92, 92, 96))


def _parking(c: Canvas, k: float):
    """A pale warehouse with a blue gate, light concrete with white bays, parked grey vans."""
    c.box(0, 0, 1, 0.12, (178, 204, 226))
    c.box(0, 0.12, 1, k - 0.16, (196, 192, 178))
    for i in range(16):
        c.box(0.03 + 0.0625 * i, 0.12, 0.036 + 0.0625 * i, k - 0.16, (176, 172, 158))
    c.box(0.60, 0.20, 0.86, k - 0.16, (92, 116, 140))
    for i in range(5):
        c.box(0.60, 0.24 + 0.06 * i, 0.86, 0.25 + 0.06 * i, (74, 96, 120))
    for x in (0.08, 0.33):
        c.box(x, k - 0.30, x + 0.17, k - 0.15, (120, 122, 126))
        c.box(x + 0.02, k - 0.28, x + 0.15, k - 0.23, (60, 66, 74))
    c.box(0, k - 0.16, 1, k, (206, 204, 198))
    c.box(0, k, 1, 1, (136, 136, 132))
    for i in range(6):
        x = 0.04 + 0.19 * i
        c.shape([(x + 0.03, k + 0.02), (x + 0.04, k + 0.02), (x + 0.01, k + 0.10), (x, k + 0.10)], (224, 224, 218))


def _park(c: Canvas, k: float):
    """Meadow and round trees, a sandy path, a dark lane."""
    c.box(0, 0, 1, 0.18, (158, 206, 240))
    c.box(0, 0.18, 1, k - 0.14, (96, 150, 72))
    for x, y, r in ((0.08, 0.16, 0.14), (0.29, 0.10, 0.11), (0.50, 0.18, 0.15), (0.73, 0.11, 0.12), (0.93, 0.17, 0.14)):
        c.box(x - 0.012, y, x + 0.012, y + 0.26, (96, 70, 48))
        c.disc(x, y, r, (46, 98, 48))
        c.disc(x - 0.02, y - 0.03, r * 0.6, (60, 116, 58))
    c.box(0, k - 0.14, 1, k, (200, 176, 128))
    c.box(0, k, 1, k + 0.04, (84, 136, 64))
    c.box(0, k + 0.04, 1, 1, (98, 88, 82))


def _station(c: Canvas, k: float):
    """A glass hall with a clock, the dark mouth of the subway, chequered plaza."""
    c.box(0, 0, 1, k - 0.16, (104, 132, 152))
    for i in range(11):
        c.box(0.09 * i, 0, 0.09 * i + 0.008, k - 0.16, (72, 94, 112))
    c.box(0, 0.16, 1, 0.19, (64, 84, 100))
    c.box(0.60, 0.22, 0.92, k - 0.14, (34, 38, 46))
    c.box(0.58, 0.18, 0.94, 0.25, (28, 84, 128))
    c.disc(0.25, 0.13, 0.10, (60, 66, 72))
    c.disc(0.25, 0.13, 0.08, (232, 230, 218))
    c.shape([(0.247, 0.13), (0.253, 0.13), (0.253, 0.07), (0.247, 0.07)], (40, 40, 40))
    c.box(0, k - 0.16, 1, k, (150, 142, 160))
    for i in range(20):
        y = k - 0.16 if i % 2 else k - 0.08
        c.box(0.05 * i, y, 0.05 * i + 0.05, y + 0.08, (130, 122, 142))
    c.box(0, k, 1, 1, (74, 78, 90))


_DRAW = {"street": _street, "parking": _parking, "park": _park, "station": _station}


def _road_marks(c: Canvas, k: float):
    """Kerb, lane edge and the arrows of the traffic's direction."""
    c.box(0, k - 0.012, 1, k + 0.012, (212, 208, 200))
    c.box(0, k + 0.29, 1, k + 0.30, (215, 215, 205))
    for x in (0.16, 0.62):
        y, white = k + 0.255, (226, 226, 216)
        c.box(x, y - 0.012, x + 0.13, y + 0.012, white)
        c.shape([(x + 0.12, y - 0.035), (x + 0.19, y), (x + 0.12, y + 0.035)], white)


@functools.lru_cache(maxsize=48)        # 24 pictures at one size
def background(place: str, camera: int, night: bool, width: int, height: int) -> np.ndarray:
    """The empty scene, u8 [height, width, 3], read-only.  A fixed fine texture keeps optical flow at rest where walls are flat."""
    view = CAMERAS[camera]
    canvas = Canvas(width, height)
    _DRAW[place](canvas, view.kerb)
    if view.mirrored:
        canvas.frame_HWC = np.ascontiguousarray(canvas.frame_HWC[:, ::-1])
    _road_marks(canvas, view.kerb)
    rng = np.random.default_rng([len(place), ord(place[0]), camera])
    texture_HW1 = cv2.GaussianBlur(rng.normal(0, 1, (height, width)).astype(np.float32), (0, 0), 1.6)[..., None] * 24
    gain_C = np.array(view.gain) * (np.array((0.40, 0.44, 0.56)) if night else 1.0)
    frame_HWC = np.clip((canvas.frame_HWC + texture_HW1) * gain_C, 0, 255).astype(np.uint8)
    frame_HWC.setflags(write=False)
    return frame_HWC
