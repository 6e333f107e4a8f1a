"""The training loop: one function, read from top to bottom, whose order is a contract."""
import contextlib
import dataclasses
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hawk_jax.config import HawkConfig, HawkError
from hawk_jax.mesh import make_mesh, use
from hawk_jax.training import freeze, guard
from hawk_jax.training.checkpoint import CheckpointError, Checkpoints, initial_params, read_frozen
from hawk_jax.training.features import encode_features
from hawk_jax.training.frozen import device_checksum, tree_hash
from hawk_jax.training.state import TrainState, abstract_state, init_state
from hawk_jax.training.step import make_train_step, put_batch
from hawk_jax.training.telemetry import Telemetry
from hawk_jax.training.validate import make_eval_step, validation_loss


class Pending(NamedTuple):
    """A step that was handed to the devices and whose figures were not read yet."""
    step: int
    metrics: dict           # {name: (sum, weight)} on the devices
    clips: np.ndarray       # clip_id_B
    waited: bool            # the devices had nothing left to do when its batch came


# ------------------------------------------------------------------------------------------------ before the first step
def open_input(config: HawkConfig, params: dict, frozen: dict, mesh) -> Any:
    """The input of data/stream.py; with input.features=memory the frozen encoder runs over the clips first."""
    from data.stream import Input  # needs grain and cv2, which a machine that only computes may lack
    live = Input(dataclasses.replace(config, input=dataclasses.replace(config.input, features="live")))
    splits = [config.input.train_split]
    if config.run.validate_every:
        splits.append(config.input.validation_split)
        if not live.clips(config.input.validation_split):
            raise HawkError(f"split {config.input.validation_split!r} has no clips to validate on; set run.validate_every=0")
    if config.input.features == "live":
        return live
    return Input(config, features=encode_features(config, freeze.join(params, frozen), live, mesh, splits))


def start_state(config: HawkConfig, mesh, checkpoints: Checkpoints, frozen_hash: str) -> tuple[TrainState, int]:
    """(state, clips per batch that it was saved with): 1. the newest checkpoint of run.folder, 2. the best trainables of run.init_from
    with a fresh optimiser, 3. drawn from run.seed."""
    if checkpoints.latest is None:
        return init_state(config, mesh, initial_params(config, mesh, frozen_hash)), config.input.clips
    saved_clips = checkpoints.metadata(checkpoints.latest)["config"]["input"]["clips"]
    return checkpoints.restore(checkpoints.latest, abstract_state(config, mesh), frozen_hash), saved_clips


def is_ready(metrics: dict) -> bool:
    """Whether the devices have finished a step; does not wait."""
    return all(value.is_ready() for value in jax.tree.leaves(metrics))


# ------------------------------------------------------------------------------------------------ the run
def train(config: HawkConfig, *, input=None, frozen: dict | None = None, mesh=None) -> dict:
    """Trains, or goes on with, the run in config.run.folder until config.steps; returns its summary.

    input: `train_batches(samples, host, hosts)`, `eval_batches(split, host=, hosts=)` (closable iterators of batches),
    `clip_names(ids)`, `resume_samples(samples, saved_clips)`, `identity`; default data.stream.Input.  frozen: tree of arrays on the
    mesh, default that of run.frozen.  mesh: default all devices by config.mesh.

    A run that was killed, at any moment, goes on from its newest checkpoint as if nothing had happened, bit for bit on one mesh.
    Raises guard.Stopped (exit code 128 + signal) after SIGTERM or SIGINT, guard.NonFinite, and other HawkErrors; in each case the
    finished steps are saved first, unless it is the disk that fails or one process among several.

    The order is a contract; each line relies on those before it:
      1. batch t comes from the order of data at state.samples, never from an iterator's own state
      2. step t is handed over before the figures of t-1 are read: devices do not wait for the host
      3. figures of t are read before t is validated or saved: a refused step is never saved as a finished one
      4. validation comes before saving: the checkpoint carries its loss, which keeps the best one
      5. a request to stop is heard between steps only, and saves like any other checkpoint
    """
    mesh = mesh or make_mesh(config.mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(use(mesh, config.mesh.strategy))
        train_step, eval_step = make_train_step(config, mesh), make_eval_step(config)
        stop = stack.enter_context(guard.StopSignals())
        if jax.process_index() == 0:
            stack.enter_context(guard.alone(Path(config.run.folder)))
        frozen, frozen_hash = read_frozen(config, mesh) if frozen is None else (frozen, tree_hash(frozen))
        checkpoints = stack.enter_context(Checkpoints(config, config.run.folder))
        state, saved_clips = start_state(config, mesh, checkpoints, frozen_hash)
        step, checksum, best = int(state.step), int(device_checksum(frozen)), checkpoints.best_loss
        if step < config.steps:
            input = input or open_input(config, state.params, frozen, mesh)
            checkpoints.same_data(input.identity)
            samples = input.resume_samples(int(state.samples), saved_clips)
            state = state._replace(samples=jax.device_put(np.uint32(samples), state.samples.sharding))
            batches = stack.enter_context(contextlib.closing(
                input.train_batches(samples, host=jax.process_index(), hosts=jax.process_count())))
        log = stack.enter_context(contextlib.closing(Telemetry(config, step, writing=jax.process_index() == 0)))
        if step < config.steps:
            log.event(step, f"{config.run.name}: going on after step {step}" if step else f"{config.run.name}: starting")

        def read(pending: Pending | None) -> None:
            """Waits for a step and reports it; raises NonFinite if it was refused."""
            if pending is None:
                return
            figures = jax.device_get(pending.metrics)
            if figures["refused"][0]:
                numbers = {name: figures[name][0] for name in ("loss", "grad_norm")}
                raise guard.non_finite(pending.step, numbers, input.clip_names(pending.clips))
            log.step(pending.step, figures, pending.waited)

        def due(every: int) -> bool:
            return every > 0 and (step % every == 0 or step == config.steps)

        pending, signalled = None, 0
        try:
            while step < config.steps:
                if signalled := stop.requested(step):
                    break
                batch = next(batches)
                waited = pending is not None and is_ready(pending.metrics)
                state, metrics = train_step(state, frozen, put_batch(batch, mesh))
                step += 1
                read(pending)
                pending = Pending(step, metrics, batch["clip_id_B"], waited)

                if due(config.run.validate_every) or due(config.run.checkpoint_every):
                    read(pending)
                    pending, loss, better = None, None, False
                    log.report(step)
                    with log.pause():
                        if due(config.run.validate_every):
                            losses = validation_loss(config, eval_step, state.params, frozen, input, mesh)
                            log.validated(step, losses)
                            loss, better = losses["loss"], losses["loss"] < best
                            best = min(best, losses["loss"])
                        if better or due(config.run.checkpoint_every):
                            checkpoints.save(state, step, frozen_hash, loss)
            read(pending)
            log.report(step)
            if signalled:
                checkpoints.save(state, step, frozen_hash)
                checkpoints.wait()
                name = signal.Signals(signalled).name
                log.event(step, f"{name}: stopped after step {step}, which is saved; run the same command again to go on")
                raise guard.Stopped(signalled)
            checkpoints.wait()
        except Exception as error:
            with contextlib.suppress(Exception):        # what stopped the run matters more than what fails after it
                read(pending)
            # Saving is done by all processes together, and only a refused step is seen by all of them.
            together = jax.process_count() == 1 or isinstance(error, guard.NonFinite)
            with contextlib.suppress(Exception):
                log.report(int(state.step))
                if together and not isinstance(error, CheckpointError):
                    checkpoints.save(guard.forgiven(state), int(state.step), frozen_hash)
                    checkpoints.wait()
            raise

        if int(device_checksum(frozen)) != checksum:
            raise HawkError("the frozen parameters changed in memory while training: suspect the hardware, and this run since its start")
        return log.summary({"steps": step, "samples": int(state.samples), "best_validation_loss": best, "best_step": checkpoints.best,
                            "frozen_hash": frozen_hash, "folder": config.run.folder})
