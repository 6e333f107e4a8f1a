"""What a run says of itself, fed by hand."""
import json
import math

import pytest

from hawk_jax.config import HawkConfig, OptimConfig, RunConfig
from hawk_jax.training.telemetry import SPEEDS, Telemetry, read_log


def figures(loss: float, tokens: float) -> dict:
    means = {"loss": loss, "motion_language": 0.0, "consistency": 0.0, "clips": 4.0, "tokens": tokens, "refused": 0.0}
    return {name: (value, 1.0) for name, value in means.items()} | {"video_language": (2 * loss, 2.0)}


def follow(folder, start: int, losses: list[float], best: float) -> dict:
    config = HawkConfig(optim=OptimConfig(epochs=1, steps_per_epoch=30), run=RunConfig(folder=str(folder), log_every=5, tensorboard=False))
    log = Telemetry(config, start)
    for step, loss in enumerate(losses, start + 1):
        log.step(step, figures(loss, 10.0), waited=step % 2 == 0)
    summary = log.summary({"steps": start + len(losses), "best_validation_loss": best})
    log.close()
    return summary


def test_a_line_holds_the_mean_since_the_line_before(tmp_path):
    follow(tmp_path, 0, [float(n) for n in range(1, 31)], 2.0)
    lines = {line["step"]: line for line in read_log(tmp_path)}
    assert list(lines) == [*range(1, 21), 25, 30]                       # the first 20 one by one, then every fifth
    assert lines[7]["loss"] == 7 and lines[30]["loss"] == lines[30]["video_language"] == (26 + 27 + 28 + 29 + 30) / 5
    assert lines[25]["waited"] == 2 / 5
    # both were divided by the same seconds: equal up to the rounding of three divisions in float64
    assert lines[30]["tokens_per_s"] / lines[30]["clips_per_s"] == pytest.approx(2.5, rel=1e-12)


def test_a_run_that_had_nothing_left_to_do_keeps_its_speeds(tmp_path):
    before = follow(tmp_path, 0, [1.0] * 30, math.inf)
    assert all(before[name] > 0 for name in SPEEDS) and before["best_validation_loss"] is None
    assert follow(tmp_path, 30, [], math.inf) == before
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text) == before and "Infinity" not in text        # which other readers of JSON refuse


def test_lines_of_work_that_was_lost_are_dropped(tmp_path):
    follow(tmp_path, 0, [1.0] * 30, 1.0)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "st')                             # cut off by a kill
    follow(tmp_path, 22, [5.0] * 3, 1.0)
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)][-3:] == [(19, 1.0), (20, 1.0), (25, 5.0)]
