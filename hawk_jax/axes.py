"""Names of array axes, and which mesh axis each is split over.

Suffix legend (an array of rank >= 2 carries these letters, in order):
  B clips · T frames of a clip · X branches (video, motion) · N pictures · H W picture rows, columns · C colour channels
  P patches and class token · F pixels of a patch, or mlp width · M ViT width · Q queries · E Q-Former width · Z consistency width
  D decoder width · A attention heads · K width of a head · R rows of tokens · S tokens of a row · U keys (cache slots)
  V vocabulary (in `view_VT`: views) · L layers · G encoder copies (1 or 2)
  of data/plan.py: J batches of an epoch · I clips drawn in an epoch · Y buckets of row lengths

A parameter's axes have logical names; a strategy maps names to mesh axes ("data", "fsdp", "tensor"):
  layers, copies     stacked layers and encoder copies: never split, `lax.scan` takes one at a time
  embed              width of a residual stream, on the input side of its kernels
  heads, mlp, vocab  what tensor parallelism divides: attention heads, hidden units, words
  batch              clips, rows, pictures: activations only
"""
import jax
from flax.core import spmd
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH = ("data", "fsdp")
_COMMON = (("batch", BATCH), ("layers", None), ("copies", None), ("norm", None), ("table", None), ("pixels", None), ("compress", None))
RULES = {
    "replicated": (*_COMMON, ("embed", None), ("heads", None), ("mlp", None), ("vocab", None)),
    "fsdp": (*_COMMON, ("embed", "fsdp"), ("heads", None), ("mlp", None), ("vocab", None)),
    "tensor": (*_COMMON, ("embed", None), ("heads", "tensor"), ("mlp", "tensor"), ("vocab", "tensor")),
    "fsdp_tensor": (*_COMMON, ("embed", "fsdp"), ("heads", "tensor"), ("mlp", "tensor"), ("vocab", "tensor")),
}


class Axes(tuple):
    """Logical axis names of one parameter, with its shape.  One leaf of a pytree, unlike a plain tuple."""

    def __new__(cls, names, shape):
        if len(names) != len(shape):
            raise ValueError(f"axes {tuple(names)} do not name the {len(shape)} dimensions of {tuple(shape)}")
        self = super().__new__(cls, names)
        self.shape = tuple(shape)
        return self


def _size(mesh, names) -> int:
    """Devices along one mesh axis or several."""
    size = 1
    for name in (names,) if isinstance(names, str) else names or ():
        size *= mesh.shape[name]
    return size


def spec(names, shape, mesh, rules) -> PartitionSpec:
    """The partition of an array; a mesh axis that does not divide its dimension is left out.  KeyError for an unknown name."""
    table = dict(rules)
    wanted = [table[n] if n is not None else None for n in names]
    return PartitionSpec(*(w if w and size % _size(mesh, w) == 0 else None for w, size in zip(wanted, shape, strict=True)))


def param_shardings(axes_tree, mesh: Mesh, strategy: str):
    """Tree of NamedSharding for a tree of `Axes` (models.build.logical_axes)."""
    return jax.tree.map(lambda a: NamedSharding(mesh, spec(a, a.shape, mesh, RULES[strategy])), axes_tree)


def undivided(axes_tree, mesh: Mesh, strategy: str) -> list[str]:
    """Lines `path: axis (size) over mesh axis (devices)` for each dimension that stays whole because it does not divide."""
    table, lines = dict(RULES[strategy]), []
    for path, axes in jax.tree_util.tree_flatten_with_path(axes_tree)[0]:
        name = "/".join(str(k.key) for k in path)
        lines += [f"{name}: {n} ({size}) over {table[n]} ({_size(mesh, table[n])})"
                  for n, size in zip(axes, axes.shape, strict=True) if n and table[n] and size % _size(mesh, table[n])]
    return lines


def constrain(x, *names):
    """Asks the compiler to lay out an activation by the rules of `mesh.use`; unchanged without a mesh or on one device.

    names: one logical name or None per leading axis of x; the axes that are not named are left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    rules = spmd.get_logical_axis_rules() or RULES["replicated"]
    known = spec(names, x.shape[:len(names)], mesh, rules)
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(names))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*known, *rest))


def batch_shards(size: int) -> int:
    """Parts into which an axis of clips, rows or pictures is split over the mesh in use (1 where it does not divide)."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else _size(mesh, BATCH)
    return shards if size % shards == 0 else 1
