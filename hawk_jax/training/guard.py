"""What must never pass unnoticed: a step that is not finite, a request to stop, a second process at the same work."""
import contextlib
import fcntl
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from hawk_jax.config import HawkError

AVERAGE = 0.98      # decay of the running mean of the loss: about the last 50 steps


class NonFinite(HawkError):
    """A loss or gradient that is not finite; says in which step and for which clips."""


class Stopped(SystemExit):
    """The run was asked to stop and has saved its state; the exit code is 128 + signal (SIGTERM: 143, SIGINT: 130)."""

    def __init__(self, number: int):
        super().__init__(128 + number)


# ------------------------------------------------------------------------------------------------ on the device
def empty() -> dict:
    """Guard state of a fresh run: updates refused so far, running mean of the loss."""
    return {"skips": jnp.int32(0), "loss_average": jnp.float32(0)}


def accept(guard: dict, loss, grad_norm):
    """Whether this update may be applied, a bool scalar.

    After one refusal everything is refused: the host reads figures one step late, and the step in between must not move on from a
    state that is about to be given up.
    """
    return jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (guard["skips"] == 0)


def advance(guard: dict, ok, loss, step) -> dict:
    """Guard state after a step."""
    average = jnp.where(step == 0, loss, AVERAGE * guard["loss_average"] + (1 - AVERAGE) * loss)
    return {"skips": guard["skips"] + ~ok, "loss_average": jnp.where(ok, average, guard["loss_average"])}


def choose(ok, new, old):
    """`new` where ok, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def forgiven(state):
    """A state (training.state.TrainState) that refused an update, ready to go on."""
    return state._replace(guard=state.guard | {"skips": jnp.zeros_like(state.guard["skips"])})


# ------------------------------------------------------------------------------------------------ on the host
@contextlib.contextmanager
def alone(folder: Path, patience: float = 60.0):
    """Within it `folder` belongs to this process; the kernel gives it back when the process ends, however it ends.

    Waits `patience` seconds for one that is still saving after a request to stop, then raises HawkError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")
    except OSError as error:
        raise HawkError(f"{folder} cannot be written: {error.strerror}; mend run.folder") from error
    end = time.monotonic() + patience
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise HawkError(f"another process trains in {folder}; stop it, or give this run another run.folder") from None
                time.sleep(0.2)
            except OSError:             # a file system without locks: nothing to wait for
                break
        yield


class StopSignals:
    """Within it SIGTERM and SIGINT only set a flag that the loop reads between steps; a second one acts as it always did.

    With several processes jax spreads the notice, so that all stop after the same step; only SIGTERM counts there.
    """

    def __init__(self):
        self.received, self._old = 0, {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        self.received = number
        signal.signal(number, self._old[number])

    def requested(self, step: int) -> int:
        """Number of the signal that asks to stop before `step`, 0 for none; with several processes the same answer in all."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return self.received


def non_finite(step: int, figures: dict, names: list[str]) -> NonFinite:
    """The error for a step (counted from 1) whose update was refused; figures: {name: number}."""
    wrong = ", ".join(f"{name} {value:g}" for name, value in figures.items())
    clips = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return NonFinite(f"step {step} is not finite ({wrong}); its clips: {clips}. Nothing of it was applied and the steps before it are "
                     "saved: look at these clips, or lower optim.learning_rate, or set optim.clip_norm")
