"""Launchers: the same pure step on one device, on all of a host (`pmap`), or on a mesh (`jit` with shardings).

Where a parameter lies is a table of (regex on its path, PartitionSpec); modules know no mesh.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tx_jax.errors import require
from tx_jax.run_config import MeshConfig

P = PartitionSpec
AXIS = "data"  # the axis_name that a step for pmap_step is made with
BATCH_AXES = ("data", "fsdp")  # of the mesh: both split the batch

RULES: tuple[tuple[str, PartitionSpec], ...] = (  # first match; kernels are (out, in), or the two parts of an Int8
    (r"/(q|k|v|qkv|gate|up|gate_up)/kernel(/values|/scale)?$", P("tensor", "fsdp")),
    (r"/(out|down)/kernel(/values|/scale)?$", P("fsdp", "tensor")),
    (r"(embed/table|head/map/kernel)(/values|/scale)?$", P("tensor", "fsdp")),
    (r"", P()),
)


class Launcher(NamedTuple):
    """A step with its placement."""

    step: Callable[[Any, Any], tuple[Any, Any]]  # (state, batch) → (state, metrics); the old state is given up
    put_state: Callable[[Any], Any]  # onto the devices
    put_batch: Callable[[Any], Any]
    host_state: Callable[[Any], Any]  # one copy of a placed state, or of a part: for a checkpoint, for evaluation


def make_mesh(cfg: MeshConfig = MeshConfig(), devices: list | None = None) -> Mesh:
    """A mesh of axes data, fsdp and tensor. Axes of None are 1, but data takes all devices that are left.

    Raises:
        InputError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fsdp, tensor = cfg.fsdp or 1, cfg.tensor or 1
    data = cfg.data or max(len(devices) // (fsdp * tensor), 1)
    require(
        data * fsdp * tensor == len(devices),
        f"mesh data={data} × fsdp={fsdp} × tensor={tensor} needs {data * fsdp * tensor} devices; "
        f"there are {len(devices)}",
    )
    return Mesh(np.asarray(devices).reshape(data, fsdp, tensor), ("data", "fsdp", "tensor"))


def shardings(tree: Any, mesh: Mesh, rules: tuple[tuple[str, PartitionSpec], ...] = RULES) -> Any:
    """A NamedSharding for every leaf of `tree`, by its path; an axis that does not divide a dimension is left out."""

    def of(path: tuple, leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", "")))) for entry in path)
        spec = next(spec for pattern, spec in rules if re.search(pattern, name))
        fits = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, leaf.shape, strict=False)
        ]
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(of, tree)


def check_batch(batch_size: int, n_parts: int) -> None:
    """Hold a batch to a whole number of rows a device.

    Raises:
        InputError: it is not a multiple.
    """
    require(
        batch_size % n_parts == 0,
        f"batch_size={batch_size} must be a multiple of the {n_parts} devices that share it; "
        f"use {max(batch_size // n_parts, 1) * n_parts}",
    )


def jit_step(step: Callable, state: Any, mesh: Mesh | None = None) -> Launcher:
    """`step` on a mesh (None: of one device): the batch split over data and fsdp, parameters by RULES.

    Args:
        state: a TrainState, or its shapes from `jax.eval_shape`.
    """
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    places, rows = shardings(state, mesh), NamedSharding(mesh, P(BATCH_AXES))
    n_parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def put_batch(batch: Any) -> Any:
        check_batch(batch[0].shape[0], n_parts)
        return jax.device_put(batch, rows)

    return Launcher(
        step=jax.jit(step, donate_argnums=0, out_shardings=(places, None)),
        put_state=lambda state: jax.device_put(state, places),
        put_batch=put_batch,
        host_state=lambda state: state,
    )


def pmap_step(step: Callable, devices: list | None = None) -> Launcher:
    """`step`, made with axis_name=AXIS, on every device of this host, each with a copy of the state."""
    devices = jax.local_devices() if devices is None else devices
    n = len(devices)
    mesh = Mesh(np.asarray(devices), (AXIS,))

    def copies(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n, *leaf.shape)), tree)

    def put_batch(batch: Any) -> Any:
        check_batch(batch[0].shape[0], n)
        return jax.tree.map(lambda leaf: leaf.reshape(n, -1, *leaf.shape[1:]), batch)

    def first(tree: Any) -> Any:
        # Not leaf[0], which sums over all devices, leaf by leaf: on CPU such programs can wait for each other for ever.
        return jax.tree.map(lambda leaf: leaf.addressable_data(0)[0], tree)

    spread = jax.jit(copies, out_shardings=NamedSharding(mesh, P(AXIS)))
    return Launcher(
        step=jax.pmap(step, AXIS, out_axes=(0, None), devices=devices, donate_argnums=0),
        put_state=lambda state: spread(jax.device_put(state, NamedSharding(mesh, P()))),
        put_batch=put_batch,
        host_state=first,
    )
