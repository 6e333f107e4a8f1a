"""Losses, gradients and four optimiser steps of the whole model against the authors' code (float32, dropout 0).

Tolerances: the goldens differ from the same modules in float64 by < 1e-7 (losses) and < 3e-6 (gradients) relative; ours sum in another
order.  Key biases have mathematically no gradient, theirs is rounding noise that Adam blows up to full steps: left out.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import GOLDEN, from_torch, golden
from toy_run import one_device, quick_compile

from hawk_jax.config import HawkConfig, InputConfig, LossConfig, MeshConfig, OptimConfig, PrepareConfig
from hawk_jax.mesh import use
from hawk_jax.models.build import flatten
from hawk_jax.training import freeze
from hawk_jax.training.state import init_state, optimizer
from hawk_jax.training.step import make_train_step

Q, BOS, IMAGE = 8, 1, 480


def config_of(stage: int, given: dict) -> HawkConfig:
    o = given["optimizer_steps"]
    return HawkConfig(
        prepare=PrepareConfig(frames=4), input=InputConfig(clips=2), model=dataclasses.replace(GOLDEN, train_query_tokens_motion=True),
        loss=LossConfig(cosine="group", chunk_tokens=16, motion_language_of="motion_text" if stage == 1 else "video_language"),
        optim=OptimConfig(learning_rate=o["init_lr"], min_learning_rate=o["min_lr"], warmup_learning_rate=o["warmup_lr"],
                          warmup_steps=o["warmup_steps"], warmup_counter="inner_epoch", steps_per_epoch=o["iters_per_epoch"],
                          epochs=o["max_epoch"], clip_norm=None),
        mesh=MeshConfig(strategy="replicated", data=1, fsdp=1, tensor=1))


def segment(tokens, slots, learned, code):
    """Rows of one segment, unpadded: the token after each position is its target if it is to be learned."""
    n = len(tokens)
    following, learn = np.append(tokens[1:], 0), np.append(learned[1:], False)
    return np.stack([tokens, following * learn, code * learn, np.full(n, code), np.arange(n), slots])


def caption_rows(inputs):
    """BOS | video | motion | caption, then BOS | motion | motion text."""
    for i in range(2):
        parts = []
        for code, slots, name in ((1, np.arange(2 * Q), "text"), (2, np.arange(Q, 2 * Q), "text_motion")):
            words = inputs[f"{name}_ids"][i][inputs[f"{name}_mask"][i] > 0]
            tokens = np.concatenate([[BOS], 0 * slots, words])
            parts.append(segment(tokens, np.concatenate([[-1], slots, words * 0 - 1]), np.arange(len(tokens)) > len(slots), code))
        yield np.concatenate(parts, axis=1)


def conversation_rows(inputs):
    for i in range(2):
        n = inputs["attention_mask"][i].sum()
        tokens = inputs["input_ids"][i][:n].copy()
        assert (tokens != 0).all()
        image, slots = tokens == IMAGE, np.full(n, -1)
        slots[image], tokens[image] = np.arange(2 * Q), 0
        yield segment(tokens, slots, inputs["labels"][i][:n] != -100, 1)


def batch_of(stage: int, inputs: dict) -> dict:
    rows = list(caption_rows(inputs) if stage == 1 else conversation_rows(inputs))
    width = max(row.shape[1] for row in rows)
    packed = np.stack([np.pad(row, ((0, 0), (0, width - row.shape[1]))) for row in rows], axis=1).astype(np.int32)
    text = dict(zip(("tokens_RS", "targets_RS", "loss_RS", "segment_RS", "position_RS", "slot_RS"), packed))
    text["slot_RS"] = np.where(text["segment_RS"] == 0, -1, text["slot_RS"])

    def picture(name):      # the goldens' pictures are already resized, in 0..1
        return 255 * inputs[name].transpose(0, 2, 3, 4, 1)
    clips = {"clip_RS": np.tile(np.arange(2, dtype=np.int32)[:, None], (1, width)), "weight_B": np.ones(2, np.float32)}
    whole = np.tile(np.float32([0, 0, 1, 1]), (2, 1))
    return jax.tree.map(jnp.asarray, text | clips | {
        "frames_BTHWC": picture("image"), "motion_frames_BTHWC": picture("image_motion"),
        "mask_BTHW": np.full((2, 4, 56, 56), 255, np.uint8), "crop_B4": whole})


def load(shared, stage: int):
    """(config, trainable, frozen, batch, outputs)"""
    unit = {1: "full_model_stage1", 2: "full_model_stage2_multi"}[stage]
    _, inputs, outputs, given = golden(shared, unit)
    weights, *_ = golden(shared, "full_model_stage1")
    config = config_of(stage, given)
    trainable, frozen = freeze.split(from_torch(weights, config.model), config.model)
    return config, trainable, frozen, batch_of(stage, inputs), outputs


def trees(outputs: dict, prefix: str, config) -> dict:
    """{path: array} of one group of outputs in our layout, trainables only."""
    theirs = {k.removeprefix(prefix): v for k, v in outputs.items() if k.startswith(prefix)}
    return flatten(freeze.split(from_torch(theirs, config.model), config.model)[0])


def without_key_bias(flat: dict) -> dict:
    return {path: np.asarray(x, np.float64) for path, x in flat.items() if path[-2:] != ("key", "bias")}


def distance(ours: dict, theirs: dict) -> float:
    """Largest relative L2 distance over leaves."""
    assert ours.keys() == theirs.keys()
    return max(np.linalg.norm(ours[k] - theirs[k]) / np.linalg.norm(theirs[k]) for k in ours)


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with quick_compile(tmp_path_factory):
        yield


@pytest.mark.parametrize("stage", [1, 2])
def test_losses_gradients_and_four_steps(shared, stage):
    config, trainable, frozen, batch, outputs = load(shared, stage)
    before, mesh = without_key_bias(flatten(trainable)), one_device()
    with use(mesh, "replicated"):
        state, step = init_state(config, mesh, trainable), make_train_step(config, mesh)
        for n in range(4):
            state, metrics = step(state, frozen, batch)
            np.testing.assert_allclose(metrics["learning_rate"][0], outputs["steps/lr"][n], rtol=1e-6)
            np.testing.assert_allclose(metrics["loss"][0], outputs["steps/total_loss"][n], rtol=1e-6 if n == 0 else 1e-5)
            if n == 0:
                for name, key in (("video_language", "loss"), ("motion_language", "loss_motion"), ("consistency", "consistency_loss")):
                    np.testing.assert_allclose(metrics[name][0] / metrics[name][1], outputs[key][0], rtol=1e-6, err_msg=name)
                # Adam's first mean is (1 - beta1) x gradient
                grads = without_key_bias(flatten(jax.tree.map(lambda mu: mu / (1 - config.optim.beta1), state.opt_state["mu"])))
                assert distance(grads, without_key_bias(trees(outputs, "grad/", config))) < 1e-4
    after, theirs = without_key_bias(flatten(state.params)), without_key_bias(trees(outputs, "after_steps/", config))
    # of the change, not of the values: four small steps would hide in those
    assert distance({k: after[k] - before[k] for k in after}, {k: theirs[k] - before[k] for k in after}) < 1e-3


def test_decay_groups(shared):
    config, trainable, *_ = load(shared, 1)
    _, _, _, given = golden(shared, "full_model_stage1")
    weights, *_ = golden(shared, "full_model_stage1")
    marks = {name: np.full_like(weights[name], name in given["weight_decay_params"]) for name in given["trainable"]}
    theirs = flatten(freeze.split(from_torch(marks, config.model), config.model)[0])
    # one update with gradient 0 and rate 1 moves a value by weight_decay x value, or not at all
    ones = jax.tree.map(jnp.ones_like, trainable)
    tx = optimizer(config)
    moved = jax.jit(lambda zeros: tx.update(zeros, tx.init(zeros), ones)[0])(jax.tree.map(jnp.zeros_like, trainable))
    for path, update in flatten(moved).items():
        np.testing.assert_array_equal(np.asarray(update) != 0, np.asarray(theirs[path]) != 0, err_msg="/".join(path))
