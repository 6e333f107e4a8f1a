"""Validation and the kept features against the model called directly."""

import jax
import numpy as np
import pytest
from toy_run import Closable, ToyInput, one_device, quick_compile, toy_batch, toy_config, toy_params

from hawk_jax.config import HawkError, MeshConfig
from hawk_jax.mesh import make_mesh, use
from hawk_jax.models import build
from hawk_jax.training import freeze
from hawk_jax.training.features import encode_features
from hawk_jax.training.losses import hawk_losses, mean
from hawk_jax.training.validate import make_eval_step, validation_loss


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with quick_compile(tmp_path_factory):
        yield


def test_validation_is_one_mean_over_all_its_clips_without_dropout():
    """Two batches, the second with 3 clips of padding: sums and weights are added, then divided.  1e-6: float32 rounding."""
    config, mesh = toy_config("", "model.video_qformer.dropout=0.5", "run.validation_batches=5"), one_device()     # there are 2
    params, frozen = toy_params(config, mesh)
    with use(mesh, "replicated"):
        found = validation_loss(config, make_eval_step(config), params, frozen, ToyInput(config), mesh)
        forward = jax.jit(lambda p, batch: build.bind(config.model, p)(batch))
        parts = []
        for batch in (toy_batch(10**6, 8), toy_batch(10**6 + 8, 8, padding=3)):
            batch.pop("clip_id_B")
            outputs = forward(freeze.join(params, frozen), batch)
            parts.append(hawk_losses(outputs, batch, frozen["llama"]["lm_head"]["kernel"], config.loss))
    expected = {name: float(sum(p[name][0] for p in parts) / sum(p[name][1] for p in parts)) for name in parts[0]}
    expected["loss"] = expected["video_language"] + 0.1 * expected["motion_language"] + 0.1 * expected["consistency"]
    assert found == pytest.approx(expected, rel=1e-6)
    means = [float(mean(p["video_language"])) for p in parts]
    assert abs(sum(means) / 2 - expected["video_language"]) > 1e-4      # a mean of means is something else


def test_an_empty_split_is_named():
    config, mesh = toy_config(), one_device()
    empty = ToyInput(config)
    empty.eval_batches = lambda split, **_: Closable(batch for batch in ())
    with pytest.raises(HawkError, match="'validation' has no clips"):
        validation_loss(config, None, {}, {}, empty, mesh)


class Views:
    """Ten clips of two views; view v of clip n is clip 100 v + n of the toy.  Batches of eight, the second filled up with padding."""

    def view_batches(self, split: str, view: int):
        for first in (0, 8):
            yield toy_batch(100 * view + first, 8, live=True, padding=first and 6)


def test_kept_features_are_the_encoders_output_clip_by_clip():
    """[clips, views] on two devices, without padding, equal to each clip encoded directly.  2e-5: other batch shapes, other kernels."""
    config = toy_config("", "input.views=2", "mesh.data=2", "model.frames_per_chunk=4")
    mesh = make_mesh(MeshConfig("replicated", data=2, fsdp=1), jax.devices()[:2])
    params = freeze.join(*toy_params(config, mesh))
    kept = encode_features(config, params, Views(), mesh, ["train"])["train"]
    host = jax.device_get(params)
    encode = jax.jit(lambda batch: build.bind(config.model, host).image_tokens(batch))
    for view in range(2):
        direct = encode({k: v for k, v in toy_batch(100 * view, 10, live=True).items() if k.endswith(("HWC", "THW", "B4"))})
        for name, tokens in zip(("video", "motion"), direct):
            assert kept[f"{name}_NKTQE"].shape == (10, 2, *tokens.shape[1:])
            np.testing.assert_allclose(kept[f"{name}_NKTQE"][:, view], tokens, rtol=0, atol=2e-5 * np.abs(tokens).max())
    assert np.abs(kept["video_NKTQE"] - kept["motion_NKTQE"]).max() > 0.1 < np.abs(np.diff(kept["video_NKTQE"], axis=1)).max()
