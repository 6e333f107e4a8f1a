"""LLaMA-2: RMSNorm, half-split rotary positions, SwiGLU, no biases, untied head.  Training and cached decoding share one block.

Source: hawk.md section 1.7 of the specification, i.e. the early-2023 `transformers` model the authors copied.
"""
import jax
import jax.numpy as jnp
from flax import nnx

from hawk_jax.axes import constrain
from hawk_jax.config import LlamaConfig
from hawk_jax.models.attention import attend, merge_heads, split_heads
from hawk_jax.models.layers import Declare, Init, Linear, RMSNorm, scan_layers

RESIDUAL_GAIN = 0.5     # of fan_in initial values, see eva_vit.py


def rotary(position_RS, width: int, theta: float):
    """cos, sin [R, S, 1, width/2] in float32 of the angles position / theta^(2i/width)."""
    angle_RSK = position_RS[..., None] * theta ** -(jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    return jnp.cos(angle_RSK)[:, :, None], jnp.sin(angle_RSK)[:, :, None]


def rotate(x_RSAK, turn):
    """Rotates the pairs (i, i + K/2) of every head: the half-split layout of the transformers checkpoints."""
    cos, sin = turn
    a, b = jnp.split(x_RSAK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_RSAK.dtype)


def causal_mask(segment_RS):
    """mask_RSU: a token sees itself and earlier tokens of its segment.  Padding (segment 0) sees padding, so that no row is empty."""
    same_RSU = segment_RS[:, :, None] == segment_RS[:, None, :]
    return same_RSU & jnp.tril(jnp.ones((segment_RS.shape[1],) * 2, bool))


class LlamaAttention(nnx.Module):
    def __init__(self, declare: Declare, c: LlamaConfig):
        shared = c.groups * (c.width // c.heads)
        self.query = Linear(declare, c.width, c.width, ("embed", "heads"), bias=False)
        self.key = Linear(declare, c.width, shared, ("embed", "heads"), bias=False)
        self.value = Linear(declare, c.width, shared, ("embed", "heads"), bias=False)
        self.output = Linear(declare, c.width, c.width, ("heads", "embed"), bias=False,
                             init=declare.kernel_init(c.width, RESIDUAL_GAIN))
        self.heads, self.groups = c.heads, c.groups

    def qkv(self, x_RSD, turn):
        """Rotated queries and keys, and values, [R, S, A, K] each; A of keys and values is `kv_heads`."""
        q = split_heads(self.query(x_RSD), self.heads)
        k, v = (split_heads(f(x_RSD), self.groups) for f in (self.key, self.value))
        return rotate(q, turn), rotate(k, turn), v


class LlamaMlp(nnx.Module):
    def __init__(self, declare: Declare, c: LlamaConfig):
        self.gate = Linear(declare, c.width, c.mlp, ("embed", "mlp"), bias=False)
        self.up = Linear(declare, c.width, c.mlp, ("embed", "mlp"), bias=False)
        self.down = Linear(declare, c.mlp, c.width, ("mlp", "embed"), bias=False, init=declare.kernel_init(c.mlp, RESIDUAL_GAIN))

    def __call__(self, x_RSD):
        return self.down(jax.nn.silu(self.gate(x_RSD)) * self.up(x_RSD))


class LlamaBlock(nnx.Module):
    def __init__(self, declare: Declare, c: LlamaConfig):
        self.input_norm = RMSNorm(declare, c.width, c.eps)
        self.attention = LlamaAttention(declare, c)
        self.post_norm = RMSNorm(declare, c.width, c.eps)
        self.mlp = LlamaMlp(declare, c)

    def __call__(self, x_RSD, turn, attention):
        """attention(q, k, v) -> o_RSAK: over the row itself in training, over the cache in decoding."""
        o_RSAK = attention(*self.attention.qkv(self.input_norm(x_RSD), turn))
        x_RSD = x_RSD + self.attention.output(merge_heads(o_RSAK))
        return x_RSD + self.mlp(self.post_norm(x_RSD))


class Llama(nnx.Module):
    def __init__(self, declare: Declare, c: LlamaConfig, dtype: str, remat: str):
        self.embed_tokens = declare.param((c.vocab, c.width), ("vocab", "embed"), Init("normal", 0.02))
        self.layers = LlamaBlock(declare.stacked("layers", c.depth), c)
        self.norm = RMSNorm(declare, c.width, c.eps)
        self.lm_head = Linear(declare, c.width, c.vocab, ("embed", "vocab"), bias=False, init=Init("normal", 0.02))
        self.config, self.dtype, self.remat = c, dtype, remat

    def embed(self, tokens):
        """Token embeddings in the compute dtype, one more axis D than `tokens`."""
        # The table is gathered like a layer's weights: a lookup in a split one gathers the embeddings of all rows on every device.
        table_VD = constrain(self.embed_tokens[...], None, None)
        return constrain(jnp.take(table_VD, tokens, axis=0, mode="clip").astype(self.dtype), "batch")

    def logits(self, h):
        """[..., D] -> float32 [..., V]; small batches only, losses apply the head in chunks."""
        return jnp.dot(h, self.lm_head.kernel[...].astype(h.dtype), preferred_element_type=jnp.float32)

    def hidden(self, x_RSD, segment_RS, position_RS):
        """Final, normed hidden states h_RSD of rows of packed segments (segment 0 = padding, its states are meaningless)."""
        mask_RSU, turn = causal_mask(segment_RS), self._turn(position_RS)

        def layer(x_RSD, block):
            return block(x_RSD, turn, lambda q, k, v: attend(q, k, v, mask_RSU))
        return self.norm(scan_layers(layer, x_RSD, self.layers, remat=self.remat))

    def _turn(self, position_RS):
        return rotary(position_RS, self.config.width // self.config.heads, self.config.rope_theta)

    # ------------------------------------------------------------------------------------------ decoding with a cache
    def init_cache(self, rows: int, slots: int, dtype=None) -> dict:
        """Empty keys and values [L, R, U, A, K] for `slots` tokens of each row; A is `kv_heads`."""
        c = self.config
        shape = (c.depth, rows, slots, c.groups, c.width // c.heads)
        return {name: constrain(jnp.zeros(shape, dtype or self.dtype), None, "batch", None, "heads") for name in ("k_LRUAK", "v_LRUAK")}

    def extend(self, x_RSD, position_RS, mask_RSU, slot, cache):
        """Runs S new tokens, whose keys and values go to slots slot..slot+S-1 -> (h_RSD, cache).

        mask_RSU: which of the cache's U slots each token sees, its own slot included.  Prefill, a further turn of a dialogue and a
        single step are this one function.
        """
        turn = self._turn(position_RS)

        def layer(carry, slices):
            x_RSD, k_LRUAK, v_LRUAK = carry
            block, number = slices

            def cached(q, k, v):
                nonlocal k_LRUAK, v_LRUAK
                at = (number, 0, slot, 0, 0)
                k_LRUAK = jax.lax.dynamic_update_slice(k_LRUAK, k[None].astype(k_LRUAK.dtype), at)
                v_LRUAK = jax.lax.dynamic_update_slice(v_LRUAK, v[None].astype(v_LRUAK.dtype), at)
                return attend(q, k_LRUAK[number].astype(q.dtype), v_LRUAK[number].astype(q.dtype), mask_RSU)
            x_RSD = block(x_RSD, turn, cached)
            return (x_RSD, k_LRUAK, v_LRUAK), None
        # The cache is carried, not stacked as an output, so that the loop updates it in place.
        carry = (x_RSD, cache["k_LRUAK"], cache["v_LRUAK"])
        (x_RSD, k_LRUAK, v_LRUAK), _ = jax.lax.scan(layer, carry, (self.layers, jnp.arange(self.config.depth)))
        return self.norm(x_RSD), {"k_LRUAK": k_LRUAK, "v_LRUAK": v_LRUAK}

    def prefill(self, x_RSD, valid_RS, position_RS, cache):
        """Runs a padded prompt into slots 0..S-1 of an empty cache -> (h_RSD, cache); padding may be on either side.

        valid_RS: False for padding, which no token sees but itself.
        """
        slots, tokens = cache["k_LRUAK"].shape[2], x_RSD.shape[1]
        s, u = jnp.arange(tokens)[:, None], jnp.arange(slots)[None]
        valid_RU = jnp.pad(valid_RS.astype(bool), ((0, 0), (0, slots - tokens)))
        mask_RSU = ((u <= s)[None] & valid_RU[:, None]) | (u == s)[None]
        return self.extend(x_RSD, position_RS, mask_RSU, 0, cache)

    def step(self, x_RD, position_R, valid_RU, slot, cache):
        """Runs one token per row into `slot` -> (h_RD, cache).  valid_RU: slots each row may see; its own slot is added."""
        own_U = jnp.arange(cache["k_LRUAK"].shape[2]) == slot
        h_RSD, cache = self.extend(x_RD[:, None], position_R[:, None], (valid_RU.astype(bool) | own_U)[:, None], slot, cache)
        return h_RSD[:, 0], cache
