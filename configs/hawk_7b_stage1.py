"""Stage 1 of HAWK at full size: captions of WebVid, 32 frames of 224 pixels, LLaMA-2-7B-chat frozen (recipe of the released code).

    python -m hawk_jax config configs/hawk_7b_stage1.py
    python -m hawk_jax config configs/hawk_7b_stage1.py:released1

The defaults of hawk_jax/config.py are the sizes and the optimiser of the paper's models; this file adds where things lie.
"""
from hawk_jax.config import DataSource, HawkConfig, InputConfig, MeshConfig, OptimConfig, PrepareConfig, RunConfig, released


def config() -> HawkConfig:
    """What the paper means: shared crops, magnitude masks, CLIP-normalised pixels, motion-language loss."""
    return HawkConfig(
        prepare=PrepareConfig(size=224, frames=32, views=4, shards=256),
        input=InputConfig(
            datasets=(DataSource("data_sets/webvid"),), clips=4, views=4, conversation_share=0.0,
            tokenizer="weights/llama-2-7b-chat/tokenizer.model", buckets=(192, 256, 320, 384)),
        optim=OptimConfig(learning_rate=1e-5, min_learning_rate=1e-6, warmup_learning_rate=1e-6, warmup_steps=1000,
                          epochs=160, steps_per_epoch=2500, weight_decay=0.05),
        mesh=MeshConfig(strategy="fsdp", data=1, fsdp=-1),
        run=RunConfig(name="hawk_stage1", folder="runs/hawk_stage1", frozen="weights/hawk_frozen", seed=42),
    )


def released1() -> HawkConfig:
    """The same run as the released code makes it."""
    return released(config(), stage=1)
