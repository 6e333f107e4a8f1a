"""Units of the encoder and the branches: EVA ViT with ln_vision, image Q-Former, video Q-Former, projections.

A unit file holds some parts of a model only; the model is bound whole, with zeros where nothing is given, so that what runs is what
training and generation run.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from hawk_jax.config import LlamaConfig, ModelConfig, QFormerConfig, VitConfig
from hawk_jax.convert.keys import IGNORED, from_torch, table
from hawk_jax.convert.verify_scale import check_scales
from hawk_jax.convert.verify_unit import Sheet, Unit, UnitError
from hawk_jax.models import build
from hawk_jax.models.eva_vit import patches
from hawk_jax.models.hawk import LN_VISION_EPS
from hawk_jax.training.losses import consistency_terms

NUMBERS = {"pixels": "unit", "antialias": False, "frozen_dtype": "float32", "compute_dtype": "float32", "remat": "none"}
_ONE = QFormerConfig(queries=1, width=2, depth=1, heads=1, mlp=1, cross_attention_freq=1)
# for the parts that a file does not speak of
LEAST = {"vit": VitConfig(image_size=1, patch_size=1, width=2, depth=1, heads=1, mlp=1), "image_qformer": _ONE, "video_qformer": _ONE,
         "llama": LlamaConfig(vocab=3, width=2, depth=1, heads=1, mlp=1, max_positions=1), "frame_positions": 1, "compress": 1}


def model_config(**parts) -> ModelConfig:
    return ModelConfig(**(LEAST | NUMBERS | parts))


def vit_config(unit: Unit, width: str, depth: str, heads: str, hidden: str, eps: str) -> VitConfig:
    """From the fields with these names."""
    i = unit.info
    height, across = i["image_size"]
    c = VitConfig(image_size=height, image_width=across, patch_size=i["patch_size"], width=i[width], depth=i[depth], heads=i[heads],
                  mlp=i[hidden], eps=i[eps])
    if height % c.patch_size or across % c.patch_size or c.width % c.heads:
        raise UnitError(f"image_size {height}x{across} with patches of {c.patch_size}, or width {c.width} with {c.heads} heads, does not "
                        "come out even")
    for field, value in (("grid", [*c.grid]), ("ln_vision_eps", LN_VISION_EPS), ("final_norm", False)):
        unit.expect(field, value)
    return c


def qformer_config(unit: Unit, queries: str, layers: str, freq: str, prefix: str = "", eps: str = "layer_norm_eps") -> QFormerConfig:
    i = unit.info
    c = QFormerConfig(queries=i[queries], width=i[f"{prefix}hidden"], depth=i[layers], heads=i[f"{prefix}heads"],
                      mlp=i[f"{prefix}intermediate"], cross_attention_freq=i[freq], eps=i[eps])
    if c.width % c.heads:
        raise UnitError(f"{prefix}hidden {c.width} is not a multiple of {prefix}heads {c.heads}")
    return c


# ------------------------------------------------------------------------------------------------ weights
def parameters(unit: Unit, sheet: Sheet, config: ModelConfig, parts: tuple[str, ...], weights: dict | None = None) -> dict:
    """The tree of these parts; each weight of the file must have a place in them or be a buffer, and buffers are checked.

    weights: under the authors' names, where the file's own are others.
    """
    weights = {name: x if x.dtype.kind != "f" else x.astype(np.float32) for name, x in (weights or unit.weights).items()}
    places = {e.key for e in table(config) if not parts or any(e.path[:len(p)] == p for p in (tuple(q.split("/")) for q in parts))}
    for name in sorted(weights.keys() - places):
        if not IGNORED.search(name):
            raise UnitError(f"weights/{name} has no place in this unit")
        _check_buffer(sheet, name, weights[name], config)
    return from_torch({name: weights[name] for name in weights.keys() & places}, config, parts)


def _check_buffer(sheet: Sheet, name: str, value: np.ndarray, config: ModelConfig) -> None:
    if name.endswith("position_ids"):
        sheet.compare("exact", f"weights/{name}", np.arange(value.shape[-1])[None], value)
        return
    width = config.llama.width // config.llama.heads
    sheet.compare("buffer", f"weights/{name}", config.llama.rope_theta ** -(np.arange(0, width, 2) / width), value)


def for_both(weights: dict) -> dict:
    """Names of one encoder for the two branches that it serves."""
    both = {}
    for name, value in weights.items():
        plain = name.replace("_motion", "", 1)
        if plain in both:
            raise UnitError(f"weights/{name} is there for both branches: this unit is about one of them")
        head, dot, tail = plain.partition(".")
        both |= {plain: value, f"{head}_motion{dot}{tail}": value}
    return both


def bound(config: ModelConfig, params: dict) -> build.Hawk:
    """The model with these parameters, zeros elsewhere; for use inside `jax.jit`."""
    given = build.flatten(params)
    flat = {path: given[path] if path in given else jnp.zeros(leaf.shape, leaf.dtype)
            for path, leaf in build.flatten(build.abstract_params(config)).items()}
    return build.bind(config, unflatten_dict(flat))


def _check(unit: Unit, sheet: Sheet, forward, last, params: dict, x, config: ModelConfig) -> None:
    """All outputs of a part by `forward`, then the scales of its weights by what `last` alone computes."""
    for name, ours in forward(params, x, config).items():
        sheet.output("forward", name, ours)
    names = {name.replace("_motion", "", 1): name for name in unit.weights}
    check_scales(unit, sheet, last, params, (x,), config, ("ln_vision", "last_hidden_state"), names)


def only(module):
    """The one copy of a part that serves both branches."""
    return jax.tree.map(lambda leaf: leaf[0], module)


def layer(stack, number: int):
    return jax.tree.map(lambda leaf: leaf[number], stack)


# ------------------------------------------------------------------------------------------------ ViT
@functools.partial(jax.jit, static_argnames="config")
def _vit(params, image_BCHW, config: ModelConfig):
    encoder = bound(config, params).encoder
    vit, pictures_NHWC = only(encoder.vit), image_BCHW.transpose(0, 2, 3, 1)
    first = only(encoder.vit)
    first.blocks = jax.tree.map(lambda leaf: leaf[:1], first.blocks)
    found = {"patch_embed": vit.patch_embed(patches(pictures_NHWC, config.vit.patch_size)), "block_0": first(pictures_NHWC)}
    for number in range(1, config.vit.depth):
        found[f"block_{number}"] = layer(vit.blocks, number)(found[f"block_{number - 1}"], jnp.float32)
    features_NPM = vit(pictures_NHWC)
    return found | {"features": features_NPM, "ln_vision": only(encoder.ln_vision)(features_NPM)}


def _vit_last(params, image_BCHW, config: ModelConfig) -> dict:
    encoder = bound(config, params).encoder
    return {"ln_vision": only(encoder.ln_vision)(only(encoder.vit)(image_BCHW.transpose(0, 2, 3, 1)))}


def verify_vit(unit: Unit, sheet: Sheet) -> None:
    config = model_config(vit=vit_config(unit, "width", "depth", "heads", "mlp_hidden", "block_ln_eps"))
    unit.expect("head_dim", config.vit.width // config.vit.heads)
    params = parameters(unit, sheet, config, ("encoder/vit", "encoder/ln_vision"), for_both(unit.weights))
    _check(unit, sheet, _vit, _vit_last, params, unit.inputs["image"], config)


# ------------------------------------------------------------------------------------------------ Q-Formers
def _states(qformer, queries_QE, source_BUE) -> dict:
    """The Q-Former's result, and its states layer by layer: periods of layers, then those that fill none."""
    found = {"last_hidden_state": qformer(queries_QE, source_BUE)}
    x_QE = qformer.norm(queries_QE)
    x_BQE = found["hidden_0"] = jnp.broadcast_to(x_QE, (source_BUE.shape[0], *x_QE.shape))
    count, _ = divmod(qformer.config.depth, qformer.config.cross_attention_freq)
    layers = [layer(stack, period) for period in range(count) for stack in qformer.periods]
    for number, module in enumerate([*layers, *qformer.tail], 1):
        x_BQE = found[f"hidden_{number}"] = module(x_BQE, source_BUE)
    return found


@functools.partial(jax.jit, static_argnames="config")
def _image_qformer(params, source_BUE, config: ModelConfig):
    encoder = bound(config, params).encoder
    return _states(only(encoder.qformer), encoder.query_tokens[...][0], source_BUE)


def _image_last(params, source_BUE, config: ModelConfig) -> dict:
    encoder = bound(config, params).encoder
    return {"last_hidden_state": only(encoder.qformer)(encoder.query_tokens[...][0], source_BUE)}


def verify_image_qformer(unit: Unit, sheet: Sheet) -> None:
    qformer = qformer_config(unit, "queries", "layers", "cross_attention_freq")
    unit.expect("cross_attention_layers", [*range(0, qformer.depth, qformer.cross_attention_freq)])
    vit = VitConfig(image_size=1, patch_size=1, width=unit.info["encoder_width"], depth=1, heads=1, mlp=1)
    config = model_config(vit=vit, image_qformer=qformer)
    params = parameters(unit, sheet, config, ("encoder/qformer", "encoder/query_tokens"), for_both(unit.weights))
    _check(unit, sheet, _image_qformer, _image_last, params, unit.inputs["image_embeds"], config)


def _positioned(video, tokens_BTQE):
    times, queries, width = tokens_BTQE.shape[1:]
    return (tokens_BTQE + video.frame_positions[:times, None]).reshape(-1, times * queries, width)


def _video_last(params, tokens_BTQE, config: ModelConfig) -> dict:
    video = bound(config, params).video
    return {"last_hidden_state": video.qformer(video.queries[...], _positioned(video, tokens_BTQE))}


@functools.partial(jax.jit, static_argnames="config")
def _video_qformer(params, tokens_BTQE, config: ModelConfig):
    video = bound(config, params).video
    source_BUE = _positioned(video, tokens_BTQE)
    return {"frame_hidden_state": source_BUE} | _states(video.qformer, video.queries[...], source_BUE)


def verify_video_qformer(unit: Unit, sheet: Sheet) -> None:
    qformer, i = qformer_config(unit, "queries", "layers", "cross_attention_freq"), unit.info
    unit.expect("encoder_width", qformer.width)
    unit.expect("cross_attention_layers", [*range(0, qformer.depth, qformer.cross_attention_freq)])
    if i["frames"] > i["max_frame_pos"]:
        raise UnitError(f"frames {i['frames']} exceeds max_frame_pos {i['max_frame_pos']}")
    config = model_config(video_qformer=qformer, frame_positions=i["max_frame_pos"])
    weights = {name.replace("_motion", "", 1): value for name, value in unit.weights.items()}
    if len(weights) < len(unit.weights):
        raise UnitError("weights/ holds both branches: this unit is about one of them")
    params = parameters(unit, sheet, config, ("video/frame_positions", "video/queries", "video/qformer"), weights)
    tokens_BTQE = unit.inputs["frame_tokens"].reshape(-1, i["frames"], i["tokens_per_frame"], qformer.width)
    _check(unit, sheet, _video_qformer, _video_last, params, tokens_BTQE, config)


# ------------------------------------------------------------------------------------------------ projections
def compression(width: int, compressed: int) -> int:
    """The divisor that makes `compressed` of `width`."""
    for divisor in range(1, width + 1):
        if width // divisor == compressed:
            return divisor
    raise UnitError(f"compressed {compressed} is no whole fraction of llama_hidden {width}")


@functools.partial(jax.jit, static_argnames="config")
def _projections(params, hidden_BQE, motion_BQE, config: ModelConfig):
    hawk, found = bound(config, params), {}
    for branch, x_BQE, mark in ((hawk.video, hidden_BQE, ""), (hawk.motion, motion_BQE, "_motion")):
        visual_BQD, compressed_BQZ = branch.project(x_BQE)
        found |= {f"proj_0{mark}": branch.proj_0(x_BQE), f"inputs_llama{mark}": visual_BQD, f"middle_result{mark}": compressed_BQZ}
    clips = hidden_BQE.shape[0]
    cosine = consistency_terms(found["middle_result"], found["middle_result_motion"], jnp.ones(clips), clips)
    return found, cosine


def verify_projection(unit: Unit, sheet: Sheet) -> None:
    i = unit.info
    width, llama = i["qformer_hidden"], LlamaConfig(vocab=3, width=i["llama_hidden"], depth=1, heads=1, mlp=1, max_positions=1)
    qformer = QFormerConfig(queries=1, width=width, depth=1, heads=1, mlp=1, cross_attention_freq=1)
    config = model_config(video_qformer=qformer, llama=llama, compress=compression(llama.width, i["compressed"]))
    parts = tuple(f"{branch}/{name}" for branch in ("video", "motion") for name in ("proj_0", "encoder_0", "encoder_1", "decoder_2"))
    params = parameters(unit, sheet, config, parts)
    found, cosine = _projections(params, unit.inputs["video_hidden"], unit.inputs["video_hidden_motion"], config)
    for name, ours in found.items():
        sheet.output("forward", name, ours)
    sheet.output("cosine", "cosine_consistency", cosine)
