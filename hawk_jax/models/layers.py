"""What all modules are made of: parameters that know their axes and initial values, linear layers, norms, dropout, scanned stacks.

A module is structure only.  `Declare.param` makes an `nnx.Param` that holds a shape; values live in a nested dict outside
(models/build.py binds the two), so building a 7B model costs nothing.  A stack of layers is one module whose parameters have a
leading axis `layers` (and an encoder one before it, `copies`): modules are pytrees, `lax.scan` and `vmap` take slices of them.
"""
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hawk_jax.axes import Axes, constrain


class Init(NamedTuple):
    """How a parameter starts: kind zeros | ones | normal | uniform; scale = standard deviation or half width."""
    kind: str
    scale: float = 0.0

    def draw(self, key, shape, dtype):
        """Initial value of a whole (stacked) parameter; drawn in float32, so that dtypes agree up to rounding."""
        if self.kind == "zeros":
            return jnp.zeros(shape, dtype)
        if self.kind == "ones":
            return jnp.ones(shape, dtype)
        if self.kind == "normal":
            return (self.scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
        return jax.random.uniform(key, shape, jnp.float32, -self.scale, self.scale).astype(dtype)


ZEROS, ONES = Init("zeros"), Init("ones")


def torch_default(inputs: int) -> Init:
    """nn.Linear's default for weight and bias: uniform in +- 1/sqrt(fan-in)."""
    return Init("uniform", 1 / math.sqrt(inputs))


@dataclasses.dataclass(frozen=True)
class Declare:
    """Makes parameters of one part of the model."""
    scheme: str                                 # config.model.init
    dtype: str                                  # of kernels, biases and tables; norms are float32 (torch reference: likewise)
    lead: tuple[tuple[str, int], ...] = ()      # axes put before every shape: (name, size)

    def stacked(self, name: str, size: int) -> "Declare":
        return dataclasses.replace(self, lead=(*self.lead, (name, size)))

    def param(self, shape, axes, init: Init, dtype: str | None = None) -> nnx.Param:
        names, sizes = [n for n, _ in self.lead], [s for _, s in self.lead]
        axes = Axes((*names, *axes), (*sizes, *shape))
        return nnx.Param(jax.ShapeDtypeStruct(axes.shape, dtype or self.dtype), axes=axes, init=init)

    def kernel_init(self, inputs: int, gain: float = 1.0) -> Init:
        """reference: normal 0.02 (BERT, LLaMA); fan_in: variance-preserving times `gain`, for widths where 0.02 is too small."""
        return Init("normal", 0.02 if self.scheme == "reference" else gain / math.sqrt(inputs))


class Linear(nnx.Module):
    """y = x @ kernel + bias in x's dtype; kernel (in, out)."""

    def __init__(self, declare: Declare, inputs: int, outputs: int, axes, *, bias=True, init: Init | None = None,
                 bias_init: Init = ZEROS):
        self.kernel = declare.param((inputs, outputs), axes, init or declare.kernel_init(inputs))
        # A bias is split only where its kernel's outputs are split by tensor parallelism: it is too small to gather.
        self.bias = declare.param((outputs,), (axes[1] if axes[1] != "embed" else "norm",), bias_init) if bias else None

    def __call__(self, x):
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalises the last axis in float32, whatever x is: the reference does, and bf16 means are too coarse."""

    def __init__(self, declare: Declare, width: int, eps: float):
        self.scale = declare.param((width,), ("norm",), ONES, "float32")
        self.bias = declare.param((width,), ("norm",), ZEROS, "float32")
        self.eps = eps

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """LLaMA's norm: no mean, no bias, in float32."""

    def __init__(self, declare: Declare, width: int, eps: float):
        self.scale = declare.param((width,), ("norm",), ONES, "float32")
        self.eps = eps

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


def gelu(x):
    """Exact GELU (erf), as in EVA and BERT."""
    return jax.nn.gelu(x, approximate=False)


def row_keys(key, rows: int):
    """One dropout key per row of the global batch, so that masks depend neither on the mesh nor on how the batch is cut up.

    key: one key, or an array of `rows` keys that the caller made (microbatches hand over the keys of their rows).
    """
    return key if key.shape else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def keep_mask(keys_B, rate: float, size: int):
    """keep_BN of `size` entries per row, each True with probability 1 - rate.

    One draw for a whole Q-Former, because every draw is a program of its own to compile: twenty of them take seconds.
    """
    bits_BN = jax.vmap(lambda key: jax.random.bits(key, (size,), jnp.uint32))(keys_B)
    return constrain(bits_BN >= jnp.uint32(round(rate * 2**32)), "batch", None)


class Drop:
    """Dropout that takes its masks from keep_BN in the order of use; keep_BN None = evaluation.  Lives for one trace of one layer."""

    def __init__(self, keep_BN, rate: float):
        self.keep_BN, self.rate, self.used = keep_BN, rate, 0

    def __call__(self, x):
        if self.keep_BN is None:
            return x
        start, self.used = self.used, self.used + math.prod(x.shape[1:])
        keep = self.keep_BN[:, start:self.used].reshape(x.shape)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros((), x.dtype))


def rematerialise(body, remat: str):
    """What the backward pass keeps of a layer: none = everything, dots = matrix products with weights, full = only its input."""
    if remat == "none":
        return body
    policy = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}[remat]
    # prevent_cse only matters outside scan, where the compiler could undo the recomputation.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def scan_layers(body, x, layers, *others, remat: str = "none"):
    """x after body(x, layer, *other) over all stacked layers; `others` are arrays with a leading layer axis.

    x is kept split by its first axis: without being told, the compiler may carry it split by width, as the parameters are, and then
    sums activations over devices in every layer instead of gathering weights.
    """
    def step(x, slices):
        return constrain(body(x, *slices), "batch", None, None), None
    return jax.lax.scan(rematerialise(step, remat), constrain(x, "batch", None, None), (layers, *others))[0]
