"""All clips of a split over all data sets, numbered the same everywhere, with the longest row each can have."""
from functools import cached_property

import numpy as np

from data.batches import learns_motion_language
from data.lengths import length_bound
from data.plan import bucket_of
from data.records import Record, check_prepared, open_split, read_manifest
from data.text import Tokenizer
from hawk_jax.config import ConfigError, HawkConfig, HawkError


class ClipSet:
    """The clips of `split`: data set after data set, each in its order on disk.

    required: every data set must have the split (training); otherwise those that lack it are left out, and one must have it.
    Raises HawkError where a data set is missing, broken, or was prepared with other options than config.prepare.
    """

    def __init__(self, config: HawkConfig, split: str, tokenizer: Tokenizer, required: bool):
        if not config.input.datasets:
            raise ConfigError("input.datasets is empty: name at least one folder that `prepare` wrote")
        self.config, self.split, self.tokenizer = config, split, tokenizer
        self.folders = [data_set.folder for data_set in config.input.datasets]
        for folder in self.folders:
            check_prepared(folder, config.prepare)
        having = [folder for folder in self.folders if read_manifest(folder)["splits"].get(split, {}).get("clips")]
        if not required and having:
            self.folders = having
        self.sources = [open_split(folder, split) for folder in self.folders]
        self.offsets = np.cumsum([0, *map(len, self.sources)])
        self.entries = [row for source in self.sources for row in source.texts]
        if not self.entries:
            raise HawkError(f"split {split!r} of {', '.join(self.folders)} has no clips; see rejected.jsonl there")

    @property
    def sizes(self) -> list[int]:
        """Clips of each data set."""
        return np.diff(self.offsets).tolist()

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, clip: int) -> str:
        """Name of a clip for people; with its folder where several data sets are mixed."""
        prefix = f"{self.folders[self._home(clip)]}: " if len(self.sources) > 1 else ""
        return prefix + self.entries[clip].clip

    def _home(self, clip: int) -> int:
        return int(np.searchsorted(self.offsets, clip, side="right")) - 1

    def record(self, clip: int) -> Record:
        """The record of a clip, pictures still compressed."""
        home = self._home(clip)
        return self.sources[home][clip - self.offsets[home]]

    @cached_property
    def bound_N(self) -> np.ndarray:
        """int64 [N]: tokens of each clip's longest row, over all draws."""
        c = self.config
        return np.array([length_bound(
            e, self.tokenizer, c.input, c.model.video_qformer.queries, motion_language=learns_motion_language(c),
            frames=(c.prepare.frames, e.seconds))[1] for e in self.entries], np.int64)

    @cached_property
    def buckets(self) -> tuple[int, ...]:
        """Row lengths in tokens: input.buckets, or the longest row of the split alone."""
        return self.config.input.buckets or (int(self.bound_N.max()),)

    @cached_property
    def bucket_N(self) -> np.ndarray:
        """int64 [N]: each clip's bucket.  HawkError if one fits none, or the decoder has too few positions."""
        bucket_N = bucket_of(self.bound_N, self.buckets)
        if (bucket_N == len(self.buckets)).any():
            worst = int(self.bound_N.argmax())
            raise HawkError(f"a row of clip {self.name(worst)} ({self.split}) may need {self.bound_N[worst]} tokens, the longest "
                            f"of input.buckets is {self.buckets[-1]}; add a longer bucket or leave input.buckets empty")
        if self.buckets[-1] > self.config.model.llama.max_positions:
            raise HawkError(f"the longest row of split {self.split} has {self.buckets[-1]} tokens, model.llama.max_positions is "
                            f"{self.config.model.llama.max_positions}; lower input.max_caption_tokens or raise the positions")
        return bucket_N

    @property
    def longest(self) -> int:
        """Tokens of the shortest bucket that holds every row of the split."""
        return self.buckets[self.bucket_N.max()]
