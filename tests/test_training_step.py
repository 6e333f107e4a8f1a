"""The step on other meshes, in microbatches, with live pictures, and where something is not finite."""
import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from toy_run import quick_compile, toy_batch, toy_config, toy_params

from hawk_jax.config import ConfigError
from hawk_jax.mesh import make_mesh, use
from hawk_jax.models import build
from hawk_jax.models.hawk import HawkOutputs
from hawk_jax.training import freeze, guard
from hawk_jax.training.losses import hawk_losses, mean
from hawk_jax.training.state import init_state
from hawk_jax.training.step import check_division, dropout_keys, gradients, make_train_step, microbatches, put_batch

NAMES = ("loss", "video_language", "motion_language", "consistency", "grad_norm")


@contextlib.contextmanager
def ready(config):
    """(state, frozen, step, put) on the mesh of a configuration, within it."""
    mesh = make_mesh(config.mesh, jax.devices()[:config.mesh.data * config.mesh.fsdp * config.mesh.tensor])
    with use(mesh, config.mesh.strategy):
        trainable, frozen = toy_params(config, mesh)
        yield init_state(config, mesh, trainable), frozen, make_train_step(config, mesh), lambda batch: put_batch(batch, mesh)


def run(config, steps: int):
    """(state, figures [steps, NAMES]) of a few steps on live pictures, with padding clips in each batch."""
    figures = []
    with ready(config) as (state, frozen, step, put):
        for n in range(steps):
            state, metrics = step(state, frozen, put(toy_batch(8 * n, 8, live=True, padding=3)))
            figures.append([float(mean(metrics[name])) for name in NAMES])
        assert step._cache_size() == 1      # what comes out lies where it came from
    return state, np.array(figures)


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with quick_compile(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def plain(quick):
    return run(toy_config(), 4)


@pytest.mark.parametrize("strategy, shape", [("replicated", (8, 1, 1)), ("fsdp_tensor", (2, 2, 2))])
def test_eight_devices_equal_one(plain, strategy, shape):
    # 1e-5 relative: other shards add up in another order, and four steps of Adam carry the rounding on
    options = [f"mesh.{k}={v}" for k, v in zip(("data", "fsdp", "tensor"), shape)] + [f"mesh.strategy={strategy}"]
    state, figures = run(toy_config("", *options), 4)
    np.testing.assert_allclose(figures[:, :4], plain[1][:, :4], rtol=1e-5)
    assert {d.id for leaf in jax.tree.leaves(state) for d in leaf.sharding.device_set} == set(range(8))
    kernel = state.params["video"]["proj_0"]["kernel"]
    split = kernel.addressable_shards[0].data.size < kernel.size
    assert split == (strategy != "replicated")


def test_microbatches_equal_the_whole_batch(plain):
    # Weights are those of the whole batch (padding makes the microbatches unequal), dropout belongs to clips and not to microbatches,
    # and on two devices a microbatch is made of parts of both shards.  1e-5: another order of sums.
    state, figures = run(toy_config("", "optim.accumulation=4", "mesh.data=2"), 4)
    np.testing.assert_allclose(figures, plain[1], rtol=1e-5)
    assert int(state.samples) == 32


@pytest.mark.parametrize("options", [(), ("loss.group_rows=1",), ("loss.group_rows=2", "loss.cosine=group")])
def test_losses_of_microbatches_add_up(options):
    config = toy_config("", *options).loss
    rng, batch = np.random.default_rng(0), {k: v for k, v in toy_batch(0, 8, padding=3).items() if k != "clip_id_B"}
    batch["outputs"] = HawkOutputs(*(rng.standard_normal((8, *shape)).astype(np.float32) for shape in ((24, 16), (2, 8), (2, 8))))
    kernel = jnp.asarray(rng.standard_normal((16, 40)), jnp.float32)

    def losses(batch):
        return hawk_losses(batch["outputs"], batch, kernel, config)
    parts, _ = microbatches(batch, None, 4)
    added = jax.tree.map(lambda x: x.sum(0), jax.lax.map(losses, parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), added, losses(batch))


def test_same_seed_same_bits(plain):
    state, figures = run(toy_config(), 4)
    np.testing.assert_array_equal(figures, plain[1])
    jax.tree.map(np.testing.assert_array_equal, state.params, plain[0].params)


def test_dropout_keys_belong_to_seed_step_and_clip():
    def keys(seed, step, clips):
        found = dropout_keys(toy_config("", f"run.seed={seed}"), step, clips)
        assert "fry" in str(found.dtype)            # threefry, by name
        return [tuple(row) for row in np.asarray(jax.random.key_data(found))]
    seen = keys(1, 0, 8) + keys(1, 1, 8) + keys(2, 0, 8)
    assert len(set(seen)) == 24
    assert keys(1, 0, 4) == seen[:4]                # the number of clips beside it does not matter
    assert dropout_keys(toy_config("", "model.video_qformer.dropout=0.0"), 0, 8) is None


def test_what_is_not_finite_changes_nothing_and_stops_what_follows(plain):
    good, bad, next_one = (toy_batch(first, 8, live=True, padding=3) for first in (0, 8, 8))
    bad["crop_B4"][2] = np.nan
    with ready(toy_config()) as (state, frozen, step, put):
        state, metrics = step(state, frozen, put(good))
        before = jax.device_get(state)
        assert metrics["refused"][0] == 0
        for batch in (bad, good):           # the good step after it is refused as well
            state, metrics = step(state, frozen, put(batch))
            assert metrics["refused"][0] == 1
        after = jax.device_get(state)
        jax.tree.map(np.testing.assert_array_equal, after._replace(guard=before.guard), before)
        assert after.guard["skips"] == 2
        state, metrics = step(guard.forgiven(state), frozen, put(next_one))
    assert metrics["refused"][0] == 0
    assert float(metrics["loss"][0]) == plain[1][1, 0]      # as if the bad batch had never come


def test_clips_must_come_out_even():
    cases = {("mesh.data=8", "optim.accumulation=2"): "input.clips=8 is not a multiple of 8 devices",
             ("loss.group_rows=2", "optim.accumulation=4", "mesh.data=2", "input.clips=8"): "loss.group_rows=2 does not divide the 1 clips",
             ("loss.cosine=group", "optim.accumulation=2"): "cannot be accumulated"}
    for options, message in cases.items():
        config = toy_config("", *options)
        with pytest.raises(ConfigError, match=message):
            check_division(config, make_mesh(config.mesh, jax.devices()[:config.mesh.data]))


def test_a_finite_loss_with_a_gradient_that_is_not_is_refused():
    fresh = guard.empty()
    for loss, norm, refused in ((1.0, 2.0, 0), (np.nan, 2.0, 0), (np.inf, 2.0, 0), (1.0, np.inf, 0), (1.0, np.nan, 0), (1.0, 2.0, 1)):
        found = guard.accept(fresh | {"skips": jnp.int32(refused)}, jnp.float32(loss), jnp.float32(norm))
        assert bool(found) == (np.isfinite(loss) and np.isfinite(norm) and not refused)


def test_running_mean_of_the_loss():
    # the first loss, then 98 % of the old mean; refused steps do not count
    state, expected = guard.empty(), None
    for step, (loss, ok) in enumerate([(4.0, True), (2.0, True), (np.nan, False), (3.0, True)]):
        state = guard.advance(state, jnp.bool_(ok), jnp.float32(loss), step)
        if ok:
            expected = loss if expected is None else 0.98 * expected + 0.02 * loss
    assert float(state["loss_average"]) == pytest.approx(expected, rel=1e-6) and int(state["skips"]) == 1


def scans(jaxpr, length: int):
    """All scans of so many turns, inner programs included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan" and eqn.params["length"] == length:
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from scans(inner, length)


@pytest.mark.parametrize("remat, kept", [("full", 1), ("dots", 7)])
def test_the_backward_pass_keeps_no_copy_of_the_frozen_decoder(remat, kept):
    """Traced only.  Of a layer it keeps its input, and with dots the seven matrix products; at 7B a copy of the weights is 13 GB."""
    config = toy_config("", f"model.remat={remat}", "model.llama.depth=5")
    trainable, frozen = freeze.split(build.abstract_params(config.model), config.model)
    batch = {k: v for k, v in toy_batch(0, 8).items() if k != "clip_id_B"}
    jaxpr = jax.make_jaxpr(lambda p, f: gradients(config, p, f, batch, dropout_keys(config, 0, 8)))(trainable, frozen)
    forward, backward = scans(jaxpr.jaxpr, 5)
    assert [v.aval.shape for v in backward.outvars] == [(8, 24, 16)]            # the cotangent of the decoder's input, nothing of weights
    last, *stacked = [v.aval.shape for v in forward.outvars]
    assert last == (8, 24, 16) and len(stacked) == kept and {shape[:3] for shape in stacked} == {(5, 8, 24)}
