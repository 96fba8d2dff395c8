"""What is read once serves many: one prompt several samples, one prefix many prompts, a chunk at a time a long prompt.

And what comes with the tokens: their log-probabilities, and the places where a text stops.
"""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tx_jax as tx
from tx_jax import InputError, Sampler
from tx_jax.decoding import automaton as machines
from tx_jax.decoding import generate as module
from tx_jax.decoding import prompts, session

V, NEW = 11, 9
CFG = tx.ModelConfig(vocab_size=V, n_layers=2, n_heads=4, d_head=6, d_model=30, max_len=200, n_kv_heads=2)
CONFIGS = {
    "llama": replace(CFG, positions="rotary", mlp="swiglu", norm="rmsnorm"),
    "gpt2": replace(CFG, positions="learned"),
    "alibi": replace(CFG, positions="alibi"),
    "mistral": replace(CFG, positions="rotary", window=3),
    "vaswani": replace(CFG, positions="sinusoidal", stack="encoder_decoder"),
}
DECODERS = [name for name in CONFIGS if name != "vaswani"]
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 10]]
PREFIX = [7, 7, 2, 8, 1, 0, 4]
HOT = Sampler(temperature=1.5)


@functools.cache
def make(name):
    """The model, large parameters, and keyword arguments: an encoder-decoder's memory of ragged sources."""
    model = tx.build(CONFIGS[name])
    params = jax.tree.map(lambda leaf: leaf if leaf.ndim < 2 else 20 * leaf, tx.init_params(model, jax.random.key(1)))
    if name != "vaswani":
        return model, params, {}
    memory = model.apply({"params": params}, *tx.pad_prompts([[7, 7, 1], [2, 3, 4, 5, 6], [8]]), method="encode")
    return model, params, {"memory": memory}


def generate(name, given=PROMPTS, **more):
    model, params, memory = make(name)
    return tx.generate(model, params, *tx.pad_prompts(given), **{"max_new_tokens": NEW} | memory | more)


@pytest.mark.parametrize("name", ["llama", "mistral", "vaswani"])
def test_samples_of_a_prompt_are_those_of_as_many_prompts(name):
    keys = jax.random.split(jax.random.key(3), 6)
    together = generate(name, sampler=HOT, key=keys, n_samples=2, n_top=2, eos_id=1)
    _, _, memory = make(name)
    memory = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), memory)
    apart = generate(
        name, [row for row in PROMPTS for _ in range(2)], sampler=HOT, key=keys, n_top=2, eos_id=1, **memory
    )
    np.testing.assert_array_equal(together.tokens, apart.tokens)
    np.testing.assert_array_equal(together.lengths, apart.lengths)
    np.testing.assert_allclose(together.log_probs, apart.log_probs, atol=1e-4)
    assert (together.tokens[::2] != together.tokens[1::2]).any()


def test_the_prompt_is_read_once_for_all_samples():
    """No value has as many rows as there are samples and as many columns as the prompt has tokens."""
    model, params, _ = make("llama")

    def call(params):
        return tx.generate(model, params, jnp.ones((1, 63), int), max_new_tokens=2, n_samples=5)

    text = str(jax.make_jaxpr(call)(params))
    assert re.search(r"f32\[1,64,", text)
    assert not re.search(r"f32\[5,64,", text)


@pytest.mark.parametrize("name", ["llama", "vaswani"])
def test_log_probs_are_those_of_a_whole_forward(name):
    """Whatever the sampler does to the draw."""
    model, params, memory = make(name)
    sampler = Sampler(temperature=0.7, top_k=4, repetition_penalty=1.4)
    result = generate(name, sampler=sampler, key=jax.random.key(0), n_top=3, eos_id=1)
    for b, prompt in enumerate(PROMPTS):
        n = int(result.lengths[b])
        row = jnp.array([[*prompt, *result.tokens[b, :n].tolist()]])
        source = jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], memory)
        logits, _ = model.apply({"params": params}, row, **source, method="decode" if memory else None)
        expected = np.asarray(jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1]))
        np.testing.assert_allclose(
            result.log_probs[b, :n], np.take_along_axis(expected, row[0, len(prompt) :, None], 1)[:, 0], atol=2e-4
        )
        assert not result.log_probs[b, n:].any()
        np.testing.assert_allclose(result.top_log_probs[b, :n], -np.sort(-expected, 1)[:, :3], atol=2e-4)
        np.testing.assert_array_equal(result.top_ids[b, :n], np.argsort(-expected, 1, kind="stable")[:, :3])


@pytest.mark.parametrize("name", DECODERS)
def test_prompts_after_a_prefix_are_the_whole_texts(name, monkeypatch):
    """From a cache of one row, or of one for each prompt; with slots to spare, or as a window's ring has them."""
    monkeypatch.setattr(prompts, "BUCKET", 4)
    model, params, _ = make(name)
    whole = generate(name, [PREFIX + prompt for prompt in PROMPTS])
    n_slots = CONFIGS[name].reach and CONFIGS[name].reach + len(PREFIX) - 1
    for rows in (1, 3):
        empty = tx.init_cache(model.cfg, rows, n_slots or 12)
        _, prefix = tx.prefill(model, params, tx.pad_prompts([PREFIX] * rows), empty)
        result = generate(name, prefix=prefix)
        np.testing.assert_array_equal(result.tokens, whole.tokens)
        np.testing.assert_allclose(result.log_probs, whole.log_probs, atol=1e-3)
    np.testing.assert_array_equal(result.cache.next_positions(), whole.cache.next_positions())


def test_a_prefix_that_does_not_fit():
    model, params, _ = make("llama")
    empty = tx.init_cache(model.cfg, 1, 8)
    _, prefix = tx.prefill(model, params, tx.pad_prompts([PREFIX]), empty)
    two = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), prefix)
    for cache, new, text in (
        (two, 1, "prefix holds 2 rows, tokens 3: it must have one for all, or one for each"),
        (prefix, 185, "a prompt of 9 tokens after 7 of the prefix and max_new_tokens=185 exceed max_len=200; ask for"),
    ):
        with pytest.raises(InputError, match="^" + re.escape(text)):
            generate("llama", prefix=cache, max_new_tokens=new)


@pytest.mark.parametrize("n_slots", [4, 7, 30])
def test_resizing_a_cache_keeps_the_last_tokens(n_slots):
    model, params, _ = make("llama")
    _, cache = tx.prefill(model, params, tx.pad_prompts(PROMPTS), tx.init_cache(model.cfg, 3, 12))
    layers = tuple(tx.LayerCache(k[..., ::-1], v[:, :, ::-1]) for k, v in cache.layers)
    cache = tx.Cache(layers, cache.positions[:, ::-1])  # the newest first: of two in one slot the last is written
    resized = tx.resize_cache(cache, n_slots, batch_size=6)
    for b, prompt in enumerate(PROMPTS):
        kept = range(max(len(prompt) - n_slots, 0), len(prompt))
        for row in (2 * b, 2 * b + 1):
            assert sorted(p for p in resized.positions[row].tolist() if p >= 0) == [*kept]
            for p in kept:
                np.testing.assert_array_equal(
                    resized.layers[1].k[row, ..., p % n_slots], cache.layers[1].k[b, ..., 11 - p]
                )
                np.testing.assert_array_equal(resized.layers[1].v[row, :, p % n_slots], cache.layers[1].v[b, :, 11 - p])
    with pytest.raises(InputError, match=r"^batch_size=4 must be a multiple of the cache's 3 rows$"):
        tx.resize_cache(cache, 12, batch_size=4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_long_prompt_is_read_in_chunks(name, monkeypatch):
    given = [[*range(10), *range(10)], [4, 2], [*range(9)]]
    whole = generate(name, given)
    for where in (prompts, module):
        monkeypatch.setattr(where, "CHUNK", 4)
    module._generate.clear_cache()
    text = str(jax.make_jaxpr(lambda: generate(name, given).tokens)())
    assert not re.search(r"f32\[3,20,30\]", text)  # no hidden vectors of all its tokens
    chunked = generate(name, given)
    module._generate.clear_cache()
    np.testing.assert_array_equal(chunked.tokens, whole.tokens)
    np.testing.assert_allclose(chunked.log_probs, whole.log_probs, atol=1e-3)


PARTS = [b"a", b"b", b"ab", b"ba", b"", b"aab", b"c", b"bc", "é".encode(), "é".encode()[:1], "é".encode()[1:]]


@settings(deadline=None)
@given(
    st.lists(st.text("abcé", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, len(PARTS) - 1), max_size=12),
)
def test_a_text_stops_with_the_token_that_completes_a_stop_string(stops, ids):
    machine = tx.stop_at(stops, PARTS)
    state, text = jnp.zeros(1, int), b""
    for i in ids:
        assert (machine.keep(jnp.zeros((1, len(PARTS))), state) == 0).all()
        state, text = machine.step(state, jnp.array([i])), text + PARTS[i]
        assert bool(machine.final[state[0]]) == any(stop.encode() in text for stop in stops)


@pytest.mark.parametrize("stops", [["ab"], ["ba", "cc"], ["aabab"]])
def test_generation_stops_at_strings(stops):
    """Each row for itself, as its free text says; and the loop with the last row."""
    free = np.asarray(generate("llama", max_new_tokens=40).tokens)
    machine = tx.stop_at(stops, PARTS)
    expected = []
    for row in free:
        texts = [b"".join(PARTS[i] for i in row[: n + 1]) for n in range(40)]
        expected.append(next((n + 1 for n, text in enumerate(texts) if any(s.encode() in text for s in stops)), 40))
    result = generate("llama", max_new_tokens=40, automaton=machine)
    assert result.lengths.tolist() == expected
    for row, other, n in zip(free, np.asarray(result.tokens), expected, strict=True):
        np.testing.assert_array_equal(row[:n], other[:n])
    assert min(expected) < 40


def test_an_automaton_says_what_may_come():
    """A table of two states that takes even and odd ids in turn, from a start for each row."""
    even = np.arange(V) % 2 == 0
    table = np.stack([np.where(even, 1, -1), np.where(even, -1, 0)])
    machine = machines.from_table(table, np.zeros(2, bool), start=[0, 1, 0])
    assert machine.table.shape == (2, 2)
    tokens = np.asarray(generate("llama", automaton=machine, sampler=HOT, key=jax.random.key(0)).tokens)
    np.testing.assert_array_equal(tokens % 2, [[(i + b) % 2 for i in range(NEW)] for b in (0, 1, 0)])


def test_ids_beyond_the_tokenizer_do_not_come():
    """Some models have more vectors than their tokenizer has tokens."""
    machine = tx.stop_at(["z"], PARTS[:6])
    free, held = (np.asarray(generate("llama", max_new_tokens=40, automaton=a).tokens) for a in (None, machine))
    assert free.max() > 5
    assert held.max() <= 5


@pytest.mark.parametrize(("stops", "text"), [([], "stops=[] must be a list"), ("ab", "stops='ab' must be a list"),
                                             (["a", ""], "stops=['a', ''] holds an empty text")])  # fmt: skip
def test_refused_stops(stops, text):
    with pytest.raises(InputError, match="^" + re.escape(text)):
        tx.stop_at.__wrapped__(stops, PARTS)


RULED = Sampler(temperature=1.3, repetition_penalty=1.5, no_repeat_ngram=3, frequency_penalty=0.3, forbidden=[6])


def test_a_stream_is_generate_with_every_rule_and_ends_with_the_last_row():
    model, params, _ = make("llama")
    how = {"sampler": RULED._replace(min_new_tokens=3), "key": jax.random.key(4), "eos_id": (1, 2)}
    whole = generate("llama", **how, max_new_tokens=40)
    streamed = np.stack([*tx.stream(model, params, *tx.pad_prompts(PROMPTS), max_new_tokens=40, **how)], axis=1)
    n = int(whole.lengths.max())
    assert streamed.shape == (3, n)
    assert 3 < n < 40
    assert int(whole.lengths.min()) > 3
    np.testing.assert_array_equal(streamed, whole.tokens[:, :n])
    assert not (streamed == 6).any()


def test_a_session_writes_by_rules_of_its_whole_text():
    model, params, _ = make("llama")
    text, key = PREFIX + PROMPTS[0], jax.random.key(4)
    logits, held = session.read(model, params, session.start(model), PREFIX)
    logits, held = session.read(model, params, held, text)
    written = session.write(model, params, logits, held, max_new_tokens=NEW, sampler=RULED, key=key)
    expected = generate("llama", [text], sampler=RULED, key=key).tokens[0]
    assert [token for token, _ in written] == expected.tolist()


@pytest.mark.parametrize("n_rows", [1, 3])
def test_no_step_transposes_or_copies_the_cache(n_rows):
    """In what XLA compiled, for 211 slots: a cache is copied where the loop begins, once, and nowhere else."""
    cfg, n_slots = replace(CONFIGS["llama"], d_model=64, n_heads=4, n_kv_heads=2, d_head=16, max_len=300), 211
    model = tx.build(cfg)
    params, logits = tx.init_params(model, jax.random.key(0)), jnp.zeros((n_rows, cfg.vocab_size))
    cache = tx.init_cache(cfg, n_rows, n_slots)
    text = jax.jit(tx.decode, static_argnums=(0, 4)).lower(model, params, logits, cache, 8).compile().as_text()
    shapes = re.findall(r"= f32\[(\S+?)\]\S* (?:copy|transpose)\(", text)
    moved = [shape for shape in (tuple(map(int, shape.split(","))) for shape in shapes) if n_slots in shape]
    large = [shape for shape in moved if np.prod(shape) >= cache.layers[0].k.size]
    assert len(large) <= 2 * cfg.n_layers
