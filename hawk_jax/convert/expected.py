"""What JAX computes of made-up clips and prompts, for an exported folder to be compared with (proof.safetensors, convert/proof.py)."""
import contextlib
import dataclasses
import functools

import jax
import numpy as np

from hawk_jax.config import ModelConfig
from hawk_jax.inference.decode import Prompts, greedy_ids
from hawk_jax.mesh import replicated, use
from hawk_jax.models.build import bind

EXPECTED = "proof.safetensors"
CLIPS, FRAMES, WORDS, NEW = 2, 4, 12, 32


def random_inputs(config: ModelConfig, size: int) -> dict[str, np.ndarray]:
    """Clips, masks and prompts of random words, from a fixed seed; prompts hold all visual tokens."""
    draw, queries = np.random.default_rng(20241), config.video_qformer.queries
    times = min(FRAMES, config.frame_positions)
    words = min(WORDS, config.llama.max_positions - 2 * queries - 2)
    tokens_RS = np.zeros((CLIPS, 1 + 2 * queries + words), np.int64)
    tokens_RS[:, 0], tokens_RS[:, 1 + 2 * queries:] = 1, draw.integers(3, config.llama.vocab, (CLIPS, words))
    slots_RS = np.full(tokens_RS.shape, -1)
    slots_RS[:, 1:1 + 2 * queries] = np.arange(2 * queries)
    return {"frames_BTHWC": draw.integers(0, 256, (CLIPS, times, size, size, 3), np.uint8),
            "masks_BTHW": draw.integers(0, 256, (CLIPS, times, size, size), np.uint8), "tokens_RS": tokens_RS, "slots_RS": slots_RS}


def expected_values(params: dict, config: ModelConfig, size: int, mesh=None, strategy: str = "replicated") -> dict[str, np.ndarray]:
    """`random_inputs` and JAX's results: visual_BQD, video_BQZ, motion_BQZ, logits_RSV, greedy_RN, all computed in float32.

    Parameters keep their dtype where they lie and are widened layer by layer.  size: side of the pictures in pixels.
    """
    wide = dataclasses.replace(config, frozen_dtype="float32", compute_dtype="float32", remat="none")
    inputs = random_inputs(config, size)
    narrow = {k: v.astype(np.int32) if v.dtype == np.int64 else v for k, v in inputs.items()}
    new = min(NEW, config.llama.max_positions - inputs["tokens_RS"].shape[1])
    with use(mesh, strategy) if mesh is not None else contextlib.nullcontext(), jax.default_matmul_precision("highest"):
        outputs = _program(wide, new, replicated(mesh) if mesh is not None else None)(params, narrow)
    return inputs | {f"jax/{name}": np.asarray(value.addressable_data(0)) for name, value in outputs.items()}


@functools.lru_cache(8)
def _program(config: ModelConfig, new_tokens: int, place):
    """The jitted f(params, inputs) -> results of `expected_values`, each whole on every device of `place`."""
    def run(params, inputs):
        model, tokens_RS = bind(config, params), inputs["tokens_RS"]
        whole_B4 = np.tile(np.float32([0, 0, 1, 1]), (CLIPS, 1))
        tokens = model.image_tokens({"frames_BTHWC": inputs["frames_BTHWC"], "mask_BTHW": inputs["masks_BTHW"], "crop_B4": whole_B4})
        visual_BQD, video_BQZ, motion_BQZ = model.branch_tokens(*tokens)
        clip_RS = np.broadcast_to(np.arange(CLIPS)[:, None], tokens_RS.shape)
        x_RSD = model.embed_rows({"tokens_RS": tokens_RS, "slot_RS": inputs["slots_RS"], "clip_RS": clip_RS}, visual_BQD)
        ones_RS, position_RS = np.ones(tokens_RS.shape, np.int32), np.broadcast_to(np.arange(tokens_RS.shape[1]), tokens_RS.shape)
        logits_RSV = model.llama.logits(model.llama.hidden(x_RSD, ones_RS, position_RS))
        prompts = Prompts(x_RSD, ones_RS > 0, np.full(CLIPS, tokens_RS.shape[1], np.int32))
        return {"visual_BQD": visual_BQD, "video_BQZ": video_BQZ, "motion_BQZ": motion_BQZ, "logits_RSV": logits_RSV,
                "greedy_RN": greedy_ids(model.llama, prompts, new_tokens)}
    return jax.jit(run, out_shardings=place)
