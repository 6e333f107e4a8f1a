"""Stage 2 of HAWK at full size: descriptions and question-answer pairs of seven anomaly data sets, from a stage-1 run.

    python -m hawk_jax config configs/hawk_7b_stage2.py
    python -m hawk_jax config configs/hawk_7b_stage2.py:released2
"""
import dataclasses

from configs.hawk_7b_stage1 import config as stage1
from hawk_jax.config import DataSource, HawkConfig, released


def config() -> HawkConfig:
    """Stage 1's recipe on conversations; the motion-language loss stays on (Eq. 8)."""
    base, r = stage1(), dataclasses.replace
    return r(
        base,
        input=r(base.input, datasets=(DataSource("data_sets/hawk"),), conversation_share=1.0, buckets=(256, 384, 512, 640, 768)),
        run=r(base.run, name="hawk_stage2", folder="runs/hawk_stage2", init_from="runs/hawk_stage1"),
    )


def released2() -> HawkConfig:
    """The same run as the released code makes it: no motion-language loss, video-language counted 1.1 times."""
    return released(config(), stage=2)
