"""Exports read back by torch and transformers, which know nothing of this project; what differs, and what an interruption leaves."""
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from golden_weights import GOLDEN, TINY, golden
from safetensors import safe_open
from safetensors.numpy import load_file
from toy_run import one_device, quick_compile, toy_config, toy_params

from data.text import Tokenizer
from hawk_jax.__main__ import main
from hawk_jax.config import HawkConfig, HawkError, InputConfig, LlamaConfig, ModelConfig, PrepareConfig
from hawk_jax.convert import export as module
from hawk_jax.convert import hf_folder, keys, proof, torch_files
from hawk_jax.convert.export import export, released_names
from hawk_jax.convert.proof import prove
from hawk_jax.models import build
from hawk_jax.training.checkpoint import Checkpoints
from hawk_jax.training.frozen import save_frozen
from hawk_jax.training.state import init_state

torch = pytest.importorskip("torch")
load_torch = pytest.importorskip("safetensors.torch").load_file
transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Variables with which a child process compiles nothing that another one compiled before."""
    with quick_compile(tmp_path_factory) as variables:
        yield variables


@pytest.fixture(scope="module")
def exported(shared, tmp_path_factory):
    """(folder, configuration, parameters): the authors' random weights of the full-model golden."""
    weights, *_ = golden(shared, "full_model_stage1")
    model = dataclasses.replace(GOLDEN, train_query_tokens_motion=True)
    tokenizer = str(shared / "goldens" / "hawk" / "toy_tokenizer" / "tokenizer.model")
    config = HawkConfig(model=model, prepare=PrepareConfig(size=56, frames=4), input=InputConfig(tokenizer=tokenizer))
    params = keys.from_torch(weights, model)
    folder = tmp_path_factory.mktemp("export") / "out"
    said = export(params, config, folder, pth="full")
    assert said.endswith("proof: equal"), said
    return folder, config, params


@pytest.fixture
def bytes_only(monkeypatch):
    """Proofs that import no torch, which takes seconds: as where it is not installed."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "without_torch"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The authors' names of everything in the folder's safetensors files, by the safetensors library."""
    found = {}
    for prefix, home in (("", folder), ("llama_model.", folder / "llama")):
        for file in sorted(home.glob("model*.safetensors")):
            found |= {prefix + name: tensor for name, tensor in load_torch(file).items()}
    return found


# ------------------------------------------------------------------------------------------------ what is in it
def test_files_hold_the_authors_tensors(shared, exported):
    weights, *_ = golden(shared, "full_model_stage1")
    found = tensors(exported[0])
    assert set(found) == {k for k in weights if not keys.IGNORED.search(k)}
    for key, value in found.items():
        assert torch.equal(value, torch.from_numpy(weights[key])), key


def test_the_whole_pth_is_a_state_dict_the_authors_model_loads_strictly(shared, exported):
    """The golden's names are those of `state_dict()` of the authors' class, buffers included: the same set is what strict loading wants.
    (The file shortens position_ids to 24 entries; ours have BERT's 512.)"""
    weights, *_ = golden(shared, "full_model_stage1")
    state = torch.load(exported[0] / "hawk.pth", weights_only=True)["model"]
    assert set(state) == set(weights)
    for key, value in weights.items():
        theirs = torch.from_numpy(value)
        if key.endswith("position_ids"):
            assert torch.equal(state[key], torch.arange(512)[None])
        elif key.endswith("inv_freq"):
            torch.testing.assert_close(state[key], theirs, rtol=1e-6, atol=0)        # powers, by numpy and by torch
        else:
            assert torch.equal(state[key], theirs), key


def test_the_released_pth_holds_what_the_authors_save(shared, exported, tmp_path, bytes_only):
    _, config, params = exported
    weights, _, _, facts = golden(shared, "full_model_stage1")
    export(params, config, tmp_path / "out")
    state = torch.load(tmp_path / "out" / "hawk.pth", weights_only=True)["model"]
    assert set(state) == set(facts["trainable"]) | {k for k in weights if keys.IGNORED.search(k)}
    assert all(torch.equal(state[k], torch.from_numpy(weights[k])) for k in facts["trainable"])
    # at real size: hawk.md 9.8; the default shares one encoder, which changes nothing of the list
    for real in (ModelConfig(), ModelConfig(qformer_copies=2, train_query_tokens_motion=True)):
        listed = json.loads((shared / "specs" / "hawk_state_dict_keys.json").read_text())
        names = released_names(real)
        assert len(names) == 129 and set(names) == {k for k, _, kind in listed if kind == "train"}
        constants = keys.buffers(real)
        assert {k: list(v.shape) for k, v in constants.items()} == {k: s for k, s, kind in listed if kind == "buffer"}
        assert len(names) + len(constants) == 165


def test_transformers_opens_the_decoder(exported):
    """Logits of the folder's decoder alone against ours: 1e-5 of the largest, float32 sums in another order."""
    folder, config, params = exported
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, 480, (2, 23))
    llama = build.bind(config.model, params).llama
    ours = llama.logits(llama.hidden(llama.embed(ids), np.ones_like(ids), np.arange(23)[None].repeat(2, 0)))
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_tokenizer_comes_along(exported, tmp_path, bytes_only):
    """transformers' own tokenizer, opened from the folder, gives our ids; a model it would misread comes without its settings."""
    folder, config, params = exported
    text = "A man in red falls down in front of the car, at 12 o'clock. What happens?"
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "llama")(text).input_ids
    assert theirs == Tokenizer(config.input.tokenizer).encode(text, bos=True) and len(theirs) > 20
    embedded = dataclasses.replace(config, input=dataclasses.replace(config.input, tokenizer="embedded"))
    export(params, embedded, tmp_path / "out", pth="none")
    names = {p.name for p in (tmp_path / "out" / "llama").iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.model"}
    assert not (tmp_path / "out" / "hawk.pth").exists()


@pytest.mark.parametrize("shard_bytes", [50_000, 10**9])
def test_bfloat16_shards_and_a_shared_encoder(tmp_path, bytes_only, shard_bytes):
    """One encoder is written once, in bfloat16, in shards whose index transformers' rules can follow; bits as they were."""
    decoder = LlamaConfig(vocab=480, width=64, depth=2, heads=4, kv_heads=2, mlp=172)
    model = dataclasses.replace(TINY, frozen_dtype="bfloat16", llama=decoder)
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(leaf.dtype), build.abstract_params(model))
    export(params, HawkConfig(model=model, prepare=PrepareConfig(size=56)), tmp_path / "out", shard_bytes=shard_bytes)
    names, expected = set(), keys.to_torch(params, model)
    for prefix, home in (("", tmp_path / "out"), ("llama_model.", tmp_path / "out" / "llama")):
        files = sorted(home.glob("model*.safetensors"))
        assert (len(files) > 3) == (shard_bytes == 50_000)
        for file in files:
            assert file.stat().st_size < 50_000 + 20_000 or shard_bytes > 50_000 or len(safe_open(file, "np").keys()) == 1
            with safe_open(file, "np") as opened:
                assert opened.metadata() == {"format": "pt"}
                for name in opened.keys():
                    ours, theirs = opened.get_tensor(name), expected[prefix + name]
                    assert ours.dtype == theirs.dtype and np.array_equal(ours.view(np.uint8), np.ascontiguousarray(theirs).view(np.uint8))
                    names.add(prefix + name)
        if len(files) > 1:
            index = json.loads((home / "model.safetensors.index.json").read_text())
            assert set(index["weight_map"].values()) == {f.name for f in files}
            assert index["metadata"]["total_size"] == sum(
                t.nbytes for k, t in expected.items() if k in {prefix + n for n in index["weight_map"]})
    assert ml_dtypes.bfloat16 in {v.dtype.type for v in expected.values()}
    twice = {k for k in expected if k.startswith(("visual_encoder_motion", "ln_vision_motion", "Qformer_motion", "query_tokens_motion"))}
    assert names == expected.keys() - twice


# ------------------------------------------------------------------------------------------------ the proof
def test_the_proof_says_what_was_compared(exported):
    folder, *_ = exported
    found = json.loads((folder / "PROOF.json").read_text())
    assert found["verdict"] == "equal" and found["greedy"]["tokens"] == found["greedy"]["equal"] == 64
    assert {e["name"] for e in found["forward"]} == {"visual_BQD", "video_BQZ", "motion_BQZ", "logits_RSV"}
    read = found["bytes"]
    assert read["tensors"] == len(tensors(folder)) < read["tensors in hawk.pth"] == found["pth"]["tensors"]
    assert found["vision.pt2"]["relative"] <= 2e-5 and (folder / "vision.pt2").is_file()
    assert found["versions"]["torch"] == torch.__version__


def test_a_wrong_option_in_the_folder_is_noticed(exported, tmp_path, monkeypatch):
    """The decoder's settings say another rotary base: bytes are equal, values are not."""
    _, config, params = exported
    right = hf_folder.llama_config
    monkeypatch.setattr(hf_folder, "llama_config", lambda c, dtype: right(c, dtype) | {"rope_theta": 20_000.0})
    with pytest.raises(HawkError, match="logits_RSV differs .* kept as .*out.differs"):
        export(params, config, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    found = json.loads((tmp_path / "out.differs" / "PROOF.json").read_text())
    assert found["verdict"] == "differs" and len(found["differences"]) >= 1
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "without_torch"))
    export(params, config, tmp_path / "out")        # right again: the failed attempt is cleared away
    assert (tmp_path / "out").is_dir() and not (tmp_path / "out.differs").exists()


def test_a_flipped_bit_is_noticed(exported, tmp_path, monkeypatch, bytes_only):
    _, config, params = exported
    close = torch_files.Shards.close

    def spoil(shards):
        files = close(shards)
        content = bytearray(files[0].read_bytes())
        content[-1] ^= 1
        files[0].write_bytes(content)
        return files
    monkeypatch.setattr(torch_files.Shards, "close", spoil)
    with pytest.raises(HawkError, match="read back equal: .*written was.*out.differs"):
        export(params, config, tmp_path / "out", pth="none")
    assert not (tmp_path / "out").exists()


def test_prove_without_torch_and_on_changed_folders(exported, tmp_path, monkeypatch, capsys, bytes_only):
    _, config, params = exported
    said = export(params, config, tmp_path / "out")
    assert "nothing was computed" in said and f"python -m hawk_jax prove {tmp_path / 'out'}" in said
    monkeypatch.setattr(proof, "_installed", lambda *names: False)
    assert main(["prove", str(tmp_path / "out")]) == 0 and "verdict: bytes equal" in capsys.readouterr().out
    weights = tmp_path / "out" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["prove", str(tmp_path / "out")]) == 2 and "model.safetensors is not the file that was written" in capsys.readouterr().out
    weights.unlink()
    assert main(["prove", str(tmp_path / "out")]) == 2 and "model.safetensors is missing" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["files"] = {"../secret": {"bytes": 1, "sha256": ""}}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert main(["prove", str(tmp_path / "out")]) == 2 and "outside the folder" in capsys.readouterr().out
    (tmp_path / "out" / "manifest.json").write_text("{}")
    assert main(["prove", str(tmp_path / "out")]) == 2 and "not an export" in capsys.readouterr().err


def test_foreign_code_in_a_folder_is_not_run(exported, tmp_path):
    folder, *_ = exported
    shutil.copytree(folder, tmp_path / "copy")
    code = tmp_path / "copy" / "modeling_hawk.py"
    code.write_text(code.read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    manifest = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    manifest["files"] |= torch_files.describe(tmp_path / "copy", [code])
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
    assert "it is not run" in prove(tmp_path / "copy")["differences"][0] and not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ faults
def test_other_folders_and_incomplete_trees_are_refused(exported, tmp_path, bytes_only):
    _, config, params = exported
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    save_frozen(tmp_path / "frozen", {"llama": {"norm": np.ones(3, np.float32)}}, {})     # has a manifest.json too
    for folder in ("mine", "frozen"):
        with pytest.raises(HawkError, match="holds no export"):
            export(params, config, tmp_path / folder)
    assert (tmp_path / "frozen" / "llama.safetensors").is_file() and (tmp_path / "mine" / "thesis.txt").is_file()
    with pytest.raises(HawkError, match="lack llama/embed_tokens"):
        export({k: v for k, v in params.items() if k != "llama"}, config, tmp_path / "half")
    broken = jax.tree.map(np.array, params)
    broken["motion"]["proj_0"]["bias"][3] = np.nan
    with pytest.raises(HawkError, match="llama_proj_motion_0.bias .*not finite"):
        export(broken, config, tmp_path / "half")
    assert not (tmp_path / "half").exists() and not list(tmp_path.glob(".*"))
    export(params, config, tmp_path / "copy")
    export(params, config, tmp_path / "copy")       # replaces its own


CHILD = """
import os, sys
sys.path.insert(0, {tests!r})
from toy_run import one_device, toy_config, toy_params
from hawk_jax.convert import torch_files
from hawk_jax.convert.export import export
from hawk_jax.training import freeze
count = 0
put = torch_files.Shards.put
def killed(self, name, tensor):
    global count
    count += 1
    if count == {kill}:
        os.kill(os.getpid(), {signal})
    put(self, name, tensor)
torch_files.Shards.put = killed
config = toy_config()
export(freeze.join(*toy_params(config, one_device())), config, {out!r})
"""


def child(variables: dict, kill: int, number: int, out: Path):
    code = CHILD.format(tests=str(Path(__file__).parent), kill=kill, signal=number, out=str(out))
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent / "without_torch")])
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | variables | {"PYTHONPATH": paths})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_export_leaves_nothing_that_looks_whole(tmp_path, compiled, number):
    done = child(compiled, 40, int(number), tmp_path / "out")
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    left = [p.name for p in tmp_path.iterdir()]
    assert left == ([".out.writing"] if number == signal.SIGKILL else [])
    assert not list(tmp_path.rglob("manifest.json")) and not list(tmp_path.rglob("PROOF.json"))
    done = child(compiled, 10**9, 0, tmp_path / "out")       # the next attempt clears it away
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_line_and_leaves_nothing(exported, tmp_path, bytes_only):
    _, config, params = exported
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        with pytest.raises(HawkError, match="could not be written to .* \\(No space left on device\\); nothing was left there"):
            export(params, config, disk / "out")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


# ------------------------------------------------------------------------------------------------ meshes and processes
@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """(configuration file, folder): a run of the toy model with a frozen tree and one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    config, mesh = toy_config(folder / "run", f"run.frozen={folder}/frozen"), one_device()
    trainable, frozen = toy_params(config, mesh)
    hashed = save_frozen(folder / "frozen", frozen, {})
    with Checkpoints(config, Path(config.run.folder)) as checkpoints:
        checkpoints.save(init_state(config, mesh, trainable), 1, hashed)
    file = folder / "toy.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom toy_run import toy_config\n\n"
                    f"def config():\n    return toy_config({config.run.folder!r}, 'run.frozen={folder}/frozen')\n")
    return file, folder


def start(file: Path, out: Path, devices: int, *options: str, **environment: str) -> subprocess.Popen:
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu",
                        "PYTHONPATH": str(Path(__file__).parent / "without_torch")} | environment
    return subprocess.Popen([sys.executable, "-m", "hawk_jax", "export", str(file), "--out", str(out), *options], cwd=ROOT, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


SPLIT = ("mesh.strategy=fsdp_tensor", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")


def test_eight_devices_and_two_processes_write_the_same_bytes(run_folder, tmp_path, compiled):
    file, _ = run_folder
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    together = compiled | {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    runs = [start(file, tmp_path / "one", 1, **compiled), start(file, tmp_path / "eight", 8, *SPLIT, **compiled),
            *[start(file, tmp_path / "two", 4, *SPLIT, **together, JAX_PROCESS_ID=str(i)) for i in range(2)]]
    for run in runs:
        out, err = run.communicate(timeout=240)
        assert run.returncode == 0, err[-2000:]
    written = [json.loads((tmp_path / name / "manifest.json").read_text())["tensors"] for name in ("one", "eight", "two")]
    assert written[0] == written[1] == written[2] and len(written[0]["pth"]) == 128 + 1 + len(keys.buffers(toy_config().model))
    # and what JAX computed there is what one device computed; sums over devices run in another order
    values = [load_file(tmp_path / name / "proof.safetensors") for name in ("one", "eight", "two")]
    for name in values[0]:
        for other in values[1:]:
            np.testing.assert_allclose(other[name], values[0][name], rtol=0, atol=1e-5 * max(1, np.abs(values[0][name]).max()))


def test_a_fault_of_the_writing_process_ends_both(run_folder, tmp_path):
    file, _ = run_folder
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("important")
    together = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    runs = [start(file, tmp_path / "out", 4, *SPLIT, **together, JAX_PROCESS_ID=str(i)) for i in range(2)]
    said = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [2, 2]
    assert "holds no export" in said[0] and "process 0" in said[1]


# ------------------------------------------------------------------------------------------------ what `prove` runs and keeps
def test_code_that_a_configuration_names_elsewhere_is_not_run(exported, tmp_path):
    """transformers runs what `auto_map` names, which may be any folder."""
    folder, *_ = exported
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for file in ("config.json", "llama/config.json"):
        settings = json.loads((folder / file).read_text()) | {"auto_map": {"AutoModel": f"{tmp_path}/evil--evil.Evil"}}
        (tmp_path / "copy" / file).write_text(json.dumps(settings))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"] |= torch_files.describe(tmp_path / "copy", [tmp_path / "copy" / file])
        (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
        assert "nothing is run" in prove(tmp_path / "copy")["differences"][0] and not (tmp_path / "ran").exists()
        shutil.copy(folder / file, tmp_path / "copy" / file)


def test_a_proof_is_not_replaced_by_a_weaker_one_and_notices_another_graph(exported, tmp_path, monkeypatch):
    folder, *_ = exported
    shutil.copytree(folder, tmp_path / "copy")
    strong = (tmp_path / "copy" / "PROOF.json").read_text()
    assert prove(tmp_path / "copy", compute=False)["verdict"] == "bytes equal; nothing was computed"
    assert (tmp_path / "copy" / "PROOF.json").read_text() == strong
    graph = bytearray((tmp_path / "copy" / "vision.pt2").read_bytes())
    graph[len(graph) // 2] ^= 1
    (tmp_path / "copy" / "vision.pt2").write_bytes(graph)
    for _ in range(2):      # nor does the second time forget what the first one found
        found = prove(tmp_path / "copy", compute=False)
        assert found["verdict"] == "differs" and "vision.pt2 is not the file that was proven" in found["differences"][0]
    with pytest.raises(HawkError, match="outputs.jsonl"):
        prove(tmp_path / "copy", tmp_path, tmp_path)
    (tmp_path / "outputs.jsonl").write_text('{"source": "a.mp4", "description": "x", "answers": []}\n')
    with pytest.raises(HawkError, match="lacks a.mp4"):
        prove(tmp_path / "copy", tmp_path, tmp_path)


def test_a_proof_that_dies_is_no_proof(exported, tmp_path, monkeypatch, bytes_only):
    """As where the machine runs out of memory: the folder is whole, and kept, under a name that says it is not proven."""
    _, config, params = exported
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, -9, "", ""))
    with pytest.raises(HawkError, match="not proven: .* status -9 .*kept as .*out.unproven"):
        export(params, config, tmp_path / "out", pth="none")
    assert [p.name for p in tmp_path.iterdir()] == ["out.unproven"]


def test_a_graph_says_nothing_of_the_machine_that_made_it(exported):
    import zipfile
    with zipfile.ZipFile(exported[0] / "vision.pt2") as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert str(ROOT).encode() not in content and b"/tmp" not in content and b".py" not in content
