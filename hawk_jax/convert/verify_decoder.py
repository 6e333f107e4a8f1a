"""The unit of the LLaMA decoder: states, logits, loss and its gradient, decoding with a cache, greedy and beam search."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from hawk_jax.config import LlamaConfig, ModelConfig
from hawk_jax.convert.verify_model import bound, layer, model_config, parameters
from hawk_jax.convert.verify_unit import Sheet, Unit, UnitError
from hawk_jax.inference.decode import Prompts, beam_ids, greedy_ids
from hawk_jax.models.attention import attend
from hawk_jax.models.llama import causal_mask
from hawk_jax.training.losses import cross_entropies

BOS, CHUNK = 1, 1024        # transformers 4.28 puts a BOS in front of what it generates from embeddings; tokens per chunk of the head


def llama_config(unit: Unit, prefix: str = "", eps: str = "rms_norm_eps") -> LlamaConfig:
    """From the fields that begin with `prefix`."""
    i = unit.info
    c = LlamaConfig(vocab=i[f"{prefix}vocab"], width=i[f"{prefix}hidden"], depth=i[f"{prefix}layers"], heads=i[f"{prefix}heads"],
                    kv_heads=i.get(f"{prefix}kv_heads"), mlp=i[f"{prefix}intermediate"], eps=i[eps],
                    rope_theta=float(i.get("rope_theta", LlamaConfig.rope_theta)),
                    max_positions=i.get("max_position_embeddings", LlamaConfig.max_positions))
    if c.width % (2 * c.heads) or c.heads % c.groups:
        raise UnitError(f"{prefix}hidden {c.width} with {c.heads} heads, {c.groups} of keys and values, does not come out even")
    return c


def _rows(x_RSD):
    return jnp.broadcast_to(jnp.arange(x_RSD.shape[1]), x_RSD.shape[:2])


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, x_RSD, mask_RS, config: ModelConfig):
    llama = bound(config, params).llama
    h_RSD = llama.hidden(x_RSD, mask_RS, _rows(x_RSD))
    found, mask_RSU, turn = {"hidden_0": x_RSD}, causal_mask(mask_RS), llama._turn(_rows(x_RSD))
    for number in range(config.llama.depth):
        x_RSD = layer(llama.layers, number)(x_RSD, turn, lambda q, k, v: attend(q, k, v, mask_RSU))
        found[f"hidden_{number + 1}"] = x_RSD if number + 1 < config.llama.depth else h_RSD
    return found | {"logits": llama.logits(h_RSD)}


@functools.partial(jax.jit, static_argnames="config")
def _from_ids(params, ids_RS, config: ModelConfig):
    llama = bound(config, params).llama
    x_RSD = llama.embed(ids_RS)
    return llama.logits(llama.hidden(x_RSD, jnp.ones_like(ids_RS), _rows(x_RSD)))


@functools.partial(jax.jit, static_argnames="config")
def _loss(params, x_RSD, mask_RS, labels_RS, config: ModelConfig):
    """(loss, its gradient by the embeddings): the mean over all labels that count, each predicted by the token before it."""
    llama = bound(config, params).llama
    targets_RS = jnp.pad(labels_RS[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    weight_RS = (targets_RS != -100).astype(jnp.float32)

    def mean(x_RSD):
        h_RSD = llama.hidden(x_RSD, mask_RS, _rows(x_RSD))
        sums = cross_entropies(h_RSD, llama.lm_head.kernel[...], jnp.maximum(targets_RS, 0), {"loss": weight_RS}, CHUNK)
        return sums["loss"] / weight_RS.sum()
    return jax.value_and_grad(mean)(x_RSD)


@functools.partial(jax.jit, static_argnames="config")
def _cached(params, x_RSD, ids_RN, config: ModelConfig):
    """(logits of the prompt, logits after each of the given tokens), through the cache."""
    llama = bound(config, params).llama
    rows, width = x_RSD.shape[:2]
    slots = width + ids_RN.shape[1]
    h_RSD, cache = llama.prefill(x_RSD, jnp.ones((rows, width)), _rows(x_RSD), llama.init_cache(rows, slots))
    if not ids_RN.shape[1]:
        return llama.logits(h_RSD), None

    def one(cache, turn):
        slot, id_R = turn
        h_RD, cache = llama.step(llama.embed(id_R), jnp.full(rows, slot), jnp.arange(slots)[None] < slot, slot, cache)
        return cache, llama.logits(h_RD)
    _, steps = jax.lax.scan(one, cache, (jnp.arange(width, slots), ids_RN.T))
    return llama.logits(h_RSD), steps.swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames=("config", "new_tokens", "beams"))
def _generate(params, x_RSD, config: ModelConfig, new_tokens: int, beams: int):
    llama, (rows, width) = bound(config, params).llama, x_RSD.shape[:2]
    prompts = Prompts(x_RSD, jnp.ones((rows, width), bool), jnp.full(rows, width, jnp.int32))
    return greedy_ids(llama, prompts, new_tokens) if beams == 1 else beam_ids(llama, prompts, new_tokens, beams)


def verify_decoder(unit: Unit, sheet: Sheet) -> None:
    unit.expect("tied_embeddings", False)
    config = model_config(llama=llama_config(unit))
    unit.expect("head_dim", config.llama.width // config.llama.heads)
    params = parameters(unit, sheet, config, ("llama",), {f"llama_model.{name}": x for name, x in unit.weights.items()})
    i = unit.inputs
    x_RSD, mask_RS = i["inputs_embeds"], i["attention_mask"]
    kept, note = mask_RS.astype(bool), f"{(mask_RS == 0).sum()} padded tokens left out"
    for name, ours in _forward(params, x_RSD, mask_RS, config).items():
        sheet.output("forward", name, ours, keep=kept, note=note)
    if "logits_from_ids" in unit.outputs:
        sheet.output("forward", "logits_from_ids", _from_ids(params, i["input_ids"], config))
    if {"loss", "grad_inputs_embeds"} & unit.outputs.keys():
        loss, gradient = _loss(params, x_RSD, mask_RS, i["labels"], config)
        sheet.output("loss", "loss", np.asarray(loss)[None])
        sheet.output("gradient", "grad_inputs_embeds", gradient)
    if {"prefill_logits", "decode_logits"} & unit.outputs.keys():
        given = i["decode_step_ids"] if "decode_logits" in unit.outputs else np.zeros((1, 0), np.int32)
        prompt, steps = _cached(params, x_RSD[:1], given, config)
        sheet.output("forward", "prefill_logits", prompt)
        if steps is not None:
            sheet.output("forward", "decode_logits", steps)
    _generated(unit, sheet, params, config)


def _generated(unit: Unit, sheet: Sheet, params: dict, config: ModelConfig) -> None:
    """What is generated from row 0 of the embeddings, all of which is the prompt."""
    for name, theirs in unit.outputs.items():
        if found := re.fullmatch(r"greedy_ids_raw|beam(\d+)_ids_raw", name):
            ids_RN = _generate(params, unit.inputs["inputs_embeds"][:1], config, theirs.shape[-1] - 1, int(found[1] or 1))
            sheet.output("exact", name, np.pad(ids_RN, ((0, 0), (1, 0)), constant_values=BOS))
