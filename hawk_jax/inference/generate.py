"""Generation: clips are encoded once, then any number of prompts about them are answered together, greedily or with beams.

One jitted program per (rows, prompt bucket); inference/decode.py says how tokens are chosen.
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
from hawk_jax.inference.decode import Prompts, beam_ids, greedy_ids
from hawk_jax.mesh import batch_sharding, use
from hawk_jax.models.build import bind

BUCKET = 32             # prompts are padded to a multiple of this many tokens: few programs, little waste


@functools.partial(jax.jit, static_argnames="config")
def encode_clips(params, batch, config: ModelConfig):
    """Both branches' tokens of a batch's clips, visual_BQD (video's Q, then motion's Q), without dropout."""
    model = bind(config, params)
    return model.branch_tokens(*model.image_tokens(batch))[0]


@functools.partial(jax.jit, static_argnames=("config", "new_tokens", "stop_ids", "beams", "length_penalty"))
def generate_ids(params, visual_BQD, prompts, config: ModelConfig, new_tokens: int, stop_ids: tuple[int, ...] = (EOS,), beams: int = 1,
                 length_penalty: float = 1.0):
    """Answers to prompts about clips: greedy for one beam, else beam search (inference/decode.py).

    prompts: tokens_RS, slot_RS, segment_RS i32 right-padded (segment 0: padding or not to be seen), length_R i32, clip_R i32 (row of
    visual_BQD).  Returns ids_RN i32, N = new_tokens: what was generated up to and with a stop id, then zeros.
    """
    model = bind(config, params)
    embedded = embed_prompts(model, visual_BQD, prompts)
    if beams == 1:
        return greedy_ids(model.llama, embedded, new_tokens, stop_ids)
    return beam_ids(model.llama, embedded, new_tokens, beams, stop_ids, length_penalty)


def embed_prompts(model, visual_BQD, prompts) -> Prompts:
    """Embeddings of prompts (`generate_ids`) with the visual tokens of their clips spliced in."""
    rows, width = prompts["tokens_RS"].shape
    # one copy of the visual tokens per row: rows of several questions about one clip then need not lie on its data shard
    batch = prompts | {"clip_RS": jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, width))}
    x_RSD = model.embed_rows(batch, jnp.take(visual_BQD, prompts["clip_R"], axis=0))
    return Prompts(x_RSD, prompts["segment_RS"] > 0, prompts["length_R"])


def _padded(prompts: Sequence[Row], clips: Sequence[int], rows: int, width: int) -> dict[str, np.ndarray]:
    """Prompts as the arrays of `generate_ids`; rows beyond them are empty prompts (length 0), which end before they begin."""
    empty: Row = {key: value[:0] for key, value in prompts[0].items()}
    padded = [pad_row(row, width) for row in [*prompts, *[empty] * (rows - len(prompts))]]
    lengths = [len(row["tokens"]) for row in prompts]
    return {f"{key}_RS": np.stack([row[key] for row in padded]) for key in ("tokens", "slot", "segment")} | {
        "length_R": np.array(lengths + [0] * (rows - len(lengths)), np.int32),
        "clip_R": np.array([*clips, *[0] * (rows - len(clips))], np.int32)}


class Generator:
    """Answers prompts about clips with one set of parameters.

    config.generate: max_new_tokens, beams, length_penalty; params: the whole parameter tree; mesh: where it lies (None: one device).
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
        chosen = self.config.generate
        new_tokens = min(chosen.max_new_tokens, self.config.model.llama.max_positions - width)
        if new_tokens < 1:
            raise HawkError(f"a prompt of {width} tokens leaves no room for an answer: model.llama.max_positions="
                            f"{self.config.model.llama.max_positions}")
        for first in range(0, len(prompts), rows):
            group = slice(first, first + rows)
            arrays = _padded(prompts[group], clips[group], rows, width)
            with self._on_mesh():
                ids_RN = generate_ids(self.params, visual_BQD, arrays, self.config.model, new_tokens, self.stop_ids, chosen.beams,
                                      chosen.length_penalty)
            texts += [self._text(ids) for ids in np.asarray(ids_RN)[:len(prompts[group])]]
        return texts

    def _text(self, ids_N: np.ndarray) -> str:
        stops = np.flatnonzero(np.isin(ids_N, self.stop_ids))
        return self.tokenizer.decode(ids_N[:stops[0]] if len(stops) else ids_N)
