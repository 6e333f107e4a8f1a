"""Whether each weight tensor has the scale that recorded outputs imply: the sharpest of the comparisons.

A wrong scale of a small bias may change outputs by no more than a few roundings, and hides in them.  But it changes them in a direction of
its own, s = d outputs / d log scale, while rounding has none: projecting the difference r between recorded and computed outputs on s gives
the scale's error <r, s> / <s, s> with the rounding averaged out.  One backward pass gives <r, s> for every tensor at once, and random signs
v in place of r give <s, s>, the mean of <v, s>^2.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from hawk_jax.config import ModelConfig
from hawk_jax.convert.keys import table
from hawk_jax.convert.verify_unit import TOLERANCES, Sheet, Unit
from hawk_jax.models import build
from hawk_jax.training.optim import STACKED

PROBES = 32             # <s, s> is then off by a quarter
# Relative size of what a scale must explain of the outputs to be believed.  In files of four seeds rounding explained up to 2e-7, but 7e-8
# where that would be an error of more than 3e-4, for tensors of which a thousandth explains less than 2e-6.  A thousandth of
# the faintest of the shared files explains 1e-6.
BELIEVED = 2.5e-7
FAINT = 1e-6            # size of s below which a tensor is taken to change nothing, as key biases and queries before a norm do


@functools.partial(jax.jit, static_argnames=("forward", "config"))
def _projections(params, arguments, theirs, forward, config):
    """{path: <difference, s> and PROBES times <random signs, s>, [1 + PROBES, copies and layers ...]} of outputs of norm 1."""
    def normed(params):
        found = forward(params, *arguments, config)
        return {name: found[name] / jnp.linalg.norm(theirs[name]) for name in theirs}
    ours, pull = jax.vjp(normed, params)
    apart = {name: theirs[name] / jnp.linalg.norm(theirs[name]) - ours[name] for name in theirs}
    signs = {name: jax.random.rademacher(jax.random.key(number), (PROBES, *x.shape), jnp.float32)
             for number, (name, x) in enumerate(ours.items())}

    def project(directions):
        gradient, = pull(directions)
        return jax.tree.map(lambda p, g: p * g, params, gradient)
    lead = {path: sum(name in STACKED for name in axes) for path, axes in build.flatten(build.logical_axes(_model(config))).items()}

    def sums(directions):
        return {"/".join(path): x.sum(tuple(range(lead[path], x.ndim))) for path, x in build.flatten(project(directions)).items()}
    return jax.lax.map(sums, {name: jnp.concatenate([apart[name][None], signs[name]]) for name in theirs})


def _model(config) -> ModelConfig:
    return config if isinstance(config, ModelConfig) else config.model


def check_scales(unit: Unit, sheet: Sheet, forward, params: dict, arguments: tuple, config, names: list[str], weights: dict) -> None:
    """A line for each tensor of `weights` that moves the outputs `names`; errors too faint to be told from rounding are no failures.

    forward(params, *arguments, config) -> {name: array}, jitted or not, config a ModelConfig or a HawkConfig; weights: {name in the state
    dict: name in the file}.
    """
    theirs = {name: unit.outputs[name].astype(np.float32) for name in names if name in unit.outputs}
    if not theirs or not all(np.isfinite(x).all() and x.any() for x in theirs.values()):
        return
    found = jax.tree.map(np.asarray, _projections(params, arguments, theirs, forward, config))
    for entry in table(_model(config)):
        if entry.key in weights:
            values = found["/".join(entry.path)][(slice(None), *entry.index)].astype(np.float64)
            size = np.sqrt(np.square(values[1:]).mean())
            explained = abs(values[0]) / max(size, FAINT) / np.sqrt(len(theirs))
            off = values[0] / max(size, FAINT) ** 2
            clear = 1e-3 * size / np.sqrt(len(theirs)) > BELIEVED       # a thousandth would be believed
            if explained > BELIEVED or (clear and abs(off) <= TOLERANCES["scale"].bound):
                sheet.compare("scale", f"weights/{weights[entry.key]}", 1.0, 1 + off, note="its scale")
