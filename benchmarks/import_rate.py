"""Foreign weights in: one decoder layer and one ViT block of 7B width, by `import` and by torch, each in a process of its own.

    python -m benchmarks.import_rate WORK FOLDER        (what each of those processes runs)
"""
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import frame
from hawk_jax.config import HawkConfig, LlamaConfig, ModelConfig, QFormerConfig, VitConfig

QFORMER = QFormerConfig(queries=8, width=64, depth=2, heads=4, mlp=64, cross_attention_freq=1)
MODEL = ModelConfig(vit=VitConfig(depth=1), image_qformer=QFORMER, video_qformer=QFORMER, llama=LlamaConfig(depth=1, vocab=512))
CONFIG = HawkConfig(model=MODEL)
WORKS = ("to disk", "to device", "torch", "torch, read only")


def write_files(folder: Path) -> None:
    """float16 files as they are published: .pth for the ViT and the Q-Former, safetensors for the decoder."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from hawk_jax.convert.keys import TO_TORCH, table
    from hawk_jax.models.build import abstract_params, flatten
    shapes, tensors = flatten(abstract_params(MODEL)), {}
    torch.manual_seed(0)
    for entry in table(MODEL):
        if entry.path[0] in ("encoder", "llama") and "_motion" not in entry.key:
            shape = TO_TORCH[entry.kind](np.broadcast_to(np.int8(0), shapes[entry.path].shape[len(entry.index):])).shape
            tensors[entry.key] = torch.randn(shape).half()
    parts = {p: {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("visual_encoder.", "llama_model.")}
    torch.save(parts["visual_encoder."], folder / "eva.pth")
    torch.save({"model": {k: v for k, v in tensors.items() if not k.startswith(tuple(parts))}}, folder / "blip2.pth")
    (folder / "llama").mkdir()
    save_file(parts["llama_model."], folder / "llama" / "model.safetensors")
    c = MODEL.llama
    (folder / "llama" / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": c.vocab, "hidden_size": c.width, "num_hidden_layers": c.depth, "num_attention_heads": c.heads,
        "intermediate_size": c.mlp, "rms_norm_eps": c.eps, "max_position_embeddings": c.max_positions}))


def _ours(folder: Path, to_disk: bool):
    """A function that imports, and returns the bytes that it made."""
    import jax

    from hawk_jax.convert.layouts import Sources
    from hawk_jax.convert.to_jax import import_weights, load_foreign
    from hawk_jax.mesh import make_mesh
    sources, mesh = Sources(folder / "eva.pth", folder / "blip2.pth", folder / "llama"), make_mesh(CONFIG.mesh)

    def work() -> int:
        if to_disk:
            return import_weights(sources, CONFIG, folder / "frozen").bytes
        return sum(leaf.nbytes for leaf in jax.tree.leaves(jax.block_until_ready(load_foreign(sources, CONFIG, mesh))))
    return work


def _torch(folder: Path, read_only: bool):
    """The peer: load_file and torch.load, then load_state_dict into a module of bfloat16 parameters."""
    import torch
    from safetensors.torch import load_file

    def load() -> dict:
        tensors = load_file(folder / "llama" / "model.safetensors") | torch.load(folder / "eva.pth", weights_only=True)
        return {k.replace(".", "_"): v for k, v in (tensors | torch.load(folder / "blip2.pth", weights_only=True)["model"]).items()}

    def work() -> int:
        tensors = load()
        if read_only:       # safetensors maps its file: only touching the values reads them
            return sum(t.nbytes for t in tensors.values() if t.float().sum() is not None)
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_parameter(name, torch.nn.Parameter(torch.empty(tensor.shape, dtype=torch.bfloat16)))
        module.load_state_dict(tensors)
        return sum(p.nbytes for p in module.parameters())
    return work


def _most_memory() -> float:
    """MiB this process ever held; getrusage would count what its parent held when it started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def _in_this_process(name: str, folder: Path) -> dict:
    work = {"to disk": lambda: _ours(folder, True), "to device": lambda: _ours(folder, False), "torch": lambda: _torch(folder, False),
            "torch, read only": lambda: _torch(folder, True)}[name]()
    before, start = _most_memory(), time.perf_counter()
    size = work()
    first, start = time.perf_counter() - start, time.perf_counter()
    work()      # of a model's layers all but the first find their programs compiled
    return {"seconds": time.perf_counter() - start, "first": first, "GB": size / 1e9, "MiB": _most_memory() - before}


def measure(name: str, folder: Path) -> dict:
    """{"seconds" of its second call, "first", "GB", "MiB" by which the process grew} of a work in a new process; imports are not
    counted."""
    shutil.rmtree(folder / "frozen", ignore_errors=True)
    done = subprocess.run([sys.executable, "-m", "benchmarks.import_rate", name, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@frame.benchmark("import", "foreign weights in: a decoder layer and a ViT block of 7B width, beside torch's load_file and load_state_dict")
def run(folder: Path, repeats: int) -> dict:
    write_files(folder)
    samples = frame.interleaved({name: lambda n=name: measure(n, folder) for name in WORKS}, repeats)
    figures = {}
    for name, values in samples.items():
        figures[f"{name}, time"] = frame.figure([v["seconds"] for v in values], "s", "lower")
        figures[f"{name}, first time"] = frame.figure([v["first"] for v in values], "s, with compilation", "lower")
        figures[f"{name}, rate"] = frame.figure([v["GB"] / v["seconds"] for v in values], "GB/s", "higher")
        figures[f"{name}, memory"] = frame.figure([v["MiB"] for v in values], "MiB grown", "lower")
    ratios = {}
    for what, unit in (("seconds", "time"), ("MiB", "memory")):
        for name in WORKS[:2]:
            ratios[f"{name} against torch, {unit}"] = frame.ratio(
                {who: [v[what] for v in values] for who, values in samples.items()}, "torch", name) | {"unit": f"{unit} of torch / ours"}
    return frame.report({"GB": round(samples["to disk"][0]["GB"], 3), "from": "float16", "to": MODEL.frozen_dtype,
                         "to disk": "hashes sources and tree, checks every value, fsync; torch does neither"}, figures, ratios)


if __name__ == "__main__":
    print(json.dumps(_in_this_process(sys.argv[1], Path(sys.argv[2]))))
