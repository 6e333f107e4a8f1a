"""One update: a pure function of (state, frozen, batch), compiled once for each row length."""
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hawk_jax import axes
from hawk_jax.config import ConfigError, HawkConfig
from hawk_jax.mesh import batch_sharding, replicated
from hawk_jax.models import build
from hawk_jax.training import freeze, guard
from hawk_jax.training.losses import hawk_losses, loss_weights, total_loss
from hawk_jax.training.optim import learning_rate
from hawk_jax.training.state import DROPOUT, TrainState, optimizer, random_key, state_shardings


def put_batch(batch: dict, mesh) -> dict:
    """A host's rows of a batch (numpy) as arrays split over the mesh; `clip_id_B` stays behind, the device has no use for it."""
    sharding, batch = batch_sharding(mesh), {k: v for k, v in batch.items() if k != "clip_id_B"}
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


# ------------------------------------------------------------------------------------------------ microbatches
def check_division(config: HawkConfig, mesh) -> None:
    """Raises ConfigError if clips do not come out even over devices and microbatches."""
    clips, parts = config.input.clips, config.optim.accumulation
    shards = int(np.prod([mesh.shape[name] for name in axes.BATCH]))
    if clips % (shards * parts):
        raise ConfigError(f"input.clips={clips} is not a multiple of {shards} devices (data x fsdp) x optim.accumulation={parts}")
    if parts > 1 and config.loss.group_rows and clips // (shards * parts) % config.loss.group_rows:
        raise ConfigError(f"loss.group_rows={config.loss.group_rows} does not divide the {clips // (shards * parts)} clips of a device "
                          "in a microbatch: a group would be torn apart")
    if parts > 1 and config.loss.cosine == "group" and not config.loss.group_rows:
        raise ConfigError("loss.cosine=group with loss.group_rows=0 is one cosine over the whole batch and cannot be accumulated; "
                          "set loss.group_rows or optim.accumulation=1")


def microbatches(batch: dict, keys_B, count: int):
    """(batch, keys) with every entry [X, ...] as [count, X // count, ...]; each device cuts up its own rows, so that nothing moves."""
    clips = batch["weight_B"].shape[0]
    shards = axes.batch_shards(clips)
    own, part = clips // shards, clips // (shards * count)
    # number of a clip in its microbatch: microbatch m takes the m-th part of every shard
    batch = batch | {"clip_RS": batch["clip_RS"] // own * part + batch["clip_RS"] % part}

    def cut(x):
        x = x.reshape(shards, count, x.shape[0] // (shards * count), *x.shape[1:])
        return x.swapaxes(0, 1).reshape(count, -1, *x.shape[3:])
    return jax.tree.map(cut, (batch, keys_B))


# ------------------------------------------------------------------------------------------------ the step
def dropout_keys(config: HawkConfig, step, clips: int):
    """One key for each clip of the global batch, whatever the mesh and the microbatches; None where nothing drops out."""
    if config.model.video_qformer.dropout == 0:
        return None
    key = jax.random.fold_in(random_key(config.run.seed, DROPOUT), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(clips))


def gradients(config: HawkConfig, params: dict, frozen: dict, batch: dict, keys_B):
    """(losses {name: (sum, weight)} of the batch, gradient of their total), by as many microbatches as configured."""
    weights = {name: weight.sum() for name, weight in loss_weights(batch, config.loss).items()}

    def loss_fn(params, part, keys):
        tree = freeze.join(params, frozen)
        outputs = build.bind(config.model, tree)(part, dropout_key=keys)
        sums = {name: s for name, (s, _) in hawk_losses(outputs, part, tree["llama"]["lm_head"]["kernel"], config.loss).items()}
        return total_loss({name: (sums[name], weights[name]) for name in sums}, config.loss), sums
    differentiate, count = jax.grad(loss_fn, has_aux=True), config.optim.accumulation

    def add(total, part):
        return jax.tree.map(jnp.add, total, differentiate(params, *part)), None
    if count == 1:
        grads, sums = differentiate(params, batch, keys_B)
    else:
        zero = jax.tree.map(jnp.zeros_like, params), {name: jnp.float32(0) for name in weights}
        (grads, sums), _ = jax.lax.scan(add, zero, microbatches(batch, keys_B, count))
    return {name: (sums[name], weights[name]) for name in sums}, grads


def make_train_step(config: HawkConfig, mesh):
    """The jitted step(state, frozen, batch) -> (state, metrics); state is given up to it.  Call it within `mesh.use`.

    metrics: {name: (sum, weight)}, scalars on the device: the losses, their total `loss` (nats), `grad_norm` before clipping,
    `learning_rate` of this update, `clips` and `tokens` (padding left out), `refused` (1: not finite, nothing was changed).
    Raises ConfigError if clips do not divide over devices and microbatches.
    """
    check_division(config, mesh)
    tx = optimizer(config)

    def train_step(state: TrainState, frozen: dict, batch: dict):
        clips = batch["weight_B"].shape[0]
        losses, grads = gradients(config, state.params, frozen, batch, dropout_keys(config, state.step, clips))
        loss, norm, rate = total_loss(losses, config.loss), optax.global_norm(grads), learning_rate(state.step, config.optim)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        ok = guard.accept(state.guard, loss, norm)
        new = TrainState(state.step + 1, state.samples + jnp.uint32(clips), params, opt_state, state.guard)
        kept = guard.choose(ok, new, state)._replace(guard=guard.advance(state.guard, ok, loss, state.step))
        figures = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "clips": (batch["weight_B"] > 0).sum(),
                   "tokens": (batch["segment_RS"] > 0).sum(), "refused": ~ok}
        return kept, losses | {name: (jnp.float32(value), jnp.float32(1)) for name, value in figures.items()}
    return jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings(config, mesh), replicated(mesh)))
