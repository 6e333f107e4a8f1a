"""Scaled dot-product attention, once, for every module."""
import jax
import jax.numpy as jnp


def attend(q_BSAK, k_BUAK, v_BUAK, mask_BSU=None, drop=None):
    """softmax(q k / sqrt(K)) v -> o_BSAK.

    k_BUAK, v_BUAK may have fewer heads than q_BSAK (grouped-query attention): each then serves as many consecutive heads of q.
    mask_BSU: True where a query may look; every query needs at least one key.  drop: a function applied to the weights (BERT).
    Scores and softmax are float32, as the reference has them: golden parity, and bf16 scores lose the small weights.
    """
    if (group := q_BSAK.shape[2] // k_BUAK.shape[2]) > 1:
        k_BUAK, v_BUAK = jnp.repeat(k_BUAK, group, axis=2), jnp.repeat(v_BUAK, group, axis=2)
    scores_BASU = jnp.einsum("BSAK,BUAK->BASU", q_BSAK, k_BUAK, preferred_element_type=jnp.float32)
    # Scaled here, not q: 1/sqrt(128) times a bf16 q would round once more than the reference does.
    scores_BASU = scores_BASU * q_BSAK.shape[-1] ** -0.5
    if mask_BSU is not None:
        scores_BASU = jnp.where(mask_BSU[:, None], scores_BASU, jnp.finfo(jnp.float32).min)
    weights_BASU = jax.nn.softmax(scores_BASU, axis=-1).astype(v_BUAK.dtype)
    if drop is not None:
        weights_BASU = drop(weights_BASU)
    return jnp.einsum("BASU,BUAK->BSAK", weights_BASU, v_BUAK)


def split_heads(x, heads: int):
    """[..., A*K] -> [..., A, K]; heads are the slow axis, as in every torch reference."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x):
    """[..., A, K] -> [..., A*K]."""
    return x.reshape(*x.shape[:-2], -1)
