"""What training changes: the whole of a checkpoint."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hawk_jax.config import HawkConfig
from hawk_jax.mesh import replicated
from hawk_jax.models import build
from hawk_jax.training import freeze, guard
from hawk_jax.training.optim import decay_tree, make_optimizer

INITIAL, DROPOUT = 0, 1     # purposes of random keys


class TrainState(NamedTuple):
    step: jax.Array         # i32, updates so far
    samples: jax.Array      # u32, clips so far, padding counted: the position in the order of data
    params: dict            # trainable parameters only, float32
    opt_state: dict         # {"count", "mu", "nu"}
    guard: dict             # {"skips", "loss_average"}


def random_key(seed: int, purpose: int):
    """A key of its own for each purpose; the generator is named, so that a change of jax's default changes no run."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), purpose)


def optimizer(config: HawkConfig):
    """The transformation for this model's trainable parameters."""
    trainable, _ = freeze.split(build.logical_axes(config.model), config.model)
    return make_optimizer(config.optim, decay_tree(trainable))


def fresh_state(params: dict, tx) -> TrainState:
    """State before the first step."""
    return TrainState(jnp.int32(0), jnp.uint32(0), params, tx.init(params), guard.empty())


def state_shardings(config: HawkConfig, mesh) -> TrainState:
    """Where each leaf lies: the moments beside their parameters, scalars everywhere."""
    params, _ = freeze.split(build.shardings(config.model, mesh, config.mesh.strategy), config.model)
    one = replicated(mesh)
    return TrainState(one, one, params, {"count": one, "mu": params, "nu": params}, {"skips": one, "loss_average": one})


def abstract_state(config: HawkConfig, mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state; allocates nothing."""
    params, _ = freeze.split(build.abstract_params(config.model), config.model)
    shapes = jax.eval_shape(lambda p: fresh_state(p, optimizer(config)), params)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, state_shardings(config, mesh))


def init_state(config: HawkConfig, mesh, params: dict | None = None) -> TrainState:
    """A fresh state, made where it belongs, the same on every mesh.

    params: trainable parameters to start from, which are given up to the state; None draws them from run.seed.
    """
    tx, shardings = optimizer(config), state_shardings(config, mesh)
    if params is None:
        params = build.init_params(config.model, random_key(config.run.seed, INITIAL), shardings.params,
                                   wanted=lambda path: freeze.trains(path, config.model))
    return jax.jit(lambda p: fresh_state(p, tx), out_shardings=shardings, donate_argnums=0)(params)
