"""Whole runs: killed, asked to stop, spoiled, out of disk; each must end where a run ends that nothing happened to, bit for bit."""
import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_run import ToyInput, one_device, quick_compile, toy_config, toy_frozen

from hawk_jax.config import HawkError
from hawk_jax.mesh import use
from hawk_jax.training import guard
from hawk_jax.training.checkpoint import Checkpoints
from hawk_jax.training.frozen import tree_hash
from hawk_jax.training.loop import start_state, train
from hawk_jax.training.state import abstract_state
from hawk_jax.training.telemetry import losses_digest, read_log
from hawk_jax.training.validate import make_eval_step, validation_loss

OPTIONS = ("run.log_every=1", "run.validate_every=10", "run.checkpoint_every=20", "run.keep_checkpoints=1", "run.validation_batches=2")


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with quick_compile(tmp_path_factory) as environment:
        yield environment


def go(folder, *options, spoil=None) -> dict:
    config, mesh = toy_config(folder, *OPTIONS, *options), one_device()
    return train(config, input=ToyInput(config, spoil=spoil), frozen=toy_frozen(config, mesh), mesh=mesh)


def last_state(folder, latest=40, step=None):
    """A saved state of a run, by default the newest, on the host."""
    config, mesh = toy_config(folder, *OPTIONS), one_device()
    with Checkpoints(config, folder, writing=False) as checkpoints:
        assert checkpoints.latest == latest
        return jax.device_get(checkpoints.restore(step or latest, abstract_state(config, mesh), tree_hash(toy_frozen(config, mesh))))


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def log_of(folder) -> list[dict]:
    """Figures of all steps that do not depend on the clock."""
    names = ("step", "loss", "video_language", "motion_language", "consistency", "grad_norm", "learning_rate")
    return [{name: line[name] for name in names} for line in read_log(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, summary) of 40 steps in one go."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, go(folder)


def test_a_run_learns_and_tells(whole):
    folder, summary = whole
    lines, losses = log_of(folder), [line["loss"] for line in read_log(folder)]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.02        # 4.13 at the start: guessing among 40 words costs 3.69 + 0.37
    assert summary["steps"] == 40 and summary["samples"] == 320 and summary["last_loss"] == losses[-1]
    digest = hashlib.sha256(np.array(losses[:20], "<f4").tobytes()).hexdigest()[:16]
    assert summary["losses_digest"] == digest == losses_digest(losses)
    assert all(0 <= line["waited"] <= 1 and line["tokens_per_s"] > line["clips_per_s"] > 0 for line in read_log(folder))
    # total = 1, 0.1, 0.1 x the three losses
    total = [line["video_language"] + 0.1 * line["motion_language"] + 0.1 * line["consistency"] for line in lines]
    np.testing.assert_allclose(losses, total, rtol=1e-6)


def test_validation_keeps_the_best(whole):
    folder, summary = whole
    losses = {line["step"]: line["loss"] for line in read_log(folder, "validation")}
    assert list(losses) == [10, 20, 30, 40]
    best = min(losses, key=losses.get)
    assert (summary["best_step"], summary["best_validation_loss"]) == (best, losses[best])
    assert {int(p.name) for p in (folder / "checkpoints").iterdir()} == {best, 40}
    config, mesh = toy_config(folder, *OPTIONS), one_device()
    with use(mesh, "replicated"):       # the figure in the log is that of the parameters in the checkpoint, without dropout
        params = jax.device_put(last_state(folder).params, mesh.devices.flat[0])
        found = validation_loss(config, make_eval_step(config), params, toy_frozen(config, mesh), ToyInput(config), mesh)
    np.testing.assert_allclose(found["loss"], losses[40], rtol=1e-6)


def test_a_finished_run_is_not_repeated(whole):
    folder, summary = whole
    again = go(folder, spoil={n: None for n in range(1, 42)})       # any batch would fail
    assert all(again[k] == summary[k] for k in ("steps", "losses_digest", "best_step"))


def test_killed_and_run_again_is_bit_exact(whole, tmp_path, quick):
    script = Path(__file__).parent / "toy_train.py"
    command = [sys.executable, str(script), str(tmp_path), "SIGKILL", "27", *OPTIONS]
    done = subprocess.run(command, env=os.environ | quick | {"PYTHONPATH": str(script.parents[1])}, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert [line["step"] for line in read_log(tmp_path)][-1] >= 25      # written to the last finished step but one
    go(tmp_path)
    same(last_state(tmp_path), last_state(whole[0]))
    assert log_of(tmp_path) == log_of(whole[0])


def test_sigterm_at_any_step_loses_none(whole, tmp_path):
    for step, number in ((1, signal.SIGTERM), (2, signal.SIGINT), (20, signal.SIGTERM), (33, signal.SIGTERM)):
        with pytest.raises(guard.Stopped) as stopped:
            go(tmp_path, spoil={step: lambda batch, number=number: os.kill(os.getpid(), number) or batch})
        assert stopped.value.code == 128 + number
        with Checkpoints(toy_config(tmp_path), tmp_path, writing=False) as checkpoints:
            assert checkpoints.latest == step       # the step whose batch was being read is finished first
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert go(tmp_path)["losses_digest"] == whole[1]["losses_digest"]
    same(last_state(tmp_path), last_state(whole[0]))
    assert log_of(tmp_path) == log_of(whole[0])


def test_a_loss_that_is_not_finite_names_step_and_clips(whole, tmp_path):
    def spoil(batch):
        batch["video_BTQE"][3] = np.inf
        return batch
    with pytest.raises(guard.NonFinite, match=r"step 25 is not finite \(loss nan, .*; its clips: clip192, clip193, .*, clip199\. "):
        go(tmp_path, spoil={25: spoil})
    last_state(tmp_path, 24)        # nothing that was finished is lost
    go(tmp_path)
    same(last_state(tmp_path), last_state(whole[0]))
    assert log_of(tmp_path) == log_of(whole[0])


def test_a_broken_input_loses_nothing(whole, tmp_path):
    def broken(batch):
        raise HawkError("step 15, clip x: its record is damaged")
    with pytest.raises(HawkError, match="clip x"):
        go(tmp_path, spoil={16: broken})
    assert last_state(tmp_path, 15).step == 15
    assert log_of(tmp_path) == log_of(whole[0])[:15]


def test_a_full_disk_is_one_line_and_what_was_saved_stays(whole, tmp_path, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(batch):
        while not (tmp_path / "checkpoints" / "20").is_dir():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))       # the log still fits, a checkpoint does not
        return batch
    try:
        with pytest.raises(HawkError, match="could not be written .*; free space") as error:
            go(tmp_path, spoil={22: fill})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value) and not caplog.records
    last_state(tmp_path, 20)
    go(tmp_path)
    same(last_state(tmp_path), last_state(whole[0]))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HawkError, match="mend run.folder"):
        go(tmp_path / "file" / "run")


def test_frozen_parameters_that_change_in_memory_are_noticed(tmp_path, monkeypatch):
    checksums = iter((1, 2))        # before the first step, after the last
    monkeypatch.setattr("hawk_jax.training.loop.device_checksum", lambda frozen: next(checksums))
    with pytest.raises(HawkError, match="frozen parameters changed in memory"):
        go(tmp_path, "run.steps=1")


def test_init_from_takes_the_best_trainables_and_a_fresh_optimiser(whole, tmp_path):
    folder, summary = whole
    config, mesh = toy_config(tmp_path, f"run.init_from={folder}", "optim.learning_rate=0.5"), one_device()
    frozen_hash = tree_hash(toy_frozen(config, mesh))
    with use(mesh, "replicated"), Checkpoints(config, tmp_path) as checkpoints:
        state, _ = start_state(config, mesh, checkpoints, frozen_hash)
    same(state.params, last_state(folder, 40, summary["best_step"]).params)
    assert int(state.step) == int(state.samples) == int(state.opt_state["count"]) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_waited_and_tensorboard(tmp_path):
    def slow(batch):
        time.sleep(0.2)     # a toy step takes a hundredth of that
        return batch
    go(tmp_path, "run.tensorboard=True", "run.steps=6", "run.validate_every=0", spoil={4: slow, 5: slow})
    waited = {line["step"]: line["waited"] for line in read_log(tmp_path)}
    assert waited[1] == 0 and waited[4] == waited[5] == 1       # nothing can wait for the first batch
    file = next((tmp_path / "tensorboard").iterdir())
    assert all(name in file.read_bytes() for name in (b"train/loss", b"train/grad_norm", b"train/waited"))
