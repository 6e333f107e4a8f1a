"""A HAWK of a few thousand values and an input that needs no files, for tests of training.  Test code only."""
import contextlib
import zlib

import jax
import numpy as np

from hawk_jax.config import (
    HawkConfig,
    InputConfig,
    LlamaConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PrepareConfig,
    QFormerConfig,
    RunConfig,
    VitConfig,
    override,
)
from hawk_jax.mesh import make_mesh
from hawk_jax.models import build
from hawk_jax.training import freeze

Q, T, S = 2, 3, 24      # visual tokens of a branch, frames, tokens of a row
MODEL = ModelConfig(
    vit=VitConfig(image_size=28, patch_size=14, width=16, depth=1, heads=2, mlp=32),
    image_qformer=QFormerConfig(queries=Q, width=16, depth=2, heads=2, mlp=32, cross_attention_freq=2),
    video_qformer=QFormerConfig(queries=Q, width=16, depth=2, heads=2, mlp=32, cross_attention_freq=1, dropout=0.1),
    llama=LlamaConfig(vocab=40, width=16, depth=2, heads=2, mlp=32, max_positions=512), frame_positions=4, compress=2,
    frozen_dtype="float32", compute_dtype="float32", remat="none", init="fan_in")


def toy_config(folder="", *options: str) -> HawkConfig:
    """40 steps of 8 clips; options: dotted overrides."""
    return override(HawkConfig(
        prepare=PrepareConfig(frames=T), input=InputConfig(clips=8), model=MODEL, loss=LossConfig(chunk_tokens=16),
        optim=OptimConfig(learning_rate=1e-2, min_learning_rate=1e-3, warmup_learning_rate=1e-3, warmup_steps=5, steps_per_epoch=40,
                          epochs=1),
        mesh=MeshConfig(strategy="replicated", data=1, fsdp=1, tensor=1),
        run=RunConfig(folder=str(folder), checkpoint_every=20, validate_every=0, log_every=10, tensorboard=False)), list(options))


def one_device():
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])


def toy_params(config: HawkConfig, mesh) -> tuple[dict, dict]:
    """(trainable, frozen), the same random values on every mesh; drawn by numpy, which compiles nothing."""
    def draw(path, leaf, sharding):
        rng = np.random.default_rng([5, zlib.crc32("/".join(path).encode())])
        spread = 1.0 if path[-1] == "scale" else 1 / np.sqrt(max(leaf.shape[-2:][0], 4)) * rng.standard_normal(leaf.shape)
        return jax.device_put(np.broadcast_to(spread, leaf.shape).astype(leaf.dtype), sharding)
    shardings = build.flatten(build.shardings(config.model, mesh, config.mesh.strategy))
    leaves = build.flatten(build.abstract_params(config.model))
    tree = build._nest({path: draw(path, leaf, shardings[path]) for path, leaf in leaves.items()})
    return freeze.split(tree, config.model)


def toy_frozen(config: HawkConfig, mesh) -> dict:
    return toy_params(config, mesh)[1]


@contextlib.contextmanager
def quick_compile(tmp_path_factory):
    """Compiling takes most of the time of these tests: a program is compiled once per session, and with fewer passes.

    Yields environment variables that say the same to a child process.
    """
    options = {"jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "compiled"),
               "jax_persistent_cache_min_compile_time_secs": 0.0, "jax_disable_most_optimizations": True}
    old = {name: jax.config.values[name] for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in options.items()}
    for name, value in old.items():
        jax.config.update(name, value)


def _clip(number: int, live: bool) -> dict:
    """One clip's row and pictures: a function of its number only."""
    rng = np.random.default_rng([3, number])
    video, motion = rng.integers(3, 9), rng.integers(2, 6)      # words of caption and motion text
    words = [rng.integers(3, 40, n) for n in (video, motion)]
    row = {k: np.zeros(S, np.int32) for k in ("tokens", "targets", "loss", "segment", "position")} | {"slot": np.full(S, -1, np.int32)}
    at = 0
    for segment, (slots, text) in enumerate(zip((np.arange(2 * Q), np.arange(Q, 2 * Q)), words), 1):
        tokens = np.concatenate([[1], 0 * slots, text])
        here, learned = slice(at, at + len(tokens)), slice(at + len(slots), at + len(tokens) - 1)
        row["tokens"][here], row["segment"][here], row["position"][here] = tokens, segment, np.arange(len(tokens))
        row["slot"][at + 1:at + 1 + len(slots)] = slots
        row["targets"][learned], row["loss"][learned] = text, segment
        at += len(tokens)
    pictures = {"frames_BTHWC": rng.integers(0, 256, (T, 28, 28, 3), np.uint8), "mask_BTHW": rng.integers(0, 256, (T, 28, 28), np.uint8),
                "crop_B4": np.float32([0, 0, 1, 1])}
    features = {f"{name}_BTQE": rng.standard_normal((T, Q, 16), np.float32) for name in ("video", "motion")}
    return {f"{k}_RS": v for k, v in row.items()} | (pictures if live else features)


def toy_batch(first: int, clips: int, live: bool = False, padding: int = 0) -> dict:
    """Clips first, first + 1, ...; the last `padding` of them have weight 0."""
    rows = [_clip(first + i, live) for i in range(clips)]
    batch = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    real = np.arange(clips) < clips - padding
    return batch | {"loss_RS": batch["loss_RS"].astype(np.uint8), "clip_RS": np.tile(np.arange(clips, dtype=np.int32)[:, None], (1, S)),
                    "weight_B": real.astype(np.float32), "clip_id_B": np.where(real, first + np.arange(clips), -1).astype(np.int32)}


class Closable:
    """An iterator with the `close` that data.stream's have."""

    def __init__(self, generator):
        self._generator = generator

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._generator)

    def close(self):
        self._generator.close()


class ToyInput:
    """Endless clips, numbered in the order of training.  spoil: {step counted from 1: function of the batch}."""
    identity = {"tokenizer": "toy"}

    def __init__(self, config: HawkConfig, live: bool = False, spoil: dict | None = None):
        self.clips, self.live, self.spoil = config.input.clips, live, spoil or {}

    def train_batches(self, start_samples: int, host: int = 0, hosts: int = 1):
        def batches():
            for first in range(start_samples, 10**9, self.clips):
                batch = toy_batch(first, self.clips, self.live)
                yield self.spoil.get(first // self.clips + 1, lambda b: b)(batch)
        return Closable(batches())

    def eval_batches(self, split: str, clips: int | None = None, host: int = 0, hosts: int = 1):
        assert split == "validation"
        return Closable(toy_batch(10**6 + i * self.clips, self.clips, self.live, padding=3 * i) for i in range(2))

    def resume_samples(self, samples: int, saved_clips: int) -> int:
        return samples

    def clip_names(self, ids) -> list[str]:
        return [f"clip{i}" for i in ids if i >= 0]

