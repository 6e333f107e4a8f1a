"""Stage 0 of the demo: the toy replacement of EVA-CLIP, BLIP-2 and LLaMA pre-training.

No pretrained weights exist for a model this small, so three short phases make them from the synthetic world:

    0a  ViT and image Q-Former: a linear head on the image queries names what one frame shows (objects, where, colours, place)
    0b  both branches' video Q-Formers: a linear head on the visual tokens names class, colours and place of the clip
    0c  the same and the decoder, from scratch: the three losses of HAWK on captions and conversations

0a and 0b use labels that only the renderer knows.  They are not part of the method: stages 1 and 2 start from fresh branches and
see descriptions, questions and answers only.  What is kept is the encoder and the decoder, as the frozen tree.
"""
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from hawk_jax.config import HawkConfig, HawkError, PretrainConfig
from hawk_jax.mesh import make_mesh, use
from hawk_jax.models import build
from hawk_jax.training import freeze
from hawk_jax.training.features import encode_features
from hawk_jax.training.frozen import save_frozen
from hawk_jax.training.losses import hawk_losses, mean, total_loss
from hawk_jax.training.state import INITIAL, random_key
from hawk_jax.training.step import put_batch

X_BINS, Y_BINS, ANGLE_BINS = 16, 8, 3   # 320 pixels in bins of 20: finer than a pedestrian is wide
CLASS_WEIGHT, COLOUR_WEIGHT = 0.3, 0.5  # a single frame seldom tells the class, so 0a counts it less
FIRST_LOSSES = 20                       # of each phase are kept, to compare machines and refactors


# ------------------------------------------------------------------------------------------------ labels
class Labels:
    """The renderer's labels as integer arrays; -1 stands for "not there" and is left out of the loss."""

    def __init__(self, file: Path, clips: list[str], frames: int):
        if not file.is_file():
            raise HawkError(f"no labels at {file}: stage 0 needs the labels.jsonl that `render` writes beside the videos")
        rows = {row["video"]: row for row in map(json.loads, file.read_text().splitlines())}
        missing = [clip for clip in clips if clip not in rows]
        if missing:
            raise HawkError(f"{file} has no labels for {len(missing)} clips of the data set, for example {missing[0]}")
        self.rows = [rows[clip] for clip in clips]
        self.names = {key: sorted(values) for key, values in {
            "class": {r["class"] for r in self.rows}, "place": {r["place"] for r in self.rows},
            "colour": {c for r in self.rows for c in r["colours"] if c},
            "kind": {a["kind"] for r in self.rows for a in r["actors"]}}.items()}
        self.clip = self._clip_targets()
        self.frame = self._frame_targets(frames)

    def _id(self, key: str, value: str) -> int:
        return self.names[key].index(value) if value else -1

    def _clip_targets(self) -> dict[str, np.ndarray]:
        return {
            "class": np.array([self._id("class", r["class"]) for r in self.rows], np.int32),
            "place": np.array([self._id("place", r["place"]) for r in self.rows], np.int32),
            "colour_1": np.array([self._id("colour", (*r["colours"], "", "")[0]) for r in self.rows], np.int32),
            "colour_2": np.array([self._id("colour", (*r["colours"], "", "")[1]) for r in self.rows], np.int32)}

    def _frame_targets(self, frames: int) -> dict[str, np.ndarray]:
        """[clips, frames] targets of the two main actors at the uniformly sampled frames."""
        heads = [f"{what}_{n}" for n in (1, 2) for what in ("kind", "x", "y", "angle")]
        out = {head: np.full((len(self.rows), frames), -1, np.int32) for head in heads}
        for i, row in enumerate(self.rows):
            raw = (np.arange(frames) * row["frames"] // frames).astype(int)
            for n, actor in enumerate(row["actors"][:2], 1):
                for t, f in enumerate(raw):
                    if actor["x"][f] is None or not 0 <= actor["x"][f] <= 1:
                        continue
                    out[f"kind_{n}"][i, t] = self._id("kind", actor["kind"])
                    out[f"x_{n}"][i, t] = min(int(actor["x"][f] * X_BINS), X_BINS - 1)
                    out[f"y_{n}"][i, t] = min(max(int(actor["y"][f] * Y_BINS), 0), Y_BINS - 1)
                    out[f"angle_{n}"][i, t] = min(int(actor["angle"][f] * ANGLE_BINS), ANGLE_BINS - 1)
        return out

    def sizes(self, heads: list[str]) -> dict[str, int]:
        """Number of classes of each head."""
        fixed = {"x": X_BINS, "y": Y_BINS, "angle": ANGLE_BINS}
        return {h: fixed.get(h.split("_")[0]) or len(self.names[h.split("_")[0]]) for h in heads}


def head_init(key: jax.Array, width: int, sizes: dict[str, int]) -> dict:
    """One linear head per target, small enough that the first loss is that of guessing."""
    return {name: {"kernel": 0.01 * jax.random.normal(jax.random.fold_in(key, i), (width, n)), "bias": jnp.zeros(n)}
            for i, (name, n) in enumerate(sizes.items())}


def head_losses(heads: dict, x_BM: jax.Array, targets: dict[str, jax.Array], weights: dict[str, float]) -> tuple[jax.Array, dict]:
    """Weighted sum of masked cross-entropies, and the accuracy of each head."""
    loss, right = 0.0, {}
    for name, head in heads.items():
        logits_BN, target_B = x_BM @ head["kernel"] + head["bias"], targets[name]
        there_B = target_B >= 0
        ce_B = optax.softmax_cross_entropy_with_integer_labels(logits_BN, jnp.maximum(target_B, 0))
        count = jnp.maximum(there_B.sum(), 1)
        loss += weights.get(name, 1.0) * jnp.sum(ce_B * there_B) / count
        right[name] = jnp.sum((logits_BN.argmax(-1) == target_B) & there_B) / count
    return loss, right


# ------------------------------------------------------------------------------------------------ one phase
def fit(name: str, loss_fn: Callable, trainable: dict, rest: dict, batches: Iterator, steps: int, options: PretrainConfig,
        mesh, log: list) -> dict:
    """AdamW with warm-up and cosine on `loss_fn(trainable, rest, batch) -> (loss, figures)`; returns the trained tree."""
    end = max(steps, options.warmup_steps + 1)      # a phase shorter than its warm-up never leaves it
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, options.warmup_steps, end, 0.05 * options.learning_rate)
    decays = jax.tree.map(lambda v: v.ndim >= 2, trainable)
    adamw = optax.adamw(schedule, b2=options.beta2, weight_decay=options.weight_decay, mask=decays)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)

    def step(trainable, moments, rest, batch):
        (loss, figures), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable, rest, batch)
        updates, moments = tx.update(grads, moments, trainable)
        return optax.apply_updates(trainable, updates), moments, figures | {"loss": loss}

    step = jax.jit(step, donate_argnums=(0, 1))
    moments, pending, first = jax.jit(tx.init)(trainable), None, []
    with tqdm(total=steps, desc=f"stage {name}", unit="step", mininterval=1.0) as bar:
        for n in range(steps):
            trainable, moments, figures = step(trainable, moments, rest, put_batch(next(batches), mesh))
            if n < FIRST_LOSSES:
                first.append(figures["loss"])
            if n % 25 == 24 or n == steps - 1:
                pending, figures = figures, pending        # read one report late: the host never waits for this step
                if figures:
                    bar.set_postfix(loss=f"{float(figures['loss']):.3f}")
            bar.update()
    last = {k: float(v) for k, v in pending.items()}
    if not np.isfinite(last["loss"]):
        raise HawkError(f"stage {name}: the loss is {last['loss']} after {steps} steps; lower pretrain.learning_rate")
    log.append({"phase": name, "steps": steps, **last, "first_losses": [float(loss) for loss in first]})
    return trainable


# ------------------------------------------------------------------------------------------------ the three phases
def _pictures(input, split: str) -> dict[str, np.ndarray]:
    """All clips of a split at view 0: frames_NTHWC and mask_NTHW, in the order of the data set."""
    keep = {"frames_BTHWC": [], "mask_BTHW": []}
    for batch in input.eval_batches(split):
        real = batch["weight_B"] > 0
        for key, parts in keep.items():
            parts.append(batch[key][real])
    return {key: np.concatenate(parts) for key, parts in keep.items()}


def _frame_batches(pictures: dict, labels: Labels, count: int, seed: int) -> Iterator[dict]:
    """Random single frames with their labels, as clips of one frame."""
    rng, (N, T) = np.random.default_rng([seed, 0]), pictures["mask_BTHW"].shape[:2]
    while True:
        n, t = rng.integers(0, N, count), rng.integers(0, T, count)
        yield {"frames_BTHWC": pictures["frames_BTHWC"][n, t][:, None], "mask_BTHW": pictures["mask_BTHW"][n, t][:, None],
               "crop_B4": np.tile(np.float32([0, 0, 1, 1]), (count, 1)),
               "targets": {k: v[n, t] for k, v in labels.frame.items()} | {k: v[n] for k, v in labels.clip.items()}}


def _clip_batches(features: dict, labels: Labels, count: int, seed: int) -> Iterator[dict]:
    rng, N = np.random.default_rng([seed, 1]), len(labels.rows)
    while True:
        n = rng.integers(0, N, count)
        yield {"video_BTQE": features["video_NKTQE"][n, 0], "motion_BTQE": features["motion_NKTQE"][n, 0],
               "targets": {k: v[n] for k, v in labels.clip.items()}}


def train_encoder(config: HawkConfig, params: dict, pictures: dict, labels: Labels, mesh, log: list) -> dict:
    """Phase 0a; returns params with a trained encoder."""
    options, model = config.pretrain, config.model
    heads = head_init(jax.random.key(model.seed), model.image_qformer.queries * model.image_qformer.width,
                      labels.sizes([*labels.frame, *labels.clip]))
    weights = {"class": CLASS_WEIGHT}

    def loss_fn(trainable, rest, batch):
        hawk = build.bind(model, rest | {"encoder": trainable["encoder"]})
        tokens = hawk.image_tokens(batch)
        return [head_losses(trainable["heads"], t.reshape(len(t), -1).astype(jnp.float32), batch["targets"], weights) for t in tokens]

    def both(trainable, rest, batch):
        (video, right), (motion, _) = loss_fn(trainable, rest, batch)
        return video + motion, {f"{k}_right": right[k] for k in ("class", "place", "colour_1", "kind_1", "x_1")}

    rest = {k: v for k, v in params.items() if k != "encoder"}
    batches = _frame_batches(pictures, labels, options.encoder_frames // 2, model.seed)   # each frame plain and masked
    trained = fit("0a encoder", both, {"encoder": params["encoder"], "heads": heads}, rest, batches, options.encoder_steps, options,
                  mesh, log)
    return params | {"encoder": trained["encoder"]}


def train_branches(config: HawkConfig, params: dict, features: dict, labels: Labels, mesh, log: list) -> dict:
    """Phase 0b; returns params with trained branches."""
    options, model = config.pretrain, config.model
    width, sizes = model.video_qformer.queries * model.llama.width, labels.sizes([*labels.clip])
    keys = jax.random.split(jax.random.key(model.seed + 1))
    heads = {name: head_init(key, width, sizes) for name, key in zip(("video", "motion"), keys)}
    weights = {"colour_1": COLOUR_WEIGHT, "colour_2": COLOUR_WEIGHT, "place": COLOUR_WEIGHT}

    def loss_fn(trainable, rest, batch):
        hawk = build.bind(model, rest | trainable["branches"])
        visual_BQD, _, _ = hawk.branch_tokens(batch["video_BTQE"], batch["motion_BTQE"])
        halves = dict(zip(("video", "motion"), jnp.split(visual_BQD.astype(jnp.float32), 2, axis=1)))
        parts = {k: head_losses(trainable["heads"][k], h.reshape(len(h), -1), batch["targets"], weights) for k, h in halves.items()}
        return sum(loss for loss, _ in parts.values()), {f"{k}_class_right": right["class"] for k, (_, right) in parts.items()}

    rest = {k: v for k, v in params.items() if k not in ("video", "motion")}
    branches = {k: params[k] for k in ("video", "motion")}
    trained = fit("0b branches", loss_fn, {"branches": branches, "heads": heads}, rest,
                  _clip_batches(features, labels, config.input.clips, model.seed), options.branch_steps, options, mesh, log)
    return params | trained["branches"]


def train_decoder(config: HawkConfig, params: dict, input, mesh, log: list) -> dict:
    """Phase 0c; returns params with trained branches and decoder."""
    names = ("video", "motion", "llama")

    def loss_fn(trainable, rest, batch):
        hawk = build.bind(config.model, rest | trainable)
        parts = hawk_losses(hawk(batch), batch, trainable["llama"]["lm_head"]["kernel"], config.loss)
        return total_loss(parts, config.loss), {name: mean(pair) for name, pair in parts.items()}

    rest = {k: v for k, v in params.items() if k not in names}
    trained = fit("0c decoder", loss_fn, {k: params[k] for k in names}, rest, input.train_batches(0), config.pretrain.decoder_steps,
                  config.pretrain, mesh, log)
    return params | trained


def pretrain(config: HawkConfig, labels_file: Path) -> dict:
    """Runs 0a, 0b, 0c on `config.input`'s training split and writes the frozen tree to `config.run.frozen`.

    Returns a summary: seconds and last figures of each phase, hash of the frozen tree.
    Raises HawkError if labels are missing, do not fit the data set, or a phase diverges.
    """
    from data.stream import Input  # data/ needs cv2 and grain, which importing hawk_jax.training must not
    start, log, kept = time.perf_counter(), [], config.model
    r = dataclasses.replace
    config = r(config, model=r(config.model, frozen_dtype="float32"))   # what trains here is cast when it is kept
    live = Input(r(config, input=r(config.input, features="live", conversation_share=0.5)))
    split = config.input.train_split
    labels = Labels(Path(labels_file), live.clips(split), config.prepare.frames)
    mesh = make_mesh(config.mesh)
    with use(mesh, config.mesh.strategy):
        params = build.init_params(config.model, random_key(config.model.seed, INITIAL))
        params = train_encoder(config, params, _pictures(live, split), labels, mesh, log)
        features = encode_features(config, params, live, mesh, [split])
        params = train_branches(config, params, features[split], labels, mesh, log)
        cached = Input(r(config, input=r(config.input, features="memory", conversation_share=0.5)), features=features)
        params = train_decoder(config, params, cached, mesh, log)
    _, frozen = freeze.split(params, kept)
    _, wanted = freeze.split(build.abstract_params(kept), kept)
    frozen = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), frozen, wanted)
    tree_hash = save_frozen(Path(config.run.frozen), frozen, {
        "made_by": "stage 0 on the synthetic world: toy pre-training with labels of the renderer", "phases": log})
    return {"seconds": time.perf_counter() - start, "frozen_hash": tree_hash, "frozen_folder": config.run.frozen, "phases": log}
