"""EVA ViT-g: pre-norm, exact GELU, learned query and value biases but no key bias, no final norm, all tokens returned.

Source: hawk.md section 1.2 of the specification, i.e. the authors' eva_vit.py; a kernel for patches is the torch convolution's
(out, in, row, column) turned into (row x column x colour, out), one for q, k, v is (in, 3, out).
"""
import jax.numpy as jnp
from flax import nnx

from hawk_jax.config import VitConfig
from hawk_jax.models.attention import attend, merge_heads, split_heads
from hawk_jax.models.layers import ZEROS, Declare, Init, LayerNorm, Linear, gelu, scan_layers

RESIDUAL_GAIN = 0.5     # of fan_in initial values: keeps the residual stream near its input's size at any small depth


class VitAttention(nnx.Module):
    def __init__(self, declare: Declare, c: VitConfig):
        self.qkv = declare.param((c.width, 3, c.width), ("embed", None, "heads"), declare.kernel_init(c.width))
        self.q_bias = declare.param((c.width,), ("heads",), ZEROS)
        self.v_bias = declare.param((c.width,), ("heads",), ZEROS)
        self.output = Linear(declare, c.width, c.width, ("heads", "embed"), init=declare.kernel_init(c.width, RESIDUAL_GAIN))
        self.heads = c.heads

    def __call__(self, x_NPM):
        qkv = jnp.einsum("NPM,MJK->JNPK", x_NPM, self.qkv[...].astype(x_NPM.dtype))  # J = q, k, v
        q, k, v = qkv[0] + self.q_bias[...].astype(x_NPM.dtype), qkv[1], qkv[2] + self.v_bias[...].astype(x_NPM.dtype)
        return self.output(merge_heads(attend(*(split_heads(y, self.heads) for y in (q, k, v)))))


class Mlp(nnx.Module):
    def __init__(self, declare: Declare, width: int, hidden: int, gain: float = 1.0):
        self.fc1 = Linear(declare, width, hidden, ("embed", "mlp"))
        self.fc2 = Linear(declare, hidden, width, ("mlp", "embed"), init=declare.kernel_init(hidden, gain))

    def __call__(self, x):
        return self.fc2(gelu(self.fc1(x)))


class VitBlock(nnx.Module):
    def __init__(self, declare: Declare, c: VitConfig):
        self.norm1 = LayerNorm(declare, c.width, c.eps)
        self.attention = VitAttention(declare, c)
        self.norm2 = LayerNorm(declare, c.width, c.eps)
        self.mlp = Mlp(declare, c.width, c.mlp, RESIDUAL_GAIN)

    def __call__(self, x_NPM, dtype):
        """x_NPM: float32; matrix products run in `dtype`."""
        x_NPM = x_NPM + self.attention(self.norm1(x_NPM).astype(dtype))
        return x_NPM + self.mlp(self.norm2(x_NPM).astype(dtype))


def patches(pictures_NHWC, size: int):
    """[N, H, W, C] -> [N, H/size * W/size, size*size*C]: patches row by row, pixels row, column, colour."""
    n, h, w, c = pictures_NHWC.shape
    grid = pictures_NHWC.reshape(n, h // size, size, w // size, size, c)
    return grid.swapaxes(2, 3).reshape(n, (h // size) * (w // size), size * size * c)


class EvaVit(nnx.Module):
    """pictures_NHWC -> tokens_NPM; the class token is the first."""

    def __init__(self, declare: Declare, c: VitConfig):
        count = c.grid[0] * c.grid[1] + 1
        fan_in = declare.scheme == "fan_in"
        self.patch_embed = Linear(declare, 3 * c.patch_size**2, c.width, ("pixels", "embed"))
        self.cls_token = declare.param((c.width,), ("norm",), Init("normal", 0.02))
        # 0.3: at tiny widths patches differ by more than 0.02, and positions have to be readable beside them.
        self.pos_embed = declare.param((count, c.width), ("table", "embed"), Init("normal", 0.3 if fan_in else 0.02))
        self.blocks = VitBlock(declare.stacked("layers", c.depth), c)
        self.patch_size = c.patch_size

    def __call__(self, pictures_NHWC):
        dtype = pictures_NHWC.dtype
        # The residual stream is float32: over 39 layers bf16 sums lose digits that the authors' fp16 keeps.
        x_NPM = self.patch_embed(patches(pictures_NHWC, self.patch_size)).astype(jnp.float32)
        cls_N1M = jnp.broadcast_to(self.cls_token[...].astype(jnp.float32), (x_NPM.shape[0], 1, x_NPM.shape[2]))
        x_NPM = jnp.concatenate([cls_N1M, x_NPM], axis=1) + self.pos_embed[...].astype(jnp.float32)
        return scan_layers(lambda x_NPM, block: block(x_NPM, dtype), x_NPM, self.blocks).astype(dtype)
