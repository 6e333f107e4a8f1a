"""Exports read back by torch and transformers, which know nothing of this project."""
import dataclasses

import jax
import numpy as np
import pytest
from golden_weights import GOLDEN, TINY, golden

from data.text import Tokenizer
from hawk_jax.config import HawkConfig, HawkError, InputConfig
from hawk_jax.convert import keys, torch_files
from hawk_jax.convert.export import export, read_export
from hawk_jax.models import build
from hawk_jax.training.frozen import save_frozen

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def exported(shared, tmp_path_factory):
    """(folder, configuration, parameters): the authors' random weights of the full-model golden, one ViT for both branches."""
    weights, *_ = golden(shared, "full_model_stage1")
    model = dataclasses.replace(GOLDEN, train_query_tokens_motion=True)
    tokenizer = str(shared / "goldens" / "hawk" / "toy_tokenizer" / "tokenizer.model")
    config = HawkConfig(model=model, input=InputConfig(tokenizer=tokenizer))
    params = keys.from_torch(weights, model)
    folder = tmp_path_factory.mktemp("export") / "out"
    line = export(params, config, folder)
    assert line.startswith(f"{len([k for k in weights if not keys.IGNORED.search(k)])} tensors in 7 files")
    return folder, config, params


def test_files_hold_the_authors_names(shared, exported):
    from safetensors.torch import load_file
    folder, config, _ = exported
    weights, _, _, facts = golden(shared, "full_model_stage1")
    trained = load_file(folder / "hawk_trainable.safetensors")
    assert set(trained) == set(facts["trainable"])
    encoder = load_file(folder / "encoder.safetensors")
    llama = {f"llama_model.{k}": v for k, v in load_file(folder / "llama" / "model.safetensors").items()}
    together = trained | encoder | llama
    assert len(together) == len(trained) + len(encoder) + len(llama)
    assert set(together) == {k for k in weights if not keys.IGNORED.search(k)}
    for key, value in together.items():
        assert torch.equal(value, torch.from_numpy(weights[key])), key


def test_transformers_opens_the_decoder(exported):
    """Logits of the exported folder, from_pretrained, against ours: 1e-5 of the largest, float32 sums in another order."""
    transformers = pytest.importorskip("transformers")
    folder, config, params = exported
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, 480, (2, 23))
    llama = build.bind(config.model, params).llama
    ours = llama.logits(llama.hidden(llama.embed(ids), np.ones_like(ids), np.arange(23)[None].repeat(2, 0)))
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_projections_rebuilt_in_torch(exported):
    """One trainable chain with torch's Linear on the exported tensors, against ours."""
    from safetensors.torch import load_file
    folder, config, params = exported
    state, x_BQE = load_file(folder / "hawk_trainable.safetensors"), np.random.default_rng(1).normal(size=(2, 8, 48)).astype(np.float32)
    motion = build.bind(config.model, params).motion
    ours = motion.encoder_1(motion.encoder_0(motion.proj_0(x_BQE)))
    h = torch.from_numpy(x_BQE)
    for name in ("llama_proj_motion_0", "llama_proj_motion_last.encoder_0", "llama_proj_motion_last.encoder_1"):
        h = torch.nn.functional.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])
    np.testing.assert_allclose(np.asarray(ours), h.numpy(), rtol=0, atol=1e-5 * float(h.abs().max()))


def test_tokenizer_comes_along(exported, tmp_path):
    """transformers' own tokenizer, opened from the folder, gives our ids; a model it would misread comes without its settings."""
    transformers = pytest.importorskip("transformers")
    folder, config, params = exported
    text = "A man in red falls down in front of the car, at 12 o'clock. What happens?"
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "llama")(text).input_ids
    assert theirs == Tokenizer(config.input.tokenizer).encode(text, bos=True) and len(theirs) > 20
    embedded = dataclasses.replace(config, input=dataclasses.replace(config.input, tokenizer="embedded"))
    export(params, embedded, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out" / "llama").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.model"}


def test_what_was_exported_comes_back(exported):
    folder, config, params = exported
    back, known = read_export(folder)
    assert known == config
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_bfloat16_and_shared_encoder_come_back(tmp_path):
    model = dataclasses.replace(TINY, frozen_dtype="bfloat16")
    config = HawkConfig(model=model)
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(leaf.dtype), build.abstract_params(model))
    export(params, config, tmp_path / "out")
    back, _ = read_export(tmp_path / "out")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8)), back, params)


def test_shards_have_the_index_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(config)
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    files = torch_files.write(tmp_path, "model", state, shard_bytes=4000)
    assert len(files) > 3 and files[-1].name == "model.safetensors.index.json"
    (tmp_path / "config.json").write_text(config.to_json_string())
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())
    assert set(torch_files.read(files[:-1])) == set(state)


def test_damage_and_other_folders_are_refused(exported, tmp_path):
    folder, config, params = exported
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    with pytest.raises(HawkError, match="holds no export"):
        export(params, config, tmp_path / "mine")
    save_frozen(tmp_path / "frozen", {"llama": {"norm": np.ones(3, np.float32)}}, {})     # has a manifest.json too
    with pytest.raises(HawkError, match="holds no export"):
        export(params, config, tmp_path / "frozen")
    with pytest.raises(HawkError, match="is not an export"):
        read_export(tmp_path / "frozen")
    assert (tmp_path / "frozen" / "llama.safetensors").is_file()
    with pytest.raises(HawkError, match="lack llama/embed_tokens"):
        export({k: v for k, v in params.items() if k != "llama"}, config, tmp_path / "half")
    assert not (tmp_path / "half").exists()
    export(params, config, tmp_path / "copy")
    export(params, config, tmp_path / "copy")       # replaces its own
    file = tmp_path / "copy" / "encoder.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(HawkError, match="encoder.safetensors is not the file that was written"):
        read_export(tmp_path / "copy")
    file.write_bytes(content[:-1])
    with pytest.raises(HawkError, match="bytes long"):
        read_export(tmp_path / "copy")
    with pytest.raises(HawkError, match="not an export"):
        read_export(tmp_path / "mine")
