"""HAWK: a frozen picture encoder, two trainable branches (video, motion), and a frozen decoder that reads both.

  pictures -> EVA ViT -> ln_vision -> image Q-Former          frozen, one run per picture          Encoder
  + frame positions -> video Q-Former -> Linear chain         trains, one set per branch           Branch
  text embeddings with visual tokens spliced in -> LLaMA      frozen, gradients pass through it    Llama

Source: hawk.md section 1 of the specification.  Modules hold structure; models/build.py binds values to them.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hawk_jax import axes
from hawk_jax.axes import constrain
from hawk_jax.config import ModelConfig
from hawk_jax.models import pictures
from hawk_jax.models.eva_vit import EvaVit
from hawk_jax.models.layers import Declare, Init, LayerNorm, Linear, row_keys, torch_default
from hawk_jax.models.llama import Llama
from hawk_jax.models.qformer import QFormer

LN_VISION_EPS = 1e-5    # torch's default, which the authors leave


class HawkOutputs(NamedTuple):
    hidden_RSD: jax.Array       # final hidden states of every row; losses apply lm_head where targets are
    video_BQZ: jax.Array        # compressed tokens of the two branches, for the consistency loss
    motion_BQZ: jax.Array


class Encoder(nnx.Module):
    """Pictures to query tokens.  Every parameter leads with an axis G of copies: one copy serves both branches, two are one each."""

    def __init__(self, c: ModelConfig):
        frozen = Declare(c.init, c.frozen_dtype)
        vit, rest = frozen.stacked("copies", c.vit_copies), frozen.stacked("copies", c.qformer_copies)
        q = c.image_qformer
        self.vit = EvaVit(vit, c.vit)
        self.ln_vision = LayerNorm(rest, c.vit.width, LN_VISION_EPS)
        self.qformer = QFormer(rest, q, c.vit.width, c.remat)
        one = frozen.stacked("copies", 1)       # separate leaves, because the released code trains the second one

        def table(dtype=None):
            return one.param((q.queries, q.width), ("table", "embed"), Init("normal", 0.02), dtype)
        self.query_tokens = table()
        self.query_tokens_motion = table("float32" if c.train_query_tokens_motion else None) if c.qformer_copies == 2 else None
        self.config = c

    def __call__(self, pictures_NXHWC):
        """f32 pictures of both branches (X: video, motion) -> tokens_NXQE in the frozen dtype."""
        c = self.config
        patches_NXPM = _per_copy(c.vit_copies, lambda vit, x_NHWC: vit(x_NHWC), self.vit, pictures_NXHWC.astype(c.frozen_dtype))

        def query(parts, patches_NPM):
            ln_vision, qformer, queries_QE = parts
            return qformer(queries_QE, ln_vision(patches_NPM))
        queries_GQE = self.query_tokens[...]
        if self.query_tokens_motion is not None:
            queries_GQE = jnp.concatenate([queries_GQE.astype(jnp.float32), self.query_tokens_motion[...].astype(jnp.float32)])
        return _per_copy(c.qformer_copies, query, (self.ln_vision, self.qformer, queries_GQE), patches_NXPM)


def _per_copy(copies: int, f, module, x):
    """f(module, x) for both branches, axis 1 of x: folded into one batch if one copy serves both, else mapped over copies."""
    if copies == 2:
        return jax.vmap(f, in_axes=(0, 1), out_axes=1)(module, x)
    y = f(jax.tree.map(lambda leaf: leaf[0], module), x.reshape(-1, *x.shape[2:]))
    return y.reshape(x.shape[0], 2, *y.shape[1:])


class Branch(nnx.Module):
    """What trains, once for video and once for motion: tokens of all frames -> visual tokens for the decoder, compressed tokens."""

    def __init__(self, c: ModelConfig):
        declare, q, d = Declare(c.init, "float32"), c.video_qformer, c.llama.width

        def projection(inputs, outputs, names):
            init = torch_default(inputs)        # nn.Linear's own, in both schemes
            return Linear(declare, inputs, outputs, names, init=init, bias_init=init)
        self.frame_positions = declare.param((c.frame_positions, q.width), ("table", "embed"), Init("normal", 1.0))
        self.queries = declare.param((q.queries, q.width), ("table", "embed"), Init("normal", 0.02))
        self.qformer = QFormer(declare, q, q.width, c.remat)
        self.proj_0 = projection(q.width, d, ("embed", "mlp"))
        self.encoder_0 = projection(d, d, ("mlp", "embed"))
        self.encoder_1 = projection(d, c.compressed, ("embed", "compress"))
        self.decoder_2 = projection(d, d, ("embed", "mlp"))
        self.dtype = c.compute_dtype

    def __call__(self, tokens_BTQE, dropout_key=None):
        """-> (visual_BQD, compressed_BQZ) in the compute dtype."""
        clips, times, queries, width = tokens_BTQE.shape
        x_BTQE = tokens_BTQE.astype(self.dtype) + self.frame_positions[:times, None].astype(self.dtype)
        source_BUE = constrain(x_BTQE.reshape(clips, times * queries, width), "batch", None, None)
        return self.project(self.qformer(self.queries[...], source_BUE, dropout_key))

    def project(self, x_BQE):
        """The chain of Linear layers without activations; its first two are shared by both results."""
        h_BQD = self.encoder_0(self.proj_0(x_BQE))
        return self.decoder_2(h_BQD), self.encoder_1(h_BQD)


class Hawk(nnx.Module):
    def __init__(self, c: ModelConfig):
        self.encoder = Encoder(c)
        self.video = Branch(c)
        self.motion = Branch(c)
        self.llama = Llama(Declare(c.init, c.frozen_dtype), c.llama, c.compute_dtype, c.remat)
        self.config = c

    def image_tokens(self, batch):
        """The frozen part: (video_BTQE, motion_BTQE) in the frozen dtype, from pictures in chunks, or cached in the batch."""
        if "video_BTQE" in batch:
            return batch["video_BTQE"], batch["motion_BTQE"]
        clips, times = batch["frames_BTHWC"].shape[:2]
        tokens_NXQE = self._encode(pictures.flat_inputs(batch), clips)
        tokens = constrain(tokens_NXQE.reshape(clips, times, *tokens_NXQE.shape[1:]), "batch")
        return tokens[:, :, 0], tokens[:, :, 1]

    def _encode(self, flat: dict, clips: int):
        """Pictures of `pictures.flat_inputs` -> tokens_NXQE, `frames_per_chunk` pictures per device at a time.

        Each chunk takes its pictures from every data shard, so that all devices work on all chunks.  Chunks have one size (the last
        is padded); fewer pictures than that are one smaller chunk.
        """
        shards = axes.batch_shards(clips)
        each = flat["video"].shape[0] // shards
        size = min(max(1, self.config.frames_per_chunk // 2), each)     # a frame is a picture in both branches
        chunks = -(-each // size)

        def cut(x):
            x = x.reshape(shards, each, *x.shape[1:])
            x = jnp.pad(x, ((0, 0), (0, chunks * size - each)) + ((0, 0),) * (x.ndim - 2), mode="edge")
            return x.reshape(shards, chunks, size, *x.shape[2:]).swapaxes(0, 1)

        def chunk(part):
            part = jax.tree.map(lambda x: constrain(x.reshape(shards * size, *x.shape[2:]), "batch"), part)
            tokens_NXQE = constrain(self.encoder(pictures.both_branches(part, self.config)), "batch")
            return tokens_NXQE.reshape(shards, size, *tokens_NXQE.shape[1:])
        parts = jax.tree.map(cut, flat)
        tokens = jax.lax.map(chunk, parts) if chunks > 1 else chunk(jax.tree.map(lambda x: x[0], parts))[None]
        tokens = tokens.swapaxes(0, 1).reshape(shards, chunks * size, *tokens.shape[-3:])[:, :each]
        return tokens.reshape(shards * each, *tokens.shape[-3:])

    def branch_tokens(self, video_BTQE, motion_BTQE, *, dropout_key=None):
        """(visual_BQD with the video's then the motion's tokens, video_BQZ, motion_BQZ); dropout only with a key.

        dropout_key: one key, or one per clip (layers.row_keys).
        """
        video_key = motion_key = None
        if dropout_key is not None:
            video_key = row_keys(dropout_key, video_BTQE.shape[0])
            motion_key = jax.vmap(jax.random.fold_in, (0, None))(video_key, 1)
        video_BQD, video_BQZ = self.video(video_BTQE, video_key)
        motion_BQD, motion_BQZ = self.motion(motion_BTQE, motion_key)
        visual_BQD = constrain(jnp.concatenate([video_BQD, motion_BQD], axis=1), "batch", None, None)
        return visual_BQD, video_BQZ, motion_BQZ

    def embed_rows(self, batch, visual_BQD):
        """x_RSD: text embeddings, with visual token slot_RS of clip clip_RS where slot_RS >= 0.

        A row may only refer to clips of its own data shard; the lookup is then local to it.
        """
        clip_RS, slot_RS = batch["clip_RS"], batch["slot_RS"]
        clips, rows = visual_BQD.shape[0], clip_RS.shape[0]
        shards = axes.batch_shards(clips) if rows % axes.batch_shards(clips) == 0 else 1
        index_RS = (clip_RS % (clips // shards)) * visual_BQD.shape[1] + jnp.maximum(slot_RS, 0)
        table = visual_BQD.reshape(shards, -1, visual_BQD.shape[2])
        spliced = jax.vmap(lambda t, i: jnp.take(t, i, axis=0, mode="clip"))(table, index_RS.reshape(shards, rows // shards, -1))
        spliced_RSD = spliced.reshape(rows, -1, visual_BQD.shape[2])
        x_RSD = jnp.where(slot_RS[..., None] >= 0, spliced_RSD, self.llama.embed(batch["tokens_RS"]))
        return constrain(x_RSD, "batch", None, None)

    def __call__(self, batch, *, dropout_key=None) -> HawkOutputs:
        """The whole forward pass; with a dropout key, as in training."""
        visual_BQD, video_BQZ, motion_BQZ = self.branch_tokens(*self.image_tokens(batch), dropout_key=dropout_key)
        hidden_RSD = self.llama.hidden(self.embed_rows(batch, visual_BQD), batch["segment_RS"], batch["position_RS"])
        return HawkOutputs(hidden_RSD, video_BQZ, motion_BQZ)
