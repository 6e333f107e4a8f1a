"""Motion masks: Farneback flow between neighbouring raw frames, its magnitude, and the two forms in which records keep it.

Flow is computed on the resized frames before JPEG: a mask from JPEG frames correlates only .92-.98 with the true one.
"""
import cv2
import numpy as np

# hawk.md 5.3: what the released code passes to OpenCV
FARNEBACK = dict(pyr_scale=0.5, levels=3, winsize=10, iterations=3, poly_n=5, poly_sigma=1.2, flags=0)


def gray(picture_HWC: np.ndarray) -> np.ndarray:
    """RGB u8 -> u8 [H, W], OpenCV's weights (0.299, 0.587, 0.114)."""
    return cv2.cvtColor(picture_HWC, cv2.COLOR_RGB2GRAY)


def farneback(before_NHW: np.ndarray, after_NHW: np.ndarray, options: dict = FARNEBACK) -> np.ndarray:
    """Flow of each pair of gray u8 pictures in pixels, f32 [N, H, W, 2] as (x, y).  The default `flow` function of `prepare`.

    options: OpenCV's, other than FARNEBACK only to verify values recorded with others.
    """
    return np.stack([cv2.calcOpticalFlowFarneback(before, after, None, **options) for before, after in zip(before_NHW, after_NHW)])


def magnitude(flow_NHW2: np.ndarray) -> np.ndarray:
    """Length of each flow vector in pixels, f32 [N, H, W]; by cartToPolar, as the released code."""
    return np.stack([cv2.cartToPolar(flow_HW2[..., 0], flow_HW2[..., 1])[0] for flow_HW2 in flow_NHW2])


def pair_of(frame: int) -> int:
    """The flow that belongs to a raw frame is that of (pair_of - 1, pair_of): the first frame has no predecessor and takes the next."""
    return max(frame, 1)


def binary_mask(magnitude_NHW: np.ndarray, threshold: float) -> np.ndarray:
    """u8 0/1: magnitude > threshold pixels (released code)."""
    return (magnitude_NHW > threshold).astype(np.uint8)


def pack(mask_NHW: np.ndarray) -> np.ndarray:
    """0/1 -> one bit a pixel, u8 [N, H, ceil(W / 8)]."""
    return np.packbits(mask_NHW, axis=-1)


def quantise(magnitude_NHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Magnitude -> (u8 share of the frame's maximum x 255 [N, H, W], that maximum in pixels f32 [N]); Eq. 4 to within 1/510."""
    highest_N = magnitude_NHW.max(axis=(1, 2))
    scale_N11 = 255 / np.maximum(highest_N, 1e-6)[:, None, None]       # a still frame has maximum 0
    return np.rint(magnitude_NHW * scale_N11).astype(np.uint8), highest_N


def masks(before_NHW: np.ndarray, after_NHW: np.ndarray, flow, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gray pairs -> (mask_bits_NHW8, magnitude_NHW, flow_max_N) as a record holds them; `flow` has the signature of `farneback`."""
    size_NHW = magnitude(flow(before_NHW, after_NHW))
    return pack(binary_mask(size_NHW, threshold)), *quantise(size_NHW)
