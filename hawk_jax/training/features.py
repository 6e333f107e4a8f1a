"""The frozen encoder's output, computed once per clip and view and held in memory (`input.features=memory`).

Three quarters of a HAWK step are two frozen encoders on clips that come back every epoch.  Where views repeat (`input.views >= 1`)
their output is the same each time, so training and validation read it instead of pictures.
"""
import jax
import numpy as np
from tqdm import tqdm

from hawk_jax.config import HawkConfig, HawkError
from hawk_jax.mesh import batch_sharding, use
from hawk_jax.models import build


def encode_features(config: HawkConfig, params: dict, live, mesh, splits: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """{split: {"video_NKTQE", "motion_NKTQE"}} in the frozen dtype, N clips x K views, in the order of the data set.

    K = input.views in the training split, 1 in others.

    live: an Input with input.features=live.  Raises HawkError on several processes: each would hold the whole data set.
    """
    if jax.process_count() > 1:
        raise HawkError("input.features=memory holds the whole data set in one process; on several use input.features=live")
    encode = jax.jit(lambda params, batch: build.bind(config.model, params).image_tokens(batch))
    with use(mesh, config.mesh.strategy):
        views = {split: config.input.views if split == config.input.train_split else 1 for split in splits}     # others show view 0
        return {split: _encode_split(encode, params, live, split, views[split], mesh) for split in splits}


def _encode_split(encode, params: dict, live, split: str, views: int, mesh) -> dict[str, np.ndarray]:
    kept = {"video_NKTQE": [], "motion_NKTQE": []}
    for view in range(views):
        parts = [_encode_batch(encode, params, batch, mesh)
                 for batch in tqdm(live.view_batches(split, view), desc=f"encoding {split}, view {view + 1} of {views}", unit="batch")]
        for key, tokens in zip(kept, zip(*parts)):
            kept[key].append(np.concatenate(tokens))
    return {key: np.stack(tokens, axis=1) for key, tokens in kept.items()}


def _encode_batch(encode, params: dict, batch: dict, mesh) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the clips that are not padding."""
    pictures = {k: v for k, v in batch.items() if "frames" in k or "mask" in k or "crop" in k}
    real = batch["weight_B"] > 0
    video, motion = encode(params, jax.device_put(pictures, batch_sharding(mesh)))
    return np.asarray(video)[real], np.asarray(motion)[real]
