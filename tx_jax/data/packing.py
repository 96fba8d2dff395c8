"""Documents to batches: several in a row, each with positions of its own and a segment that sees no other.

Training reads documents in an order that the seed gives, a block of them at a time, and packs those of a block best:
what comes when is a function of the seed and the step alone. Of a batch a process reads the tokens of its own rows;
which documents the others read it knows, too, so that the batches do not depend on how many processes there are.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from tx_jax.data.batches import Batch
from tx_jax.data.token_files import TokenFiles
from tx_jax.errors import require

if TYPE_CHECKING:
    import grain

BLOCK = 4096  # pieces that are packed together
Row = Sequence[tuple[int, int]]  # (source, piece) of each piece in a row


class Pieces(NamedTuple):
    """Documents, cut where they are longer than a row: a piece has up to seq_len tokens, and the target of its last."""

    files: TokenFiles
    seq_len: int
    first: Int64[np.ndarray, " documents"]  # the number of each document's first piece
    lengths: Int64[np.ndarray, " documents"]  # tokens of each, the last of which is only a target
    shards: Int64[np.ndarray, " shards"]  # the number of each shard's first document

    @property
    def n(self) -> int:
        """Pieces."""
        return int(self.first[-1] + _n_pieces(self.lengths[-1:], self.seq_len)[0])

    def of_documents(self, n: int) -> int:
        """Pieces of the first n documents."""
        return int(self.first[n]) if n < len(self.first) else self.n

    def place(self, piece: Any) -> tuple[Any, Any, Any]:
        """The document of a piece, where it begins there, and how many tokens it has besides its last target."""
        document = np.searchsorted(self.first, piece, "right") - 1
        start = (piece - self.first[document]) * self.seq_len
        return document, start, np.minimum(self.seq_len, self.lengths[document] - 1 - start)

    def read(self, piece: int) -> np.ndarray:
        """Its ids, with the target of the last."""
        document, start, n = (int(x) for x in self.place(piece))
        shard = int(np.searchsorted(self.shards, document, "right")) - 1
        within = document - int(self.shards[shard])
        start += int(self.files.ends[shard][within - 1, 0]) if within else 0
        return self.files.tokens[shard][start : start + n + 1]


def _n_pieces(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    return -(-np.maximum(lengths - 1, 0) // seq_len)


def cut(files: TokenFiles, seq_len: int) -> Pieces:
    """The pieces of all documents. One of a single token has none: it has nothing to predict."""
    require(seq_len >= 1, f"seq_len={seq_len} must be at least 1 token")
    lengths = files.lengths[:, 0]
    first = np.cumsum(_n_pieces(lengths, seq_len)) - _n_pieces(lengths, seq_len)
    shards = np.cumsum([0, *(len(ends) for ends in files.ends[:-1])])
    pieces = Pieces(files, seq_len, first, lengths, shards)
    require(pieces.n > 0, f"{files.directory} holds no document of two tokens; there is nothing to predict")
    return pieces


def split_documents(files: TokenFiles, valid_fraction: float) -> int:
    """How many documents are trained on; the last, so many that they have valid_fraction of the tokens, are held out.

    Raises:
        InputError: there are fewer than two documents.
    """
    ends = files.lengths[:, 0].cumsum()
    rule = f"{files.directory} holds {len(ends)} document, which cannot be both trained on and held out"
    require(len(ends) > 1, f"{rule}; prepare it with --separator")
    return int(np.clip(np.searchsorted(ends, (1 - valid_fraction) * ends[-1]), 1, len(ends) - 1))


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of lengths, in rows whose sum is at most `room`: best fit, the longest first (Johnson 1974).

    >>> pack([3, 8, 5, 2], room=8)
    [[1], [2, 0], [3]]
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # rows, by the tokens that they have left
    some = 0  # bit i: there are rows with i tokens left
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        n = lengths[i]
        enough = some >> n
        left = n + (enough & -enough).bit_length() - 1 if enough else room
        row = with_room[left].pop() if enough else len(rows)
        if not enough:
            rows.append([])
        elif not with_room[left]:
            some &= ~(1 << left)
        rows[row].append(i)
        with_room[left - n].append(row)
        some |= 1 << (left - n)
    return rows


def packed(sources: Sequence[Pieces], chosen: Sequence[Sequence[int]]) -> list[Row]:
    """The chosen pieces of each source, together in rows."""
    pieces = [(s, piece) for s, part in enumerate(chosen) for piece in part]
    lengths = [source.place(np.array(part, int))[2] for source, part in zip(sources, chosen, strict=True)]
    return [[pieces[i] for i in row] for row in pack(np.concatenate(lengths).tolist(), sources[0].seq_len)]


def packed_batches(
    sources: Sequence[tuple[Pieces, int, float]],
    *,
    batch_size: int,
    seed: int,
    own: Bool[np.ndarray, " B"] | None = None,
) -> "grain.IterDataset":
    """Endless batches of packed documents, each once an epoch of its source. Resumes exactly, as `train_batches`.

    Args:
        sources: (pieces, how many of them, share of all tokens) of each corpus, for rows of one length; the shares need
            not sum to 1.
        own: rows whose tokens are read; the others keep zeros. None: all.
    """
    import grain  # here, because `import tx_jax` should be quick
    from grain import experimental

    of = [pieces for pieces, _, _ in sources]
    mean_lengths = [np.maximum(pieces.lengths - 1, 0).sum() / pieces.n for pieces in of]
    shares = np.array([share / mean for (_, _, share), mean in zip(sources, mean_lengths, strict=True)])
    shares /= shares.sum()  # of the pieces

    @functools.cache
    def order(source: int, epoch: int) -> int:
        return int(np.random.SeedSequence([seed, source, epoch]).generate_state(1)[0])

    def chosen(block: int, s: int) -> list[int]:
        """The pieces of a source in a block: its share, in that source's own order."""
        ends, n = (int((block + i) * BLOCK * shares[s]) for i in (0, 1)), sources[s][1]
        return [experimental.index_shuffle(j % n, n - 1, order(s, j // n), 4) for j in range(*ends)]

    def rows(block: int) -> list[Row]:
        found = packed(of, [chosen(block, s) for s in range(len(sources))])
        return [found[i] for i in np.random.default_rng([seed, block]).permutation(len(found))]

    class Rows(experimental.FlatMapTransform):
        max_fan_out = BLOCK

        def flat_map(self, element: list[Row]) -> list[Row]:
            return element

    in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    blocks = grain.MapDataset.range(2**31 - 1).map(rows).to_iter_dataset(in_this_thread)
    batches = experimental.FlatMapIterDataset(blocks, Rows()).batch(batch_size, batch_fn=list)
    return batches.map(lambda rows: collate(of, rows, own))


def held_out_batches(
    sources: Sequence[tuple[Pieces, int]], *, batch_size: int, own: Bool[np.ndarray, " B"] | None = None
) -> "grain.MapDataset":
    """Every piece from a number on, of each source, once; read as it is asked for. The last rows may be empty."""
    import grain

    of = [part for part, _ in sources]
    rows = packed(of, [range(first, part.n) for part, first in sources])
    rows += [[]] * (-len(rows) % batch_size)
    groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return grain.MapDataset.source(groups).map(lambda rows: collate(of, rows, own))


def collate(sources: Sequence[Pieces], rows: Sequence[Row], own: Bool[np.ndarray, " B"] | None = None) -> Batch:
    """The batch of these rows. Padding has position −1, no weight, and a segment of its own."""
    shape = len(rows), sources[0].seq_len
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions, segments = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    for b, row in enumerate(rows):
        at = 0
        for number, (s, piece) in enumerate(row):
            n = int(sources[s].place(piece)[2])
            here = slice(at, at + n)
            positions[b, here], segments[b, here] = np.arange(n), number
            if own is None or own[b]:
                ids = sources[s].read(piece)
                tokens[b, here], targets[b, here] = ids[:-1], ids[1:]
            at += n
        segments[b, at:] = len(row)
    return Batch(tokens, targets, (positions >= 0).astype(np.float32), positions, segments)
