"""Decoding with a key-value cache, from embedded prompts: the likeliest token again and again, or the best of several beams.

Functions of a bound `Llama` and arrays, to be called inside `jax.jit`.  Prompts are right-padded; padding stays in the cache, unseen, and
a row's positions go on from its own prompt's length, so a prompt gets the same answer whatever it is batched with.  Beam search ranks,
finishes and stops as `transformers` does (generate with num_beams, early_stopping=False); both are tested against it.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

NEVER = -1e9        # a score that no sequence of tokens reaches; finite, so that sums of two stay finite


class Prompts(NamedTuple):
    x_RSD: jax.Array        # embeddings, right-padded
    seen_RS: jax.Array      # bool; False: padding, or not to be seen
    length_R: jax.Array     # i32 tokens of each prompt; 0: an empty row, which ends before it begins


def _prefill(llama, prompts: Prompts, new_tokens: int):
    """(last hidden state of every prompt h_RD, cache with room for `new_tokens` more)."""
    rows, width = prompts.seen_RS.shape
    position_RS = jnp.broadcast_to(jnp.arange(width), (rows, width))
    cache = llama.init_cache(rows, width + new_tokens)
    h_RSD, cache = llama.prefill(prompts.x_RSD, prompts.seen_RS, position_RS, cache)
    return jnp.take_along_axis(h_RSD, jnp.maximum(prompts.length_R - 1, 0)[:, None, None], axis=1)[:, 0], cache


def _step(llama, prompts: Prompts, token_R, turn, cache):
    """Runs the token that was chosen at `turn` -> (h_RD, cache); prompts may be repeated for beams."""
    width, slots = prompts.seen_RS.shape[1], cache["k_LRUAK"].shape[2]
    slot_U = jnp.arange(slots)
    seen_RU = jnp.pad(prompts.seen_RS, ((0, 0), (0, slots - width)))
    valid_RU = seen_RU | ((slot_U >= width) & (slot_U < width + turn))
    return llama.step(llama.embed(token_R), prompts.length_R + turn, valid_RU, width + turn, cache)


def _stops(token, stop_ids: tuple[int, ...]):
    return jnp.isin(token, jnp.asarray(stop_ids, jnp.int32))


def greedy_ids(llama, prompts: Prompts, new_tokens: int, stop_ids: tuple[int, ...] = ()):
    """ids_RN i32: what was generated up to and with a stop id, then zeros; N = new_tokens."""
    rows = prompts.length_R.shape[0]
    h_RD, cache = _prefill(llama, prompts, new_tokens)

    def going_on(state):
        turn, _, ended_R, _, _ = state
        return (turn < new_tokens) & ~jnp.all(ended_R)

    def one_token(state):
        turn, h_RD, ended_R, ids_RN, cache = state
        token_R = jnp.where(ended_R, 0, jnp.argmax(llama.logits(h_RD), axis=-1).astype(jnp.int32))
        ids_RN = ids_RN.at[:, turn].set(token_R)
        h_RD, cache = _step(llama, prompts, token_R, turn, cache)
        return turn + 1, h_RD, ended_R | _stops(token_R, stop_ids), ids_RN, cache
    start = (0, h_RD, prompts.length_R == 0, jnp.zeros((rows, new_tokens), jnp.int32), cache)
    return jax.lax.while_loop(going_on, one_token, start)[3]


# ------------------------------------------------------------------------------------------------ beams
class Beams(NamedTuple):
    """W sequences of every row, still running or finished, the best first."""
    ids_RWN: jax.Array
    score_RW: jax.Array     # sum of log-probabilities; of finished ones divided by length ** length_penalty
    ended_RW: jax.Array     # bool; finished ones only: whether this place is taken


def _pick(beams: Beams, score_RC, count: int):
    """The `count` best of C candidates by `score_RC`, and their places."""
    score_RW, place_RW = jax.lax.top_k(score_RC, count)
    ids_RWN = jnp.take_along_axis(beams.ids_RWN, place_RW[..., None], axis=1)
    return Beams(ids_RWN, score_RW, jnp.take_along_axis(beams.ended_RW, place_RW, axis=1)), place_RW


def _extend(running: Beams, logits_RWV, turn, keep: int):
    """The `keep` likeliest continuations of all beams of a row -> (candidates, the beam each continues)."""
    rows, beams, words = logits_RWV.shape
    sum_RWV = jax.nn.log_softmax(logits_RWV, axis=-1) + running.score_RW[..., None]
    score_RC, place_RC = jax.lax.top_k(sum_RWV.reshape(rows, beams * words), keep)
    beam_RC, token_RC = place_RC // words, (place_RC % words).astype(jnp.int32)
    ids_RCN = jnp.take_along_axis(running.ids_RWN, beam_RC[..., None], axis=1).at[:, :, turn].set(token_RC)
    return Beams(ids_RCN, score_RC, jnp.zeros(score_RC.shape, bool)), beam_RC, token_RC


def _finish(finished: Beams, candidates: Beams, stopped_RC, improvable_R, length, length_penalty: float):
    """Finished sequences after this turn: those there were and the candidates that stopped among the first W, the best W of them."""
    beams = finished.score_RW.shape[1]
    ends_RC = stopped_RC & (jnp.arange(stopped_RC.shape[1]) < beams)
    score_RC = candidates.score_RW / length ** length_penalty + NEVER * ~ends_RC + NEVER * ~improvable_R[:, None]
    both = Beams(*(jnp.concatenate(pair, axis=1) for pair in zip(finished, candidates._replace(score_RW=score_RC, ended_RW=ends_RC))))
    return _pick(both, both.score_RW, beams)[0]


def beam_ids(llama, prompts: Prompts, new_tokens: int, beams: int, stop_ids: tuple[int, ...] = (), length_penalty: float = 1.0):
    """ids_RN i32 of the best sequence of each row by log-probability / length ** length_penalty, then zeros; N = new_tokens.

    Twice as many continuations as beams are looked at each turn (more with several stop ids), so that enough go on when some stop;
    a row is done when its best running sequence cannot overtake its worst finished one at their present length.
    """
    rows, keep = prompts.length_R.shape[0], max(2, 1 + len(stop_ids)) * beams
    h_RD, cache = _prefill(llama, prompts, new_tokens)

    def per_beam(x, axis=0):
        return jnp.repeat(x, beams, axis=axis)
    repeated = Prompts(per_beam(prompts.x_RSD[:, :1]), per_beam(prompts.seen_RS), per_beam(prompts.length_R))
    cache = jax.tree.map(lambda x: per_beam(x, 1), cache)
    empty = Beams(jnp.zeros((rows, beams, new_tokens), jnp.int32), jnp.full((rows, beams), NEVER), jnp.zeros((rows, beams), bool))
    # all beams start equal: only the first may be continued, or every beam would be the same
    running = empty._replace(score_RW=jnp.where(jnp.arange(beams) == 0, 0.0, empty.score_RW))

    def going_on(state):
        turn, _, _, _, improvable_R, stuck, _ = state
        return (turn < new_tokens) & jnp.any(improvable_R) & ~stuck

    def one_token(state):
        turn, h_RD, running, finished, improvable_R, _, cache = state
        logits_RWV = llama.logits(h_RD).reshape(rows, beams, -1)
        candidates, beam_RC, token_RC = _extend(running, logits_RWV, turn, keep)
        stopped_RC = _stops(token_RC, stop_ids) | (turn + 1 == new_tokens)
        finished = _finish(finished, candidates, stopped_RC, improvable_R, turn + 1.0, length_penalty)
        running, place_RW = _pick(candidates, candidates.score_RW + NEVER * stopped_RC, beams)
        worst_R = jnp.where(finished.ended_RW, finished.score_RW.min(1, keepdims=True), NEVER).min(1)
        improvable_R &= running.score_RW[:, 0] / (turn + 1.0) ** length_penalty > worst_R
        chosen_R = (jnp.arange(rows)[:, None] * beams + jnp.take_along_axis(beam_RC, place_RW, axis=1)).reshape(-1)
        token_R = jnp.take_along_axis(token_RC, place_RW, axis=1).reshape(-1)
        cache = jax.tree.map(lambda x: jnp.take(x, chosen_R, axis=1), cache)
        h_RD, cache = _step(llama, repeated, token_R, turn, cache)
        return turn + 1, h_RD, running, finished, improvable_R, jnp.all(stopped_RC), cache
    start = (0, per_beam(h_RD), running, empty, prompts.length_R > 0, False, cache)
    return jax.lax.while_loop(going_on, one_token, start)[3].ids_RWN[:, 0]
