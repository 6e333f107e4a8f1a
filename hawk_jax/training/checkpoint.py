"""Checkpoints: the trainable state, the options it was made with, and the hash of the frozen tree.  The only user of Orbax.

RUN/checkpoints/STEP holds the state as pure dicts (paths are the format) and, as custom metadata, the configuration.  Orbax commits a
step by renaming its folder, so a kill leaves whole checkpoints only.  It casts dtypes silently when restoring: they are compared here.
"""
import contextlib
import fnmatch
import logging
import math
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from hawk_jax import config as cfg
from hawk_jax.config import HawkConfig, HawkError
from hawk_jax.models import build
from hawk_jax.training import freeze
from hawk_jax.training.frozen import check_decoder, device_checksum, load_frozen
from hawk_jax.training.state import TrainState, abstract_state

FORMAT = 3          # 2: knows the hashes of its data; 3: and a checksum of its bits
ITEM = "state"
PARTS = ("input", "model", "loss", "optim", "run")      # of the configuration; the data set's own digest covers `prepare`
MAY_CHANGE = (      # between a run and its continuation: where things lie, how much is done, how the work is cut up
    "run.name", "run.folder", "run.frozen", "run.init_from", "run.steps", "run.checkpoint_every", "run.keep_checkpoints",
    "run.validate_every", "run.validation_batches", "run.log_every", "run.tensorboard",
    "input.clips", "input.features", "input.threads", "input.buffer", "input.workers", "input.datasets.*.folder",
    "input.validation_split", "input.test_split", "model.seed", "model.init", "model.remat", "model.frames_per_chunk",
    "loss.chunk_tokens", "optim.accumulation")
MAY_CHANGE_FOR_WEIGHTS = (*MAY_CHANGE, "model.compute_dtype", "model.*.dropout")    # where only the trained values are used


# Orbax logs a traceback for each of its threads that fails, and then raises what we catch: one line is enough.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class CheckpointError(HawkError):
    """A checkpoint that is missing, does not fit, or cannot be written."""


# ------------------------------------------------------------------------------------------------ what a checkpoint must agree with
def meaning(config: dict, parts: tuple[str, ...] = PARTS, may_change: tuple[str, ...] = MAY_CHANGE) -> dict:
    """The options that decide what a run computes, as {dotted path: value}; config: a dict of `config.to_dict`."""
    flat = {}

    def walk(value, path: str):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            for number, inner in enumerate(value):
                walk(inner, f"{path}.{number}")
        else:
            flat[path] = list(value) if isinstance(value, tuple) else value
    walk({part: config[part] for part in parts}, "")
    return {path: value for path, value in flat.items() if not any(fnmatch.fnmatchcase(path, p) for p in may_change)}


def check_options(saved: dict, config: HawkConfig, where: Path, *only) -> None:
    """Raises CheckpointError with every option that differs; one that is younger than the checkpoint had its default then.

    only: `parts` and `may_change` of `meaning`.
    """
    defaults, old, new = (meaning(tree, *only) for tree in (cfg.to_dict(HawkConfig()), saved, cfg.to_dict(config)))
    lines = cfg.differences({path: old.get(path, defaults.get(path)) for path in old.keys() | new.keys()}, new)
    if lines:
        raise CheckpointError(f"{where} was made with other options: {'; '.join(lines)} (checkpoint -> now). Set them back, or start "
                              "a run of its own in another run.folder")


def check_leaves(saved: dict, wanted: dict, where: Path) -> None:
    """Compares names, shapes and dtypes of two trees; CheckpointError names the first leaf that differs."""
    old, new = build.flatten(saved), build.flatten(wanted)
    for path in sorted(old.keys() | new.keys(), key=str):
        name = "/".join(map(str, path))
        if path not in old or path not in new:
            raise CheckpointError(f"{where} {'lacks' if path in new else 'holds'} {name}, unlike this model configuration")
        here, there = ((x.dtype.name, tuple(x.shape)) for x in (old[path], new[path]))
        if here != there:
            raise CheckpointError(f"{where}: {name} is {here[0]}{list(here[1])}, this model configuration has {there[0]}{list(there[1])}")


def check_frozen(saved_hash: str, frozen_hash: str, where: Path) -> None:
    """Raises CheckpointError unless the frozen tree is the one that was trained on."""
    if saved_hash != frozen_hash:
        raise CheckpointError(f"{where} was trained on the frozen tree {saved_hash}, this is {frozen_hash}; set run.frozen to that one")


# ------------------------------------------------------------------------------------------------ reading and writing
class Checkpoints:
    """The checkpoints of a run folder.

    writing: False for those who only read (a run may be going on in the folder); nothing is created, cleaned up or deleted then.
    """

    def __init__(self, config: HawkConfig, folder: Path, writing: bool = True):
        self.folder, self.config, self._response, self._data = Path(folder).resolve() / "checkpoints", config, None, {}
        run, policies, keep = config.run, ocp.training.save_decision_policies, ocp.training.preservation_policies
        if not writing and not self.folder.is_dir():
            raise CheckpointError(f"no checkpoints in {folder}: has that run been started?")
        best = keep.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False)
        try:
            self._orbax = ocp.training.Checkpointer(
                self.folder, cleanup_tmp_directories=writing, save_decision_policy=policies.FixedIntervalPolicy(run.checkpoint_every),
                preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(run.keep_checkpoints), best]))
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoints to {self.folder}: {error}; mend run.folder") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            with self._writing():
                self._orbax.close()
        except CheckpointError:
            if kind is None:        # else what ended the run matters more
                raise

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._orbax.latest.step if self._orbax.latest else None

    @property
    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, ascending."""
        return sorted(c.step for c in self._orbax.checkpoints)

    @property
    def best(self) -> int | None:
        """Step with the lowest validation loss; the newest where none was validated."""
        losses = self._losses()
        return min(losses, key=losses.get) if losses else self.latest

    @property
    def best_loss(self) -> float:
        """The lowest validation loss, infinite where none was measured."""
        return min(self._losses().values(), default=math.inf)

    def _losses(self) -> dict[int, float]:
        return {c.step: c.metrics["loss"] for c in self._orbax.checkpoints if c.metrics}

    def same_data(self, identity: dict[str, str]) -> None:
        """Remembers what the run reads, {name: hash}, for the checkpoints to come.

        Raises CheckpointError if the newest checkpoint was made with other data: paths may change between a run and its continuation,
        what lies there may not.
        """
        old = self.metadata(self.latest)["data"] if self.latest is not None else identity
        for name in sorted(old.keys() | identity.keys()):
            if old.get(name) != identity.get(name):
                raise CheckpointError(f"{self.folder / str(self.latest)} was trained with {name} {old.get(name, 'absent')}, now it is "
                                      f"{identity.get(name, 'absent')}; give the run its own data back, or start another run.folder")
        self._data = identity

    def save(self, state: TrainState, step: int, frozen_hash: str, loss: float | None = None) -> None:
        """Copies the state off the devices and returns; writing goes on meanwhile.  loss: validation loss of this very state.

        A failure to write is raised here, at the next call, or in `wait`.  A step that is there already is not written again.
        """
        self.wait()
        if any(c.step == step for c in self._orbax.checkpoints):
            return
        metadata = {"format": FORMAT, "config": cfg.to_dict(self.config), "frozen_hash": frozen_hash, "data": self._data,
                    "checksums": {"state": int(device_checksum(state._asdict())), "params": int(device_checksum(state.params))},
                    "digests": {part: cfg.digest(getattr(self.config, part)) for part in PARTS}}
        metrics = {"loss": loss} if loss is not None and math.isfinite(loss) else None
        with self._writing():
            self._response = self._orbax.save_checkpointables_async(
                step, {ITEM: state._asdict()}, force=True, metrics=metrics, custom_metadata=metadata)

    def wait(self) -> None:
        """Until everything is on disk.  Raises CheckpointError if it could not be written."""
        response, self._response = self._response, None
        if response is not None:
            with self._writing():
                response.result()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:     # tensorstore reports a full disk as ValueError
            reason = str(error).splitlines()[0][:200]
            raise CheckpointError(f"a checkpoint could not be written to {self.folder} ({reason}); free space or mend the folder, then "
                                  "run the same command again: it goes on from the last whole checkpoint") from error

    def metadata(self, step: int) -> dict:
        """{"format", "config", "frozen_hash", "data", "checksums", "digests"} of a checkpoint."""
        with self._reading(step):
            saved = self._orbax.checkpointables_metadata(step)
        if not saved.custom_metadata:
            raise self._damaged(step, "its metadata are missing")
        if saved.custom_metadata["format"] != FORMAT:       # whole, perhaps: no reason to delete it
            raise CheckpointError(f"{self.folder / str(step)} has format {saved.custom_metadata['format']}, this version of hawk_jax reads "
                                  f"{FORMAT}; read it with the version that wrote it, or train in another run.folder")
        return saved.custom_metadata

    def restore(self, step: int, wanted: TrainState, frozen_hash: str) -> TrainState:
        """The state of a step, on the mesh and with the shardings of `wanted` (`state.abstract_state`).

        Raises CheckpointError if options, the frozen tree, or a leaf's name, shape or dtype differ.
        """
        where, metadata = self.folder / str(step), self.metadata(step)
        check_options(metadata["config"], self.config, where)
        check_frozen(metadata["frozen_hash"], frozen_hash, where)
        check_leaves(self._leaves(step), wanted._asdict(), where)
        with self._reading(step):
            state = self._orbax.load_checkpointables(step, {ITEM: wanted._asdict()})[ITEM]
        self._check_bits(step, metadata["checksums"]["state"], state)
        return TrainState(**state)

    def restore_params(self, step: int, wanted: dict, frozen_hash: str) -> dict:
        """Only the trainable parameters of a step; the options of the model must agree, all others may differ."""
        where, metadata = self.folder / str(step), self.metadata(step)
        check_options(metadata["config"], self.config, where, ("model",), MAY_CHANGE_FOR_WEIGHTS)
        check_frozen(metadata["frozen_hash"], frozen_hash, where)
        leaves = self._leaves(step)
        check_leaves(leaves["params"], wanted, where)
        holes = jax.tree.map(lambda _: ocp.PLACEHOLDER, leaves) | {"params": wanted}
        with self._reading(step):
            params = self._orbax.load_checkpointables(step, {ITEM: holes})[ITEM]["params"]
        self._check_bits(step, metadata["checksums"]["params"], params)
        return params

    def _leaves(self, step: int) -> dict:
        with self._reading(step):
            leaves = self._orbax.checkpointables_metadata(step).metadata[ITEM]
        if not leaves:
            raise self._damaged(step, "its list of arrays is missing")
        return leaves

    def _check_bits(self, step: int, saved: int, tree: dict) -> None:
        """Orbax notices a file that was cut off, not every bit that flipped."""
        if int(device_checksum(tree)) != saved:
            raise self._damaged(step, "its bits are not those that were saved")

    def _damaged(self, step: int, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.folder / str(step)} is damaged ({reason}); delete that folder to go on from the checkpoint "
                               "before it")

    @contextlib.contextmanager
    def _reading(self, step: int):
        """Whatever Orbax raises on damaged files, and its threads log, as one line."""
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        except Exception as error:      # ValueError, RuntimeError, KeyError, FileNotFoundError, ...: it has no error of its own
            raise self._damaged(step, (str(error).splitlines() or [type(error).__name__])[0][:160]) from error
        finally:
            logging.disable(before)


# ------------------------------------------------------------------------------------------------ a finished run's weights
def initial_params(config: HawkConfig, mesh, frozen_hash: str) -> dict | None:
    """Best trainable parameters of run.init_from, None without one."""
    if not config.run.init_from:
        return None
    return _trained_params(config, config.run.init_from, mesh, frozen_hash)


def _trained_params(config: HawkConfig, folder: str, mesh, frozen_hash: str, step: int | None = None) -> dict:
    with Checkpoints(config, Path(folder), writing=False) as checkpoints:
        if checkpoints.best is None:
            raise CheckpointError(f"{folder} has no checkpoint yet")
        if step is not None and step not in checkpoints.steps:
            raise CheckpointError(f"{folder} has no checkpoint of step {step}; there is: {', '.join(map(str, checkpoints.steps))}")
        wanted = abstract_state(config, mesh).params
        return checkpoints.restore_params(checkpoints.best if step is None else step, wanted, frozen_hash)


def read_frozen(config: HawkConfig, mesh) -> tuple[dict, str]:
    """(frozen tree on the mesh, its hash) from run.frozen."""
    if not config.run.frozen:
        raise CheckpointError("run.frozen is empty: name the folder of the frozen tree that `pretrain` or an import wrote")
    check_decoder(Path(config.run.frozen), config.model.llama)
    _, abstract = freeze.split(build.abstract_params(config.model), config.model)
    _, shardings = freeze.split(build.shardings(config.model, mesh, config.mesh.strategy), config.model)
    return load_frozen(Path(config.run.frozen), abstract, shardings)


def load_trained(config: HawkConfig, mesh, step: int | None = None) -> dict:
    """The whole parameter tree of a run: trainables of run.folder and the frozen tree.

    step: which checkpoint; None = the best (the newest if none was validated).
    """
    frozen, frozen_hash = read_frozen(config, mesh)
    return freeze.join(_trained_params(config, config.run.folder, mesh, frozen_hash, step), frozen)
