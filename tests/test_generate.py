"""Cached decoding, greedy and with beams, against transformers' own greedy ids and against decoding without a cache."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from golden_weights import LLAMA, TINY, golden

from data.rows import KEYS, generation_prompt
from data.text import EOS, Tokenizer
from hawk_jax.config import GenerateConfig, HawkConfig, HawkError, InputConfig, LlamaConfig, MeshConfig
from hawk_jax.convert.keys import from_torch
from hawk_jax.inference.decode import Prompts, beam_ids
from hawk_jax.inference.generate import Generator, generate_ids
from hawk_jax.mesh import make_mesh
from hawk_jax.models import build

QUERIES = TINY.video_qformer.queries


@pytest.fixture(scope="module")
def tiny():
    """Random weights, with a large head and embedding: the likeliest token then leads by far more than rounding."""
    draw = np.random.default_rng(0)
    flat = {path: np.float32(draw.normal(0, leaf.shape[-2] ** -0.5, leaf.shape)) if leaf.ndim > 2 else np.ones(leaf.shape, np.float32)
            for path, leaf in build.flatten(build.abstract_params(TINY)).items()}
    for path in (("llama", "embed_tokens"), ("llama", "lm_head", "kernel")):
        flat[path] = np.float32(draw.normal(0, 1, flat[path].shape))
    return unflatten_dict(flat)


def row(texts: list[int], slots: int) -> dict:
    """BOS, `slots` visual tokens, some text."""
    tokens = np.array([1, *[0] * slots, *texts], np.int32)
    slot = np.array([-1, *range(slots), *[-1] * len(texts)], np.int32)
    ones = np.ones(len(tokens), np.int32)
    return {"tokens": tokens, "targets": 0 * ones, "loss": (0 * ones).astype(np.uint8), "segment": ones,
            "position": np.arange(len(tokens), dtype=np.int32), "slot": slot}


@jax.jit
def _logits(params, visual_QD, tokens_RS, slot_RS, segment_RS):
    model = build.bind(TINY, params)
    x_RSD = model.embed_rows({"tokens_RS": tokens_RS, "slot_RS": slot_RS, "clip_RS": 0 * tokens_RS}, visual_QD[None])
    return model.llama.logits(model.llama.hidden(x_RSD, segment_RS, jnp.arange(tokens_RS.shape[1])[None])[0])


def without_cache(params, visual_QD, prompt: dict, count: int) -> list[int]:
    """Greedy ids by the training forward pass over the whole row, again for every token, of one row alone."""
    ids, width = [], -(-(len(prompt["tokens"]) + count) // 64) * 64
    for _ in range(count):
        tokens, slot = np.append(prompt["tokens"], np.array(ids, np.int32)), np.append(prompt["slot"], np.full(len(ids), -1))
        pad = (0, width - len(tokens))
        logits_SV = _logits(params, visual_QD, np.pad(tokens, pad)[None], np.pad(slot, pad, constant_values=-1)[None],
                            np.pad(np.ones(len(tokens), np.int32), pad)[None])
        ids.append(int(jnp.argmax(logits_SV[len(tokens) - 1])))
        if ids[-1] == EOS:
            break
    return ids


def arrays(prompts: list[dict], clips: list[int], width: int) -> dict:
    def padded(key, fill):
        return np.stack([np.pad(p[key], (0, width - len(p[key])), constant_values=fill) for p in prompts])
    return {"tokens_RS": padded("tokens", 0), "slot_RS": padded("slot", -1), "segment_RS": padded("segment", 0),
            "length_R": np.array([len(p["tokens"]) for p in prompts], np.int32), "clip_R": np.array(clips, np.int32)}


def test_greedy_ids_of_transformers(shared):
    """transformers generated from these embeddings; they stand in as 19 visual tokens.  Its output starts with a BOS of its own."""
    weights, inputs, outputs, _ = golden(shared, "llama")
    llama = from_torch({f"llama_model.{k}": v for k, v in weights.items()}, LLAMA, parts=("llama",))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), build.abstract_params(LLAMA))
    params = zeros | llama
    prompt = row([], 18)
    prompt["slot"] = np.arange(19, dtype=np.int32)
    for name, beams in (("greedy_ids_raw", 1), ("beam3_ids_raw", 3)):
        expected = outputs[name][0, 1:].tolist()
        ids = generate_ids(params, inputs["inputs_embeds"][:1], arrays([prompt], [0], 32), LLAMA, len(expected), (), beams)
        assert ids[0].tolist() == expected, name


@pytest.mark.parametrize("beams,penalty,stops", [(2, 1.0, (5,)), (4, 1.0, (5, 9, 30)), (3, -1.0, (5, 9)), (3, 2.0, (5,))])
def test_beams_that_end_are_those_of_transformers(beams, penalty, stops):
    """Random decoders whose end tokens are likely: hypotheses of different lengths compete.  Ids of its `generate`, row by row, against
    ours for all rows at once, with grouped-query heads besides."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, initializer_range=0.3, rms_norm_eps=1e-5)).eval()
    with torch.no_grad():
        theirs.lm_head.weight[list(stops)] *= 3
    decoder = LlamaConfig(vocab=40, width=32, depth=2, heads=4, kv_heads=2, mlp=48, eps=1e-5, max_positions=64)
    model = dataclasses.replace(TINY, llama=decoder)
    weights = {f"llama_model.{k}": v.numpy() for k, v in theirs.state_dict().items()}
    params = build.abstract_params(model) | from_torch(weights, model, parts=("llama",))
    lengths, x_RSD = [7, 11, 5], np.random.default_rng(beams).normal(size=(3, 11, 32)).astype(np.float32)

    @jax.jit
    def ours(llama, x_RSD):
        prompts = Prompts(x_RSD, jnp.arange(11)[None] < jnp.array(lengths)[:, None], jnp.array(lengths))
        return beam_ids(build.bind(model, params | {"llama": llama}).llama, prompts, 12, beams, stops, penalty)
    ids_RN, ended = np.asarray(ours(params["llama"], x_RSD)), []
    for x_SD, length, ids in zip(x_RSD, lengths, ids_RN):
        expected = theirs.generate(inputs_embeds=torch.from_numpy(x_SD[None, :length]), num_beams=beams, max_new_tokens=12, do_sample=False,
                                   length_penalty=penalty, eos_token_id=list(stops), pad_token_id=0)[0].tolist()
        assert ids[:len(expected)].tolist() == expected and not ids[len(expected):].any()
        ended.append(expected[-1] in stops)
    assert any(ended), "nothing ended early: the test would show nothing"


def test_equal_to_decoding_without_a_cache(tiny):
    """Prompts of different lengths about two clips in one batch; ids must be equal, each computed alone without padding."""
    visual_BQD = 3 * jax.random.normal(jax.random.key(1), (2, 2 * QUERIES, TINY.llama.width))
    prompts, clips = [row([7, 8, 9], 16), row([40] * 11, 16), row([], 8), row([7, 8, 9], 16)], [0, 1, 1, 1]
    ids = np.asarray(generate_ids(tiny, visual_BQD, arrays(prompts, clips, 32), TINY, 9))
    alone = [without_cache(tiny, visual_BQD[c], p, 9) for p, c in zip(prompts, clips)]
    assert [r[:len(a)].tolist() for r, a in zip(ids, alone)] == alone
    assert alone[0] != alone[3], "the same prompt about another clip must be able to differ"
    assert len({t for a in alone for t in a}) > 8, "a constant output would prove nothing"


def test_a_row_ends_at_its_stop_id_and_the_others_go_on(tiny):
    visual_BQD = 3 * jax.random.normal(jax.random.key(1), (2, 2 * QUERIES, TINY.llama.width))
    batch = arrays([row([7, 8, 9], 16), row([40] * 11, 16)], [0, 1], 32)
    free = np.asarray(generate_ids(tiny, visual_BQD, batch, TINY, 8, (-1,)))
    stop = int(free[0, 2])
    assert stop not in free[1, :-1]
    ids = np.asarray(generate_ids(tiny, visual_BQD, batch, TINY, 8, (stop,)))
    assert ids[0, :3].tolist() == free[0, :3].tolist() and not ids[0, 3:].any()
    assert ids[1].tolist() == free[1].tolist()


def config(shared, **generate) -> HawkConfig:
    tokenizer = str(shared / "goldens" / "hawk" / "toy_tokenizer" / "tokenizer.model")
    return HawkConfig(model=TINY, input=InputConfig(tokenizer=tokenizer, conversation_share=1.0, max_conversation_tokens=256),
                      generate=GenerateConfig(**generate), mesh=MeshConfig(data=2, fsdp=4))


def test_texts_do_not_depend_on_grouping_or_mesh(shared, tiny):
    """Five questions about three clips: all at once, in groups of two (the last filled up), and over 8 devices."""
    c = config(shared, max_new_tokens=6)
    tokenizer = Tokenizer(c.input.tokenizer)
    visual_BQD = 3 * jax.random.normal(jax.random.key(1), (3, 2 * QUERIES, TINY.llama.width))
    questions = [None, "What is it?", "Is there a car in the street, and if there is one, where does it go?", "Who?", "Who?"]
    prompts = [generation_prompt(tokenizer, c.input, QUERIES, q) for q in questions]
    clips = [0, 1, 2, 0, 2]
    whole = Generator(c, tiny, tokenizer).texts(visual_BQD, prompts, clips)
    assert len(set(whole)) > 2 and all(set(KEYS) == set(p) for p in prompts)
    assert Generator(c, tiny, tokenizer).texts(visual_BQD, prompts, clips, rows=2) == whole
    mesh = make_mesh(c.mesh)
    spread = jax.device_put(tiny, build.shardings(TINY, mesh, c.mesh.strategy))
    assert Generator(c, spread, tokenizer, mesh).texts(visual_BQD, prompts, clips, rows=8) == whole
    # the text is what the ids without a cache say
    ids = without_cache(tiny, visual_BQD[2], prompts[2], 6)
    assert whole[2] == tokenizer.decode(ids)


def test_no_room_for_an_answer_is_said(shared, tiny):
    c = config(shared)
    c = dataclasses.replace(c, model=dataclasses.replace(TINY, llama=dataclasses.replace(TINY.llama, max_positions=256)))
    with pytest.raises(HawkError, match="max_positions=256"):
        Generator(c, tiny, Tokenizer(c.input.tokenizer)).texts(None, [row([5] * 250, 16)], [0])
