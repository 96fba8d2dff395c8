"""What a text may be, token by token: a finite automaton over the vocabulary, as arrays.

One table serves stop strings, which a text must not go beyond, and regular expressions and JSON schemas, which it must
match. Its tokens fall into classes of the same effect, so that a table of thousands of states stays small.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tx_jax.errors import require


class Automaton(NamedTuple):
    """States and what leads from one to the next.

    >>> rules = Automaton(jnp.array([[0, -1]]), classes=jnp.array([0, 1]), final=jnp.array([False]), start=jnp.array(0))
    >>> rules.keep(jnp.zeros((1, 2)), state=jnp.array([0])).tolist()  # token 1 may not come
    [[0.0, -inf]]
    """

    table: Int[Array, "states classes"]  # the next state; −1: such a token may not come
    classes: Int[Array, " V"]  # of each token
    final: Bool[Array, " states"]  # a text that is here has ended
    start: Int[Array, "*b"]  # one for all rows, or one for each

    def step(self, state: Int[Array, " B"], token: Int[Array, " B"]) -> Int[Array, " B"]:
        """The states after one token more."""
        return self.table[state, self.classes[token]]

    def keep(self, logits: Float[Array, "B V"], state: Int[Array, " B"]) -> Float[Array, "B V"]:
        """Logits, −inf where a token may not come, such as one that the model has beyond its tokenizer's."""
        may = self.table[state][:, self.classes] >= 0
        return jnp.where(jnp.pad(may, ((0, 0), (0, logits.shape[1] - may.shape[1]))), logits, -jnp.inf)


def from_table(table: np.ndarray, final: np.ndarray, start: int | Sequence[int] = 0) -> Automaton:
    """The automaton of a (states, V) table of next states, −1 where a token may not come.

    >>> from_table(np.array([[0, 1], [1, 1]]), np.array([False, True])).classes.tolist()
    [0, 1]
    """
    columns, classes = np.unique(table, axis=1, return_inverse=True)
    return Automaton(
        jnp.asarray(columns, jnp.int32), jnp.asarray(classes.reshape(-1), jnp.int32), jnp.asarray(final),
        jnp.asarray(start, jnp.int32),
    )  # fmt: skip


def stop_at(stops: Sequence[str], token_bytes: Sequence[bytes]) -> Automaton:
    """Ends a text with the token in which one of `stops` is complete, wherever tokens begin and end.

    Args:
        token_bytes: of each id, what it adds to a text: `tx.token_bytes(tokenizer)`.

    >>> stop_at(["ab"], [b"a", b"b"]).final.tolist()  # after nothing, after a, after ab
    [False, False, True]

    Raises:
        InputError: there is no stop string, or one is empty.
    Source: Aho and Corasick 1975, over bytes; then over tokens.
    """
    require(
        stops and not isinstance(stops, str), f"stops={stops!r} must be a list of at least one text, such as ['END']"
    )
    require(all(stops), f"stops={list(stops)!r} holds an empty text, at which every text would stop; leave it out")
    delta, final = _by_bytes([stop.encode("utf-8") for stop in stops])
    n, lengths = len(delta), np.array([len(part) for part in token_bytes])
    padded = np.frombuffer(b"".join(part.ljust(lengths.max(), b"\0") for part in token_bytes), np.uint8)
    padded = padded.reshape(len(token_bytes), -1)
    table = np.tile(np.arange(n)[:, None], len(token_bytes))
    for i in range(padded.shape[1]):
        table = np.where(i < lengths, delta[table, padded[:, i]], table)
    return from_table(table, final)


def _by_bytes(patterns: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The next state for each state and byte, and which states are final: a trie with its fallbacks."""
    prefixes = sorted({pattern[:i] for pattern in patterns for i in range(len(pattern) + 1)}, key=len)
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    final = np.array([any(prefix.endswith(pattern) for pattern in patterns) for prefix in prefixes])
    delta = np.zeros((len(prefixes), 256), np.int64)
    for prefix, i in number.items():
        for byte in range(256):
            longer = prefix + bytes([byte])
            delta[i, byte] = next(number[longer[k:]] for k in range(len(longer) + 1) if longer[k:] in number)
    delta[final] = np.flatnonzero(final)[:, None]  # what has stopped stays so
    return delta, final
