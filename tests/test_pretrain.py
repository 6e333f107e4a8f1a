"""Stage 0: the renderer's labels as targets, the heads' loss, and what one phase does with a batch."""
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hawk_jax.config import HawkError, MeshConfig, PretrainConfig
from hawk_jax.mesh import make_mesh, use
from hawk_jax.training.pretrain import Labels, fit, head_losses


def row(video: str, **changes) -> dict:
    person = {"kind": "person", "colour": "red", "x": [None, 0.0, 0.51, 1.2], "y": [0.5, 0.5, 0.99, 0.5], "angle": [0, 0, 1, 1]}
    return {"video": video, "class": "falling", "place": "park", "colours": ["red", ""], "frames": 4, "actors": [person]} | changes


@pytest.fixture
def labels_file(tmp_path) -> Path:
    rows = [row("a.mp4"), row("b.mp4", **{"class": "empty"}, colours=["", ""], actors=[])]
    file = tmp_path / "labels.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_labels_by_hand(labels_file):
    labels = Labels(labels_file, ["b.mp4", "a.mp4"], frames=2)      # in the data set's order, not the file's
    assert labels.names == {"class": ["empty", "falling"], "place": ["park"], "colour": ["red"], "kind": ["person"]}
    assert labels.clip["class"].tolist() == [0, 1] and labels.clip["colour_1"].tolist() == [-1, 0]
    # of 4 raw frames 2 are sampled, 0 and 2; in 0 the person is not there (null), in 2 it lies at x 0.51 of 16 bins, y 0.99 of 8
    assert labels.frame["kind_1"].tolist() == [[-1, -1], [-1, 0]]
    assert labels.frame["x_1"][1].tolist() == [-1, 8] and labels.frame["y_1"][1].tolist() == [-1, 7]
    assert labels.frame["angle_1"][1].tolist() == [-1, 2] and (labels.frame["kind_2"] == -1).all()
    assert labels.sizes(["x_1", "class", "colour_2"]) == {"x_1": 16, "class": 2, "colour_2": 1}


def test_labels_that_do_not_fit_are_named(labels_file, tmp_path):
    with pytest.raises(HawkError, match="no labels for 1 clips of the data set, for example c.mp4"):
        Labels(labels_file, ["a.mp4", "c.mp4"], frames=2)
    with pytest.raises(HawkError, match="no labels at"):
        Labels(tmp_path / "none.jsonl", [], frames=2)


def test_head_losses_against_numpy():
    rng = np.random.default_rng(0)
    x_BM, target_B = rng.standard_normal((6, 5)), np.array([0, 2, -1, 1, -1, 2])
    head = {"kernel": rng.standard_normal((5, 3)), "bias": rng.standard_normal(3)}
    loss, right = head_losses({"place": jax.tree.map(jnp.float32, head)}, jnp.float32(x_BM), {"place": jnp.array(target_B)}, {"place": 0.5})
    logits_BN = x_BM @ head["kernel"] + head["bias"]
    there = target_B >= 0
    ce_B = np.log(np.exp(logits_BN).sum(1)) - logits_BN[np.arange(6), np.maximum(target_B, 0)]
    np.testing.assert_allclose(loss, 0.5 * ce_B[there].mean(), rtol=1e-5)       # float32 against float64
    assert float(right["place"]) == pytest.approx((logits_BN.argmax(1) == target_B)[there].mean())


def _line(n: int, scale: float = 1.0):
    rng = np.random.default_rng(1)
    while True:
        x = rng.standard_normal((n, 3)).astype(np.float32)
        yield {"x": x, "y": scale * x @ np.float32([1, -2, 3])}


def _loss(trainable, rest, batch):
    return jnp.square(batch["x"] @ trainable["w"] + rest["b"] - batch["y"]).mean(), {}


def run_fit(scale: float = 1.0, **options):
    mesh, log = make_mesh(MeshConfig("replicated", data=1, fsdp=1), jax.devices()[:1]), []
    with use(mesh, "replicated"):
        trained = fit("x", _loss, {"w": jnp.zeros(3)}, {"b": jnp.zeros(())}, _line(8, scale), 200,
                      PretrainConfig(warmup_steps=10, weight_decay=0.0, **options), mesh, log)
    return trained, log


def test_a_phase_learns_and_keeps_its_first_losses():
    trained, log = run_fit(learning_rate=0.1)
    np.testing.assert_allclose(trained["w"], [1, -2, 3], atol=0.05)     # noiseless: what is left is the schedule's last rate
    batch = next(_line(8))
    assert log[0]["first_losses"][0] == pytest.approx(float(np.square(batch["y"]).mean()), rel=1e-5) and len(log[0]["first_losses"]) == 20


def test_a_diverged_phase_is_named():
    with pytest.raises(HawkError, match="stage x: the loss is (nan|inf)"):
        run_fit(scale=1e30, learning_rate=0.1)
