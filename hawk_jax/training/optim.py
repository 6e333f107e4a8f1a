"""AdamW with the recipe's schedule and decay groups (hawk.md section 8 of the specification)."""
import math

import jax
import jax.numpy as jnp
import optax

from hawk_jax.axes import Axes
from hawk_jax.config import OptimConfig
from hawk_jax.models.build import flatten

STACKED = ("layers", "copies")      # axes that stacking adds: the reference has one tensor for each layer and copy
NO_DECAY = ("bias", "ln", "bn")     # parts of names, as in the released code


def learning_rate(step, config: OptimConfig):
    """Rate of the update after `step` updates (traced or a number).

    Linear from warmup_learning_rate, then a cosine of the *total* step, so that there is a small jump between the two.
    The rate stays at its minimum where run.steps goes on beyond the cosine's end.
    warmup_counter=inner_epoch starts the line anew in each epoch, as the released code does where warm-up is longer than an epoch.
    """
    inner = step % config.steps_per_epoch if config.warmup_counter == "inner_epoch" else step
    rise = config.learning_rate - config.warmup_learning_rate
    warm = config.warmup_learning_rate + rise * jnp.asarray(inner, jnp.float32) / max(config.warmup_steps, 1)
    # cos^2(x/2) is (1 + cos x) / 2 without the cancellation near the end
    share = jnp.square(jnp.cos(0.5 * math.pi * jnp.minimum(jnp.asarray(step, jnp.float32) / config.steps, 1.0)))
    return jnp.where(step < config.warmup_steps, warm, config.min_learning_rate
                     + (config.learning_rate - config.min_learning_rate) * share)


def decays(path: tuple[str, ...], axes: Axes) -> bool:
    """Whether weight decay applies; decided on the tensor of one layer, since stacked biases have rank 2."""
    rank = sum(name not in STACKED for name in axes)
    return rank >= 2 and not any(part in name for name in path for part in NO_DECAY)


def decay_tree(axes_tree: dict) -> dict:
    """Tree of bool like the tree of `Axes` (models.build.logical_axes or a part of it)."""
    table = {path: decays(path, axes) for path, axes in flatten(axes_tree).items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: table[tuple(key.key for key in path)], axes_tree)


def make_optimizer(config: OptimConfig, decay: dict) -> optax.GradientTransformation:
    """Clipping, Adam and decoupled decay as one transformation; its updates are still to be multiplied by -learning rate.

    decay: tree of bool (`decay_tree`).  The state is a plain dict {"count", "mu", "nu"}: its paths are the checkpoint format, and a
    chain of optax states would change them with every transformation that comes or goes.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)

    def init(params):
        return adam.init(params)._asdict()

    def update(grads, state, params=None):
        if config.clip_norm is not None:
            scale = jnp.minimum(1.0, config.clip_norm / jnp.maximum(optax.global_norm(grads), 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        updates, state = adam.update(grads, optax.ScaleByAdamState(**state), params)
        updates = jax.tree.map(lambda u, p, decay: u + config.weight_decay * p if decay else u, updates, params, decay)
        return updates, state._asdict()
    return optax.GradientTransformation(init, update)
