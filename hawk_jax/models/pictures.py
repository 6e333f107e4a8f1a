"""From u8 frames to what the ViT sees, on the device: mask, crop and resize, clip or wrap, normalise.

Resizing is two matrix products per picture with weights made from its crop window, so every clip has its own window in one
compiled program.  Two filters, both torch's: `antialias=False` is F.interpolate(mode="bicubic") on the cropped picture
(cubic coefficient -0.75, borders of the crop repeated), as in the released code; `antialias=True` is the same call with
antialias=True (coefficient -0.5, support widened when shrinking, weights renormalised at borders).
"""
import jax
import jax.numpy as jnp

from hawk_jax.config import ModelConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)     # of EVA-CLIP's training, RGB in 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def cubic(x, a: float):
    """Keys' cubic convolution kernel with coefficient a."""
    x = jnp.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return jnp.where(x <= 1, near, jnp.where(x < 2, far, 0.0))


def resize_weights(start, length, size: int, out: int, antialias: bool):
    """Matrix [out, size] that resizes pixels start..start+length-1 of a line of `size` pixels to `out` (traced start, length)."""
    scale = length / out
    centre = (jnp.arange(out, dtype=jnp.float32) + 0.5) * scale - 0.5       # in pixels of the crop
    pixel = jnp.arange(size, dtype=jnp.float32)
    if antialias:
        wide = jnp.maximum(scale, 1.0)
        inside = (pixel >= start) & (pixel < start + length)
        weights = jnp.where(inside, cubic((pixel - start - centre[:, None]) / wide, -0.5), 0.0)
        return weights / weights.sum(1, keepdims=True)
    first = jnp.floor(centre)
    taps = first[:, None] + jnp.arange(-1, 3)                                # the four neighbours
    weights = cubic(taps - centre[:, None], -0.75)
    at = jnp.clip(taps, 0, length - 1) + start                               # a neighbour outside the crop is its border pixel
    return jnp.einsum("oj,ojx->ox", weights, (at[:, :, None] == pixel).astype(jnp.float32))


def crop_resize(frames_NHWC, crop_N4, out: tuple[int, int], antialias: bool):
    """Windows crop_N4 (top, left, height, width as fractions) of f32 pictures -> [N, *out, C], not clipped; out = (height, width)."""
    n, height, width, _ = frames_NHWC.shape
    window_N4 = jnp.round(crop_N4 * jnp.array([height, width, height, width], jnp.float32))     # windows are whole pixels
    down = jax.vmap(lambda w: resize_weights(w[0], w[2], height, out[0], antialias))(window_N4)     # [N, out height, H]
    along = jax.vmap(lambda w: resize_weights(w[1], w[3], width, out[1], antialias))(window_N4)
    exact = jax.lax.Precision.HIGHEST       # a TF32 product is off by up to a grey level; this is < 0.1 % of the ViT's work
    rows = jnp.einsum("Nyh,NhwC->NywC", down, frames_NHWC, precision=exact)
    return jnp.einsum("Nxw,NywC->NyxC", along, rows, precision=exact)


def finish(pictures_NHWC, config: ModelConfig):
    """Grey levels outside 0..255 clipped (or truncated and wrapped like the released code's u8 cast), then scaled."""
    if config.overshoot == "clip":
        pictures_NHWC = jnp.clip(pictures_NHWC, 0.0, 255.0)
    else:
        pictures_NHWC = jnp.mod(jnp.trunc(pictures_NHWC), 256.0)
    pictures_NHWC = pictures_NHWC / 255.0
    if config.pixels == "unit":
        return pictures_NHWC
    return (pictures_NHWC - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)


def prepare(frames_NHWC, crop_N4, config: ModelConfig, mask_NHW=None):
    """u8 pictures, their windows and (motion branch) u8 masks 0..255 -> f32 pictures of vit.picture."""
    x_NHWC = frames_NHWC.astype(jnp.float32)
    if mask_NHW is not None:
        x_NHWC = x_NHWC * (mask_NHW.astype(jnp.float32) / 255.0)[..., None]
    return finish(crop_resize(x_NHWC, crop_N4, config.vit.picture, config.antialias), config)


def flat_inputs(batch) -> dict:
    """The batch's pictures with clips and frames as one axis N = B*T, and every picture's window."""
    frames = batch["frames_BTHWC"]
    clips, times = frames.shape[:2]

    def flat(x):
        return x.reshape(clips * times, *x.shape[2:])

    def window(name):
        return jnp.repeat(batch.get(name, batch["crop_B4"]), times, axis=0)
    return {"video": flat(frames), "motion": flat(batch.get("motion_frames_BTHWC", frames)), "mask": flat(batch["mask_BTHW"]),
            "video_crop": window("crop_B4"), "motion_crop": window("motion_crop_B4")}


def both_branches(flat: dict, config: ModelConfig):
    """pictures_NXHWC of both branches (X: video, motion) from `flat_inputs` or a part of it."""
    video = prepare(flat["video"], flat["video_crop"], config)
    motion = prepare(flat["motion"], flat["motion_crop"], config, flat["mask"])
    return jnp.stack([video, motion], axis=1)


def branch_pictures(batch, config: ModelConfig):
    """video_BTHWC and motion_BTHWC in float32, as the two branches see them; the whole batch at once (tests, figures)."""
    clips, times = batch["frames_BTHWC"].shape[:2]
    both_NXHWC = both_branches(flat_inputs(batch), config)
    both = both_NXHWC.reshape(clips, times, *both_NXHWC.shape[1:])
    return both[:, :, 0], both[:, :, 1]
