"""The key table against the authors' state dict at real size, and both ways on values."""
import dataclasses
import json

import golden_weights as separate_mapping
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from hawk_jax.config import LlamaConfig, ModelConfig, QFormerConfig, VitConfig
from hawk_jax.convert import keys
from hawk_jax.models import build

SMALL = ModelConfig(
    vit=VitConfig(image_size=56, width=64, depth=3, heads=4, mlp=279),
    image_qformer=QFormerConfig(queries=8, width=48, depth=4, heads=4, mlp=192),
    video_qformer=QFormerConfig(queries=8, width=48, depth=2, heads=4, mlp=192, cross_attention_freq=1),
    llama=LlamaConfig(vocab=480, width=64, depth=2, heads=4, mlp=172, max_positions=128),
    frozen_dtype="float32", compute_dtype="float32", vit_copies=2, qformer_copies=2)     # sizes of the full-model golden
ONE_COPY = dataclasses.replace(SMALL, vit_copies=1, qformer_copies=1)
ODD = dataclasses.replace(SMALL, image_qformer=dataclasses.replace(SMALL.image_qformer, depth=5, cross_attention_freq=3))


def numbers(config: ModelConfig) -> dict:
    """A parameter tree in which every value occurs once."""
    start = iter(range(0, 10**9, 10**6))
    return jax.tree.map(lambda leaf: np.arange(leaf.size, dtype=np.float64).reshape(leaf.shape) + next(start),
                        build.abstract_params(config))


def golden_weights(shared, unit: str) -> dict:
    tensors = load_file(shared / "goldens" / "hawk" / f"{unit}.safetensors")
    return {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}


@pytest.mark.parametrize("copies", [1, 2])
def test_real_size_names_and_shapes_are_the_authors(shared, copies):
    """The list came from the authors' class on torch's meta device; here nothing is allocated either."""
    config = ModelConfig(vit_copies=copies, qformer_copies=copies)
    ours = jax.eval_shape(lambda p: keys.to_torch(p, config), build.abstract_params(config))
    listed = json.loads((shared / "specs" / "hawk_state_dict_keys.json").read_text())
    assert {k: v.shape for k, v in ours.items()} == {k: tuple(s) for k, s, kind in listed if kind != "buffer"}
    buffers = [k for k, _, kind in listed if kind == "buffer"]
    assert len(buffers) == 36 and all(keys.IGNORED.search(k) for k in buffers)
    assert not any(keys.IGNORED.search(k) for k in ours)


def test_branch_names_are_what_the_authors_train(shared):
    """`train` in the list is requires_grad in the authors' model: the subtrees `video` and `motion` and one query tensor."""
    listed = json.loads((shared / "specs" / "hawk_state_dict_keys.json").read_text())
    trained = {e.key for e in keys.table(ModelConfig(qformer_copies=2)) if e.path[0] in ("video", "motion")}
    assert trained | {"query_tokens_motion"} == {k for k, _, kind in listed if kind == "train"}


@pytest.mark.parametrize("config", [SMALL, ONE_COPY, ODD], ids=["two_copies", "one_copy", "with_tail"])
def test_round_trip_is_bit_exact(config):
    params = numbers(config)
    back = keys.from_torch(keys.to_torch(params, config), config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_golden_state_dict_survives_both_ways(shared):
    """From the authors' tensors to our tree and back: every tensor comes back as it was, none is invented."""
    weights = golden_weights(shared, "full_model_stage1")
    params = keys.from_torch(weights, SMALL)
    jax.tree.map(lambda a, b: (a.shape == b.shape) or pytest.fail(f"{a.shape} {b.shape}"), params, build.abstract_params(SMALL))
    back = keys.to_torch(params, SMALL)
    assert set(weights) - set(back) == {k for k in weights if keys.IGNORED.search(k)} and not set(back) - set(weights)
    for key, value in back.items():
        np.testing.assert_array_equal(value, weights[key], err_msg=key)


def test_layouts_match_the_operations_they_stand_for():
    """A dot product by our layout equals torch's own operation on the translated tensor (float64, so only rounding differs)."""
    torch = pytest.importorskip("torch")
    params, draw = numbers(ONE_COPY), np.random.default_rng(0)
    vit = params["encoder"]["vit"]
    vit["patch_embed"]["kernel"] = draw.normal(size=vit["patch_embed"]["kernel"].shape)
    vit["blocks"]["attention"]["qkv"] = draw.normal(size=vit["blocks"]["attention"]["qkv"].shape)
    tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in keys.to_torch(params, ONE_COPY).items()}
    picture_HWC, x_M = draw.normal(size=(14, 14, 3)), draw.normal(size=64)
    ours = picture_HWC.reshape(-1) @ vit["patch_embed"]["kernel"][0]
    theirs = torch.nn.functional.conv2d(torch.from_numpy(picture_HWC.transpose(2, 0, 1))[None],
                                        tensors["visual_encoder.patch_embed.proj.weight"])
    np.testing.assert_allclose(ours, theirs.numpy().ravel(), rtol=1e-12, atol=1e-12)
    q, k, v = (x_M @ vit["blocks"]["attention"]["qkv"][0, 1, :, j] for j in range(3))
    theirs = torch.nn.functional.linear(torch.from_numpy(x_M), tensors["visual_encoder.blocks.1.attn.qkv.weight"])
    np.testing.assert_allclose(np.concatenate([q, k, v]), theirs.numpy(), rtol=1e-12, atol=1e-12)


def test_agrees_with_the_mapping_the_golden_tests_use(shared):
    """tests/golden_weights.py was written apart from the table, by another hand, from the specification's lists."""
    weights = golden_weights(shared, "full_model_stage1")
    other = separate_mapping.from_torch(weights, SMALL)
    jax.tree.map(np.testing.assert_array_equal, keys.from_torch(weights, SMALL), other)


def test_parts_read_a_unit_alone(shared):
    llama = {f"llama_model.{k}": v for k, v in golden_weights(shared, "llama").items()}
    config = dataclasses.replace(SMALL, llama=dataclasses.replace(SMALL.llama, vocab=101))
    tree = keys.from_torch(llama, config, parts=("llama",))
    assert set(tree) == {"llama"} and tree["llama"]["layers"]["mlp"]["down"]["kernel"].shape == (2, 172, 64)


def test_what_does_not_fit_is_named(shared):
    good = keys.to_torch(numbers(SMALL), SMALL)

    def fails(tensors, config=SMALL):
        with pytest.raises(keys.KeyTableError) as error:
            keys.from_torch(tensors, config)
        assert "\n" not in str(error.value)
        return str(error.value)
    misspelt = {k.replace("llama_proj_0.bias", "llama_proj_O.bias"): v for k, v in good.items()}
    assert "lacks llama_proj_0.bias; nearest known: llama_proj_O.bias" in fails(misspelt)
    assert "holds head.weight" in fails(good | {"head.weight": np.zeros(3)})
    message = fails(good | {"ln_vision.weight": np.zeros(63)})
    assert "ln_vision.weight has shape (63,)" in message and "(64,)" in message
    assert "qformer_copies=2" in fails(good, ONE_COPY)               # the copies hold different numbers
    assert "visual_encoder.blocks.2" in fails({k: v for k, v in good.items() if ".blocks.2." not in k})
    with pytest.raises(keys.KeyTableError, match="video/proj_0/kernels"):
        keys.to_torch({"video": {"proj_0": {"kernels": np.zeros((2, 2))}}}, SMALL)
