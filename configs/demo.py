"""The five-minute demo: a small HAWK on a small synthetic world, every stage of the real recipe.

    python -m hawk_jax demo configs/demo.py                    all stages, report, export
    python -m hawk_jax train configs/demo.py:stage1            one stage
    python -m hawk_jax config configs/demo.py optim.clip_norm=None

Widths of 64-128 replace 768-4096; the code is the code of the 7B model.  Initial values are fan-in scaled because BERT's 0.02
was meant for width 768: with it the tiny Q-Formers stay on a plateau that ignores the video.
"""
from hawk_jax.config import (
    DataSource,
    GenerateConfig,
    HawkConfig,
    InputConfig,
    LlamaConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PrepareConfig,
    PretrainConfig,
    QFormerConfig,
    RunConfig,
    VitConfig,
    WorldConfig,
)

FOLDER = "runs/demo"
CLASSES = ("walking", "running", "driving", "wrong_way", "standing_up", "falling", "empty", "fire", "collision", "pavement_car")
WORLD = WorldConfig(train_clips=320, validation_clips=20, test_clips=100, seconds=(5.0, 7.0), classes=CLASSES)
PRETRAIN = PretrainConfig(encoder_steps=250, branch_steps=250, decoder_steps=280)
STEPS = {1: 320, 2: 280}
TOKENS = 128                            # of a conversation: two or three rounds


def tiny_model() -> ModelConfig:
    """A HAWK of 1.3 M values, all in float32: bf16 gains nothing on a CPU."""
    return ModelConfig(
        vit=VitConfig(image_size=56, patch_size=14, width=64, depth=2, heads=2, mlp=256),
        image_qformer=QFormerConfig(queries=8, width=64, depth=2, heads=2, mlp=256, cross_attention_freq=2),
        video_qformer=QFormerConfig(queries=8, width=64, depth=2, heads=2, mlp=256, cross_attention_freq=1, dropout=0.0),
        llama=LlamaConfig(vocab=512, width=128, depth=3, heads=4, mlp=336, max_positions=512),
        frame_positions=32, compress=16, frozen_dtype="float32", compute_dtype="float32", remat="none", frames_per_chunk=512,
        init="fan_in")


def stage(number: int, folder: str = FOLDER, world: WorldConfig = WORLD, pretrain: PretrainConfig = PRETRAIN,
          steps: dict[int, int] = STEPS, tokens: int = TOKENS) -> HawkConfig:
    """Stage 1 learns captions from fresh trainables, stage 2 conversations from stage 1."""
    return HawkConfig(
        world=world,
        prepare=PrepareConfig(size=112, frames=8, views=1, shards=4),
        pretrain=pretrain,
        input=InputConfig(
            datasets=(DataSource(f"{folder}/records"),), clips=32, views=1, features="memory", tokenizer="embedded", crop="none",
            conversation_share=0.0 if number == 1 else 1.0, max_caption_tokens=96, max_conversation_tokens=tokens),
        model=tiny_model(),
        loss=LossConfig(chunk_tokens=8192),
        optim=OptimConfig(
            learning_rate=2e-3, min_learning_rate=1e-4, warmup_learning_rate=1e-4, warmup_steps=50, steps_per_epoch=steps[number],
            epochs=1, beta2=0.98, weight_decay=0.02),
        mesh=MeshConfig(strategy="replicated", data=-1, fsdp=1),
        generate=GenerateConfig(max_new_tokens=64, clips=50, questions=2),
        run=RunConfig(
            name=f"stage{number}", folder=f"{folder}/stage{number}", frozen=f"{folder}/frozen",
            init_from="" if number == 1 else f"{folder}/stage1", checkpoint_every=steps[number] // 2,
            validate_every=steps[number] // 4, validation_batches=2),
    )


def stage1() -> HawkConfig:
    return stage(1)


def stage2() -> HawkConfig:
    return stage(2)


config = stage2
