"""What a sampler may do to logits: penalties and bans that look at the text so far, and cuts of the distribution.

Pure functions (logits, number, text) → logits, of the semantics that transformers' processors of these names have. A
number is one for all rows, or one for each. Logits of −inf are tokens that cannot come.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tx_jax.errors import require

Number = float | int | Float[Array | np.ndarray, "*b"] | Int[Array | np.ndarray, "*b"]
Logits = Float[Array, "B V"]


class Text(NamedTuple):
    """What rules look at: the text so far, each token at its position."""

    tokens: Int[Array, "B L"]  # −1: none yet
    n_prompt: Int[Array, " B"]  # tokens that were given
    n_tokens: Int[Array, " B"]  # and with those that were written
    ends: Int[Array, " n"]  # ids that end a text

    def write(self, token: Int[Array, " B"], done: Bool[Array, " B"]) -> "Text":
        """The text with one token more in each row that is not done."""
        place = jnp.where(done, self.tokens.shape[1], self.n_tokens)  # out of range, where nothing is written
        tokens = self.tokens.at[jnp.arange(len(token)), place].set(token, mode="drop")
        return self._replace(tokens=tokens, n_tokens=self.n_tokens + ~done)

    def written(self, n: int) -> tuple[Int[Array, "B n"], Int[Array, " B"]]:
        """The first n tokens after each prompt, filled up by the first of ends, or by 0; and how many there are."""
        lengths, index = self.n_tokens - self.n_prompt, jnp.arange(n)
        tokens = jnp.take_along_axis(self.tokens, self.n_prompt[:, None] + index, axis=1, mode="clip")
        return jnp.where(index < lengths[:, None], tokens, self.ends[0] if self.ends.size else 0), lengths


def begin_text(
    tokens: Int[Array, "B T"], positions: Int[Array, "B T"], n_new: int, ends: Int[Array, " n"] | None = None
) -> Text:
    """Prompts, padded on the right, with room for n_new tokens."""
    room = jnp.pad(jnp.where(positions < 0, -1, tokens), ((0, 0), (0, n_new)), constant_values=-1)
    n = (positions >= 0).sum(axis=1)
    return Text(room, n, n, jnp.zeros(0, jnp.int32) if ends is None else ends)


def _column(number: Number) -> Array:
    """One for all, or a column of one for each row."""
    number = jnp.asarray(number)
    return number[:, None] if number.ndim else number


def _put(logits: Logits, ids: Int[Array, "B n"], value: Array | float) -> Logits:
    """Logits with `value` at the ids of each row; ids below 0 are none."""
    ids = jnp.where(ids < 0, logits.shape[1], ids)  # out of range, where nothing is written; −1 would be the last
    return logits.at[jnp.arange(len(logits))[:, None], ids].set(value, mode="drop")


def _counts(logits: Logits, text: Text) -> Int[Array, "B V"]:
    """How often each token was written, the prompt not counted."""
    new = jnp.arange(text.tokens.shape[1]) >= text.n_prompt[:, None]
    ids = jnp.where(new & (text.tokens >= 0), text.tokens, logits.shape[1])
    return jnp.zeros(logits.shape, jnp.int32).at[jnp.arange(len(ids))[:, None], ids].add(1, mode="drop")


def bias_logits(logits: Logits, bias: Float[Array, "*b V"], text: Text) -> Logits:
    """A number added to each logit."""
    return logits + jnp.asarray(bias)


def penalise_repetition(logits: Logits, penalty: Number, text: Text) -> Logits:
    """Logits of tokens in the text, the prompt included, divided by the penalty where positive, otherwise multiplied.

    Source: Keskar et al. 2019 (CTRL), §4.1.
    """
    p = _column(penalty)
    there = jnp.take_along_axis(logits, jnp.maximum(text.tokens, 0), axis=1)
    return _put(logits, text.tokens, jnp.where(there < 0, there * p, there / p))


def penalise_presence(logits: Logits, penalty: Number, text: Text) -> Logits:
    """Logits less the penalty where the token was written before, the prompt not counted (as in OpenAI's API)."""
    return logits - _column(penalty) * (_counts(logits, text) > 0)


def penalise_frequency(logits: Logits, penalty: Number, text: Text) -> Logits:
    """Logits less the penalty for each time that the token was written, the prompt not counted (OpenAI's API)."""
    return logits - _column(penalty) * _counts(logits, text)


def forbid_repeats(logits: Logits, n: Number, text: Text) -> Logits:
    """No token that would end an n-gram which the text holds already, the prompt included; n = 0 forbids nothing."""
    tokens, length, n = text.tokens, text.n_tokens[:, None], _column(n)
    index = jnp.arange(tokens.shape[1])

    def compare(j: Array, same: Array) -> Array:
        """Whether the j-th token before a place is the j-th before the end."""
        last = jnp.take_along_axis(tokens, jnp.maximum(length - j, 0), axis=1)
        return same & ((j >= n) | (jnp.roll(tokens, j, axis=1) == last))

    begun = (n > 0) & (index >= n - 1) & (index < length)
    same = jax.lax.fori_loop(1, jnp.max(n), compare, jnp.broadcast_to(begun, tokens.shape))
    return _put(logits, jnp.where(same, tokens, -1), -jnp.inf)


def forbid(logits: Logits, ids: Int[Array, "*b n"], text: Text) -> Logits:
    """None of these tokens; −1 is none."""
    return _put(logits, jnp.broadcast_to(jnp.asarray(ids), (len(logits), jnp.shape(ids)[-1])), -jnp.inf)


def forbid_end(logits: Logits, n: Number, text: Text) -> Logits:
    """No end before n tokens were written."""
    early = text.n_tokens - text.n_prompt < jnp.asarray(n)
    return jnp.where(early[:, None], _put(logits, jnp.tile(text.ends, (len(logits), 1)), -jnp.inf), logits)


def force(logits: Logits, ids: Int[Array, "*b n"], text: Text) -> Logits:
    """The first tokens that are written; −1 leaves the choice."""
    ids = jnp.broadcast_to(jnp.asarray(ids), (len(logits), jnp.shape(ids)[-1]))
    step = text.n_tokens - text.n_prompt
    token = jnp.take_along_axis(ids, step[:, None], axis=1, mode="fill", fill_value=-1)
    return jnp.where((token < 0) | (jnp.arange(logits.shape[1]) == token), jnp.where(token < 0, logits, 0.0), -jnp.inf)


def process(logits: Logits, processor: Callable[[Logits, Text], Logits], text: Text) -> Logits:
    """What a function of the user's makes of them."""
    out = processor(logits, text)
    is_float = isinstance(out, jax.Array) and jnp.issubdtype(out.dtype, jnp.floating)
    given = f"{out.dtype}{list(out.shape)}" if isinstance(out, jax.Array) else type(out).__name__
    fits = is_float and out.shape == logits.shape
    require(fits, f"processor gave {given}; it must give logits, {logits.dtype}{list(logits.shape)}, as it was given")
    return out


def heat(logits: Logits, temperature: Number, text: Text | None = None) -> Logits:
    """Logits divided by the temperature; 0 leaves the likeliest alone, and of equals the first."""
    t = _column(temperature)
    likeliest = jnp.arange(logits.shape[1]) == logits.argmax(axis=1)[:, None]
    return jnp.where(t > 0, logits / jnp.where(t > 0, t, 1), jnp.where(likeliest, 0.0, -jnp.inf))


def keep_top_k(logits: Logits, k: Number, text: Text | None = None) -> Logits:
    """The k largest of the row. Ties with the last of them stay."""
    largest_first = -jnp.sort(-logits, axis=-1)
    last = jnp.clip(_column(k), 1, logits.shape[-1]).astype(jnp.int32) - 1  # k may be 5.0
    least = jnp.take_along_axis(largest_first, jnp.broadcast_to(last, (len(logits), 1)), axis=1)
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(logits: Logits, p: Number, text: Text | None = None) -> Logits:
    """The smallest set whose probability reaches p. The likeliest and ties with the last stay.

    Source: Holtzman et al. 2020, §3.1.
    """
    p = _column(p)
    largest_first = -jnp.sort(-logits, axis=-1)
    mass = jax.nn.softmax(largest_first, axis=-1)
    kept = jnp.cumsum(mass, axis=-1) - mass < p  # the mass before a token
    least = jnp.where(kept, largest_first, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where((logits < least) & (p < 1), -jnp.inf, logits)  # p = 1 keeps all, whatever the rounding


def keep_min_p(logits: Logits, p: Number, text: Text | None = None) -> Logits:
    """What is at least p times as likely as the likeliest. Source: Nguyen et al. 2024, §3."""
    return jnp.where(logits < logits.max(axis=-1, keepdims=True) + jnp.log(_column(p)), -jnp.inf, logits)


def keep_typical(logits: Logits, mass: Number, text: Text | None = None) -> Logits:
    """Those whose surprise is nearest to the expected one, until their probability reaches `mass`.

    Source: Meister et al. 2023, §4.
    """
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    off = jnp.abs(-log_p - _entropy(log_p))
    off = jnp.where(p > 0, off, jnp.inf)
    nearest_first = jnp.argsort(off, axis=-1)
    reached = jnp.cumsum(jnp.take_along_axis(p, nearest_first, axis=1), axis=1)
    last = jnp.minimum((reached < _column(mass)).sum(axis=1, keepdims=True), logits.shape[1] - 1)
    most = jnp.take_along_axis(off, jnp.take_along_axis(nearest_first, last, axis=1), axis=1)
    return jnp.where(off > most, -jnp.inf, logits)


def keep_epsilon(logits: Logits, least: Number, text: Text | None = None) -> Logits:
    """What has at least this probability, and the likeliest. Source: Hewitt et al. 2022, §4.1."""
    p = jax.nn.softmax(logits)
    return jnp.where((p < _column(least)) & (logits < logits.max(axis=1, keepdims=True)), -jnp.inf, logits)


def keep_eta(logits: Logits, epsilon: Number, text: Text | None = None) -> Logits:
    """What has a probability of min(ε, √ε · exp(−entropy)) at least, and the likeliest.

    Source: Hewitt et al. 2022, §4.2.
    """
    epsilon, entropy = _column(epsilon), _entropy(jax.nn.log_softmax(logits))
    return keep_epsilon(logits, jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-entropy))[:, 0])


def _entropy(log_p: Logits) -> Float[Array, "B 1"]:
    return -jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0).sum(axis=-1, keepdims=True)
