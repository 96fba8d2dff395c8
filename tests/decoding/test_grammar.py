"""What is drawn under a regular expression or a JSON schema matches it, however unlikely the model finds it."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import InputError, Sampler

pytest.importorskip("outlines_core")
HALVES = ["é".encode(), "é".encode()[:1], "é".encode()[1:], "ü".encode()[:1]]
PARTS = [b"", *(bytes([i]) for i in range(32, 127)), b"ab", b"12", b'"a', b'": ', *HALVES]
END, V = 0, len(PARTS)
HOT = Sampler(temperature=3.0)


@pytest.fixture(scope="module")
def draw():
    model = tx.build(tx.ModelConfig(vocab_size=V, d_model=16, n_heads=2, n_layers=1, max_len=256))
    params = tx.init_params(model, jax.random.key(0))

    def drawn(automaton, n=32, new=60, eos_id=END):
        out = tx.generate(
            model, params, jnp.ones((n, 1), int), max_new_tokens=new, sampler=HOT, key=jax.random.key(1),
            automaton=automaton, eos_id=eos_id,
        )  # fmt: skip
        rows = zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True)
        return [(b"".join(PARTS[i] for i in row[:length]).decode(), length < new) for row, length in rows]

    return drawn


@pytest.mark.parametrize("pattern", ["(yes|no|maybe)", "[0-9]{4}-[0-9]{2}-[0-9]{2}", "(ab|1)*[é]{1,3}!", "a?(12){2,5}"])
def test_texts_match_the_pattern(pattern, draw):
    texts = draw(tx.match_regex(pattern, PARTS, [END]))
    whole = [text for text, ended in texts if ended]
    assert len(whole) > len(texts) / 2
    assert all(re.fullmatch(pattern, text) for text in whole)
    assert len({*whole}) > 2


def test_without_an_end_a_text_ends_where_nothing_more_matches(draw):
    texts = draw(tx.match_regex("(yes|no)", PARTS), eos_id=None)
    assert {text for text, _ in texts} == {"yes", "no"}
    assert all(ended for _, ended in texts)


def test_no_text_runs_into_a_circle_without_an_end(draw):
    """No token has a #, so that after an x only more of them could follow."""
    parts = [b"" if b"#" in part else part for part in PARTS]
    assert {text for text, _ in draw(tx.match_regex("a(x+#|b)", parts, [END]))} == {"ab"}
    with pytest.raises(InputError, match=r"^pattern='ax\+#' matches no text of these tokens; change it$"):
        tx.match_regex("ax+#", parts)


@pytest.mark.parametrize("ends", [(), (END,)])
def test_a_stream_is_the_whole_text_as_it_comes(ends):
    model = tx.build(tx.ModelConfig(vocab_size=V, d_model=16, n_heads=2, n_layers=1, max_len=256))
    params = tx.init_params(model, jax.random.key(0))
    more = {"sampler": HOT, "key": jax.random.key(1), "eos_id": ends, "max_new_tokens": 30}
    more["automaton"] = tx.match_regex("(ab|1){1,8}!", PARTS, ends)
    whole = tx.generate(model, params, jnp.ones((5, 1), int), **more)
    streamed = np.stack([*tx.stream(model, params, jnp.ones((5, 1), int), **more)], axis=1)
    assert len({*np.asarray(whole.lengths).tolist()}) > 1
    assert streamed.shape[1] == whole.lengths.max() < 30
    np.testing.assert_array_equal(streamed, whole.tokens[:, : streamed.shape[1]])


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "size": {"enum": ["S", "M", "L"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "size", "tags"],
}


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)])
def test_texts_are_json_of_the_schema(schema, draw):
    texts = draw(tx.match_json(schema, PARTS, [END]), new=120)
    found = [json.loads(text) for text, ended in texts if ended]
    assert len(found) > len(texts) / 2
    for value in found:
        assert {*value} == {"name", "size", "tags"}
        assert 1 <= len(value["name"]) <= 6
        assert value["size"] in ("S", "M", "L")
        assert all(tag in (True, False) for tag in value["tags"])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: tx.match_regex("(a", PARTS), "pattern='(a' is no regular expression for these tokens"),
        (lambda: tx.match_regex("ü", [b"a", b"b"]), "pattern='ü' is no regular expression for these tokens"),
        (lambda: tx.match_json({"type": "strin"}, PARTS), "schema is no JSON schema that can be held"),
        (lambda: tx.match_json("{", PARTS), "schema is no JSON schema that can be held"),
    ],
)
def test_refused(call, text):
    with pytest.raises(InputError, match="^" + re.escape(text)):
        call()


NOT_HELD = {"integer": "minimum", "string": "contentEncoding", "array": "uniqueItems", "object": "not"}
BYTES = [bytes([i]) for i in range(256)]


@pytest.mark.parametrize("kind", NOT_HELD)
def test_what_no_text_would_be_held_to_is_refused(kind):
    inner = {"type": kind, NOT_HELD[kind]: {} if kind == "object" else 1}
    for schema in (inner, {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, inner]}}}):
        with pytest.raises(InputError, match=f"^schema has {NOT_HELD[kind]}, which no text would be held to; leave it"):
            tx.match_json(schema, BYTES)


def test_names_and_values_are_no_keywords():
    tx.match_json({"type": "object", "properties": {"not": {"const": {"minimum": 1}}}}, BYTES)
