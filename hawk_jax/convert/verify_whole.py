"""The unit of the whole model: from pictures and token ids to losses, every gradient, and some steps of the optimiser.

What runs is training itself: `make_train_step` with the released code's options, on a batch made from the file's ids.  A gradient is
read from Adam's first moment after the first step.  Stage 1 has a caption and motion text (two decoder calls there, two segments of a
row here), stage 2 a conversation (one call).  hawk.md sections 2, 3 and 8.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from data.rows import ClipTexts, clip_row, pad_row
from data.text import IMAGE
from hawk_jax.config import HawkConfig, InputConfig, LossConfig, MeshConfig, ModelConfig, PrepareConfig, released
from hawk_jax.convert.keys import FROM_TORCH, table
from hawk_jax.convert.verify_decoder import llama_config
from hawk_jax.convert.verify_model import NUMBERS, compression, parameters, qformer_config, vit_config
from hawk_jax.convert.verify_scale import check_scales
from hawk_jax.convert.verify_text import IGNORED_LABEL, conversation_row, labels_of, optim_config, tokenizer_of
from hawk_jax.convert.verify_unit import Sheet, Unit, UnitError, load_tensors
from hawk_jax.mesh import make_mesh, use
from hawk_jax.models import build
from hawk_jax.models.hawk import HawkOutputs
from hawk_jax.training import freeze
from hawk_jax.training.losses import hawk_losses, mean, total_loss
from hawk_jax.training.optim import decay_tree
from hawk_jax.training.state import init_state
from hawk_jax.training.step import make_train_step

BOS = 1
LOSSES = {"video_language": "loss", "motion_language": "loss_motion", "consistency": "consistency_loss"}
KINDS = {"loss": "loss", "loss_motion": "loss", "consistency_loss": "cosine", "total_loss": "loss"}
STEPS = {"learning_rate": "init_lr", "min_learning_rate": "min_lr", "warmup_learning_rate": "warmup_lr", "warmup_steps": "warmup_steps",
         "steps_per_epoch": "iters_per_epoch", "epochs": "max_epoch", "weight_decay": "weight_decay", "beta1": "beta1",
         "beta2": "beta2", "eps": "eps"}
STAGE_1 = dataclasses.replace(released(HawkConfig(), 1).input, clean_captions=False)     # texts in the files are what the model was given


# ------------------------------------------------------------------------------------------------ configuration
def _model(unit: Unit) -> ModelConfig:
    llama = llama_config(unit, "llama_", "llama_rms_eps")
    image = qformer_config(unit, "num_query_token", "qformer_layers", "qformer_cross_attention_freq", "qformer_", "bert_ln_eps")
    video = dataclasses.replace(image, queries=unit.info["num_video_query_token"], depth=unit.info["video_qformer_layers"],
                                cross_attention_freq=unit.info["video_qformer_cross_attention_freq"])
    return ModelConfig(
        vit=vit_config(unit, "vit_width", "vit_depth", "vit_heads", "vit_mlp_hidden", "vit_ln_eps"), image_qformer=image,
        video_qformer=video, llama=llama, frame_positions=unit.info["max_frame_pos"],
        compress=compression(llama.width, unit.info["compressed"]), vit_copies=2, qformer_copies=2,
        train_query_tokens_motion="query_tokens_motion" in unit.info["trainable"], **NUMBERS)


def config_of(unit: Unit, captions: bool) -> HawkConfig:
    """The released options of this stage with the file's sizes; raises ConfigError for sizes that do not go together."""
    weights = unit.info["loss_weights"]
    loss = LossConfig(video_language=weights["VL"], motion_language=weights["motion"], consistency=weights["consistency"], cosine="group",
                      chunk_tokens=64, motion_language_of="motion_text" if captions else "video_language")
    return HawkConfig(prepare=PrepareConfig(frames=unit.info["frames"]), input=InputConfig(clips=unit.info["batch"]), model=_model(unit),
                      loss=loss, optim=optim_config(unit.info["optimizer_steps"], STEPS),
                      mesh=MeshConfig(strategy="replicated", data=1, fsdp=1, tensor=1))


# ------------------------------------------------------------------------------------------------ batch
def _segment(tokens_RS, slot_RS, mask_RS, labels_RS, code: int) -> dict:
    """Rows of one decoder call; the token after each position is its target where that has a label."""
    following_RS = np.pad(labels_RS[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED_LABEL)
    learned_RS = following_RS != IGNORED_LABEL
    return {"tokens_RS": tokens_RS, "slot_RS": slot_RS, "segment_RS": code * mask_RS, "targets_RS": np.where(learned_RS, following_RS, 0),
            "loss_RS": code * learned_RS, "position_RS": np.broadcast_to(np.arange(tokens_RS.shape[1]), tokens_RS.shape)}


def _caption_calls(unit: Unit, queries: int) -> list[dict]:
    """BOS | video | motion | caption, then BOS | motion | motion text."""
    calls = []
    for code, slots, name in ((1, np.arange(2 * queries), "text"), (2, np.arange(queries, 2 * queries), "text_motion")):
        ids_RS, given_RS = unit.inputs[f"{name}_ids"], unit.inputs[f"{name}_mask"]
        rows, before = len(ids_RS), 1 + len(slots)
        tokens_RS = np.concatenate([np.full((rows, 1), BOS), np.zeros((rows, len(slots)), int), ids_RS], axis=1)
        slot_RS = np.full(tokens_RS.shape, -1)
        slot_RS[:, 1:before] = slots
        mask_RS = np.concatenate([np.ones((rows, before), int), given_RS], axis=1)
        # an unk has the id of padding, and so no label
        labels_RS = np.where((tokens_RS == unit.info["pad_id"]) | (np.arange(tokens_RS.shape[1]) < before), IGNORED_LABEL, tokens_RS)
        calls.append(_segment(tokens_RS, slot_RS, mask_RS, labels_RS, code))
    return calls


def _conversation_calls(unit: Unit, queries: int) -> list[dict]:
    """The one call, in which a run of image tokens stands for the visual ones."""
    tokens_RS, slot_RS = unit.inputs["input_ids"].copy(), np.full(unit.inputs["input_ids"].shape, -1)
    image_RS = tokens_RS == unit.info["image_token_id"]
    for row, (slots, image) in enumerate(zip(slot_RS, image_RS)):
        at = np.flatnonzero(image)
        if len(at) != 2 * queries or at[-1] - at[0] != len(at) - 1:
            raise UnitError(f"row {row} of inputs/input_ids has {len(at)} image tokens, not {2 * queries} in a run")
        slots[at] = np.arange(len(at))
    tokens_RS[image_RS] = 0
    return [_segment(tokens_RS, slot_RS, unit.inputs["attention_mask"], unit.inputs["labels"], 1)]


def _pictures(unit: Unit, config: ModelConfig) -> tuple[dict, float, float]:
    """(pictures in grey levels, darkest, span): those in the file are resized already, mostly in 0..1."""
    both = {name: unit.inputs[name].astype(np.float32).transpose(0, 2, 3, 4, 1) for name in ("image", "image_motion")}
    low, high = min(float(x.min()) for x in both.values()), max(float(x.max()) for x in both.values())
    low, span = (0.0, 1.0) if 0 <= low and high <= 1 else (low, high - low)
    frames = {"frames_BTHWC": both["image"], "motion_frames_BTHWC": both["image_motion"]}
    clips, times = both["image"].shape[:2]
    return {name: 255 * ((x - low) / span) for name, x in frames.items()} | {
        "mask_BTHW": np.full((clips, times, *config.vit.picture), 255, np.uint8),
        "crop_B4": np.tile(np.float32([0, 0, 1, 1]), (clips, 1))}, low, span


def _stretched(params: dict, low: float, span: float) -> dict:
    """Parameters that see pictures of 0..1 as if they were low..low + span: pictures here are grey levels, those of a file may be noise."""
    if (low, span) == (0.0, 1.0):
        return params
    patch = params["encoder"]["vit"]["patch_embed"]
    kernel = patch["kernel"].astype(np.float64)
    new = {"kernel": (span * kernel).astype(np.float32), "bias": (patch["bias"] + low * kernel.sum(-2)).astype(np.float32)}
    return params | {"encoder": params["encoder"] | {"vit": params["encoder"]["vit"] | {"patch_embed": new}}}


def batch_of(calls: list[dict], clips: int) -> dict:
    """The calls as segments of one row, padding between them included."""
    text = {name: np.concatenate([call[name] for call in calls], axis=1).astype(np.int32) for name in calls[0]}
    clip_RS = np.broadcast_to(np.arange(clips, dtype=np.int32)[:, None], text["tokens_RS"].shape)
    return text | {"clip_RS": np.ascontiguousarray(clip_RS), "weight_B": np.ones(clips, np.float32)}


# ------------------------------------------------------------------------------------------------ forward pass
TOKENS = ("video_embeds", "motion_embeds", "middle_result", "middle_result_motion")


def _visual(params, batch, config: HawkConfig) -> dict:
    """What both branches make of the pictures, under TOKENS."""
    model, queries = build.bind(config.model, params), config.model.video_qformer.queries
    visual_BQD, video_BQZ, motion_BQZ = model.branch_tokens(*model.image_tokens(batch))
    return dict(zip(TOKENS, (visual_BQD[:, :queries], visual_BQD[:, queries:], video_BQZ, motion_BQZ)))


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, batch, config: HawkConfig):
    """(tensors by their names in the file, embedded rows, losses)."""
    model, tokens = build.bind(config.model, params), _visual(params, batch, config)
    video_BQD, motion_BQD, video_BQZ, motion_BQZ = tokens.values()
    x_RSD = model.embed_rows(batch, jnp.concatenate([video_BQD, motion_BQD], axis=1))
    outputs = HawkOutputs(model.llama.hidden(x_RSD, batch["segment_RS"], batch["position_RS"]), video_BQZ, motion_BQZ)
    losses = hawk_losses(outputs, batch, params["llama"]["lm_head"]["kernel"], config.loss)
    named = {LOSSES[name]: mean(pair) for name, pair in losses.items()} | {"total_loss": total_loss(losses, config.loss)}
    return tokens, x_RSD, named


def _labels(call: dict) -> np.ndarray:
    """What a segment's targets and codes say, in the form of labels."""
    labels_RS = np.where(call["loss_RS"] > 0, call["targets_RS"], IGNORED_LABEL)
    return np.pad(labels_RS[:, :-1], ((0, 0), (1, 0)), constant_values=IGNORED_LABEL)


def _check_forward(sheet: Sheet, calls: list[dict], found: dict, x_RSD, losses: dict) -> None:
    for name, ours in found.items():
        sheet.output("forward", name, ours)
    first = 0
    for number, call in enumerate(calls):
        rows = np.asarray(x_RSD)[:, first:first + call["tokens_RS"].shape[1]]
        first += rows.shape[1]
        sheet.output("forward", f"llama_call{number}_inputs_embeds", rows)
        sheet.output("exact", f"llama_call{number}_attention_mask", (call["segment_RS"] > 0).astype(int))
        sheet.output("exact", f"llama_call{number}_labels", _labels(call))
    for name, ours in losses.items():
        sheet.output(KINDS[name], name, np.asarray(ours)[None])


# ------------------------------------------------------------------------------------------------ texts
def _check_texts(unit: Unit, sheet: Sheet, calls: list[dict], queries: int) -> None:
    """The ids in the file as data/rows.py makes them from its texts."""
    texts = unit.info.get("texts")
    if not texts or not unit.info.get("tokenizer"):
        return
    tokenizer = tokenizer_of(unit)
    sheet.equal("image_token_id", tokenizer.specials[IMAGE], unit.info["image_token_id"])
    if "conversations" in texts:
        rows = [conversation_row(tokenizer, queries, rounds, texts.get("msg", ""), 512) for rounds in texts["conversations"]]
        for number, (row, call) in enumerate(zip(rows, [calls[0]] * len(rows))):
            _check_row(sheet, f"texts, row {number}", row, call, number)
        return
    config = dataclasses.replace(STAGE_1, max_caption_tokens=unit.info["max_txt_len"], end_symbol=unit.info["end_sym"])
    for number, (caption, motion) in enumerate(zip(texts["text_input"], texts["text_input_motion"], strict=True)):
        row = clip_row(ClipTexts(caption, direct_phrases=[motion] if motion else []), tokenizer, config, queries, clip="a", epoch=0)
        for code, call in enumerate(calls, 1):
            part = {name: x[row["segment"] == code] for name, x in row.items()}
            _check_row(sheet, f"texts, row {number}, call {code - 1}", part, call, number)


def _check_row(sheet: Sheet, name: str, row: dict, call: dict, number: int) -> None:
    """A row of this project's data against one made from the file's ids."""
    size = call["tokens_RS"].shape[1]
    if len(row["tokens"]) > size:
        sheet.equal(f"{name}, its length", len(row["tokens"]), size)
        return
    row = pad_row(row, size)
    for key in ("tokens", "slot"):
        sheet.equal(f"{name}, {key}", row[key].tolist(), call[f"{key}_RS"][number].tolist())
    sheet.equal(f"{name}, attention mask", (row["segment"] > 0).tolist(), (call["segment_RS"][number] > 0).tolist())
    sheet.equal(f"{name}, labels", labels_of(row).tolist(), _labels(call)[number].tolist())


# ------------------------------------------------------------------------------------------------ gradients and steps
@functools.lru_cache(8)
def _train_step(config: HawkConfig):
    mesh = make_mesh(config.mesh, jax.local_devices(backend="cpu")[:1])
    return mesh, make_train_step(config, mesh)


def _by_key(tree: dict, config: HawkConfig) -> dict[str, np.ndarray]:
    """{name in the state dict: our values in our layout} of a tree of trainables."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in build.flatten(tree).items()}
    return {e.key: flat[e.path][e.index] for e in table(config.model) if e.path in flat}


def _in_our_layout(unit: Unit, prefix: str, config: HawkConfig) -> dict[str, np.ndarray]:
    """{name in the state dict: its values in the file in our layout}."""
    kinds = {e.key: e.kind for e in table(config.model)}
    theirs = {name.removeprefix(prefix): x for name, x in unit.outputs.items() if name.startswith(prefix)}
    if unknown := sorted(theirs.keys() - kinds.keys()):
        raise UnitError(f"outputs/{prefix}{unknown[0]} is no parameter of this model")
    return {name: FROM_TORCH[kinds[name]](x) for name, x in theirs.items()}


def _check_tree(unit: Unit, sheet: Sheet, prefix: str, kind: str, ours: dict, before: dict | None, config: HawkConfig) -> None:
    """One group of outputs under the authors' names; `before`: both less these values."""
    for name, theirs in _in_our_layout(unit, prefix, config).items():
        sheet.seen.add(f"{prefix}{name}")
        if name.endswith(".key.bias"):
            sheet.leave_out(f"{prefix}{name}", "a key bias has no gradient, what is recorded is rounding that Adam blows up")
        elif name not in ours:
            raise UnitError(f"outputs/{prefix}{name} does not train here")
        else:
            start = 0 if before is None else before[name]
            sheet.compare(kind, f"outputs/{prefix}{name}", ours[name] - start, theirs - start)


def _check_groups(unit: Unit, sheet: Sheet, trainable: dict, config: HawkConfig) -> None:
    """Which parameters train, and which of them decay."""
    names = _by_key(trainable, config).keys()
    sheet.equal("trainable", sorted(names), sorted(unit.info["trainable"]))
    axes, _ = freeze.split(build.logical_axes(config.model), config.model)
    decays = build.flatten(decay_tree(axes))
    ours = sorted({e.key for e in table(config.model) if decays.get(e.path)})
    sheet.equal("weight_decay_params", ours, sorted(unit.info["weight_decay_params"]))


def _check_steps(unit: Unit, sheet: Sheet, trainable: dict, frozen: dict, batch: dict, config: HawkConfig) -> None:
    mesh, step = _train_step(config)
    before, count = _by_key(trainable, config), len(unit.outputs.get("steps/lr", np.zeros(1)))
    found = {name: [] for name in ("lr", *KINDS)}
    with use(mesh, config.mesh.strategy):
        state = init_state(config, mesh, jax.tree.map(np.copy, trainable))
        for number in range(count):
            state, metrics = step(state, frozen, batch)
            means = {name: float(total) / float(weight) for name, (total, weight) in metrics.items()}
            for name, key in {**{LOSSES[k]: k for k in LOSSES}, "total_loss": "loss", "lr": "learning_rate"}.items():
                found[name].append(means[key])
            if number == 0:     # Adam's first mean is (1 - beta1) x gradient
                gradients = jax.tree.map(lambda mu: np.asarray(mu, np.float64) / (1 - config.optim.beta1), state.opt_state["mu"])
                _check_tree(unit, sheet, "grad/", "gradient", _by_key(gradients, config), None, config)
    for name, values in found.items():
        if f"steps/{name}" in unit.outputs:
            sheet.seen.add(f"steps/{name}")
            theirs, label = unit.outputs[f"steps/{name}"], f"outputs/steps/{name}"
            if name == "lr":
                sheet.compare("rate", label, values, theirs)
                continue
            sheet.compare(KINDS[name], label + "[:1]", values[:1], theirs[:1])
            sheet.compare(f"later {KINDS[name]}", label + "[1:]", values[1:], theirs[1:])
    _check_tree(unit, sheet, "after_steps/", "change", _by_key(state.params, config), before, config)


# ------------------------------------------------------------------------------------------------ together
def _weights(unit: Unit) -> dict:
    """The unit's own weights, else those of the file it names."""
    if unit.weights:
        return unit.weights
    tensors = load_tensors(unit.folder / unit.info["weights_file"])
    return {name.removeprefix("weights/"): x for name, x in tensors.items() if name.startswith("weights/")}


def verify_whole(unit: Unit, sheet: Sheet) -> None:
    captions = "text_ids" in unit.inputs
    config = config_of(unit, captions)
    queries = config.model.video_qformer.queries
    calls = (_caption_calls if captions else _conversation_calls)(unit, queries)
    pictures, low, span = _pictures(unit, config.model)
    batch = jax.tree.map(jnp.asarray, batch_of(calls, config.input.clips) | pictures)
    params = _stretched(parameters(unit, sheet, config.model, (), _weights(unit)), low, span)
    _check_forward(sheet, calls, *_forward(params, batch, config))
    # the decoder does not take part in these outputs; of the weights of another file that file's own lines speak
    check_scales(unit, sheet, _visual, params, (batch,), config, TOKENS, {n: n for n in unit.weights if not n.startswith("llama_model.")})
    trainable, frozen = freeze.split(params, config.model)
    _check_groups(unit, sheet, trainable, config)
    _check_texts(unit, sheet, calls, queries)
    _check_steps(unit, sheet, trainable, frozen, batch, config)
