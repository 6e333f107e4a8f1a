"""What a run says of itself: one JSON line per report, TensorBoard scalars, a progress bar, a summary at the end.

log.jsonl has lines of three kinds.  "train": step, means over the steps since the line before (losses in nats, learning_rate,
grad_norm), clips_per_s, tokens_per_s, waited (share of these steps for which the devices had run out of work before their batch was
there).  "validation": step and losses.  "event": what else happened.  The first 20 steps have a line each, for `losses_digest`.
"""
import contextlib
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hawk_jax.config import HawkConfig, HawkError

DIGEST_STEPS = 20
COUNTED = ("clips", "tokens")       # reported per second; everything else is a mean
SILENT = ("refused",)
SPEEDS = ("clips_per_s", "tokens_per_s", "seconds_per_step", "waited")     # of summary.json


class LogError(HawkError):
    """The run folder cannot be written."""


def losses_digest(losses: list[float]) -> str:
    """16 hex digits over the first 20 total losses as float32: equal on one machine for equal runs; "" if there are fewer."""
    if len(losses) < DIGEST_STEPS:
        return ""
    return hashlib.sha256(np.asarray(losses[:DIGEST_STEPS], np.float32).tobytes()).hexdigest()[:16]


def read_log(folder: Path, kind: str = "train") -> list[dict]:
    """Lines of one kind of a run's log.jsonl, in order of steps; a line that a kill cut off is left out."""
    file, lines = Path(folder) / "log.jsonl", []
    for text in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if line.get("kind") == kind]


class Telemetry:
    """Writes the log of a run; `start`: step it goes on from, lines beyond it belong to work that was lost and are dropped.

    writing: False in all processes but the first.  Raises LogError if the folder cannot be written, now or later.
    """

    def __init__(self, config: HawkConfig, start: int, writing: bool = True):
        self.folder, self.run, self.writing = Path(config.run.folder), config.run, writing
        self._totals, self._steps, self._waited, self._time = {}, 0, 0, time.perf_counter()
        self._all = {"steps": 0, "seconds": 0.0, "clips": 0.0, "tokens": 0.0, "waited": 0}
        self._board, self.last = None, {}
        self._bar = tqdm(total=config.steps, initial=start, unit="step", desc=config.run.name, mininterval=1.0, disable=not writing)
        with self._writable():
            if writing:
                self._open(start)

    def _open(self, start: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [line for kind in ("train", "validation", "event") for line in read_log(self.folder, kind) if line["step"] <= start]
        new = self.folder / "log.tmp"
        new.write_text("".join(json.dumps(line) + "\n" for line in sorted(kept, key=lambda line: line["step"])))
        new.replace(self.folder / "log.jsonl")
        self._file = open(self.folder / "log.jsonl", "a")
        if self.run.tensorboard:
            from tensorboardX import SummaryWriter
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start + 1)

    @contextlib.contextmanager
    def _writable(self):
        try:
            yield
        except OSError as error:
            raise LogError(f"cannot write the log in {self.folder}: {error}; free space or mend run.folder, then run again") from error

    # ------------------------------------------------------------------------------------------ what happened
    def step(self, step: int, metrics: dict, waited: bool) -> None:
        """One finished step; metrics: {name: (sum, weight)} on the host."""
        for name, (total, weight) in metrics.items():
            old = self._totals.get(name, (0.0, 0.0))
            self._totals[name] = old[0] + float(total), old[1] + float(weight)
        self._steps, self._waited = self._steps + 1, self._waited + waited
        self._bar.update()
        if step <= DIGEST_STEPS or step % self.run.log_every == 0:
            self.report(step)

    def report(self, step: int) -> None:
        """Writes a line for the steps since the last one, if there are any."""
        if not self._steps:
            return
        seconds, totals = time.perf_counter() - self._time, self._totals
        means = {k: s / w if w else 0.0 for k, (s, w) in totals.items() if k not in COUNTED + SILENT}
        rates = {f"{name}_per_s": totals[name][0] / seconds for name in COUNTED}
        self._add_up(seconds)
        self.last = means | rates | {"waited": self._waited / self._steps}
        self._bar.set_postfix_str(f"loss {means['loss']:.4f}, {rates['clips_per_s']:.1f} clips/s, {rates['tokens_per_s']:.0f} tokens/s, "
                                  f"waited {100 * self.last['waited']:.0f}%", refresh=False)
        self._write("train", step, self.last)
        self._totals, self._steps, self._waited, self._time = {}, 0, 0, time.perf_counter()

    def _add_up(self, seconds: float) -> None:
        """Adds to the run's totals, but for the line that holds the first step: it compiled."""
        if self.last:
            for name, value in (("steps", self._steps), ("seconds", seconds), ("waited", self._waited),
                                *((name, self._totals[name][0]) for name in COUNTED)):
                self._all[name] += value

    def validated(self, step: int, losses: dict[str, float]) -> None:
        self._write("validation", step, losses)

    def event(self, step: int, what: str) -> None:
        """Anything else worth knowing later; also printed."""
        self._write("event", step, {"what": what})
        if self.writing:
            tqdm.write(what)

    @contextlib.contextmanager
    def pause(self):
        """Time within it counts for no step."""
        start = time.perf_counter()
        yield
        self._time += time.perf_counter() - start

    def _write(self, kind: str, step: int, figures: dict) -> None:
        if not self.writing:
            return
        with self._writable():
            self._file.write(json.dumps({"kind": kind, "step": step, "time": time.time()} | figures) + "\n")
            self._file.flush()      # in the kernel's hands: a kill of this process loses nothing
            for name, value in figures.items() if self._board else ():
                if not isinstance(value, str):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    # ------------------------------------------------------------------------------------------ the end
    def close(self) -> None:
        self._bar.close()
        if self.writing:
            with self._writable():
                self._file.close()
                if self._board:
                    self._board.close()

    def summary(self, facts: dict) -> dict:
        """Figures of the whole run, also written to summary.json; facts: what else belongs there.

        Speeds are those of this call; one that found nothing left to do keeps the speeds that are there.
        """
        lines = read_log(self.folder)
        first = {line["step"]: line["loss"] for line in lines if line["step"] <= DIGEST_STEPS}
        names = ("loss", "video_language", "motion_language", "consistency")
        summary = facts | {f"last_{name}": lines[-1][name] for name in names if lines} | {
            "losses_digest": losses_digest([first[n] for n in sorted(first)])} | self._speeds()
        # JSON has no infinity: the best loss of a run that never validated is none
        summary = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}
        if self.writing:
            with self._writable():
                (self.folder / "summary.json").write_text(json.dumps(summary, indent=1))
        return summary

    def _speeds(self) -> dict:
        a, old = self._all, {}
        with contextlib.suppress(OSError, ValueError):
            old = json.loads((self.folder / "summary.json").read_text())
        if not a["steps"] and old.keys() >= set(SPEEDS):
            return {name: old[name] for name in SPEEDS}
        steps, seconds = max(a["steps"], 1), a["seconds"] or 1.0
        return dict(zip(SPEEDS, (a["clips"] / seconds, a["tokens"] / seconds, a["seconds"] / steps, a["waited"] / steps)))
