"""LoRA: a matrix W learns as W + α/r · B A, with B and A of rank r, and all else stays as it is (Hu et al. 2021, §4.1).

A pure transformation of the parameter tree, which no module knows of: adapters are a smaller tree beside it, and a
model runs on what `merge_lora` makes of both.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from tx_jax.errors import InputError, require
from tx_jax.ops.int8 import Int8
from tx_jax.run_config import LoraConfig

TARGETS = LoraConfig().targets


_NO_INT8 = "a matrix in 8 bits takes no adapter; train with floats and merge_lora first, then quantize"


class Adapter(NamedTuple):
    """What is added to one kernel, which is (out, in)."""

    a: Float[Array, "rank inner"]
    b: Float[Array, "outer rank"]


def init_lora(params: PyTree, key: PRNGKeyArray, rank: int, targets: str = TARGETS) -> dict:
    """Adapters of all matrices whose path matches `targets`, in a tree like that of `params`; they add zero at first.

    Args:
        params: a parameter tree, or its shapes from `jax.eval_shape`.
        rank: of each added matrix (r).
        targets: a regular expression, searched for in paths such as stack/blocks_0/attention/q/kernel.

    >>> init_lora({"q": {"kernel": jnp.ones((3, 5))}}, jax.random.key(0), rank=2, targets="q")["q"]["kernel"].b.shape
    (3, 2)

    Raises:
        InputError: rank is below 1, targets is no regular expression or matches nothing, or what it matches is no
            matrix or has no room for the rank; or params are in 8 bits.
    Source: Hu et al. 2021, §4.1.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Int8))
    require(not any(isinstance(leaf, Int8) for _, leaf in leaves), _NO_INT8)
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
    require(rank >= 1, f"rank={rank} must be at least 1; 8 is usual")
    tree: dict = {}
    for i, name in enumerate(_matches(targets, list(shapes))):
        shape = shapes[name]
        require(len(shape) == 2, f"targets={targets!r} matches {name}, which is {list(shape)}, no matrix; narrow it")
        rule = f"rank={rank} exceeds what {name} of {list(shape)} has; use at most {min(shape)}, or narrow the targets"
        require(rank <= min(shape), rule)
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = _init_adapter(jax.random.fold_in(key, i), rank, *shape)
    return tree


def as_adapters(tree: Any) -> Any:
    """Adapters from the dictionaries of their fields: what a file holds of them.

    >>> as_adapters({"q": {"kernel": {"a": 1, "b": 2}}})
    {'q': {'kernel': Adapter(a=1, b=2)}}

    Raises:
        InputError: the tree holds something else.
    """
    require(isinstance(tree, dict), "these parameters are no adapters; use the configuration they were saved with")
    return Adapter(**tree) if set(tree) == {"a", "b"} else {name: as_adapters(part) for name, part in tree.items()}


def _matches(targets: str, names: list[str]) -> list[str]:
    try:
        found = [name for name in names if re.search(targets, name)]
    except re.error as error:
        rule = f"targets={targets!r} is not a regular expression ({error})"
        raise InputError(f"{rule}; the default is {TARGETS}") from error
    kernels = [name for name in names if name.endswith("kernel")] or names
    require(found, f"targets={targets!r} matches no parameter; there are {', '.join(kernels[:8])}, …")
    return found


def _init_adapter(key: PRNGKeyArray, rank: int, outer: int, inner: int) -> Adapter:
    bound = 1 / math.sqrt(inner)  # github.com/microsoft/LoRA, loralib/layers.py: Kaiming's with a = √5
    return Adapter(jax.random.uniform(key, (rank, inner), minval=-bound, maxval=bound), jnp.zeros((outer, rank)))


def merge_lora(params: PyTree, lora: PyTree, alpha: float) -> Any:
    """The parameter tree with W + alpha / rank · B A in place of each adapted W, in W's dtype; the rest is shared.

    >>> adapter = Adapter(a=jnp.ones((1, 2)), b=jnp.full((2, 1), 3.0))
    >>> merge_lora({"kernel": jnp.eye(2)}, {"kernel": adapter}, alpha=2.0)["kernel"].tolist()
    [[7.0, 6.0], [6.0, 7.0]]

    Raises:
        InputError: the adapters are not of this tree, or what they adapt is in 8 bits.
    Source: Hu et al. 2021, §4.1.
    """
    if isinstance(lora, Adapter):
        return _add(params, lora, alpha)
    absent = [name for name in lora if name not in params]
    require(not absent, f"adapters of {', '.join(absent[:3])} have no such parameters; they are of another model")
    return params | {name: merge_lora(params[name], part, alpha) for name, part in lora.items()}


def _add(kernel: Array | Int8, adapter: Adapter, alpha: float) -> Array:
    a, b = adapter
    require(not isinstance(kernel, Int8), _NO_INT8)
    shape = (b.shape[0], a.shape[1])
    require(kernel.shape == shape, f"an adapter of {list(shape)} does not fit {list(kernel.shape)}; use its own model")
    product = jnp.einsum("OR,RI->OI", b, a, precision="highest")  # an exported model is what was trained
    floats: Any = kernel
    return (floats.astype(jnp.float32) + alpha / a.shape[0] * product).astype(floats.dtype)
