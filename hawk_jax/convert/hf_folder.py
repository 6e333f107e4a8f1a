"""The exported folder without its tensors: configurations, processor settings, tokenizer, model code, model card.

  config.json, generation_config.json       for AutoModel (`HawkModel`); stop tokens of the run
  preprocessor_config.json                  for AutoProcessor: sizes, mask, prompt templates of data/prompts.py
  modeling_, vision_, processing_, videos_hawk.py     plain PyTorch, copied from hawk_jax/convert/huggingface
  tokenizer.model, tokenizer_config.json    where the run has a tokenizer
  llama/config.json, generation_config.json, tokenizer    the decoder alone, as transformers' LlamaForCausalLM
  README.md                                 model card
Weights are written by hawk_jax/convert/export.py, vision.pt2 by vision_graph.py.
"""
import json
import shutil
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

from data import prompts
from data.text import BOS, EMBEDDED, EOS, UNK, Tokenizer
from hawk_jax.config import HawkConfig, LlamaConfig, ModelConfig, to_dict

CODE = Path(__file__).parent / "huggingface"
MODULES = ("modeling_hawk.py", "vision_hawk.py", "processing_hawk.py", "videos_hawk.py")
DECODER = "llama"                   # subfolder of the decoder
AUTO_MAP = {"AutoConfig": "modeling_hawk.HawkConfig", "AutoModel": "modeling_hawk.HawkModel",
            "AutoProcessor": "processing_hawk.HawkProcessor"}
# options of the model that decide its forward pass
FORWARD = ("vit", "image_qformer", "video_qformer", "llama", "frame_positions", "compress", "vit_copies", "qformer_copies", "pixels",
           "overshoot", "antialias")
TOKENIZER_CONFIG = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                    "pad_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": True,
                    "clean_up_tokenization_spaces": False}


# ------------------------------------------------------------------------------------------------ contents
def model_config(c: ModelConfig) -> dict:
    """config.json of the whole model.  Opened without a dtype it is held in `compute_dtype`, norms in float32."""
    options = to_dict(c)
    return {"architectures": ["HawkModel"], "model_type": "hawk", "auto_map": AUTO_MAP, "dtype": c.compute_dtype,
            **{name: options[name] for name in FORWARD}}


def llama_config(c: LlamaConfig, dtype: str) -> dict:
    """config.json of a LLaMA of this size, as transformers writes it."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab, "hidden_size": c.width,
            "intermediate_size": c.mlp, "num_hidden_layers": c.depth, "num_attention_heads": c.heads,
            "num_key_value_heads": c.kv_heads or c.heads, "hidden_act": "silu", "rms_norm_eps": c.eps, "rope_theta": c.rope_theta,
            "max_position_embeddings": c.max_positions, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
            "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": UNK, "torch_dtype": dtype}


def generation_config(config: HawkConfig) -> dict:
    """As the run generates, until `</s>` or the end symbol of the run's captions."""
    stop_ids = {EOS}
    if tokenizer_file(config) is not None:
        stop_ids.add(int(Tokenizer(config.input.tokenizer).ending(config.input.end_symbol, "")[-1]))
    g = config.generate
    beams = {"num_beams": g.beams, "length_penalty": g.length_penalty} if g.beams > 1 else {}
    return {"bos_token_id": BOS, "eos_token_id": sorted(stop_ids) if len(stop_ids) > 1 else EOS, "pad_token_id": UNK,
            "do_sample": False, "max_new_tokens": g.max_new_tokens, **beams}


def processor_config(config: HawkConfig) -> dict:
    """preprocessor_config.json: how a video becomes frames and masks, and a question tokens, in training."""
    p, i, released = config.prepare, config.input, config.input.prompt == "released"
    pictures = {"size": p.size, "frames": p.frames, "jpeg_quality": p.jpeg_quality, "mask": i.mask, "mask_threshold": p.mask_threshold,
                "first_motion_index": i.first_motion_index, "max_frames": p.max_frames, "max_pixels": p.max_pixels}
    templates = {
        "system": prompts.SYSTEM, "round": prompts.ROUND, "times": prompts.TIMES, "description": prompts.DESCRIPTION_QUESTIONS[0],
        "question": prompts.RELEASED_QUESTION if released else prompts.PAPER_QUESTION,
        "chat": prompts.RELEASED_CHAT if released else prompts.PAPER_QUESTION,
        "caption": prompts.RELEASED_CAPTION if released else prompts.PAPER_CAPTION}
    text = {"queries": config.model.video_qformer.queries, "conversation": i.conversation_share > 0, "system_prompt": i.system_prompt,
            "text_mask": i.text_mask, "end_symbol": i.end_symbol, "templates": templates}
    return {"auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}, "pictures": pictures, "text": text}


def tokenizer_file(config: HawkConfig) -> Path | None:
    """The run's sentencepiece model, None if it has none."""
    path = EMBEDDED if config.input.tokenizer == "embedded" else Path(config.input.tokenizer or "none")
    return path if path.is_file() else None


CARD = """---
library_name: transformers
tags: [video, anomaly, custom_code]
---
# HAWK: questions about what goes wrong in a video

A video and its motion go through two branches (EVA ViT, image Q-Former, video Q-Former, linear projections) into {tokens} tokens that
a LLaMA decoder reads. {frames} frames of {size} x {size} pixels are shown, spread evenly over the video.

```python
from transformers import AutoModel
model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)                     # dtype="float32" or "bfloat16"
print(model.generate("car.mp4", "What is unusual in the video?"))                       # one answer in a list
print(model.generate("car.mp4", ["What happens?", "Who is involved?"]))                 # the video is encoded once
print(model.generate(["a.mp4", "b.mp4"]))                                               # no question: a description of each
print(model.generate("car.mp4", "And then?", history=[("What happens?", "A car turns.")]))
model.to("cuda")                                                                        # pictures and prompts follow
```

It needs `torch transformers>=5 safetensors av opencv-python numpy pillow sentencepiece`. Options of transformers' `generate` are handed
on: `num_beams=4`, `do_sample=True, top_p=0.9, temperature=0.7`, `max_new_tokens=64`.

In parts, for a server:

```python
from transformers import AutoProcessor, LlamaForCausalLM
inputs = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)("car.mp4", "What happens?")
embeds, mask = model.prompt_embeds(inputs)                                              # padding on the left
decoder = LlamaForCausalLM.from_pretrained("FOLDER/llama", dtype=model.dtype)           # plain LLaMA, knows nothing of videos
ids = decoder.generate(inputs_embeds=embeds, attention_mask=mask)
text = model.processor.decode(ids[0].tolist())
```

`llama/` alone is what servers of language models take with prompt embeddings in place of tokens (vLLM: `--enable-prompt-embeds`); that
is not tested here. `vision.pt2`, where present, is the part before the decoder as a `torch.export` program: (u8 frames [B, {frames},
{size}, {size}, 3], u8 masks [B, {frames}, {size}, {size}], u8 motion frames as the first; without their own, the frames again) ->
float32 visual tokens [B, {tokens}, {width}].

Answers can be wrong. The model describes what it was trained to describe and gives no probabilities; it is no alarm system.
"""


# ------------------------------------------------------------------------------------------------ files
def _json(path: Path, content: dict) -> Path:
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _copy(source: Path, folder: Path) -> Path:
    return Path(shutil.copyfile(source, folder / source.name))


def write_tokenizer(folder: Path, config: HawkConfig) -> list[Path]:
    """Copies the sentencepiece model, if the run has one, and says how transformers opens it.

    transformers takes every LLaMA tokenizer for BPE and would split texts otherwise with a unigram model (the embedded one): that one
    comes without settings and is read with sentencepiece.
    """
    source = tokenizer_file(config)
    if source is None:
        return []
    target = folder / "tokenizer.model"
    shutil.copyfile(source, target)
    model = sentencepiece_model_pb2.ModelProto.FromString(source.read_bytes())
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        return [target]
    return [target, _json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)]


def write_llama(folder: Path, config: HawkConfig) -> list[Path]:
    """Everything of the decoder's folder but its weights."""
    folder.mkdir(exist_ok=True)
    return [_json(folder / "config.json", llama_config(config.model.llama, config.model.frozen_dtype)),
            _json(folder / "generation_config.json", generation_config(config)), *write_tokenizer(folder, config)]


def write_folder(folder: Path, config: HawkConfig) -> list[Path]:
    """Writes all files of the head of this module into an existing folder; returns them."""
    folder = Path(folder)
    card = CARD.format(tokens=2 * config.model.video_qformer.queries, frames=config.prepare.frames, size=config.prepare.size,
                       width=config.model.llama.width)
    (folder / "README.md").write_text(card)
    return [_json(folder / "config.json", model_config(config.model)), _json(folder / "generation_config.json", generation_config(config)),
            _json(folder / "preprocessor_config.json", processor_config(config)), *write_tokenizer(folder, config),
            *[_copy(CODE / name, folder) for name in MODULES], folder / "README.md", *write_llama(folder / DECODER, config)]
