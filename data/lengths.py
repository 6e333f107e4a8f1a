"""How long the row of a clip can get over all its draws, without drawing: what length buckets are filled by."""
from functools import lru_cache

import numpy as np

from data import prompts
from data.rows import ClipTexts, caption_row, conversation_spans, cut, fitted_conversation, learns, motion_row, question_rounds
from data.text import Tokenizer
from hawk_jax.config import InputConfig


@lru_cache(1024)
def _extreme_times(tokenizer: Tokenizer, count: int, seconds: int) -> tuple[list[float], list[float]]:
    """`count` times up to `seconds` whose message has the fewest and the most tokens: words are encoded independently of each other."""
    tenths = [t / 10 for t in range(10 * seconds + 1)]

    def size(form: str):
        return lambda t: len(tokenizer.pieces.encode(form.format(t)))

    return tuple([best(tenths, key=size("{:.1f},"))] * (count - 1) + [best(tenths, key=size("{:.1f}"))] for best in (min, max))


def _conversation_bound(tokenizer, config, queries, rounds, description, extremes) -> tuple[int, int]:
    lengths = []
    for times in extremes:
        spans = cut(conversation_spans(tokenizer, config, queries, rounds, times), config.max_conversation_tokens)
        fits = learns(spans)            # of the last, the longest message: then the first choice of rounds serves for all
        spans = spans if fits else fitted_conversation(tokenizer, config, queries, rounds, description, times)
        lengths.append(sum(len(span.tokens) for span in spans))
    return min(lengths), max(lengths) if fits or len(lengths) == 1 else config.max_conversation_tokens


def length_bound(texts: ClipTexts, tokenizer: Tokenizer, config: InputConfig, queries: int, *, motion_language: bool = True,
                 frames: tuple[int, float] | None = None) -> tuple[int, int]:
    """Least and greatest length in tokens of `clip_row` over all its draws.

    frames = (frames of a view, seconds of the clip): needed with the released prompt where `clip_row` is given times.  Then the bounds
    hold for any times in the clip; else they are attained.
    """
    bounds = []
    if texts.description and config.conversation_share < 1:
        bounds.append((len(caption_row(texts, tokenizer, config, queries)["tokens"]),) * 2)
    if config.conversation_share > 0 or not texts.description:
        timed = frames is not None and config.prompt == "released"
        extremes = _extreme_times(tokenizer, frames[0], int(np.ceil(frames[1]))) if timed else (None,)
        described = texts.description and (config.description_probability > 0 or not texts.questions)
        choices = [*range(len(prompts.DESCRIPTION_QUESTIONS))] if described else []
        if texts.questions and (config.description_probability < 1 or not choices):
            choices.append(None)
        for choice in choices or [None]:
            rounds = question_rounds(texts, choice)
            bounds.append(_conversation_bound(tokenizer, config, queries, rounds, texts.description, extremes))
    motion = len(motion_row(texts, tokenizer, config, queries)["tokens"]) if motion_language else 0
    return min(low for low, _ in bounds) + motion, max(high for _, high in bounds) + motion
