"""Flow and masks against values that the released code's own function gave (goldens made with OpenCV 4.8.1)."""
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from data import motion

THRESHOLD = 0.2


@pytest.mark.parametrize("name", ["farneback_64", "farneback_224", "farneback_64_pan", "farneback_64_noise"])
def test_flow_masks_and_motion_frames_are_those_of_the_released_code(shared, name):
    golden = load_file(shared / f"goldens/hawk/{name}.safetensors")
    near = json.loads((shared / f"goldens/hawk/{name}.json").read_text())["near_threshold_pixels"]
    frames_THWC, index_K = golden["inputs/frames"], golden["outputs/indices_used"]
    gray_THW = np.stack([motion.gray(frame_HWC) for frame_HWC in frames_THWC])
    np.testing.assert_array_equal(gray_THW, golden["outputs/gray"])
    flow_KHW2 = motion.farneback(gray_THW[index_K - 1], gray_THW[index_K])
    # bit-identical where the goldens were made; another processor may sum in another order
    np.testing.assert_allclose(flow_KHW2, golden["outputs/flow"], atol=1e-3)
    bits_KHW8, share_KHW, highest_K = motion.masks(gray_THW[index_K - 1], gray_THW[index_K], motion.farneback, THRESHOLD)
    mask_KHW = np.unpackbits(bits_KHW8, axis=-1, count=frames_THWC.shape[2])
    wrong = (mask_KHW != golden["outputs/mask"]).sum()
    assert wrong <= near["<1e-3"]                   # pixels that such a difference of flow may decide otherwise
    different_KHWC = frames_THWC[index_K] * mask_KHW[..., None] != golden["outputs/motion_frames"]
    assert different_KHWC.any(axis=-1).sum() <= wrong
    true_KHW = np.hypot(golden["outputs/flow"][..., 0], golden["outputs/flow"][..., 1])
    restored_KHW = share_KHW / 255 * highest_K[:, None, None]
    # rounding to 1/255 of the frame's maximum is off by at most half a step
    assert (abs(restored_KHW - true_KHW) <= highest_K[:, None, None] / 509).all()
    np.testing.assert_allclose(highest_K, true_KHW.max(axis=(1, 2)), atol=1e-3)


def test_the_first_frame_takes_the_flow_to_the_second():
    assert [motion.pair_of(n) for n in (0, 1, 2, 9)] == [1, 1, 2, 9]


def test_a_still_pair_has_no_motion_and_no_division_by_zero():
    still_NHW = np.random.default_rng(0).integers(0, 255, (2, 24, 20), np.uint8)
    bits_NHW8, *_ = motion.masks(still_NHW, still_NHW, motion.farneback, THRESHOLD)
    assert bits_NHW8.shape == (2, 24, 3) and not bits_NHW8.any()
    with np.errstate(all="raise"):
        share_NHW, highest_N = motion.quantise(np.zeros((2, 24, 20), np.float32))
    assert not share_NHW.any() and not highest_N.any()


def test_the_threshold_is_strict_and_the_maximum_is_255():
    size_NHW = np.array([[[0.2, np.nextafter(np.float32(0.2), np.float32(1)), 0.4, 0.0]]], np.float32)
    assert motion.binary_mask(size_NHW, np.float32(0.2)).tolist() == [[[0, 1, 1, 0]]]
    share_NHW, highest_N = motion.quantise(size_NHW)
    assert share_NHW.tolist() == [[[128, 128, 255, 0]]] and highest_N.tolist() == [np.float32(0.4)]
