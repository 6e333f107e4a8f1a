"""Losses against numpy in float64, with padding, groups and every way of cutting the tokens into chunks."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from hawk_jax.config import LossConfig
from hawk_jax.models.hawk import HawkOutputs
from hawk_jax.training.losses import hawk_losses, mean, total_loss

B, S, D, V, Q, Z = 8, 13, 6, 11, 3, 4
RTOL = 1e-5     # float32 against float64: rounding of sums of about a hundred terms
KERNEL_DV = np.random.default_rng(1).standard_normal((D, V)).astype(np.float32)


def sample(padding: int = 2) -> tuple[HawkOutputs, dict]:
    rng = np.random.default_rng(0)
    outputs = HawkOutputs(*(rng.standard_normal(shape).astype(np.float32) for shape in ((B, S, D), (B, Q, Z), (B, Q, Z))))
    loss_RS = rng.choice(np.array([0, 1, 2], np.uint8), (B, S), p=[0.5, 0.3, 0.2])
    loss_RS[3] = 0                                      # a clip without any target
    batch = {"targets_RS": rng.integers(0, V, (B, S)), "loss_RS": loss_RS, "weight_B": (np.arange(B) < B - padding).astype(np.float32),
             "clip_RS": np.tile(np.arange(B)[:, None], (1, S))}
    return outputs, batch


def numpy_ce(outputs, batch):
    logits = outputs.hidden_RSD.astype(np.float64) @ KERNEL_DV.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["targets_RS"][..., None], -1)[..., 0]


def numpy_cosine(a, b):
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def numpy_means(outputs, batch, config: LossConfig) -> dict:
    """Loop over groups; a group without targets (or clips) is left out."""
    n, found = config.group_rows or B, {"video_language": [], "motion_language": [], "consistency": []}
    ce_RS, real_B = numpy_ce(outputs, batch), batch["weight_B"] > 0
    for first in range(0, B, n):
        rows = [i for i in range(first, first + n) if real_B[i]]
        for name, code in (("video_language", 1), ("motion_language", 2)):
            terms = ce_RS[rows][batch["loss_RS"][rows] == code]
            found[name] += [terms.mean()] if len(terms) else []
        if rows and config.cosine == "group":
            found["consistency"].append(numpy_cosine(outputs.video_BQZ[rows], outputs.motion_BQZ[rows]))
        elif rows:
            found["consistency"].append(np.mean([numpy_cosine(outputs.video_BQZ[i], outputs.motion_BQZ[i]) for i in rows]))
    means = {name: np.mean(terms) for name, terms in found.items()}
    if config.motion_language_of == "video_language":
        means["motion_language"] = means["video_language"]
    return means


@pytest.mark.parametrize("group_rows", [0, 1, 2])
@pytest.mark.parametrize("cosine", ["clip", "group"])
@pytest.mark.parametrize("motion_of", ["motion_text", "video_language"])
def test_means_equal_numpy(group_rows, cosine, motion_of):
    config = LossConfig(group_rows=group_rows, cosine=cosine, motion_language_of=motion_of, chunk_tokens=7)
    outputs, batch = sample()
    losses, expected = hawk_losses(outputs, batch, jnp.asarray(KERNEL_DV), config), numpy_means(outputs, batch, config)
    for name, value in expected.items():
        np.testing.assert_allclose(mean(losses[name]), value, rtol=RTOL, err_msg=name)
    total = expected["video_language"] + 0.1 * expected["motion_language"] + 0.1 * expected["consistency"]
    np.testing.assert_allclose(total_loss(losses, config), total, rtol=RTOL)


def test_weights_are_counts_by_default():
    outputs, batch = sample()
    losses = hawk_losses(outputs, batch, jnp.asarray(KERNEL_DV), LossConfig())
    counts = [(batch["loss_RS"][:6] == code).sum() for code in (1, 2)]
    assert [float(losses[name][1]) for name in ("video_language", "motion_language", "consistency")] == [*counts, 6]


@pytest.mark.parametrize("chunk_tokens", [1, 5, 104, 4096])
def test_gradients_equal_plain_softmax_for_any_chunk(chunk_tokens):
    outputs, batch = sample()

    config = LossConfig(chunk_tokens=chunk_tokens)

    def chunked(hidden, kernel):
        return mean(hawk_losses(outputs._replace(hidden_RSD=hidden), batch, kernel, config)["video_language"])
    grad_h, grad_k = jax.grad(chunked, (0, 1))(outputs.hidden_RSD, jnp.asarray(KERNEL_DV))
    # d(cross-entropy)/d(logits) = softmax - one-hot
    weight = (batch["loss_RS"] == 1) * batch["weight_B"][:, None]
    logits = outputs.hidden_RSD.astype(np.float64) @ KERNEL_DV
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) - np.eye(V)[batch["targets_RS"]]
    p *= (weight / weight.sum())[..., None]
    np.testing.assert_allclose(grad_h, p @ KERNEL_DV.T, rtol=RTOL, atol=1e-7)
    np.testing.assert_allclose(grad_k, np.einsum("bsd,bsv->dv", outputs.hidden_RSD, p), rtol=RTOL, atol=1e-6)


def largest_array(jaxpr) -> int:
    """Values of the largest array that any equation makes, inner programs included."""
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "size")]
    return max(sizes + [largest_array(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params)], default=0)


def test_logits_never_exist_whole():
    rows, tokens, width, vocab, chunk = 4, 64, 8, 1000, 16
    outputs = HawkOutputs(jnp.ones((rows, tokens, width)), jnp.ones((rows, Q, Z)), jnp.ones((rows, Q, Z)))
    batch = {"targets_RS": jnp.zeros((rows, tokens), int), "loss_RS": jnp.ones((rows, tokens), jnp.uint8), "weight_B": jnp.ones(rows),
             "clip_RS": jnp.tile(jnp.arange(rows)[:, None], (1, tokens))}

    def loss(hidden):
        config = LossConfig(chunk_tokens=chunk)
        return total_loss(hawk_losses(outputs._replace(hidden_RSD=hidden), batch, jnp.ones((width, vocab)), config), config)
    assert largest_array(jax.make_jaxpr(jax.grad(loss))(outputs.hidden_RSD).jaxpr) == chunk * vocab


def test_nothing_to_learn_is_zero_and_finite():
    # a batch of padding: no loss, and no gradient that is not a number
    outputs, batch = sample(padding=B)
    for config in (LossConfig(), LossConfig(group_rows=1, cosine="group")):
        def total(outputs, config=config):
            return total_loss(hawk_losses(outputs, batch, jnp.asarray(KERNEL_DV), config), config)
        value, grads = jax.value_and_grad(total)(outputs)
        assert value == 0 and all((g == 0).all() for g in jax.tree.leaves(grads))


def test_padding_clips_do_not_count():
    outputs, batch = sample()
    changed = jax.tree.map(lambda x: np.where((np.arange(B) < 6).reshape(-1, *[1] * (x.ndim - 1)), x, 1e3), outputs)
    for config in (LossConfig(), LossConfig(cosine="group"), LossConfig(group_rows=2)):
        a, b = (hawk_losses(o, batch, jnp.asarray(KERNEL_DV), dataclasses.replace(config, chunk_tokens=9)) for o in (outputs, changed))
        assert jax.tree.map(float, a) == jax.tree.map(float, b)
