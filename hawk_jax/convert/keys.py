"""The one two-way table between parameter paths of this project and the state-dict names of the authors' PyTorch code.

Parameter paths are also the checkpoint format: they change only together with a migration.  The authors' names at real size are 1,991
entries, of which 36 are buffers (rotary inverse frequencies, position ids) that nothing here needs: `IGNORED`.

An encoder with one copy (`vit_copies=1`, `qformer_copies=1`) serves both branches.  It is written under both names, so that the
authors' model loads the result strictly, and the names of both are read, which must then agree.
"""
import difflib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from hawk_jax.config import HawkError, ModelConfig, QFormerConfig
from hawk_jax.models.build import abstract_params, flatten

IGNORED = re.compile(r"\.(position_ids|rotary_emb\.inv_freq)$")      # buffers: constants that the code computes
BRANCHES = (("video", ""), ("motion", "_motion"))                    # branch, suffix of its names


class KeyTableError(HawkError, ValueError):
    """Names, shapes or values that do not fit the table."""


class Entry(NamedTuple):
    path: tuple[str, ...]       # of the leaf in the parameter tree
    index: tuple[int, ...]      # copy, period or layer: position on the leaf's leading axes
    key: str                    # name in the state dict
    kind: str                   # name in TO_TORCH and FROM_TORCH


def _patches_to_torch(x_FM):
    """(row x column x colour, out) -> the convolution's (out, colour, row, column)."""
    side = round((x_FM.shape[0] / 3) ** 0.5)
    return x_FM.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


# What one copy of one layer becomes.  Methods only, so that numpy arrays, jax arrays and tracers all pass, and numpy makes views.
TO_TORCH = {
    "same": lambda x: x,
    "linear": lambda x: x.T,                                                # (in, out) -> (out, in)
    "patches": _patches_to_torch,
    "qkv": lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),          # (in, 3, out) -> (3 x out, in)
    "token": lambda x: x[None],                                             # torch keeps a batch axis of 1 before learned tokens
    "class": lambda x: x[None, None],
}
FROM_TORCH = {
    "same": lambda x: x,
    "linear": lambda x: x.T,
    "patches": lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    "qkv": lambda x: x.reshape(3, -1, x.shape[1]).transpose(2, 0, 1),
    "token": lambda x: x[0],
    "class": lambda x: x[0, 0],
}


# ------------------------------------------------------------------------------------------------ rows: (path, key, kind)
def _linear(path: str, key: str) -> list[tuple[str, str, str]]:
    return [(f"{path}/kernel", f"{key}.weight", "linear"), (f"{path}/bias", f"{key}.bias", "same")]


def _norm(path: str, key: str) -> list[tuple[str, str, str]]:
    return [(f"{path}/scale", f"{key}.weight", "same"), (f"{path}/bias", f"{key}.bias", "same")]


def _attention(name: str) -> list[tuple[str, str, str]]:
    return [row for part in ("query", "key", "value") for row in _linear(f"{name}/{part}", f"{name}.self.{part}")] + [
        *_linear(f"{name}/output", f"{name}.output.dense"), *_norm(f"{name}/norm", f"{name}.output.LayerNorm")]


VIT = [
    ("cls_token", "cls_token", "class"),
    ("pos_embed", "pos_embed", "token"),
    ("patch_embed/kernel", "patch_embed.proj.weight", "patches"),
    ("patch_embed/bias", "patch_embed.proj.bias", "same"),
]
VIT_BLOCK = [
    *_norm("norm1", "norm1"),
    ("attention/qkv", "attn.qkv.weight", "qkv"),
    ("attention/q_bias", "attn.q_bias", "same"),
    ("attention/v_bias", "attn.v_bias", "same"),
    *_linear("attention/output", "attn.proj"),
    *_norm("norm2", "norm2"),
    *_linear("mlp/fc1", "mlp.fc1"),
    *_linear("mlp/fc2", "mlp.fc2"),
]
QFORMER = _norm("norm", "embeddings.LayerNorm")
QFORMER_LAYER = [
    *_attention("attention"),
    *_linear("mlp/fc1", "intermediate_query.dense"),
    *_linear("mlp/fc2", "output_query.dense"),
    *_norm("norm", "output_query.LayerNorm"),
]
QFORMER_CROSS = _attention("crossattention")
PROJECTIONS = [
    *_linear("proj_0", "0"),
    *_linear("encoder_0", "last.encoder_0"),
    *_linear("encoder_1", "last.encoder_1"),
    *_linear("decoder_2", "last.decoder_2"),
]
LLAMA = [
    ("embed_tokens", "model.embed_tokens.weight", "same"),
    ("norm/scale", "model.norm.weight", "same"),
    ("lm_head/kernel", "lm_head.weight", "linear"),
]
LLAMA_LAYER = [
    ("input_norm/scale", "input_layernorm.weight", "same"),
    *[(f"attention/{ours}/kernel", f"self_attn.{theirs}_proj.weight", "linear")
      for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))],
    ("post_norm/scale", "post_attention_layernorm.weight", "same"),
    *[(f"mlp/{name}/kernel", f"mlp.{name}_proj.weight", "linear") for name in ("gate", "up", "down")],
]


# ------------------------------------------------------------------------------------------------ rows -> entries of one model
def _entries(rows, path: str, prefix: str, index: tuple[int, ...] = ()) -> Iterator[Entry]:
    for tail, key, kind in rows:
        yield Entry((*path.split("/"), *tail.split("/")), index, prefix + key, kind)


def _qformer(config: QFormerConfig, path: str, prefix: str, copy: tuple[int, ...]) -> Iterator[Entry]:
    """Periods of `cross_attention_freq` layers, of which the first has cross-attention, then the layers that fill no period."""
    yield from _entries(QFORMER, path, f"{prefix}.bert.", copy)
    whole = config.depth // config.cross_attention_freq
    for layer in range(config.depth):
        period, offset = divmod(layer, config.cross_attention_freq)
        place, index = (f"{path}/periods/{offset}", (*copy, period)) if period < whole else (f"{path}/tail/{offset}", copy)
        rows = QFORMER_LAYER + QFORMER_CROSS if offset == 0 else QFORMER_LAYER
        yield from _entries(rows, place, f"{prefix}.bert.encoder.layer.{layer}.", index)


def _encoder(config: ModelConfig, branch: int, suffix: str) -> Iterator[Entry]:
    vit, rest = (branch % config.vit_copies,), (branch % config.qformer_copies,)
    yield from _entries(VIT, "encoder/vit", f"visual_encoder{suffix}.", vit)
    for layer in range(config.vit.depth):
        yield from _entries(VIT_BLOCK, "encoder/vit/blocks", f"visual_encoder{suffix}.blocks.{layer}.", (*vit, layer))
    yield from _entries(_norm("ln_vision", f"ln_vision{suffix}"), "encoder", "", rest)
    yield from _qformer(config.image_qformer, "encoder/qformer", f"Qformer{suffix}", rest)
    leaf = "query_tokens_motion" if rest == (1,) else "query_tokens"       # two leaves: the released code trains one of them
    yield Entry(("encoder", leaf), (), f"query_tokens{suffix}", "same")


def _branch(config: ModelConfig, name: str, suffix: str) -> Iterator[Entry]:
    yield Entry((name, "frame_positions"), (), f"video_frame_position_embedding{suffix}.weight", "same")
    yield Entry((name, "queries"), (), f"video_query_tokens{suffix}", "token")
    yield from _qformer(config.video_qformer, f"{name}/qformer", f"video_Qformer{suffix}", ())
    yield from _entries(PROJECTIONS, name, f"llama_proj{suffix}_")


def table(config: ModelConfig) -> Iterator[Entry]:
    """Every state-dict entry of a model with the place its values have in the parameter tree."""
    for branch, (name, suffix) in enumerate(BRANCHES):
        yield from _encoder(config, branch, suffix)
        yield from _branch(config, name, suffix)
    yield from _entries(LLAMA, "llama", "llama_model.")
    for layer in range(config.llama.depth):
        yield from _entries(LLAMA_LAYER, "llama/layers", f"llama_model.model.layers.{layer}.", (layer,))


POSITIONS = 512         # of BERT, whose unused position_ids the Q-Formers keep


def buffers(config: ModelConfig) -> dict[str, np.ndarray]:
    """{name: constant} that the authors' modules keep in their state dict beside parameters (36 at real size)."""
    positions = np.arange(POSITIONS, dtype=np.int64)[None]
    found = {f"{name}{suffix}.bert.embeddings.position_ids": positions for name in ("Qformer", "video_Qformer") for _, suffix in BRANCHES}
    width = config.llama.width // config.llama.heads
    frequency = (1.0 / config.llama.rope_theta ** (np.arange(0, width, 2) / width)).astype(np.float32)
    return found | {f"llama_model.model.layers.{i}.self_attn.rotary_emb.inv_freq": frequency for i in range(config.llama.depth)}


# ------------------------------------------------------------------------------------------------ both ways
def _below(path: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    return not parts or any(path[:len(p)] == p for p in (tuple(part.split("/")) for part in parts))


def to_torch(params: Mapping, config: ModelConfig) -> dict:
    """Parameter tree, or some of its subtrees (only trainables, only `llama`) -> {state-dict name: array}.

    Leaves may be numpy (results are views where possible), jax arrays or tracers.  Raises KeyTableError for a leaf that the
    table does not know.
    """
    flat, tensors, used = flatten(params), {}, set()
    for entry in table(config):
        if entry.path in flat:
            tensors[entry.key] = TO_TORCH[entry.kind](flat[entry.path][entry.index])
            used.add(entry.path)
    if unknown := sorted(flat.keys() - used):
        raise KeyTableError(f"no state-dict name for parameter {named(unknown)}; "
                            + nearest("/".join(unknown[0]), {"/".join(e.path) for e in table(config)}))
    return tensors


def from_torch(tensors: Mapping, config: ModelConfig, parts: tuple[str, ...] = ()) -> dict:
    """{state-dict name: array} -> parameter tree of numpy arrays, in the dtype of the tensors, which stacked ones must share.

    parts: paths such as "llama", "video/qformer" to which the result, and what must be there, is limited; () = the whole model.
    Buffers are ignored.  Raises KeyTableError for a missing or unknown name, a wrong shape, layers of two dtypes, and two branches
    that should share one encoder but differ.
    """
    every = list(table(config))
    entries = [e for e in every if _below(e.path, parts)]
    _check_names(tensors, [e.key for e in entries], {e.key for e in every})
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(config)).items() if _below(path, parts)}
    flat, filled, first = {}, set(), {}
    for path, index, key, kind in entries:
        value, shape = FROM_TORCH[kind](_readable(tensors[key], key, kind)), shapes[path][len(index):]
        if value.shape != shape:
            expected = TO_TORCH[kind](np.broadcast_to(np.float32(0), shape)).shape
            raise KeyTableError(f"{key} has shape {tuple(tensors[key].shape)}, this model configuration needs {tuple(expected)}")
        if path not in flat:
            flat[path], first[path] = np.empty(shapes[path], value.dtype), key
        if flat[path].dtype != value.dtype:
            raise KeyTableError(f"{key} is {value.dtype.name}, {first[path]} is {flat[path].dtype.name}: both belong to {'/'.join(path)}; "
                                "give all its layers one dtype")
        if (path, index) not in filled:
            flat[path][index] = value
        elif not np.array_equal(flat[path][index], value):
            raise KeyTableError(f"{key} differs from the video branch's copy, but the configuration shares one encoder; "
                                "set model.qformer_copies=2 (and model.vit_copies=2 if the ViTs differ)")
        filled.add((path, index))
    return unflatten_dict(flat)


RANKS = {"linear": 2, "patches": 4, "qkv": 2, "token": 3, "class": 3}


def _readable(tensor, key: str, kind: str) -> np.ndarray:
    array = np.asarray(tensor)
    if array.ndim != RANKS.get(kind, array.ndim) or (kind == "qkv" and array.shape[0] % 3):
        raise KeyTableError(f"{key} has shape {array.shape}: not the layout of this kind of weight")
    return array


def _check_names(tensors: Mapping, wanted: list[str], known: set[str]) -> None:
    if missing := [key for key in wanted if key not in tensors]:
        raise KeyTableError(f"state dict lacks {named(missing)}; " + nearest(missing[0], tensors))
    if unknown := sorted(k for k in set(tensors) - known if not IGNORED.search(k)):
        raise KeyTableError(f"state dict holds {named(unknown)}, which this model configuration has no place for; "
                            + nearest(unknown[0], known))


def named(names: list) -> str:
    """The first names of a list, for a message."""
    shown = ["/".join(n) if isinstance(n, tuple) else n for n in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def nearest(name: str, known) -> str:
    """The end of a message: which known names are like this one."""
    near = difflib.get_close_matches(name, list(known), 2, 0.6)
    return f"nearest known: {', '.join(near)}" if near else "nothing known is similar"
