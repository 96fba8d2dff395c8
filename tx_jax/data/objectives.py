"""What a model learns from plain text: windows of consecutive ids, (B, T + 1), become batches with inputs and targets.

Each objective is a function of the windows, of a random generator and of the special ids that it needs. The same
generator gives the same batch, and the shapes depend on no draw, so that one compiled step reads all batches.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from tx_jax.data.batches import Batch, PairBatch, Windows, next_token
from tx_jax.errors import require


def _length(windows: Windows, least: int) -> int:
    """T of windows of T + 1 ids, held to at least `least`."""
    T = windows.shape[1] - 1
    require(least <= T, f"windows of {T + 1} ids have T={T}, but T must be at least {least}; raise --data.seq-len")
    return T


def prefix_lm(windows: Windows, rng: np.random.Generator) -> Batch:
    """As `next_token`, but the first p tokens of a row see each other, and targets count only after them.

    p is drawn for each row from 1, …, T − 1. The last token of a prefix has the first target that counts: no query that
    sees a token is asked for it.

    Raises:
        InputError: a window has fewer than 3 ids.
    Source: Raffel et al. 2020, §3.2.1 and §3.2.3.
    """
    T = _length(windows, 2)
    prefix = rng.integers(1, T, size=len(windows), dtype=np.int32)
    weights = np.arange(T) >= prefix[:, None] - 1
    return next_token(windows, rng)._replace(weights=weights.astype(np.float32), prefix=prefix)


def mask_tokens(
    windows: Windows, rng: np.random.Generator, *, mask_id: int, ids_below: int, rate: float = 0.15
) -> Batch:
    """The first T tokens with some to be guessed, which are the targets that count: most of them masked.

    In each row round(rate · T) positions are chosen, at least one. Of these, 80 % become mask_id, 10 % any other id,
    their own included, each as likely, and 10 % stay.

    Args:
        mask_id: what stands for a hidden token.
        ids_below: other ids are from 0 to this, excluded, and never mask_id; special ids are best from here on.
        rate: of tokens chosen.

    >>> batch = mask_tokens(np.arange(21)[None], np.random.default_rng(0), mask_id=99, ids_below=50)
    >>> batch.weights.sum(), (batch.tokens == 99).sum()
    (np.float32(3.0), np.int64(3))

    Raises:
        InputError: a window has fewer than 2 ids, rate is not between 0 and 1, or no other id is left.
    Source: Devlin et al. 2019, §3.1 and A.1.
    """
    T = _length(windows, 1)
    require(0 < rate < 1, f"rate={rate} must be between 0 and 1; BERT's is 0.15")
    n_others = ids_below - (mask_id < ids_below)
    require(n_others >= 1, f"ids_below={ids_below} leaves no id but mask_id={mask_id}; give the vocabulary's size")
    text = windows[:, :-1].astype(np.int32)
    chosen = rng.random(text.shape).argsort(axis=1) < max(round(rate * T), 1)  # so many of a random order
    others = rng.integers(n_others, size=text.shape, dtype=np.int32)
    others += others >= mask_id
    lot = rng.random(text.shape)
    tokens = np.where(chosen & (lot < 0.8), np.int32(mask_id), np.where(chosen & (lot >= 0.9), others, text))
    return Batch(tokens, text, chosen.astype(np.float32))


def span_lengths(T: int, noise_density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """How many of T tokens are hidden, and in how many spans.

    >>> span_lengths(512)
    (77, 26)

    Raises:
        InputError: T is below 2, a number is out of its range, or the spans would touch.
    Source: Raffel et al. 2020, §3.1.4 and §3.3.4.
    """
    require(T >= 2, f"T={T} must be at least 2, a token to hide and one to keep; raise --data.seq-len")
    require(0 < noise_density < 1, f"noise_density={noise_density} must be between 0 and 1; T5's is 0.15")
    require(mean_span >= 1, f"mean_span={mean_span} must be at least 1 token; T5's is 3")
    n_noise = min(max(round(T * noise_density), 1), T - 1)
    n_spans = max(round(n_noise / mean_span), 1)
    rule = f"noise_density={noise_density} keeps {T - n_noise} of {T} tokens, too few between {n_spans} spans"
    require(n_spans <= T - n_noise, f"{rule}; lower it, or raise mean_span={mean_span}")
    return n_noise, n_spans


def pair_lengths(T: int, noise_density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """The lengths of source and targets that `span_corruption` makes of T tokens, the ends included.

    >>> pair_lengths(512)
    (462, 104)

    Raises:
        InputError: as `span_lengths`.
    """
    n_noise, n_spans = span_lengths(T, noise_density, mean_span)
    return T - n_noise + n_spans + 1, n_noise + n_spans + 1


def span_corruption(
    windows: Windows,
    rng: np.random.Generator,
    *,
    sentinels: Sequence[int],
    start_id: int,
    eos_id: int,
    noise_density: float = 0.15,
    mean_span: float = 3.0,
) -> PairBatch:
    """The first T tokens with spans of them hidden, each behind its sentinel, as sources; the spans as targets.

    Text a b c d e f of which b and e f are hidden has the source a ⟨0⟩ c d ⟨1⟩ eos, and the targets ⟨0⟩ b ⟨1⟩ e f eos.
    A row begins with what is kept and ends with what is hidden, so that a single span is its end. All ways to cut a row
    so are as likely.

    Args:
        sentinels: an id for each span of a row, in order; no text has them.
        start_id: what the decoder reads first; T5's is its padding, 0.
        eos_id: what ends source and targets; T5's is 1.
        noise_density: of tokens that are hidden.
        mean_span: tokens of a span, on average.

    Raises:
        InputError: as `span_lengths`, or there are more spans than sentinels.
    Source: Raffel et al. 2020, §3.1.4, with `random_spans_noise_mask` of its code for what is drawn.
    """
    B, T = len(windows), windows.shape[1] - 1
    n_noise, n_spans = span_lengths(T, noise_density, mean_span)
    rule = f"{len(sentinels)} sentinels are fewer than the {n_spans} spans of T={T}"
    require(n_spans <= len(sentinels), f"{rule}; give {n_spans}, or raise mean_span={mean_span}")
    text = windows[:, :-1].astype(np.int32)
    parts = np.stack([_parts(rng, B, T - n_noise, n_spans), _parts(rng, B, n_noise, n_spans)], axis=-1)
    part = np.repeat(np.tile(np.arange(2 * n_spans), B), parts.ravel()).reshape(B, T)  # kept 0, hidden 0, kept 1, …
    begins = np.diff(part, axis=1, prepend=-1) > 0
    sentinel = np.asarray(sentinels, np.int32)[part // 2]

    def without(hidden: np.ndarray) -> np.ndarray:
        """The text, with a sentinel for each hidden part, and its end."""
        left = np.where(hidden, sentinel, text)[begins | ~hidden].reshape(B, -1)
        return np.pad(left, ((0, 0), (0, 1)), constant_values=eos_id)

    source, targets = without(part % 2 == 1), without(part % 2 == 0)
    tokens = np.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=start_id)
    return PairBatch(source, tokens, targets, np.ones(targets.shape, np.float32))


def _parts(rng: np.random.Generator, n_rows: int, n: int, n_parts: int) -> Integer[np.ndarray, "B P"]:
    """For each row, n as the sum of so many positive numbers: all such sums are as likely."""
    cuts = np.sort(rng.random((n_rows, n - 1)).argsort(axis=1)[:, : n_parts - 1], axis=1) + 1
    return np.diff(cuts, axis=1, prepend=0, append=n)
