"""Scores against hand counts and a separate BLEU; controls against what they stand for; a whole evaluation on a tiny model."""
import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from golden_weights import TINY

from data.records import TextRow
from data.synthetic import APPEARANCE_PAIRS, MOTION_PAIRS
from data.text import Tokenizer
from data.world_text import CLASSES, describe, references
from hawk_jax.config import GenerateConfig, HawkConfig, HawkError, InputConfig, PrepareConfig
from hawk_jax.evaluation import evaluate as module
from hawk_jax.evaluation.classes import NONE, class_scores
from hawk_jax.evaluation.text_metrics import best_constant, bleu, derangement, exact
from hawk_jax.models import build


# ------------------------------------------------------------------------------------------------ metrics
def plain_bleu(texts, references, order: int) -> float:
    """Corpus BLEU from its definition, for texts of plain words: no smoothing is needed where every order has a match."""
    match, total, length, wanted = [0] * order, [0] * order, 0, 0
    for text, refs in zip(texts, references):
        words, others = text.split(), [r.split() for r in refs]
        length += len(words)
        wanted += min((abs(len(o) - len(words)), len(o)) for o in others)[1]
        for n in range(1, order + 1):
            grams = Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))
            most = Counter()
            for o in others:
                most |= Counter(tuple(o[i:i + n]) for i in range(len(o) - n + 1))
            match[n - 1] += sum(min(c, most[g]) for g, c in grams.items())
            total[n - 1] += sum(grams.values())
    logs = sum(math.log(m / t) for m, t in zip(match, total)) / order
    return 100 * math.exp(min(0, 1 - wanted / length) + logs)


def test_bleu_is_the_definition():
    """A different number of references per clip must not shift anything."""
    texts = ["a man in red walks along the street at night", "the car stops in front of the old house", "a dog runs"]
    refs = [["a man in red walks down the street at night", "one man walks along the street"],
            ["the car stops near the old house", "a car waits", "in front of the old house the car stops"], ["a dog runs away"]]
    ours = bleu(texts, refs)
    for n in range(1, 5):
        assert ours[f"bleu_{n}"] == pytest.approx(plain_bleu(texts, refs, n), rel=1e-9)     # the same formula in float64
    assert bleu([r[0] for r in refs], refs)["bleu_4"] == pytest.approx(100)
    with pytest.raises(ValueError):
        bleu(texts, [*refs[:2], []])


def test_exact_counts_any_reference():
    assert exact(["At  Night.", "there is one car", "no"], [["It is.", "at night."], ["There is one cat."], ["no"]]) == 2 / 3


@pytest.mark.parametrize("groups", [[0] * 7, list("aabbbcd"), list("aab"), list("abc"), list("ab"), list("aaaab")])
def test_derangement_moves_everybody_and_stays_in_groups(groups):
    order = derangement(groups)
    assert sorted(order) == list(range(len(groups))) and all(i != j for i, j in enumerate(order))
    assert order == derangement(groups), "fixed: the same table every time"
    sizes = Counter(groups)
    strayed = [g for g, j in zip(groups, order) if groups[j] != g]
    assert len(strayed) <= sum(n == 1 for n in sizes.values()) + 1      # a lone item, and whoever takes its place


def test_best_constant_is_the_best_by_trying_all():
    draw = np.random.default_rng(0)
    words = "a man car dog runs walks stops red blue street park at night".split()
    train = [" ".join(draw.choice(words, 8)) for _ in range(40)]
    held = [[" ".join(draw.choice(words, 9))] for _ in range(15)] + [[train[7]]] * 2
    best = best_constant(train, held)
    scores = {t: bleu([t] * len(held), held)["bleu_4"] for t in train}
    assert scores[best] == max(scores.values()) and best in train


# ------------------------------------------------------------------------------------------------ classes
def label(name: str, place: str = "park", colours=("red", "blue"), video: str = "") -> dict:
    return {"video": video, "class": name, "abnormal": True, "place": place, "night": False, "colours": list(colours)}


def said(row: dict) -> str:
    return describe(row["class"], row["colours"], row["place"], row["night"], 0, 0)


def test_every_class_is_named_by_its_own_sentences():
    rows = [label(name) for name in CLASSES for _ in references(label(name))]
    texts = [text for name in CLASSES for text in references(label(name))]
    scores = class_scores(texts, rows, texts)
    assert scores["right"] == scores["macro_recall"] == scores["colour"] == scores["place"] == 1
    assert scores["chance"] == 1 / len(CLASSES) and {tuple(p["pair"]) for p in scores["pairs"]} == {*MOTION_PAIRS, *APPEARANCE_PAIRS}
    counts = np.array(scores["confusion"]["counts"])
    assert (counts == np.diag(np.diag(counts))[:, :len(counts[0])]).all() if counts.shape[0] == counts.shape[1] else not counts[:, -1].any()


def test_class_scores_by_hand():
    """Four walkers, two runners: what is wrong, missing, doubled, or of another colour or place, counted on paper."""
    walk, run = label("walking"), label("running", "street", ("white", "green"))
    both = f"{said(walk)} {said(run)}"
    texts = [said(walk), said(run), "Nothing to see.", both, said(run), said(label("running", "street", ("red", "green")))]
    rows = [walk, walk, walk, walk, run, run]
    scores = class_scores(texts, rows, [said(r) for r in rows])
    assert scores["right"] == 3 / 6 and scores["macro_recall"] == (1 / 4 + 2 / 2) / 2 and scores["unnamed"] == 2 / 6
    assert scores["colour"] == 2 / 6        # the first walker, the first runner: a doubled text holds two colours
    assert scores["place"] == 3 / 6
    pair = next(p for p in scores["pairs"] if p["pair"] == ["walking", "running"])
    assert (pair["clips"], pair["right"], pair["swapped"]) == (6, 3 / 6, 1 / 6)
    assert scores["confusion"] == {"classes": ["walking", "running"], "columns": ["walking", "running", NONE],
                                   "counts": [[1, 1, 2], [0, 2, 0]]}
    assert len(scores["pairs"]) == 1, "pairs with a class that does not occur have no accuracy"


# ------------------------------------------------------------------------------------------------ tables
def test_a_perfect_model_and_a_constant_one():
    rows = [label(name, place) for name in CLASSES[:6] for place in ("park", "street")]
    texts = [said(r) for r in rows]
    table = module.description_scores(texts, [[t] for t in texts], texts, [[t] for t in texts])
    assert table["model"]["bleu_4"] == pytest.approx(100) and table["model"]["exact"] == 1
    assert table["shuffled"]["bleu_4"] < 40 and table["shuffled"]["exact"] == 0
    constant = module.description_scores([table["constant_text"]] * len(texts), [[t] for t in texts], texts, [[t] for t in texts])
    assert constant["model"] == constant["constant"], "a model that says the best constant scores what the control says"
    assert constant["model"]["bleu_4"] == pytest.approx(constant["shuffled"]["bleu_4"]), "and cannot tell its clips apart"


def test_answers_have_a_constant_for_each_question():
    train = [("When?", "At night."), ("When?", "At night."), ("When?", "In daylight."), ("Who?", "A man."), ("Why?", "Because of fire.")]
    held = [("When?", "At night."), ("Who?", "A man."), ("Who?", "A dog.")]
    rows = [{"question": q, "reference": a, "answer": a} for q, a in
            [("When?", "At night."), ("When?", "In daylight."), ("Who?", "A man."), ("Who?", "A dog."), ("How?", "Slowly.")]]
    table = module.answer_scores(rows, train, held)
    assert table["constant_texts"]["When?"] == "At night." and table["constant_texts"]["Who?"] == "A man."
    assert table["constant_texts"]["How?"] == table["constant_text"], "an unknown question gets the one constant of all"
    assert table["model"]["exact"] == 1 and table["constant_per_question"]["exact"] == 2 / 5
    assert table["shuffled"]["exact"] == 0 and table["moved_to_another_question"] == 2      # the lone question and its neighbour


def test_samples_are_chosen_before_anything_is_said():
    names = ["walking", "walking", "running", "fire", "running"]
    labels = {str(i): label(name, video=str(i)) for i, name in enumerate(names)}
    assert module.chosen_samples(list(labels), labels, 4) == [0, 2, 3, 1]
    assert module.chosen_samples(list("abcdefghi"), {}, 3) == [0, 4, 8]
    assert module.chosen_samples(list("ab"), {}, 18) == [0, 1]


# ------------------------------------------------------------------------------------------------ the whole evaluation
MODEL = dataclasses.replace(TINY, llama=dataclasses.replace(TINY.llama, vocab=512))
CONFIG = HawkConfig(model=MODEL, prepare=PrepareConfig(size=56, frames=4),
                    input=InputConfig(tokenizer="embedded", conversation_share=1.0, max_conversation_tokens=128),
                    generate=GenerateConfig(max_new_tokens=8, clips=3, questions=2, samples=3))


class MemoryInput:
    """The part of data.stream.Input that evaluation uses, over random pictures; `look` permutes what the clips show."""

    def __init__(self, splits: dict[str, list[TextRow]], look=None):
        self.splits, self.look, self.tokenizer = splits, look or {}, Tokenizer("embedded")

    def texts(self, split):
        if split not in self.splits:
            raise HawkError(f"no split {split}")
        return self.splits[split]

    def eval_batches(self, split, clips):
        return Passes(self, split, clips)


class Passes:
    def __init__(self, source, split, clips):
        self.source, self.count, self.clips = source, len(source.texts(split)), clips

    def __enter__(self):
        return iter(self)

    def __exit__(self, *_):
        pass

    def __iter__(self):
        for first in range(0, self.count, self.clips):
            ids = [i if i < self.count else -1 for i in range(first, first + self.clips)]
            seeds = [self.source.look.get(i, i) for i in ids]
            draws = [np.random.default_rng(max(s, 0)) for s in seeds]
            frames = np.stack([d.integers(0, 256, (4, 56, 56, 4), np.uint8) for d in draws])
            # features stand in for pictures: a random ViT hardly tells them apart
            video, motion = (np.float32([d.normal(0, 3, (4, 8, 48)) + d.normal(0, 3, 48) for d in draws]) for _ in range(2))
            yield {"frames_BTHWC": frames[..., :3], "mask_BTHW": frames[..., 3], "video_BTQE": video, "motion_BTQE": motion,
                   "weight_B": np.float32([i >= 0 for i in ids]), "clip_id_B": np.int32(ids)}


def entries(count: int, split: str) -> list[TextRow]:
    rows = [label(CLASSES[i % len(CLASSES)], ("park", "street")[i % 2], video=f"{split}/{i}.mp4") for i in range(count)]
    asked = ["What happens in this video?", "When does it happen?"]
    return [TextRow(clip=r["video"], source=r["video"], content_hash=str(i), seconds=6.0, times_VT=[[0.0, 1.0, 2.0, 3.0]],
                    description=said(r), questions=asked[:1 + i % 2], answers=["A man walks.", "In daylight."][:1 + i % 2],
                    phrases=[], direct_phrases=[]) for i, r in enumerate(rows)]


@pytest.fixture(scope="module")
def weights():
    draw = np.random.default_rng(1)
    flat = {path: np.float32(draw.normal(0, leaf.shape[-2] ** -0.5, leaf.shape)) if leaf.ndim > 1 else np.ones(leaf.shape, np.float32)
            for path, leaf in build.flatten(build.abstract_params(MODEL)).items()}
    for path in [("video", "decoder_2", "kernel"), ("motion", "decoder_2", "kernel"), ("llama", "layers", "attention", "value", "kernel")]:
        flat[path] *= 8         # what a clip says must outweigh the question, so that another clip gives another text
    flat["llama", "embed_tokens"] = np.float32(draw.normal(0, 1, flat["llama", "embed_tokens"].shape))
    return unflatten_dict(flat)


def test_whole_evaluation(tmp_path, weights, capsys):
    splits = {"train": entries(8, "train"), "validation": entries(4, "validation"), "test": entries(5, "test")}
    labels = tmp_path / "labels.jsonl"
    rows = [label(CLASSES[i % len(CLASSES)], ("park", "street")[i % 2], video=e.source)
            for s in splits.values() for i, e in enumerate(s)]
    labels.write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "evaluation"
    (out / "samples").mkdir(parents=True)
    (out / "samples" / "00007.jpg").write_bytes(b"of an earlier evaluation")
    results = module.evaluate(CONFIG, weights, MemoryInput(splits), "test", out, labels)
    outputs = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    assert [o["clip"] for o in outputs] == [e.clip for e in splits["test"]]
    assert [len(o["answers"]) for o in outputs] == [1, 2, 1, 2, 1] and len({o["description"] for o in outputs}) > 1
    assert sorted(p.name for p in (out / "samples").iterdir()) == [f"{i:05d}.jpg" for i, o in enumerate(outputs) if o["sample"]]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["constants_chosen_on"] == "validation" and results["descriptions"]["one_reference"]["constant_text"] in {
        e.description for e in splits["train"]}
    assert results["answers"]["answers"] == 7 and results["classes"]["clips"] == 5
    assert "best constant" in capsys.readouterr().out

    # generating with shuffled clips and pairing texts with other clips' references are one thing, here by doing the former
    order = derangement([0] * 5)
    backwards = {there: here for here, there in enumerate(order)}
    again = module.generate(CONFIG, weights, MemoryInput(splits, backwards), "test")
    moved = bleu([o["description"] for o in again], [[o["reference"]] for o in again])["bleu_1"]
    assert moved == pytest.approx(results["descriptions"]["one_reference"]["shuffled"]["bleu_1"])
    assert [o["description"] for o in again] == [outputs[backwards[i]]["description"] for i in range(5)]

    # without labels nothing is claimed about classes; without validation constants come from training
    del splits["validation"]
    bare = module.score(CONFIG, outputs, MemoryInput(splits), {})
    assert "classes" not in bare and "all_references" not in bare["descriptions"] and bare["constants_chosen_on"] == "train"


def test_what_is_wrong_is_said(tmp_path, weights):
    splits = {"train": entries(2, "train"), "test": entries(2, "test")}
    (tmp_path / "labels.jsonl").write_text(json.dumps(label("fire", video="other.mp4")) + "\n")
    with pytest.raises(HawkError, match="no row for clip test/0.mp4"):
        module.evaluate(CONFIG, weights, MemoryInput(splits), "test", tmp_path / "out", tmp_path / "labels.jsonl")
    with pytest.raises(HawkError, match="not the labels.jsonl"):
        module.evaluate(CONFIG, weights, MemoryInput(splits), "test", tmp_path / "out", tmp_path / "absent.jsonl")
    silent = {"test": [dataclasses.replace(e, description="") for e in splits["test"]]}
    with pytest.raises(HawkError, match="no descriptions"):
        module.evaluate(CONFIG, weights, MemoryInput(silent), "test", tmp_path / "out")

