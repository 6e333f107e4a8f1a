"""Units of text and scalar logic: cleaning, motion phrases, frame sampling, instructions, chat prompts, learning rates.

All must be equal, letter by letter and id by id; learning rates to float32.
"""
import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from data import prompts, released_chat, video
from data.motion_text import Parse, Word
from data.rows import VIDEO_LANGUAGE, conversation_spans, cut, generation_prompt, segment_row
from data.text import IMAGE, Tokenizer, clean_caption, times_text
from hawk_jax.config import HawkConfig, OptimConfig, released
from hawk_jax.convert.verify_unit import Sheet, Unit, UnitError
from hawk_jax.training.optim import learning_rate

IGNORED_LABEL = -100
STAGE_2 = released(HawkConfig(), 2).input


def cases(unit: Unit, field: str = "cases") -> list:
    if not unit.info[field]:
        raise UnitError(f"{field} is empty")
    return unit.info[field]


def tokenizer_of(unit: Unit) -> Tokenizer:
    """The tokenizer that the file names first in `tokenizer`, else the only one in the folder."""
    named = str(unit.info.get("tokenizer") or "").split(maxsplit=1)
    path = unit.folder / named[0] if named else None
    if path is None:
        found = sorted(unit.folder.glob("*/tokenizer.model"))
        if len(found) != 1:
            raise UnitError(f"the file names no tokenizer, and {len(found)} folders beside it hold one")
        path = found[0]
    return _tokenizer(path / "tokenizer.model" if path.is_dir() else path)


@functools.lru_cache(8)
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(str(path))


# ------------------------------------------------------------------------------------------------ rates, captions, phrases, frames
@functools.partial(jax.jit, static_argnames="config")
def _rates(step_N, config: OptimConfig):
    return learning_rate(step_N, config)


def optim_config(given: dict, names: dict[str, str]) -> OptimConfig:
    """names: {option: the file's name for it}; what the file does not name keeps the recipe's value."""
    return OptimConfig(warmup_counter="inner_epoch", clip_norm=None, **{option: given[name] for option, name in names.items()})


SCHEDULE = {"learning_rate": "init_lr", "min_learning_rate": "min_lr", "warmup_learning_rate": "warmup_start_lr",
            "warmup_steps": "warmup_steps", "steps_per_epoch": "iters_per_epoch", "epochs": "max_epoch"}


def verify_schedule(unit: Unit, sheet: Sheet) -> None:
    for number, schedule in enumerate(cases(unit, "schedules")):
        pairs = np.array(schedule["step_lr"], np.float64).reshape(-1, 2)
        rates = _rates(jnp.asarray(pairs[:, 0], jnp.int32), optim_config(schedule["config"], SCHEDULE))
        sheet.compare("rate", f"schedules[{number}]", rates, pairs[:, 1])


def verify_captions(unit: Unit, sheet: Sheet) -> None:
    for number, (text, cleaned) in enumerate(cases(unit)):
        sheet.equal(f"cases[{number}]", clean_caption(text, unit.info["max_words"]), cleaned)


def verify_phrases(unit: Unit, sheet: Sheet) -> None:
    for number, case in enumerate(cases(unit)):
        words = [Word(t["text"], t["pos"], t["dep"], t["head"]) for t in case["tokens"]]
        sheet.equal(f"cases[{number}]", prompts.PHRASE_SEPARATOR.join(Parse(words).direct()), case["result"])


def verify_sampling(unit: Unit, sheet: Sheet) -> None:
    for number, case in enumerate(cases(unit)):
        # the released code gives fewer frames for a short video, where a record repeats some
        frames = video.uniform(case["video_frames"], min(case["n_frms"], case["video_frames"]))
        sheet.equal(f"cases[{number}].indices", frames.tolist(), case["indices"])
        sheet.equal(f"cases[{number}].message", times_text(frames / case["fps"], prompts.TIMES), case["message"])


# ------------------------------------------------------------------------------------------------ instructions
def conversation_row(tokenizer: Tokenizer, queries: int, rounds: list[dict], message: str, limit: int) -> dict:
    """The row of a released conversation with this time message."""
    pairs = [(r["q"], r["a"]) for r in rounds]
    times = [float(t) for t in re.findall(r"\d+\.\d+", message)]
    if not times or times_text(times, prompts.TIMES) != message:
        times, pairs[0] = None, (message + pairs[0][0], pairs[0][1])
    return segment_row(cut(conversation_spans(tokenizer, STAGE_2, queries, pairs, times), limit), VIDEO_LANGUAGE)


def labels_of(row: dict) -> np.ndarray:
    """Labels as the released code writes them: the token itself where it is learned."""
    learned = np.concatenate([[0], row["loss"][:-1]]) > 0
    return np.where(learned, np.concatenate([[0], row["targets"][:-1]]), IGNORED_LABEL)


def conversation_text(queries: int, rounds: list[dict], message: str) -> str:
    """What a conversation looks like before it is tokenised."""
    def answered(question, answer):
        return f"{prompts.ROUND.format(message=question)} {answer} </s>"
    first = prompts.SYSTEM.format(system=STAGE_2.system_prompt) + prompts.RELEASED_QUESTION.format(
        video=queries * IMAGE, motion=queries * IMAGE, times=message, question=rounds[0]["q"])
    return "<s>".join([answered(first, rounds[0]["a"]), *[answered(r["q"], r["a"]) for r in rounds[1:]]])


def verify_instructions(unit: Unit, sheet: Sheet) -> None:
    tokenizer, limit = tokenizer_of(unit), unit.info["max_length"]
    for number, case in enumerate(cases(unit, "conversations")):
        queries, rounds, message, name = case["num_video_query_token"], case["conversation"], case["message"], f"conversations[{number}]"
        row = conversation_row(tokenizer, queries, rounds, message, limit)
        sheet.equal(f"{name}.prompt", conversation_text(queries, rounds, message), case["prompt"])
        sheet.equal(f"{name}.prompt, its ids", tokenizer.encode(case["prompt"], bos=True)[:limit], case["input_ids"])
        sheet.equal(f"{name}.input_ids", np.where(row["slot"] < 0, row["tokens"], tokenizer.specials[IMAGE]).tolist(), case["input_ids"])
        sheet.equal(f"{name}.labels", labels_of(row).tolist(), case["labels"])
    for number, case in enumerate(unit.info.get("plain_tokenisation", ())):
        sheet.equal(f"plain_tokenisation[{number}].with_bos", tokenizer.encode(case["text"], bos=True), case["with_bos"])
        sheet.equal(f"plain_tokenisation[{number}].without_special", tokenizer.encode(case["text"]), case["without_special"])


# ------------------------------------------------------------------------------------------------ chat
def verify_chat(unit: Unit, sheet: Sheet) -> None:
    tokenizer = tokenizer_of(unit)
    for number, case in enumerate(cases(unit)):
        ours = released_chat.prompts_of(case["system"], case["order"])
        name = f"cases[{number}]"
        sheet.equal(f"{name}, number of prompts", len(ours), len(case["prompts"]))
        for turn, (text, want) in enumerate(zip(ours, case["prompts"])):
            sheet.equal(f"{name}.prompts[{turn}].prompt", text, want["prompt"])
            sheet.equal(f"{name}.prompts[{turn}].segment_ids", released_chat.segments(tokenizer, text), want["segment_ids"])
        _check_rows(sheet, name, tokenizer, case)


def _check_rows(sheet: Sheet, name: str, tokenizer: Tokenizer, case: dict) -> None:
    """The prompts that this project generates from, where events are in its order: the video first, then question and answer in turn."""
    events = [event for event, _ in case["order"]]
    if events[:1] != ["upload"] or any(event != ("ask", "answer")[i % 2] for i, event in enumerate(events[1:])):
        return
    said, queries = [text for _, text in case["order"][1:]], 3
    config = dataclasses.replace(STAGE_2, system_prompt=case["system"])
    rounds = list(zip(said[::2], said[1::2]))
    for turn, want in enumerate(case["prompts"]):
        row = generation_prompt(tokenizer, config, queries, said[2 * turn], history=rounds[:turn])
        visual = np.flatnonzero(row["slot"] >= 0)
        ours = [row["tokens"][:visual[0]].tolist(), row["tokens"][visual[-1] + 1:].tolist()]
        sheet.equal(f"{name}.prompts[{turn}].segment_ids, as rows", ours, want["segment_ids"])
