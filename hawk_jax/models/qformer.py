"""The Q-Former: learned queries that attend to each other and, in every `cross_attention_freq`-th layer, to an encoder.

BERT geometry: post-norm residuals, exact GELU; only the query side of BLIP-2's layers exists (hawk.md sections 1.3 and 1.5).
Layers are stacked in periods of `cross_attention_freq`, whose first layer has cross-attention; layer = period x freq + offset.
`periods` holds one stacked module per offset, `tail` the unstacked layers that do not fill a period.
"""
import jax.numpy as jnp
from flax import nnx

from hawk_jax.config import QFormerConfig
from hawk_jax.models.attention import attend, merge_heads, split_heads
from hawk_jax.models.eva_vit import Mlp
from hawk_jax.models.layers import Declare, Drop, LayerNorm, Linear, keep_mask, row_keys, scan_layers


class QFormerAttention(nnx.Module):
    """dense(attention) + residual, then norm; keys and values from `source` (width `inputs`)."""

    def __init__(self, declare: Declare, c: QFormerConfig, inputs: int):
        self.query = Linear(declare, c.width, c.width, ("embed", "heads"))
        self.key = Linear(declare, inputs, c.width, ("embed", "heads"))
        self.value = Linear(declare, inputs, c.width, ("embed", "heads"))
        self.output = Linear(declare, c.width, c.width, ("heads", "embed"))
        self.norm = LayerNorm(declare, c.width, c.eps)
        self.heads = c.heads

    def __call__(self, x_BQE, source_BUE, drop: Drop):
        q, k, v = self.query(x_BQE), self.key(source_BUE), self.value(source_BUE)
        q, k, v = (split_heads(y, self.heads) for y in (q, k, v))
        return self.norm(x_BQE + drop(self.output(merge_heads(attend(q, k, v, drop=drop)))))


class QFormerLayer(nnx.Module):
    def __init__(self, declare: Declare, c: QFormerConfig, source_width: int | None):
        self.attention = QFormerAttention(declare, c, c.width)
        self.crossattention = QFormerAttention(declare, c, source_width) if source_width else None
        self.mlp = Mlp(declare, c.width, c.mlp)
        self.norm = LayerNorm(declare, c.width, c.eps)
        self.rate = c.dropout

    def __call__(self, x_BQE, source_BUE, keep_BN=None):
        """keep_BN: dropout mask of this layer, as QFormer._masks cuts it; None = evaluation."""
        drop = Drop(keep_BN, self.rate)
        x_BQE = self.attention(x_BQE, x_BQE, drop)
        if self.crossattention is not None:
            x_BQE = self.crossattention(x_BQE, source_BUE, drop)
        return self.norm(x_BQE + drop(self.mlp(x_BQE)))


class QFormer(nnx.Module):
    """(queries_QE, source_BUE) -> tokens_BQE; `source_BUE` has its own width."""

    def __init__(self, declare: Declare, c: QFormerConfig, source_width: int, remat: str):
        count, rest = divmod(c.depth, c.cross_attention_freq)
        width = [source_width if offset == 0 else None for offset in range(c.cross_attention_freq)]
        stacked = declare.stacked("layers", count)
        self.norm = LayerNorm(declare, c.width, c.eps)
        self.periods = nnx.List([QFormerLayer(stacked, c, w) for w in width] if count else [])
        self.tail = nnx.List([QFormerLayer(declare, c, w) for w in width[:rest]])
        self.config, self.remat = c, remat

    def __call__(self, queries_QE, source_BUE, dropout_key=None):
        """dropout_key: one key or one per row of the batch (layers.row_keys); None = evaluation."""
        c, batch = self.config, source_BUE.shape[0]
        keep_BN, keep_LBN = self._masks(dropout_key, batch, source_BUE.shape[1])
        x_QE = self.norm(queries_QE.astype(source_BUE.dtype))
        x_BQE = Drop(keep_BN, c.dropout)(jnp.broadcast_to(x_QE, (batch, *x_QE.shape)))

        def period(x_BQE, layers, keep_LBN):
            for number, layer in enumerate(layers):
                x_BQE = layer(x_BQE, source_BUE, None if keep_LBN is None else keep_LBN[number])
            return x_BQE
        stacked, tail = keep_LBN, keep_LBN
        if keep_LBN is not None:
            cut = c.depth - len(self.tail)
            stacked, tail = keep_LBN[:cut].reshape(-1, c.cross_attention_freq, *keep_LBN.shape[1:]), keep_LBN[cut:]
        if self.periods:
            x_BQE = scan_layers(period, x_BQE, self.periods, stacked, remat=self.remat)
        return period(x_BQE, self.tail, tail)

    def _masks(self, dropout_key, batch: int, source: int):
        """Dropout masks: keep_BN after the first norm, and keep_LBN of the layers (self weights, output, cross weights, output, mlp)."""
        c = self.config
        if dropout_key is None or c.dropout == 0.0:
            return None, None
        first, each = c.queries * c.width, c.queries * (3 * c.width + c.heads * (c.queries + source))
        keep_BN = keep_mask(row_keys(dropout_key, batch), c.dropout, first + c.depth * each)
        return keep_BN[:, :first], keep_BN[:, first:].reshape(batch, c.depth, each).swapaxes(0, 1)
