"""The import order of WORKSPACE.md, walked over the syntax trees, and what the GPU image may lack."""
import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = [   # a module may import from its own layer and from those above it
    ("hawk_jax.options", "hawk_jax.config", "hawk_jax.axes"),
    ("data",),
    ("hawk_jax.mesh",),
    ("hawk_jax.models",),
    ("hawk_jax.training",),
    ("hawk_jax.scaling", "hawk_jax.inference", "hawk_jax.evaluation", "hawk_jax.convert"),
    ("hawk_jax.pipeline", "hawk_jax.commands", "launch"),
    ("hawk_jax.__main__", "benchmarks"),
]
ABSENT_ON_GPU_IMAGES = ("cv2", "av", "spacy", "tensorflow_datasets", "grain", "sentencepiece")
NNX_ALLOWED = {"Module", "Param", "List", "Rngs", "split", "merge", "state", "eval_shape", "with_partitioning", "logical_axis_rules",
               "get_named_sharding", "map_state", "to_pure_dict", "use_eager_sharding", "Linear", "LayerNorm", "RMSNorm", "Embed",
               "Dropout", "Conv"}


def layer_of(name: str) -> int | None:
    """Index in ORDER of a module, None for foreign ones and for the package `hawk_jax` itself."""
    return next((i for i, prefixes in enumerate(ORDER) for p in prefixes if name == p or name.startswith(p + ".")), None)


COPIED = ROOT / "hawk_jax/convert/huggingface"      # stands alone in exported folders; not part of the program


def modules():
    for folder in ("hawk_jax", "data", "launch", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.is_relative_to(COPIED):
                continue
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, path, ast.parse(path.read_text())


def imported(tree):
    """(module name, is at module level) for each import statement."""
    top = {id(n) for n in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.name, id(node) in top) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: its layer could not be told"
            yield from ((f"{node.module}.{a.name}", id(node) in top) for a in node.names)


def test_every_module_is_in_a_layer_and_imports_only_upwards():
    wrong = []
    for name, path, tree in modules():
        here = layer_of(name)
        if here is None:
            assert name == "hawk_jax", f"{path} belongs to no layer of the import order"
            continue
        for other, _ in imported(tree):
            there = layer_of(other)
            if there is not None and there > here:
                wrong.append(f"{name} imports {other}")
    assert not wrong, wrong


def test_data_imports_only_config_of_hawk_jax_and_no_jax():
    def allowed(other: str) -> bool:
        top = other.split(".")[0]
        return other.startswith("hawk_jax.config") if top == "hawk_jax" else top not in ("jax", "flax", "optax")

    wrong = [f"{name} imports {other}" for name, _, tree in modules() if name.split(".")[0] == "data"
             for other, _ in imported(tree) if not allowed(other)]
    assert not wrong, wrong


def test_core_imports_without_what_gpu_images_lack():
    # a subprocess in which these packages cannot be found: an import at module level would fail
    names = [n for n, _, _ in modules() if n in ("hawk_jax.options", "hawk_jax.config", "hawk_jax.axes", "hawk_jax.mesh")
             or n.startswith(("hawk_jax.models", "hawk_jax.training"))]
    code = f"""
import importlib, sys
for name in {ABSENT_ON_GPU_IMAGES!r}: sys.modules[name] = None
for name in {names!r}: importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_config_imports_no_jax():
    code = "import sys, hawk_jax.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nnx_is_used_narrowly_and_make_mesh_in_one_place():
    wrong = []
    for name, _, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "nnx" and node.attr not in NNX_ALLOWED:
                    wrong.append(f"{name} uses nnx.{node.attr}")
                if node.attr == "make_mesh" and node.value.id == "jax" and name != "hawk_jax.mesh":
                    wrong.append(f"{name} uses jax.make_mesh")
    assert not wrong, wrong


def test_no_pickle():
    for name, _, tree in modules():
        assert not any(other.split(".")[0] in ("pickle", "dill", "cloudpickle") for other, _ in imported(tree)), name


def test_what_exported_folders_carry_stands_alone():
    files = sorted(COPIED.glob("*.py"))
    assert [f.name for f in files] == ["modeling_hawk.py", "processing_hawk.py", "videos_hawk.py", "vision_hawk.py"]
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        found = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        found |= {"." * n.level + (n.module or "") for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not any(name.split(".")[0] in ("hawk_jax", "data", "pickle", "jax") for name in found), found


def test_only_what_is_for_torch_imports_torch_and_only_when_it_runs():
    """Neither training nor the demo needs torch."""
    for name, _, tree in modules():
        for other, top in imported(tree):
            if other.split(".")[0] in ("torch", "transformers"):
                assert not top and (name.startswith("hawk_jax.convert.") or name.startswith("benchmarks")), f"{name} imports {other}"
