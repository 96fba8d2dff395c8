"""Launchers: the same pure step on one device, on all of a host (`pmap`), or on a mesh (`jit` with shardings).

Where a parameter lies is a table of (regex on its path, PartitionSpec); modules know no mesh.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tx_jax.config import ModelConfig
from tx_jax.config_checks import divisors
from tx_jax.errors import require
from tx_jax.run_config import MeshConfig

P = PartitionSpec
AXIS = "data"  # the axis_name that a step for pmap_step is made with
AXES = ("data", "fsdp", "expert", "sequence", "tensor")  # of a mesh
BATCH_AXES = ("data", "fsdp", "expert")  # that split the rows of a batch; sequence splits their tokens

RULES: tuple[tuple[str, PartitionSpec], ...] = (  # first match; kernels are (out, in), or the two parts of an Int8
    (r"/experts/(gate|up)/kernel$", P("expert", "tensor", "fsdp")),
    (r"/experts/down/kernel$", P("expert", "fsdp", "tensor")),
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
    make_state: Callable[..., Callable]  # (function that gives a state, donate_argnums=) → one that gives it placed
    make_eval: Callable[[Callable], Callable]  # a pure (params as of host_state, batch) → the same on the devices
    lower: Callable[[Any, Any], jax.stages.Lowered]  # the step's program, to be looked at
    n_parts: int  # of a batch's rows


def make_mesh(cfg: MeshConfig = MeshConfig(), devices: list | None = None) -> Mesh:
    """A mesh of AXES. Axes of None are 1, but data takes all devices that are left.

    >>> make_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1]).shape["data"]
    1

    Raises:
        InputError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(cfg, axis) or 1 for axis in AXES}
    sizes["data"] = cfg.data or max(len(devices) // math.prod(sizes.values()), 1)
    needed = math.prod(sizes.values())
    told = " × ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"
    rule = f"mesh {told} needs {needed} devices; there are {len(devices)}"
    require(needed == len(devices), f"{rule}, which the axes must multiply to")
    return Mesh(np.asarray(devices).reshape(*sizes.values()), AXES)


def check_mesh(mesh: Mesh, model: ModelConfig) -> None:
    """Hold a model to whole heads and whole experts a device.

    Raises:
        InputError: tensor does not divide the heads, or expert the experts.
    """
    for axis, name, n in (("tensor", "n_heads", model.n_heads), ("expert", "n_experts", model.E)):
        parts, value = mesh.shape[axis], getattr(model, name)
        remedy = f"use {divisors(n)}" if value else f"give --model.n-experts {parts}, or leave it out"
        require(n % parts == 0, f"mesh.{axis}={parts} must divide model.{name}={value}; {remedy}")


def shardings(tree: Any, mesh: Mesh, rules: tuple[tuple[str, PartitionSpec], ...] = RULES) -> Any:
    """A NamedSharding for every leaf of `tree`, by its path; an axis that does not divide a dimension is left out.

    Layers that are stacked (`stack_layers`) have a first axis more, which is whole on every device.
    """

    def of(path: tuple, leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", "")))) for entry in path)
        spec = next(spec for pattern, spec in rules if re.search(pattern, name))
        spec = (None, *spec) if "scanned/" in name else spec
        fits = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, leaf.shape, strict=False)
        ]
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(of, tree)


def placed(shapes: Any, mesh: Mesh) -> Any:
    """The shapes, with where each leaf is to lie."""
    return jax.tree.map(lambda leaf, at: leaf.update(sharding=at), shapes, shardings(shapes, mesh))


def check_batch(batch_size: int, n_parts: int, accumulate_steps: int = 1) -> None:
    """Hold a batch to a whole number of rows a device and a part.

    Raises:
        InputError: it is not a multiple.
    """
    n = n_parts * accumulate_steps
    in_turn = f" in accumulate_steps={accumulate_steps}" if accumulate_steps > 1 else ""
    require(
        batch_size % n == 0,
        f"batch_size={batch_size} must be a multiple of the {n_parts} devices that share it{in_turn}; "
        f"use {max(batch_size // n, 1) * n}",
    )


def rows_here(mesh: Mesh | None, batch_size: int) -> np.ndarray | None:
    """Which rows of a batch the devices of this process have, as booleans; None: all, as there is no other process."""
    if mesh is None or jax.process_count() == 1:
        return None
    check_batch(batch_size, math.prod(mesh.shape[axis] for axis in BATCH_AXES))
    own = np.zeros(batch_size, bool)
    where: Any = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((batch_size,))
    for (rows,) in where.values():
        own[rows] = True
    return own


def jit_step(step: Callable, state: Any, mesh: Mesh | None = None) -> Launcher:
    """`step` on a mesh (None: of one device), which may be of many hosts: parameters by RULES, the batch by its axes.

    Args:
        step: a pure (state, batch) → (state, metrics), such as that of `make_train_step`.
        state: a TrainState, or its shapes from `jax.eval_shape`.

    >>> launcher = jit_step(lambda state, batch: (state + batch[0].sum(), {}), state=jnp.zeros(()))
    >>> state, _ = launcher.step(launcher.put_state(jnp.zeros(())), launcher.put_batch((np.ones((2, 3)),)))
    >>> float(launcher.host_state(state))
    6.0

    Raises:
        InputError: in put_batch: rows that are no multiple of the devices that share them, or tokens of mesh.sequence.
    """
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    places, n_parts = shardings(state, mesh), math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def put_batch(batch: Any) -> Any:
        check_batch(batch[0].shape[0], n_parts)
        return jax.tree.map(put, batch)

    def put(leaf: Any) -> jax.Array:
        n = mesh.shape["sequence"]
        rule = f"seq_len={leaf.shape[-1]} must be a multiple of mesh.sequence={n}, which share it"
        require(leaf.ndim == 1 or leaf.shape[1] % n == 0, f"{rule}; use {max(leaf.shape[-1] // n, 1) * n}")
        where = NamedSharding(mesh, P(BATCH_AXES, *["sequence"] * (leaf.ndim > 1)))
        return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])  # what is of this host

    step = jax.jit(step, donate_argnums=0, in_shardings=(places, None), out_shardings=(places, None))

    def on_mesh(function: Callable) -> Callable:
        def call(state: Any, batch: Any) -> Any:
            with jax.set_mesh(mesh):  # modules ask how what they compute is split
                return function(state, batch)

        return call

    def make_eval(function: Callable) -> Callable:
        compiled = on_mesh(jax.jit(function))
        return lambda params, batch: compiled(params, put_batch(batch))

    return Launcher(
        step=on_mesh(step),
        put_state=lambda state: jax.device_put(state, places),
        put_batch=put_batch,
        host_state=lambda state: state,
        make_state=functools.partial(jax.jit, out_shardings=places),
        make_eval=make_eval,
        lower=on_mesh(step.lower),
        n_parts=n_parts,
    )


def pmap_step(step: Callable, devices: list | None = None) -> Launcher:
    """`step`, made with axis_name=AXIS, on every device of this host, each with a copy of the state.

    >>> launcher = pmap_step(lambda state, batch: (state + jax.lax.psum(batch[0].sum(), AXIS), {}))
    >>> state, _ = launcher.step(launcher.put_state(jnp.zeros(())), launcher.put_batch((np.ones((8, 3)),)))
    >>> float(launcher.host_state(state))
    24.0

    Raises:
        InputError: in put_batch: rows that are no multiple of the devices.
    """
    devices = jax.local_devices() if devices is None else devices
    n = len(devices)
    mesh = Mesh(np.asarray(devices), (AXIS,))

    def copies(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n, *leaf.shape)), tree)

    def put_batch(batch: Any) -> Any:
        check_batch(batch[0].shape[0], n)
        parts = jax.tree.map(lambda leaf: leaf.reshape(n, -1, *leaf.shape[1:]), batch)
        return jax.device_put(parts, NamedSharding(mesh, P(AXIS)))

    def first(tree: Any) -> Any:
        # Not leaf[0], which sums over all devices, leaf by leaf: on CPU such programs can wait for each other for ever.
        return jax.tree.map(lambda leaf: leaf.addressable_data(0)[0], tree)

    spread = jax.jit(copies, out_shardings=NamedSharding(mesh, P(AXIS)))
    mapped: Any = jax.pmap(step, AXIS, out_axes=(0, None), devices=devices, donate_argnums=0)

    def put_state(state: Any) -> Any:
        return spread(jax.device_put(state, NamedSharding(mesh, P())))

    def make_state(function: Callable, **how: Any) -> Callable:
        compiled = jax.jit(function, **how)
        return lambda *args: put_state(compiled(*args))

    return Launcher(
        step=mapped, put_state=put_state, put_batch=put_batch, host_state=first, make_state=make_state,
        make_eval=jax.jit, lower=mapped.lower, n_parts=n,
    )  # fmt: skip
