"""The whole path in small: every stage of the demo as a person calls it, on a handful of clips and steps."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
SMALL = ["world.train_clips=12", "world.validation_clips=4", "world.test_clips=4", "world.seconds=(5.0,5.0)", "input.clips=4",
         "pretrain.encoder_steps=2", "pretrain.encoder_frames=8", "pretrain.branch_steps=2", "pretrain.decoder_steps=2",
         "optim.steps_per_epoch=2", "run.checkpoint_every=1", "run.validate_every=2", "run.validation_batches=1",
         "generate.max_new_tokens=8", "generate.clips=4", "generate.samples=2", "run.tensorboard=False"]


def call(*arguments: str) -> str:
    # one device: what eight compute is compared in tests of the mesh, here it would only cost time
    done = subprocess.run([sys.executable, "-m", "hawk_jax", *arguments], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, call("demo", "configs/demo.py", "--out", str(out), *SMALL)


def test_every_stage_leaves_what_it_promises(demo):
    out, said = demo
    assert said.rstrip().endswith(str(out / "report.html"))
    html = (out / "report.html").read_text()
    assert "data:image" in html and "http://" not in html.replace("http://www.w3.org", "")
    results = json.loads((out / "evaluation" / "results.json").read_text())
    assert {"model", "shuffled", "constant"} <= results["descriptions"]["one_reference"].keys() and "answers" in results
    weights = load_file(out / "exported" / "model.safetensors")
    assert "video_Qformer_motion.bert.encoder.layer.1.attention.self.query.weight" in weights
    assert json.loads((out / "exported" / "PROOF.json").read_text())["verdict"] in said


def test_pytorch_answers_word_for_word(demo):
    """The exported folder, given the mp4 files of the evaluation split and what was asked of JAX, which read records and batches."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    out, _ = demo
    said = call("prove", str(out / "exported"), "--evaluation", str(out / "evaluation"), "--videos", str(out / "world"))
    proof = json.loads((out / "exported" / "PROOF.json").read_text())
    assert proof["verdict"] == "equal" and proof["answers"]["equal"] == proof["answers"]["texts"] == 12, said
    assert proof["answers"]["distinct"] > 3, "a constant answer would prove nothing"


def test_a_second_call_repeats_nothing(demo):
    out, first = demo
    again = call("demo", "configs/demo.py", "--out", str(out), *SMALL)
    for stage in ("render", "prepare", "pretrain", "stage1", "stage2", "evaluate", "report", "export"):
        assert f"== {stage}: done before" in again

    def digest(text):
        return next(line for line in text.splitlines() if line.startswith("first 20 losses"))
    assert digest(again) == digest(first)


def test_kept_features_give_the_losses_of_live_pictures(demo):
    out, _ = demo
    options = [o for o in SMALL if not o.startswith("run.")] + [
        f"input.datasets=({{'folder': '{out}/records'}},)", f"run.frozen={out}/frozen", "run.validate_every=0", "run.tensorboard=False"]
    losses = {}
    for features in ("memory", "live"):
        call("train", "configs/demo.py:stage1", *options, f"run.folder={out}/{features}", f"input.features={features}")
        lines = [json.loads(line) for line in (out / features / "log.jsonl").read_text().splitlines()]
        losses[features] = [line["loss"] for line in lines if line["kind"] == "train"]
    # the encoder sees other chunks of pictures in the two, and sums of float32 change order with them
    np.testing.assert_allclose(losses["memory"], losses["live"], rtol=1e-4)
    assert len(losses["live"]) == 2 and losses["live"][0] != losses["live"][1]
