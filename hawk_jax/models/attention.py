"""Scaled dot-product attention, once, for every module."""
import jax
import jax.numpy as jnp

from hawk_jax.models.layers import dropout


def attend(q_BSAK, k_BUAK, v_BUAK, mask_BSU=None, *, rate: float = 0.0, keys_B=None, site: int = 0):
    """softmax(q k / sqrt(K)) v -> o_BSAK.

    mask_BSU: True where a query may look; every query needs at least one key.  rate, keys_B, site: dropout of the weights (BERT).
    Scores and softmax are float32, as the reference has them: golden parity, and bf16 scores lose the small weights.
    """
    scores_BASU = jnp.einsum("BSAK,BUAK->BASU", q_BSAK * q_BSAK.shape[-1] ** -0.5, k_BUAK, preferred_element_type=jnp.float32)
    if mask_BSU is not None:
        scores_BASU = jnp.where(mask_BSU[:, None], scores_BASU, jnp.finfo(jnp.float32).min)
    weights_BASU = dropout(jax.nn.softmax(scores_BASU, axis=-1).astype(v_BUAK.dtype), rate, keys_B, site)
    return jnp.einsum("BASU,BUAK->BSAK", weights_BASU, v_BUAK)


def split_heads(x, heads: int):
    """[..., A*K] -> [..., A, K]; heads are the slow axis, as in every torch reference."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x):
    """[..., A, K] -> [..., A*K]."""
    return x.reshape(*x.shape[:-2], -1)
