"""A run's weights for PyTorch: safetensors files with the authors' key names, and the decoder as a folder `transformers` opens.

  OUT/hawk_trainable.safetensors   what training changed: the names of a released HAWK checkpoint
  OUT/encoder.safetensors          ViT, ln_vision, image Q-Former and queries of both branches (the same values twice where one copy
                                   serves both, so that the authors' model loads strictly)
  OUT/llama/                       the decoder in Hugging Face layout: names without `llama_model.`, config.json, tokenizer
  OUT/hawk_config.json             the resolved configuration of the run
  OUT/manifest.json                files with size, sha256 and number of tensors; versions of this table
Buffers (position_ids, inv_freq) are not written: PyTorch modules make them.
"""
import json
import shutil
from pathlib import Path

import jax
import numpy as np
from sentencepiece import sentencepiece_model_pb2

from data.text import BOS, EMBEDDED, EOS, UNK
from hawk_jax.config import HawkConfig, HawkError, LlamaConfig, digest, from_dict, to_dict
from hawk_jax.convert import torch_files
from hawk_jax.convert.keys import from_torch, table, to_torch
from hawk_jax.models.build import abstract_params, flatten
from hawk_jax.training import freeze
from hawk_jax.training.frozen import put_in_place

FORMAT = 1
PREFIX = "llama_model."


def llama_config(c: LlamaConfig, dtype: str) -> dict:
    """config.json of a LLaMA of this size, as transformers writes it."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab, "hidden_size": c.width,
            "intermediate_size": c.mlp, "num_hidden_layers": c.depth, "num_attention_heads": c.heads, "num_key_value_heads": c.heads,
            "hidden_act": "silu", "rms_norm_eps": c.eps, "rope_theta": c.rope_theta, "max_position_embeddings": c.max_positions,
            "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": BOS, "eos_token_id": EOS,
            "pad_token_id": UNK, "torch_dtype": dtype}


TOKENIZER_CONFIG = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                    "pad_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": True,
                    "clean_up_tokenization_spaces": False}


def _write_tokenizer(folder: Path, config: HawkConfig) -> list[Path]:
    """Copies the sentencepiece model, if the run has one, and says how transformers opens it.

    transformers takes every LLaMA tokenizer for BPE and would split texts otherwise with a unigram model (the embedded one): that one
    comes without settings and is read with sentencepiece.
    """
    source = EMBEDDED if config.input.tokenizer == "embedded" else Path(config.input.tokenizer or "none")
    if not source.is_file():
        return []
    shutil.copyfile(source, folder / "tokenizer.model")
    model = sentencepiece_model_pb2.ModelProto.FromString(source.read_bytes())
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        return [folder / "tokenizer.model"]
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=1))
    return [folder / "tokenizer.model", folder / "tokenizer_config.json"]


def _write_llama(folder: Path, tensors: dict, config: HawkConfig) -> dict[Path, int]:
    """{file: number of tensors}."""
    folder.mkdir()
    named = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    counts = {file: len(named) if i == 0 else 0 for i, file in enumerate(torch_files.write(folder, "model", named))}
    (folder / "config.json").write_text(json.dumps(llama_config(config.model.llama, config.model.frozen_dtype), indent=1))
    return counts | dict.fromkeys([folder / "config.json", *_write_tokenizer(folder, config)], 0)


def _groups(config: HawkConfig) -> dict[str, str]:
    """{state-dict name: "trainable", "encoder" or "llama"}: what trains by the freeze rules, else by part of the tree."""
    return {e.key: "trainable" if freeze.trains(e.path, config.model) else e.path[0] for e in table(config.model)}


def _write_all(folder: Path, params: dict, config: HawkConfig) -> dict[Path, int]:
    tensors, groups = to_torch(jax.tree.map(np.asarray, params), config.model), _groups(config)
    parts = {name: {k: v for k, v in tensors.items() if groups[k] == name} for name in ("trainable", "encoder", "llama")}
    counts = {}
    for stem, part in (("hawk_trainable", "trainable"), ("encoder", "encoder")):
        files = torch_files.write(folder, stem, parts[part])
        counts |= {file: len(parts[part]) if i == 0 else 0 for i, file in enumerate(files)}
    counts |= _write_llama(folder / "llama", parts["llama"], config)
    (folder / "hawk_config.json").write_text(json.dumps(to_dict(config), indent=1))
    return counts | {folder / "hawk_config.json": 0}


def _is_export(folder: Path) -> bool:
    """Whether a folder holds an export.  A frozen tree has a manifest of the same name, and must not be replaced."""
    try:
        return "files" in json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return False


def export(params: dict, config: HawkConfig, out: Path) -> str:
    """Writes a whole parameter tree to `out`; returns one line that says what was written.

    The folder appears whole or not at all and replaces an earlier export.  Raises HawkError if `out` holds anything else, if the tree
    is incomplete, or if several processes run: each would hold only its part of the weights.
    """
    out = Path(out)
    if jax.process_count() > 1:
        raise HawkError("export runs in one process (on all of its devices): start it without a launcher")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not _is_export(out):
        raise HawkError(f"{out} exists and holds no export; name another folder")
    if missing := sorted(flatten(abstract_params(config.model)).keys() - flatten(params).keys()):
        raise HawkError(f"the parameters lack {'/'.join(missing[0])} and {len(missing) - 1} more: an export needs the whole model")
    new = out.with_name(f".{out.name}.writing")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    counts = _write_all(new, params, config)
    files = {str(file.relative_to(new)): {"bytes": file.stat().st_size, "sha256": torch_files.sha256(file), "tensors": count}
             for file, count in counts.items()}
    manifest = {"format": FORMAT, "names": "state dict of the authors' PyTorch code", "config_digest": digest(config), "files": files,
                "tensors": sum(counts.values())}
    (new / "manifest.json").write_text(json.dumps(manifest, indent=1))
    put_in_place(new, out)
    size = sum(entry["bytes"] for entry in files.values())
    return f"{manifest['tensors']} tensors in {len(files)} files, {size / 1e6:.1f} MB, in {out}"


def read_export(folder: Path) -> tuple[dict, HawkConfig]:
    """(parameter tree of numpy arrays, configuration) of an export, every file checked against the manifest.

    Raises HawkError for a missing or newer manifest, a file that is not what it says, and tensors that do not fit the configuration.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise HawkError(f"{folder} is not an export (manifest.json: {error})") from error
    if not {"format", "files"} <= manifest.keys():
        raise HawkError(f"{folder} is not an export (its manifest.json is of something else)")
    if manifest["format"] > FORMAT:
        raise HawkError(f"{folder} was written in format {manifest['format']}, this version reads up to {FORMAT}; update hawk_jax")
    torch_files.check(folder, manifest["files"])
    weights = [folder / name for name in manifest["files"] if name.endswith(".safetensors")]
    tensors = torch_files.read(file for file in weights if file.parent == folder)
    llama = torch_files.read(file for file in weights if file.parent != folder)
    config = from_dict(HawkConfig, json.loads((folder / "hawk_config.json").read_text()))
    return from_torch(tensors | {PREFIX + key: value for key, value in llama.items()}, config.model), config
