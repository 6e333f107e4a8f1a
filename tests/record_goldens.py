"""Records unit files in the format of the shared goldens with other sizes and seeds, from PyTorch.  Test code only.

The decoder is transformers' LlamaForCausalLM with its own generate; encoder and branches are the modules of the exported folder, which are
tested against the authors' goldens; gradients are torch's, steps torch.optim.AdamW's, flow OpenCV's, resizing F.interpolate's.
"""
import json
import math
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

from hawk_jax.convert.huggingface.modeling_hawk import HawkConfig, HawkModel

# No two of these agree where that could hide a mistake; the picture is not square, and neither depth is a multiple of its frequency.
VIT = dict(image_size=28, image_width=42, patch_size=14, width=32, depth=2, heads=2, mlp=40, eps=1e-6)
IMAGE = dict(queries=6, width=24, depth=5, heads=3, mlp=44, cross_attention_freq=2, dropout=0.0, eps=1e-12)
VIDEO = IMAGE | dict(queries=4, depth=2, cross_attention_freq=3)
LLAMA = dict(vocab=90, width=36, depth=3, heads=3, kv_heads=None, mlp=52, eps=1e-6, rope_theta=5000.0, max_positions=64)
FRAMES, BATCH, POSITIONS, DIVISOR, IMAGE_ID = 3, 3, 5, 7, 90      # 36 // 7: five compressed values
STEPS = dict(init_lr=2e-3, min_lr=1e-4, warmup_lr=2e-4, warmup_steps=3, iters_per_epoch=2, max_epoch=3, weight_decay=0.1, beta1=0.8,
             beta2=0.95, eps=1e-7)


def model_of(seed: int) -> HawkModel:
    """Random weights: norms near 1, everything else of the size that keeps its input's."""
    model = HawkModel(HawkConfig(vit=VIT, image_qformer=IMAGE, video_qformer=VIDEO, llama=LLAMA, frame_positions=POSITIONS,
                                 compress=DIVISOR, vit_copies=2, qformer_copies=2, pixels="unit", overshoot="clip", antialias=False)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(0.2 * draw + (1.0 if name.endswith("norm.weight") or "orm" in name and name.endswith("weight") else 0.0))
            else:
                p.copy_(draw / math.sqrt(p[0].numel()) if "embed" not in name and "tokens" not in name else 0.5 * draw)
    model.llama_model.generation_config.eos_token_id = None
    return model


def save(folder: Path, name: str, info: dict, weights: dict, inputs: dict, outputs: dict) -> None:
    tensors = {f"{prefix}/{key}": np.ascontiguousarray(x.detach().numpy() if isinstance(x, torch.Tensor) else x)
               for prefix, group in (("weights", weights), ("inputs", inputs), ("outputs", outputs)) for key, x in group.items()}
    save_file(tensors, folder / f"{name}.safetensors")
    listed = {key: [x.dtype.name, list(x.shape)] for key, x in sorted(tensors.items())}
    (folder / f"{name}.json").write_text(json.dumps(info | {"tensors": listed}))


def part(model, *prefixes: str) -> dict:
    return {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)}


def position_ids(name: str) -> dict:
    return {f"{name}.bert.embeddings.position_ids": torch.arange(17)[None]}


def inverse_frequencies(prefix: str = "") -> dict:
    width = LLAMA["width"] // LLAMA["heads"]
    values = LLAMA["rope_theta"] ** (-torch.arange(0, width, 2).float() / width)
    return {f"{prefix}model.layers.{i}.self_attn.rotary_emb.inv_freq": values.clone() for i in range(LLAMA["depth"])}


# ------------------------------------------------------------------------------------------------ parts
@torch.no_grad()
def record_vit(folder: Path, model: HawkModel, draw) -> None:
    image = torch.from_numpy(draw.random((2, 3, VIT["image_size"], VIT["image_width"]), np.float32))
    vit, outputs = model.visual_encoder, {}
    hooks = [block.register_forward_hook(lambda _, __, out, i=i: outputs.__setitem__(f"block_{i}", out.clone()))
             for i, block in enumerate(vit.blocks)]
    outputs["features"] = vit(image)
    outputs |= {"ln_vision": model.ln_vision(outputs["features"]), "patch_embed": vit.patch_embed(image)}
    for hook in hooks:
        hook.remove()
    rows, columns = VIT["image_size"] // 14, VIT["image_width"] // 14
    info = {"unit": "EVA ViT + ln_vision", "image_size": [VIT["image_size"], VIT["image_width"]], "patch_size": 14, "grid": [rows, columns],
            "width": VIT["width"], "depth": VIT["depth"], "heads": VIT["heads"], "head_dim": VIT["width"] // VIT["heads"],
            "mlp_hidden": VIT["mlp"], "block_ln_eps": VIT["eps"], "ln_vision_eps": 1e-5, "final_norm": False}
    save(folder, "eva_vit_oblong", info, part(model, "visual_encoder.", "ln_vision."), {"image": image}, outputs)


def states(qformer, queries, source) -> dict:
    layers, found = qformer.bert.encoder.layer, {}
    x = found["hidden_0"] = qformer.bert.embeddings.LayerNorm(queries).expand(len(source), -1, -1)
    for i, layer in enumerate(layers, 1):
        x = found[f"hidden_{i}"] = layer(x, source)
    return found | {"last_hidden_state": qformer(queries, source)}


def qformer_info(sizes: dict) -> dict:
    return {"hidden": sizes["width"], "heads": sizes["heads"], "layers": sizes["depth"], "intermediate": sizes["mlp"],
            "cross_attention_freq": sizes["cross_attention_freq"], "queries": sizes["queries"], "layer_norm_eps": sizes["eps"]}


@torch.no_grad()
def record_qformers(folder: Path, model: HawkModel, draw) -> None:
    source = torch.from_numpy(draw.standard_normal((3, 7, VIT["width"]), np.float32))
    info = {"unit": "image Q-Former", "encoder_width": VIT["width"], "cross_attention_layers": [0, 2, 4]} | qformer_info(IMAGE)
    save(folder, "qformer_five", info, part(model, "Qformer.") | {"query_tokens": model.query_tokens} | position_ids("Qformer"),
         {"image_embeds": source}, states(model.Qformer, model.query_tokens, source))
    tokens = torch.from_numpy(draw.standard_normal((2 * FRAMES, IMAGE["queries"], IMAGE["width"]), np.float32))
    positions = model.video_frame_position_embedding.weight[:FRAMES, None]
    framed = (tokens.unflatten(0, (2, FRAMES)) + positions).flatten(1, 2)
    info = {"unit": "frame position embedding + video Q-Former", "encoder_width": IMAGE["width"], "frames": FRAMES,
            "tokens_per_frame": IMAGE["queries"], "max_frame_pos": POSITIONS} | qformer_info(VIDEO)
    weights = part(model, "video_frame_position_embedding.", "video_Qformer.") | {"video_query_tokens": model.video_query_tokens}
    save(folder, "video_qformer_two", info, weights | position_ids("video_Qformer"), {"frame_tokens": tokens},
         {"frame_hidden_state": framed} | states(model.video_Qformer, model.video_query_tokens, framed))


@torch.no_grad()
def record_projection(folder: Path, model: HawkModel, draw) -> None:
    inputs, outputs = {}, {}
    for mark in ("", "_motion"):
        x = inputs[f"video_hidden{mark}"] = torch.from_numpy(draw.standard_normal((BATCH, 4, IMAGE["width"]), np.float32))
        first = outputs[f"proj_0{mark}"] = getattr(model, f"llama_proj{mark}_0")(x)
        outputs[f"inputs_llama{mark}"], outputs[f"middle_result{mark}"] = getattr(model, f"llama_proj{mark}_last")(first)
    outputs["cosine_consistency"] = consistency(outputs["middle_result"], outputs["middle_result_motion"])[None]
    info = {"unit": "projection heads of both branches and the consistency term", "qformer_hidden": IMAGE["width"],
            "llama_hidden": LLAMA["width"], "compressed": LLAMA["width"] // DIVISOR, "tokens": 4, "batch": BATCH}
    save(folder, "projection_five", info, part(model, "llama_proj_", "llama_proj_motion_"), inputs, outputs)


def consistency(a, b):
    return 1 - F.cosine_similarity(a.flatten(), b.flatten(), dim=0)


def record_decoder(folder: Path, model: HawkModel, draw) -> None:
    llama, rows, width = model.llama_model, 3, 11
    mask = torch.ones(rows, width, dtype=torch.long)
    mask[1, 8:] = mask[2, 6:] = 0
    labels = torch.from_numpy(draw.integers(0, LLAMA["vocab"], (rows, width)))
    labels[:, :3] = -100
    labels[mask == 0] = -100
    ids = torch.from_numpy(draw.integers(0, LLAMA["vocab"], (rows, width)))
    x = torch.from_numpy(draw.standard_normal((rows, width, LLAMA["width"]), np.float32)).requires_grad_()
    positions = torch.arange(width).expand(rows, -1)
    found = llama(inputs_embeds=x, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    loss = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    outputs = {f"hidden_{i}": h for i, h in enumerate(found.hidden_states)} | {
        "logits": found.logits, "loss": loss[None], "grad_inputs_embeds": x.grad}
    steps = torch.from_numpy(draw.integers(0, LLAMA["vocab"], (1, 3)))
    with torch.no_grad():
        outputs["logits_from_ids"] = llama(input_ids=ids).logits
        prompt = llama(inputs_embeds=x[:1], use_cache=True)
        outputs["prefill_logits"], cache, decoded = prompt.logits, prompt.past_key_values, []
        for i in range(steps.shape[1]):
            step = llama(input_ids=steps[:, i:i + 1], past_key_values=cache, use_cache=True)
            decoded.append(step.logits)
        outputs["decode_logits"] = torch.cat(decoded, dim=1)
        for name, beams, count in (("greedy", 1, 9), ("beam2", 2, 6), ("beam4", 4, 5)):
            made = llama.generate(inputs_embeds=x[:1], attention_mask=torch.ones(1, width, dtype=torch.long), num_beams=beams,
                                  max_new_tokens=count, do_sample=False, pad_token_id=0)
            assert made.shape == (1, count)
            outputs[f"{name}_ids_raw"] = F.pad(made, (1, 0), value=1)      # transformers 4.28 returned a BOS in front
    llama.zero_grad()
    info = {"unit": "LLaMA decoder", "vocab": LLAMA["vocab"], "hidden": LLAMA["width"], "intermediate": LLAMA["mlp"],
            "layers": LLAMA["depth"], "heads": LLAMA["heads"], "head_dim": LLAMA["width"] // LLAMA["heads"], "rms_norm_eps": LLAMA["eps"],
            "rope_theta": LLAMA["rope_theta"], "max_position_embeddings": LLAMA["max_positions"], "tied_embeddings": False}
    save(folder, "llama_three", info, dict(llama.state_dict()) | inverse_frequencies(),
         {"attention_mask": mask, "decode_step_ids": steps, "input_ids": ids, "inputs_embeds": x, "labels": labels}, outputs)


# ------------------------------------------------------------------------------------------------ whole model
def trainable_names(model: HawkModel) -> list[str]:
    return [n for n, _ in model.named_parameters() if n.startswith(("video_", "llama_proj")) or n == "query_tokens_motion"]


def caption_inputs(draw) -> dict:
    found = {}
    for name, size in (("text", 7), ("text_motion", 4)):
        mask = (np.arange(size) < draw.integers(2, size + 1, (BATCH, 1))).astype(np.int64)
        mask[0] = 1
        found[f"{name}_ids"], found[f"{name}_mask"] = draw.integers(3, LLAMA["vocab"], (BATCH, size)) * mask, mask
    return found


def conversation_inputs(draw) -> dict:
    size, queries = 21, 2 * VIDEO["queries"]
    mask = (np.arange(size) < draw.integers(16, size + 1, (BATCH, 1))).astype(np.int64)
    ids = draw.integers(3, LLAMA["vocab"], (BATCH, size))
    for row, at in zip(ids, (2, 3, 5)):
        row[at:at + queries] = IMAGE_ID
    learned = (np.arange(size) >= 14) & (mask > 0)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": np.where(learned, ids, -100)}


def decoder_calls(model: HawkModel, inputs: dict, video, motion) -> list[tuple]:
    """(inputs_embeds, attention_mask, labels) of each call."""
    embed, calls = model.llama_model.get_input_embeddings(), []
    if "input_ids" in inputs:
        ids = torch.from_numpy(inputs["input_ids"])
        x = embed(ids.masked_fill(ids == IMAGE_ID, 0)).clone()
        x[ids == IMAGE_ID] = torch.cat([video, motion], 1).flatten(0, 1)
        return [(x, torch.from_numpy(inputs["attention_mask"]), torch.from_numpy(inputs["labels"]))]
    bos = embed(torch.ones(BATCH, 1, dtype=torch.long))
    for name, tokens in (("text", [video, motion]), ("text_motion", [motion])):
        ids, given = (torch.from_numpy(inputs[f"{name}_{key}"]) for key in ("ids", "mask"))
        x = torch.cat([bos, *tokens, embed(ids)], dim=1)
        before = x.shape[1] - ids.shape[1]
        calls.append((x, F.pad(given, (before, 0), value=1), F.pad(ids.masked_fill(given == 0, -100), (before, 0), value=-100)))
    return calls


def forward(model: HawkModel, inputs: dict) -> dict:
    """Outputs of one pass, with graph; losses of shape (1,)."""
    found = {}
    for mark in ("", "_motion"):
        clips = torch.from_numpy(inputs[f"image{mark}"]).transpose(1, 2)
        tokens = model.image_tokens(clips.flatten(0, 1), bool(mark)).unflatten(0, clips.shape[:2])
        found["motion_embeds" if mark else "video_embeds"], found[f"middle_result{mark}"] = model.branch(tokens, bool(mark))
    losses = []
    for number, (x, mask, labels) in enumerate(decoder_calls(model, inputs, found["video_embeds"], found["motion_embeds"])):
        logits = model.llama_model(inputs_embeds=x, attention_mask=mask, position_ids=torch.arange(x.shape[1]).expand(BATCH, -1)).logits
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())[None])
        found |= {f"llama_call{number}_{key}": value for key, value in (("inputs_embeds", x), ("attention_mask", mask), ("labels", labels))}
    found["loss"], found["loss_motion"] = losses[0], losses[-1]
    found["consistency_loss"] = consistency(found["middle_result"], found["middle_result_motion"])[None]
    found["total_loss"] = found["loss"] + 0.2 * found["loss_motion"] + 0.3 * found["consistency_loss"]
    return found


def rate(step: int) -> float:
    s = STEPS
    if step < s["warmup_steps"]:
        return s["warmup_lr"] + (s["init_lr"] - s["warmup_lr"]) * (step % s["iters_per_epoch"]) / s["warmup_steps"]
    share = 0.5 * (1 + math.cos(math.pi * step / (s["max_epoch"] * s["iters_per_epoch"])))
    return s["min_lr"] + (s["init_lr"] - s["min_lr"]) * share


def record_whole(folder: Path, model: HawkModel, draw, name: str, weights: dict, weights_file: str) -> None:
    size = (BATCH, 3, FRAMES, VIT["image_size"], VIT["image_width"])
    # of noise in stage 2: files may hold pictures outside 0..1
    captions = "stage1" in name
    noise = draw.random if captions else draw.standard_normal
    images = {key: noise(size, np.float32) for key in ("image", "image_motion")}
    inputs = images | (caption_inputs(draw) if captions else conversation_inputs(draw))
    start, names = {k: v.clone() for k, v in model.state_dict().items()}, trainable_names(model)
    parameters = {n: p.requires_grad_(n in names) for n, p in model.named_parameters()}
    decay = [n for n in names if parameters[n].ndim >= 2 and not any(word in n for word in ("bias", "ln", "bn"))]
    optimizer = torch.optim.AdamW([{"params": [parameters[n] for n in decay], "weight_decay": STEPS["weight_decay"]},
                                   {"params": [parameters[n] for n in names if n not in decay], "weight_decay": 0.0}],
                                  betas=(STEPS["beta1"], STEPS["beta2"]), eps=STEPS["eps"])
    outputs, steps = {}, {key: [] for key in ("lr", "loss", "loss_motion", "consistency_loss", "total_loss")}
    for step in range(4):
        found = forward(model, inputs)
        optimizer.zero_grad()
        found["total_loss"].sum().backward()
        if step == 0:
            outputs = {k: v.detach().clone() for k, v in found.items()} | {f"grad/{n}": parameters[n].grad.clone() for n in names}
        for key in steps:
            steps[key].append(rate(step) if key == "lr" else found[key].item())
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
    outputs |= {f"after_steps/{n}": parameters[n].detach().clone() for n in names}
    outputs |= {f"steps/{key}": np.array(x, np.float64 if key == "lr" else np.float32) for key, x in steps.items()}
    model.load_state_dict(start)
    save(folder, name, whole_info(name, names, decay, weights_file), weights, inputs, outputs)


def whole_info(name: str, names: list[str], decay: list[str], weights_file: str) -> dict:
    return {"unit": name, "weights_file": weights_file, "image_size": [VIT["image_size"], VIT["image_width"]], "patch_size": 14,
            "grid": [2, 3], "vit_width": VIT["width"], "vit_depth": VIT["depth"], "vit_heads": VIT["heads"], "vit_mlp_hidden": VIT["mlp"],
            "vit_ln_eps": VIT["eps"], "ln_vision_eps": 1e-5, "qformer_hidden": IMAGE["width"], "qformer_heads": IMAGE["heads"],
            "qformer_layers": IMAGE["depth"], "qformer_intermediate": IMAGE["mlp"], "bert_ln_eps": IMAGE["eps"],
            "qformer_cross_attention_freq": IMAGE["cross_attention_freq"], "num_query_token": IMAGE["queries"],
            "video_qformer_layers": VIDEO["depth"], "video_qformer_cross_attention_freq": VIDEO["cross_attention_freq"],
            "num_video_query_token": VIDEO["queries"], "max_frame_pos": POSITIONS, "frames": FRAMES, "batch": BATCH,
            "llama_vocab": LLAMA["vocab"], "llama_hidden": LLAMA["width"], "llama_intermediate": LLAMA["mlp"],
            "llama_layers": LLAMA["depth"], "llama_heads": LLAMA["heads"], "llama_rms_eps": LLAMA["eps"], "rope_theta": LLAMA["rope_theta"],
            "compressed": LLAMA["width"] // DIVISOR, "max_txt_len": 7, "end_sym": "\n", "image_token_id": IMAGE_ID, "bos_id": 1,
            "pad_id": 0,
            "trainable": names, "weight_decay_params": decay, "loss_weights": {"VL": 1.0, "motion": 0.2, "consistency": 0.3},
            "optimizer_steps": STEPS}


# ------------------------------------------------------------------------------------------------ pictures, rates
def record_motion(folder: Path, draw) -> None:
    """A texture that slides over 36 x 50 pixels, seen with other parameters and another threshold."""
    canvas = cv2.GaussianBlur(draw.integers(0, 256, (60, 90, 3), np.uint8), (0, 0), 1.5)
    frames = np.stack([canvas[t:t + 36, 2 * t:2 * t + 50] for t in range(5)])
    frames[:, :12] = canvas[:12, :50]       # a still part
    options = dict(pyr_scale=0.6, levels=2, winsize=9, iterations=2, poly_n=7, poly_sigma=1.5, flags=0)
    index = np.array([0, 2, 4])
    used = np.array([1, 2, 4])
    gray = np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames])
    flow = np.stack([cv2.calcOpticalFlowFarneback(gray[i - 1], gray[i], None, *options.values()) for i in used])
    size = np.linalg.norm(flow, axis=-1)
    mask = (size > 0.5).astype(np.uint8)
    info = {"unit": "motion extraction", "farneback": options, "recorded_args": [None, *options.values()], "threshold": 0.5}
    save(folder, "farneback_slide", info, {}, {"frames": frames, "indices": index},
         {"indices_used": used, "gray": gray, "flow": flow, "mask": mask, "motion_frames": frames[used] * mask[..., None]})


def record_transforms(folder: Path, draw) -> None:
    clip, crops, outputs = draw.integers(0, 256, (3, 2, 30, 44)).astype(np.float32), [[0, 0, 30, 44], [4, 9, 20, 17], [2, 3, 18, 22]], {}
    for number, (top, left, height, width) in enumerate(crops):
        window = torch.from_numpy(clip[..., top:top + height, left:left + width]).transpose(0, 1)
        resized = F.interpolate(window, size=(18, 18), mode="bicubic", align_corners=False).transpose(0, 1).numpy()
        wrapped = np.trunc(resized).astype(np.int64).astype(np.uint8)
        outputs |= {f"street_crop{number}_resized": resized, f"street_crop{number}_train": wrapped.astype(np.float32) / 255}
    outputs["street_eval"] = clip / np.float32(255)
    info = {"unit": "clip transforms after frame loading", "output_size": 18, "crops_top_left_height_width": crops}
    save(folder, "video_transform_street", info, {}, {"street": clip}, outputs)


def record_all(folder: Path, seed: int, whole: bool = True) -> None:
    """All units; each reads its sizes from the constants above."""
    model, draw = model_of(seed), np.random.default_rng(seed)
    record_vit(folder, model, draw)
    record_qformers(folder, model, draw)
    record_projection(folder, model, draw)
    record_decoder(folder, model, draw)
    record_motion(folder, draw)
    record_transforms(folder, draw)
    if whole:
        buffers = inverse_frequencies("llama_model.")
        for name in ("Qformer", "Qformer_motion", "video_Qformer", "video_Qformer_motion"):
            buffers |= position_ids(name)
        first = "full_model_stage1_oblong"
        record_whole(folder, model, draw, first, {k: v.clone() for k, v in model.state_dict().items()} | buffers, f"{first}.safetensors")
        record_whole(folder, model, draw, "full_model_stage2_oblong", {}, f"{first}.safetensors")
