"""Records: what `prepare` writes for a clip and what training reads, stored by tensorflow-datasets as ArrayRecord, without TensorFlow.

On disk, below the folder of a data set:
  hawk_clips/1.0.0/     a tfds data set (`tfds.builder_from_directory` opens it), shards in the order of sha256(source)
  texts_SPLIT.jsonl     one line per record, in order: texts and times, so that lengths of rows are known without reading pictures
  prepare.json          configuration, digests, counts; rejected.jsonl: clips that are not in it, with the reason
"""
import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from hawk_jax.config import HawkError, PrepareConfig, differences, to_dict

NAME, VERSION = "hawk_clips", "1.0.0"
READS = "1."            # versions of this reader: the first number changes when old readers would go wrong
FORMAT = 1              # of prepare.json
LISTS = ("questions", "answers", "phrases", "direct_phrases")   # lists of texts


class RecordError(HawkError):
    """A data set that cannot be read: names the file, the record and what to do."""


class Pictures(NamedTuple):
    """One view, decoded: u8 RGB [T, S, S, 3]; u8 mask [T, S, S] of the motion frames; motion frames where they are not the video's."""
    frames_THWC: np.ndarray
    mask_THW: np.ndarray
    motion_frames_THWC: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Record:
    """One clip as read: N deduplicated frames of side S that V views of T frames point into.  JPEG stays JPEG until `decode`."""
    clip: str                       # unique in the data set
    source: str                     # path of the video below the video folder: decides shard and split
    split: str
    content_hash: str               # sha256 over everything below but the provenance
    frames: list[bytes]             # JPEG, RGB, S x S
    frame_index_N: np.ndarray       # int32, raw frame number
    times_N: np.ndarray             # f32, seconds from the start
    mask_bits_NHW8: np.ndarray      # u8, packed bits of: flow magnitude > prepare.mask_threshold
    magnitude_NHW: np.ndarray       # u8, 255 x magnitude / flow_max
    flow_max_N: np.ndarray          # f32, pixels
    view_VT: np.ndarray             # int32, positions in `frames`; view 0 uniform, the others head-tail draws
    motion_view_VT: np.ndarray      # int32, the same for a motion branch that draws its own frames
    first_motion: int               # position of raw frame 1 (0 in a video of one frame)
    fps: float                      # mean frames per second
    raw_frames: int
    width: int                      # pixels of the source as shown
    height: int
    description: str
    questions: list[str]
    answers: list[str]
    phrases: list[str]              # with indirect arguments (Eq. 7)
    direct_phrases: list[str]       # as the released code finds them
    provenance: str                 # JSON: hash of the source, language pipeline, prepare digest, package versions

    def decode(self, view: int, *, mask: Literal["magnitude", "binary"] = "magnitude",
               branch_frames: Literal["shared", "independent"] = "shared",
               first_motion_index: Literal["own", "one"] = "own") -> Pictures:
        """Pictures of a view; the options are those of InputConfig.  The mask is 0..255, a share of the frame's maximum or 0 / 255."""
        video_T = self.view_VT[view]
        motion_T = (self.motion_view_VT if branch_frames == "independent" else self.view_VT)[view].copy()
        if first_motion_index == "one":
            motion_T[0] = self.first_motion
        size = self.magnitude_NHW.shape[1]
        needed_N, place_2T = np.unique(np.concatenate([video_T, motion_T]), return_inverse=True)
        pictures_NHWC = np.empty((len(needed_N), size, size, 3), np.uint8)
        for picture_HWC, number in zip(pictures_NHWC, needed_N):
            picture_HWC[:] = _picture(self.frames[number])
        video_places, motion_places = np.split(place_2T.reshape(-1), 2)
        motion_THWC = None if np.array_equal(video_T, motion_T) else pictures_NHWC[motion_places]
        return Pictures(pictures_NHWC[video_places], self._mask(motion_T, mask), motion_THWC)

    def _mask(self, frame_T: np.ndarray, kind: str) -> np.ndarray:
        bits_THW = np.unpackbits(self.mask_bits_NHW8[frame_T], axis=-1, count=self.magnitude_NHW.shape[-1])
        if kind == "binary":
            return bits_THW * np.uint8(255)
        # Eq. 4, but 0 where nothing moves: the bit plane is empty exactly where flow_max does not exceed prepare.mask_threshold,
        # and there the ratio would blow up the noise of a still camera
        return self.magnitude_NHW[frame_T] * bits_THW.any(axis=(1, 2), keepdims=True)

    def times_T(self, view: int) -> np.ndarray:
        """Seconds of the frames of a view, f32 [T]."""
        return self.times_N[self.view_VT[view]]

    def verify(self) -> None:
        """Raises RecordError unless the content is what was hashed when it was made."""
        if content_hash(self) != self.content_hash:
            raise RecordError(f"record {self.clip}: its content does not match its hash; prepare the data set again")


def _picture(jpeg: bytes) -> np.ndarray:
    picture_HWC = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    if picture_HWC is None:
        raise RecordError("a frame of the record is not a readable JPEG")
    return picture_HWC


def content_hash(record: Record) -> str:
    """sha256 hex over every field but itself and the provenance, each with name, type and shape.

    Serialised bytes would not do: protobuf writes maps in another order in every run.
    """
    whole = hashlib.sha256()
    for field in dataclasses.fields(Record):
        if field.name not in ("content_hash", "provenance"):
            for part in _hashed(getattr(record, field.name)):
                whole.update(hashlib.sha256(f"{field.name}|".encode() + part).digest())
    return whole.hexdigest()


def _hashed(value) -> list[bytes]:
    if isinstance(value, np.ndarray):
        little = value.astype(value.dtype.newbyteorder("<"), copy=False)
        return [f"{value.dtype.name}{value.shape}".encode() + little.tobytes()]
    if isinstance(value, list):
        return [str(len(value)).encode(), *(v.encode() if isinstance(v, str) else v for v in value)]
    return [np.float64(value).astype("<f8").tobytes() if isinstance(value, float) else str(value).encode()]


# ------------------------------------------------------------------------------------------------ tfds
def features(config: PrepareConfig) -> tfds.features.FeaturesDict:
    """The fields of a Record as tfds stores them."""
    f, s = tfds.features, config.size

    def array(dtype, *shape, encoding="none"):
        return f.Tensor(shape=shape, dtype=dtype, encoding=encoding)
    texts, views = f.Sequence(f.Text()), (config.views, config.frames)
    return f.FeaturesDict({
        "clip": f.Text(), "source": f.Text(), "split": f.Text(), "content_hash": f.Text(),
        "frames": f.Sequence(f.Image(shape=(s, s, 3), encoding_format="jpeg")),
        "frame_index_N": array(np.int32, None), "times_N": array(np.float32, None),
        # without an encoding tfds stores u8 as 64-bit integers; ArrayRecord compresses the bytes
        "mask_bits_NHW8": array(np.uint8, None, s, (s + 7) // 8, encoding="bytes"),
        "magnitude_NHW": array(np.uint8, None, s, s, encoding="bytes"), "flow_max_N": array(np.float32, None),
        "view_VT": array(np.int32, *views), "motion_view_VT": array(np.int32, *views), "first_motion": array(np.int32),
        "fps": array(np.float32), "raw_frames": array(np.int32), "width": array(np.int32), "height": array(np.int32),
        "description": f.Text(), "questions": texts, "answers": texts, "phrases": texts, "direct_phrases": texts, "provenance": f.Text(),
    })


class HawkClips(tfds.core.GeneratorBasedBuilder):
    """Video clips with Farneback motion masks, descriptions, questions and answers, and motion phrases."""
    VERSION = tfds.core.Version(VERSION)
    RELEASE_NOTES = {str(VERSION): "first"}
    url_infos = {}      # nothing is downloaded; looking for check sums tfds imports importlib_resources, which it does not require

    def __init__(self, *, prepare: PrepareConfig, records: dict | None = None, **options):
        """`records`: split -> iterable of Record, for `download_and_prepare`; `data.prepare` writes shards itself, for resumption."""
        self.prepare_config, self.records = prepare, records or {}
        super().__init__(file_format="array_record", **options)

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, description=self.__doc__, features=features(self.prepare_config))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(records) for split, records in self.records.items()}

    def _generate_examples(self, records):
        for record in records:
            yield record.clip, example(record)


def example(record: Record) -> dict:
    """A Record as the dict that `features` encodes."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _record(stored: dict) -> Record:
    return Record(**{name: _python(name, value) for name, value in stored.items()})


def _python(name: str, value):
    """tfds gives bytes for Text, numpy scalars, and lists as lists or arrays of objects; frames stay bytes."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.generic):
        return value.item()
    if name == "frames":
        return list(value)
    return [v.decode() for v in value] if name in LISTS else value


class Keep(tfds.decode.Decoder):
    """Leaves a feature as stored.  tfds.decode.SkipDecoding lacks the second method and fails on a Sequence without TensorFlow."""

    def decode_example(self, x):
        return x

    def decode_batch_example_np(self, x):
        return x


# ------------------------------------------------------------------------------------------------ reading
@dataclass(frozen=True)
class TextRow:
    """What can be known of a record without its pictures: a line of texts_SPLIT.jsonl."""
    clip: str
    source: str
    content_hash: str
    seconds: float                  # length of the video
    times_VT: list[list[float]]     # seconds of the frames of each view
    description: str
    questions: list[str]
    answers: list[str]
    phrases: list[str]
    direct_phrases: list[str]


def text_row(record: Record) -> dict:
    """The line of texts_SPLIT.jsonl for a record."""
    own = {f.name for f in dataclasses.fields(TextRow)} - {"seconds", "times_VT"}
    times_VT = [[round(float(t), 4) for t in record.times_N[view_T]] for view_T in record.view_VT]
    return {name: getattr(record, name) for name in sorted(own)} | {"seconds": record.raw_frames / record.fps, "times_VT": times_VT}


class RecordSource:
    """Random access to the records of a split, in stored order; safe to share between threads and to send to worker processes."""

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self._open()
        self.texts = _read_texts(self.folder / f"texts_{split}.jsonl")
        self._check_lengths()

    def _open(self) -> None:
        place = tfds_folder(self.folder)
        try:
            builder = tfds.builder_from_directory(str(place))
        except Exception as error:
            raise RecordError(f"{place} is not a readable data set ({_line(error)}); run prepare again to finish it") from error
        if self.split not in builder.info.splits:
            raise RecordError(f"{self.folder} has no records in split {self.split!r}; it has: {', '.join(builder.info.splits) or 'none'}")
        info = builder.info.splits[self.split]
        self._files, self._lengths = [Path(p) for p in info.filepaths], list(info.shard_lengths)
        self._source = builder.as_data_source(self.split, decoders={"frames": Keep()})

    def _check_lengths(self) -> None:
        """Claimed against held: where a file holds fewer records than claimed, tfds may return empty ones without an error."""
        for path, claimed in zip(self._files, self._lengths):
            held = _records_in(path)
            if held != claimed:
                raise RecordError(f"{path} holds {held} records, dataset_info.json says {claimed}; "
                                  "delete the data set and prepare it again")
        if len(self.texts) != sum(self._lengths):
            raise RecordError(f"{self.folder}/texts_{self.split}.jsonl has {len(self.texts)} lines for {sum(self._lengths)} records; "
                              "prepare the data set again")

    def __getstate__(self):
        return {"folder": self.folder, "split": self.split, "texts": self.texts}

    def __setstate__(self, state):
        vars(self).update(state)
        self._open()

    def __repr__(self):
        return f"RecordSource({str(self.folder)!r}, {self.split!r})"

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> Record:
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)} in {self!r}")
        try:
            return _record(self._source[number])
        except Exception as error:
            ends = np.cumsum(self._lengths)
            shard = int(np.searchsorted(ends, number, side="right"))
            inside = number - int(ends[shard]) + self._lengths[shard]
            raise RecordError(f"record {inside} of {self._files[shard]} ({self.texts[number].clip}, number {number} of split "
                              f"{self.split}) cannot be read: {_line(error)}; copy the file again or prepare the data set again") from error


open_split = RecordSource


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _records_in(path: Path) -> int:
    if not path.exists():
        raise RecordError(f"{path} is missing; copy the data set again or prepare it again")
    reader = array_record_module.ArrayRecordReader(str(path))
    if not reader.ok():             # neither the constructor nor num_records raises; close would
        raise RecordError(f"{path} is damaged or was not copied whole; copy it again or prepare the data set again")
    held = reader.num_records()
    reader.close()
    return held


def _read_texts(path: Path) -> list[TextRow]:
    try:
        return [TextRow(**json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise RecordError(f"{path} cannot be read ({_line(error)}); prepare the data set again") from error


def shard_path(folder: Path, split: str, shard: int, shards: int) -> Path:
    """File of a shard, named as tfds expects."""
    return Path(folder) / NAME / VERSION / f"{NAME}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def tfds_folder(folder: Path) -> Path:
    """hawk_clips/VERSION of a data set.  RecordError if there is none, or only of a version this reader does not know."""
    # numbers only: tfds writes into 1.0.0.incompleteXXXX and renames it
    found = [p.name for p in (Path(folder) / NAME).glob("*") if p.is_dir() and re.fullmatch(r"\d+\.\d+\.\d+", p.name, re.ASCII)]
    versions = sorted(found, key=lambda version: [int(number) for number in version.split(".")])
    known = [v for v in versions if v.startswith(READS)]
    if not known:
        what = f"records of version {', '.join(versions)}; this hawk_jax reads {READS}x" if versions else f"no {NAME} folder"
        raise RecordError(f"{folder} is not a data set this program can read: {what}")
    return Path(folder) / NAME / known[-1]


def read_manifest(folder: str | Path) -> dict:
    """prepare.json of a finished data set.  RecordError if the data set is missing, not finished, or of a newer version."""
    path = Path(folder) / "prepare.json"
    manifest = read_json(path, {"prepare", "splits"})
    if manifest is None:
        raise RecordError(f"{folder} is not a finished data set (no prepare.json); run prepare with --out {folder}")
    if manifest.get("format", FORMAT) > FORMAT:
        raise RecordError(f"{path} has format {manifest['format']}, this version reads up to {FORMAT}; update hawk_jax")
    return manifest


def read_json(path: Path, keys: set[str]) -> dict | None:
    """A JSON object that has `keys`; None if there is no such file.  RecordError if it is anything else."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is damaged ({_line(error)}); delete the data set and prepare it again") from error
    if not isinstance(value, dict) or not keys <= value.keys():
        raise RecordError(f"{path} is damaged (not an object with {', '.join(sorted(keys))}); delete the data set and prepare it again")
    return value


def check_prepared(folder: str | Path, config: PrepareConfig) -> None:
    """Refuses, field by field, a data set that was prepared with another configuration."""
    lines = differences(read_manifest(folder)["prepare"], json.loads(json.dumps(to_dict(config))), "prepare.")
    if lines:
        raise RecordError(f"{folder} was prepared with another configuration (data set -> configuration): {'; '.join(lines)}; "
                          "change the configuration or prepare again")


def dataset_hash(folder: str | Path) -> str:
    """One sha256 hex over the content hashes of all records, split by split in alphabetical order."""
    splits = sorted(read_manifest(folder)["splits"])
    return hash_of({split: [row.content_hash for row in _read_texts(Path(folder) / f"texts_{split}.jsonl")] for split in splits})


def hash_of(hashes: dict[str, list[str]]) -> str:
    """Data set hash of {split: content hashes in order}."""
    lines = [f"{split} {value}\n" for split in sorted(hashes) for value in hashes[split]]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
