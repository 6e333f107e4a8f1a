"""Pictures against the authors' transforms (golden) and against torch's own interpolation."""
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import TINY, golden

from hawk_jax.config import VitConfig
from hawk_jax.models import pictures

torch = pytest.importorskip("torch", reason="reference interpolation")
SMALL = dataclasses.replace(TINY, vit=VitConfig(image_size=28, patch_size=14, width=8, depth=1, heads=2, mlp=8), overshoot="wrap")


def window(crop, size):
    return jnp.asarray(np.array(crop, np.float32) / size)


@pytest.mark.parametrize("kind", ["smooth", "hard"])
def test_crops_of_the_released_code(shared, kind):
    """Float image before the cast to u8, and the final one.

    2.5e-3 grey levels, 1e-5 of the range: cubic weights are differences of terms near 3, so each is off by a few 1e-7, and eight of
    them multiply values of 255.  A value that close to an integer may truncate to the neighbouring grey level.
    """
    _, inputs, outputs, info = golden(shared, "video_transform")
    frames_NHWC = jnp.asarray(inputs[kind].transpose(1, 2, 3, 0))
    for number, crop in enumerate(info["crops_top_left_height_width"]):
        crop_N4 = jnp.tile(window(crop, 40), (2, 1))
        resized = np.asarray(pictures.crop_resize(frames_NHWC, crop_N4, (28, 28), False)).transpose(3, 0, 1, 2)
        expected = outputs[f"{kind}_crop{number}_resized"]
        np.testing.assert_allclose(resized, expected, atol=2.5e-3, rtol=0)
        final = np.asarray(pictures.prepare(frames_NHWC, crop_N4, SMALL)).transpose(3, 0, 1, 2) * 255
        apart = np.abs(final - 255 * outputs[f"{kind}_crop{number}_train"])
        near_integer = np.abs(expected - np.round(expected)) < 2.5e-3
        assert apart[~near_integer].max() < 1e-3
        assert near_integer.mean() < 0.9


def test_evaluation_leaves_pictures_as_they_are(shared):
    _, inputs, outputs, _ = golden(shared, "video_transform")
    config = dataclasses.replace(SMALL, vit=dataclasses.replace(SMALL.vit, image_size=40, patch_size=10))
    frames_NHWC = jnp.asarray(inputs["hard"].transpose(1, 2, 3, 0))
    for overshoot in ("wrap", "clip"):
        ours = pictures.prepare(jnp.floor(frames_NHWC), jnp.tile(window((0, 0, 40, 40), 40), (2, 1)),
                                dataclasses.replace(config, overshoot=overshoot))
        np.testing.assert_allclose(np.asarray(ours).transpose(3, 0, 1, 2), outputs["hard_eval"], atol=1e-6)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("crop", [(0, 0, 64, 48), (5, 3, 50, 40), (11, 7, 17, 13)])
def test_resize_equals_torch(crop, antialias):
    """Shrinking and enlarging windows; clipped result.  Tolerance: float32 rounding of sums of up to 12 weights at 255."""
    rng = np.random.default_rng(3)
    frames_NHWC = rng.integers(0, 256, (2, 64, 48, 3)).astype(np.uint8)
    top, left, height, width = crop
    cut = torch.tensor(frames_NHWC[:, top:top + height, left:left + width].astype(np.float32)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(cut, size=(28, 28), mode="bicubic", antialias=antialias).clamp(0, 255).permute(0, 2, 3, 1)
    crop_N4 = jnp.tile(window(crop, np.array([64, 48, 64, 48])), (2, 1))
    config = dataclasses.replace(SMALL, overshoot="clip", antialias=antialias)
    ours = pictures.prepare(jnp.asarray(frames_NHWC), crop_N4, config)
    np.testing.assert_allclose(np.asarray(ours) * 255, expected.numpy(), atol=2e-3, rtol=0)


def batch(rng, **more):
    return {"frames_BTHWC": rng.integers(0, 256, (2, 3, 28, 28, 3)).astype(np.uint8),
            "mask_BTHW": rng.integers(0, 256, (2, 3, 28, 28)).astype(np.uint8),
            "crop_B4": np.tile(np.array([0, 0, 1, 1], np.float32), (2, 1))} | more


def test_mask_and_normalisation():
    """Numpy float64, three lines: picture x mask, CLIP mean and standard deviation as published with CLIP."""
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    data = batch(np.random.default_rng(0))
    video, motion = pictures.branch_pictures(data, dataclasses.replace(SMALL, overshoot="clip", pixels="clip_norm"))
    frames = data["frames_BTHWC"] / 255.0
    np.testing.assert_allclose(video, (frames - mean) / std, atol=2e-6)
    np.testing.assert_allclose(motion, (frames * data["mask_BTHW"][..., None] / 255.0 - mean) / std, atol=2e-6)


def test_branches_may_differ_in_frames_and_windows():
    """The motion branch given its own frames and window equals the video branch of a batch that has those."""
    rng = np.random.default_rng(1)
    crop = np.array([[0.25, 0.0, 0.5, 0.5], [0.0, 0.25, 0.75, 0.5]], np.float32)
    own = rng.integers(0, 256, (2, 3, 28, 28, 3)).astype(np.uint8)
    data = batch(rng, motion_frames_BTHWC=own, motion_crop_B4=crop, mask_BTHW=np.full((2, 3, 28, 28), 255, np.uint8))
    video, motion = pictures.branch_pictures(data, SMALL)
    swapped, _ = pictures.branch_pictures(data | {"frames_BTHWC": own, "crop_B4": crop}, SMALL)
    unchanged, _ = pictures.branch_pictures(batch(rng, frames_BTHWC=data["frames_BTHWC"]), SMALL)
    np.testing.assert_array_equal(motion, swapped)
    np.testing.assert_array_equal(video, unchanged)
    assert np.abs(np.asarray(video) - np.asarray(motion)).max() > 0.1
