"""Videos and questions -> what `HawkModel` reads: the same arrays, bit for bit, as in training, and the same prompt tokens.

Pictures: uniform frames, resized to a square; Farneback flow of each shown frame from the raw frame before it; then a JPEG round trip,
because training sees frames from JPEG and masks from before it.  Text: sentencepiece, each piece between visual tokens on its own;
templates stand in preprocessor_config.json.  Needs numpy, OpenCV, PyAV, Pillow, sentencepiece, transformers; nothing of hawk_jax.
"""
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import sentencepiece
from transformers import BatchFeature
from transformers.utils import cached_file

from .videos_hawk import HawkVideoError, clock, jpeg, motion_mask, open_video, resize

SETTINGS, TOKENIZER, TOKENIZER_SETTINGS = "preprocessor_config.json", "tokenizer.model", "tokenizer_config.json"
CODE = ("processing_hawk.py", "videos_hawk.py")
# what finds files, on the hub as in a folder
PLACE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies", "subfolder")
UNK, BOS, EOS = 0, 1, 2


class Shown(NamedTuple):
    """One clip as the model sees it."""
    frames_THWC: np.ndarray         # u8 RGB
    masks_THW: np.ndarray           # u8, share of the frame's largest flow x 255, or 0 / 255
    motion_frames_THWC: np.ndarray  # the motion branch's frames, before the mask
    times_T: np.ndarray             # f32, seconds from the first frame


class Raw(NamedTuple):
    """What one pass over a video keeps, by raw frame number."""
    stamps: list                    # seconds or None, of every frame
    pictures: dict[int, np.ndarray]
    gray: dict[int, np.ndarray]


class HawkProcessor:
    """See the head of this file.

    pictures: size, frames, jpeg_quality, mask, mask_threshold, first_motion_index, max_frames, max_pixels.  text: queries, conversation
    (None asks by a question, else by the caption prompt), system_prompt, text_mask, end_symbol, templates.  tokenizer: content of a
    sentencepiece model with unk, bos, eos = 0, 1, 2; None = no texts.
    """

    def __init__(self, pictures: dict, text: dict, tokenizer: bytes | None = None, tokenizer_settings: bytes | None = None):
        self.pictures, self.text, self.files = dict(pictures), dict(text), {TOKENIZER: tokenizer, TOKENIZER_SETTINGS: tokenizer_settings}
        self.pieces = None
        if tokenizer is not None:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
            ids = (self.pieces.unk_id(), self.pieces.bos_id(), self.pieces.eos_id())
            if ids != (UNK, BOS, EOS):
                raise ValueError(f"{TOKENIZER} numbers unk, bos, eos as {ids}; this model needs (0, 1, 2)")

    # ------------------------------------------------------------------------------------------ files
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "HawkProcessor":
        """From a folder or a hub id; of `kwargs` only those that find files are used (`PLACE`)."""
        place = {key: kwargs[key] for key in PLACE if key in kwargs}

        def read(name: str) -> bytes | None:
            path = cached_file(pretrained_model_name_or_path, name, _raise_exceptions_for_missing_entries=False, **place)
            return Path(path).read_bytes() if path else None
        settings = read(SETTINGS)
        if settings is None:
            raise OSError(f"{pretrained_model_name_or_path} has no {SETTINGS}: not a folder of this model")
        settings = json.loads(settings)
        return cls(settings["pictures"], settings["text"], read(TOKENIZER), read(TOKENIZER_SETTINGS))

    def save_pretrained(self, save_directory) -> None:
        """Settings, tokenizer and the files of this code."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"auto_map": {"AutoProcessor": f"processing_hawk.{type(self).__name__}"}, "pictures": self.pictures, "text": self.text}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1))
        self.save_tokenizer(folder)
        for name in CODE:
            if (source := Path(__file__).with_name(name)).resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)

    def save_tokenizer(self, folder: Path) -> None:
        """The tokenizer's files as they were read."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            if content is not None:
                (folder / name).write_bytes(content)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor") -> None:
        """AutoProcessor calls this; the entry in preprocessor_config.json is written anyway."""

    # ------------------------------------------------------------------------------------------ the whole
    def __call__(self, video, question=None, *, history: Sequence[tuple[str, str]] = (), times: bool = True, fps: float | None = None,
                 return_tensors: str = "pt") -> BatchFeature:
        """What `HawkModel.prompt_embeds` and `forward` take: pictures of the clips, left-padded prompts about them.

        video, question, history: as in `HawkModel.generate`.  times: the released prompt says when frames were taken, as in its
        training; False gives the layout of its demo.  fps: frames per second of folders and decoded frames (1 if unknown).

        Returns frames u8 [B, T, S, S, 3], masks u8 [B, T, S, S], motion_frames where the motion branch has its own, input_ids, slots
        (-1 = text), attention_mask, position_ids [R, L], clips [R].  Raises HawkVideoError.
        """
        shown = [self.clip(one, fps) for one in _videos(video)]
        questions = list(question) if isinstance(question, (list, tuple)) else [question] * len(shown)
        if len(shown) not in (1, len(questions)):
            raise ValueError(f"{len(shown)} videos and {len(questions)} questions: one video takes many questions, several take as many")
        clips = [0] * len(questions) if len(shown) == 1 else list(range(len(shown)))
        prompts = [self.prompt(q, history, shown[c].times_T if times else None) for q, c in zip(questions, clips)]
        data = {"frames": np.stack([s.frames_THWC for s in shown]), "masks": np.stack([s.masks_THW for s in shown])}
        if self.pictures["first_motion_index"] == "one":
            data["motion_frames"] = np.stack([s.motion_frames_THWC for s in shown])
        return BatchFeature(data | _padded(prompts) | {"clips": np.array(clips, np.int64)}, tensor_type=return_tensors)

    # ------------------------------------------------------------------------------------------ pictures
    def clip(self, video, fps: float | None = None) -> Shown:
        """Pictures of one video (path of a file or folder, or decoded frames).  Raises HawkVideoError."""
        try:
            return self._shown(open_video(video, self.pictures["max_pixels"], fps))
        except HawkVideoError as error:
            raise HawkVideoError(f"{video if isinstance(video, (str, Path)) else 'decoded frames'}: {error}") from error

    def _shown(self, source) -> Shown:
        """Uniform frames; where another number of frames comes out than the file has packets, once more with that number."""
        p, expected = self.pictures, source.expected()
        for _ in range(2):
            if expected > p["max_frames"]:
                raise HawkVideoError(f"too long: more than {p['max_frames']} frames")
            index_T = np.arange(p["frames"], dtype=np.int64) * max(expected, 1) // p["frames"]
            raw = self._decode(source, {*index_T.tolist(), 0, 1})
            count = len(raw.stamps)
            if not count:
                raise HawkVideoError("no frame can be decoded")
            if count == expected:
                break
            expected = count
        else:
            raise HawkVideoError("cannot be decoded: two passes gave different numbers of frames")
        motion_T = index_T.copy()
        if p["first_motion_index"] == "one":
            motion_T[0] = min(1, count - 1)
        masks = {n: self._mask(raw.gray, n) for n in {*motion_T.tolist()}}
        return Shown(np.stack([raw.pictures[n] for n in index_T]), np.stack([masks[n] for n in motion_T]),
                     np.stack([raw.pictures[n] for n in motion_T]), clock(raw.stamps, source.fps)[index_T])

    def _decode(self, source, wanted: set[int]) -> Raw:
        """One pass in order that holds only the wanted frames, and gray ones of their predecessors."""
        p, raw = self.pictures, Raw([], {}, {})
        for number, (stamp, pixels) in enumerate(source):
            if number >= p["max_frames"]:
                raise HawkVideoError(f"too long: more than {p['max_frames']} frames")
            raw.stamps.append(stamp)
            if number in wanted or number + 1 in wanted:
                picture_HWC = resize(pixels(), p["size"])
                raw.gray[number] = cv2.cvtColor(picture_HWC, cv2.COLOR_RGB2GRAY)
                if number in wanted:
                    raw.pictures[number] = jpeg(picture_HWC, p["jpeg_quality"])
        return raw

    def _mask(self, gray: dict[int, np.ndarray], number: int) -> np.ndarray:
        """The first frame has no predecessor and takes the flow of the next; a video of one frame does not move."""
        after = max(number, 1)
        if after not in gray:
            return np.zeros_like(gray[0])
        return motion_mask(gray[after - 1], gray[after], self.pictures["mask"], self.pictures["mask_threshold"])

    # ------------------------------------------------------------------------------------------ text
    def prompt(self, question: str | None = None, history: Sequence[tuple[str, str]] = (), times=None) -> dict[str, np.ndarray]:
        """The row that an answer continues: input_ids, slots (-1 = text), attention_mask, position_ids, i64 [L] each.

        question None asks for the description; times: seconds of the frames shown, for the released prompt.
        """
        if self.pieces is None:
            raise ValueError(f"this folder has no {TOKENIZER}; put the decoder's there")
        t = self.text["templates"]
        if question is None and not self.text["conversation"]:
            return self._row(self._spans(_text_parts(t["caption"])), hide_unk=False)
        question = t["description"] if question is None else question
        first, *later = [*history, (question, None)]
        *before, instruction = self._first_parts(first[0], times)
        spans = self._spans([*before, instruction] if first[1] is None else before)
        if first[1] is not None:
            spans += self._answer(instruction, first[1])
        for asked, answer in later:
            message = t["round"].format(message=asked)
            spans.append(([BOS], None))
            spans += [(self.pieces.encode(message), None)] if answer is None else self._answer(message, answer)
        return self._row(spans, hide_unk=self.text["text_mask"] == "not_unk")

    def _first_parts(self, question: str, times) -> list[str]:
        t, message = self.text["templates"], ""
        if times is not None:       # through the shortest decimal: 0.45 as f32 rounds as 0.45 does
            seconds = [f"{float(str(round(float(x), 4))):.1f}" for x in times]
            message = t["times"].format(count=len(seconds), seconds=", ".join(seconds))
        template = t["round"].replace("{message}", t["system"] + t["chat" if times is None else "question"])
        return _text_parts(template, system=self.text["system_prompt"], question=question, times=message)

    def _spans(self, parts: list[str]) -> list[tuple]:
        """(ids, slots or None) of BOS and the parts of `_text_parts`."""
        queries, spans = self.text["queries"], [([BOS], None)]
        for i, part in enumerate(parts):
            if i % 2:
                first = 0 if part == "video" else queries
                spans.append(([UNK] * queries, list(range(first, first + queries))))
            elif part:
                spans.append((self.pieces.encode(part), None))
        return spans

    def _answer(self, instruction: str, answer: str) -> list[tuple]:
        return [(self.pieces.encode(f"{instruction} {answer} "), None), ([EOS], None)]

    def _row(self, spans: list[tuple], hide_unk: bool) -> dict[str, np.ndarray]:
        ids = np.array([i for tokens, _ in spans for i in tokens], np.int64)
        slots = np.array([i for tokens, slots in spans for i in (slots or [-1] * len(tokens))], np.int64)
        seen = ~((ids == UNK) & (slots < 0)) if hide_unk else np.ones(len(ids), bool)
        return {"input_ids": ids, "slots": slots, "attention_mask": seen.astype(np.int64), "position_ids": np.arange(len(ids))}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids up to the end symbol, stripped."""
        symbol = self.text["end_symbol"]
        last, kept = EOS if symbol == "</s>" else self.pieces.encode(symbol)[-1], []
        for i in ids:
            if i in (EOS, last):
                break
            if i not in (UNK, BOS) and i < self.pieces.get_piece_size():
                kept.append(i)
        return self.pieces.decode(kept).strip()


def _videos(video) -> list:
    """A list of videos from one or several; a list of pictures is one video of decoded frames."""
    if isinstance(video, (str, Path)) or not isinstance(video, (list, tuple)) and len(np.shape(video)) == 4:
        return [video]
    if not len(video):
        raise HawkVideoError("no video was given")
    one = not isinstance(video[0], (str, Path, list, tuple)) and len(np.shape(video[0])) == 3
    return [video] if one else list(video)


def _text_parts(template: str, **fields: str) -> list[str]:
    """A template cut at its visual tokens: text, name, text, ..., text; white space next to visual tokens is dropped."""
    parts = re.split(r"\{(video|motion)\}", template)
    for i in range(0, len(parts), 2):
        text = parts[i].format(**fields)
        text = text if i == 0 else text.lstrip()
        parts[i] = text if i == len(parts) - 1 else text.rstrip()
    return parts


def _padded(prompts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows of one length, padding on the left, where nothing sees it."""
    width = max(len(prompt["input_ids"]) for prompt in prompts)

    def row(prompt, key, fill):
        return np.pad(prompt[key], (width - len(prompt[key]), 0), constant_values=fill)
    return {key: np.stack([row(prompt, key, fill) for prompt in prompts])
            for key, fill in (("input_ids", UNK), ("slots", -1), ("attention_mask", 0), ("position_ids", 0))}
