"""Every option of hawk_jax, once, with its unit and its reason.  Imports no jax.

A configuration is one frozen, hashable `HawkConfig`.  Files in `configs/` are functions that return one; the command line
changes single values by dotted path (`optim.learning_rate=3e-5`).  `released()` sets every option on which the paper and the
authors' released code disagree to what the released checkpoints need; the defaults are what the paper means, or the fix.
Sources: "paper" = HAWK, NeurIPS 2024; "released code" = the authors' public repository.
"""
import dataclasses
import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hawk_jax.options import ConfigError, HawkError, differences, digest, from_dict, override, to_dict

# the other modules take everything about configurations from here
__all__ = ["ConfigError", "HawkError", "differences", "digest", "from_dict", "override", "to_dict"]


@dataclass(frozen=True)
class WorldConfig:
    """The embedded synthetic surveillance world (data/synthetic.py)."""
    seed: int = 0                       # scene seeds of the three splits are disjoint ranges derived from it
    train_clips: int = 400              # clips rendered per split, balanced over the classes
    validation_clips: int = 40
    test_clips: int = 120
    width: int = 320                    # pixels of the mp4 files; 320x240 is the smallest camera
    height: int = 240
    fps: int = 15                       # frames per second of the mp4 files
    seconds: tuple[float, float] = (5.0, 12.0)  # length of a clip is drawn from this interval
    classes: tuple[str, ...] = ()       # names from data.synthetic.CLASSES; () = all of them


@dataclass(frozen=True)
class PrepareConfig:
    """Videos -> records.  A data set stores the digest of this part; training on another one is refused."""
    size: int = 224                     # pixels; records hold square frames of this side, flow is computed at it (released code: 224)
    frames: int = 32                    # frames per view, T
    views: int = 4                      # index sets per clip and branch: view 0 uniform, the others head-tail draws
    view_seed: int = 0                  # draws of the head-tail index sets depend on it and on the clip's hash only
    jpeg_quality: int = 95              # 1..100; masks are computed before compression
    mask_threshold: float = 0.2         # pixels of flow magnitude; the 1-bit plane is `> mask_threshold` (released code)
    shards: int = 8                     # record files per split; fixed by this number, never by the number of workers
    max_frames: int = 100_000           # longer videos are rejected with this reason
    max_pixels: int = 4096 * 2304       # width x height above this is rejected, not decoded
    validation_share: float = 0.0       # share of sources moved from train to validation by their hash when annotations name no split


@dataclass(frozen=True)
class DataSource:
    """One prepared data set in a mixture."""
    folder: str = ""                    # what `prepare --out` wrote
    weight: float = 1.0                 # relative share of the clips of an epoch


@dataclass(frozen=True)
class InputConfig:
    """Records -> batches.  A pure function of (seed, step)."""
    datasets: tuple[DataSource, ...] = ()
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: str = "test"
    clips: int = 32                     # clips of the global batch, over all hosts and accumulation steps
    seed: int = 0                       # order, crops, prompts
    views: int = 0                      # K: views of a clip used in turn; 0 = every epoch draws its own (crop, frames); 1 = view 0 always
    features: Literal["live", "memory"] = "live"  # memory: the frozen encoder runs once per (clip, view) at start, needs views >= 1
    # text
    tokenizer: str = ""                 # path of a sentencepiece model, or "embedded" (the small one of the synthetic world)
    conversation_share: float = 0.0     # probability that a clip is used as a conversation (stage 2) instead of a caption (stage 1)
    prompt: Literal["paper", "released"] = "paper"   # paper: sentence of section 4.1; released: none (captions), <Video> template
    system_prompt: str = " "            # inside <<SYS>>; the released code trains with a single space
    description_probability: float = 0.5   # conversation: the description replaces the first question-answer pair
    description_replacement: Literal["copy", "in_place"] = "copy"  # in_place: released code, the replaced question is lost for later epochs
    max_caption_tokens: int = 128       # caption or motion text with its end symbol (released stage 1: 32)
    max_conversation_tokens: int = 512  # whole conversation
    end_symbol: str = "</s>"            # ends a caption (released stage 1: "\n")
    clean_captions: bool = False        # lower-case, strip punctuation, 50 words (released stage 1)
    phrases: Literal["all", "direct"] = "all"      # motion phrases with indirect arguments (Eq. 7), or direct only (released code)
    text_mask: Literal["length", "not_unk"] = "length"   # not_unk: released code, a genuine unk is masked like padding
    buckets: tuple[int, ...] = ()       # row lengths in tokens, ascending; () = one bucket, the longest row of the data set
    # pictures
    mask: Literal["magnitude", "binary"] = "magnitude"   # Eq. 4, or magnitude > prepare.mask_threshold (released code)
    crop: Literal["random", "none"] = "random"     # random resized crop in training; evaluation never crops
    crop_scale: tuple[float, float] = (0.5, 1.0)   # share of the area
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    branch_crops: Literal["shared", "independent"] = "shared"    # independent: released code
    branch_frames: Literal["shared", "independent"] = "shared"   # independent: released code, stage 1
    first_motion_index: Literal["own", "one"] = "own"            # one: released code overwrites it by 1
    # machinery
    threads: int = 2                    # Grain read threads of a host
    buffer: int = 2                     # batches held ahead of the step, at least one per thread
    workers: int = 0                    # Grain worker processes of a host; 0 = threads only (cv2 releases the GIL)


@dataclass(frozen=True)
class VitConfig:
    """EVA ViT-g by default."""
    image_size: int = 224               # pixels; height, and width unless image_width is given
    image_width: int | None = None      # pixels; None: square pictures, as every released checkpoint has
    patch_size: int = 14                # pixels
    width: int = 1408
    depth: int = 39                     # the file has 40 blocks; the last is never used
    heads: int = 16
    mlp: int = 6144
    eps: float = 1e-6                   # of the block norms; ln_vision has 1e-5

    @property
    def picture(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image_size, self.image_size if self.image_width is None else self.image_width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.picture[0] // self.patch_size, self.picture[1] // self.patch_size


@dataclass(frozen=True)
class QFormerConfig:
    """A BLIP-2 Q-Former; defaults are the image Q-Former."""
    queries: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    cross_attention_freq: int = 2       # layers 0, freq, 2 freq, ... attend to the encoder
    dropout: float = 0.0                # hidden and attention; the frozen image Q-Former runs in eval mode
    eps: float = 1e-12


@dataclass(frozen=True)
class LlamaConfig:
    """LLaMA-2-7B by default."""
    vocab: int = 32_000
    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int | None = None         # key-value heads of grouped-query attention (LLaMA-2-70B: 8); None: as many as heads
    mlp: int = 11_008
    eps: float = 1e-5                   # 1e-6 in some uploads: taken from the checkpoint's config.json on import
    rope_theta: float = 10_000.0
    max_positions: int = 4096           # longest row or dialogue in tokens

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads


@dataclass(frozen=True)
class ModelConfig:
    vit: VitConfig = VitConfig()
    image_qformer: QFormerConfig = QFormerConfig()
    video_qformer: QFormerConfig = QFormerConfig(depth=2, cross_attention_freq=1, dropout=0.1)
    llama: LlamaConfig = LlamaConfig()
    frame_positions: int = 32           # length of the learned frame position table; prepare.frames may not exceed it
    compress: int = 16                  # width of the consistency space is llama.width // compress, rounded down as in the released code
    vit_copies: Literal[1, 2] = 1       # G of the ViT: 1 = both branches in one batch (same weights, frozen)
    qformer_copies: Literal[1, 2] = 1   # G of ln_vision, image Q-Former and image queries; released(): 2, the motion copy is other weights
    train_query_tokens_motion: bool = False   # released code leaves them trainable by a naming slip
    pixels: Literal["clip_norm", "unit"] = "clip_norm"   # CLIP mean/std, or plain 0..1 (released code)
    overshoot: Literal["clip", "wrap"] = "clip"          # bicubic overshoot: clipped, or wrapped modulo 256 (released code)
    antialias: bool = True              # low-pass when a crop is larger than image_size; released code: off
    frozen_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"   # of the decoder and branches; trainables and norms are float32
    remat: Literal["none", "dots", "full"] = "full"      # of decoder and video Q-Former layers
    frames_per_chunk: int = 64          # pictures per encoder call and device; memory does not grow with clips x frames
    init: Literal["reference", "fan_in"] = "reference"   # fan_in: normal(1/sqrt(fan-in)), for tiny widths where 0.02 is too small
    seed: int = 0                       # of initial values

    @property
    def compressed(self) -> int:
        """Width of the consistency space (4096 // 16 = 256)."""
        return self.llama.width // self.compress


@dataclass(frozen=True)
class LossConfig:
    video_language: float = 1.0         # t0
    consistency: float = 0.1            # t1
    motion_language: float = 0.1        # t2
    motion_language_of: Literal["motion_text", "video_language"] = "motion_text"  # video_language: released stage 2, ML := VL
    group_rows: int = 0                 # 0: one mean over the global batch; n: mean in each n consecutive clips, then over groups (DDP)
    cosine: Literal["clip", "group"] = "clip"   # group: one cosine over the flattened group (released code)
    chunk_tokens: int = 1024            # tokens per lm_head chunk: [tokens, vocab] in f32 never exists whole


@dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 1e-5         # at the end of warm-up
    min_learning_rate: float = 1e-6
    warmup_learning_rate: float = 1e-6  # at step 0
    warmup_steps: int = 1000
    warmup_counter: Literal["total", "inner_epoch"] = "total"   # inner_epoch: released code
    steps_per_epoch: int = 2500         # "epoch" of the recipe: counts steps, not clips
    epochs: int = 160                   # the cosine ends at epochs x steps_per_epoch
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.05          # on tensors of rank >= 2 whose name has no bias, ln, bn
    clip_norm: float | None = 1.0       # global gradient norm; released code: none
    accumulation: int = 1               # microbatches inside one step

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class MeshConfig:
    strategy: Literal["replicated", "fsdp", "tensor", "fsdp_tensor"] = "fsdp"   # a rule table in axes.py
    data: int = 1                       # devices per mesh axis; -1 in one of the three = all that are left
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True)
class GenerateConfig:
    max_new_tokens: int = 300
    beams: int = 1                      # 1: greedy; more: beam search as transformers' generate (num_beams)
    length_penalty: float = 1.0         # exponent of the length by which a beam's log-probability is divided
    clips: int = 16                     # clips per generation batch
    questions: int = 2                  # question-answer pairs per clip asked in evaluation
    samples: int = 18                   # clips shown in the report


@dataclass(frozen=True)
class PretrainConfig:
    """Stage 0 of the demo: the toy replacement of EVA-CLIP, BLIP-2 and LLaMA pre-training.  Uses labels only the renderer knows."""
    encoder_steps: int = 200            # 0a: ViT and image Q-Former learn to name what one frame shows
    encoder_frames: int = 256           # frames per step of 0a, half of them motion frames
    branch_steps: int = 400             # 0b: video Q-Formers learn class, colours, place
    decoder_steps: int = 500            # 0c: the decoder learns the language, through the branches
    learning_rate: float = 1e-3
    warmup_steps: int = 30
    weight_decay: float = 0.02
    beta2: float = 0.98


@dataclass(frozen=True)
class RunConfig:
    name: str = "hawk"
    folder: str = "runs/hawk"           # checkpoints, logs, report
    frozen: str = ""                    # folder of the frozen tree (safetensors + manifest)
    init_from: str = ""                 # another run's folder: its best trainables are the start (stage 1 -> 2)
    steps: int | None = None            # stop here; None = optim.steps
    seed: int = 42                      # dropout and fresh trainables
    checkpoint_every: int = 2500        # steps
    keep_checkpoints: int = 3           # latest ones kept, the best one besides
    validate_every: int = 2500          # steps; 0 = never
    validation_batches: int = 8         # batches of input.clips; the same ones each time
    log_every: int = 10                 # steps between lines of the log and of TensorBoard
    tensorboard: bool = True


@dataclass(frozen=True)
class WeightsConfig:
    """`import`: names in foreign files that nothing here takes, and names that a file may lack.

    Patterns: `*` stands for anything between two dots, `**` for anything, `{depth}` for model.vit.depth.  Names that hold weights of the
    model are taken whatever the patterns say.
    """
    eva_ignored: tuple[str, ...] = (
        "blocks.{depth}.**",                            # EVA-g has one block more than the encoder runs
        "norm.*", "fc_norm.*", "head.*")                # of a classifier: the encoder returns the tokens of its last block
    blip2_ignored: tuple[str, ...] = (
        "Qformer.cls.**", "Qformer.bert.embeddings.word_embeddings.*", "Qformer.bert.embeddings.position_embeddings.*",    # of texts:
        "Qformer.bert.encoder.layer.*.intermediate.dense.*", "Qformer.bert.encoder.layer.*.output.dense.*",     # only queries enter
        "Qformer.bert.encoder.layer.*.output.LayerNorm.*",
        "t5_proj.*", "opt_proj.*", "llm_proj.*",        # into another language model
        "vision_proj.*", "text_proj.*", "itm_head.*", "temp")       # of the first stage's contrastive losses
    llama_ignored: tuple[str, ...] = ()
    hawk_ignored: tuple[str, ...] = ()
    hawk_absent: tuple[str, ...] = ()                   # trainables that then start from their initial values (run.seed)
    motion_absent: tuple[str, ...] = ("ln_vision_motion.*",)    # then 1 and 0, as the released code leaves them
    video_llama_ignored: tuple[str, ...] = (
        "llama_proj.*",                                 # one matrix, where HAWK has four
        "audio_*", "audio_*.**")                        # HAWK hears nothing
    video_llama_motion: Literal["copy", "fresh"] = "copy"       # the motion branch's video Q-Former: from the same file, or run.seed


@dataclass(frozen=True)
class HawkConfig:
    world: WorldConfig = WorldConfig()
    prepare: PrepareConfig = PrepareConfig()
    pretrain: PretrainConfig = PretrainConfig()
    input: InputConfig = InputConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    generate: GenerateConfig = GenerateConfig()
    run: RunConfig = RunConfig()
    weights: WeightsConfig = WeightsConfig()

    def __post_init__(self):
        check(self)

    @property
    def steps(self) -> int:
        """Steps this run takes."""
        return self.optim.steps if self.run.steps is None else self.run.steps


# ------------------------------------------------------------------------------------------------ what cannot be combined
def _check_model(m: ModelConfig) -> list[str]:
    faults = []
    for name, part in (("vit", m.vit), ("image_qformer", m.image_qformer), ("video_qformer", m.video_qformer), ("llama", m.llama)):
        if part.width % part.heads:
            faults.append(f"model.{name}.width={part.width} is not a multiple of model.{name}.heads={part.heads}")
    for name, side in zip(("image_size", "image_width"), m.vit.picture):
        if side < 1 or side % m.vit.patch_size:
            faults.append(f"model.vit.{name}={side} is not a positive multiple of model.vit.patch_size={m.vit.patch_size}")
    if m.llama.groups < 1 or m.llama.heads % m.llama.groups:
        faults.append(f"model.llama.heads={m.llama.heads} is not a multiple of model.llama.kv_heads={m.llama.kv_heads}")
    if (m.llama.width // m.llama.heads) % 2:
        faults.append("model.llama: the head width (width // heads) must be even for rotary embeddings")
    if m.image_qformer.width != m.video_qformer.width:
        faults.append("model.video_qformer.width must equal model.image_qformer.width: frame positions are added to image queries")
    if m.compressed < 1:
        faults.append(f"model.compress={m.compress} leaves no width of model.llama.width={m.llama.width} for the consistency space")
    if m.vit_copies == 2 and m.qformer_copies == 1:
        faults.append("model.vit_copies=2 needs model.qformer_copies=2")
    if m.train_query_tokens_motion and m.qformer_copies == 1:
        faults.append("model.train_query_tokens_motion needs model.qformer_copies=2: with one copy the queries are shared and frozen")
    return faults


def _check_counts(c: "HawkConfig") -> list[str]:
    """Sizes and counts that are divided by or loop over: below 1 they would fail far from here."""
    m, r = c.model, c.run
    parts = {"model.vit": m.vit, "model.image_qformer": m.image_qformer, "model.video_qformer": m.video_qformer, "model.llama": m.llama,
             "pretrain": c.pretrain}
    counts = {f"{part}.{f.name}": getattr(options, f.name) for part, options in parts.items() for f in dataclasses.fields(options)
              if f.type is int and f.name != "warmup_steps"}
    counts |= {"model.frame_positions": m.frame_positions, "model.compress": m.compress, "model.frames_per_chunk": m.frames_per_chunk,
               "loss.chunk_tokens": c.loss.chunk_tokens, "optim.accumulation": c.optim.accumulation, "world.fps": c.world.fps,
               "prepare.size": c.prepare.size, "prepare.max_frames": c.prepare.max_frames, "prepare.max_pixels": c.prepare.max_pixels,
               "generate.clips": c.generate.clips, "generate.max_new_tokens": c.generate.max_new_tokens,
               "generate.beams": c.generate.beams,
               "run.checkpoint_every": r.checkpoint_every, "run.keep_checkpoints": r.keep_checkpoints, "run.log_every": r.log_every,
               "run.validation_batches": r.validation_batches}
    return [f"{name}={count}: must be at least 1" for name, count in counts.items() if count < 1]


def _check_input(c: "HawkConfig") -> list[str]:
    i, faults = c.input, []
    if i.features == "memory" and i.views < 1:
        faults.append("input.features=memory needs input.views >= 1: with views=0 every epoch draws new crops and frames")
    if i.features == "memory" and c.model.train_query_tokens_motion:
        faults.append("input.features=memory cannot be combined with model.train_query_tokens_motion: the features would go stale")
    if i.views > c.prepare.views:
        faults.append(f"input.views={i.views} exceeds prepare.views={c.prepare.views}: the records do not hold that many")
    if i.clips % c.optim.accumulation:
        faults.append(f"input.clips={i.clips} is not a multiple of optim.accumulation={c.optim.accumulation}")
    if c.loss.group_rows and (i.clips // c.optim.accumulation) % c.loss.group_rows:
        faults.append(f"loss.group_rows={c.loss.group_rows} does not divide the {i.clips // c.optim.accumulation} clips of a microbatch")
    if list(i.buckets) != sorted(set(i.buckets)):
        faults.append("input.buckets must ascend without repeats")
    if max((*i.buckets, i.max_conversation_tokens)) > c.model.llama.max_positions:
        faults.append("input.buckets and input.max_conversation_tokens may not exceed model.llama.max_positions")
    if min(i.clips, i.buffer, *i.buckets) < 1 or min(i.threads, i.workers, i.views) < 0:
        faults.append("input.clips, input.buffer and input.buckets must be at least 1, input.threads, workers and views at least 0")
    if not 0 < i.crop_scale[0] <= i.crop_scale[1] <= 1 or not 0 < i.crop_ratio[0] <= i.crop_ratio[1]:
        faults.append("input.crop_scale is a share of the area (0 < least <= most <= 1), input.crop_ratio ascends above 0")
    if not 0 <= i.conversation_share <= 1 or not 0 <= i.description_probability <= 1:
        faults.append("input.conversation_share and input.description_probability are probabilities: 0..1")
    if i.first_motion_index == "one" and i.branch_frames == "shared" and i.features == "live" and c.prepare.frames < 2:
        faults.append("input.first_motion_index=one needs prepare.frames >= 2")
    return faults


def check(c: "HawkConfig") -> None:
    """Raises ConfigError naming the first combination that cannot work."""
    if faults := _check_counts(c):      # the others divide by them
        raise ConfigError(faults[0])
    faults = _check_model(c.model) + _check_input(c)
    if c.prepare.frames > c.model.frame_positions:
        faults.append(f"prepare.frames={c.prepare.frames} exceeds model.frame_positions={c.model.frame_positions}")
    if c.prepare.size % 8:
        faults.append(f"prepare.size={c.prepare.size} must be a multiple of 8: masks are stored one bit a pixel")
    if not 1 <= c.prepare.jpeg_quality <= 100:
        faults.append("prepare.jpeg_quality must be 1..100")
    if c.prepare.shards < 1 or c.prepare.views < 1 or c.prepare.frames < 1:
        faults.append("prepare.shards, prepare.views and prepare.frames must be at least 1")
    if c.prepare.mask_threshold < 0 or not 0 <= c.prepare.validation_share <= 1:
        faults.append("prepare.mask_threshold is at least 0 (pixels), prepare.validation_share a share: 0..1")
    if c.loss.group_rows < 0:
        faults.append("loss.group_rows must be at least 0 (0: one mean over the global batch)")
    if [c.mesh.data, c.mesh.fsdp, c.mesh.tensor].count(-1) > 1:
        faults.append("only one of mesh.data, mesh.fsdp, mesh.tensor may be -1")
    if c.optim.warmup_steps < 0 or c.optim.epochs < 1 or c.optim.steps_per_epoch < 1:
        faults.append("optim.warmup_steps must be >= 0, optim.epochs and optim.steps_per_epoch >= 1")
    if c.world.width < 320 or c.world.height < 240 or c.world.width % 2 or c.world.height % 2:
        faults.append("world.width and world.height must be even and at least 320x240 (h264, 4:2:0)")
    if faults:
        raise ConfigError(faults[0])


# ------------------------------------------------------------------------------------------------ preset of the released code
def released(c: HawkConfig, stage: Literal[1, 2]) -> HawkConfig:
    """Every option where paper and released code disagree, as the released checkpoints need it; `stage` is the training stage."""
    r = dataclasses.replace
    return r(
        c,
        input=r(c.input, mask="binary", branch_crops="independent", branch_frames="independent" if stage == 1 else "shared",
                first_motion_index="one", prompt="released", phrases="direct", text_mask="not_unk",
                max_caption_tokens=32, end_symbol="\n", clean_captions=True, description_replacement="in_place"),
        model=r(c.model, qformer_copies=2, train_query_tokens_motion=True, pixels="unit", overshoot="clip", antialias=False),
        loss=r(c.loss, motion_language_of="motion_text" if stage == 1 else "video_language", group_rows=1, cosine="group"),
        optim=r(c.optim, warmup_counter="inner_epoch", clip_norm=None),
    )


# ------------------------------------------------------------------------------------------------ files
def load(file: str, assignments: list[str] = ()) -> HawkConfig:
    """Runs `FILE.py` or `FILE.py:FUNCTION` (default function: `config`) and applies the assignments.

    Raises ConfigError if the file or function is missing, fails, or does not return a HawkConfig.
    """
    path, _, name = file.partition(":")
    module, name = _module(path), name or "config"
    function = getattr(module, name, None)
    if not callable(function):
        known = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and callable(v) and k[0] != "_"]
        raise ConfigError(f"{path} has no function {name!r}; there is: {', '.join(known)}")
    config = _attempt(f"{path}:{name}", function)
    if not isinstance(config, HawkConfig):
        raise ConfigError(f"{path}:{name} returned {type(config).__name__}, not HawkConfig")
    return override(config, list(assignments))


def _module(path: str):
    """The configuration file as a module."""
    if not Path(path).is_file() or Path(path).suffix != ".py":
        near = difflib.get_close_matches(Path(path).name, [p.name for p in Path("configs").glob("*.py")], 1)
        raise ConfigError(f"no configuration file {path!r} (a .py file)" + (f"; did you mean 'configs/{near[0]}'?" if near else ""))
    spec = importlib.util.spec_from_file_location(f"hawk_config_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    _attempt(path, lambda: spec.loader.exec_module(module))
    return module


def _attempt(what: str, run):
    """run(); whatever goes wrong in a file of the user's becomes one line."""
    try:
        return run()
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"{error.filename or what}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        raise ConfigError(f"{what} cannot be run: {type(error).__name__}: {' '.join(str(error).split())}") from error
