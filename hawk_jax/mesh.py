"""Devices: starting many processes as one program, and the mesh they form.  The only user of `jax.make_mesh`.

A mesh has three axes: "data" (copies of the parameters), "fsdp" (parameters and batch split), "tensor" (layers split inside).
The batch is split over data x fsdp.  Axes are of type Auto: parameters are placed by the rules of axes.py, the compiler places
the rest (`make_mesh` would default to Explicit, under which ordinary gathers and concatenations of this model are type errors).
"""
import contextlib
import math
import os

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hawk_jax.axes import BATCH, RULES
from hawk_jax.config import ConfigError, MeshConfig

NAMES = ("data", "fsdp", "tensor")


def _several_processes() -> bool:
    """Whether the surroundings say that this process is one of several."""
    env = os.environ
    return bool(env.get("JAX_COORDINATOR_ADDRESS") or env.get("MEGASCALE_COORDINATOR_ADDRESS")
                or int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1        # set by srun only: a plain call inside salloc is one process
                or int(env.get("OMPI_COMM_WORLD_SIZE") or 1) > 1
                or "," in env.get("TPU_WORKER_HOSTNAMES", ""))


def start_processes() -> tuple[int, int]:
    """Joins the other processes of this run, if there are any; must come before the first use of a device.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say so explicitly (`launch` sets them); under Slurm, Open MPI and
    on TPU pods jax finds them itself.  Returns (index of this process, number of processes).  ConfigError if something is missing.
    """
    if _several_processes() and not jax.distributed.is_initialized():
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        address, count, index = map(os.environ.get, names)
        if address and not (count and index):
            raise ConfigError(f"JAX_COORDINATOR_ADDRESS={address} is set, but JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={index}: "
                              "set all three, or none")
        # a process that fails waits this long for the others at its end; jax's own five minutes only cost machine time
        given = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)} if address else {}
        jax.distributed.initialize(**given, shutdown_timeout_seconds=30)
    return jax.process_index(), jax.process_count()


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Devices along (data, fsdp, tensor); -1 becomes what is left.  ConfigError if that does not come out even."""
    wanted = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(n for n in wanted if n != -1)
    if min(wanted) < -1 or 0 in wanted:
        raise ConfigError(f"mesh.data, mesh.fsdp, mesh.tensor = {wanted}: each must be positive, or -1 for what is left")
    if devices % fixed or (-1 not in wanted and fixed != devices):
        raise ConfigError(f"mesh.data x mesh.fsdp x mesh.tensor = {' x '.join(map(str, wanted))} does not fit {devices} devices; "
                          "set one of them to -1")
    return tuple(devices // fixed if n == -1 else n for n in wanted)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """The mesh over all devices of all processes, or over `devices` (those of a topology, for compiling without hardware).

    Several slices (islands of fast links) are joined along "data", the axis with the least traffic.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(config, len(devices))
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1:
        if shape[0] % slices:
            raise ConfigError(f"mesh.data={shape[0]} is not a multiple of the {slices} slices, and only data may cross them")
        inside = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices=devices)
        return Mesh(grid, NAMES, axis_types=(AxisType.Auto,) * 3)
    if devices[0].platform == "cpu":  # fake devices have no links to optimise for, and keep their order
        return Mesh(np.array(devices).reshape(shape), NAMES, axis_types=(AxisType.Auto,) * 3)
    return jax.make_mesh(shape, NAMES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis (clips, rows) over data x fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


@contextlib.contextmanager
def use(mesh: Mesh, strategy: str):
    """Within it, activation constraints of the model refer to this mesh and strategy.  Trace (first call) a jitted step inside."""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES[strategy]):
        yield mesh
