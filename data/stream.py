"""Records to batches: a pure function of (seed, step), read by Grain threads or processes.

What is notable: Grain is handed numbers of steps and one function from a step to a host's rows, so random access, restarts, any
number of hosts and any number of workers need no state of their own.  Each host decodes only its rows.
"""
import gc
import weakref
from functools import partial

import grain
import numpy as np
from absl import flags

from data import batches as rows
from data.index import ClipSet
from data.plan import PAD, GlobalBatch, Plan
from data.records import TextRow, read_manifest
from data.text import Tokenizer
from hawk_jax.config import ConfigError, HawkConfig, HawkError

ENDLESS = 1 << 40       # steps; Grain wants a number


class Batches:
    """An iterator over batches that can be closed before its end, so that threads and worker processes stop.

    Left open, it closes itself with the program: Grain's processes would otherwise end in a page of errors about shared memory.
    """

    def __init__(self, dataset: grain.IterDataset):
        self._open = [iter(dataset)]
        self.close = weakref.finalize(self, _close, self._open)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._open:
            raise StopIteration
        return next(self._open[0])

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _close(iterators: list) -> None:
    """Closes and forgets the iterator, its cycles too: one that is left for the interpreter's last moments complains there."""
    iterators.pop().close()
    gc.collect()


class Input:
    """The input of a run.

    features: with input.features=memory, {split: {"video_NKTQE", "motion_NKTQE"}}, the frozen encoder's output for every clip N
    and view K; batches then carry `video_BTQE` and `motion_BTQE`, and no picture is read.
    A clip's number counts through the split, data set after data set.  A batch is a dict of numpy arrays: pictures or features,
    token rows (data/rows.py) with `clip_RS`, `weight_B` (0: padding) and `clip_id_B` (-1: padding).
    Every method raises HawkError where a data set is missing, broken or does not fit the configuration.
    """

    def __init__(self, config: HawkConfig, *, features: dict[str, dict] | None = None):
        self.config, self.features = config, features
        self.tokenizer = Tokenizer(config.input.tokenizer)
        if self.tokenizer.size > config.model.llama.vocab:      # jax would clamp the ids that are too large, without a word
            raise ConfigError(f"input.tokenizer={config.input.tokenizer!r} has {self.tokenizer.size} pieces, model.llama.vocab="
                              f"{config.model.llama.vocab} rows are too few for them")
        self._sets: dict[str, ClipSet] = {}
        self._plan: Plan | None = None

    # ------------------------------------------------------------------------------------------ what there is
    def clip_set(self, split: str) -> ClipSet:
        """Index of a split, opened at its first use."""
        if split not in self._sets:
            required = split == self.config.input.train_split
            self._sets[split] = ClipSet(self.config, split, self.tokenizer, required)
        return self._sets[split]

    @property
    def train_set(self) -> ClipSet:
        return self.clip_set(self.config.input.train_split)

    @property
    def identity(self) -> dict[str, str]:
        """{name: hash} of everything outside the configuration that decides what a batch holds: pieces of text, records."""
        hashes = {f"data set {n} (input.datasets)": read_manifest(d.folder)["hash"] for n, d in enumerate(self.config.input.datasets)}
        return {"tokenizer (input.tokenizer)": self.tokenizer.digest} | hashes

    @property
    def plan(self) -> Plan:
        """Order of training."""
        if self._plan is None:
            c, clips = self.config.input, self.train_set
            weights = [d.weight for d in c.datasets]
            self._plan = Plan(clips.sizes, weights, clips.bucket_N, clips.buckets, c.clips, c.seed)
        return self._plan

    @property
    def longest(self) -> int:
        """Tokens of the longest training row, S."""
        return self.train_set.longest

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of the first epoch; with one bucket the last of them runs on into the next."""
        return self.plan.steps()

    def clips(self, split: str) -> list[str]:
        """Names of all clips of a split, in order."""
        return [entry.clip for entry in self.clip_set(split).entries]

    def clip_names(self, ids, split: str | None = None) -> list[str]:
        """Names of the clips in a batch's `clip_id_B`; padding has no name and is left out."""
        clips = self.clip_set(split or self.config.input.train_split)
        return [clips.name(int(i)) for i in ids if i != PAD]

    def texts(self, split: str) -> list[TextRow]:
        """Per clip: description, questions, answers, phrases, direct_phrases."""
        return self.clip_set(split).entries

    # ------------------------------------------------------------------------------------------ training
    def resume_samples(self, samples: int, saved_clips: int) -> int:
        """Where to go on after `samples` clips in batches of `saved_clips` (see `Plan.resume`); ConfigError if that is nowhere."""
        return self.plan.resume(samples, saved_clips)

    def train_batch(self, step: int, host: int = 0, hosts: int = 1) -> dict[str, np.ndarray]:
        """A host's rows of global batch `step`, at once."""
        return self._train_rows(step, 0, rows.host_block(self.config.input.clips, host, hosts))

    def train_batches(self, start_samples: int = 0, host: int = 0, hosts: int = 1) -> Batches:
        """A host's rows of the global batches after `start_samples` clips (steps x input.clips, padding counted), without end."""
        start, odd = divmod(start_samples, self.config.input.clips)
        if odd and len(self.plan.buckets) > 1:
            raise ConfigError(f"cannot start at samples={start_samples}: no multiple of input.clips={self.config.input.clips}")
        load = partial(self._train_rows, offset=odd, block=rows.host_block(self.config.input.clips, host, hosts))
        return self._read(grain.MapDataset.range(start, ENDLESS), load)

    def _train_rows(self, step: int, offset: int, block: slice) -> dict[str, np.ndarray]:
        plan = self.plan.batch(step * self.config.input.clips + offset)
        return self._load(self.train_set, plan, block, self._train_look, True, f"step {step}")

    def _train_look(self, clip_hash: str, seen: int) -> rows.Look:
        return rows.train_look(self.config, clip_hash, seen)

    # ------------------------------------------------------------------------------------------ passes over a split
    def eval_batches(self, split: str, clips: int | None = None, host: int = 0, hosts: int = 1) -> Batches:
        """All clips of a split once, in order, at view 0 without crop; the last batch is padded with clips of weight 0."""
        return self._pass(split, partial(self._fixed_look, view=0, cropped=False), False, clips, host, hosts)

    def view_batches(self, split: str, view: int, clips: int | None = None, host: int = 0, hosts: int = 1) -> Batches:
        """All clips of a split once, in order, as training shows view `view` < input.views: what a feature cache must hold.

        In other splits than the training one nothing is cropped, as in `eval_batches`.
        """
        if not 0 <= view < self.config.input.views:
            raise ConfigError(f"view {view} is not below input.views={self.config.input.views}: only those repeat and can be kept")
        cropped = split == self.config.input.train_split
        return self._pass(split, partial(self._fixed_look, view=view, cropped=cropped), cropped, clips, host, hosts)

    def _fixed_look(self, clip_hash: str, seen: int, view: int, cropped: bool) -> rows.Look:
        return rows.view_look(self.config, clip_hash, view) if cropped else rows.Look(view, rows.WHOLE, rows.WHOLE)

    def _pass(self, split, shown, cropped, clips, host, hosts) -> Batches:
        per = clips or self.config.input.clips
        batches = -(-len(self.clip_set(split)) // per)
        load = partial(self._pass_rows, split=split, shown=shown, cropped=cropped, per=per, block=rows.host_block(per, host, hosts))
        return self._read(grain.MapDataset.range(batches), load)

    def _pass_rows(self, number, split, shown, cropped, per, block) -> dict[str, np.ndarray]:
        clips, clip_B = self.clip_set(split), np.arange(number * per, (number + 1) * per)
        plan = GlobalBatch(np.where(clip_B < len(clips), clip_B, PAD), np.zeros(per, np.int64), clips.longest)
        return self._load(clips, plan, block, shown, cropped, f"batch {number} of split {split}")

    # ------------------------------------------------------------------------------------------ what all of them share
    def _read(self, steps: grain.MapDataset, load) -> Batches:
        c = self.config.input
        # a thread makes one batch at a time: with fewer places than threads some would idle
        options = grain.ReadOptions(num_threads=c.threads, prefetch_buffer_size=max(c.buffer, c.threads))
        dataset = steps.map(load).to_iter_dataset(options)
        if c.workers and c.features == "live":      # kept features need no decoding: copies of them in processes would only cost
            flags.FLAGS.mark_as_parsed()            # Grain's workers read absl flags, and this program does not use absl.app
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(c.workers, per_worker_buffer_size=1))
        return Batches(dataset)

    def _kept(self, split: str) -> dict[str, np.ndarray] | None:
        if self.config.input.features == "live":
            return None
        if split not in (self.features or {}):
            raise ConfigError(f"input.features=memory, but no features of split {split!r} were given to Input")
        return self.features[split]

    def _load(self, clips: ClipSet, plan: GlobalBatch, block: slice, shown, cropped: bool, where: str) -> dict[str, np.ndarray]:
        """Rows `block` of a planned batch; shown(clip hash, times seen) says how a clip looks."""
        kept, clip_B = self._kept(clips.split), plan.clip_B[block]
        batch = rows.empty_rows(block, plan)
        batch |= rows.empty_pictures(self.config, len(clip_B), cropped) if kept is None else rows.empty_features(kept, len(clip_B))
        for row, (clip, seen) in enumerate(zip(clip_B, plan.seen_B[block])):
            if clip == PAD:
                continue
            try:
                self._fill(batch, row, clips, int(clip), int(seen), shown, kept)
            except Exception as error:      # whatever is wrong with a clip: say which, and when it was wanted
                raise HawkError(f"{where}, clip {clips.name(clip)}: {error}") from error
        return batch

    def _fill(self, batch, row, clips: ClipSet, clip: int, seen: int, shown, kept) -> None:
        entry = clips.entries[clip]
        look = shown(entry.content_hash, seen)
        if kept is None:
            rows.fill_pictures(batch, row, clips.record(clip), look, self.config.input)
        else:
            rows.fill_features(batch, row, kept, clip, look)
        rows.fill_text(batch, row, entry, seen, look, self.tokenizer, self.config)
