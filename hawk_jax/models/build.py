"""Between modules and values: shapes, axes, initial values, and a `Hawk` bound to a nested dict of arrays.

Values live in nested dicts of arrays outside the modules: that is what is sharded, split into frozen and trainable, saved and
exported, and passing them through `jax.jit` costs a tenth of passing modules.  The paths are the checkpoint format.
"""
import functools
import math
import zlib

import jax
import numpy as np
from flax import nnx

from hawk_jax.axes import param_shardings
from hawk_jax.config import HawkError, ModelConfig
from hawk_jax.models.hawk import Hawk
from hawk_jax.models.layers import Init

SMALL = 2**20     # values; a leaf below is drawn whole on one device and then placed


class ParamsError(HawkError):
    """A tree of parameters that is not this model's."""


def _name(key) -> str:
    return str(next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a)))


@functools.lru_cache(maxsize=16)
def _structure(config: ModelConfig):
    """(treedef of the module, {path: Param} in the order of its leaves)."""
    model = Hawk(config)
    variables, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: isinstance(x, nnx.Param))
    return jax.tree.structure(model), {tuple(map(_name, path)): v for path, v in variables}


def _nest(flat: dict) -> dict:
    tree = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def flatten(tree: dict, prefix=()) -> dict:
    """Nested dict -> {path tuple: leaf}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, (*prefix, key)) if isinstance(value, dict) else {(*prefix, key): value}
    return flat


def abstract_params(config: ModelConfig) -> dict:
    """Nested dict of jax.ShapeDtypeStruct; allocates nothing."""
    return _nest({path: v.get_value() for path, v in _structure(config)[1].items()})


def logical_axes(config: ModelConfig) -> dict:
    """The same tree with the `Axes` (names of the dimensions) of each parameter."""
    return _nest({path: v.axes for path, v in _structure(config)[1].items()})


def shardings(config: ModelConfig, mesh, strategy: str) -> dict:
    """The same tree with the NamedSharding of each parameter."""
    return param_shardings(logical_axes(config), mesh, strategy)


@functools.lru_cache(maxsize=256)
def _drawer(init: Init, shape, dtype, sharding):
    return jax.jit(lambda key: init.draw(key, shape, dtype), out_shardings=sharding)


def _draw(init: Init, key, abstract, sharding):
    """One leaf.  Small ones are cut from a line of a power of two, so that a few programs serve them all: compiling one per shape
    takes longer than everything else at toy sizes.  Large ones are drawn where they belong."""
    size = math.prod(abstract.shape)
    if size >= SMALL:
        return _drawer(init, abstract.shape, abstract.dtype, sharding)(key)
    if init.kind in ("zeros", "ones"):
        value = np.full(abstract.shape, init.kind == "ones", abstract.dtype)
    else:
        line = _drawer(Init(init.kind, 1.0), (max(1024, 1 << (size - 1).bit_length()),), "float32", None)(key)
        value = (init.scale * np.asarray(line)[:size].reshape(abstract.shape)).astype(abstract.dtype)
    return jax.device_put(value, sharding)


def init_params(config: ModelConfig, key, shardings=None, wanted=lambda path: True) -> dict:
    """Initial values, made on the devices where they belong; every leaf has its own key, made from its path.

    shardings: the tree of `shardings`, or None for the default device.  The values are the same on every mesh.
    wanted(path): False for leaves that are not to be drawn and are left out.  Not for use inside `jax.jit`.
    """
    places, flat = flatten(shardings) if shardings else {}, {}
    for path, v in _structure(config)[1].items():
        if not wanted(path):
            continue
        own = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        flat[path] = _draw(v.init, own, v.get_value(), places.get(path))
    return _nest(flat)


def bind(config: ModelConfig, params: dict) -> Hawk:
    """The model with these values (arrays, tracers or shapes).  Cheap: call it inside the jitted function.

    Raises ParamsError if a parameter is missing, unknown, or has another shape.
    """
    structure, variables = _structure(config)
    flat = flatten(params)
    for path in (*(variables.keys() - flat.keys()), *(flat.keys() - variables.keys())):
        raise ParamsError(f"parameter {'/'.join(path)} is {'missing' if path in variables else 'not part of this model'}; "
                          "was the tree made with another model configuration?")
    for path, variable in variables.items():
        if tuple(flat[path].shape) != tuple(variable.get_value().shape):
            raise ParamsError(f"parameter {'/'.join(path)} has shape {tuple(flat[path].shape)}, "
                              f"this model needs {tuple(variable.get_value().shape)}")
    return jax.tree.unflatten(structure, [flat[path] for path in variables])
