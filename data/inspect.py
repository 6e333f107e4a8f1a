"""A picture of a record: the frames of a view, the motion mask over them, and everything that is said about the clip."""
import json
import textwrap
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # not pyplot: it would keep every figure and choose a window system

from data.records import Record, RecordError, RecordSource, open_split

COLUMNS = 8             # frames in a row of the picture
LINE = 150              # characters


def inspect(folder: Path, split: str, clip: str, out: Path, view: int = 0) -> str:
    """Writes a PNG of one record to `out` and returns its texts.  `clip` is a number or a name.

    RecordError if there is none, it has no such view, or its content is not what was hashed when it was made.
    """
    source = open_split(folder, split)
    record = source[_number(source, str(clip))]
    record.verify()
    if not 0 <= view < len(record.view_VT):
        raise RecordError(f"{folder} has views 0 to {len(record.view_VT) - 1}, not {view}")
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")       # a box stands for it; the printed text has it
            draw(record, view).savefig(out, format="png")
    except OSError as error:
        raise RecordError(f"{out} cannot be written: {error.strerror}") from error
    return f"{caption(record, view)}\npicture: {out}"


def _number(source: RecordSource, clip: str) -> int:
    names = [row.clip for row in source.texts]
    if clip in names:
        return names.index(clip)
    if clip.isdigit() and int(clip) < len(names):
        return int(clip)
    raise RecordError(f"{source.folder} has no clip {clip!r} in split {source.split}: numbers go from 0 to {len(names) - 1}, "
                      f"names are like {names[0]!r}")


def caption(record: Record, view: int) -> str:
    """What the record holds besides pictures, as lines."""
    facts = f"{record.width}x{record.height}, {record.raw_frames} frames, {record.fps:.3g} a second; view {view} of {len(record.view_VT)}"
    pairs = [line for q, a in zip(record.questions, record.answers) for line in (f"Q: {q}", f"A: {a}")]
    provenance = ", ".join(f"{k} {v}" for k, v in json.loads(record.provenance).items())
    lines = [f"{record.clip}   ({record.split}; {facts})", f"times: {', '.join(f'{t:.2f}' for t in record.times_T(view))} s",
             f"description: {record.description}", *pairs, f"phrases: {', '.join(record.phrases) or 'none'}",
             f"direct phrases: {', '.join(record.direct_phrases) or 'none'}", f"provenance: {provenance}"]
    return "\n".join(textwrap.fill(line, LINE, subsequent_indent="    ") for line in lines)


def draw(record: Record, view: int):
    """A matplotlib figure: frames with their times, below each the same frame with both masks over it."""
    pictures = record.decode(view)
    binary_THW = record.decode(view, mask="binary").mask_THW
    overlay_THWC = overlay(pictures.frames_THWC, pictures.mask_THW, binary_THW)
    frames, text = len(overlay_THWC), caption(record, view)
    rows = 2 * -(-frames // COLUMNS)
    text_height = 0.19 * (text.count("\n") + 2)
    figure = Figure(figsize=(2 * COLUMNS, 2.2 * rows + text_height), dpi=80)
    axes_RC = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis in axes_RC.flat:
        axis.set_axis_off()
    for t, (frame_HWC, overlay_HWC) in enumerate(zip(pictures.frames_THWC, overlay_THWC)):
        upper, lower = axes_RC[2 * (t // COLUMNS), t % COLUMNS], axes_RC[2 * (t // COLUMNS) + 1, t % COLUMNS]
        upper.imshow(frame_HWC)
        upper.set_title(f"{record.times_T(view)[t]:.2f} s", fontsize=9)
        lower.imshow(overlay_HWC)
        lower.set_title(f"max {record.flow_max_N[record.view_VT[view, t]]:.1f} px", fontsize=9)
    height = figure.get_figheight()             # inches
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.25 / height, bottom=(text_height + 0.1) / height, wspace=0.03, hspace=0.12)
    figure.text(0.01, text_height / height, text.replace("$", r"\$"), fontsize=9, family="monospace", va="top")
    return figure


def overlay(frames_THWC: np.ndarray, mask_THW: np.ndarray, binary_THW: np.ndarray) -> np.ndarray:
    """Frames with the magnitude mask as heat, and dimmed to a half where the binary mask is 0; u8 [T, H, W, 3]."""
    heat_THWC = matplotlib.colormaps["inferno"](mask_THW)[..., :3] * 255
    share_THW1 = 0.75 * (mask_THW / 255)[..., None]
    dimmed_THWC = frames_THWC * np.where(binary_THW[..., None] > 0, 1.0, 0.5)
    return np.rint((1 - share_THW1) * dimmed_THWC + share_THW1 * heat_THWC).astype(np.uint8)
