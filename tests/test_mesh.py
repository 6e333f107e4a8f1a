"""Meshes: their shape, what is put where, and that eight devices compute what one computes."""
import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import TINY
from jax.sharding import AxisType, PartitionSpec

from hawk_jax import axes, mesh
from hawk_jax.config import ConfigError, MeshConfig, ModelConfig
from hawk_jax.models import build

SMALL = dataclasses.replace(
    TINY, vit=dataclasses.replace(TINY.vit, depth=1), image_qformer=dataclasses.replace(TINY.image_qformer, depth=2),
    video_qformer=dataclasses.replace(TINY.video_qformer, depth=1, dropout=0.1), frames_per_chunk=4, remat="full")
EIGHT = {"fsdp": MeshConfig("fsdp", 1, -1, 1), "fsdp_tensor": MeshConfig("fsdp_tensor", 2, 2, 2), "tensor": MeshConfig("tensor", 1, 1, 8)}

needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices (fake ones: tests/conftest.py)")


def test_minus_one_takes_what_is_left():
    assert mesh.mesh_shape(MeshConfig("fsdp", 2, -1, 2), 16) == (2, 4, 2)
    assert mesh.mesh_shape(MeshConfig("fsdp", 1, 1, 1), 1) == (1, 1, 1)
    for wrong in (MeshConfig("fsdp", 3, -1, 1), MeshConfig("fsdp", 1, 4, 1), MeshConfig("fsdp", 0, -1, 1), MeshConfig("fsdp", -2, 1, 1)):
        with pytest.raises(ConfigError, match="mesh.data"):
            mesh.mesh_shape(wrong, 8)


JOIN = """
import jax, numpy as np
from hawk_jax import mesh
from hawk_jax.config import MeshConfig
index, count = mesh.start_processes()
made = mesh.make_mesh(MeshConfig("fsdp", 1, -1, 1))
rows = jax.make_array_from_process_local_data(mesh.batch_sharding(made), np.full((2, 1), index + 1.0))
print(index, count, dict(made.shape)["fsdp"], float(jax.jit(lambda x: x.sum(), out_shardings=mesh.replicated(made))(rows)))
"""


def test_two_processes_make_one_mesh():
    """Two rows of 1 from process 0 and two of 2 from process 1 sum to 6 on both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu",
                        "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    started = [subprocess.Popen([sys.executable, "-c", JOIN], env=env | {"JAX_PROCESS_ID": str(i)}, cwd=Path(__file__).parents[1],
                                stdout=subprocess.PIPE, text=True) for i in range(2)]
    last = [p.communicate(timeout=120)[0].strip().splitlines()[-1] for p in started]        # lines before it are the transport's
    assert last == ["0 2 4 6.0", "1 2 4 6.0"]


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES=None"):
        mesh.start_processes()


@needs_eight
def test_axes_are_auto_and_data_crosses_slices():
    made = mesh.make_mesh(EIGHT["fsdp_tensor"])
    assert made.axis_names == ("data", "fsdp", "tensor") and set(made.axis_types) == {AxisType.Auto}

    @dataclasses.dataclass(frozen=True)
    class Device:                       # what a topology of two slices offers
        id: int
        slice_index: int
        process_index: int
        platform: str = "gpu"
        device_kind: str = "fake"
    two = mesh.make_mesh(EIGHT["fsdp_tensor"], [Device(i, i // 4, i // 4) for i in range(8)])
    assert {d.slice_index for d in two.devices[0].flat} == {0} and {d.slice_index for d in two.devices[1].flat} == {1}
    with pytest.raises(ConfigError, match="2 slices"):
        mesh.make_mesh(EIGHT["fsdp"], [Device(i, i // 4, i // 4) for i in range(8)])


@needs_eight
def test_rules_at_real_size():
    """What each strategy splits of the 7B model; the table of expectations is written by hand."""
    made, config = mesh.make_mesh(EIGHT["fsdp_tensor"]), ModelConfig()
    tree = {s: build.flatten(build.shardings(config, made, s)) for s in axes.RULES}
    up, head = ("llama", "layers", "mlp", "up", "kernel"), ("llama", "lm_head", "kernel")
    down = ("llama", "layers", "mlp", "down", "kernel")
    assert tree["replicated"][up].spec == PartitionSpec(None, None, None)
    assert tree["fsdp"][up].spec == PartitionSpec(None, "fsdp", None)
    assert tree["tensor"][up].spec == PartitionSpec(None, None, "tensor")
    assert tree["tensor"][down].spec == PartitionSpec(None, "tensor", None)
    assert tree["fsdp_tensor"][up].spec == PartitionSpec(None, "fsdp", "tensor")
    assert tree["fsdp_tensor"][head].spec == PartitionSpec("fsdp", "tensor")
    assert axes.undivided(build.logical_axes(config), made, "fsdp_tensor") == []


@needs_eight
def test_what_does_not_divide_stays_whole_and_is_listed():
    made = mesh.make_mesh(EIGHT["tensor"])
    tree = build.flatten(build.shardings(SMALL, made, "tensor"))
    assert tree["encoder", "vit", "blocks", "mlp", "fc1", "kernel"].spec == PartitionSpec(None, None, None, None)    # 279 hidden units
    assert tree["llama", "lm_head", "kernel"].spec == PartitionSpec(None, "tensor")
    lines = axes.undivided(build.logical_axes(SMALL), made, "tensor")
    assert "encoder/vit/blocks/mlp/fc1/kernel: mlp (279) over tensor (8)" in lines and not any("lm_head" in line for line in lines)


def batch(clips=8, tokens=24):
    rng, slot = np.random.default_rng(0), np.full((clips, tokens), -1, np.int32)
    slot[:, 1:17] = range(16)
    text = rng.integers(3, 480, (clips, tokens)).astype(np.int32)
    return {"frames_BTHWC": rng.integers(0, 256, (clips, 3, 60, 60, 3)).astype(np.uint8),
            "mask_BTHW": rng.integers(0, 256, (clips, 3, 60, 60)).astype(np.uint8),
            "crop_B4": np.tile(np.array([0.1, 0.1, 0.8, 0.75], np.float32), (clips, 1)),
            "tokens_RS": text, "slot_RS": slot, "segment_RS": np.ones((clips, tokens), np.int32),
            "position_RS": np.tile(np.arange(tokens, dtype=np.int32), (clips, 1)),
            "clip_RS": np.tile(np.arange(clips, dtype=np.int32)[:, None], (1, tokens))}


def run(params, data):
    """Outputs of the training forward pass and the gradient of the video branch."""
    def loss(video):
        hawk = build.bind(SMALL, params | {"video": video})
        out = hawk(data, dropout_key=jax.random.key(1))
        direction = jnp.cos(jnp.arange(out.hidden_RSD.size)).reshape(out.hidden_RSD.shape)    # (squares of normed rows have no gradient)
        return (out.hidden_RSD * direction).sum() + jnp.square(out.video_BQZ).sum(), out
    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(params["video"])
    return out, gradient


def parts(x) -> int:
    """Different pieces of an array that devices hold."""
    return len({str(s.index) for s in x.addressable_shards})


@pytest.fixture(scope="module")
def one_device():
    params = build.init_params(SMALL, jax.random.key(0))
    return params, jax.device_get(jax.jit(run)(params, batch()))


@needs_eight
def test_large_leaves_are_drawn_in_place(monkeypatch):
    """Each device draws its own part of a leaf above build.SMALL; the whole is what one device draws."""
    monkeypatch.setattr(build, "SMALL", 2**14)
    made = mesh.make_mesh(EIGHT["fsdp_tensor"])
    config = dataclasses.replace(SMALL, llama=dataclasses.replace(SMALL.llama, depth=1, vocab=64))
    one = build.init_params(config, jax.random.key(0))
    eight = build.init_params(config, jax.random.key(0), build.shardings(config, made, "fsdp_tensor"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-7), jax.device_get(eight), jax.device_get(one))


@needs_eight
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_tensor"])
def test_eight_devices_compute_what_one_computes(one_device, strategy):
    """Same initial values (to the last bit: they are drawn, not summed), same outputs and gradients, dropout included.

    Tolerance 1e-5 of the largest value: sums are split over devices in another order; a wrong mask, clip or shard is off by 1e-1.
    """
    made = mesh.make_mesh(EIGHT[strategy])
    placed = build.init_params(SMALL, jax.random.key(0), build.shardings(SMALL, made, strategy))
    assert parts(placed["llama"]["layers"]["mlp"]["up"]["kernel"]) == {"fsdp": 8, "fsdp_tensor": 4}[strategy]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), jax.device_get(one_device[0]))
    with mesh.use(made, strategy):
        data = jax.device_put(batch(), mesh.batch_sharding(made))
        ours = jax.jit(run)(placed, data)
    assert parts(ours[0].hidden_RSD) == {"fsdp": 8, "fsdp_tensor": 4}[strategy]        # rows stay where their clips are
    for mine, theirs in zip(jax.device_get(ours), one_device[1], strict=True):
        largest = max(np.abs(y).max() for y in jax.tree.leaves(theirs))
        jax.tree.map(lambda x, y, atol=1e-5 * largest: np.testing.assert_allclose(x, y, rtol=0, atol=atol), mine, theirs)
