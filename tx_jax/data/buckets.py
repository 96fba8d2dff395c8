"""Pairs of ids to batches of like lengths, each with room for the same number of tokens.

Pairs of like length share a bucket, and a bucket has one shape, so that little is padding and few programs are
compiled. As in data.batches, what comes when is a function of the seed and the step alone.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Integer

from tx_jax.data.batches import PairBatch

if TYPE_CHECKING:
    import grain

Rows = Sequence[Integer[np.ndarray, " _"]]
LEAST = 8  # tokens of the narrowest bucket


class Bucket(NamedTuple):
    """Pairs of like length, and the shape of their batches."""

    members: np.ndarray  # indices of pairs
    n_rows: int  # pairs in a batch (B)
    source_len: int  # tokens (S)
    target_len: int  # tokens (T)


def make_buckets(sources: Rows, targets: Rows, *, seq_len: int, batch_size: int) -> list[Bucket]:
    """The buckets of pairs, the shortest first; a batch of each has batch_size × seq_len tokens a side at most.

    One with less than a batch of pairs joins the next longer one.

    Args:
        sources, targets: ids, with whatever begins or ends them; none longer than seq_len.
        batch_size: the number of rows is a multiple of it, so that devices which share batch_size rows share these.

    >>> ids = [np.zeros(n, int) for n in (3, 20, 5, 8)]
    >>> [(bucket.members.tolist(), *bucket[1:]) for bucket in make_buckets(ids, ids, seq_len=20, batch_size=1)]
    [([0, 2, 3], 2, 8, 8), ([1], 1, 20, 20)]
    """
    lengths = np.array([[len(source), len(target)] for source, target in zip(sources, targets, strict=True)])
    longest, found, waiting = lengths.max(axis=1), [], np.zeros(0, int)
    widths = _widths(seq_len)
    for low, width in zip([0, *widths], widths, strict=False):
        waiting = np.concatenate([waiting, np.flatnonzero((longest > low) & (longest <= width))])
        n_rows = seq_len // width * batch_size
        if len(waiting) and (len(waiting) >= n_rows or width == widths[-1]):
            shape = (next(w for w in widths if w >= length) for length in lengths[waiting].max(axis=0))
            found.append(Bucket(waiting, n_rows, *shape))
            waiting = np.zeros(0, int)
    return found


def _widths(seq_len: int) -> list[int]:
    """8, 12, 16, 24, 32, … below seq_len, and seq_len itself."""
    steps = sorted(start << i for start in (LEAST, LEAST * 3 // 2) for i in range(seq_len.bit_length()))
    return [*(width for width in steps if width < seq_len), seq_len]


def collate(bucket: Bucket, members: np.ndarray, sources: Rows, targets: Rows, start_id: int) -> PairBatch:
    """The batch of these pairs, up to bucket.n_rows of them; rows that are left have neither tokens nor weight."""
    source, source_positions = _padded([sources[i] for i in members], bucket.n_rows, bucket.source_len)
    gold, positions = _padded([targets[i] for i in members], bucket.n_rows, bucket.target_len)
    tokens = np.concatenate([np.full((bucket.n_rows, 1), start_id, np.int32), gold[:, :-1]], axis=1)
    weights = (positions >= 0).astype(np.float32)
    return PairBatch(source, tokens, gold, weights, source_positions, positions)


def _padded(rows: Rows, n_rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids (n_rows, width), 0 on padding, and their positions, −1 on padding."""
    ids = np.zeros((n_rows, width), np.int32)
    lengths = np.zeros(n_rows, int)
    for i, row in enumerate(rows):
        ids[i, : len(row)], lengths[i] = row, len(row)
    index = np.arange(width, dtype=np.int32)
    return ids, np.where(index < lengths[:, None], index, -1).astype(np.int32)


def train_pair_batches(
    sources: Rows, targets: Rows, *, seq_len: int, batch_size: int, start_id: int, seed: int
) -> "grain.IterDataset":
    """Endless batches: each pair once an epoch, in an order that the seed and the epoch give. Resumes exactly.

    The last batch of a bucket in an epoch may have few pairs; the rest of its rows is padding.

    Args: as `make_buckets`; start_id is what the decoder reads first.
    """
    import grain  # here, because `import tx_jax` should be quick

    buckets = make_buckets(sources, targets, seq_len=seq_len, batch_size=batch_size)
    n_batches = sum(-(-len(bucket.members) // bucket.n_rows) for bucket in buckets)

    @functools.lru_cache(maxsize=1)
    def epoch(number: int) -> list[tuple[Bucket, np.ndarray]]:
        rng = np.random.default_rng([seed, number])
        batches = [batch for bucket in buckets for batch in _cut(bucket, rng.permutation(bucket.members))]
        return [batches[i] for i in rng.permutation(n_batches)]

    def batch(index: int) -> PairBatch:
        return collate(*epoch(index // n_batches)[index % n_batches], sources, targets, start_id)

    in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return grain.MapDataset.range(2**31 - 1).map(batch).to_iter_dataset(in_this_thread)


def valid_pair_batches(
    sources: Rows, targets: Rows, *, seq_len: int, batch_size: int, start_id: int
) -> list[PairBatch]:
    """Batches in which every pair is once, in the order of the buckets."""
    buckets = make_buckets(sources, targets, seq_len=seq_len, batch_size=batch_size)
    batches = (batch for bucket in buckets for batch in _cut(bucket, bucket.members))
    return [collate(bucket, members, sources, targets, start_id) for bucket, members in batches]


def _cut(bucket: Bucket, members: np.ndarray) -> list[tuple[Bucket, np.ndarray]]:
    return [(bucket, members[i : i + bucket.n_rows]) for i in range(0, len(members), bucket.n_rows)]
