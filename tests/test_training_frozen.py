"""The frozen tree on disk: read by the safetensors library, hashed by hand, damaged in every way."""
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open

from hawk_jax.config import MeshConfig
from hawk_jax.mesh import make_mesh
from hawk_jax.training.frozen import FrozenError, device_checksum, load_frozen, read_manifest, save_frozen, tree_hash


def tree() -> dict:
    rng = np.random.default_rng(0)
    return {"encoder": {"vit": {"kernel": jnp.asarray(rng.standard_normal((2, 8, 6)), jnp.bfloat16)}, "scale": jnp.arange(5.0)},
            "llama": {"lm_head": {"kernel": jnp.asarray(rng.standard_normal((8, 16)), jnp.float32)}}}


def abstract(values: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)


@pytest.fixture
def folder(tmp_path):
    save_frozen(tmp_path / "frozen", tree(), {"made_by": "test"})
    return tmp_path / "frozen"


def test_round_trip_is_exact_and_the_hash_is_of_the_content(folder):
    values, found = load_frozen(folder, abstract(tree()))
    jax.tree.map(np.testing.assert_array_equal, values, tree())
    assert jax.tree.map(lambda x: x.dtype, values) == jax.tree.map(lambda x: x.dtype, tree())
    lines = []
    for name, leaf in (("encoder/scale", tree()["encoder"]["scale"]), ("encoder/vit/kernel", tree()["encoder"]["vit"]["kernel"]),
                       ("llama/lm_head/kernel", tree()["llama"]["lm_head"]["kernel"])):
        lines.append(f"{name} {leaf.dtype.name} {list(leaf.shape)} {hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()}\n")
    assert found == hashlib.sha256("".join(lines).encode()).hexdigest()[:16] == tree_hash(tree())
    assert read_manifest(folder)["provenance"] == {"made_by": "test"}


def test_files_are_safetensors(folder):
    with safe_open(folder / "encoder.safetensors", "flax") as file:
        assert set(file.keys()) == {"encoder/vit/kernel", "encoder/scale"}
        kernel = file.get_tensor("encoder/vit/kernel")
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel, tree()["encoder"]["vit"]["kernel"])


def test_loads_onto_any_mesh(folder):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "fsdp") if x.shape[-1] % 2 == 0
                                                     else PartitionSpec()), tree())
    values, _ = load_frozen(folder, abstract(tree()), shardings)
    assert values["llama"]["lm_head"]["kernel"].addressable_shards[0].data.shape == (8, 8)
    jax.tree.map(np.testing.assert_array_equal, values, tree())
    assert int(device_checksum(values)) == int(device_checksum(tree()))


def test_device_checksum_sees_one_bit_and_exchanged_rows():
    start, seen = tree(), set()
    flipped = np.asarray(start["encoder"]["vit"]["kernel"]).copy()
    flipped.view(np.uint16)[1, 2, 3] ^= 1
    swapped = start["llama"]["lm_head"]["kernel"][jnp.array([1, 0, *range(2, 8)])]
    for values in (start, start | {"encoder": {"vit": {"kernel": flipped}, "scale": start["encoder"]["scale"]}},
                   start | {"llama": {"lm_head": {"kernel": swapped}}}):
        seen.add(int(device_checksum(values)))
    assert len(seen) == 3


def damage_bytes(folder):
    file = folder / "encoder.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def cut_off(folder):
    file = folder / "llama.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def change_manifest(folder):
    manifest = read_manifest(folder)
    manifest["leaves"]["encoder/scale"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))


def from_the_future(folder):
    (folder / "manifest.json").write_text(json.dumps(read_manifest(folder) | {"format": 2}))


@pytest.mark.parametrize("change, message", [
    (damage_bytes, "encoder/scale is not what the manifest says"), (cut_off, "ends before llama/lm_head/kernel"),
    (change_manifest, "manifest.json was changed"), (from_the_future, "has format 2"),
    (lambda folder: (folder / "manifest.json").unlink(), "no frozen tree at"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
    (lambda folder: (folder / "manifest.json").write_text('{"format": 1, "files": {}}'), "is not that of a frozen tree"),
    (lambda folder: (folder / "llama.safetensors").unlink(), "llama.safetensors cannot be read"),
])
def test_damage_is_named(folder, change, message):
    change(folder)
    with pytest.raises(FrozenError, match=message):
        load_frozen(folder, abstract(tree()))


@pytest.mark.parametrize("change, message", [
    (lambda t: t["encoder"].pop("scale"), "holds encoder/scale, which this model configuration does not freeze"),
    (lambda t: t["encoder"].update(bias=t["encoder"]["scale"]), "lacks encoder/bias"),
    (lambda t: t["encoder"].update(scale=t["encoder"]["scale"].astype(jnp.bfloat16)), r"encoder/scale is float32\[5\].* needs bfloat16"),
    (lambda t: t["encoder"].update(scale=jnp.zeros(6)), r"needs float32\[6\]"),
])
def test_another_model_is_refused(folder, change, message):
    wanted = tree()
    change(wanted)
    with pytest.raises(FrozenError, match=message):
        load_frozen(folder, abstract(wanted))


def test_writing_replaces_only_a_frozen_tree(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(FrozenError, match="holds no frozen tree"):
        save_frozen(other, tree(), {})
    assert (other / "thesis.txt").exists()
    (other / "manifest.json").write_text('{"format": 1, "files": {}}')      # an export
    with pytest.raises(FrozenError, match="holds no frozen tree"):
        save_frozen(other, tree(), {})
    assert (other / "thesis.txt").exists()
    changed = tree() | {"llama": {"lm_head": {"kernel": jnp.zeros((8, 16))}}}
    (folder / "manifest.json").write_text("{")      # a damaged tree is to be made again, in its place
    assert save_frozen(folder, changed, {}) != tree_hash(tree())
    assert not load_frozen(folder, abstract(tree()))[0]["llama"]["lm_head"]["kernel"].any()
    with pytest.raises(FrozenError, match="cannot write"):
        save_frozen(other / "thesis.txt" / "frozen", tree(), {})
