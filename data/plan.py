"""Which clips make up which global batch: a pure function of (seed, step), the same on every host.

An epoch draws as many clips as all data sets hold together, shared out by weight; one data set alone gives each of its clips
exactly once.  A data set walks its own permutations, one after the other across epochs, so a clip returns only when all others
had their turn.

One bucket of row lengths: the epochs follow each other without a seam, clip `s` of training is sample `s`, whatever the batch
size, and nothing is padded.  Several buckets: each epoch is shuffled and sorted into buckets, the full batches are shuffled, and
what is left in each bucket comes last, padded with clips of weight 0; there a position in the middle of an epoch means something
for one batch size only.
"""
import threading
from dataclasses import dataclass

import numpy as np

from data.draws import permutation
from hawk_jax.config import ConfigError

PAD = -1        # in place of a clip


@dataclass(frozen=True)
class GlobalBatch:
    """One step's clips: number of each in the index (PAD: none), how often it was drawn before, and the row length in tokens."""
    clip_B: np.ndarray
    seen_B: np.ndarray
    length: int


@dataclass(frozen=True)
class _Epoch:
    clip_JB: np.ndarray
    seen_JB: np.ndarray
    bucket_J: np.ndarray


def shares(sizes: list[int], weights: list[float]) -> list[int]:
    """Draws per epoch from each data set: `sum(sizes)` in all, in proportion to `weights` (largest remainders), at least one."""
    if min(weights) <= 0:
        raise ConfigError(f"input.datasets: a weight must be positive, got {min(weights)}")
    exact = np.array(weights, np.float64) / sum(weights) * sum(sizes)
    draws = np.floor(exact).astype(np.int64)
    for i in np.argsort(draws - exact, kind="stable")[:sum(sizes) - draws.sum()]:
        draws[i] += 1
    return np.maximum(draws, 1).tolist()


def bucket_of(bound_N: np.ndarray, buckets: tuple[int, ...]) -> np.ndarray:
    """Number of the shortest bucket that holds each clip's longest row; len(buckets) where none does."""
    return np.searchsorted(np.array(buckets), bound_N, side="left")


class Plan:
    """The order of training.  `bucket_N` numbers each clip's bucket (data sets in a row), `buckets` are their row lengths."""

    def __init__(self, sizes: list[int], weights: list[float], bucket_N: np.ndarray, buckets: tuple[int, ...], clips: int,
                 seed: int):
        self.sizes, self.buckets, self.clips, self.seed = list(sizes), tuple(buckets), clips, seed
        self.draws = shares(self.sizes, weights)
        self.bucket_N = np.asarray(bucket_N, np.int64)
        self.epoch_clips = sum(self.draws)
        # whole passes in every epoch: then each epoch has equally many clips of each bucket
        self._alike = all(d % n == 0 for d, n in zip(self.draws, self.sizes))
        self._steps_alike = self.steps() if self._alike else 0
        self._cache, self._starts, self._lock = {}, [0], threading.Lock()

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k not in ("_cache", "_lock")}    # locks do not travel to worker processes

    def __setstate__(self, state):
        vars(self).update(state, _cache={}, _lock=threading.Lock())

    # ------------------------------------------------------------------------------------------ one epoch
    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Clip numbers of an epoch in shuffled order, and how often each was drawn before."""
        clips, seen, offset = [], [], 0
        for number, (size, draws) in enumerate(zip(self.sizes, self.draws)):
            draw_I = np.arange(epoch * draws, (epoch + 1) * draws)
            passes = range(epoch * draws // size, ((epoch + 1) * draws - 1) // size + 1)
            walk = np.concatenate([permutation(size, self.seed, "walk", number, p) for p in passes])
            clips.append(offset + walk[draw_I - passes[0] * size])
            seen.append(draw_I // size)
            offset += size
        mixed = permutation(self.epoch_clips, self.seed, "mix", epoch)
        return np.concatenate(clips)[mixed], np.concatenate(seen)[mixed]

    def _bucketed(self, epoch: int) -> _Epoch:
        clip_I, seen_I = self.order(epoch)
        full, rest = [], []
        for bucket in range(len(self.buckets)):
            here = np.flatnonzero(self.bucket_N[clip_I] == bucket)
            whole = len(here) // self.clips * self.clips
            full += [(here[i:i + self.clips], bucket) for i in range(0, whole, self.clips)]
            if len(here) > whole:
                rest.append((np.pad(here[whole:], (0, self.clips - len(here) + whole), constant_values=PAD), bucket))
        batches = [full[i] for i in permutation(len(full), self.seed, "batches", epoch)] + rest
        at_JB = np.stack([at for at, _ in batches])
        clip_JB, seen_JB = (np.where(at_JB == PAD, absent, x_I[at_JB]) for absent, x_I in ((PAD, clip_I), (0, seen_I)))
        return _Epoch(clip_JB, seen_JB, np.array([bucket for _, bucket in batches]))

    def _cached(self, epoch: int, make):
        with self._lock:                        # threads of one epoch wait for one plan instead of each making it
            if epoch not in self._cache:
                for old in sorted(self._cache)[:-2]:
                    del self._cache[old]
                self._cache[epoch] = make(epoch)
            return self._cache[epoch]

    # ------------------------------------------------------------------------------------------ steps
    def steps(self, epoch: int = 0) -> int:
        """Global batches of an epoch (one bucket: rounded up, the last one runs on into the next epoch)."""
        if len(self.buckets) == 1:
            return -(-self.epoch_clips // self.clips)
        if self._alike:
            passes_N = np.repeat(np.array(self.draws) // self.sizes, self.sizes)
            count_Y = np.bincount(self.bucket_N, passes_N, len(self.buckets)).astype(np.int64)
        else:
            count_Y = np.bincount(self.bucket_N[self.order(epoch)[0]], minlength=len(self.buckets))
        return int((-(-count_Y // self.clips)).sum())

    def start(self, epoch: int) -> int:
        """Steps before an epoch.  Epochs may differ: in a mixture, what broken passes leave over decides how full buckets get."""
        if self._steps_alike:
            return epoch * self._steps_alike
        with self._lock:
            while len(self._starts) <= epoch:
                self._starts.append(self._starts[-1] + self.steps(len(self._starts) - 1))
            return self._starts[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, batch within it) of a step, where there are several buckets."""
        if self._steps_alike:
            return divmod(step, self._steps_alike)
        while self._starts[-1] <= step:
            self.start(len(self._starts))
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        return epoch, step - self._starts[epoch]

    def batch(self, samples: int) -> GlobalBatch:
        """The global batch that comes after `samples` clips (pads counted): step x clips, and with one bucket any number."""
        if len(self.buckets) > 1:
            epoch, at = self.locate(samples // self.clips)
            plan = self._cached(epoch, self._bucketed)
            return GlobalBatch(plan.clip_JB[at], plan.seen_JB[at], self.buckets[plan.bucket_J[at]])
        sample_B = np.arange(samples, samples + self.clips)
        parts = []
        for epoch in range(sample_B[0] // self.epoch_clips, sample_B[-1] // self.epoch_clips + 1):
            clip_I, seen_I = self._cached(epoch, self.order)
            inside = sample_B[sample_B // self.epoch_clips == epoch] - epoch * self.epoch_clips
            parts.append((clip_I[inside], seen_I[inside]))
        return GlobalBatch(*map(np.concatenate, zip(*parts)), self.buckets[0])

    def resume(self, samples: int, saved_clips: int) -> int:
        """The position, for this batch size, of a run that took `samples` clips in batches of `saved_clips`.

        With one bucket it is `samples` itself.  With several, another batch size goes on at an epoch's end only; else ConfigError.
        """
        if len(self.buckets) == 1:
            return samples
        step, odd = divmod(samples, saved_clips)
        if odd:
            raise ConfigError(f"cannot go on from samples={samples}: no multiple of input.clips={saved_clips}")
        same = saved_clips == self.clips
        old = self if same else Plan(self.sizes, self.draws, self.bucket_N, self.buckets, saved_clips, self.seed)
        epoch, at = old.locate(step)
        if same:
            return samples
        if at:
            raise ConfigError(f"input.clips={self.clips}: the run ended after {at} of {old.steps(epoch)} batches of epoch {epoch}; "
                              f"with several buckets another batch size can only begin an epoch: go on with "
                              f"input.clips={saved_clips}")
        return self.start(epoch) * self.clips
