"""The files that HAWK's weights come in, each as a renaming into the authors' state dict, from which keys.py goes on.

  --eva            eva_vit_g.pth: the ViT without a prefix; serves both branches
  --blip2          the BLIP-2 Q-Former file: Qformer.*, query_tokens, ln_vision.*
  --llama          a Hugging Face folder of LlamaForCausalLM, and its config.json
  --video-llama    Video-LLaMA: the video Q-Former, its queries and frame positions
  --motion-qformer the motion branch's encoder where it has one of its own: a file, a copy, or drawn anew (convert/seeded.py)
  --hawk           what the authors' code saves (165 tensors), or the whole state dict
Where two files hold a name the later of this list counts, as in the authors' order of loading.  Every name of a file is taken, or matched
by a pattern of `config.weights`, or the file is refused.
"""
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hawk_jax.config import HawkConfig, LlamaConfig
from hawk_jax.convert import keys
from hawk_jax.convert.blocks import ahead, converted
from hawk_jax.convert.folder import open_weights
from hawk_jax.convert.keys import TO_TORCH, KeyTableError, table
from hawk_jax.convert.lazy import Lazy
from hawk_jax.models.build import abstract_params, flatten
from hawk_jax.training import freeze
from hawk_jax.training.frozen import Stream

FLOATS = ("float16", "bfloat16", "float32", "float64")


class Sources(NamedTuple):
    """Where the weights lie; None for what is not given."""
    eva: Path | None = None
    blip2: Path | None = None
    llama: Path | None = None
    video_llama: Path | None = None
    hawk: Path | None = None
    motion: str = ""                # "copy", "seeded", or a file; "": copy where the encoder has one copy, else it must come from a file
    ignore: tuple[str, ...] = ()    # further patterns for every file

    def places(self) -> dict[str, Path]:
        """{option: file or folder} of those given, in the order of loading."""
        motion = Path(self.motion) if self.motion not in ("", "copy", "seeded") else None
        every = {"--eva": self.eva, "--blip2": self.blip2, "--llama": self.llama, "--video-llama": self.video_llama,
                 "--motion-qformer": motion, "--hawk": self.hawk}
        return {option: Path(place) for option, place in every.items() if place is not None}


class Found(NamedTuple):
    """A tensor for one name of the state dict."""
    lazy: Lazy
    where: str          # file and name there, for people


class Layout(NamedTuple):
    names: Mapping[str, tuple[str, ...]]    # name in the file -> names in the state dict that it fills
    needed: frozenset[str]                  # names that the file must hold
    ignored: tuple[str, ...]


# ------------------------------------------------------------------------------------------------ names of each file
def _with_prefix(config: HawkConfig, prefix: str, others: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    """The state dict's names that start with `prefix`, without it; each fills the same names behind `others` too."""
    known = [e.key for e in table(config.model)]
    return {k.removeprefix(prefix): (k, *(o + k.removeprefix(prefix) for o in others)) for k in known if k.startswith(prefix)}


def _eva(config: HawkConfig) -> Layout:
    names = _with_prefix(config, "visual_encoder.", ("visual_encoder_motion.",))
    depth = str(config.model.vit.depth)
    return Layout(names, frozenset(names), tuple(p.replace("{depth}", depth) for p in config.weights.eva_ignored))


def _blip2(config: HawkConfig, copies: bool) -> Layout:
    names = {}
    for stem in ("Qformer.", "ln_vision.", "query_tokens"):
        for key in (e.key for e in table(config.model)):
            if key.startswith(stem) and not key.startswith("query_tokens_"):
                names[key] = (key, key.replace("query_tokens", "query_tokens_motion") if stem == "query_tokens"
                              else key.replace(stem, f"{stem[:-1]}_motion.", 1)) if copies else (key,)
    return Layout(names, frozenset(names), config.weights.blip2_ignored)


def _llama(config: HawkConfig) -> Layout:
    names = _with_prefix(config, "llama_model.")
    return Layout(names, frozenset(names), config.weights.llama_ignored)


def _video_llama(config: HawkConfig) -> Layout:
    stems = re.compile(r"(video_Qformer|video_query_tokens|video_frame_position_embedding)(?=\.|$)")
    names = {e.key: (e.key,) for e in table(config.model) if stems.match(e.key)}
    if config.weights.video_llama_motion == "copy":
        names = {key: (key, stems.sub(r"\1_motion", key)) for key in names}
    return Layout(names, frozenset(names), config.weights.video_llama_ignored)


def _motion(config: HawkConfig) -> Layout:
    stems = ("Qformer_motion.", "ln_vision_motion.", "query_tokens_motion", "visual_encoder_motion.")
    names = {e.key: (e.key,) for e in table(config.model) if e.key.startswith(stems)}
    needed = [n for n in names if n.startswith(("Qformer_motion.", "ln_vision_motion.")) and not matches(n, config.weights.motion_absent)]
    return Layout(names, frozenset(needed), ())


def _hawk(config: HawkConfig) -> Layout:
    names = {e.key: (e.key,) for e in table(config.model)}
    needed = {e.key for e in table(config.model) if freeze.trains(e.path, config.model)}
    return Layout(names, frozenset(n for n in needed if not matches(n, config.weights.hawk_absent)), config.weights.hawk_ignored)


@functools.lru_cache(maxsize=256)
def _pattern(text: str) -> re.Pattern:
    return re.compile(re.escape(text).replace(r"\*\*", ".*").replace(r"\*", r"[^.]*"))


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns (see WeightsConfig) is that of a name."""
    return any(_pattern(p).fullmatch(name) for p in patterns)


def place_names(layout: Layout, tensors: Mapping[str, Lazy], place: Path, ignore: tuple[str, ...]) -> tuple[dict[str, Found], list[str]]:
    """({state-dict name: tensor}, names passed over) of one file.  KeyTableError for a name that is missing or fits nowhere."""
    ignored = sorted(n for n in tensors if n not in layout.names or matches(n, ignore))
    if unknown := [n for n in ignored if not matches(n, layout.ignored + ignore) and not keys.IGNORED.search(f".{n}")]:
        raise KeyTableError(f"{place} holds {keys.named(unknown)}, which fits nowhere in this model; "
                            f"{keys.nearest(unknown[0], layout.names)}. To pass over such names: --ignore PATTERN")
    if missing := sorted(layout.needed - tensors.keys()):
        raise KeyTableError(f"{place} lacks {keys.named(missing)}; {keys.nearest(missing[0], tensors)}")
    taken = [name for name in layout.names if name in tensors and not matches(name, ignore)]
    return {key: Found(tensors[name], f"{place}: {name}") for name in taken for key in layout.names[name]}, ignored


# ------------------------------------------------------------------------------------------------ LLaMA's config.json
REFUSED = {"attention_bias": (None, False), "mlp_bias": (None, False), "hidden_act": (None, "silu"), "quantization_config": (None,),
           "partial_rotary_factor": (None, 1.0)}
SETTINGS = {"vocab": "vocab_size", "width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
            "mlp": "intermediate_size", "eps": "rms_norm_eps", "max_positions": "max_position_embeddings"}


def _positive(value, real: bool) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float) if real else int) and value > 0


def read_llama_config(folder: Path) -> tuple[LlamaConfig, bool]:
    """(decoder options that a folder's config.json states, whether its output matrix is the embedding).

    Raises KeyTableError for what the decoder cannot do: rope scaling, biases, other activations, head widths of their own.
    """
    file = Path(folder) / "config.json"
    try:
        stated = json.loads(file.read_text())
        options = {ours: stated[theirs] for ours, theirs in SETTINGS.items() if theirs != "max_position_embeddings"}
    except FileNotFoundError:
        raise KeyTableError(f"{file} is missing: heads, eps and rope base of the decoder are read from it; copy the whole folder") from None
    except (OSError, ValueError, TypeError) as error:
        raise KeyTableError(f"{file} is damaged: {error}") from error
    except KeyError as error:
        raise KeyTableError(f"{file} lacks {error.args[0]}: is it that of a LlamaForCausalLM?") from None
    odd = [theirs for ours, theirs in SETTINGS.items() if ours in options and not _positive(options[ours], ours == "eps")]
    odd += [n for n in ("rope_scaling", "rope_parameters") if not isinstance(stated.get(n) or {}, dict)]
    if odd:
        raise KeyTableError(f"{file} has {odd[0]}={stated[odd[0]]!r}, which cannot be; the file is damaged")
    if stated.get("model_type", "llama") != "llama":
        raise KeyTableError(f"{file} is of model_type {stated['model_type']!r}; only llama decoders fit")
    for name, allowed in REFUSED.items():
        if stated.get(name) not in allowed:
            raise KeyTableError(f"{file} has {name}={stated[name]!r}, which this decoder does not have; only {allowed[-1]!r} fits")
    rope = {**(stated.get("rope_scaling") or {}), **(stated.get("rope_parameters") or {})}     # transformers 4, 5
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise KeyTableError(f"{file} scales its rotary embeddings ({kind!r}), which this decoder does not do; use a model "
                            "without rope_scaling")
    if stated.get("head_dim") not in (None, options["width"] // options["heads"]):
        raise KeyTableError(f"{file} has head_dim={stated['head_dim']}; this decoder has hidden_size / num_attention_heads = "
                            f"{options['width'] // options['heads']}")
    groups = stated.get("num_key_value_heads") or options["heads"]
    theta = float(rope.get("rope_theta") or stated.get("rope_theta") or 10_000.0)
    return LlamaConfig(**options, kv_heads=None if groups == options["heads"] else groups, rope_theta=theta,
                       max_positions=stated.get("max_position_embeddings", 2048)), bool(stated.get("tie_word_embeddings", False))


# ------------------------------------------------------------------------------------------------ all files together
def _constant(value: float, shape: tuple[int, ...]) -> Found:
    return Found(Lazy(np.dtype(np.float32), shape, lambda: np.full(shape, value, np.float32)), f"constant {value:g}")


def _motion_defaults(config: HawkConfig, found: Mapping[str, Found]) -> dict[str, Found]:
    """ln_vision_motion of a motion encoder that came without."""
    width = (config.model.vit.width,)
    return {key: _constant(value, width) for key, value in (("ln_vision_motion.weight", 1.0), ("ln_vision_motion.bias", 0.0))
            if key not in found and matches(key, config.weights.motion_absent)}


def _open(option: str, place: Path) -> Mapping[str, Lazy]:
    tensors = open_weights(place)
    if option == "--llama" and read_llama_config(place)[1] and "model.embed_tokens.weight" in tensors:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}     # transformers ties them, whatever is stored
    return tensors


def gather(sources: Sources, config: HawkConfig) -> tuple[dict[str, Found], dict[str, list[str]]]:
    """({state-dict name: tensor} of all files, {option: names passed over}).  Headers only are read.  Raises LazyError."""
    own_motion = config.model.qformer_copies == 2
    layouts = {"--eva": _eva(config), "--blip2": _blip2(config, not own_motion or sources.motion == "copy"), "--llama": _llama(config),
               "--video-llama": _video_llama(config), "--motion-qformer": _motion(config), "--hawk": _hawk(config)}
    if not own_motion and sources.motion not in ("", "copy"):
        raise KeyTableError(f"--motion-qformer {sources.motion} needs model.qformer_copies=2: with one copy the video branch's serves both")
    found, passed = {}, {}
    places = sources.places()
    if sources.motion == "seeded":
        from hawk_jax.convert.seeded import seeded
        found |= {key: Found(lazy, f"seeded: {key}") for key, lazy in seeded(config.model).items()}
    for option, place in places.items():
        new, passed[option] = place_names(layouts[option], _open(option, place), place, sources.ignore)
        if option == "--hawk" and not own_motion and "query_tokens_motion" in new and "query_tokens" not in found | new:
            raise KeyTableError(f"{place} holds trained values only, not the frozen part they belong to: give --eva, --blip2 and --llama "
                                "too (a file of `export --pth full` holds all)")
        found |= new
    if own_motion and (sources.motion == "seeded" or "--motion-qformer" in places or "--hawk" in places):
        found |= _motion_defaults(config, found)
    return found, passed


def _which_option(key: str) -> str:
    if key.startswith("llama_model."):
        return "--llama FOLDER"
    if key.startswith("visual_encoder"):
        return "--eva FILE"
    if key.startswith(("Qformer_motion", "ln_vision_motion", "query_tokens_motion")):
        return "--motion-qformer copy, seeded or FILE (the released code leaves it random and saves it nowhere)"
    return "--blip2 FILE" if key.startswith(("Qformer", "ln_vision", "query_tokens")) else "--hawk FILE"


# ------------------------------------------------------------------------------------------------ tensors -> leaves
@functools.lru_cache(maxsize=4096)
def _torch_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return TO_TORCH[kind](np.broadcast_to(np.int8(0), shape)).shape


def _read(found: Found, kind: str, dtype: np.dtype) -> np.ndarray:
    """One layer's values in our layout and dtype.  KeyTableError if they are not finite."""
    values, sound = converted(found.lazy.read(), kind, dtype)
    if not sound:
        raise KeyTableError(f"{found.where} holds values that are not finite (NaN, infinite, or too large for {dtype.name}); the file was "
                            "damaged or its training went wrong")
    return values


def _stream(abstract, parts: Mapping[tuple, list]) -> Stream:
    """parts: {index on the leading axes: [(entry, found)]}; all of one place must have equal values."""
    dtype = np.dtype(abstract.dtype)
    depth = len(next(iter(parts)))

    def make(index: tuple) -> np.ndarray:
        (entry, first), *others = parts[index]
        block = _read(first, entry.kind, dtype)
        for other_entry, other in others:
            if other.lazy is not first.lazy and not np.array_equal(block, _read(other, other_entry.kind, dtype)):
                raise KeyTableError(f"{other.where} differs from the video branch's copy, but the configuration shares one encoder; set "
                                    "model.qformer_copies=2 (and model.vit_copies=2 if the ViTs differ)")
        return block
    return Stream(dtype, tuple(abstract.shape), lambda: ahead(make, np.ndindex(*abstract.shape[:depth])))


def _check_tensor(found: Found, kind: str, shape: tuple[int, ...]) -> None:
    if tuple(found.lazy.shape) != (wanted := _torch_shape(kind, shape)):
        raise KeyTableError(f"{found.where} has shape {list(found.lazy.shape)}, this model configuration needs {list(wanted)}")
    if found.lazy.dtype.name not in FLOATS:
        raise KeyTableError(f"{found.where} has dtype {found.lazy.dtype.name}: weights are {', '.join(FLOATS)}")


def streams(found: Mapping[str, Found], config: HawkConfig) -> dict[tuple[str, ...], Stream]:
    """{path: leaf, ready to be read layer by layer}; trainable leaves without any tensor are left out.

    KeyTableError for a frozen place that no file fills, a shape that does not fit, and a stacked leaf of two dtypes.
    """
    shapes, parts, missing = flatten(abstract_params(config.model)), {}, {}
    for entry in table(config.model):
        if entry.key not in found:
            missing.setdefault(entry.path, []).append(entry)
            continue
        tensor, places = found[entry.key], parts.setdefault(entry.path, {})
        _check_tensor(tensor, entry.kind, shapes[entry.path].shape[len(entry.index):])
        if places and (other := next(iter(places.values()))[0][1]).lazy.dtype != tensor.lazy.dtype:
            raise KeyTableError(f"{tensor.where} is {tensor.lazy.dtype.name}, {other.where} is {other.lazy.dtype.name}: both belong to "
                                f"{'/'.join(entry.path)}; give all its layers one dtype")
        places.setdefault(entry.index, []).append((entry, tensor))
    for path, entries in missing.items():
        lost = [e for e in entries if e.index not in parts.get(path, {})]
        if lost and (path in parts or not freeze.trains(path, config.model)):
            raise KeyTableError(f"no file holds {lost[0].key}; give {_which_option(lost[0].key)}")
    return {path: _stream(shapes[path], places) for path, places in parts.items()}
