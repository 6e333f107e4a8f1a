"""The goldens' torch weights as a parameter tree, and the configurations they were made with.  Test code only.

Written from the key lists in the specification, apart from hawk_jax/convert/keys.py, so that the two check each other.
"""
import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from hawk_jax.config import LlamaConfig, ModelConfig, QFormerConfig, VitConfig
from hawk_jax.models import build

F32 = {"frozen_dtype": "float32", "compute_dtype": "float32", "remat": "none"}
VIT = VitConfig(image_size=56, patch_size=14, width=64, depth=3, heads=4, mlp=279)
IMAGE = QFormerConfig(queries=8, width=48, depth=4, heads=4, mlp=192, cross_attention_freq=2)
VIDEO = QFormerConfig(queries=8, width=48, depth=2, heads=4, mlp=192, cross_attention_freq=1)
GOLDEN = ModelConfig(vit=VIT, image_qformer=IMAGE, video_qformer=VIDEO, frame_positions=32, vit_copies=2, qformer_copies=2,
                     llama=LlamaConfig(vocab=480, width=64, depth=2, heads=4, mlp=172, eps=1e-5, max_positions=512),
                     pixels="unit", antialias=False, **F32)
TINY = dataclasses.replace(GOLDEN, vit_copies=1, qformer_copies=1, init="fan_in")
LLAMA = dataclasses.replace(TINY, llama=dataclasses.replace(GOLDEN.llama, vocab=101))

_BLOCK = {"attention/qkv": "attn.qkv.weight", "attention/q_bias": "attn.q_bias", "attention/v_bias": "attn.v_bias",
          "attention/output": "attn.proj", "norm1": "norm1", "norm2": "norm2", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
_LLAMA = {"attention/query": "self_attn.q_proj", "attention/key": "self_attn.k_proj", "attention/value": "self_attn.v_proj",
          "attention/output": "self_attn.o_proj", "mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj",
          "input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
_LINEAR = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def golden(shared, unit: str):
    """(weights, inputs, outputs, json) of one golden file; names without the prefix."""
    tensors = load_file(shared / "goldens" / "hawk" / f"{unit}.safetensors")
    parts = [{k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("weights/", "inputs/", "outputs/")]
    return *parts, json.loads((shared / "goldens" / "hawk" / f"{unit}.json").read_text())


def _leaf(name: str, table: dict) -> str:
    stem, _, last = name.rpartition("/")
    return table[name] if name in table else f"{table[stem]}.{_LINEAR[last]}"


def _qformer(rest: str, period: int, c: QFormerConfig) -> str:
    if rest.startswith("norm/"):
        return f"embeddings.LayerNorm.{_LINEAR[rest[5:]]}"
    kind, offset, name = rest.split("/", 2)
    layer = (period if kind == "periods" else c.depth // c.cross_attention_freq) * c.cross_attention_freq + int(offset)
    stem, _, last = name.rpartition("/")
    stem = {"norm": "output_query.LayerNorm", "mlp/fc1": "intermediate_query.dense", "mlp/fc2": "output_query.dense"}.get(stem, stem)
    stem = re.sub(r"attention/(query|key|value)", r"attention.self.\1", stem)
    stem = stem.replace("attention/output", "attention.output.dense").replace("attention/norm", "attention.output.LayerNorm")
    return f"encoder.layer.{layer}.{stem}.{_LINEAR[last]}"


def _torch(path: str, copy: int, layer: int, config: ModelConfig) -> str:
    """The authors' name of one layer of one copy of a parameter."""
    part, _, rest = path.partition("/")
    mark = "_motion" if part == "motion" or copy else ""
    if part == "llama":
        if rest.startswith("layers/"):
            return f"llama_model.model.layers.{layer}." + _leaf(rest[7:], _LLAMA)
        return "llama_model." + {"embed_tokens": "model.embed_tokens.weight", "norm/scale": "model.norm.weight",
                                 "lm_head/kernel": "lm_head.weight"}[rest]
    if part == "encoder":
        if rest.startswith("vit/blocks/"):
            return f"visual_encoder{mark}.blocks.{layer}." + _leaf(rest[11:], _BLOCK)
        if rest.startswith("vit/"):
            return f"visual_encoder{mark}." + _leaf(rest[4:], {"patch_embed": "patch_embed.proj", "cls_token": "cls_token",
                                                             "pos_embed": "pos_embed"})
        if rest.startswith("qformer/"):
            return f"Qformer{mark}.bert." + _qformer(rest[8:], layer, config.image_qformer)
        return _leaf(rest, {"ln_vision": f"ln_vision{mark}", "query_tokens": "query_tokens", "query_tokens_motion": "query_tokens_motion"})
    if rest.startswith("qformer/"):
        return f"video_Qformer{mark}.bert." + _qformer(rest[8:], layer, config.video_qformer)
    motion = "_motion" if mark else ""
    return _leaf(rest, {"frame_positions": f"video_frame_position_embedding{mark}.weight", "queries": f"video_query_tokens{mark}",
                        "proj_0": f"llama_proj{motion}_0"} | {f"{n}": f"llama_proj{motion}_last.{n}"
                                                             for n in ("encoder_0", "encoder_1", "decoder_2")})


def _convert(path: str, tensor: np.ndarray) -> np.ndarray:
    """One layer's torch tensor in this project's layout."""
    if path.endswith("attention/qkv"):
        return tensor.T.reshape(tensor.shape[1], 3, -1)
    if path.endswith("patch_embed/kernel"):
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    if path.endswith("kernel"):
        return tensor.T
    return tensor


def from_torch(weights: dict, config: ModelConfig) -> dict:
    """Parameter tree; parts a unit file does not hold are zeros."""
    axes, flat = build.flatten(build.logical_axes(config)), {}
    for path, names in axes.items():
        name = "/".join(path)
        copies = names.shape[0] if "copies" in names else 1
        layers = names.shape[names.index("layers")] if "layers" in names else 1
        leaves = [[weights.get(_torch(name, copy, layer, config)) for layer in range(layers)] for copy in range(copies)]
        if leaves[0][0] is None:
            flat[path] = jnp.zeros(names.shape)
        else:
            flat[path] = jnp.asarray(np.stack([[_convert(name, x) for x in row] for row in leaves]).reshape(names.shape), jnp.float32)
    return build._nest(flat)
