"""Units of pictures: Farneback flow with its masks, and the clip transforms of the released code."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from data import motion
from hawk_jax.config import ModelConfig, VitConfig
from hawk_jax.convert.verify_model import model_config
from hawk_jax.convert.verify_unit import TOLERANCES, Sheet, Unit, UnitError
from hawk_jax.models import pictures

ARGUMENTS = ("pyr_scale", "levels", "winsize", "iterations", "poly_n", "poly_sigma", "flags")    # of OpenCV, in its order


def verify_motion(unit: Unit, sheet: Sheet) -> None:
    options, frames_THWC = unit.info["farneback"], unit.inputs["frames"]
    if sorted(options) != sorted(ARGUMENTS):
        raise UnitError(f"farneback names {sorted(options)}, not {sorted(ARGUMENTS)}")
    unit.expect("recorded_args", [None, *(options[name] for name in ARGUMENTS)])
    index_K = unit.inputs["indices"].copy()
    index_K[:1] = 1                             # hawk.md 5.3; records do the same under input.first_motion_index=one
    sheet.output("exact", "indices_used", index_K)
    gray_THW = np.stack([motion.gray(frame_HWC) for frame_HWC in frames_THWC])
    sheet.output("exact", "gray", gray_THW)
    flow_KHW2 = motion.farneback(gray_THW[index_K - 1], gray_THW[index_K], options)
    sheet.output("flow", "flow", flow_KHW2)
    magnitude_KHW = motion.magnitude(flow_KHW2)
    sheet.output("flow", "magnitude", magnitude_KHW)
    _masks(unit, sheet, frames_THWC[index_K], magnitude_KHW)


def _masks(unit: Unit, sheet: Sheet, frames_KHWC, magnitude_KHW) -> None:
    """Masks and masked frames, without the pixels that a flow within its tolerance may decide otherwise."""
    threshold = unit.info["threshold"]
    theirs_KHW = unit.outputs["magnitude"] if "magnitude" in unit.outputs else motion.magnitude(unit.outputs["flow"])
    far_KHW = np.abs(theirs_KHW - threshold) >= TOLERANCES["flow"].bound
    note = f"{(~far_KHW).sum()} pixels at the threshold left out"
    mask_KHW = motion.binary_mask(magnitude_KHW, threshold)
    bits_KHW = np.unpackbits(motion.pack(mask_KHW), axis=-1, count=mask_KHW.shape[-1])      # as records hold it
    sheet.output("exact", "mask", bits_KHW, keep=far_KHW, note=note)
    sheet.output("exact", "motion_frames", frames_KHWC * bits_KHW[..., None], keep=far_KHW, note=note)


# ------------------------------------------------------------------------------------------------ clip transforms
@functools.partial(jax.jit, static_argnames="config")
def _transform(frames_NHWC, crop_N4, config: ModelConfig):
    """(resized, final) pictures."""
    resized = pictures.crop_resize(frames_NHWC, crop_N4, config.vit.picture, config.antialias)
    return resized, pictures.prepare(frames_NHWC, crop_N4, config)


def _run(clip_CTHW, crop: tuple[int, int, int, int], out: tuple[int, int]):
    """(resized, final) CTHW of one clip; crop: top, left, height, width in pixels."""
    frames_NHWC = np.asarray(clip_CTHW, np.float32).transpose(1, 2, 3, 0)
    height, width = frames_NHWC.shape[1:3]
    share = np.asarray(crop, np.float32) / np.float32([height, width, height, width])
    vit = VitConfig(image_size=out[0], image_width=out[1], patch_size=1, width=1, depth=1, heads=1, mlp=1)
    config = model_config(vit=vit, overshoot="wrap")
    both = _transform(jnp.asarray(frames_NHWC), jnp.tile(share, (len(frames_NHWC), 1)), config)
    return [np.asarray(x).transpose(3, 0, 1, 2) for x in both]


def verify_transforms(unit: Unit, sheet: Sheet) -> None:
    size = unit.info["output_size"]
    out = (size, size) if isinstance(size, int) else tuple(size)
    for name, clip_CTHW in unit.inputs.items():
        for number, crop in enumerate(unit.info["crops_top_left_height_width"]):
            resized, final = _run(clip_CTHW, crop, out)
            sheet.output("resized", f"{name}_crop{number}_resized", resized)
            _final(unit, sheet, f"{name}_crop{number}", final)
        height, width = clip_CTHW.shape[2:]
        sheet.output("grey", f"{name}_eval", _run(clip_CTHW, (0, 0, height, width), (height, width))[1])


def _final(unit: Unit, sheet: Sheet, name: str, final) -> None:
    """After the cast to u8, where a resized value within its tolerance of an integer may become the neighbouring grey level."""
    if f"{name}_train" not in unit.outputs or f"{name}_resized" not in unit.outputs:
        sheet.output("grey", f"{name}_train", final)
        return
    theirs, resized = unit.outputs[f"{name}_train"].astype(np.float64) * 255, unit.outputs[f"{name}_resized"].astype(np.float64)
    near = np.abs(resized - np.round(resized)) < TOLERANCES["resized"].bound
    if final.shape == theirs.shape:
        around = np.abs(final * 255.0 - theirs)
        one_off = near & (np.abs(np.minimum(around, 256 - around) - 1) < 0.01)
        sheet.output("grey", f"{name}_train", final, keep=~one_off, note=f"{one_off.sum()} values at an integer left out")
    else:
        sheet.output("grey", f"{name}_train", final)
