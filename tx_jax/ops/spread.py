"""How activations lie on a mesh, where the program is compiled for one: as the batch does that they came from.

XLA would decide by itself, and may then copy what it could have left where it was. Without a mesh nothing is said.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from tx_jax.ops.masks import Mask

ROWS, EXPERTS, TOKENS, HEADS = ("data", "fsdp", "expert"), "expert", "sequence", "tensor"  # axes of a mesh


def spread(x: Array) -> Array:
    """x (B, T, …), said to be split by rows and by tokens, and whole in the rest."""
    spec = layout(x.shape, ROWS, TOKENS)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def gathered(table: Any) -> Any:
    """A table (V, D), of NumPy too, said to be split by V alone: its rows are read whole, wherever they are."""
    spec = layout(table.shape, HEADS)
    return table if spec is None else jax.lax.with_sharding_constraint(table, spec)


def axes() -> dict[str, int]:
    """The sizes of the mesh's axes, without those that a caller has split already, as `pmap` has its own."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: n for name, n in mesh.shape.items() if name not in mesh.manual_axes}


def n_sequence_parts() -> int:
    """Parts of a sequence on the mesh."""
    return axes().get(TOKENS, 1)


def over_mesh(
    body: Callable, everywhere: bool, q: Array, k: Any, v: Any, mask: Mask, bias: Any, key: Any, *rest: Any
) -> Array:
    """body(q, k, v, …) of `attention`, each device with its own queries of a sequence that the mesh splits.

    Args:
        everywhere: also where the mesh splits rows and heads alone, which XLA does by itself.

    Keys and values come from all devices (all-gather), which is less to hold and to send than scores would be; nothing
    but them is as long as the whole. What XLA would split by itself, it would first put together.
    """
    n = n_sequence_parts()
    shares = (everywhere and axes()) or (n > 1 and q.shape[1] % n == 0)
    if not shares:
        return body(q, k, v, mask, bias, key, *rest)
    split = layout(v.shape, None, HEADS)
    heads = HEADS if split and split[1] else None  # of keys, and then of their queries
    q_positions = jnp.arange(q.shape[1])[None] if mask.q_positions is None and n > 1 else mask.q_positions
    fields = {
        "q_positions": (q_positions, ROWS, TOKENS),
        "k_positions": (mask.k_positions, ROWS),
        "q_segments": (mask.q_segments, ROWS, TOKENS),
        "k_segments": (mask.k_segments, ROWS),
        "prefix": (mask.prefix, ROWS),
    }
    parts = [(q, ROWS, TOKENS, heads), (k, ROWS, heads), (v, ROWS, heads), (bias, ROWS, heads, TOKENS), (key,)]
    arrays, specs = zip(
        *(
            (x, jax.tree.map(lambda leaf, axes=axes: layout(leaf.shape, *axes), x))
            for x, *axes in (*parts, *fields.values())
        ),
        strict=True,
    )

    def on_one(q: Array, k: Any, v: Any, bias: Any, key: Any, *described: Any) -> Array:
        if key is not None:
            for axis in (*ROWS, TOKENS, HEADS):
                key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        here = dataclasses.replace(mask, **dict(zip(fields, described, strict=True)))
        return body(q, k, v, here, bias, key, *rest)

    return jax.shard_map(on_one, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def over_experts(body: Callable, x: Array, routed: Any, kernels: Any) -> Array:
    """body(x, routed, kernels), each device with its own experts and its own part of each.

    Devices along the axis `expert` have rows of a batch as well: they show them to each other (all-gather), and each
    gets its own back with what all have added (reduce-scatter).
    """
    by_rows: Any = layout(x.shape, ROWS, TOKENS)
    if by_rows is None:
        return body(x, routed, kernels)
    ways = {"up": (EXPERTS, HEADS), "gate": (EXPERTS, HEADS), "down": (EXPERTS, None, HEADS)}
    kinds: Any = {name: {"kernel": layout(part["kernel"].shape, *ways[name])} for name, part in kernels.items()}
    specs, split = (by_rows, jax.tree.map(lambda _: by_rows, routed), kinds), kinds["down"]["kernel"]
    apart, shared = _axes(*split), EXPERTS in _axes(by_rows[0])

    def on_one(x: Array, routed: Any, kernels: Any) -> Array:
        if EXPERTS in apart and shared:
            x, routed = jax.lax.all_gather((x, routed), EXPERTS, axis=0, tiled=True)
        if EXPERTS in apart:
            first = jax.lax.axis_index(EXPERTS) * len(kernels["down"]["kernel"])
            routed = routed._replace(expert=routed.expert - first)
        y = body(x, routed, kernels)
        y = jax.lax.psum(y, HEADS) if HEADS in apart else y
        if EXPERTS in apart and shared:
            return jax.lax.psum_scatter(y, EXPERTS, scatter_dimension=0, tiled=True)
        return jax.lax.psum(y, EXPERTS) if EXPERTS in apart else y

    return jax.shard_map(on_one, in_specs=specs, out_specs=by_rows, check_vma=False)(x, routed, kernels)


def _axes(*parts: str | tuple[str, ...] | None) -> set[str]:
    """The axes of a mesh in parts of a PartitionSpec."""
    return {axis for part in parts for axis in ((part,) if isinstance(part, str) else part or ())}


def layout(shape: tuple[int, ...], *names: str | tuple[str, ...] | None) -> PartitionSpec | None:
    """Each dimension split by its axes of the mesh, those that do not divide it left out; None: there is no mesh."""
    sizes = axes()
    if not sizes:
        return None

    def fitting(size: int, name: str | tuple[str, ...] | None) -> tuple[str, ...]:
        axes, n = [], 1
        for axis in (name,) if isinstance(name, str) else name or ():
            if axis in sizes and size % (n * sizes[axis]) == 0:
                axes, n = [*axes, axis], n * sizes[axis]
        return tuple(axes)

    return PartitionSpec(*(fitting(size, name) for size, name in zip(shape, names, strict=False)))
