"""The full synthetic world: every class, enough clips to measure what each branch is worth.  Up to 40 minutes on two cores.

    python -m hawk_jax demo configs/synthetic.py
    python -m hawk_jax demo configs/synthetic.py --out runs/synthetic_seed1 run.seed=1 model.seed=1
"""
from configs.demo import stage
from hawk_jax.config import HawkConfig, PretrainConfig, WorldConfig

FOLDER = "runs/synthetic"
WORLD = WorldConfig(train_clips=1800, validation_clips=90, test_clips=270, seconds=(5.0, 8.0))
PRETRAIN = PretrainConfig(encoder_steps=700, branch_steps=1000, decoder_steps=800)
STEPS = {1: 700, 2: 800}
TOKENS = 256                            # every round of the longest conversation


def stage1() -> HawkConfig:
    return stage(1, FOLDER, WORLD, PRETRAIN, STEPS, TOKENS)


def stage2() -> HawkConfig:
    return stage(2, FOLDER, WORLD, PRETRAIN, STEPS, TOKENS)


config = stage2
