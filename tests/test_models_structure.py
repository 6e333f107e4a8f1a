"""Shapes, initial values, and equalities between ways to compute the same thing (packing, chunks, copies, dropout keys)."""
import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import TINY

from hawk_jax.config import HawkConfig, ModelConfig, QFormerConfig, released
from hawk_jax.models import build, layers, qformer
from hawk_jax.models.layers import Declare, LayerNorm, RMSNorm, keep_mask

# Sums of the same numbers in another order (other batch shapes give other matrix kernels): float32 rounding over a few layers.
REORDERED = 2e-5


def test_real_size_has_the_authors_parameters(shared):
    """Counts of the authors' model built on torch's meta device; nothing is allocated here either."""
    rows = json.loads((shared / "specs" / "hawk_state_dict_keys.json").read_text())
    theirs = {kind: sum(math.prod(shape) for _, shape, k in rows if k == kind) for kind in ("train", "frozen")}
    model = dataclasses.replace(released(HawkConfig(), 1).model, vit_copies=2)
    flat = build.flatten(build.abstract_params(model))
    trains = {p for p in flat if p[0] in ("video", "motion") or p[-1] == "query_tokens_motion"}
    assert sum(math.prod(flat[p].shape) for p in trains) == theirs["train"] == 113_455_616
    assert sum(math.prod(v.shape) for p, v in flat.items() if p not in trains) == theirs["frozen"]
    assert {flat[p].dtype.name for p in trains} == {"float32"}
    assert flat["llama", "layers", "mlp", "up", "kernel"].shape == (32, 4096, 11008)
    assert flat["llama", "layers", "mlp", "up", "kernel"].dtype == jnp.bfloat16


def test_axes_name_every_dimension():
    axes, shapes = build.flatten(build.logical_axes(ModelConfig())), build.flatten(build.abstract_params(ModelConfig()))
    assert axes.keys() == shapes.keys()
    assert all(len(axes[p]) == shapes[p].ndim and axes[p].shape == shapes[p].shape for p in axes)
    assert axes["encoder", "vit", "blocks", "mlp", "fc1", "kernel"] == ("copies", "layers", "embed", "mlp")


@pytest.mark.parametrize("scheme", ["reference", "fan_in"])
def test_initial_values(scheme):
    """Moments of the distributions the specification names; 4 standard errors of a standard deviation."""
    config = dataclasses.replace(TINY, init=scheme)
    flat = {"/".join(p): np.asarray(v) for p, v in build.flatten(build.init_params(config, jax.random.key(3))).items()}

    def spread(path, std):
        assert abs(flat[path].std() / std - 1) < 4 / math.sqrt(2 * flat[path].size), path
    spread("video/proj_0/kernel", 1 / math.sqrt(3 * 48))               # uniform in +-1/sqrt(fan-in): std is that / sqrt(3)
    assert np.abs(flat["video/proj_0/bias"]).max() <= 1 / math.sqrt(48)
    spread("motion/frame_positions", 1.0)
    spread("video/queries", 0.02)
    fan_in = scheme == "fan_in"
    spread("llama/layers/mlp/down/kernel", 0.5 / math.sqrt(172) if fan_in else 0.02)
    spread("encoder/vit/blocks/mlp/fc1/kernel", 1 / 8 if fan_in else 0.02)
    spread("encoder/vit/pos_embed", 0.3 if fan_in else 0.02)
    spread("llama/lm_head/kernel", 0.02)
    assert not flat["video/qformer/periods/0/attention/key/bias"].any() and (flat["llama/norm/scale"] == 1).all()
    assert np.abs(flat["video/queries"] - flat["motion/queries"]).max() > 0.01       # every leaf draws its own


def test_a_foreign_tree_is_refused():
    params = build.abstract_params(TINY)
    with pytest.raises(build.ParamsError, match="video/queries is missing"):
        build.bind(TINY, params | {"video": {k: v for k, v in params["video"].items() if k != "queries"}})
    with pytest.raises(build.ParamsError, match="llama/extra is not part"):
        build.bind(TINY, params | {"llama": params["llama"] | {"extra": 0}})
    with pytest.raises(build.ParamsError, match=r"vit/blocks.* has shape \(1, 3, "):
        build.bind(dataclasses.replace(TINY, vit=dataclasses.replace(TINY.vit, depth=2)), params)


@pytest.fixture(scope="module")
def params():
    return build.init_params(TINY, jax.random.key(0))


def pictures(clips, rng):
    return {"frames_BTHWC": rng.integers(0, 256, (clips, 5, 56, 56, 3)).astype(np.uint8),
            "mask_BTHW": rng.integers(0, 256, (clips, 5, 56, 56)).astype(np.uint8),
            "crop_B4": np.tile(np.array([0.1, 0.1, 0.8, 0.75], np.float32), (clips, 1))}


def close(a, b, tolerance=REORDERED):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=tolerance * np.abs(np.asarray(y)).max())


def encode(config, params, batch):
    return jax.jit(lambda p, b: build.bind(config, p).image_tokens(b))(params, batch)


def test_chunks_change_nothing(params):
    """10 pictures per branch: in one piece, in 4 chunks of 3 (2 padded)."""
    batch = pictures(2, np.random.default_rng(0))
    whole = encode(dataclasses.replace(TINY, frames_per_chunk=64), params, batch)
    close(encode(dataclasses.replace(TINY, frames_per_chunk=6), params, batch), whole)
    assert np.abs(np.asarray(whole[0][:, 0] - whole[0][:, 1])).max() > 0.01      # pictures can be told apart


@pytest.mark.parametrize("vit", [1, 2])
def test_two_equal_copies_are_one(params, vit):
    """G = 1 folds the branches into one batch, G = 2 maps over copies: the same function if the copies are equal."""
    batch = pictures(2, np.random.default_rng(1))
    two = dataclasses.replace(TINY, vit_copies=vit, qformer_copies=2)
    encoder = params["encoder"]

    def double(tree):
        return jax.tree.map(lambda x: jnp.concatenate([x, x]), tree)
    copied = {"vit": double(encoder["vit"]) if vit == 2 else encoder["vit"], "qformer": double(encoder["qformer"]),
              "ln_vision": double(encoder["ln_vision"]), "query_tokens": encoder["query_tokens"],
              "query_tokens_motion": encoder["query_tokens"]}
    once, twice = encode(TINY, params, batch), encode(two, params | {"encoder": copied}, batch)
    close(twice, once)
    other = copied | {"query_tokens_motion": -encoder["query_tokens"]}
    changed = encode(two, params | {"encoder": other}, batch)
    close(changed[0], once[0])
    assert np.abs(np.asarray(changed[1] - once[1])).max() > 0.1


def test_a_tail_of_layers_is_the_last_period_cut_short():
    """Depth 3 at frequency 2 = one period and a tail; an unrolled loop over the layers, each with its own weights, agrees."""
    config = dataclasses.replace(TINY, image_qformer=QFormerConfig(queries=8, width=48, depth=3, heads=4, mlp=192))
    rng = np.random.default_rng(5)
    tree = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) / 7, build.abstract_params(config))
    source, queries = rng.normal(size=(2, 17, 64)).astype(np.float32), rng.normal(size=(8, 48)).astype(np.float32)

    @jax.jit
    def both(tree):
        model = jax.tree.map(lambda x: x[0], build.bind(config, tree).encoder.qformer)
        layers = [jax.tree.map(lambda x: x[0], model.periods[0]), jax.tree.map(lambda x: x[0], model.periods[1]), model.tail[0]]
        assert [layer.crossattention is not None for layer in layers] == [True, False, True]
        x_BQE = jnp.broadcast_to(model.norm(queries), (2, 8, 48))
        for layer in layers:
            x_BQE = layer(x_BQE, source, None)
        return model(jnp.asarray(queries), jnp.asarray(source)), x_BQE
    close(*both(tree))


def row(tokens, segment, position, slot, clip):
    names = ("tokens_RS", "segment_RS", "position_RS", "slot_RS", "clip_RS")
    return dict(zip(names, (np.asarray(x, np.int32) for x in (tokens, segment, position, slot, clip)), strict=True))


def test_packed_segments_do_not_see_each_other(params):
    """Two segments of one row (and padding) equal two rows; a change in one leaves the other bit-identical."""
    visual_BQD = np.random.default_rng(1).normal(size=(1, 16, 64)).astype(np.float32)
    packed = row([[1, 0, 0, 7, 8, 1, 0, 9, 5, 0]], [[1] * 5 + [2] * 4 + [0]], [[*range(5), *range(4), 0]],
                 [[-1, 0, 8, -1, -1, -1, 9, -1, -1, -1]], [[0] * 10])
    apart = row([[1, 0, 0, 7, 8], [1, 0, 9, 5, 0]], [[1] * 5, [1] * 4 + [0]], [[*range(5)], [*range(4), 0]],
                [[-1, 0, 8, -1, -1], [-1, 9, -1, -1, -1]], [[0] * 5] * 2)

    @jax.jit
    def run(rows):
        hawk = build.bind(TINY, params)
        return hawk.llama.hidden(hawk.embed_rows(rows, jnp.asarray(visual_BQD)), rows["segment_RS"], rows["position_RS"])

    def hidden(rows):
        return np.asarray(run(rows))
    one, two = hidden(packed), hidden(apart)
    close(one[0, :5], two[0])
    close(one[0, 5:9], two[1, :4])
    assert np.isfinite(one).all()                       # padding has something to attend to
    changed = hidden(packed | {"tokens_RS": np.array([[1, 0, 0, 3, 8, 1, 0, 9, 5, 4]], np.int32)})
    np.testing.assert_array_equal(changed[0, 5:9], one[0, 5:9])
    assert np.abs(changed[0, 3:5] - one[0, 3:5]).max() > 1e-3


def test_prefill_takes_padding_on_either_side(params):
    """A prompt padded left or right, then one step, equals the uncached row."""
    tokens = np.array([[5, 9, 30, 2]] * 2)
    prompt, valid = np.array([[5, 9, 30, 0], [0, 5, 9, 30]]), np.array([[1, 1, 1, 0], [0, 1, 1, 1]])
    position = np.array([[0, 1, 2, 0], [0, 0, 1, 2]])

    @jax.jit
    def run(params):
        llama = build.bind(TINY, params).llama
        whole = llama.hidden(llama.embed(tokens), jnp.ones((2, 4)), jnp.arange(4)[None].repeat(2, 0))
        h, cache = llama.prefill(llama.embed(prompt), jnp.asarray(valid), position, llama.init_cache(2, 8))
        seen = jnp.pad(valid, ((0, 0), (0, 4)))
        return whole, h, llama.step(llama.embed(tokens[:, 3]), jnp.array([3, 3]), seen, 4, cache)[0]
    whole, h, last = map(np.asarray, run(params))
    close(h[valid == 1].reshape(2, 3, -1), whole[:, :3])
    close(last, whole[:, 3])


def test_dropout_follows_the_clip_not_the_batch(params):
    """Clip 1's mask is the same when it comes in a microbatch of its own, given its own key; without a key nothing is dropped."""
    config = dataclasses.replace(TINY, video_qformer=dataclasses.replace(TINY.video_qformer, dropout=0.5))
    tokens = np.random.default_rng(0).normal(size=(3, 4, 8, 48)).astype(np.float32)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(3))

    @functools.partial(jax.jit, static_argnums=0)
    def run(config, tokens, key):
        return build.bind(config, params).branch_tokens(tokens, tokens, dropout_key=key)
    together = run(config, tokens, jax.random.key(7))
    close([x[1:2] for x in together], run(config, tokens[1:2], keys_B[1:2]))
    clean = run(config, tokens, None)
    close(clean, run(TINY, tokens, jax.random.key(7)))
    assert np.abs(np.asarray(clean[0] - together[0])).max() > 0.1
    keep_BN = np.asarray(keep_mask(keys_B, 0.1, 3000))
    assert abs(keep_BN.mean() - 0.9) < 4 * 0.3 / math.sqrt(keep_BN.size)        # four standard errors


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputation_changes_no_gradient(params, remat):
    def gradient(config):
        def loss(video):
            hawk = build.bind(config, params | {"video": video})
            tokens = jnp.ones((2, 2, 8, 48)) * jnp.arange(8)[:, None]
            visual_BQD = hawk.branch_tokens(tokens, tokens, dropout_key=jax.random.key(0))[0]
            return jnp.square(hawk.llama.hidden(visual_BQD, jnp.ones((2, 16)), jnp.arange(16)[None].repeat(2, 0))).sum()
        return jax.jit(jax.grad(loss))(params["video"])
    config = dataclasses.replace(TINY, video_qformer=dataclasses.replace(TINY.video_qformer, dropout=0.1))
    kept, again = gradient(config), gradient(dataclasses.replace(config, remat=remat))
    biggest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(kept))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=REORDERED * biggest)


def test_compute_dtype_is_honoured(params):
    """bf16 from the encoder and in branches and decoder; within ten roundings of 2^-8 of the float32 result, a wrong one is off by 1."""
    low = dataclasses.replace(TINY, compute_dtype="bfloat16", frozen_dtype="bfloat16")
    batch = pictures(1, np.random.default_rng(0)) | row([[1, 0, 0, 7]], [[1] * 4], [[0, 1, 2, 3]], [[-1, 0, 9, -1]], [[0] * 4])

    @functools.partial(jax.jit, static_argnums=0)
    def run(config, params):
        hawk = build.bind(config, params)
        video, motion = hawk.image_tokens(batch)
        return video, motion, hawk({k: v for k, v in batch.items() if k[-2:] == "RS"} | {"video_BTQE": video, "motion_BTQE": motion})
    ours = run(low, jax.tree.map(lambda x, a: x.astype(a.dtype), params, build.abstract_params(low)))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(ours))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(run(TINY, params)), strict=True):
        assert np.abs(np.asarray(x, np.float32) - np.asarray(y)).mean() < 10 * 2**-8 * np.abs(np.asarray(y)).mean()


def test_norms_have_the_reference_epsilons():
    """hawk.md section 10.  The goldens cannot tell: at their variance of about 1 a wrong epsilon moves values by 1e-6."""
    hawk = build.bind(ModelConfig(), build.abstract_params(ModelConfig()))
    vit, image, video = hawk.encoder.vit.blocks, hawk.encoder.qformer, hawk.motion.qformer
    assert (vit.norm1.eps, vit.norm2.eps, hawk.encoder.ln_vision.eps) == (1e-6, 1e-6, 1e-5)
    for former in (image, video):
        layer = former.periods[0]
        assert {n.eps for n in (former.norm, layer.norm, layer.attention.norm, layer.crossattention.norm)} == {1e-12}
    assert hawk.llama.norm.eps == hawk.llama.layers.input_norm.eps == hawk.llama.layers.post_norm.eps == ModelConfig().llama.eps


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_norms_use_their_epsilon(kind):
    """Values of 1e-3, whose variance is that of the epsilon; numpy in float64, tolerance float32 rounding."""
    x = np.random.default_rng(0).normal(0.01, 1e-3, (5, 64))
    norm = kind(Declare("reference", "float32"), 64, 1e-6)
    ours = jax.tree.map(lambda a: jnp.ones(a.shape) if a.shape else a, norm)
    if kind is LayerNorm:
        ours.bias = jax.tree.map(jnp.zeros_like, ours.bias)
        y = x - x.mean(-1, keepdims=True)
    else:
        y = x
    np.testing.assert_allclose(ours(jnp.float32(x)), y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6), rtol=1e-4, atol=1e-5)


def test_dropout_is_where_bert_has_it(monkeypatch):
    """After the first norm; in each layer on self-attention weights, their output, cross-attention weights, their output, the mlp."""
    made = []

    class Recorded(layers.Drop):
        def __init__(self, keep_BN, rate):
            super().__init__(keep_BN, rate)
            made.append((self, []))

        def __call__(self, x):
            next(shapes for drop, shapes in made if drop is self).append(x.shape)
            return super().__call__(x)
    monkeypatch.setattr(qformer, "Drop", Recorded)
    config = dataclasses.replace(TINY, video_qformer=dataclasses.replace(TINY.video_qformer, dropout=0.1))
    tokens = jax.ShapeDtypeStruct((3, 4, 8, 48), jnp.float32)
    jax.eval_shape(lambda p, x: build.bind(config, p).video(x, jax.random.key(0)), build.abstract_params(config), tokens)
    layer = [(3, 4, 8, 8), (3, 8, 48), (3, 4, 8, 32), (3, 8, 48), (3, 8, 48)]
    assert [shapes for _, shapes in made] == [[(3, 8, 48)], layer]          # both layers are one scanned program
    assert all(drop.used == drop.keep_BN.shape[1] for drop, _ in made)
    assert ModelConfig().video_qformer.dropout == 0.1 and ModelConfig().image_qformer.dropout == 0
