"""From clip numbers to one host's rows of a global batch: decode, choose view and crop, encode texts, pad.

Everything is a pure function of the clip, how often it was seen before, and the configuration; nothing depends on host or thread.
"""
from typing import NamedTuple

import numpy as np

from data.draws import crop_window, train_view
from data.plan import PAD, GlobalBatch
from data.records import Record, TextRow
from data.rows import KEYS, PADDING, clip_row, pad_row
from data.text import Tokenizer
from hawk_jax.config import ConfigError, HawkConfig, InputConfig

WHOLE = np.array([0, 0, 1, 1], np.float32)          # no crop, also of clips that are padding: an empty window has no pixels


class Look(NamedTuple):
    """How a clip is shown: number of its index set, and one crop window per branch (fractions; see `crop_window`)."""
    view: int
    crop_4: np.ndarray
    motion_crop_4: np.ndarray


def host_block(clips: int, host: int, hosts: int) -> slice:
    """Rows of a global batch that belong to a host: equal consecutive blocks, so that joining hosts in order gives the batch."""
    if not 0 <= host < hosts or clips % hosts:
        raise ConfigError(f"{clips} clips cannot be shared by {hosts} hosts (this is host {host}): choose a multiple of {hosts}")
    return slice(host * clips // hosts, (host + 1) * clips // hosts)


def look(config: HawkConfig, clip_hash: str, view: int, *key) -> Look:
    """A view of a clip in training.  The crop windows belong to `key`."""
    i, size = config.input, config.prepare.size
    if i.crop == "none":
        return Look(view, WHOLE, WHOLE)
    crop_4 = crop_window(size, i.crop_scale, i.crop_ratio, "crop", clip_hash, *key)
    if i.branch_crops == "shared":
        return Look(view, crop_4, crop_4)
    return Look(view, crop_4, crop_window(size, i.crop_scale, i.crop_ratio, "motion crop", clip_hash, *key))


def view_look(config: HawkConfig, clip_hash: str, view: int) -> Look:
    """The look of a cacheable view (input.views >= 1): it never changes, whatever the epoch or the seed of the order."""
    return look(config, clip_hash, view, config.prepare.view_seed, view)


def train_look(config: HawkConfig, clip_hash: str, seen: int) -> Look:
    """The look of a clip that was trained on `seen` times before."""
    i = config.input
    view = train_view(i.seed, clip_hash, seen, i.views, config.prepare.views)
    return view_look(config, clip_hash, view) if i.views else look(config, clip_hash, view, i.seed, "seen", seen)


# ------------------------------------------------------------------------------------------------ pictures
def empty_pictures(config: HawkConfig, clips: int, cropped: bool) -> dict[str, np.ndarray]:
    """The picture entries of a batch, black and uncropped; the motion branch's own frames and windows only where it has some."""
    i, shape = config.input, (clips, config.prepare.frames, config.prepare.size, config.prepare.size)
    batch = {"frames_BTHWC": np.zeros((*shape, 3), np.uint8), "mask_BTHW": np.zeros(shape, np.uint8),
             "crop_B4": np.tile(WHOLE, (clips, 1))}
    if i.branch_frames == "independent" or i.first_motion_index == "one":
        batch["motion_frames_BTHWC"] = np.zeros((*shape, 3), np.uint8)
    if cropped and i.crop == "random" and i.branch_crops == "independent":
        batch["motion_crop_B4"] = np.tile(WHOLE, (clips, 1))
    return batch


def fill_pictures(batch: dict[str, np.ndarray], row: int, record: Record, look: Look, config: InputConfig) -> None:
    """Writes what a clip shows into row `row` of the entries of `empty_pictures`."""
    seen = record.decode(look.view, mask=config.mask, branch_frames=config.branch_frames,
                         first_motion_index=config.first_motion_index)
    batch["frames_BTHWC"][row], batch["mask_BTHW"][row], batch["crop_B4"][row] = seen.frames_THWC, seen.mask_THW, look.crop_4
    if "motion_frames_BTHWC" in batch:      # a clip whose branches happen to agree has none of its own
        own = seen.motion_frames_THWC
        batch["motion_frames_BTHWC"][row] = seen.frames_THWC if own is None else own
    if "motion_crop_B4" in batch:
        batch["motion_crop_B4"][row] = look.motion_crop_4


def empty_features(kept: dict[str, np.ndarray], clips: int) -> dict[str, np.ndarray]:
    """In place of pictures: entries for the frozen encoder's output, kept per clip N and view K."""
    like = {name: kept[f"{name}_NKTQE"] for name in ("video", "motion")}
    return {f"{name}_BTQE": np.zeros((clips, *x_NKTQE.shape[2:]), x_NKTQE.dtype) for name, x_NKTQE in like.items()}


def fill_features(batch: dict[str, np.ndarray], row: int, kept: dict[str, np.ndarray], clip: int, look: Look) -> None:
    """Writes the kept features of a clip's view into row `row`."""
    for name in ("video", "motion"):
        batch[f"{name}_BTQE"][row] = kept[f"{name}_NKTQE"][clip, look.view]


# ------------------------------------------------------------------------------------------------ texts
def empty_rows(block: slice, plan: GlobalBatch) -> dict[str, np.ndarray]:
    """Entries that every batch has, for rows `block` of a planned one: tokens, all padding so far, and who is who."""
    clip_B = plan.clip_B[block]
    rows_R = np.arange(block.start, block.stop, dtype=np.int32)     # numbers in the global batch: visual tokens are looked up there
    tokens = {f"{key}_RS": np.full((len(clip_B), plan.length), PADDING.get(key, 0), kind) for key, kind in KEYS.items()}
    return tokens | {"clip_RS": np.repeat(rows_R[:, None], plan.length, axis=1),
                     "weight_B": (clip_B != PAD).astype(np.float32), "clip_id_B": clip_B.astype(np.int32)}


def fill_text(batch: dict[str, np.ndarray], row: int, entry: TextRow, seen: int, look: Look, tokenizer: Tokenizer,
              config: HawkConfig) -> None:
    """Writes a clip's tokens into row `row`."""
    # named by its content: the same draws whatever else is in the mixture
    tokens = clip_row(entry, tokenizer, config.input, config.model.video_qformer.queries, clip=entry.content_hash, epoch=seen,
                      times=entry.times_VT[look.view], motion_language=learns_motion_language(config))
    for key, values in pad_row(tokens, batch["tokens_RS"].shape[1]).items():
        batch[f"{key}_RS"][row] = values


def learns_motion_language(config: HawkConfig) -> bool:
    """Do rows have a motion-language segment?  The released stage 2 has none: it counts the video-language loss twice."""
    return config.loss.motion_language_of == "motion_text"
