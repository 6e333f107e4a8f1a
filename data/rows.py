"""Texts of a clip -> token rows: captions and conversations, the paper's prompt and the released one, with their label masks.

A row is a dict of unpadded 1-D arrays (`KEYS`): the video-language segment, then the motion-language segment.  Layouts follow hawk.md
section 2; the prompt texts are in data/prompts.py.  Everything drawn is a pure function of (input.seed, clip, epoch).
"""
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data import draws, prompts
from data.text import BOS, EOS, UNK, Tokenizer, clean_caption, times_text
from hawk_jax.config import ConfigError, HawkError, InputConfig

KEYS = {"tokens": np.int32, "targets": np.int32, "loss": np.uint8, "segment": np.int32, "position": np.int32, "slot": np.int32}
PADDING = {"slot": -1}                   # of the other keys: 0
VIDEO_LANGUAGE, MOTION_LANGUAGE = 1, 2   # segment numbers and loss codes
Row = dict[str, np.ndarray]


@dataclass(frozen=True)
class ClipTexts:
    """What is said about a clip; a Record serves as well."""
    description: str = ""
    questions: Sequence[str] = ()
    answers: Sequence[str] = ()
    phrases: Sequence[str] = ()          # with indirect arguments (Eq. 7)
    direct_phrases: Sequence[str] = ()   # as the released code finds them


class Draw(NamedTuple):
    """The random choices for one visit of a clip."""
    conversation: bool                   # conversation path, else caption path
    replace: bool                        # the description replaces the first question-answer pair
    question: int                        # index in prompts.DESCRIPTION_QUESTIONS


class Span(NamedTuple):
    """Consecutive tokens of a segment."""
    tokens: np.ndarray                   # int32 [S]; 0 where a visual token stands
    slots: np.ndarray | None = None      # int32 [S] of visual tokens; None: text
    learned: bool = False                # the decoder is to predict these tokens


# ------------------------------------------------------------------------------------------------ draws
def draw(config: InputConfig, clip: int | str, epoch: int) -> Draw:
    """Choices for one visit; `clip` names the clip."""
    u = draws.uniform(3, config.seed, "text", clip, epoch)
    question = int(u[2] * len(prompts.DESCRIPTION_QUESTIONS))
    return Draw(bool(u[0] < config.conversation_share), bool(u[1] < config.description_probability), question)


def _description_question(config: InputConfig, clip: int | str, epoch: int) -> int | None:
    """Index of the question under which the description replaces the first pair, None where it does not.

    "in_place" is the released code: the pair stays replaced in later epochs, until another question is drawn for it.  Written as a
    function of the epoch: the last visit up to now that replaced it decides.
    """
    earliest = 0 if config.description_replacement == "in_place" and config.description_probability > 0 else epoch
    for visit in range(epoch, earliest - 1, -1):
        choice = draw(config, clip, visit)
        if choice.conversation and choice.replace:
            return choice.question
    return None


# ------------------------------------------------------------------------------------------------ spans of a prompt
@lru_cache(16)
def _slots(first: int, queries: int) -> Span:
    return Span(np.zeros(queries, np.int32), np.arange(first, first + queries, dtype=np.int32))


def _text_parts(template: str, **fields: str) -> list[str]:
    """A template cut at its visual tokens: text, name, text, name, ..., text; white space next to visual tokens dropped."""
    parts = re.split(r"\{(video|motion)\}", template)
    for i in range(0, len(parts), 2):
        text = parts[i].format(**fields)
        text = text if i == 0 else text.lstrip()
        parts[i] = text if i == len(parts) - 1 else text.rstrip()
    return parts


def _prompt_spans(tokenizer: Tokenizer, parts: list[str], queries: int) -> list[Span]:
    """BOS, then the parts of `_text_parts`."""
    spans = [Span(np.array([BOS], np.int32))]
    for i, part in enumerate(parts):
        if i % 2:
            spans.append(_slots(0 if part == "video" else queries, queries))
        elif part:
            spans.append(Span(tokenizer.plain(part)))
    return spans


def _answer_spans(tokenizer: Tokenizer, instruction: str, answer: str) -> list[Span]:
    """`instruction answer </s>`, encoded at once as the released code does, cut where the answer begins.

    Targets are the answer, the lone space piece in front of `</s>`, and `</s>`.
    """
    tokens, cut = tokenizer.plain(f"{instruction} {answer} "), len(tokenizer.plain(instruction))
    return [Span(tokens[:cut]), Span(tokens[cut:], None, True), Span(np.array([EOS], np.int32), None, True)]


def _first_parts(config: InputConfig, question: str, times: Sequence[float] | None, chat: bool) -> list[str]:
    """Parts of the first message of a conversation, up to and including `[/INST]`."""
    template = {("paper", False): prompts.PAPER_QUESTION, ("paper", True): prompts.PAPER_QUESTION,
                ("released", False): prompts.RELEASED_QUESTION, ("released", True): prompts.RELEASED_CHAT}[config.prompt, chat]
    message = "" if times is None else times_text(times, prompts.TIMES)
    template = prompts.ROUND.replace("{message}", prompts.SYSTEM + template)
    return _text_parts(template, system=config.system_prompt, question=question, times=message)


# ------------------------------------------------------------------------------------------------ spans of the three kinds of segment
def caption_spans(tokenizer: Tokenizer, config: InputConfig, queries: int, caption: str | None) -> list[Span]:
    """BOS | prompt with both branches' visual tokens | caption + end symbol (None: the prompt alone)."""
    template = prompts.PAPER_CAPTION if config.prompt == "paper" else prompts.RELEASED_CAPTION
    spans = _prompt_spans(tokenizer, _text_parts(template), queries)
    return spans if caption is None else [*spans, _ended(tokenizer, config, caption)]


def motion_spans(tokenizer: Tokenizer, config: InputConfig, queries: int, phrases: Sequence[str]) -> list[Span]:
    """BOS | motion tokens | phrases + end symbol; without phrases the end symbol alone is learned."""
    text = prompts.PHRASE_SEPARATOR.join(phrases)
    return [*_prompt_spans(tokenizer, _text_parts(prompts.MOTION), queries), _ended(tokenizer, config, text)]


def _ended(tokenizer: Tokenizer, config: InputConfig, text: str) -> Span:
    text = clean_caption(text) if config.clean_captions else text
    return Span(tokenizer.ending(config.end_symbol, text)[:config.max_caption_tokens], None, True)


def conversation_spans(tokenizer: Tokenizer, config: InputConfig, queries: int, rounds: Sequence[tuple[str, str]],
                       times: Sequence[float] | None = None, chat: bool = False) -> list[Span]:
    """`[INST] <<SYS>>...<</SYS>> prompt question [/INST] answer </s>` and `<s>[INST] question [/INST] answer </s>` for each later round.

    Not yet cut to input.max_conversation_tokens.  `times` in seconds enter the released prompt only; `chat` takes the first message of
    the released demo.
    """
    (question, answer), *later = rounds
    *before, instruction = _first_parts(config, question, times, chat)
    spans = [*_prompt_spans(tokenizer, before, queries), *_answer_spans(tokenizer, instruction, answer)]
    for question, answer in later:
        spans.append(Span(np.array([BOS], np.int32)))
        spans += _answer_spans(tokenizer, prompts.ROUND.format(message=question), answer)
    return spans


def cut(spans: list[Span], limit: int) -> list[Span]:
    """The first `limit` tokens; visual tokens are never cut."""
    kept = []
    for span in spans:
        if span.slots is not None and len(span.tokens) > limit:
            raise ConfigError("input.max_conversation_tokens is too small: it would cut the visual tokens off the prompt")
        kept.append(Span(span.tokens[:limit], span.slots, span.learned))
        limit -= len(kept[-1].tokens)
    return [span for span in kept if len(span.tokens)]


def learns(spans: list[Span]) -> bool:
    return any(span.learned for span in spans)


def fitted_conversation(tokenizer, config, queries, rounds, description, times) -> list[Span]:
    """Spans of at most input.max_conversation_tokens in which something is learned, where any choice of rounds allows it.

    A first question that fills the row leaves no target, a NaN in the released code.  Such a round is skipped; when no round is left the
    description is asked for; when that fails too the row has no target and weighs 0 in the loss.
    """
    tries = [rounds[i:] for i in range(len(rounds))]
    if description:
        tries.append([(prompts.DESCRIPTION_QUESTIONS[0], description)])
    for some in tries:
        spans = cut(conversation_spans(tokenizer, config, queries, some, times), config.max_conversation_tokens)
        if learns(spans):
            return spans
    return cut(conversation_spans(tokenizer, config, queries, rounds, times), config.max_conversation_tokens)


# ------------------------------------------------------------------------------------------------ rows
def segment_row(spans: list[Span], number: int, unk_is_padding: bool = False) -> Row:
    """One segment as a row.  `number` is its segment number and the loss code of its learned tokens.

    unk_is_padding (input.text_mask=not_unk, released code): positions that hold a genuine unk get segment 0, so that nothing attends
    to them; they learn nothing either, as their own state is undefined.
    """
    tokens = np.concatenate([span.tokens for span in spans])
    slot = np.concatenate([np.full(len(s.tokens), -1, np.int32) if s.slots is None else s.slots for s in spans])
    learned = np.repeat([span.learned for span in spans], [len(span.tokens) for span in spans])
    size = len(tokens)
    row = {
        "tokens": tokens,
        "targets": np.append(tokens[1:], np.int32(0)),           # of the same segment: the last token predicts nothing
        "loss": np.append(learned[1:], False).astype(np.uint8) * np.uint8(number),
        "segment": np.full(size, number, np.int32),
        "position": np.arange(size, dtype=np.int32),
        "slot": slot,
    }
    if unk_is_padding:
        masked = (tokens == UNK) & (slot < 0)
        row["segment"][masked], row["loss"][masked] = 0, 0
    return row


def join_rows(rows: Sequence[Row]) -> Row:
    """Rows one after the other."""
    return {key: np.concatenate([row[key] for row in rows]) for key in KEYS}


def pad_row(row: Row, size: int) -> Row:
    """The row with padding (segment 0, slot -1) up to `size` tokens; a longer row raises HawkError."""
    short = size - len(row["tokens"])
    if short < 0:
        raise HawkError(f"a row of {size - short} tokens does not fit a bucket of {size}; raise input.buckets or leave it empty")
    return {key: np.pad(row[key], (0, short), constant_values=PADDING.get(key, 0)) for key in KEYS}


def caption_row(texts: ClipTexts, tokenizer: Tokenizer, config: InputConfig, queries: int) -> Row:
    """Video-language segment of the caption path."""
    row = segment_row(caption_spans(tokenizer, config, queries, texts.description), VIDEO_LANGUAGE)
    return _without_unk_targets(row, config)


def motion_row(texts: ClipTexts, tokenizer: Tokenizer, config: InputConfig, queries: int) -> Row:
    """Motion-language segment of both paths."""
    phrases = texts.phrases if config.phrases == "all" else texts.direct_phrases
    return _without_unk_targets(segment_row(motion_spans(tokenizer, config, queries, phrases), MOTION_LANGUAGE), config)


def _without_unk_targets(row: Row, config: InputConfig) -> Row:
    """Released caption path: attention goes by length there, but the label of an unk is that of padding, none."""
    if config.text_mask == "not_unk":
        row["loss"][row["targets"] == UNK] = 0
    return row


def question_rounds(texts: ClipTexts, question: int | None) -> list[tuple[str, str]]:
    """Question-answer pairs; with `question` the description under that question in place of the first pair."""
    rounds = list(zip(texts.questions, texts.answers, strict=True))
    if texts.description and question is not None:
        rounds[:1] = [(prompts.DESCRIPTION_QUESTIONS[question], texts.description)]
    if not rounds:
        raise HawkError("the clip has neither a description nor a question with its answer: nothing can be learned from it")
    return rounds


def conversation_row(texts: ClipTexts, tokenizer: Tokenizer, config: InputConfig, queries: int, question: int | None = None,
                     times: Sequence[float] | None = None) -> Row:
    """Video-language segment of the conversation path; `question` asks for the description in place of the first pair."""
    rounds = question_rounds(texts, question)
    spans = fitted_conversation(tokenizer, config, queries, rounds, texts.description, times)
    return segment_row(spans, VIDEO_LANGUAGE, config.text_mask == "not_unk")


def clip_row(texts: ClipTexts, tokenizer: Tokenizer, config: InputConfig, queries: int, *, clip: int | str, epoch: int,
             times: Sequence[float] | None = None, motion_language: bool = True) -> Row:
    """The row of a clip at one visit: video-language, then (if asked) motion-language.  Unpadded 1-D arrays under `KEYS`.

    queries = video_qformer.queries; clip = its name; times = seconds of the frames shown, for the
    released conversation prompt.  A clip without description is used as a conversation, one without questions and answers as a
    conversation about its description where a conversation is drawn.
    """
    if draw(config, clip, epoch).conversation or not texts.description:
        question = _description_question(config, clip, epoch) if texts.questions else draw(config, clip, epoch).question
        row = conversation_row(texts, tokenizer, config, queries, question, times)
    else:
        row = caption_row(texts, tokenizer, config, queries)
    return join_rows([row, motion_row(texts, tokenizer, config, queries)]) if motion_language else row


def generation_prompt(tokenizer: Tokenizer, config: InputConfig, queries: int, question: str | None = None, *,
                      history: Sequence[tuple[str, str]] = (), times: Sequence[float] | None = None) -> Row:
    """The row that an answer continues; nothing in it is learned.

    question None asks for the description: in the words of the caption path where only that was trained (input.conversation_share=0),
    else by the first of the 20 questions.  history = earlier (question, answer) rounds.  With the released prompt, `times` give the
    layout of its training and None that of its demo, whose system prompt is prompts.RELEASED_CHAT_SYSTEM.
    """
    if question is None and config.conversation_share == 0:
        return segment_row(caption_spans(tokenizer, config, queries, None), VIDEO_LANGUAGE)
    question = prompts.DESCRIPTION_QUESTIONS[0] if question is None else question
    if history:
        spans = conversation_spans(tokenizer, config, queries, history, times, chat=times is None)
        spans += [Span(np.array([BOS], np.int32)), Span(tokenizer.plain(prompts.ROUND.format(message=question)))]
    else:
        spans = _prompt_spans(tokenizer, _first_parts(config, question, times, chat=times is None), queries)
    return segment_row([span._replace(learned=False) for span in spans], VIDEO_LANGUAGE, config.text_mask == "not_unk")
