"""The Q-Former: learned queries that attend to each other and, in every `cross_attention_freq`-th layer, to an encoder.

BERT geometry: post-norm residuals, exact GELU; only the query side of BLIP-2's layers exists (hawk.md sections 1.3 and 1.5).
Layers are stacked in periods of `cross_attention_freq`, whose first layer has cross-attention; layer = period x freq + offset.
`periods` holds one stacked module per offset, `tail` the unstacked layers that do not fill a period.
"""
import jax
import jax.numpy as jnp
from flax import nnx

from hawk_jax.config import QFormerConfig
from hawk_jax.models.attention import attend, merge_heads, split_heads
from hawk_jax.models.eva_vit import Mlp
from hawk_jax.models.layers import Declare, LayerNorm, Linear, dropout, row_keys, scan_layers

# Sites of dropout inside a layer; keys are folded with the layer's number first.
SELF_WEIGHTS, SELF_OUTPUT, CROSS_WEIGHTS, CROSS_OUTPUT, MLP_OUTPUT = range(5)
EMBEDDING = 10**6       # "layer number" of the dropout after the first norm


class QFormerAttention(nnx.Module):
    """dense(attention) + residual, then norm; keys and values from `source` (width `inputs`)."""

    def __init__(self, declare: Declare, c: QFormerConfig, inputs: int):
        self.query = Linear(declare, c.width, c.width, ("embed", "heads"))
        self.key = Linear(declare, inputs, c.width, ("embed", "heads"))
        self.value = Linear(declare, inputs, c.width, ("embed", "heads"))
        self.output = Linear(declare, c.width, c.width, ("heads", "embed"))
        self.norm = LayerNorm(declare, c.width, c.eps)
        self.heads, self.rate = c.heads, c.dropout

    def __call__(self, x_BQE, source_BUE, keys_B, site: int):
        q, k, v = self.query(x_BQE), self.key(source_BUE), self.value(source_BUE)
        q, k, v = (split_heads(y, self.heads) for y in (q, k, v))
        out_BQE = self.output(merge_heads(attend(q, k, v, rate=self.rate, keys_B=keys_B, site=site)))
        return self.norm(x_BQE + dropout(out_BQE, self.rate, keys_B, site + 1))


class QFormerLayer(nnx.Module):
    def __init__(self, declare: Declare, c: QFormerConfig, source_width: int | None):
        self.attention = QFormerAttention(declare, c, c.width)
        self.crossattention = QFormerAttention(declare, c, source_width) if source_width else None
        self.mlp = Mlp(declare, c.width, c.mlp)
        self.norm = LayerNorm(declare, c.width, c.eps)
        self.rate = c.dropout

    def __call__(self, x_BQE, source_BUE, keys_B):
        x_BQE = self.attention(x_BQE, x_BQE, keys_B, SELF_WEIGHTS)
        if self.crossattention is not None:
            x_BQE = self.crossattention(x_BQE, source_BUE, keys_B, CROSS_WEIGHTS)
        return self.norm(x_BQE + dropout(self.mlp(x_BQE), self.rate, keys_B, MLP_OUTPUT))


class QFormer(nnx.Module):
    """(queries_QE, source_BUE) -> tokens_BQE; `source_BUE` has its own width."""

    def __init__(self, declare: Declare, c: QFormerConfig, source_width: int, remat: str):
        count, rest = divmod(c.depth, c.cross_attention_freq)
        width = [source_width if offset == 0 else None for offset in range(c.cross_attention_freq)]
        stacked = declare.stacked("layers", count)
        self.norm = LayerNorm(declare, c.width, c.eps)
        self.periods = nnx.List([QFormerLayer(stacked, c, w) for w in width] if count else [])
        self.tail = nnx.List([QFormerLayer(declare, c, w) for w in width[:rest]])
        self.count, self.freq, self.rate, self.remat = count, c.cross_attention_freq, c.dropout, remat

    def __call__(self, queries_QE, source_BUE, dropout_key=None):
        batch, dtype = source_BUE.shape[0], source_BUE.dtype
        keys_B = None if dropout_key is None or self.rate == 0.0 else row_keys(dropout_key, batch)
        x_QE = self.norm(queries_QE.astype(dtype))
        x_BQE = dropout(jnp.broadcast_to(x_QE, (batch, *x_QE.shape)), self.rate, _fold(keys_B, EMBEDDING), 0)

        def period(x_BQE, layers, first, source_BUE=source_BUE):
            for offset, layer in enumerate(layers):
                x_BQE = layer(x_BQE, source_BUE, _fold(keys_B, first + offset))
            return x_BQE
        if self.count:
            x_BQE = scan_layers(period, x_BQE, self.periods, jnp.arange(self.count) * self.freq, remat=self.remat)
        return period(x_BQE, self.tail, self.count * self.freq)


def _fold(keys_B, number):
    return None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)
