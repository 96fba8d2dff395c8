"""How one public tensor holds one of our leaves, or several. Kernels here are (out, in), as in most public files."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """A public tensor ↔ our leaves. `H` is the width of a head."""

    unpack: Callable[[np.ndarray, Sequence[Shape], int], Sequence[np.ndarray]]  # (tensor, shapes of leaves, H)
    pack: Callable[[Sequence[np.ndarray], int], np.ndarray]
    shape: Callable[[Sequence[Shape]], Shape]  # of the tensor


def _rows(shapes: Sequence[Shape]) -> Shape:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _split(tensor: np.ndarray, shapes: Sequence[Shape], H: int) -> Sequence[np.ndarray]:
    return np.split(tensor, np.cumsum([shape[0] for shape in shapes])[:-1])


def _per_head(tensor: np.ndarray, shapes: Sequence[Shape], H: int) -> Sequence[np.ndarray]:
    heads = tensor.reshape(-1, len(shapes), H, *tensor.shape[1:])
    return [heads[:, i].reshape(shape) for i, shape in enumerate(shapes)]


def _of_heads(leaves: Sequence[np.ndarray], H: int) -> np.ndarray:
    heads = np.stack([leaf.reshape(-1, H, *leaf.shape[1:]) for leaf in leaves], axis=1)
    return heads.reshape(-1, *leaves[0].shape[1:])


LAYOUTS = {
    # One after the other.
    "rows": Layout(_split, lambda leaves, H: np.concatenate(leaves), _rows),
    # The same, with kernels (in, out): GPT-2.
    "transposed": Layout(
        lambda tensor, shapes, H: _split(tensor.T, shapes, H),
        lambda leaves, H: np.concatenate(leaves).T,
        lambda shapes: _rows(shapes)[::-1],
    ),
    # The first head of each leaf, then the second of each, …: GPT-NeoX.
    "heads": Layout(_per_head, _of_heads, _rows),
    # Rows of each head in the order of adjacent pairs, where ours is all first halves and then all second: llama.cpp.
    "pairs": Layout(
        lambda tensor, shapes, H: [
            tensor.reshape(-1, H // 2, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        ],
        lambda leaves, H: (
            leaves[0].reshape(-1, 2, H // 2, *leaves[0].shape[1:]).swapaxes(1, 2).reshape(leaves[0].shape)
        ),
        _rows,
    ),
    # 1 + ours: llama.cpp's norms of Gemma.
    "one_more": Layout(lambda tensor, shapes, H: [tensor - 1], lambda leaves, H: leaves[0] + 1, _rows),
    # With a batch of one before it: BART's bias of the logits.
    "row": Layout(lambda tensor, shapes, H: [tensor[0]], lambda leaves, H: leaves[0][None], lambda s: (1, *s[0])),
}
