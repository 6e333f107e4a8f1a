"""Schedule against the authors' values, AdamW against numpy in float64, freeze rules, frozen parameters that stay."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_run import MODEL

from hawk_jax.axes import Axes
from hawk_jax.config import OptimConfig
from hawk_jax.models import build
from hawk_jax.training import freeze
from hawk_jax.training.optim import decay_tree, decays, learning_rate, make_optimizer


def schedules(shared):
    for schedule in json.loads((shared / "goldens/hawk/lr_schedule.json").read_text())["schedules"]:
        g = schedule["config"]
        yield OptimConfig(learning_rate=g["init_lr"], min_learning_rate=g["min_lr"], warmup_learning_rate=g["warmup_start_lr"],
                          warmup_steps=g["warmup_steps"], steps_per_epoch=g["iters_per_epoch"], epochs=g["max_epoch"],
                          warmup_counter="inner_epoch"), np.array(schedule["step_lr"])


def test_schedule_equals_the_released_one(shared):
    # 1e-6: float32 holds seven digits, the cosine of a float32 angle a little less
    for config, pairs in schedules(shared):
        rates = jax.vmap(lambda step: learning_rate(step, config))(jnp.asarray(pairs[:, 0], jnp.int32))  # noqa: B023
        np.testing.assert_allclose(rates, pairs[:, 1], rtol=1e-6)


def test_warmup_by_total_step_rises_once(shared):
    config, pairs = list(schedules(shared))[1]      # its warm-up is longer than an epoch
    total = dataclasses.replace(config, warmup_counter="total")
    rates = [float(learning_rate(step, total)) for step in range(len(pairs))]
    line = 1e-6 + (3e-4 - 1e-6) * np.arange(7) / 7
    np.testing.assert_allclose(rates[:7], line, rtol=1e-6)
    np.testing.assert_allclose(rates[7:], pairs[7:, 1], rtol=1e-6)     # after it the two counters agree
    np.testing.assert_allclose([float(learning_rate(step, total)) for step in (20, 25, 90)], 2e-5, rtol=1e-6)   # beyond the end


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_adamw_equals_numpy(clip_norm):
    config = OptimConfig(clip_norm=clip_norm, weight_decay=0.1, beta1=0.8, beta2=0.9)
    rng = np.random.default_rng(0)
    params, decay = {"kernel": rng.standard_normal((3, 4)), "bias": rng.standard_normal(4)}, {"kernel": True, "bias": False}
    tx, ours = make_optimizer(config, decay), {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    state, m, v = tx.init(ours), dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
    for t in range(1, 6):
        grads = {k: rng.standard_normal(x.shape) * 10.0 ** (t - 3) for k, x in params.items()}
        updates, state = tx.update({k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, state, ours)
        ours = {k: ours[k] - 0.01 * updates[k] for k in ours}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g * (min(1, clip_norm / norm) if clip_norm else 1)
            m[k], v[k] = 0.8 * m[k] + 0.2 * g, 0.9 * v[k] + 0.1 * g**2
            adam = m[k] / (1 - 0.8**t) / (np.sqrt(v[k] / (1 - 0.9**t)) + 1e-8)
            params[k] = params[k] - 0.01 * (adam + 0.1 * params[k] * decay[k])
    for k in params:
        np.testing.assert_allclose(ours[k], params[k], rtol=1e-5)       # float32 against float64


def test_decay_is_decided_on_one_layer():
    assert not decays(("video", "attention", "query", "bias"), Axes(("layers", "heads"), (2, 8)))      # rank 2 by stacking only
    assert not decays(("video", "norm", "scale"), Axes(("copies", "layers", "norm"), (1, 2, 8)))
    assert decays(("video", "mlp", "kernel"), Axes(("layers", "embed", "mlp"), (2, 8, 8)))
    assert not decays(("video", "ln_x", "kernel"), Axes(("embed", "mlp"), (8, 8)))
    assert decays(("encoder", "query_tokens_motion"), Axes(("copies", "table", "embed"), (1, 4, 8)))


def test_every_parameter_has_one_rule_and_split_is_undone_by_join():
    for copies, trains in ((1, False), (2, False), (2, True)):
        model = dataclasses.replace(MODEL, qformer_copies=copies, train_query_tokens_motion=trains)
        tree = build.abstract_params(model)
        trainable, frozen = freeze.split(tree, model)
        paths = build.flatten(trainable).keys()
        assert {p[0] for p in paths} == {"video", "motion"} | ({"encoder"} if trains else set())
        assert (("encoder", "query_tokens_motion") in paths) == trains
        assert not paths & build.flatten(frozen).keys()
        assert build.flatten(freeze.join(trainable, frozen)) == build.flatten(tree)
        decay_tree(freeze.split(build.logical_axes(model), model)[0])
        assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(trainable))


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(freeze.FreezeError, match="audio/kernel is matched by 0 freeze rules"):
        freeze.split({"audio": {"kernel": 0}}, MODEL)
