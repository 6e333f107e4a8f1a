"""The page holds what the files say, escaped, in one file; charts put numbers where arithmetic says."""
import base64
import json
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from hawk_jax.config import HawkConfig, HawkError, InputConfig, RunConfig
from hawk_jax.evaluation.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, confusion, curves, ticks
from hawk_jax.evaluation.evaluate import CONTROLS, strip_jpeg
from hawk_jax.evaluation.report import report
from hawk_jax.evaluation.tables import results_text

EVIL = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Checks that tags nest, and collects text, ids, links and outside references."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.words, self.ids, self.links, self.sources, self.tags = [], [], set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.ids.add(values.get("id"))
        self.links.append(values.get("href"))
        self.sources.append(values.get("src"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def scores(bleu_4: float, exact: float) -> dict:
    return {"bleu_1": 3 * bleu_4, "bleu_2": 2 * bleu_4, "bleu_3": 1.5 * bleu_4, "bleu_4": bleu_4, "exact": exact}


def results(classes: bool) -> dict:
    table = {"clips": 2, "model": scores(33.3, 0.5), "shuffled": scores(7.4, 0), "constant": scores(11.1, 0.25), "constant_text": EVIL}
    found = {"run": "stage2", "split": "test", "clips": 2, "seeds": {"run": 42}, "bleu": "sacrebleu", "controls": CONTROLS,
             "constants_chosen_on": "validation", "descriptions": {"one_reference": table}}
    if classes:
        found["classes"] = {
            "clips": 2, "chance": 0.5, "right": 0.5, "macro_recall": 0.5, "unnamed": 0.0, "colour": None, "coloured_clips": 0, "place": 1.0,
            "shuffled_right": 0.0, "per_class": {"fire": {"recall": 1.0, "clips": 1}, "empty": {"recall": 0.0, "clips": 1}},
            "pairs": [{"pair": ["empty", "fire"], "only": "appearance", "clips": 2, "right": 0.5, "swapped": 0.5}],
            "confusion": {"classes": ["empty", "fire"], "columns": ["empty", "fire", "none"], "counts": [[0, 1, 0], [0, 1, 0]]}}
        found["answers"] = table | {"answers": 2, "constant_per_question": scores(20.0, 0.4), "moved_to_another_question": 0}
    return found


@pytest.fixture
def folder(tmp_path):
    """What the stages leave: an evaluation with one labelled sample, and one run's log."""
    evaluation = tmp_path / "evaluation"
    (evaluation / "samples").mkdir(parents=True)
    (evaluation / "results.json").write_text(json.dumps(results(True)))
    label = {"class": "fire", "abnormal": True, "place": "park", "night": False, "colours": []}
    rows = [{"clip": "a.mp4", "source": "a.mp4", "reference": "r", "description": "d", "answers": [], "label": label, "sample": False},
            {"clip": EVIL, "source": "b.mp4", "reference": f"Reference {EVIL}", "description": "A fire burns out of control.",
             "answers": [{"question": f"Q {EVIL}", "reference": "At night.", "answer": "At night."},
                         {"question": "Who?", "reference": "A man.", "answer": ""}], "label": label, "sample": True}]
    (evaluation / "outputs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    for number in (0, 1):       # the first is left over: clip 0 is no sample
        (evaluation / "samples" / f"{number:05d}.jpg").write_bytes(strip_jpeg(frames, frames[..., 0]))
    lines = [{"kind": "train", "step": s, "loss": 5.0 / s, "video_language": 4.0 / s, "motion_language": 2.0 / s, "consistency": 0.5}
             for s in (1, 2, 10)] + [{"kind": "validation", "step": 10, "loss": 0.7, "video_language": 0.6, "consistency": float("nan")}]
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def made(folder, summaries=None, versions=None) -> str:
    config = HawkConfig(run=RunConfig(folder=str(folder / "stage2")), input=InputConfig(conversation_share=1.0))
    summaries = {"pretrain": {"seconds": 30.0, "summary": {"phases": [{"note": EVIL}]}},
                 "stage2": {"seconds": 60.0, "summary": {"clips_per_s": 412.0, "best_step": 10}}} if summaries is None else summaries
    path = report(folder, folder / "deep" / "report.html", {"stage2": config}, summaries, versions or {"jax": "0.10"})
    return path.read_text(encoding="utf-8")


def test_page_says_what_the_files_say(folder):
    page = made(folder)
    words = re.sub(r"\s+", " ", " ".join(Page(page).words))
    for said in ("33.3", "4.5 × the 7.4 with clips shuffled, 11.1 by the best constant",
                 "A fire burns out of control.", "✓ class named", "✓ equal", "✗ differs",
                 "(nothing)", "appearance only", "only the renderer of the synthetic world knows", "412 clips/s", "at step 10",
                 "run.checkpoint_every = 2500", "jax", "0.10", "30.0", "all stages 90.0", "1 clips, classes in turn"):
        assert said in words, said
    assert words.count("motion-language loss, nats") == 1 and "a.mp4" not in words


def test_page_is_one_valid_file_with_everything_escaped(folder):
    text = made(folder)
    page = Page(text)
    assert not page.open and "script" not in page.tags and "<script" not in text
    assert [s for s in page.sources if s and not s.startswith("data:image/jpeg;base64,")] == []
    assert {link[1:] for link in page.links if link} <= page.ids        # only links inside the page, none dangling
    assert not re.search(r"url\(|@import|<link", text)
    picture = base64.b64decode(next(s for s in page.sources if s).split(",")[1])
    assert cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR).shape == (64, 134, 3)
    assert "".join(page.words).count(EVIL) >= 4, "shown as the text it is: clip, reference, question, constant"


def test_page_of_real_data_claims_nothing_about_classes(folder):
    (folder / "evaluation" / "results.json").write_text(json.dumps(results(False)))
    rows = [json.loads(line) for line in (folder / "evaluation" / "outputs.jsonl").read_text().splitlines()]
    (folder / "evaluation" / "outputs.jsonl").write_text("".join(json.dumps({k: v for k, v in r.items() if k != "label"}) + "\n"
                                                                 for r in rows))
    (folder / "stage2" / "log.jsonl").unlink()
    page = Page(made(folder, summaries={}))
    words = " ".join(page.words)
    assert "renderer" not in words and "class named" not in words and not {"classes", "training", "time"} & page.ids
    assert {link[1:] for link in page.links if link} <= page.ids and not page.open


def test_no_evaluation_is_said(tmp_path):
    with pytest.raises(HawkError, match="run evaluate first"):
        report(tmp_path, tmp_path / "report.html", {}, {}, {})


def test_plain_text_tables():
    text = results_text(results(True))
    assert "BLEU-4 is 4.5 x that of shuffled clips" in text and "empty / fire" in text and "empty 0.00" in text
    assert "class named" not in results_text(results(False))


# ------------------------------------------------------------------------------------------------ charts
@pytest.mark.parametrize("low,high", [(0, 1), (0.3, 7.9), (5, 5), (0, 500), (-2, 3e-4), (0, 0), (1e5, 1.1e5)])
def test_ticks_are_round_and_cover(low, high):
    found = ticks(low, high)
    steps = np.diff(found)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 7 and np.allclose(steps, steps[0])
    mantissa = f"{steps[0]:e}"
    assert float(mantissa.split("e")[0]) in (1, 2, 5)


def test_points_lie_where_arithmetic_says():
    svg = curves("loss", [Series("train", [(0, 0.0), (50, 4.0), (100, 2.0)], "train"), Series("none", [(1, float("nan"))], "validation")])
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', svg).group(1).split()]
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    assert points == [(LEFT, HEIGHT - BOTTOM), (LEFT + wide / 2, TOP), (LEFT + wide, HEIGHT - BOTTOM - high / 2)]
    assert "validation" not in svg and "train from 0 to 2" in svg
    assert curves("loss", [Series("train", [], "train")]) == ""


def test_confusion_has_a_figure_for_every_count():
    svg = confusion({"classes": ["a_b", "c"], "columns": ["a_b", "c", "none"], "counts": [[3, 1, 0], [0, 0, 4]]})
    assert re.findall(r'text-anchor="middle">(\d+)<', svg) == ["3", "1", "4"] and svg.count("<rect") == 6
    assert re.findall(r'class="cell (\w+)"', svg) == ["right", "wrong", "none", "none", "none", "wrong"] and "3 of 8 clips" in svg


def test_strip_shows_frames_over_what_moves():
    """Left half moving: below, its pixels keep their value; the rest is dark.  JPEG of flat colours is exact to a few levels."""
    frames = np.full((3, 32, 32, 3), 200, np.uint8)
    mask = np.zeros((3, 32, 32), np.uint8)
    mask[:, :, :16] = 255
    sheet = cv2.imdecode(np.frombuffer(strip_jpeg(frames, mask), np.uint8), cv2.IMREAD_COLOR).astype(int)
    assert sheet.shape == (64, 100, 3)
    assert abs(sheet[:32, :24] - 200).max() < 8 and abs(sheet[:32, 40:60] - 200).max() < 8 and sheet[:, 32:34].max() < 60
    assert abs(sheet[32:, :8] - 200).max() < 8 and sheet[32:, 24:32].max() < 60
