"""Greedy generation: clips are encoded once, then any number of prompts about them are answered together.

One jitted program per (rows, prompt bucket): prefill of right-padded prompts into a key-value cache, then one token per row and turn
until every row has ended.  Padding stays in the cache, unseen; a row's positions go on from its own prompt's length, so a prompt gets
the same answer whatever it is batched with (tested against decoding without a cache).
"""
import contextlib
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from data.rows import Row, pad_row
from data.text import EOS, Tokenizer
from hawk_jax.config import HawkConfig, HawkError, ModelConfig
from hawk_jax.mesh import batch_sharding, use
from hawk_jax.models.build import bind

BUCKET = 32             # prompts are padded to a multiple of this many tokens: few programs, little waste


@functools.partial(jax.jit, static_argnames="config")
def encode_clips(params, batch, config: ModelConfig):
    """Both branches' tokens of a batch's clips, visual_BQD (video's Q, then motion's Q), without dropout."""
    model = bind(config, params)
    return model.branch_tokens(*model.image_tokens(batch))[0]


@functools.partial(jax.jit, static_argnames=("config", "new_tokens"))
def greedy(params, visual_BQD, prompts, config: ModelConfig, new_tokens: int, stop_ids=(EOS,)):
    """The likeliest token again and again.

    prompts: tokens_RS, slot_RS, segment_RS i32 right-padded (segment 0: padding or not to be seen), length_R i32, clip_R i32 (row of
    visual_BQD).  Returns ids_RN i32, N = new_tokens: what was generated up to and with a stop id, then zeros.
    """
    model = bind(config, params)
    rows, width = prompts["tokens_RS"].shape
    # one copy of the visual tokens per row: rows of several questions about one clip then need not lie on its data shard
    batch = prompts | {"clip_RS": jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, width))}
    x_RSD = model.embed_rows(batch, jnp.take(visual_BQD, prompts["clip_R"], axis=0))
    seen_RS = prompts["segment_RS"] > 0
    position_RS = jnp.broadcast_to(jnp.arange(width), (rows, width))
    h_RSD, cache = model.llama.prefill(x_RSD, seen_RS, position_RS, model.llama.init_cache(rows, width + new_tokens))
    last_RD = jnp.take_along_axis(h_RSD, prompts["length_R"][:, None, None] - 1, axis=1)[:, 0]
    slot_U = jnp.arange(width + new_tokens)
    seen_RU = jnp.pad(seen_RS, ((0, 0), (0, new_tokens)))

    def going_on(state):
        turn, _, ended_R, _, _ = state
        return (turn < new_tokens) & ~jnp.all(ended_R)

    def one_token(state):
        turn, h_RD, ended_R, ids_RN, cache = state
        token_R = jnp.where(ended_R, 0, jnp.argmax(model.llama.logits(h_RD), axis=-1).astype(jnp.int32))
        ids_RN = ids_RN.at[:, turn].set(token_R)
        ended_R = ended_R | jnp.isin(token_R, jnp.asarray(stop_ids))
        valid_RU = seen_RU | ((slot_U >= width) & (slot_U < width + turn))
        h_RD, cache = model.llama.step(model.llama.embed(token_R), prompts["length_R"] + turn, valid_RU, width + turn, cache)
        return turn + 1, h_RD, ended_R, ids_RN, cache
    start = (0, last_RD, prompts["length_R"] == 0, jnp.zeros((rows, new_tokens), jnp.int32), cache)
    return jax.lax.while_loop(going_on, one_token, start)[3]


def _padded(prompts: Sequence[Row], clips: Sequence[int], rows: int, width: int) -> dict[str, np.ndarray]:
    """Prompts as the arrays of `greedy`; rows beyond them are empty prompts (length 0), which end before they begin."""
    empty: Row = {key: value[:0] for key, value in prompts[0].items()}
    padded = [pad_row(row, width) for row in [*prompts, *[empty] * (rows - len(prompts))]]
    lengths = [len(row["tokens"]) for row in prompts]
    return {f"{key}_RS": np.stack([row[key] for row in padded]) for key in ("tokens", "slot", "segment")} | {
        "length_R": np.array(lengths + [0] * (rows - len(lengths)), np.int32),
        "clip_R": np.array([*clips, *[0] * (rows - len(clips))], np.int32)}


class Generator:
    """Answers prompts about clips with one set of parameters.

    config.generate: max_new_tokens and clips; params: the whole parameter tree; mesh: where it lies (None: one device).
    """

    def __init__(self, config: HawkConfig, params: dict, tokenizer: Tokenizer, mesh=None):
        self.config, self.params, self.tokenizer, self.mesh = config, params, tokenizer, mesh
        ending = tokenizer.ending(config.input.end_symbol, "")     # the released stage 1 learns a line end instead of </s>
        self.stop_ids = tuple(sorted({EOS, int(ending[-1])}))

    def _on_mesh(self):
        return use(self.mesh, self.config.mesh.strategy) if self.mesh is not None else contextlib.nullcontext()

    def encode(self, batch: dict) -> jax.Array:
        """visual_BQD of the clips of a batch of data/stream.py; text entries are not looked at."""
        kept = {k: v for k, v in batch.items() if k.endswith(("THWC", "THW", "crop_B4", "BTQE"))}
        if self.mesh is not None and len(batch["weight_B"]) % (self.mesh.shape["data"] * self.mesh.shape["fsdp"]) == 0:
            kept = jax.device_put(kept, batch_sharding(self.mesh))
        with self._on_mesh():
            return encode_clips(self.params, kept, self.config.model)

    def texts(self, visual_BQD, prompts: Sequence[Row], clips: Sequence[int], rows: int | None = None,
              width: int = 0) -> list[str]:
        """One text per prompt; clips[i] = row of visual_BQD that prompt i is about.

        rows: prompts run together (default: all); a last group with fewer is filled up.  width: tokens that prompts are padded to at
        least.  Both make groups share one program.  Raises HawkError for a prompt that leaves no room below model.llama.max_positions.
        """
        rows, texts = rows or len(prompts), []
        width = -(-max(width, *(len(p["tokens"]) for p in prompts)) // BUCKET) * BUCKET
        new_tokens = min(self.config.generate.max_new_tokens, self.config.model.llama.max_positions - width)
        if new_tokens < 1:
            raise HawkError(f"a prompt of {width} tokens leaves no room for an answer: model.llama.max_positions="
                            f"{self.config.model.llama.max_positions}")
        for first in range(0, len(prompts), rows):
            group = slice(first, first + rows)
            arrays = _padded(prompts[group], clips[group], rows, width)
            with self._on_mesh():
                ids_RN = greedy(self.params, visual_BQD, arrays, self.config.model, new_tokens, self.stop_ids)
            texts += [self._text(ids) for ids in np.asarray(ids_RN)[:len(prompts[group])]]
        return texts

    def _text(self, ids_N: np.ndarray) -> str:
        stops = np.flatnonzero(np.isin(ids_N, self.stop_ids))
        return self.tokenizer.decode(ids_N[:stops[0]] if len(stops) else ids_N)
