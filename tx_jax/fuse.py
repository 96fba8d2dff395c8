"""Matrices that read the same vectors as one: fewer and longer products for each token that is written."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tx_jax.errors import require

GROUPS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}  # the name of what is one, and of its parts in order
APART = ("cross_attention", "experts")  # whose queries and keys read different vectors; whose kernels are (E, out, in)


def fuse(params: PyTree) -> Any:
    """The parameter tree with q, k, v of each self-attention in one matrix, and gate, up of each feed-forward in one.

    The model is the same: a block takes what it finds in the tree. It decodes by a tenth faster on a CPU
    (benchmarks/RESULTS.md). For decoding, before or after `quantize`: training and export know the parts. While it
    works, both trees are held. On a mesh, q, k and v do not end where shards do, so that devices exchange them.

    >>> part = {"kernel": jnp.ones((2, 3))}
    >>> fuse({"mlp": {"gate": part, "up": part}})["mlp"]["gate_up"]["kernel"].shape
    (4, 3)

    Raises:
        InputError: there are no such matrices.
    """
    fused = _fuse(params)
    found = jax.tree.structure(fused) != jax.tree.structure(params)
    rule = "params holds no q, k, v or gate, up to be one matrix"
    require(found, f"{rule}; give a model's parameters, that are not fused already")
    return fused


def _fuse(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    node = {name: part if name in APART else _fuse(part) for name, part in node.items()}
    for name, parts in GROUPS.items():
        if node.keys() >= set(parts):
            node[name] = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(node.pop(part) for part in parts))
    return node
