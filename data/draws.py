"""What chance decides, as pure functions of a key: permutations, the view of a clip, its crop window.

Every draw is named by what it is for (seed, purpose, clip, ...), never by who draws it or when, so hosts, worker processes and
restarts agree.  Order, views and crops come from raw bits of Philox: numpy keeps that stream for ever, `Generator.shuffle` not.
"""
import hashlib

import numpy as np

TRIES = 10      # as torchvision's RandomResizedCrop, which the released code uses


def _bits(key: tuple) -> np.random.Philox:
    text = "|".join(map(str, key))
    return np.random.Philox(key=int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little"))


def uniform(count: int, *key) -> np.ndarray:
    """`count` float64 numbers in [0, 1) that belong to `key` (ints and strings)."""
    return (_bits(key).random_raw(count) >> np.uint64(11)) * 2.0 ** -53


def permutation(count: int, *key) -> np.ndarray:
    """A permutation of range(count), int64, that belongs to `key`."""
    return np.argsort(_bits(key).random_raw(count), kind="stable")


def train_view(seed: int, clip: str, times_seen: int, views: int, prepared_views: int) -> int:
    """Which of the record's index sets a clip shows when it was seen `times_seen` times before.

    `views` = K >= 1: the first K sets in turn, in an order of the clip's own: K passes show each once, and features can be cached.
    0: any of the `prepared_views` sets, drawn anew every time.
    """
    if views:
        return int(permutation(views, seed, "views", clip)[times_seen % views])
    return int(uniform(1, seed, "view", clip, times_seen)[0] * prepared_views)


def crop_window(size: int, scale: tuple[float, float], ratio: tuple[float, float], *key) -> np.ndarray:
    """A random resized crop of a square picture of `size` pixels: float32 (top, left, height, width) as fractions of it.

    The rule of torchvision's RandomResizedCrop: area uniform in `scale`, aspect (width : height) log-uniform in `ratio`, whole
    pixels, ten tries, then the largest centred window whose aspect is allowed.
    """
    for area, aspect, down, right in uniform(4 * TRIES, *key).reshape(TRIES, 4):
        target = size * size * (scale[0] + area * (scale[1] - scale[0]))
        shape = np.exp(np.log(ratio[0]) + aspect * (np.log(ratio[1]) - np.log(ratio[0])))
        width, height = round(np.sqrt(target * shape)), round(np.sqrt(target / shape))
        if 0 < width <= size and 0 < height <= size:
            top, left = int(down * (size - height + 1)), int(right * (size - width + 1))
            return np.array([top, left, height, width], np.float32) / np.float32(size)
    width = min(size, round(size * ratio[1]))           # allowed aspects all below 1: narrow
    height = min(size, round(size / ratio[0]))          # all above 1: flat
    return np.array([(size - height) // 2, (size - width) // 2, height, width], np.float32) / np.float32(size)
