"""Time of one training step of the demo model, from pictures and from kept features."""
import dataclasses
from pathlib import Path

import jax
import numpy as np

from benchmarks import frame
from configs import demo
from hawk_jax.config import HawkConfig
from hawk_jax.mesh import make_mesh, use
from hawk_jax.models import build
from hawk_jax.training import freeze
from hawk_jax.training.state import init_state, random_key
from hawk_jax.training.step import make_train_step, put_batch

LENGTH = 96         # tokens of a row, as the demo's captions have
STEPS = 3           # between two looks at the clock


def made_up_batch(config: HawkConfig, kept: bool) -> dict[str, np.ndarray]:
    """A batch of random pictures (or kept features) and tokens, in the form that data.stream gives."""
    rng, B, Q = np.random.default_rng(0), config.input.clips, config.model.video_qformer.queries
    T, size = config.prepare.frames, config.prepare.size
    tokens_RS = rng.integers(3, config.model.llama.vocab, (B, LENGTH), np.int32)
    slot_RS = np.full((B, LENGTH), -1, np.int32)
    half = LENGTH // 2
    slot_RS[:, 1:1 + 2 * Q], slot_RS[:, half + 1:half + 1 + Q] = np.arange(2 * Q), np.arange(Q, 2 * Q)
    segment_RS = np.repeat(np.where(np.arange(LENGTH) < half, 1, 2)[None], B, 0).astype(np.int32)
    batch = {"tokens_RS": np.where(slot_RS < 0, tokens_RS, 0), "targets_RS": np.roll(tokens_RS, -1, axis=1), "slot_RS": slot_RS,
             "loss_RS": ((slot_RS < 0) * segment_RS).astype(np.uint8), "segment_RS": segment_RS,
             "position_RS": np.repeat(np.arange(LENGTH, dtype=np.int32)[None] % half, B, 0),
             "clip_RS": np.repeat(np.arange(B, dtype=np.int32)[:, None], LENGTH, 1), "weight_B": np.ones(B, np.float32)}
    if kept:
        shape = (B, T, config.model.image_qformer.queries, config.model.image_qformer.width)
        return batch | {f"{name}_BTQE": rng.standard_normal(shape, np.float32) for name in ("video", "motion")}
    return batch | {"frames_BTHWC": rng.integers(0, 256, (B, T, size, size, 3), np.uint8),
                    "mask_BTHW": rng.integers(0, 256, (B, T, size, size), np.uint8),
                    "crop_B4": np.tile(np.float32([0, 0, 1, 1]), (B, 1))}


class Stepper:
    """A compiled step and its state."""

    def __init__(self, config: HawkConfig, mesh, kept: bool):
        self.mesh, self.strategy, self.batch = mesh, config.mesh.strategy, made_up_batch(config, kept)
        with use(mesh, self.strategy):
            params, self.frozen = freeze.split(build.init_params(config.model, random_key(0, 0)), config.model)
            self.state, self.step = init_state(config, mesh, params), make_train_step(config, mesh)
        self.first = frame.seconds(lambda: self.run(1))

    def run(self, steps: int = STEPS) -> None:
        """Steps, with the transfer of their batches, until their results are there."""
        with use(self.mesh, self.strategy):
            for _ in range(steps):
                self.state, metrics = self.step(self.state, self.frozen, put_batch(self.batch, self.mesh))
            jax.block_until_ready(metrics)


@frame.benchmark("step", "one training step of the demo model in ms, from pictures and from kept encoder features")
def run(folder: Path, repeats: int) -> dict:
    config = demo.stage1()
    mesh = make_mesh(config.mesh)
    live = dataclasses.replace(config, input=dataclasses.replace(config.input, features="live"))
    steppers = {"pictures": Stepper(live, mesh, False), "features": Stepper(config, mesh, True)}
    samples = frame.interleaved({name: lambda s=s: frame.rate(s.run, STEPS) for name, s in steppers.items()}, repeats)
    wall = {name: [1000 / r.per_second for r in values] for name, values in samples.items()}
    figures = {f"from {name}": frame.figure(values, "ms/step", "lower") for name, values in wall.items()}
    for name, values in samples.items():
        figures[f"from {name}, CPU"] = frame.figure([r.cpu_ms for r in values], "CPU ms/step", "lower")
    figures |= {f"from {name}, first step": frame.figure([s.first], "s, with compilation", "lower") for name, s in steppers.items()}
    ratios = {"speed-up by kept features": frame.ratio(wall, "pictures", "features")}
    return frame.report({"config": "configs/demo.py:stage1", "clips": config.input.clips, "tokens_per_row": LENGTH,
                         "devices": jax.device_count()}, figures, ratios)
