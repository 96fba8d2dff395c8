"""Layers as one: their parameters stacked, so that a scan goes over them and compiling takes no longer with more.

Any tree in which the layers of a model are beside each other will do: parameters, their gradient, an optimiser's state.
A layer of more than one kind (`window_pattern`) is stacked with its own kind; what is over stays as it is.
"""

from typing import Any

import jax
import jax.numpy as jnp

LAYER, SCANNED = "blocks_", "scanned"


def stack_layers(tree: Any, period: int = 1) -> Any:
    """The tree with one layer in which each leaf of n layers has a first axis of n.

    Args:
        period: layers of a kind are so far apart: the length of a window_pattern.

    >>> stack_layers({"blocks_0": {"scale": jnp.zeros(3)}, "blocks_1": {"scale": jnp.ones(3)}})["scanned"]["0"]["scale"]
    Array([[0., 0., 0.],
           [1., 1., 1.]], dtype=float32)
    """

    def stack(node: Any) -> Any:
        if not _has(node, f"{LAYER}0"):
            return node
        names = [f"{LAYER}{i}" for i in range(sum(name.startswith(LAYER) for name in node))]
        names = names[: len(names) // period * period]
        kinds = ([node[name] for name in names[i::period]] for i in range(period))
        scanned = {str(i): jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) for i, layers in enumerate(kinds)}
        return {name: part for name, part in node.items() if name not in names} | {SCANNED: scanned}

    return jax.tree.map(stack, tree, is_leaf=lambda node: _has(node, f"{LAYER}0"))


def unstack_layers(tree: Any) -> Any:
    """The tree that `stack_layers` stacked, bit for bit; any other as it is.

    >>> unstack_layers({"scanned": {"0": {"scale": jnp.zeros((2, 3))}}}).keys()
    dict_keys(['blocks_0', 'blocks_1'])
    """

    def unstack(node: Any) -> Any:
        if not _has(node, SCANNED):
            return node
        kinds = list(node[SCANNED].values())
        n = len(jax.tree.leaves(kinds[0])[0]) * len(kinds)
        layers = {
            f"{LAYER}{i}": jax.tree.map(lambda leaf, i=i: leaf[i // len(kinds)], kinds[i % len(kinds)])
            for i in range(n)
        }
        return layers | {name: part for name, part in node.items() if name != SCANNED}

    return jax.tree.map(unstack, tree, is_leaf=lambda node: _has(node, SCANNED))


def _has(node: Any, name: str) -> bool:
    return isinstance(node, dict) and name in node
