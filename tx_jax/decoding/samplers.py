"""From logits to a token: one value that says which rules apply, and the draw.

A `Sampler` is a pytree: which rules are there is static, their numbers are leaves. Changing a number compiles nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, UInt32

from tx_jax.decoding import rules
from tx_jax.decoding.rules import Number, Text
from tx_jax.errors import require

Keys = PRNGKeyArray | Key[Array, " R"] | UInt32[Array, "R _"]  # one for all rows, or one for each
Ids = Sequence[int] | Int[Array, "*b n"] | Int[np.ndarray, "*b n"]


class Sampler(NamedTuple):
    """How a token is drawn from logits, (B, V); None leaves a rule out, and Sampler() is greedy.

    Rules apply in this order, which is that of transformers; of several samplers, (one, other), each in turn. A number
    is one for all rows, or an array of one for each. A rule that would leave a row no token leaves the row as it is.

    >>> Sampler(temperature=0.8, top_k=40).top_k
    40
    """

    logit_bias: Mapping[int, float] | Float[Array, "*b V"] | None = None  # is added, by id
    repetition_penalty: Number | None = None  # of tokens in the text: above 1 makes them less likely (CTRL)
    presence_penalty: Number | None = None  # is taken from the logits of tokens that were written (OpenAI's API)
    frequency_penalty: Number | None = None  # the same for each time
    no_repeat_ngram: Number | None = None  # the text holds the same n tokens in a row once
    forbidden: Ids | None = None  # ids that are not written
    min_new_tokens: Number | None = None  # before which no text ends
    forced: Ids | None = None  # ids that are written first
    # Your own: (logits (B, V), the text so far) → logits, traced. The same function each time, or it compiles anew; a
    # `jax.tree_util.Partial` where it holds arrays, or where the sampler itself is an argument of jit.
    processor: Callable[[Array, Text], Array] | None = None
    temperature: Number | None = None  # logits are divided by it; 0, or None: the likeliest token
    top_k: Number | None = None  # keep the k likeliest
    top_p: Number | None = None  # keep the likeliest whose probabilities first reach p
    min_p: Number | None = None  # keep those at least p times as likely as the likeliest
    typical_p: Number | None = None  # keep those of the most expected surprise whose probabilities first reach p
    epsilon_cutoff: Number | None = None  # keep those of at least this probability
    eta_cutoff: Number | None = None  # the same, but less where the model is unsure


Samplers = Sampler | tuple[Sampler, ...]
Rule = Callable[[Array, Any, Any], Array]
RULES: dict[str, Rule] = {
    "logit_bias": rules.bias_logits,
    "repetition_penalty": rules.penalise_repetition,
    "presence_penalty": rules.penalise_presence,
    "frequency_penalty": rules.penalise_frequency,
    "no_repeat_ngram": rules.forbid_repeats,
    "forbidden": rules.forbid,
    "min_new_tokens": rules.forbid_end,
    "forced": rules.force,
    "processor": rules.process,
    "temperature": rules.heat,
    "top_k": rules.keep_top_k,
    "top_p": rules.keep_top_p,
    "min_p": rules.keep_min_p,
    "typical_p": rules.keep_typical,
    "epsilon_cutoff": rules.keep_epsilon,
    "eta_cutoff": rules.keep_eta,
}
OF_TEXT = tuple(RULES)[1:9]  # rules that look at what was written
OF_DRAWS = tuple(RULES)[10:]  # rules that leave the likeliest as it is


def _whole(x: np.ndarray) -> Any:
    return np.isfinite(x) & (np.floor(x) == x)


BOUNDS = {  # of each number: (test, rule)
    "repetition_penalty": (lambda x: x > 0, "positive; 1 or None leaves it out"),
    "presence_penalty": (np.isfinite, "finite; 0 or None leaves it out"),
    "frequency_penalty": (np.isfinite, "finite; 0 or None leaves it out"),
    "no_repeat_ngram": (lambda x: (x >= 0) & _whole(x), "a whole number, at least 0, which leaves it out"),
    "min_new_tokens": (lambda x: (x >= 0) & _whole(x), "a whole number, at least 0"),
    "temperature": (lambda x: (x >= 0) & np.isfinite(x), "at least 0, which is greedy, and finite"),
    "top_k": (lambda x: (x >= 1) & _whole(x), "a whole number, at least 1; leave it out (None) to keep all"),
    "top_p": (lambda x: (x > 0) & (x <= 1), "in (0, 1]; leave it out (None) to keep all"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "in [0, 1]; leave it out (None) to keep all"),
    "typical_p": (lambda x: (x > 0) & (x <= 1), "in (0, 1]; leave it out (None) to keep all"),
    "epsilon_cutoff": (lambda x: (x >= 0) & (x < 1), "in [0, 1); leave it out (None) to keep all"),
    "eta_cutoff": (lambda x: (x > 0) & (x < 1), "in (0, 1); leave it out (None) to keep all"),
}


def in_turn(sampler: Samplers) -> tuple[Sampler, ...]:
    """One sampler or several, as several."""
    return (sampler,) if isinstance(sampler, Sampler) else sampler


def draws(sampler: Samplers) -> bool:
    """Whether chance has a part."""
    return any(one.temperature is not None for one in in_turn(sampler))


def check_sampler(sampler: Samplers, V: int | None = None, n_rows: int | None = None, ends: bool = True) -> None:
    """Hold all numbers and ids to their bounds; traced ones cannot be seen.

    Args:
        V, n_rows, ends: ids of the vocabulary, rows that are written, and whether an id ends a text, where known.

    Raises:
        InputError: a number or an id is out of its bounds, a rule would have no effect, or no token is left.
    """
    for one in in_turn(sampler):
        for name, (test, rule) in BOUNDS.items():
            value = getattr(one, name)
            if value is not None:
                number = isinstance(value, Tracer) or jnp.issubdtype(np.asarray(value).dtype, jnp.number)
                fits = number and (np.ndim(value) == 0 or (np.ndim(value) == 1 and n_rows in (None, len(value))))
                shape = f"{name}={value} must be one number for all rows, or one for each of {n_rows or 'them'}"
                require(fits, shape)
                if not isinstance(value, Tracer):
                    require(bool(np.all(test(np.asarray(value)))), f"{name}={value} must be {rule}")
        for name in ("forbidden", "forced"):
            _check_ids(name, getattr(one, name), V, n_rows)
        _check_bias(one.logit_bias, V, n_rows)
        own = f"processor={one.processor!r:.60} must be a function of (logits, text) that gives logits"
        require(one.processor is None or callable(one.processor), own)
        require(one.min_new_tokens is None or ends, f"min_new_tokens={one.min_new_tokens} needs an eos_id; give one")
        forbidden = () if one.forbidden is None or isinstance(one.forbidden, Tracer) else np.unique(one.forbidden)
        left = V is None or len(forbidden) < V
        require(left, f"forbidden holds all {V} ids of the vocabulary; leave at least one")
    idle = [name for name in OF_DRAWS if any(getattr(one, name) is not None for one in in_turn(sampler))]
    rule = f"{', '.join(idle)} without a temperature above 0 would be ignored; set one, such as 1.0"
    require(draws(sampler) or not idle, rule)


def _check_ids(name: str, ids: Any, V: int | None, n_rows: int | None) -> None:
    if ids is None or isinstance(ids, Tracer):
        return
    array = np.asarray(ids)
    whole = array.ndim in (1, 2) and (np.issubdtype(array.dtype, np.integer) or not array.size)
    require(whole, f"{name}={ids!r:.60} must be a list of ids, or rows of them")
    require(array.size, f"{name}=() holds no id; leave it out")
    rows = array.ndim == 1 or n_rows in (None, len(array))
    require(rows, f"{name} has {len(array)} rows, the batch {n_rows}; give one for each, or one list for all")
    none = -1 if array.ndim == 2 else 0  # rows of several lengths are filled with −1
    bad = array[(array < none) | (array >= (V or np.inf))]
    require(not bad.size, f"{name} holds id {bad[:1]}; the vocabulary is 0 … {(V or 0) - 1}")


def _check_bias(bias: Any, V: int | None, n_rows: int | None) -> None:
    if isinstance(bias, Mapping):
        bad = [i for i in bias if not 0 <= i < (V or np.inf)]
        require(not bad, f"logit_bias holds id {bad[:1]}; the vocabulary is 0 … {(V or 0) - 1}")
        require(bias, "logit_bias={} holds no id; leave it out")
    elif bias is not None:
        shape = np.shape(bias)
        fits = len(shape) in (1, 2) and V in (None, shape[-1]) and (len(shape) == 1 or n_rows in (None, 1, shape[0]))
        require(fits, f"logit_bias of shape {shape} must be ({V},), or have a row for each text")


def as_arrays(sampler: Samplers, V: int) -> tuple[Sampler, ...]:
    """The same with arrays in place of lists and mappings, so that other ids compile nothing, and a function as a
    pytree: a `jax.tree_util.Partial` may hold arrays, too."""
    made = []
    for one in in_turn(sampler):
        if isinstance(one.logit_bias, Mapping):
            bias = jnp.zeros(V).at[jnp.array([*one.logit_bias])].add(jnp.array([*one.logit_bias.values()]))
            one = one._replace(logit_bias=bias)
        if one.processor is not None and not isinstance(one.processor, Partial):
            one = one._replace(processor=Partial(one.processor))
        ids = {name: getattr(one, name) for name in ("forbidden", "forced")}
        given = {name: jnp.asarray(value, jnp.int32) for name, value in ids.items() if value is not None}
        made.append(one._replace(**given))
    return tuple(made)


def sample(
    logits: Float[Array, "B V"], sampler: Samplers, key: Keys | None = None, text: Text | None = None
) -> Int[Array, " B"]:
    """One token a row: the likeliest if there is no temperature, otherwise drawn with `key`, or one for each row.

    >>> sample(jnp.array([[0.0, 2.0, 1.0]]), Sampler()).tolist()
    [1]

    Raises:
        InputError: a rule looks at what was written, and there is no text.
    """
    logits = apply_rules(logits, sampler, text)
    if not draws(sampler):
        return logits.argmax(axis=-1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical) if is_by_row(cast(Array, key)) else jax.random.categorical
    return draw(cast(Array, key), logits).astype(jnp.int32)


def apply_rules(logits: Float[Array, "B V"], sampler: Samplers, text: Text | None = None) -> Float[Array, "B V"]:
    """The logits by which a token is drawn, or of which the largest is taken. Errors are those of `sample`."""
    for one in as_arrays(sampler, logits.shape[1]):
        for name, rule in RULES.items():
            value = getattr(one, name)
            if value is not None:
                seen = text is not None or name not in OF_TEXT
                require(seen, f"{name} looks at what was written; give text=begin_text(tokens, positions, n_new)")
                ruled = rule(logits, value, text)
                logits = jnp.where((ruled > -jnp.inf).any(axis=1, keepdims=True), ruled, logits)
    return logits


def probabilities(logits: Float[Array, "B V"], sampler: Samplers, text: Text | None = None) -> Float[Array, "B V"]:
    """Those of the draw; 1 for the token that greedy decoding takes. Errors are those of `sample`."""
    logits = apply_rules(logits, sampler, text)
    if draws(sampler):
        return jax.nn.softmax(logits.astype(jnp.float32))
    return jax.nn.one_hot(logits.argmax(axis=-1), logits.shape[1], dtype=jnp.float32)


def fold_key(key: Keys | None, n: int | Int[Array, "*R"]) -> Keys | None:
    """The key of a step: of as many as any row has done, or for each row's key of as many as that row."""
    if key is None:
        return None
    n = jnp.asarray(n)
    if is_by_row(key):
        return jax.vmap(jax.random.fold_in)(key, jnp.broadcast_to(n, len(key)))
    return jax.random.fold_in(key, n.max())


def is_by_row(key: Keys) -> bool:
    """Whether there is a key for each row; an old one has an axis of its own."""
    return key.ndim == (1 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 2)
