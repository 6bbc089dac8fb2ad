"""The only place that knows of devices: the mesh, what is laid out along which of its axes, and start-up.

Members of a sweep lie along `sweep`, windows and tokens along `data`; weights are whole on every device of `data`.
"""

import contextlib
import math
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minsae_jax.config import UserError

SWEEP, DATA = "sweep", "data"
MAX_CPU_DEVICES = 8  # each holds the weights whole, and adds up gradients with all others


def start(deterministic: bool = False) -> None:
    """Set up JAX; to be called before anything touches a device.

    On CPU a core becomes a device, up to eight: XLA uses cores better with work split over devices than within one.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if deterministic and "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = flags = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    if "xla_force_host_platform_device_count" not in flags and "JAX_NUM_CPU_DEVICES" not in os.environ:
        with contextlib.suppress(RuntimeError):  # JAX was used before in this process: its devices stay as they are
            jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, MAX_CPU_DEVICES))
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"JAX finds no device to run on ({' '.join(str(e).split())[:200]})") from e


def make_mesh(*group_sizes: int) -> Mesh:
    """All devices, as many as possible along `sweep` (where they need not talk), given the numbers of members that
    have to divide evenly; the rest along `data`. Without members, all along `data`."""
    devices = np.array(jax.devices())
    sweep = math.gcd(len(devices), *group_sizes) if group_sizes else 1
    return Mesh(devices.reshape(sweep, -1), (SWEEP, DATA), axis_types=(AxisType.Auto, AxisType.Auto))


def on_cpu() -> bool:
    """Whether work is best done in pieces that fit the cache, and members one after the other."""
    return jax.default_backend() == "cpu"


def members(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is the member."""
    return NamedSharding(mesh, P(SWEEP))


def rows(mesh: Mesh) -> NamedSharding:
    """Arrays whose first axis is windows or tokens."""
    return NamedSharding(mesh, P(DATA))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Arrays that every device has whole."""
    return NamedSharding(mesh, P())


def put_rows(mesh: Mesh, x: np.ndarray, multiple: int = 1) -> jax.Array:
    """Rows on the devices, padded with zeros at the end so that every device gets the same multiple of rows."""
    short = -len(x) % (mesh.shape[DATA] * multiple)
    if short:
        x = np.concatenate([x, np.zeros((short, *x.shape[1:]), x.dtype)])
    return jax.device_put(x, rows(mesh))


def on_rows(mesh: Mesh, function: Callable) -> Callable:
    """function(weights, rows) -> rows, on every device's own rows."""
    return jax.shard_map(function, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P(DATA), check_vma=False)


def on_members_and_rows(mesh: Mesh, function: Callable) -> Callable:
    """function(members, members, rows) -> (members, whole), on every device's own members and rows; it is function's
    business to add up over `data`."""
    specs = (P(SWEEP), P(SWEEP), P(DATA))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=(P(SWEEP), P()), check_vma=False)
