"""Every module against the authors' PyTorch modules (float32, small random weights).

Tolerance: 1e-5 of the largest value.  The goldens themselves are float32 with another order of summation: their own rounding was
measured as 2e-6 absolute at magnitude 4.
"""
import jax
import jax.numpy as jnp
import numpy as np
from golden_weights import GOLDEN, LLAMA, TINY, from_torch, golden

from hawk_jax.models import build


def close(ours, theirs):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def first(module):
    """The only copy of an encoder part."""
    return jax.tree.map(lambda x: x[0], module)


def test_eva_vit(shared):
    weights, inputs, outputs, _ = golden(shared, "eva_vit")
    encoder = build.bind(TINY, from_torch(weights, TINY)).encoder
    features = first(encoder.vit)(jnp.asarray(inputs["image"].transpose(0, 2, 3, 1)))
    close(features, outputs["features"])
    close(first(encoder.ln_vision)(features), outputs["ln_vision"])


def test_image_qformer(shared):
    weights, inputs, outputs, _ = golden(shared, "qformer")
    encoder = build.bind(TINY, from_torch(weights, TINY)).encoder
    close(first(encoder.qformer)(encoder.query_tokens[...][0], jnp.asarray(inputs["image_embeds"])), outputs["last_hidden_state"])


def test_frame_positions_and_video_qformer(shared):
    weights, inputs, outputs, _ = golden(shared, "video_qformer")
    video = build.bind(TINY, from_torch(weights, TINY)).video
    tokens_BTQE = inputs["frame_tokens"].reshape(2, 4, 8, 48)
    source = jnp.asarray(tokens_BTQE + np.asarray(video.frame_positions[...])[None, :4, None])
    close(source.reshape(2, 32, 48), outputs["frame_hidden_state"])
    close(video.qformer(video.queries[...], source.reshape(2, 32, 48)), outputs["last_hidden_state"])


def test_projection_chains(shared):
    weights, inputs, outputs, _ = golden(shared, "projection")
    hawk = build.bind(TINY, from_torch(weights, TINY))
    for branch, mark in ((hawk.video, ""), (hawk.motion, "_motion")):
        visual, compressed = branch.project(jnp.asarray(inputs[f"video_hidden{mark}"]))
        close(branch.proj_0(jnp.asarray(inputs[f"video_hidden{mark}"])), outputs[f"proj_0{mark}"])
        close(visual, outputs[f"inputs_llama{mark}"])
        close(compressed, outputs[f"middle_result{mark}"])


def llama(shared):
    weights, inputs, outputs, _ = golden(shared, "llama")
    decoder = build.bind(LLAMA, from_torch({f"llama_model.{k}": v for k, v in weights.items()}, LLAMA)).llama
    return decoder, {k: jnp.asarray(v) for k, v in inputs.items()}, outputs


def test_llama_logits(shared):
    decoder, inputs, outputs = llama(shared)
    mask_RS = inputs["attention_mask"]
    position_RS = jnp.broadcast_to(jnp.arange(19), (2, 19))
    logits = decoder.logits(decoder.hidden(inputs["inputs_embeds"], mask_RS, position_RS))
    kept = np.asarray(mask_RS, bool)                    # states of padded tokens are meaningless on both sides
    close(logits[kept], outputs["logits"][kept])
    ids = inputs["input_ids"]
    close(decoder.logits(decoder.hidden(decoder.embed(ids), jnp.ones_like(ids), position_RS)), outputs["logits_from_ids"])


def test_llama_decoding_with_a_cache(shared):
    """Prefill of row 0, then four given tokens, against transformers' past_key_values."""
    decoder, inputs, outputs = llama(shared)
    x_RSD = inputs["inputs_embeds"][:1]
    h, cache = decoder.prefill(x_RSD, jnp.ones((1, 19)), jnp.arange(19)[None], decoder.init_cache(1, 32))
    close(decoder.logits(h), outputs["prefill_logits"])
    steps = []
    step = jax.jit(decoder.step)
    for number, slot in enumerate(range(19, 23)):
        x_RD = decoder.embed(inputs["decode_step_ids"][:, number])
        h, cache = step(x_RD, jnp.array([slot]), jnp.arange(32)[None] < slot, slot, cache)
        steps.append(decoder.logits(h))
    close(jnp.stack(steps, 1), outputs["decode_logits"])


def test_whole_model_to_the_decoder(shared):
    """Both branches from pictures to visual tokens, and the rows the decoder receives (stage 1: BOS, visual tokens, text)."""
    weights, inputs, outputs, _ = golden(shared, "full_model_stage1")
    hawk = build.bind(GOLDEN, from_torch(weights, GOLDEN))
    both = [jnp.asarray(inputs[f"image{m}"]).transpose(0, 2, 3, 4, 1).reshape(8, 56, 56, 3) for m in ("", "_motion")]
    tokens = hawk.encoder(jnp.stack(both, 1)).reshape(2, 4, 2, 8, 48)
    visual_BQD, video_BQZ, motion_BQZ = hawk.branch_tokens(tokens[:, :, 0], tokens[:, :, 1])
    close(visual_BQD, np.concatenate([outputs["video_embeds"], outputs["motion_embeds"]], 1))
    close(video_BQZ, outputs["middle_result"])
    close(motion_BQZ, outputs["middle_result_motion"])
    for call, first_slot, text in ((0, 0, "text_ids"), (1, 8, "text_motion_ids")):
        slots = np.arange(first_slot, 16)
        ids = np.concatenate([np.full((2, 1), 1), np.zeros((2, len(slots))), inputs[text]], 1).astype(np.int32)
        slot_RS = np.full(ids.shape, -1)
        slot_RS[:, 1:1 + len(slots)] = slots
        clip_RS = np.arange(2)[:, None].repeat(ids.shape[1], 1)
        rows = hawk.embed_rows({"tokens_RS": ids, "slot_RS": slot_RS, "clip_RS": clip_RS}, visual_BQD)
        close(rows, outputs[f"llama_call{call}_inputs_embeds"])
