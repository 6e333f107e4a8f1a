"""Drawing of the actors of the synthetic world with cv2, anti-aliased at sixteenths of a pixel.

Actors have no front: people, cars and bicycles look the same going left or right, so a single frame does not tell a direction.
Points are (x, y) in pixels, y downwards; `h` is the height of a standing person in pixels; colours are RGB.
"""
import math

import cv2
import numpy as np

SHIFT = 4                               # sub-pixel bits: 16 positions a pixel, below the 0.2 px threshold of the motion mask
SKIN, DARK, TYRE, GLASS, STEEL = (236, 196, 160), (34, 32, 38), (24, 24, 26), (66, 84, 98), (205, 205, 210)


def _fixed(points) -> np.ndarray:
    return np.round(np.asarray(points, np.float64) * (1 << SHIFT)).astype(np.int32)


def _poly(frame_HWC, points, colour):
    cv2.fillConvexPoly(frame_HWC, _fixed(points), colour, cv2.LINE_AA, SHIFT)


def _line(frame_HWC, a, b, colour, thickness: float):
    start, end = _fixed([a, b]).tolist()
    cv2.line(frame_HWC, start, end, colour, max(1, round(thickness)), cv2.LINE_AA, SHIFT)


def _disc(frame_HWC, centre, radius: float, colour):
    cv2.circle(frame_HWC, _fixed(centre).tolist(), round(radius * (1 << SHIFT)), colour, -1, cv2.LINE_AA, SHIFT)


def _shade(colour, factor: float):
    return tuple(min(255, round(v * factor)) for v in colour)


def shadow(frame_HWC, x: float, y: float, half: float, h: float):
    """A darker ellipse on the ground ties an actor to it."""
    top, bottom, left, right = int(y - 0.05 * h), int(y + 0.05 * h), int(x - half), int(x + half)
    part_HWC = frame_HWC[max(top, 0):max(bottom, 0), max(left, 0):max(right, 0)]
    if part_HWC.size:
        dark_HWC = part_HWC.copy()
        cv2.ellipse(dark_HWC, _fixed((x - max(left, 0), y - max(top, 0))).tolist(), _fixed((half, 0.045 * h)).tolist(), 0, 0, 360,
                    (40, 40, 44), -1, cv2.LINE_AA, SHIFT)
        cv2.addWeighted(dark_HWC, 0.45, part_HWC, 0.55, 0, dst=part_HWC)


def person(frame_HWC, x: float, y: float, h: float, colour, angle: float = 0.0, stride: float = 0.0, reach: float = 0.0):
    """Feet at (x, y); `angle` -1..1 turns the body about the feet from upright to lying left or right.

    `stride` -1..1 is the swing of legs and arms; `reach` stretches one arm to the right (> 0) or left (< 0) at shoulder height.
    """
    s, c = math.sin(angle * math.pi / 2), math.cos(angle * math.pi / 2)

    def at(u, v):                       # body axes: u to the right, v from feet to head, in body heights
        return x + h * (u * c + v * s), y + h * (u * s - v * c) - 0.07 * h * abs(s)
    legs, outline = _shade(colour, 0.55), 0.035 * h
    shoulder, hip = 0.79, 0.46
    _poly(frame_HWC, [at(-0.20, 0.86), at(0.20, 0.86), at(0.17, 0.40), at(-0.17, 0.40)], DARK)
    for side in (-1, 1):
        foot = at(side * (0.05 + 0.17 * abs(stride)), 0.03)
        _line(frame_HWC, at(side * 0.06, hip), foot, DARK, 0.12 * h + outline)
        _line(frame_HWC, at(side * 0.06, hip), foot, legs, 0.12 * h)
    for side in (-1, 1):
        hand = at(reach, shoulder + 0.02) if reach * side > 0 else at(side * (0.21 + 0.10 * abs(stride)), 0.46)
        _line(frame_HWC, at(side * 0.15, shoulder), hand, _shade(colour, 0.8), 0.09 * h)
        if reach * side > 0:
            _disc(frame_HWC, hand, 0.06 * h, SKIN)
    _poly(frame_HWC, [at(-0.17, 0.84), at(0.17, 0.84), at(0.14, 0.42), at(-0.14, 0.42)], colour)
    _disc(frame_HWC, at(0, 0.92), 0.105 * h, DARK)
    _disc(frame_HWC, at(0, 0.92), 0.085 * h, SKIN)


def car(frame_HWC, x: float, y: float, h: float, colour):
    """Wheels on the ground at height y, middle at x; 1.5 h long, 0.66 h high, symmetric."""
    def at(u, v):
        return x + h * u, y - h * v
    _poly(frame_HWC, [at(-0.46, 0.40), at(-0.30, 0.68), at(0.30, 0.68), at(0.46, 0.40)], DARK)
    _poly(frame_HWC, [at(-0.77, 0.44), at(0.77, 0.44), at(0.79, 0.08), at(-0.79, 0.08)], DARK)
    _poly(frame_HWC, [at(-0.42, 0.42), at(-0.28, 0.65), at(0.28, 0.65), at(0.42, 0.42)], colour)
    for side in (-1, 1):
        _poly(frame_HWC, [at(side * 0.34, 0.44), at(side * 0.24, 0.60), at(side * 0.04, 0.60), at(side * 0.04, 0.44)], GLASS)
    _poly(frame_HWC, [at(-0.74, 0.42), at(0.74, 0.42), at(0.76, 0.11), at(-0.76, 0.11)], colour)
    _line(frame_HWC, at(0, 0.40), at(0, 0.13), _shade(colour, 0.6), 0.03 * h)
    for side in (-1, 1):
        _disc(frame_HWC, at(side * 0.46, 0.12), 0.15 * h, TYRE)
        _disc(frame_HWC, at(side * 0.46, 0.12), 0.07 * h, STEEL)


def bicycle(frame_HWC, x: float, y: float, h: float, colour, turn: float):
    """A rider on a bicycle, wheels on the ground at height y; `turn` is the angle of the pedals in radians."""
    def at(u, v):
        return x + h * u, y - h * v
    for side in (-1, 1):
        wheel = _fixed(at(side * 0.34, 0.22)).tolist()
        cv2.circle(frame_HWC, wheel, round(0.20 * h * (1 << SHIFT)), TYRE, max(2, round(0.07 * h)), cv2.LINE_AA, SHIFT)
        _line(frame_HWC, at(side * 0.34, 0.22), at(0, 0.26), STEEL, 0.05 * h)
        _line(frame_HWC, at(side * 0.34, 0.22), at(side * 0.26, 0.54), STEEL, 0.04 * h)
    for phase in (turn, turn + math.pi):
        pedal = at(0.09 * math.cos(phase), 0.24 + 0.09 * math.sin(phase))
        _line(frame_HWC, at(0, 0.58), pedal, _shade(colour, 0.55), 0.11 * h)
    _poly(frame_HWC, [at(-0.17, 1.0), at(0.17, 1.0), at(0.15, 0.52), at(-0.15, 0.52)], DARK)
    _poly(frame_HWC, [at(-0.14, 0.98), at(0.14, 0.98), at(0.12, 0.54), at(-0.12, 0.54)], colour)
    for side in (-1, 1):
        _line(frame_HWC, at(side * 0.12, 0.92), at(side * 0.24, 0.58), _shade(colour, 0.8), 0.08 * h)
    _disc(frame_HWC, at(0, 1.08), 0.105 * h, DARK)
    _disc(frame_HWC, at(0, 1.08), 0.085 * h, SKIN)


def bag(frame_HWC, x: float, y: float, h: float, colour):
    """A travel bag whose bottom is at height y."""
    def at(u, v):
        return x + h * u, y - h * v
    _line(frame_HWC, at(-0.09, 0.30), at(-0.06, 0.40), DARK, 0.05 * h)
    _line(frame_HWC, at(0.09, 0.30), at(0.06, 0.40), DARK, 0.05 * h)
    _line(frame_HWC, at(-0.06, 0.40), at(0.06, 0.40), DARK, 0.05 * h)
    _poly(frame_HWC, [at(-0.22, 0.32), at(0.22, 0.32), at(0.24, 0.0), at(-0.24, 0.0)], DARK)
    _poly(frame_HWC, [at(-0.19, 0.29), at(0.19, 0.29), at(0.21, 0.03), at(-0.21, 0.03)], colour)
    _line(frame_HWC, at(-0.20, 0.16), at(0.20, 0.16), _shade(colour, 0.6), 0.04 * h)


def fence(frame_HWC, x: float, y: float, h: float):
    """A panel of steel bars, 1.5 h wide and 0.76 h high."""
    def at(u, v):
        return x + h * u, y - h * v
    for v in (0.12, 0.66):
        _line(frame_HWC, at(-0.75, v), at(0.75, v), DARK, 0.07 * h)
        _line(frame_HWC, at(-0.75, v), at(0.75, v), STEEL, 0.04 * h)
    for i in range(7):
        u = -0.75 + 0.25 * i
        _line(frame_HWC, at(u, 0), at(u, 0.76), DARK, 0.085 * h)
        _line(frame_HWC, at(u, 0), at(u, 0.76), STEEL, 0.05 * h)


def _blend_disc(frame_HWC, x: float, y: float, radius: float, colour, alpha: float):
    height, width = frame_HWC.shape[:2]
    x0, y0 = max(0, int(x - radius) - 2), max(0, int(y - radius) - 2)
    x1, y1 = min(width, int(x + radius) + 3), min(height, int(y + radius) + 3)
    if x0 >= x1 or y0 >= y1:
        return
    part_HWC = frame_HWC[y0:y1, x0:x1]
    solid_HWC = part_HWC.copy()
    _disc(solid_HWC, (x - x0, y - y0), radius, colour)
    cv2.addWeighted(solid_HWC, alpha, part_HWC, 1 - alpha, 0, dst=part_HWC)


def smoke(frame_HWC, x: float, y: float, h: float, amount: float, time: float, colour, spread: float = 0.25):
    """Puffs that rise from (x, y) and widen; `amount` 0..1, `time` in seconds, `spread` sideways in person heights."""
    puffs = 6
    for i in range(puffs):
        age = (time * 0.45 + i / puffs) % 1.0
        drift = spread * age * math.sin(2.4 * i + 0.6 * time)
        _blend_disc(frame_HWC, x + h * drift, y - h * (0.1 + 1.15 * age * (0.4 + 0.6 * amount)), h * amount * (0.12 + 0.26 * age), colour,
                    0.75 * (1 - 0.6 * age))


def fire(frame_HWC, x: float, y: float, h: float, amount: float, time: float):
    """Flickering tongues of flame standing on (x, y), under grey smoke; `amount` 0..1."""
    smoke(frame_HWC, x, y - 0.5 * h * amount, h, amount, time, (120, 118, 116))
    for colour, share in (((235, 60, 15), 1.0), ((255, 150, 20), 0.68), ((255, 240, 120), 0.36)):
        for i in range(5):
            u = (i - 2) * 0.15 * share
            tall = amount * share * (0.72 - 0.10 * abs(i - 2)) * (1 + 0.28 * math.sin(9.0 * time + 2.1 * i + 3 * share))
            sway = 0.07 * math.sin(6.0 * time + 1.7 * i)
            _poly(frame_HWC, [(x + h * amount * (u - 0.13 * share), y), (x + h * (amount * u + sway), y - h * tall),
                              (x + h * amount * (u + 0.13 * share), y)], colour)


def explosion(frame_HWC, x: float, y: float, h: float, age: float):
    """A fireball `age` seconds after ignition, then a black cloud that grows and stays."""
    if age <= 0:
        return
    if age > 0.5:
        smoke(frame_HWC, x, y, 1.4 * h, min(1.0, 0.45 + 0.3 * age), age, (38, 35, 34), 0.5)
    ball = min(1.0, age / 0.2) * max(0.0, 1 - max(0.0, age - 1.3) / 0.7)
    for colour, share in (((240, 90, 15), 1.0), ((255, 190, 40), 0.75), ((255, 255, 220), 0.5)):
        if ball > 0:
            _disc(frame_HWC, (x, y - 0.25 * h), h * ball * share * (0.85 + 0.06 * math.sin(25 * age)), colour)
    if age < 0.35:                      # the flash lights the whole view
        cv2.convertScaleAbs(frame_HWC, dst=frame_HWC, alpha=1.0, beta=80 * (1 - age / 0.35))
