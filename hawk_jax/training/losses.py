"""The three losses of HAWK, each as (sum, weight): video-language, motion-language, consistency between the branches.

A row of tokens may hold both language losses (`loss_RS` says which token counts for which), so the decoder's head runs once.  Weights
depend on the batch alone, never on the model: a step computes them for its whole batch and shares them with its microbatches, and N
of these then give what one would.  Source: hawk.md section 3 of the specification; the options are those of `config.LossConfig`.
"""
import functools

import jax
import jax.numpy as jnp

from hawk_jax import axes
from hawk_jax.axes import constrain
from hawk_jax.config import LossConfig
from hawk_jax.models.hawk import HawkOutputs

VIDEO, MOTION = 1, 2        # codes in loss_RS
COSINE_EPS = 1e-8           # of each norm, as torch.nn.functional.cosine_similarity in the released code


# ------------------------------------------------------------------------------------------------ weights
def _group_mean(weight, group, groups: int):
    """`weight` divided by its group's total: the sum of what comes back is the number of groups that have any."""
    total_G = jnp.zeros(groups).at[group].add(weight)
    return weight / jnp.where(total_G > 0, total_G, 1.0)[group]


def _token_weights(batch, code: int, group_rows: int):
    """weight_RS of the tokens of one language loss; clips of weight 0 (padding) do not count."""
    weight_RS = jnp.where(batch["loss_RS"] == code, batch["weight_B"][batch["clip_RS"]], 0.0)
    if not group_rows:
        return weight_RS
    return _group_mean(weight_RS, batch["clip_RS"] // group_rows, batch["weight_B"].shape[0] // group_rows)


def loss_weights(batch, config: LossConfig) -> dict:
    """{name: weight of every term}: [R, S] for the language losses; [B], or one per group, for the consistency.

    group_rows = n > 0: every n consecutive clips are averaged by themselves, and groups count alike, as n clips per process do under
    torch's DDP.  A group without targets is left out (the released code would divide by zero there).
    """
    clips, rows = batch["weight_B"].shape[0], config.group_rows
    video_RS = _token_weights(batch, VIDEO, rows)
    released_stage_2 = config.motion_language_of == "video_language"
    motion_RS = video_RS if released_stage_2 else _token_weights(batch, MOTION, rows)
    consistency = batch["weight_B"]
    if config.cosine == "group":
        consistency = (consistency.reshape(-1, rows or clips).sum(1) > 0).astype(jnp.float32)
    elif rows:
        consistency = _group_mean(consistency, jnp.arange(clips) // rows, clips // rows)
    return {"video_language": video_RS, "motion_language": motion_RS, "consistency": consistency}


# ------------------------------------------------------------------------------------------------ terms
def cross_entropies(hidden_RSD, kernel_DV, targets_RS, weights: dict, chunk_tokens: int) -> dict:
    """{name: sum of weight x cross-entropy} of next-token targets; weights: {name: weight_RS}.

    The head runs on `chunk_tokens` tokens of each data shard at a time and again in the backward pass: logits [tokens, vocabulary]
    never exist whole.  Tokens that count come first, shard by shard, and chunks in which none does are skipped.
    """
    rows, tokens, width = hidden_RSD.shape
    shards = axes.batch_shards(rows)
    own = rows // shards * tokens
    size = min(chunk_tokens, own)
    chunks = -(-own // size)
    counts = functools.reduce(jnp.logical_or, [w > 0 for w in weights.values()]).reshape(shards, own)
    order = jnp.argsort(~counts, axis=1, stable=True)

    def cut(x):
        x = jax.vmap(lambda values, at: values[at])(x.reshape(shards, own, *x.shape[2:]), order)
        x = jnp.pad(x, ((0, 0), (0, chunks * size - own)) + ((0, 0),) * (x.ndim - 2))
        return constrain(x.reshape(shards, chunks, size, *x.shape[2:]).swapaxes(0, 1), None, "batch")
    # Gathered once here rather than in every chunk: under fsdp the head lies in pieces.
    kernel_DV = constrain(kernel_DV.astype(hidden_RSD.dtype), None, "vocab")

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(sums, part):
        def term():
            ce = _cross_entropy(part["hidden"], kernel_DV, part["targets"])
            return {name: (ce * weight).sum() for name, weight in part["weights"].items()}
        some = functools.reduce(jnp.logical_or, [(w > 0).any() for w in part["weights"].values()])
        return jax.tree.map(jnp.add, sums, jax.lax.cond(some, term, lambda: {name: jnp.float32(0) for name in sums})), None
    parts = jax.tree.map(cut, {"hidden": hidden_RSD, "targets": targets_RS, "weights": weights})
    return jax.lax.scan(chunk, {name: jnp.float32(0) for name in weights}, parts)[0]


def _cross_entropy(hidden, kernel_DV, targets):
    """log-sum-exp minus the target's logit, in float32 whatever the decoder computes in; [..., D] and [...] -> [...]."""
    logits = jnp.dot(hidden, kernel_DV, preferred_element_type=jnp.float32)
    # A masked sum, not a gather: the vocabulary may be split over devices.
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(hit, logits, 0.0).sum(-1)


def consistency_terms(video_BQZ, motion_BQZ, weight_B, group: int):
    """1 - cosine between the branches' compressed tokens, one term for each `group` clips flattened together, in float32."""
    def flat(x_BQZ):
        return (x_BQZ.astype(jnp.float32) * (weight_B > 0)[:, None, None]).reshape(x_BQZ.shape[0] // group, -1)
    video, motion = flat(video_BQZ), flat(motion_BQZ)

    def norm(x):      # the square root of 0 has no gradient, and clips that are padding are all 0
        square = jnp.square(x).sum(-1)
        return jnp.where(square > 0, jnp.maximum(jnp.sqrt(jnp.where(square > 0, square, 1.0)), COSINE_EPS), COSINE_EPS)
    return 1.0 - (video * motion).sum(-1) / (norm(video) * norm(motion))


# ------------------------------------------------------------------------------------------------ together
def hawk_losses(outputs: HawkOutputs, batch, lm_head_kernel, config: LossConfig) -> dict:
    """{"video_language" | "motion_language" | "consistency": (sum, weight)}, float32 scalars; the mean is sum / weight.

    Cross-entropies are in nats per token.  Sums and weights of microbatches add up to those of the batch.
    """
    weights = loss_weights(batch, config)
    language = {name: weights[name] for name in ("video_language", "motion_language")}
    sums = cross_entropies(outputs.hidden_RSD, lm_head_kernel, batch["targets_RS"], language, config.chunk_tokens)
    group = (config.group_rows or batch["weight_B"].shape[0]) if config.cosine == "group" else 1
    terms = consistency_terms(outputs.video_BQZ, outputs.motion_BQZ, batch["weight_B"], group)
    sums["consistency"] = (terms * weights["consistency"]).sum()
    return {name: (sums[name], weight.sum()) for name, weight in weights.items()}


def mean(pair):
    """sum / weight, 0 where nothing counted."""
    total, weight = pair
    return total / jnp.where(weight > 0, weight, 1.0)


def total_loss(losses: dict, config: LossConfig):
    """t0 VL + t1 C + t2 ML of {name: (sum, weight)}."""
    coefficients = {"video_language": config.video_language, "motion_language": config.motion_language,
                    "consistency": config.consistency}
    return sum(coefficients[name] * mean(pair) for name, pair in losses.items())
