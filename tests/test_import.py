"""Foreign weights in: files written by torch and transformers, imported by the command, against the goldens and transformers.

Tolerance of outputs: 1e-5 of the largest value, as in test_models_golden.py: both sides compute in float32 in their own order.
"""
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_weights import GOLDEN, golden
from safetensors.numpy import load_file, save_file

from hawk_jax.__main__ import main
from hawk_jax.config import HawkConfig, HawkError, LlamaConfig, MeshConfig, ModelConfig, RunConfig, released
from hawk_jax.convert import keys
from hawk_jax.convert.blocks import converted
from hawk_jax.convert.layouts import Found, Sources, _hawk, place_names, read_llama_config, streams
from hawk_jax.convert.lazy import Lazy
from hawk_jax.convert.seeded import seeded
from hawk_jax.convert.to_jax import import_weights, load_foreign, with_decoder_of
from hawk_jax.mesh import make_mesh
from hawk_jax.models import build
from hawk_jax.training import checkpoint, freeze
from hawk_jax.training.frozen import FrozenError, Stream, save_frozen

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def close(ours, theirs):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def config(model: ModelConfig = GOLDEN, **run) -> HawkConfig:
    return HawkConfig(model=model, run=RunConfig(**run), input=dataclasses.replace(HawkConfig().input, max_conversation_tokens=128))


def cut(weights: dict, prefix: str, keep: str = "") -> dict:
    return {keep + k.removeprefix(prefix): torch.from_numpy(np.ascontiguousarray(v)) for k, v in weights.items() if k.startswith(prefix)}


def llama_folder(folder: Path, weights: dict | None = None, safetensors: bool = True, shard: str = "100KB", **options) -> Path:
    """What `save_pretrained` of a LlamaForCausalLM writes, in shards."""
    options = {"vocab_size": 480, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 172,
               "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "tie_word_embeddings": False} | options
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()
    if weights:
        model.load_state_dict(weights, strict=True)
    if safetensors:
        model.save_pretrained(folder, max_shard_size=shard)
    else:       # transformers 5 writes no .bin any more: torch does, as transformers 4 did
        model.config.save_pretrained(folder)
        names, places = sorted(model.state_dict()), {}
        for number in range(2):
            part = {n: model.state_dict()[n] for n in names[number::2]}
            torch.save(part, folder / f"pytorch_model-{number}.bin")
            places |= {n: f"pytorch_model-{number}.bin" for n in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.fixture(scope="module")
def files(shared, tmp_path_factory) -> Path:
    """The golden's weights as they would be found in the world, with what else such files hold."""
    folder, weights = tmp_path_factory.mktemp("foreign"), golden(shared, "full_model_stage1")[0]
    eva = cut(weights, "visual_encoder.")
    eva |= {k.replace("blocks.2.", "blocks.3."): v + 1 for k, v in eva.items() if k.startswith("blocks.2.")}
    classifier = {"norm.weight": (64,), "norm.bias": (64,), "head.weight": (10, 64), "head.bias": (10,)}
    torch.save(eva | {name: torch.ones(shape) for name, shape in classifier.items()}, folder / "eva.pth")
    blip2 = cut(weights, "Qformer.", "Qformer.") | cut(weights, "ln_vision.", "ln_vision.") | cut(weights, "query_tokens", "query_tokens")
    del blip2["query_tokens_motion"]
    layer = "Qformer.bert.encoder.layer.0."
    extra = ("Qformer.cls.predictions.bias", "Qformer.bert.embeddings.word_embeddings.weight", f"{layer}intermediate.dense.weight",
             f"{layer}output.dense.weight", f"{layer}output.LayerNorm.bias", "t5_proj.weight")
    torch.save({"model": blip2 | {name: torch.ones(3) for name in extra}}, folder / "blip2.pth")
    stems = ("Qformer_motion.", "ln_vision_motion.", "visual_encoder_motion.")
    torch.save({k: v for stem in stems for k, v in cut(weights, stem, stem).items()}, folder / "motion.pth")
    trained = {e.key for e in keys.table(GOLDEN) if e.path[0] in ("video", "motion")} | {"query_tokens_motion"}
    hawk = {k: torch.from_numpy(v) for k, v in weights.items() if k in trained or keys.IGNORED.search(k)}
    torch.save({"model": hawk, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-5}]},
                "config": {"run": {"task": "video"}}, "scaler": {}, "epoch": 10}, folder / "hawk.pth")
    torch.save({"model": {k: torch.from_numpy(v) for k, v in weights.items()}}, folder / "full.pth")
    for name, safe in (("llama", True), ("llama_bin", False)):
        (folder / name).mkdir()
        llama_folder(folder / name, {k: v for k, v in cut(weights, "llama_model.").items() if not keys.IGNORED.search(k)}, safe)
    return folder


def sources(files: Path, **changes) -> Sources:
    every = Sources(files / "eva.pth", files / "blip2.pth", files / "llama", hawk=files / "hawk.pth", motion=str(files / "motion.pth"))
    return every._replace(**changes)


def check_outputs(shared, params: dict, model: ModelConfig) -> None:
    """Branch tokens, compressed features and both decoder losses of the golden."""
    _, inputs, outputs, _ = golden(shared, "full_model_stage1")
    both = [jnp.asarray(inputs[f"image{m}"]).transpose(0, 2, 3, 4, 1).reshape(8, 56, 56, 3) for m in ("", "_motion")]

    @jax.jit
    def vision(params, pictures):
        hawk = build.bind(model, params)
        tokens = hawk.encoder(pictures).reshape(2, 4, 2, 8, 48)
        return hawk.branch_tokens(tokens[:, :, 0], tokens[:, :, 1])

    @jax.jit
    def decode(params, x_RSD, mask_RS):
        llama = build.bind(model, params).llama
        return llama.logits(llama.hidden(x_RSD, mask_RS, jnp.broadcast_to(jnp.arange(x_RSD.shape[1]), mask_RS.shape)))
    visual_BQD, video_BQZ, motion_BQZ = vision(params, jnp.stack(both, 1))
    close(visual_BQD, np.concatenate([outputs["video_embeds"], outputs["motion_embeds"]], 1))
    close(video_BQZ, outputs["middle_result"])
    close(motion_BQZ, outputs["middle_result_motion"])
    for call, loss in ((0, "loss"), (1, "loss_motion")):
        x_RSD, mask_RS, labels_RS = (outputs[f"llama_call{call}_{n}"] for n in ("inputs_embeds", "attention_mask", "labels"))
        logits_RSV = decode(params, jnp.asarray(x_RSD), jnp.asarray(mask_RS))
        logs = np.asarray(jax.nn.log_softmax(logits_RSV))[:, :-1]
        kept, target = labels_RS[:, 1:] != -100, np.maximum(labels_RS[:, 1:], 0)
        mean = -np.take_along_axis(logs, target[..., None].astype(int), 2)[..., 0][kept].mean()
        np.testing.assert_allclose(mean, np.asarray(outputs[loss]).item(), rtol=1e-5)


def test_files_of_the_world_by_the_command(shared, files, tmp_path, capsys):
    """eva, blip2, LLaMA shards, released .pth and motion encoder, each as its own code writes it: the model computes the goldens."""
    (tmp_path / "c.py").write_text(
        "import dataclasses\nfrom golden_weights import GOLDEN\nfrom hawk_jax.config import HawkConfig, LlamaConfig, MeshConfig\n"
        "def config():\n    model = dataclasses.replace(GOLDEN, llama=LlamaConfig(max_positions=512))\n"
        "    return HawkConfig(model=model, mesh=MeshConfig(fsdp=1, data=8))\n")
    status = main(["import", str(tmp_path / "c.py"), "--eva", str(files / "eva.pth"), "--blip2", str(files / "blip2.pth"), "--llama",
                   str(files / "llama"), "--hawk", str(files / "hawk.pth"), "--motion-qformer", str(files / "motion.pth"),
                   "--out", str(tmp_path / "frozen"), "--run", str(tmp_path / "run")])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "model.llama.width: 4096 -> 64" in printed.out and "passed over in --eva: 17 names" in printed.out
    c = config(GOLDEN, folder=str(tmp_path / "run"), frozen=str(tmp_path / "frozen"))
    c = dataclasses.replace(c, mesh=MeshConfig(fsdp=8))
    params = checkpoint.load_trained(c, make_mesh(c.mesh))
    check_outputs(shared, params, GOLDEN)


# ------------------------------------------------------------------------------------------------ the decoder against transformers
@pytest.mark.parametrize("options", [
    {"num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-3, "rope_theta": 500.0},
    {"num_attention_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "torch_dtype": "float32"},
], ids=["grouped", "tied"])
def test_decoder_settings_come_from_its_folder(files, tmp_path, options):
    """Heads, eps and rotary base show in no shape: taken wrong, the logits would be off by far more than rounding."""
    folder = llama_folder(tmp_path / "llama", **options)
    start = dataclasses.replace(GOLDEN, llama=LlamaConfig())
    found = sources(files, llama=folder)
    c, changed = with_decoder_of(config(start), found)
    assert any("model.llama.heads: 32 -> " in line for line in changed)
    frozen = load_foreign(found, c, make_mesh(MeshConfig(data=8, fsdp=1)))
    ids = np.arange(2, 40).reshape(2, 19)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).logits.numpy()
    whole = build.abstract_params(c.model)
    llama = build.bind(c.model, {**whole, "llama": frozen["llama"]}).llama
    close(llama.logits(llama.hidden(llama.embed(ids), jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(19), (2, 19)))), theirs)


def test_decoder_that_is_another_is_refused(tmp_path):
    folder = llama_folder(tmp_path)
    good = json.loads((folder / "config.json").read_text())
    for change, words in (({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rotary embeddings ('linear')"),
                          ({"attention_bias": True}, "attention_bias=True"), ({"mlp_bias": True}, "mlp_bias=True"),
                          ({"hidden_act": "gelu"}, "hidden_act='gelu'"), ({"head_dim": 32}, "head_dim=32"),
                          ({"model_type": "mistral"}, "'mistral'")):
        (folder / "config.json").write_text(json.dumps(good | change))
        with pytest.raises(keys.KeyTableError) as error:
            read_llama_config(folder)
        assert words in str(error.value) and "\n" not in str(error.value)


def test_training_refuses_a_decoder_with_other_settings(files, tmp_path):
    c = config(frozen=str(tmp_path / "frozen"))
    import_weights(sources(files), c, tmp_path / "frozen")
    for name, value in (("heads", 2), ("eps", 1e-6), ("rope_theta", 1e6)):
        model = dataclasses.replace(c.model, llama=dataclasses.replace(c.model.llama, **{name: value}))
        with pytest.raises(FrozenError, match=f"set model.llama.{name}="):
            checkpoint.read_frozen(dataclasses.replace(c, model=model), make_mesh(MeshConfig(data=8, fsdp=1)))


# ------------------------------------------------------------------------------------------------ meshes, files, layouts
def test_every_way_gives_the_same_values(files, tmp_path):
    """Onto eight devices, onto one, to disk and back, from .bin shards, and from the whole state dict in one file."""
    c = config(frozen=str(tmp_path / "frozen"))
    mesh, found = make_mesh(MeshConfig(fsdp=8)), sources(files)
    sharded = load_foreign(found, c, mesh)
    assert len(sharded["llama"]["lm_head"]["kernel"].sharding.device_set) == 8
    assert not sharded["llama"]["lm_head"]["kernel"].is_fully_replicated
    done = import_weights(found, c, tmp_path / "frozen")
    stored, tree_hash = checkpoint.read_frozen(c, make_mesh(MeshConfig(data=8, fsdp=1)))
    assert tree_hash == done.frozen_hash
    expected = freeze.split(keys.from_torch({k: v.read() for k, v in _full(files).items()}, GOLDEN), GOLDEN)[1]
    for other in (sharded, stored, load_foreign(sources(files, llama=files / "llama_bin"), c, mesh),
                  load_foreign(Sources(hawk=files / "full.pth"), c, mesh)):
        jax.tree.map(np.testing.assert_array_equal, other, expected)


def _full(files: Path) -> dict:
    from hawk_jax.convert.folder import open_weights
    return open_weights(files / "full.pth")


def test_one_copy_serves_both_branches_and_bfloat16_is_numpys(files, tmp_path):
    """The default (paper's) model: no motion file; matrices in bfloat16 as ml_dtypes rounds, norms as they are."""
    model = dataclasses.replace(GOLDEN, vit_copies=1, qformer_copies=1, frozen_dtype="bfloat16")
    frozen = load_foreign(sources(files, motion="", ignore=("query_tokens_motion",)), config(model), make_mesh(MeshConfig(data=8, fsdp=1)))
    weights = {k: v.read() for k, v in _full(files).items()}
    qkv = np.asarray(frozen["encoder"]["vit"]["blocks"]["mlp"]["fc1"]["kernel"])
    assert qkv.shape == (1, 3, 64, 279) and qkv.dtype == jnp.bfloat16
    np.testing.assert_array_equal(qkv[0, 2], weights["visual_encoder.blocks.2.mlp.fc1.weight"].T.astype(jnp.bfloat16))
    np.testing.assert_array_equal(frozen["encoder"]["ln_vision"]["scale"][0], weights["ln_vision.weight"])
    copied = dataclasses.replace(model, qformer_copies=2)
    twice = load_foreign(sources(files, hawk=None, motion="copy"), config(copied), make_mesh(MeshConfig(data=8, fsdp=1)))
    np.testing.assert_array_equal(twice["encoder"]["query_tokens"], twice["encoder"]["query_tokens_motion"])
    assert np.array_equal(*twice["encoder"]["qformer"]["norm"]["scale"])


def test_video_llama_fills_the_branches(files, tmp_path):
    """Video Q-Former, queries and positions fit, in both branches; projections start fresh; audio is passed over."""
    stems = ("video_Qformer.", "video_query_tokens", "video_frame_position_embedding.")
    weights = {k: torch.from_numpy(v.read().copy()) for k, v in _full(files).items() if k.startswith(stems) and "_motion" not in k}
    extra = {"llama_proj.weight": torch.ones(3), "audio_Qformer.bert.x.weight": torch.ones(3), "audio_query_tokens": torch.ones(3)}
    torch.save({"model": weights | extra}, tmp_path / "video_llama.pth")
    model = dataclasses.replace(GOLDEN, vit_copies=1, qformer_copies=1)
    c = dataclasses.replace(config(model, folder=str(tmp_path / "run"), frozen=str(tmp_path / "frozen")), mesh=MeshConfig(data=8, fsdp=1))
    import_weights(sources(files, hawk=None, motion="", video_llama=tmp_path / "video_llama.pth"), c, tmp_path / "frozen", tmp_path / "run")
    params = checkpoint.load_trained(c, make_mesh(c.mesh))
    for branch in ("video", "motion"):
        np.testing.assert_array_equal(params[branch]["queries"], weights["video_query_tokens"][0])
        np.testing.assert_array_equal(params[branch]["frame_positions"], weights["video_frame_position_embedding.weight"])
    assert np.abs(params["motion"]["proj_0"]["kernel"]).max() > 0


# ------------------------------------------------------------------------------------------------ faults
def _poison(folder: Path, name: str) -> None:
    file = next(f for f in sorted(folder.glob("*.safetensors")) if name in load_file(f))
    tensors = load_file(file)
    tensors[name].flat[3] = np.nan
    save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def own(files, tmp_path) -> Path:
    """A copy of the foreign files that a test may spoil."""
    return shutil.copytree(files, tmp_path / "own")


def _resave(file: Path, change) -> None:
    tree = torch.load(file, weights_only=True)
    change(tree.get("model", tree))
    torch.save(tree, file)


ATTENTION = "Qformer.bert.encoder.layer.0.attention.self."
FAULTS = {
    "cut off": (lambda own: (own / "eva.pth").write_bytes((own / "eva.pth").read_bytes()[:5000]), "is no checkpoint in torch's zip format"),
    "wrong shape": (lambda own: _resave(own / "eva.pth", lambda t: t.update({"pos_embed": torch.ones(1, 5, 64)})),
                    "pos_embed has shape [1, 5, 64], this model configuration needs [1, 17, 64]"),
    "unknown": (lambda own: _resave(own / "blip2.pth", lambda t: t.update({ATTENTION + "kee.bias": torch.ones(1)})),
                "nearest known: Qformer.bert.encoder.layer.0.attention.self.key.bias"),
    "missing": (lambda own: _resave(own / "hawk.pth", lambda t: t.pop("video_query_tokens")), "lacks video_query_tokens"),
    "two dtypes": (lambda own: _resave(own / "eva.pth", lambda t: t.update({"blocks.1.mlp.fc1.bias": torch.ones(279).half()})),
                   "blocks.1.mlp.fc1.bias is float16"),
    "not finite": (lambda own: _poison(own / "llama", "model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight holds values"),
    "not finite, trained": (lambda own: _resave(own / "hawk.pth", lambda t: t["llama_proj_0.bias"].fill_(float("inf"))),
                            "llama_proj_0.bias holds"),
    "shard missing": (lambda own: next((own / "llama").glob("*-00002-*")).unlink(), "which is missing in"),
    "no config": (lambda own: (own / "llama" / "config.json").unlink(), "config.json is missing"),
    "no such file": (lambda own: (own / "blip2.pth").unlink(), "no such file"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_and_leave_nothing(own, tmp_path, name):
    spoil, words = FAULTS[name]
    spoil(own)
    with pytest.raises(Exception) as error:
        import_weights(sources(own), config(), tmp_path / "out" / "frozen", tmp_path / "out" / "run")
    assert type(error.value).__module__.startswith("hawk_jax."), repr(error.value)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "out").rglob("*")) if (tmp_path / "out").exists() else True


def _command(files: Path, tmp_path: Path, *more: str) -> list[str]:
    (tmp_path / "c.py").write_text("from golden_weights import GOLDEN\nfrom hawk_jax.config import HawkConfig\n"
                                   "def config():\n    return HawkConfig(model=GOLDEN)\n")
    return ["import", str(tmp_path / "c.py"), "--eva", str(files / "eva.pth"), "--blip2", str(files / "blip2.pth"), "--llama",
            str(files / "llama"), "--hawk", str(files / "hawk.pth"), "--motion-qformer", str(files / "motion.pth"), "--out",
            str(tmp_path / "out" / "frozen"), *more]


def test_hashes_are_compared_and_recorded(files, tmp_path, capsys):
    right = hashlib.sha256((files / "eva.pth").read_bytes()).hexdigest()
    assert main(_command(files, tmp_path, "--expect-sha256", f"eva.pth={right[:-1]}{'0' if right[-1] != '0' else '1'}")) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"eva.pth has sha256 {right}" in message and not (tmp_path / "out").exists()
    assert main(_command(files, tmp_path, "--expect-sha256", f"eve.pth={right}")) == 2
    assert main(_command(files, tmp_path, "--expect-sha256", f"eva.pth={right.upper()}")) == 0
    manifest = json.loads((tmp_path / "out" / "frozen" / "manifest.json").read_text())
    assert manifest["provenance"]["sources"]["--eva"]["files"]["eva.pth"] == {"sha256": right, "bytes": (files / "eva.pth").stat().st_size}
    assert len(manifest["provenance"]["sources"]["--llama"]["files"]) > 3 and manifest["decoder"]["heads"] == 4


CHILD = """
import resource, signal, sys
from hawk_jax.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_leaves_nothing(files, tmp_path):
    """The kernel refuses to let a file grow, as it does when a disk is full."""
    done = subprocess.run([sys.executable, "-c", CHILD, *_command(files, tmp_path)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"})
    assert done.returncode == 2 and "cannot write the frozen tree" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").rglob("*"))


def test_what_is_there_already_stays(files, tmp_path):
    import_weights(sources(files), config(), tmp_path / "frozen", tmp_path / "run")
    before = (tmp_path / "frozen" / "manifest.json").read_bytes()
    with pytest.raises(HawkError, match="has checkpoints already"):
        import_weights(sources(files), config(), tmp_path / "frozen", tmp_path / "run")
    with pytest.raises(HawkError, match="holds no frozen tree"):
        import_weights(sources(files), config(), files)
    with pytest.raises(HawkError, match="give --llama FOLDER"):
        import_weights(sources(files, llama=None), config(), tmp_path / "frozen")
    with pytest.raises(HawkError, match="--motion-qformer copy, seeded or FILE"):
        import_weights(sources(files, motion=""), config(), tmp_path / "frozen")
    one = config(dataclasses.replace(GOLDEN, vit_copies=1, qformer_copies=1))
    with pytest.raises(HawkError, match="set model.qformer_copies=2"):
        import_weights(sources(files, motion=""), one, tmp_path / "frozen")
    assert (tmp_path / "frozen" / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["frozen", "run"]


MEMORY = """
import sys
import numpy as np
from pathlib import Path
from hawk_jax.training.frozen import Stream, save_frozen
def blocks():
    for layer in range(64):
        yield np.full((1024, 1024), layer, np.float32)
def most():     # KiB; getrusage would count what the parent held when it started this process
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = most()
save_frozen(Path(sys.argv[1]), {"llama": {"kernel": Stream(np.dtype(np.float32), (64, 1024, 1024), blocks)}}, {})
print((most() - before) / 1024)
"""


def test_a_leaf_larger_than_its_memory_is_written(tmp_path):
    """256 MiB in 64 blocks: the process grows by a few of them (4 MiB each, and a copy), far less than the leaf."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "frozen")], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[1])
    assert float(done.stdout) < 64


def test_blocks_must_be_what_was_announced(tmp_path):
    def stream(*blocks):
        return {"llama": {"norm": Stream(np.dtype(np.float32), (4,), lambda: iter(blocks))}}
    with pytest.raises(FrozenError, match="has 4 values, 3 came"):
        save_frozen(tmp_path / "f", stream(np.ones(3, np.float32)), {})
    with pytest.raises(FrozenError, match="came as float64"):
        save_frozen(tmp_path / "f", stream(np.ones(4)), {})
    assert not list(tmp_path.iterdir())
    assert save_frozen(tmp_path / "f", stream(*np.ones((4, 1), np.float32)), {}) == save_frozen(
        tmp_path / "g", {"llama": {"norm": np.ones(4, np.float32)}}, {})


# ------------------------------------------------------------------------------------------------ names at real size, drawn values
def test_released_checkpoint_at_real_size_is_taken_whole(shared):
    """165 names, none read: 129 trained, 36 buffers passed over."""
    c = released(HawkConfig(), 1)
    listed = json.loads((shared / "specs" / "hawk_state_dict_keys.json").read_text())
    tensors = {k: Lazy(np.dtype(np.float32), tuple(s), None) for k, s, kind in listed if kind in ("train", "buffer")}
    found, passed = place_names(_hawk(c), tensors, Path("hawk.pth"), ())
    assert len(tensors) == 165 and len(found) == 129 and len(passed) == 36
    leaves = streams(found | {k: Found(Lazy(np.dtype(np.float16), tuple(s), None), k) for k, s, kind in listed if kind == "frozen"}, c)
    assert {p: s.shape for p, s in leaves.items()} == {p: x.shape for p, x in build.flatten(build.abstract_params(c.model)).items()}
    assert {k: (v.shape, v.dtype) for k, v in keys.buffers(c.model).items()} == {
        k: (tuple(s), np.int64 if k.endswith("position_ids") else np.float32) for k, s, kind in listed if kind == "buffer"}


class _Bert(torch.nn.Module):
    """A Q-Former's modules in the order in which BERT code makes them; initialised twice, as the head's constructor does it."""

    def __init__(self, c, encoder: int, vocabulary: int):
        super().__init__()
        nn, d = torch.nn, c.width

        def attention(source):
            parts = {"query": nn.Linear(d, d), "key": nn.Linear(source, d), "value": nn.Linear(source, d)}
            return nn.ModuleDict({"self": nn.ModuleDict(parts),
                                  "output": nn.ModuleDict({"dense": nn.Linear(d, d), "LayerNorm": nn.LayerNorm(d)})})

        def layer(number):
            parts = {"attention": attention(d)}
            if number % c.cross_attention_freq == 0:
                parts["crossattention"] = attention(encoder)
            for name in ("", "_query"):
                parts[f"intermediate{name}"] = nn.ModuleDict({"dense": nn.Linear(d, c.mlp)})
                parts[f"output{name}"] = nn.ModuleDict({"dense": nn.Linear(c.mlp, d), "LayerNorm": nn.LayerNorm(d)})
            return nn.ModuleDict(parts)
        embeddings = nn.ModuleDict({"word_embeddings": nn.Embedding(vocabulary, d), "position_embeddings": nn.Embedding(512, d),
                                    "LayerNorm": nn.LayerNorm(d)})
        layers = nn.ModuleDict({"layer": nn.ModuleList(map(layer, range(c.depth)))})
        self.bert = nn.ModuleDict({"embeddings": embeddings, "encoder": layers})
        self.bert.apply(self.init)
        self.cls = nn.ModuleDict({"transform": nn.Linear(d, d), "decoder": nn.Linear(d, vocabulary, bias=False)})
        self.apply(self.init)

    @staticmethod
    def init(module):
        if not getattr(module, "done", False) and isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.weight.data.normal_(0.0, 0.02)
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()
        module.done = True


def _eva(c) -> None:
    nn = torch.nn
    nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
    blocks = [[nn.Linear(c.width, 3 * c.width, bias=False), nn.Linear(c.width, c.width), nn.Linear(c.width, c.mlp),
               nn.Linear(c.mlp, c.width)] for _ in range(c.depth)]
    for tensor in (torch.empty(1, 17, c.width), torch.empty(1, 1, c.width), *(m.weight.data for block in blocks for m in block)):
        nn.init.trunc_normal_(tensor, std=0.02)


def test_seeded_draws_are_those_of_torchs_modules():
    """Real modules of torch, built in the released code's order from seed 42, hold bit for bit what `seeded` draws without them."""
    torch.manual_seed(42)
    for _ in range(2):
        _eva(GOLDEN.vit)
    for _ in range(2):      # the video branch's, then the motion branch's
        model = _Bert(GOLDEN.image_qformer, GOLDEN.vit.width, 101)
        queries = torch.zeros(1, 8, 48).normal_(0.0, 0.02)
    kept = {f"Qformer_motion.{k}": v.numpy() for k, v in model.state_dict().items()} | {"query_tokens_motion": queries.numpy()}
    ours = {k: v.read() for k, v in seeded(GOLDEN, vocabulary=101).items()}
    assert set(ours) == {e.key for e in keys.table(GOLDEN) if e.key.startswith(("Qformer_motion.", "query_tokens_motion"))}
    for key, value in ours.items():
        np.testing.assert_array_equal(value, kept[key], err_msg=key)


def test_seeded_goes_through_the_import_and_says_that_it_is_unverified(files, tmp_path):
    import_weights(sources(files, motion="seeded"), config(), tmp_path / "frozen")
    assert "unverified" in json.loads((tmp_path / "frozen" / "manifest.json").read_text())["provenance"]["motion_qformer"]
    frozen, _ = checkpoint.read_frozen(config(frozen=str(tmp_path / "frozen")), make_mesh(MeshConfig(data=8, fsdp=1)))
    assert (frozen["encoder"]["ln_vision"]["scale"][1] == 1).all() and not frozen["encoder"]["ln_vision"]["bias"][1].any()
    # the released file holds these; the seeded ones do not replace them
    np.testing.assert_array_equal(frozen["encoder"]["query_tokens_motion"], _full(files)["query_tokens_motion"].read())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_both_ways_are_bit_exact_in_the_files_dtype(files, dtype):
    """State dict -> tree -> state dict, every bit, NaN patterns included; two dtypes in one stacked parameter are refused."""
    draw = np.random.default_rng(0)
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    shapes = {k: v.shape for k, v in _full(files).items() if not keys.IGNORED.search(k)}
    start = {k: draw.integers(0, np.iinfo(bits).max, shape, bits).view(dtype) for k, shape in shapes.items()}
    tree = keys.from_torch(start, GOLDEN)
    back = keys.to_torch(tree, GOLDEN)
    assert back.keys() == start.keys()
    for key, value in start.items():
        assert back[key].dtype == value.dtype and back[key].tobytes() == value.tobytes(), key
    again = keys.from_torch(back, GOLDEN)
    jax.tree.map(lambda a, b: a.tobytes() == b.tobytes() or pytest.fail("a bit was lost"), again, tree)
    key = "llama_model.model.layers.1.mlp.up_proj.weight"
    with pytest.raises(keys.KeyTableError) as error:
        keys.from_torch(start | {key: np.zeros(start[key].shape)}, GOLDEN)
    assert key in str(error.value) and key.replace(".1.", ".0.") in str(error.value)


@pytest.mark.parametrize("source", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("target", [np.float32, ml_dtypes.bfloat16])
def test_large_matrices_are_cast_and_turned_as_numpy_does(source, target):
    """Every kind of bit pattern, subnormal ones too, above and below the size from which XLA is used: equal bit for bit."""
    draw, width = np.random.default_rng(0), 8 * np.dtype(source).itemsize
    for kind, shape in (("linear", (1100, 1000)), ("qkv", (3 * 700, 520)), ("same", (1100, 1000)), ("linear", (30, 40))):
        x = draw.integers(0, 2**width, shape, np.uint64).astype(f"u{width // 8}").view(source)
        with np.errstate(invalid="ignore"):     # some of the patterns are no numbers
            x = np.where(np.abs(x.astype(np.float64)) < 1e38, x, source(0))
        found, sound = converted(x, kind, np.dtype(target))
        expected = np.ascontiguousarray(keys.FROM_TORCH[kind](x.astype(target)))
        assert sound and found.flags.c_contiguous and found.dtype == expected.dtype
        np.testing.assert_array_equal(found.view(f"u{found.dtype.itemsize}"), expected.view(f"u{found.dtype.itemsize}"))
        for fault in (np.nan, np.inf):
            y = x.copy()
            y.flat[-3] = fault
            assert not converted(y, kind, np.dtype(target))[1]
