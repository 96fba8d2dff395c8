"""A stream of public tensors ↔ our parameter tree, by a table of names.

A row of a table is `source: targets`. The source is a module's name, whose `weight` and `bias` go to what our module
has, or a whole tensor's. `{i}` counts layers, and `{e}` experts, each a part of our leaf along its first axis. Targets
are a path of ours, `a/b/q+k+v` for several fused into one tensor, and behind a space the key of LAYOUTS, if it is not
`rows`. A row does not ask for what our model does not have.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from tx_jax.config import ModelConfig
from tx_jax.convert.files import Tensors
from tx_jax.convert.layouts import LAYOUTS, Layout, Shape
from tx_jax.errors import require
from tx_jax.models import build, init_params

Table = dict[str, str]
PARTS = {"weight": ("kernel", "scale", "offset"), "bias": ("bias",)}  # of a module: public name, ours
Put = Callable[[str, np.ndarray], Any]


class Entry(NamedTuple):
    """One public tensor and the leaves it stands for."""

    paths: tuple[str, ...]
    shapes: tuple[Shape, ...]  # of the leaves, or of one expert's part of them
    layout: Layout
    expert: int | None = None  # whose part of the leaves this is; None: the tensor is all of them

    @property
    def shape(self) -> Shape:
        """Of the public tensor."""
        return self.layout.shape(self.shapes)


def leaf_shapes(cfg: ModelConfig) -> dict[str, Shape]:
    """The shape of each leaf of the model, by path; nothing is allocated.

    All blocks of a stack have the shapes of its first, and tracing one block is quicker than tracing thirty.
    """
    both = cfg.stack == "encoder_decoder"
    first = dataclasses.replace(cfg, n_layers=1, n_encoder_layers=1 if both else None)
    tree = jax.eval_shape(lambda key: init_params(build(first), key), jax.random.key(0))
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        depth = cfg.n_encoder_layers or cfg.n_layers if name.startswith("encoder/") else cfg.n_layers
        for i in range(depth if "/blocks_0/" in name else 1):
            shapes[name.replace("/blocks_0/", f"/blocks_{i}/")] = leaf.shape
    return shapes


def entries(table: Table, shapes: dict[str, Shape]) -> dict[str, Entry]:
    """The public tensors that together are a model with leaves of these shapes, by name."""
    found = {}
    for source, row in table.items():
        target, _, layout = row.partition(" ")
        for i in range(len(shapes)) if "{i}" in source else [0]:
            rows = list(_rows(source.replace("{i}", str(i)), target.replace("{i}", str(i)), layout or "rows", shapes))
            if not rows and (i or "{i}" not in source):
                break
            found |= dict(rows)
    missed = sorted(set(shapes) - {path for entry in found.values() for path in entry.paths})
    require(not missed, f"this family has no place for {', '.join(missed[:3])}")
    return found


def _rows(source: str, target: str, layout: str, shapes: dict[str, Shape]) -> Iterator[tuple[str, Entry]]:
    before, slash, last = target.rpartition("/")
    modules = [before + slash + one for one in last.split("+")]
    names = [(source, modules)]
    names += [(f"{source}.{part}", [f"{m}/{our}" for m in modules]) for part, ours in PARTS.items() for our in ours]
    for name, paths in names:
        if not all(path in shapes for path in paths):
            continue
        found = tuple(shapes[path] for path in paths)
        if "{e}" not in name:
            yield name, Entry(tuple(paths), found, LAYOUTS[layout])
            continue
        ones = tuple(shape[1:] for shape in found)
        for e in range(found[0][0]):
            yield name.replace("{e}", str(e)), Entry(tuple(paths), ones, LAYOUTS[layout], e)


def match_names(
    found: dict[str, Shape], expected: dict[str, Entry], unused: str, prefix: str, outer: str
) -> dict[str, str]:
    """The names that a file's tensors have in the table, by name in the file: it may leave out the table's prefix, as a
    bare model's does, or have an outer one."""
    names = {}
    for name in found:
        forms = (name, prefix + name, name.removeprefix(outer))
        names[name] = next((form for form in forms if form in expected or re.fullmatch(unused, form)), name)
    return names


def check_names(found: dict[str, Shape], expected: dict[str, Entry], unused: str, where: str) -> None:
    """Hold the tensors of a file to those that the model is made of.

    Args:
        unused: a pattern of names that may be there and are not read.

    Raises:
        InputError: one is missing, left over, or has another shape.
    """
    missing = sorted(set(expected) - set(found))
    extra = sorted(name for name in set(found) - set(expected) if not re.fullmatch(unused, name))
    if missing:
        first = expected[missing[0]]
        rule = f"has no {_few(missing)}; {missing[0]} would be {list(first.shape)}, our {' and '.join(first.paths)}"
        require(False, f"{where} {rule}{f'. It has {_few(extra)}, which are not read' if extra else ''}")
    shape = f" {list(found[extra[0]])}" if extra else ""
    require(not extra, f"{where} has {_few(extra)}{shape}, which this architecture does not have; remove it")
    for name, entry in expected.items():
        says = f"{name} is {list(found[name])} in {where}, and {list(entry.shape)} by its config"
        require(found[name] == entry.shape, f"{says}; they do not belong together")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def unpack(tensors: Tensors, names: dict[str, str], expected: dict[str, Entry], H: int, put: Put, where: str) -> dict:
    """The parameter tree: each tensor is read, taken apart and `put` before the next; those of experts together.

    Args:
        names: those of `expected`, by name in the file.
        put: (path, array) → the leaf.

    Raises:
        InputError: a tensor is not of floating-point numbers.
    """
    tree: dict = {}
    n_parts = collections.Counter(path for entry in expected.values() for path in entry.paths)
    waiting: dict[str, dict[int, np.ndarray]] = collections.defaultdict(dict)  # by path and expert
    for name in (name for name, ours in names.items() if ours in expected):  # position_ids and their kin are integers
        kind = tensors.dtypes[name]
        require("float" in kind, f"{name} in {where} is {kind}; weights are float32, float16, bfloat16 or float64")
    for name, tensor in tensors.read({name for name, ours in names.items() if ours in expected}):
        entry = expected[names[name]]
        for path, leaf in zip(entry.paths, entry.layout.unpack(tensor, entry.shapes, H), strict=True):
            if entry.expert is not None:
                waiting[path][entry.expert] = leaf
                if len(waiting[path]) < n_parts[path]:
                    continue
                parts = waiting.pop(path)
                leaf = np.stack([parts[e] for e in range(len(parts))])
            *parents, last = path.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = put(path, np.ascontiguousarray(leaf))
        del tensor  # before the next one is read
    return tree


def check_leaves(params: dict, shapes: dict[str, Shape]) -> None:
    """Hold a parameter tree to the leaves that a config has; a bias may be absent, and is zeros.

    Raises:
        InputError: one is missing, left over, or has another shape.
    """
    found = {name: np.shape(leaf) for name, leaf in _by_path(params).items()}
    missing = [name for name in shapes if name not in found and not name.endswith("/bias")]
    extra = [name for name in found if name not in shapes]
    require(
        not missing,
        f"params has no {_few(missing)}, which its config has; give those of this config, neither fused nor in 8 bits",
    )
    require(not extra, f"params has {_few(extra)}, which its config has not; give the parameters of this config")
    for name, shape in found.items():
        require(shape == shapes[name], f"{name} is {list(shape)} in params, and {list(shapes[name])} by its config")


def _by_path(params: dict) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def pack(params: dict, expected: dict[str, Entry], H: int) -> Iterator[tuple[str, np.ndarray]]:
    """The public tensors of a parameter tree, one after the other. A bias that the tree does not have is zeros."""
    leaves = _by_path(params)
    dtype = next(iter(leaves.values())).dtype
    for name, entry in expected.items():
        whole = () if entry.expert is None else entry.expert
        parts = [
            np.asarray(leaves[path][whole]) if path in leaves else np.zeros(shape, dtype)
            for path, shape in zip(entry.paths, entry.shapes, strict=True)
        ]
        yield name, np.ascontiguousarray(entry.layout.pack(parts, H))
