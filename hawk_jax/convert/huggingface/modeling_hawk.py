"""HAWK in plain PyTorch: what stands in an exported folder beside the weights.  Needs torch and transformers, nothing of hawk_jax.

  frames, masks -> mask, resize, normalise -> EVA ViT -> ln_vision -> image Q-Former          per picture
  + frame positions -> video Q-Former -> chain of Linear layers                               per branch (video, motion)
  text embeddings with 2Q visual tokens spliced in -> LLaMA (`llama_model`, plain transformers, in the subfolder `llama`)

Names in the state dict are those of the authors' code; an encoder that serves both branches exists once, without `_motion`.
Arrays carry their axes as a suffix: B clips, T frames, N = B x T pictures, H W C of a picture, P patches, M ViT width, Q queries,
E Q-Former width, U tokens attended to, D decoder width, Z compressed, R S token rows.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .processing_hawk import PLACE, HawkProcessor
from .vision_hawk import LN_VISION_EPS, EvaVit, LayerNorm, Projection, QFormer, normalise, resize

DECODER = "llama"                   # subfolder of the decoder
# what says how weights are held, for the decoder as for the rest
HELD = ("dtype", "torch_dtype", "device_map", "max_memory", "offload_folder")

if int(transformers.__version__.split(".")[0]) < 5:     # generation from embeddings with positions of their own goes wrong in older ones
    raise ImportError(f"this model needs transformers 5 or newer, here is {transformers.__version__}")


class HawkConfig(PretrainedConfig):
    """Sizes and options that decide the forward pass, named as in the training code.

    vit: image_size (height), image_width (None: square), patch_size, width, depth, heads, mlp, eps.  image_qformer, video_qformer:
    queries, width, depth, heads, mlp, cross_attention_freq, dropout, eps.  llama: vocab, width, depth, heads, kv_heads, mlp, eps,
    rope_theta, max_positions.  vit_copies, qformer_copies: 1 = both branches share it.  pixels: clip_norm | unit; overshoot: clip |
    wrap (of bicubic resizing); antialias: of that resizing.
    """
    model_type = "hawk"

    def __init__(self, vit=None, image_qformer=None, video_qformer=None, llama=None, frame_positions=32, compress=16, vit_copies=1,
                 qformer_copies=1, pixels="clip_norm", overshoot="clip", antialias=True, **kwargs):
        self.vit, self.image_qformer, self.video_qformer, self.llama = vit, image_qformer, video_qformer, llama
        self.frame_positions, self.compress = frame_positions, compress
        self.vit_copies, self.qformer_copies = vit_copies, qformer_copies
        self.pixels, self.overshoot, self.antialias = pixels, overshoot, antialias
        super().__init__(**kwargs)

    @property
    def picture(self) -> tuple[int, int]:
        """(height, width) of what the ViT sees, pixels."""
        return self.vit["image_size"], self.vit.get("image_width") or self.vit["image_size"]

    def decoder_config(self) -> LlamaConfig:
        """The decoder's configuration in transformers' names."""
        c = self.llama
        return LlamaConfig(vocab_size=c["vocab"], hidden_size=c["width"], intermediate_size=c["mlp"], num_hidden_layers=c["depth"],
                           num_attention_heads=c["heads"], num_key_value_heads=c.get("kv_heads") or c["heads"], rms_norm_eps=c["eps"],
                           rope_theta=c["rope_theta"], max_position_embeddings=c["max_positions"], tie_word_embeddings=False,
                           bos_token_id=1, eos_token_id=2, pad_token_id=0)


class Vision(NamedTuple):
    """What the decoder reads of the clips, and the compressed tokens of the consistency loss."""
    visual_BQD: torch.Tensor        # video's Q tokens, then motion's Q
    video_BQZ: torch.Tensor
    motion_BQZ: torch.Tensor


@dataclass
class HawkOutput(ModelOutput):
    """loss: mean cross-entropy over labels that are not -100, None without labels; logits [R, S, vocab] float32."""
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    visual: torch.Tensor | None = None
    video_compressed: torch.Tensor | None = None
    motion_compressed: torch.Tensor | None = None


# ------------------------------------------------------------------------------------------------ the model
class HawkModel(PreTrainedModel):
    """See the head of this file.  `with_decoder=False` builds the part before the decoder only."""
    config_class = HawkConfig
    base_model_prefix = ""
    main_input_name = "frames"
    _supports_sdpa = _supports_flash_attn = True        # attn_implementation chooses for the decoder; the rest always runs torch's
    _no_split_modules = ["VitBlock", "QFormerLayer"]
    _keep_in_fp32_modules_strict = ["norm1", "norm2", "LayerNorm", "ln_vision", "ln_vision_motion"]
    _keys_to_ignore_on_load_unexpected = [r"\.position_ids$", r"rotary_emb\.inv_freq$"]     # buffers of the authors' checkpoints

    def __init__(self, config: HawkConfig, with_decoder: bool = True):
        super().__init__(config)
        v, image, video, width = config.vit, config.image_qformer, config.video_qformer, config.llama["width"]
        for mark in ("", "_motion"):
            if not mark or config.vit_copies == 2:
                self.add_module(f"visual_encoder{mark}", EvaVit(config.picture, v["patch_size"], v["width"], v["depth"], v["heads"],
                                                                v["mlp"], v["eps"]))
            if not mark or config.qformer_copies == 2:
                self.add_module(f"ln_vision{mark}", LayerNorm(v["width"], LN_VISION_EPS))
                self.add_module(f"Qformer{mark}", QFormer(image, v["width"]))
                self.register_parameter(f"query_tokens{mark}", nn.Parameter(torch.zeros(1, image["queries"], image["width"])))
            self.add_module(f"video_frame_position_embedding{mark}", nn.Embedding(config.frame_positions, video["width"]))
            self.register_parameter(f"video_query_tokens{mark}", nn.Parameter(torch.zeros(1, video["queries"], video["width"])))
            self.add_module(f"video_Qformer{mark}", QFormer(video, video["width"]))
            self.add_module(f"llama_proj{mark}_0", nn.Linear(video["width"], width))
            self.add_module(f"llama_proj{mark}_last", Projection(width, width // config.compress))
        self.llama_model = LlamaForCausalLM(config.decoder_config()) if with_decoder else None
        self.processor = None
        self.post_init()

    def _init_weights(self, module):
        """Normal 0.02 for what is not loaded; torch's own start otherwise."""
        if isinstance(module, HawkModel):
            for name, parameter in module.named_parameters(recurse=False):
                if "query_tokens" in name:
                    nn.init.normal_(parameter, std=0.02)
        elif isinstance(module, EvaVit):
            nn.init.normal_(module.cls_token, std=0.02)
            nn.init.normal_(module.pos_embed, std=0.02)

    # ------------------------------------------------------------------------------------------ files
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, with_decoder: bool = True, **kwargs):
        """As PreTrainedModel.from_pretrained; reads the processor, and the decoder from the subfolder `llama` in the same way.

        with_decoder=False leaves the decoder out: `visual_tokens` for a server that runs it elsewhere.  Raises OSError if weights are
        missing: the model would answer from random ones.
        """
        place = {key: kwargs[key] for key in PLACE if key in kwargs}
        held = {key: kwargs[key] for key in HELD if key in kwargs}
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, with_decoder=False, output_loading_info=True,
                                              **kwargs)
        if with_decoder:
            held["attn_implementation"] = model.config._attn_implementation
            if not held.keys() & {"dtype", "torch_dtype"}:
                held["dtype"] = model.dtype
            subfolder = f"{place.get('subfolder', '')}/{DECODER}".lstrip("/")
            try:
                model.llama_model, decoder_info = LlamaForCausalLM.from_pretrained(
                    pretrained_model_name_or_path, **place | {"subfolder": subfolder}, **held, output_loading_info=True)
            except OSError as error:        # transformers names the folder without its subfolder
                raise OSError(f"the decoder in {pretrained_model_name_or_path}/{subfolder} cannot be read: {error}") from error
            info["missing_keys"] = {*info["missing_keys"], *decoder_info["missing_keys"]}
        if info["missing_keys"]:
            raise OSError(f"{pretrained_model_name_or_path} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}"
                          f" ({len(info['missing_keys'])} in all); copy the folder whole")
        model.processor = HawkProcessor.from_pretrained(pretrained_model_name_or_path, **place)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory, **kwargs):
        """The part before the decoder, the decoder in `llama`, code and the processor's files; no proof, card or graph."""
        kwargs.pop("state_dict", None)
        self.decoder.save_pretrained(Path(save_directory) / DECODER)
        if self.processor is not None:
            self.processor.save_pretrained(save_directory)
            self.processor.save_tokenizer(Path(save_directory) / DECODER)
        own = {key: value for key, value in self.state_dict().items() if not key.startswith("llama_model.")}
        super().save_pretrained(save_directory, state_dict=own, **kwargs)       # last, because it can push the folder to the hub

    # ------------------------------------------------------------------------------------------ vision
    def _part(self, name: str, motion: bool):
        """A module or parameter of a branch; the video branch's where both share it."""
        own = getattr(self, f"{name}_motion", None) if motion else None
        return getattr(self, name) if own is None else own

    def pictures(self, frames_NHWC, masks_NHW=None):
        """u8 RGB pictures and (motion branch) u8 masks 0..255 -> f32 [N, 3, H, W] as the ViT takes them."""
        x_NHWC = frames_NHWC.float()
        if masks_NHW is not None:
            x_NHWC = x_NHWC * (masks_NHW.float() / 255.0)[..., None]
        c = self.config
        return normalise(resize(x_NHWC.permute(0, 3, 1, 2), c.picture, c.antialias), c.pixels, c.overshoot)

    def image_tokens(self, pictures_NCHW, motion: bool):
        """Prepared pictures -> tokens_NQE of a branch's encoder."""
        patches_NPM = self._part("ln_vision", motion)(self._part("visual_encoder", motion)(pictures_NCHW))
        return self._part("Qformer", motion)(self._part("query_tokens", motion), patches_NPM)

    def branch(self, tokens_BTQE, motion: bool):
        """Tokens of all frames -> (visual_BQD, compressed_BQZ) of a branch."""
        mark = "_motion" if motion else ""
        positions_TE = getattr(self, f"video_frame_position_embedding{mark}").weight[:tokens_BTQE.shape[1]]
        x_BUE = (tokens_BTQE + positions_TE[:, None].to(tokens_BTQE.dtype)).flatten(1, 2)
        x_BQE = getattr(self, f"video_Qformer{mark}")(getattr(self, f"video_query_tokens{mark}"), x_BUE)
        return getattr(self, f"llama_proj{mark}_last")(getattr(self, f"llama_proj{mark}_0")(x_BQE))

    def vision(self, frames, masks, motion_frames=None, chunk: int | None = 64) -> Vision:
        """u8 frames [B, T, H, W, 3] and masks [B, T, H, W] as the processor gives them; motion_frames: where the motion branch has its own.

        chunk: pictures that the encoder takes at a time, which bounds memory; None = all.
        """
        branches = []
        for motion in (False, True):
            flat = [(motion_frames if motion and motion_frames is not None else frames).flatten(0, 1), masks.flatten(0, 1)]
            parts = [flat] if chunk is None else zip(*(x.split(chunk) for x in flat))
            tokens = [self.image_tokens(self.pictures(pictures, covers if motion else None), motion) for pictures, covers in parts]
            branches.append(self.branch(torch.cat(tokens).unflatten(0, frames.shape[:2]), motion))
        (video_BQD, video_BQZ), (motion_BQD, motion_BQZ) = branches
        return Vision(torch.cat([video_BQD, motion_BQD], dim=1), video_BQZ, motion_BQZ)

    @torch.no_grad()
    def visual_tokens(self, frames, masks, motion_frames=None, chunk: int | None = 64):
        """visual_BQD [B, 2Q, D]: what the decoder reads of each clip, without gradients.  Arguments as in `vision`."""
        return self.vision(frames, masks, motion_frames, chunk).visual_BQD

    # ------------------------------------------------------------------------------------------ decoder
    @property
    def decoder(self) -> LlamaForCausalLM:
        """`llama_model`; RuntimeError if it was left out."""
        if self.llama_model is None:
            raise RuntimeError("this model was loaded with with_decoder=False: only vision and visual_tokens work; load it without that")
        return self.llama_model

    def embed(self, input_ids, slots, visual_BQD, clips=None):
        """x_RSD: embeddings of input_ids [R, S]; where slots [R, S] is not -1, visual token `slots` of clip clips [R] (None: R = B)."""
        x_RSD = self.decoder.get_input_embeddings()(input_ids)
        clips = torch.arange(input_ids.shape[0]) if clips is None else clips
        slots, clips = slots.to(x_RSD.device), clips.to(x_RSD.device)       # a device map may put the decoder elsewhere
        return torch.where((slots >= 0)[..., None], visual_BQD.to(x_RSD)[clips[:, None], slots.clamp(min=0)], x_RSD)

    def forward(self, input_ids, slots, attention_mask, position_ids=None, frames=None, masks=None, motion_frames=None, clips=None,
                labels=None, visual=None) -> HawkOutput:
        """Logits of token rows about clips, and with labels [R, S] the mean cross-entropy of the next tokens (-100: not counted).

        The clips come as pictures (see `vision`), or as `visual` [B, 2Q, D].  slots and clips as in `embed`.
        """
        seen = Vision(visual, None, None) if visual is not None else self.vision(frames, masks, motion_frames)
        x_RSD = self.embed(input_ids, slots, seen.visual_BQD, clips)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.llama_model(inputs_embeds=x_RSD, attention_mask=attention_mask, position_ids=position_ids).logits.float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return HawkOutput(loss=loss, logits=logits, visual=seen.visual_BQD, video_compressed=seen.video_BQZ,
                          motion_compressed=seen.motion_BQZ)

    @torch.no_grad()
    def prompt_embeds(self, inputs):
        """(inputs_embeds [R, S, D], attention_mask [R, S]) of the processor's output: all that a server of the decoder alone needs.

        Padding is on the left: `inputs_embeds[r][attention_mask[r].bool()]` is prompt r without it.
        """
        here = {key: value.to(self.device) for key, value in inputs.items()}
        visual_BQD = self.visual_tokens(here["frames"], here["masks"], here.get("motion_frames"))
        return self.embed(here["input_ids"], here["slots"], visual_BQD, here["clips"]), here["attention_mask"]

    @torch.no_grad()
    def generate(self, video=None, question=None, *, history=(), inputs=None, max_new_tokens: int | None = None, **options) -> list[str]:
        """Answers, one text for each question.  Greedy unless `options`, which are those of transformers' generate, say otherwise.

        video: path of a file or of a folder of pictures, decoded frames, or a list of them; question: a text, None (describe the video),
        or a list of them.  One video takes any number of questions; several videos take one for all, or one each.  history: earlier
        (question, answer) rounds, the same for all.  inputs: the processor's output in place of video and question.
        """
        if options.get("return_dict_in_generate"):
            raise ValueError("generate returns texts; for scores call model.llama_model.generate(inputs_embeds=...) with prompt_embeds")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
        inputs = self.processor(video, question, history=history) if inputs is None else inputs
        inputs_embeds, attention_mask = self.prompt_embeds(inputs)
        known, width = self.decoder.generation_config, inputs_embeds.shape[1]
        room = self.config.llama["max_positions"] - width
        if room < 1:
            raise ValueError(f"a prompt of {width} tokens leaves no room for an answer: the decoder has {room + width} positions; shorten "
                             "the question or the history")
        # positions are given because they also count tokens that the mask hides
        ids = self.llama_model.generate(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=inputs["position_ids"].to(self.device),
            max_new_tokens=min(max_new_tokens or known.max_new_tokens or room, room), **{"do_sample": False, **options})
        return [self.processor.decode(row) for row in ids.tolist()]
