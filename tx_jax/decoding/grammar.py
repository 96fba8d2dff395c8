"""Texts that match: a regular expression, or a JSON schema, as an automaton over a vocabulary.

The library outlines-core works out which tokens may follow; here that becomes arrays.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tx_jax.data.libraries import one_line, package
from tx_jax.decoding.automaton import Automaton, from_table
from tx_jax.errors import require

# What outlines-core reads past: a text would not keep to it.
UNKNOWN = frozenset({
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "contentEncoding", "uniqueItems",
    "contains", "minContains", "maxContains", "minProperties", "maxProperties", "patternProperties", "propertyNames",
    "dependentRequired", "dependentSchemas", "if", "then", "else", "not",
})  # fmt: skip
MAPS = frozenset({"properties", "$defs", "definitions"})  # from names of any kind to schemas
DATA = frozenset({"enum", "const", "default", "examples"})
MOST = 2**28  # places of a table, states times tokens: 1 GiB before its classes are found


def match_regex(pattern: str, token_bytes: Sequence[bytes], eos_ids: Sequence[int] = ()) -> Automaton:
    """Whole texts that match `pattern`, as Rust's regex crate reads it; they end with one of eos_ids.

    Args:
        token_bytes: of each id, what it adds to a text: `tx.token_bytes(tokenizer)`.
        eos_ids: may come where a text matches. Without any, a text ends where nothing more can match.

    >>> rules = match_regex("yes|no", [b"yes", b"no", b"?"])
    >>> (rules.table[rules.start][rules.classes] >= 0).tolist()  # which tokens may come first
    [True, True, False]

    Raises:
        InputError: the pattern is none, or matches no text of these tokens, or needs too large a table.
    Source: Willard & Louf 2023, §3, by outlines-core.
    """
    library, V = package("outlines_core", "constrain"), len(token_bytes)
    ids: dict[bytes, list[int]] = {}
    for i, part in enumerate(token_bytes):
        if part and i not in eos_ids:
            ids.setdefault(part, []).append(i)
    with one_line(f"pattern={pattern!r:.60} is no regular expression for these tokens", "change it"):
        index = library.Index(pattern, library.Vocabulary(V, ids))  # V: an end of its own, that no token is
        moves, first, accepting = index.get_transitions(), index.get_initial_state(), index.get_final_states()
    alive = _that_end({state: {*row.values()} for state, row in moves.items()}, accepting)
    rule = f"pattern={pattern!r:.60}"
    require(first in alive, f"{rule} matches no text of these tokens; change it")
    require((len(alive) + 1) * V <= MOST, f"{rule} has {len(alive)} states of {V} tokens each; make it simpler")
    number, end = {state: n for n, state in enumerate(sorted(alive))}, len(alive)
    table = np.full((end + 1, V), -1, np.int32)
    for state in alive:
        row = {token: to for token, to in moves.get(state, {}).items() if token < V and to in alive}
        table[number[state], [*row]] = [number[to] for to in row.values()]
    finals = [number[state] for state in accepting]
    table[np.ix_(finals, list(eos_ids))] = end
    table[end] = end
    final = np.arange(end + 1) == end
    if not eos_ids:
        final[finals] = (table[finals] < 0).all(axis=1)
    return from_table(table, final, number[first])


def _that_end(moves: Mapping[int, set[int]], accepting: set[int]) -> set[int]:
    """The states from which a match can be reached: a text in another would have no token to go on with."""
    alive, before = {*accepting}, -1
    while len(alive) > before:
        before = len(alive)
        alive |= {state for state, following in moves.items() if following & alive}
    return alive


def match_json(schema: Mapping[str, Any] | str, token_bytes: Sequence[bytes], eos_ids: Sequence[int] = ()) -> Automaton:
    """Whole texts that are JSON of this schema, with at most one space where JSON may have any.

    Args:
        schema: as a mapping or in JSON. The others are those of `match_regex`.

    >>> rules = match_json({"type": "boolean"}, [b"true", b"false", b"?"])
    >>> (rules.table[rules.start][rules.classes] >= 0).tolist()  # which tokens may come first
    [True, True, False]

    Raises:
        InputError: the schema is none, or has a part that no regular expression can say, such as recursion, or that
            is not held, such as minimum.
    """
    library = package("outlines_core", "constrain").json_schema
    with one_line("schema is no JSON schema that can be held", "simplify it"):
        known = json.loads(schema) if isinstance(schema, str) else schema
    past = ", ".join(sorted(_unknown(known)))
    require(not past, f"schema has {past}, which no text would be held to; leave it out, and check texts by it")
    with one_line("schema is no JSON schema that can be held", "simplify it"):
        pattern = library.build_regex_from_schema(json.dumps(known))
    return match_regex(pattern, token_bytes, eos_ids)


def _unknown(schema: Any) -> set[str]:
    """The keywords of a schema, and of those in it, that are read past."""
    if isinstance(schema, list):
        return set().union(*map(_unknown, schema))
    if not isinstance(schema, Mapping):
        return set()
    parts = ([*part.values()] if key in MAPS else part for key, part in schema.items() if key not in DATA)
    return set(UNKNOWN & schema.keys()).union(*map(_unknown, parts))
