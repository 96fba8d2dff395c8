"""Many prompts through a few rows: a row that has ended takes the next prompt, so that none waits for the longest.

Each text is what `generate` gives for its prompt alone with the same key, whatever stands in the other rows.

Source: iteration-level scheduling: Yu et al. 2022 (Orca), §3.2.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tx_jax.cache import init_cache
from tx_jax.decoding.automaton import Automaton
from tx_jax.decoding.generate import Writing, advance, as_generation, begin, prefill
from tx_jax.decoding.prompts import BUCKET, Prompt, ends_of, pad_prompts
from tx_jax.decoding.samplers import Sampler, Samplers, as_arrays, check_sampler, draws
from tx_jax.errors import require
from tx_jax.models import DecoderLM
from tx_jax.modules.embed import check_tokens


class Written(NamedTuple):
    """One text.

    >>> text = Written(number=0, tokens=np.array([5, 2]), log_probs=np.array([-0.25, -0.5]))
    >>> float(text.log_probs.sum())  # of the whole text
    -0.75
    """

    number: int  # of its prompt
    tokens: Int[np.ndarray, " n"]  # the id that ends it included
    log_probs: Float[np.ndarray, " n"]  # of each token by the model, before any rule, in nats


def write_all(
    model: DecoderLM,
    params: dict,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    n_rows: int = 16,
    sampler: Samplers = Sampler(),
    key: PRNGKeyArray | None = None,
    eos_id: int | tuple[int, ...] | None = None,
    automaton: Automaton | None = None,
    first: int = 0,
) -> Iterator[Written]:
    """A text after each prompt, in the order in which they end.

    Args:
        max_new_tokens: of each text, or a number for each prompt.
        n_rows: texts that are written at a time.
        sampler: with numbers for all rows. The draws of prompt i are those of the key `fold_in(key, i)`.
        first: of the prompts' numbers, so that the rest of a list is written as it would have been with all.

    >>> from tx_jax import ModelConfig, build, init_params
    >>> model = build(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1))
    >>> params = init_params(model, jax.random.key(0))
    >>> texts = write_all(model, params, [[5, 6], [4]], max_new_tokens=[3, 2], n_rows=1)
    >>> [(text.number, len(text.tokens)) for text in texts]
    [(0, 3), (1, 2)]

    Raises:
        InputError: a prompt has no token, an id outside of the vocabulary, or is too long with what is to follow it; or
            what `generate` refuses of the others.
    Source: Yu et al. 2022 (Orca), §3.2.
    """
    cfg, V = model.cfg, cast(int, model.cfg.vocab_size)
    require(n_rows >= 1, f"n_rows={n_rows} must be at least 1")
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else [*max_new_tokens]
    require(len(limits) == len(prompts), f"max_new_tokens holds {len(limits)} numbers for {len(prompts)} prompts")
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        require(len(prompt), f"prompt {i} has no token; a model goes on from at least one")
        require(limit >= 1, f"max_new_tokens={limit} of prompt {i} must be at least 1")
        rule = f"prompt {i} has {len(prompt)} tokens and max_new_tokens={limit}, max_len={cfg.max_len}"
        require(len(prompt) + limit <= cfg.max_len, f"{rule}; shorten one")
        check_tokens(np.asarray([prompt]), V, f"prompt {i}")
    ends = ends_of(eos_id, V)
    check_sampler(sampler, V, 1, bool(ends))
    require(not draws(sampler) or key is not None, "sampling needs key=jax.random.key(seed)")
    how = {"sampler": as_arrays(sampler, V), "automaton": automaton}
    return _write_all(model, params, prompts, limits, n_rows, how, key, jnp.asarray(ends, jnp.int32), first)


def _write_all(model, params, prompts, limits, n_rows, how, key, ends, first) -> Iterator[Written]:
    if not prompts:
        return
    width, new = _bucket(max(map(len, prompts)), model.cfg.max_len), max(limits)
    n_slots = min(width + new, model.cfg.max_len) if model.cfg.reach is None else model.cfg.reach + width - 1
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(0) if key is None else key, first + jnp.arange(len(prompts))
    )
    n_rows = min(n_rows, len(prompts))
    n_new = max(n_rows // 8, 1)  # rows that are filled at a time
    holds = np.full(n_rows, -1)  # the prompt of each row; −1: none
    writing, row_keys, waiting = None, keys[jnp.zeros(n_rows, int)], iter(range(len(prompts)))
    while True:
        free = np.flatnonzero(holds < 0)
        chosen = [i for _, i in zip(free[:n_new], waiting, strict=False)]  # in this order: zip takes none in vain
        if chosen:
            rows = np.array([*free[: len(chosen)], *[n_rows] * (n_new - len(chosen))])  # n_rows: out of range
            full = [*chosen, *[chosen[-1]] * (n_new - len(chosen))]
            batch = pad_prompts(
                [prompts[i] for i in full], _bucket(max(len(prompts[i]) for i in chosen), model.cfg.max_len)
            )
            more = jnp.array([limits[i] for i in full]), keys[jnp.array(full)], ends, how
            fresh = _begin(model, params, batch, (n_slots, width, new), *more)
            writing = _empty(fresh, n_rows) if writing is None else writing
            writing, row_keys = _place(writing, fresh, row_keys, more[1], jnp.asarray(rows))
            holds[rows[: len(chosen)]] = chosen
            if (holds < 0).any() and len(chosen) == n_new:
                continue  # until all rows are full, or nothing waits
        if (holds < 0).all():
            return
        # What waits needs n_new free rows; without any that waits, all are written to their end.
        writing = _run(model, params, writing, row_keys, how, jnp.asarray(holds >= 0), n_new if chosen else n_rows)
        done = np.asarray(writing.done)
        out = jax.device_get(as_generation(writing)._replace(cache=None))
        for row in np.flatnonzero(done & (holds >= 0)):
            n = int(out.lengths[row])
            yield Written(first + int(holds[row]), out.tokens[row, :n], out.log_probs[row, :n])
            holds[row] = -1


def _bucket(n: int, most: int) -> int:
    return min(-(-n // BUCKET) * BUCKET, most)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _begin(model, params, prompt: Prompt, sizes, limit, keys, ends, how) -> Writing:
    """New rows, as wide as all others."""
    n_slots, width, new = sizes
    logits, cache = prefill(model, params, prompt, init_cache(model.cfg, len(prompt.tokens), n_slots))
    pad = ((0, 0), (0, width - prompt.tokens.shape[1]))
    wide = Prompt(jnp.pad(prompt.tokens, pad), jnp.pad(prompt.positions, pad, constant_values=-1))
    return begin(logits, cache, new, wide, ends, limit, **how, key=keys)


def _rows_of(writing: Writing) -> Writing:
    """Without what has no rows."""
    return writing._replace(text=writing.text._replace(ends=None))


def _empty(fresh: Writing, n_rows: int) -> Writing:
    """As many rows, of which all have ended."""
    empty = jax.tree.map(lambda leaf: jnp.zeros((n_rows, *leaf.shape[1:]), leaf.dtype), _rows_of(fresh))
    return empty._replace(done=jnp.ones(n_rows, bool), text=empty.text._replace(ends=fresh.text.ends))


@functools.partial(jax.jit, donate_argnums=(0, 2))
def _place(writing: Writing, fresh: Writing, row_keys: Any, keys: Any, rows: Array) -> tuple[Writing, Any]:
    """The fresh rows in their places; a place out of range is none."""
    placed = jax.tree.map(
        lambda all_rows, some: all_rows.at[rows].set(some, mode="drop"), _rows_of(writing), _rows_of(fresh)
    )
    text = placed.text._replace(ends=writing.text.ends)
    return placed._replace(text=text), row_keys.at[rows].set(keys, mode="drop")


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _run(model, params, writing: Writing, keys, how, held, n_free) -> Writing:
    """On until so many rows of those that hold a text have ended, or all have."""

    def goes_on(writing: Writing) -> Array:
        left = held & ~writing.done
        return left.any() & ((held & writing.done).sum() + (~held).sum() < n_free)

    return jax.lax.while_loop(goes_on, lambda writing: advance(model, params, writing, **how, key=keys), writing)
