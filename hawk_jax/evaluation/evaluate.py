"""Generates descriptions and answers for a split and scores them beside two controls: shuffled clips and the best constant text.

Writes to its folder: outputs.jsonl (one line per clip), results.json (all figures), results.txt (the same as tables), and
samples/*.jpg (frames over masked frames of some clips, for the report).
"""
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import jax
import numpy as np
from tqdm import tqdm

from data.rows import generation_prompt
from data.synthetic import references as all_descriptions
from hawk_jax.config import HawkConfig, HawkError, digest
from hawk_jax.evaluation.classes import class_scores
from hawk_jax.evaluation.tables import results_text
from hawk_jax.evaluation.text_metrics import BLEU_RECIPE, best_constant, bleu, derangement, exact
from hawk_jax.inference.generate import Generator

GAP = 2                 # black columns between the frames of a sample's picture

CONTROLS = {
    "model": "generated texts against the references of their clips",
    "shuffled": "the same texts against the references of other clips of a fixed derangement: what the model would score if its clips "
                "were shuffled (for answers: among samples with the same question)",
    "constant": "one text for every clip: the training text with the highest BLEU-4 on the validation split",
    "constant_per_question": "the best such answer for each question",
}


# ------------------------------------------------------------------------------------------------ generation
def _prompts(config: HawkConfig, tokenizer, entry, questions: int) -> list:
    """The prompt for the description, then those for the first questions of a clip."""
    asked = [None, *entry.questions[:questions]]
    return [generation_prompt(tokenizer, config.input, config.model.video_qformer.queries, question, times=entry.times_VT[0])
            for question in asked]


def generate(config: HawkConfig, params: dict, live, split: str, mesh=None, see: Callable | None = None) -> list[dict]:
    """One dict per clip: clip, source, reference, description, and answers = [{"question", "reference", "answer"}].

    Each clip is encoded once.  Questions are asked only of runs that learned conversations (input.conversation_share > 0).
    see(clip number, frames_THWC, mask_THW), if given, gets every clip's pictures.
    """
    entries, asked = live.texts(split), config.generate.questions if config.input.conversation_share > 0 else 0
    generator = Generator(config, params, live.tokenizer, mesh)
    prompts = [_prompts(config, live.tokenizer, entry, asked) for entry in entries]
    width = max(len(prompt["tokens"]) for clip in prompts for prompt in clip)
    clips, outputs = min(config.generate.clips, len(entries)), []
    with live.eval_batches(split, clips=clips) as batches:
        for batch in tqdm(batches, total=-(-len(entries) // clips), desc=f"generating, {split}", unit="batch"):
            numbers = [int(i) for i, weight in zip(batch["clip_id_B"], batch["weight_B"]) if weight > 0]
            wanted = [(row, prompt) for row, number in enumerate(numbers) for prompt in prompts[number]]
            texts = iter(generator.texts(generator.encode(batch), [p for _, p in wanted], [row for row, _ in wanted],
                                         rows=clips * (1 + asked), width=width))
            for row, number in enumerate(numbers):
                outputs.append(_output(entries[number], texts, asked))
                if see:
                    see(number, batch["frames_BTHWC"][row], batch["mask_BTHW"][row])
    return outputs


def _output(entry, texts, asked: int) -> dict:
    description = next(texts)
    answers = [{"question": q, "reference": a, "answer": next(texts)} for q, a in zip(entry.questions[:asked], entry.answers)]
    return {"clip": entry.clip, "source": entry.source, "reference": entry.description, "description": description, "answers": answers}


# ------------------------------------------------------------------------------------------------ scores
def _scored(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict:
    return bleu(texts, references) | {"exact": exact(texts, references)}


def description_scores(texts: Sequence[str], references, candidates, held_out) -> dict:
    """Table of one kind of references: model, shuffled, constant; `held_out` = reference lists of the validation split."""
    order, constant = derangement([0] * len(texts)), best_constant(candidates, held_out)
    return {"clips": len(texts), "model": _scored(texts, references),
            "shuffled": _scored(texts, [references[i] for i in order]),
            "constant": _scored([constant] * len(texts), references), "constant_text": constant}


def answer_scores(rows: Sequence[dict], train: Sequence[tuple[str, str]], held_out: Sequence[tuple[str, str]]) -> dict:
    """rows: {"question", "reference", "answer"}; train, held_out: (question, answer) pairs of the training and validation splits."""
    questions, texts, references = [r["question"] for r in rows], [r["answer"] for r in rows], [[r["reference"]] for r in rows]
    order = derangement(questions)
    constant = best_constant([a for _, a in train], [[a] for _, a in held_out])
    each = {q: _constant_of(q, train, held_out, constant) for q in sorted(set(questions))}
    return {"answers": len(rows), "moved_to_another_question": sum(questions[i] != q for i, q in zip(order, questions)),
            "model": _scored(texts, references), "shuffled": _scored(texts, [references[i] for i in order]),
            "constant": _scored([constant] * len(rows), references), "constant_text": constant,
            "constant_per_question": _scored([each[q] for q in questions], references), "constant_texts": each}


def _constant_of(question: str, train, held_out, otherwise: str) -> str:
    """Best constant answer to one question; a question that validation lacks is judged on training, an unknown one not at all."""
    candidates = [a for q, a in train if q == question]
    judged = [[a] for q, a in held_out if q == question] or [[a] for a in candidates]
    return best_constant(candidates, judged) if candidates else otherwise


def _pairs(entries) -> list[tuple[str, str]]:
    return [pair for e in entries for pair in zip(e.questions, e.answers)]


def _held_out(live, config: HawkConfig) -> tuple[str, list]:
    """The split on which constants are chosen, never the tested one: validation, or training where there is none."""
    try:
        return config.input.validation_split, live.texts(config.input.validation_split)
    except HawkError:
        return config.input.train_split, live.texts(config.input.train_split)


def score(config: HawkConfig, outputs: list[dict], live, labels: dict[str, dict]) -> dict:
    """All figures of a list of outputs; labels: rows of labels.jsonl by source, {} for real data."""
    train, (chosen_on, held_out) = live.texts(config.input.train_split), _held_out(live, config)
    described = [o for o in outputs if o["reference"]]
    texts, candidates = [o["description"] for o in described], [e.description for e in train]
    single = [[e.description] for e in held_out if e.description]
    tables = {"one_reference": description_scores(texts, [[o["reference"]] for o in described], candidates, single)}
    results = {"bleu": BLEU_RECIPE, "controls": CONTROLS, "constants_chosen_on": chosen_on, "descriptions": tables}
    if labels:
        rows = [_label(labels, o["source"]) for o in described]
        every = [all_descriptions(_label(labels, e.source)) for e in held_out]
        tables["all_references"] = description_scores(texts, [all_descriptions(row) for row in rows], candidates, every)
        results["classes"] = class_scores(texts, rows, [o["reference"] for o in described])
        order = derangement([0] * len(rows))
        results["classes"]["shuffled_right"] = class_scores(texts, [rows[i] for i in order], texts)["right"]
    if answers := [answer for o in outputs for answer in o["answers"]]:
        results["answers"] = answer_scores(answers, _pairs(train), _pairs(held_out))
    return results


# ------------------------------------------------------------------------------------------------ labels and samples
def read_labels(path: Path | None) -> dict[str, dict]:
    """Rows of labels.jsonl by video; {} without a file."""
    if path is None:
        return {}
    try:
        return {row["video"]: row for row in map(json.loads, Path(path).read_text().splitlines())}
    except (OSError, ValueError, KeyError) as error:
        raise HawkError(f"{path} is not the labels.jsonl of a rendered world: {error}") from error


def _label(labels: dict[str, dict], source: str) -> dict:
    if source not in labels:
        raise HawkError(f"the labels have no row for clip {source}; give the labels.jsonl of the world these records were made from")
    return labels[source]


def chosen_samples(sources: Sequence[str], labels: dict[str, dict], count: int) -> list[int]:
    """Numbers of at most `count` clips to show: with labels classes in turn, each class's first clips first; else evenly spread.

    Chosen before anything is generated, so that the report cannot show only what went well.
    """
    if not labels:
        return np.unique(np.linspace(0, len(sources) - 1, min(count, len(sources))).round().astype(int)).tolist()
    names, turn = [_label(labels, s)["class"] for s in sources], {}
    rounds = []
    for number, name in enumerate(names):
        turn[name] = turn.get(name, -1) + 1
        rounds.append((turn[name], list(dict.fromkeys(names)).index(name), number))
    return [number for *_, number in sorted(rounds)[:count]]


def strip_jpeg(frames_THWC: np.ndarray, mask_THW: np.ndarray, most: int = 8) -> bytes:
    """JPEG of at most `most` frames side by side, and below each what the motion branch sees: the frame times its mask."""
    at_T = np.linspace(0, len(frames_THWC) - 1, min(most, len(frames_THWC))).round().astype(int)
    frames_THWC, mask_THW = frames_THWC[at_T], mask_THW[at_T]
    moving_THWC = (frames_THWC * (mask_THW[..., None] / 255)).round().astype(np.uint8)
    # what does not move stays visible, dark, so that one sees where the motion is
    below_THWC = np.maximum(moving_THWC, (frames_THWC * 0.18).astype(np.uint8))
    pair_THWC = np.pad(np.concatenate([frames_THWC, below_THWC], axis=1), ((0, 0), (0, 0), (0, GAP), (0, 0)))
    sheet_HWC = np.concatenate(list(pair_THWC), axis=1)[:, :-GAP]
    return cv2.imencode(".jpg", cv2.cvtColor(sheet_HWC, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes()


# ------------------------------------------------------------------------------------------------ the command
def evaluate(config: HawkConfig, params: dict, live, split: str, out: Path, labels: Path | None = None, mesh=None) -> dict:
    """Generates, scores, writes; returns the results.

    params: whole tree (bound to `mesh` if given); live: data.stream.Input with live pictures; labels: labels.jsonl of the synthetic
    world.  Raises HawkError for a missing split, labels that do not fit the clips, or a split without descriptions.
    """
    out, start, known = Path(out), time.perf_counter(), read_labels(labels)
    if jax.process_count() > 1:
        raise HawkError("evaluate runs in one process (on all of its devices): start it without a launcher")
    entries = live.texts(split)
    if not any(e.description for e in entries):
        raise HawkError(f"split {split!r} has no descriptions: nothing to compare generated texts with")
    shown = chosen_samples([e.source for e in entries], known, config.generate.samples)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    for old in (out / "samples").glob("*.jpg"):     # of another split or another choice: the report would show them beside other texts
        old.unlink()

    def see(number, frames_THWC, mask_THW):
        if number in shown:
            (out / "samples" / f"{number:05d}.jpg").write_bytes(strip_jpeg(frames_THWC, mask_THW))
    outputs = generate(config, params, live, split, mesh, see)
    seconds = time.perf_counter() - start
    results = {"run": config.run.name, "split": split, "clips": len(outputs), "config_digest": digest(config),
               "seeds": {"run": config.run.seed, "model": config.model.seed, "input": config.input.seed, "world": config.world.seed},
               "generation_seconds": seconds, **score(config, outputs, live, known)}
    for number, output in enumerate(outputs):
        output |= {"sample": number in shown} | ({"label": _brief(known[output["source"]])} if known else {})
    (out / "outputs.jsonl").write_text("".join(json.dumps(o, ensure_ascii=False) + "\n" for o in outputs))
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False))
    (out / "results.txt").write_text(text := results_text(results))
    print(text)
    return results


def _brief(row: dict) -> dict:
    return {key: row[key] for key in ("class", "abnormal", "place", "night", "colours")}
