"""Token ids to batches: shuffled crops without end for training, every token once for validation.

Both are made from one array of ids and are the same on every machine; the training order is a function of the seed
and the step alone, so that a run resumes at the very batch where it stopped.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Integer

from tx_jax.errors import require

if TYPE_CHECKING:
    import grain

Ids = Integer[np.ndarray, " _"]
Windows = Integer[np.ndarray, "B _"]  # rows of T + 1 consecutive ids


class Batch(NamedTuple):
    """What a training or evaluation step reads.

    >>> batch = Batch(tokens=np.array([[5, 6, 7]]), targets=np.array([[6, 7, 2]]), weights=np.ones((1, 3)))
    >>> batch.n_tokens
    3
    """

    tokens: Int[Array | np.ndarray, "B T"]
    targets: Int[Array | np.ndarray, "B T"]  # the gold next id of each token
    weights: Float[Array | np.ndarray, "B T"]  # of each target in the loss; 0: not counted
    positions: Int[Array | np.ndarray, "B T"] | None = None  # None: 0, 1, 2, …, which leaves attention its causal form
    segments: Int[Array | np.ndarray, "B T"] | None = None  # None: one document a row
    prefix: Int[Array | np.ndarray, " B"] | None = None  # tokens a row that all see (prefix-LM); None: none

    @property
    def inputs(self) -> dict[str, Array | np.ndarray | None]:
        """The keyword arguments of a model's call."""
        prefix = {} if self.prefix is None else {"prefix": self.prefix}  # of a DecoderLM alone
        return {"tokens": self.tokens, "positions": self.positions, "segments": self.segments} | prefix

    @property
    def n_tokens(self) -> int:
        """Tokens that are read, padding apart."""
        return _n_real(self.tokens, self.positions)


class PairBatch(NamedTuple):
    """What a step of an EncoderDecoder reads: a source, and the target that it is to give.

    >>> source, tokens, targets = np.array([[5, 6, 2]]), np.array([[1, 7]]), np.array([[7, 2]])
    >>> PairBatch(source, tokens, targets, weights=np.ones((1, 2))).n_source_tokens
    3
    """

    source: Int[Array | np.ndarray, "B S"]
    tokens: Int[Array | np.ndarray, "B T"]  # what the decoder reads: a start, then all targets but the last
    targets: Int[Array | np.ndarray, "B T"]  # the gold next id of each token
    weights: Float[Array | np.ndarray, "B T"]  # of each target in the loss; 0: not counted
    source_positions: Int[Array | np.ndarray, "B S"] | None = None  # −1 on padding; None: there is none
    positions: Int[Array | np.ndarray, "B T"] | None = None  # −1 on padding; None: 0, 1, 2, …

    @property
    def inputs(self) -> dict[str, Array | np.ndarray | None]:
        """The keyword arguments of a model's call."""
        names = ("source", "tokens", "source_positions", "positions")
        return {name: getattr(self, name) for name in names}

    @property
    def n_tokens(self) -> int:
        """Target tokens, padding apart."""
        return _n_real(self.tokens, self.positions)

    @property
    def n_source_tokens(self) -> int:
        """Source tokens, padding apart."""
        return _n_real(self.source, self.source_positions)


def _n_real(tokens: Array | np.ndarray, positions: Array | np.ndarray | None) -> int:
    return tokens.size if positions is None else int((np.asarray(positions) >= 0).sum())


def split(ids: Ids, valid_fraction: float) -> tuple[Ids, Ids]:
    """The ids to train on, and the last part of them, held out. Source: nanoGPT, data/shakespeare_char/prepare.py.

    >>> [part.tolist() for part in split(np.arange(5), 0.4)]
    [[0, 1, 2], [3, 4]]

    Raises:
        InputError: valid_fraction is not between 0 and 1.
    """
    require(0 < valid_fraction < 1, f"valid_fraction={valid_fraction} must be between 0 and 1; 0.1 holds out a tenth")
    n_train = int((1 - valid_fraction) * len(ids))
    return ids[:n_train], ids[n_train:]


def _check(name: str, ids: Ids, seq_len: int, batch_size: int) -> None:
    require(seq_len >= 1, f"seq_len={seq_len} must be at least 1 token")
    require(batch_size >= 1, f"batch_size={batch_size} must be at least 1 sequence")
    rule = f"the {name} split has {len(ids)} tokens, but seq_len={seq_len} needs {seq_len + 1}"
    remedy = "use a shorter --data.seq-len, more text, or another --data.valid-fraction"
    require(len(ids) > seq_len, f"{rule}; {remedy}")


def next_token(windows: Windows, rng: np.random.Generator | None = None) -> Batch:
    """Each token's target is the next. Nothing is drawn.

    >>> next_token(np.array([[5, 6, 7]])).targets.tolist()
    [[6, 7]]
    """
    tokens, targets = windows[:, :-1].astype(np.int32), windows[:, 1:].astype(np.int32)
    return Batch(tokens, targets, np.ones(tokens.shape, np.float32))


Objective = Callable[[Windows, np.random.Generator], Batch | PairBatch]  # a row of data.objectives


def train_batches(
    ids: Ids, *, seq_len: int, batch_size: int, seed: int, objective: Objective = next_token
) -> "grain.IterDataset":
    """Endless batches of crops of the ids: each start once an epoch, in an order that the seed and the epoch give.

    Its iterator resumes exactly: `iterator.set_state(state)` with a `state` (JSON) from `iterator.get_state()`.
    A batch is made when asked for, in 0.2 ms (B 12, T 64) or 0.9 ms (B 64, T 256) of CPU time. There are no threads:
    Grain's default sixteen take 1.5 to 3 times that, of cores that XLA needs (2 cores, Grain 0.2.18, a million ids).

    Args:
        ids: the training split; any integer type, also a memory map.
        seq_len: tokens of a crop (T).
        batch_size: crops in a batch (B).
        seed: of the order, and of what the objective draws, 0 to 2³² − 1.
        objective: makes a batch of (batch_size, seq_len + 1) consecutive ids.

    >>> batch = next(iter(train_batches(np.arange(9), seq_len=3, batch_size=2, seed=0)))
    >>> batch.tokens.shape, bool((batch.targets == batch.tokens + 1).all())
    ((2, 3), True)

    Raises:
        InputError: there are fewer than seq_len + 1 ids, or a number is out of its range.
    """
    import grain  # here, because a Batch needs none, and `import tx_jax` should be quick

    _check("training", ids, seq_len, batch_size)
    require(0 <= seed < 2**32, f"seed={seed} must be from 0 to 2³² − 1")
    windows = np.lib.stride_tricks.sliding_window_view(ids, seq_len + 1)

    starts = grain.MapDataset.range(len(windows)).shuffle(seed).repeat()
    in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    crops = starts.batch(batch_size, batch_fn=lambda starts: windows[np.asarray(starts)])
    return crops.random_map(objective, seed=seed).to_iter_dataset(in_this_thread)


def valid_batches(ids: Ids, *, seq_len: int, batch_size: int) -> list[Batch]:
    """Batches in which every id but the first is a target exactly once, in consecutive windows of seq_len tokens.

    All have the shape (batch_size, seq_len), so that one compiled step reads them. The end is filled with tokens 0 of
    weight 0: to the right, where no causal model looks, and not counted in the loss.

    >>> (batch,) = valid_batches(np.arange(6), seq_len=3, batch_size=2)
    >>> batch.targets.tolist(), batch.weights.tolist()
    ([[1, 2, 3], [4, 5, 0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])

    Raises:
        InputError: there are fewer than seq_len + 1 ids, or a number is out of its range.
    """
    _check("validation", ids, seq_len, batch_size)
    n_targets = len(ids) - 1
    n_batches = -(-n_targets // (batch_size * seq_len))

    def filled(values: np.ndarray, dtype: type) -> np.ndarray:
        out = np.zeros(n_batches * batch_size * seq_len, dtype)
        out[:n_targets] = values
        return out.reshape(n_batches, batch_size, seq_len)

    parts = filled(ids[:-1], np.int32), filled(ids[1:], np.int32), filled(np.ones(n_targets), np.float32)
    return [Batch(*part) for part in zip(*parts, strict=True)]


def valid_windows(
    ids: Ids, objective: Objective, *, seq_len: int, batch_size: int, seed: int = 0
) -> list[Batch | PairBatch]:
    """Batches of an objective, in consecutive windows of seq_len tokens; what does not fill a window is left out.

    All have batch_size rows, so that one compiled step reads them; those that are left at the end have no weight.

    Raises:
        InputError: there are fewer than seq_len + 1 ids, or a number is out of its range.
    """
    _check("validation", ids, seq_len, batch_size)
    windows, found = np.lib.stride_tricks.sliding_window_view(ids, seq_len + 1)[::seq_len], []
    for start in range(0, len(windows), batch_size):
        index = start + np.arange(batch_size)
        batch = objective(windows[np.minimum(index, len(windows) - 1)], np.random.default_rng([seed, start]))
        found.append(batch._replace(weights=batch.weights * (index < len(windows))[:, None].astype(np.float32)))
    return found
