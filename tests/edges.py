"""Random ids, shapes and configurations: what is right gives what is promised, all else a ValueError in one line.

Run by test_edges.py, in a process where annotations are not checked: as users meet them.
"""

import dataclasses
import json

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from trials import FULL

import tx_jax as tx
from tx_jax.config_json import from_json, to_json
from tx_jax.data.tokenizers import ByteTokenizer, CharTokenizer
from tx_jax.decoding.samplers import check_sampler
from tx_jax.run_config import DataConfig, LoraConfig, MeshConfig, OptimConfig, RunConfig, TrainConfig

V, LONG, NEW = 11, 16, 2
CFG = tx.ModelConfig(vocab_size=V, max_len=LONG, d_model=8, n_layers=1, n_heads=2, positions="learned")
MODEL = tx.build(CFG)
PARAMS = tx.init_params(MODEL, jax.random.key(0))
SHAPES = [(1, 3), (2, 3), (2, 1), (1, LONG - NEW), (1, LONG), (1, LONG + 1), (3,), (), (1, 2, 2), (0, 3), (1, 0)]
DTYPES = [np.int32, np.int32, np.int64, np.uint8, np.int8, np.float32, np.bool_, np.float64, object, np.str_]


def law(function, valid, promise=lambda found: True):
    """`function` keeps its promise if what it is given is valid, and refuses everything else in one line."""
    found, error = tried(function)
    assert valid == (error is None), error or "an invalid input is taken"
    assert error or promise(found)


def tried(function):
    """What function makes, and no error; or None, and why it refuses."""
    try:
        return function(), None
    except ValueError as error:
        told = str(error)
    assert "\n" not in told
    return None, told


def examples(n):
    """So many of a thousand in all, or a twentieth of them."""
    return settings(
        max_examples=n if FULL else max(n // 20, 5),
        derandomize=not FULL,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def ids(draw):
    """Ids as someone may give them."""
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
    bad = draw(st.sampled_from([None, None, None, V, -1, 100, -100, 2**31 - 1]))
    values = np.asarray(draw(st.lists(st.integers(0, V - 1), min_size=64, max_size=64)))[: int(np.prod(shape))]
    if bad is not None and values.size and np.issubdtype(dtype, np.signedinteger):
        values[draw(st.integers(0, values.size - 1))] = bad
    found = values.reshape(shape).astype(dtype)
    ways = [lambda: found, found.tolist] + [lambda: jnp.asarray(found)] * (dtype not in (object, np.str_))
    return draw(st.sampled_from(ways))()


def is_valid(tokens, most):
    """Whether they are (B, T) ids of the vocabulary, T of them at most."""
    told = np.asarray(tokens)
    plain = told.ndim == 2 and told.size and np.issubdtype(told.dtype, np.integer) and told.shape[1] <= most
    return bool(plain and told.min() >= 0 and told.max() < V)


def uses(tokens):
    B, T = np.shape(tokens)[:2] if np.ndim(tokens) > 1 else (1, 1)
    ids_below = lambda shape: lambda found: found.shape == shape and found.min() >= 0 and found.max() < V  # noqa: E731
    finite = lambda shape: lambda found: found.shape == shape and bool(jnp.isfinite(found).all())  # noqa: E731
    new = {"max_new_tokens": NEW}
    return {
        "apply": (lambda: MODEL.apply({"params": PARAMS}, tokens)[0], LONG, finite((B, T, V))),
        "score": (lambda: tx.score(MODEL, PARAMS, tokens), LONG, finite((B, T))),
        "generate": (lambda: tx.generate(MODEL, PARAMS, tokens, **new).tokens, LONG - NEW, ids_below((B, NEW))),
        "speculate": (lambda: tx.speculate(MODEL, PARAMS, tokens, **new).tokens, LONG - NEW, ids_below((B, NEW))),
        "beam_search": (
            lambda: tx.beam_search(MODEL, PARAMS, tokens, eos_id=1, n_beams=2, **new).tokens,
            LONG - NEW,
            ids_below((B, 1, NEW)),
        ),
    }


@pytest.mark.parametrize("name", uses([[0]]))
@examples(80)
@given(tokens=ids())
def test_ids(name, tokens):
    function, most, promise = uses(tokens)[name]
    law(function, is_valid(tokens, most), promise)


@examples(60)
@given(tokens=ids())
def test_perplexity(tokens):
    told = np.asarray(tokens)
    plain = told.ndim == 1 and told.size > 1 and np.issubdtype(told.dtype, np.integer)
    valid = bool(plain and told.min() >= 0 and told.max() < V)
    law(lambda: tx.perplexity(MODEL, PARAMS, tokens), valid, lambda found: np.isfinite(found.perplexity))


@examples(60)
@given(rows=st.lists(st.lists(st.sampled_from([0, 1, 2, -1]), min_size=3, max_size=3), min_size=1, max_size=2))
def test_positions(rows):
    right = ([0, 1, 2], [0, 1, -1], [0, -1, -1])
    valid, tokens = all(row in right for row in rows), np.ones((len(rows), 3), np.int32)
    law(lambda: tx.generate(MODEL, PARAMS, tokens, np.asarray(rows), max_new_tokens=NEW), valid)
    law(lambda: tx.score(MODEL, PARAMS, tokens, np.asarray(rows)), valid)


@examples(60)
@given(prompts=st.lists(st.lists(st.sampled_from([0, 3, 10, 1.5, "a", None]), max_size=3), max_size=3))
def test_prompts(prompts):
    valid = bool(prompts) and all(row and all(type(i) is int for i in row) for row in prompts)

    def promise(found):
        return [[int(i) for i in row[at >= 0]] for row, at in zip(*map(np.asarray, found), strict=True)] == prompts

    law(lambda: tx.pad_prompts(prompts), valid, promise)


@examples(60)
@given(n_slots=st.integers(-1, 9), chunks=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_a_cache_is_never_too_small_unseen(n_slots, chunks):
    tokens = jnp.arange(sum(chunks))[None] % V

    def by_chunks():
        cache, parts = tx.init_cache(CFG, 1, n_slots), []
        for part in jnp.split(tokens, np.cumsum(chunks)[:-1], axis=1):
            logits, cache = MODEL.apply({"params": PARAMS}, part, cache=cache)
            parts.append(logits)
        return jnp.concatenate(parts, axis=1)

    whole = MODEL.apply({"params": PARAMS}, tokens)[0]
    law(by_chunks, n_slots >= sum(chunks), lambda found: np.allclose(found, whole, atol=1e-5))


VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, -1, 0, 1, 2, 3, 8, 64, 10**9, -1.0, 0.0, 0.1, 0.5, 1.0, 2.0, 1e30, "", "x", [], {}]
    ),
    st.sampled_from([float("nan"), float("inf"), float("-inf"), "rotary", "learned", "swiglu", "rmsnorm", "bfloat16"]),
    st.sampled_from(["encoder", "encoder_decoder", "adamw", "muon", "cosine", "bpe", "full", "w", "wf", (), (1,)]),
)


def some_fields(kind):
    return st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(kind)]), VALUES, max_size=3)


@examples(150)
@given(fields=some_fields(tx.ModelConfig))
def test_model_configs(fields):
    cfg, _ = tried(lambda: tx.ModelConfig(**({"vocab_size": V} | fields)))
    if cfg is not None and cfg.n_layers <= 64:
        shapes, _ = tried(lambda: jax.eval_shape(lambda key: tx.init_params(tx.build(cfg), key), jax.random.key(0)))
        assert shapes is None or all(min(leaf.shape, default=1) > 0 for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("kind", [DataConfig, OptimConfig, TrainConfig, MeshConfig, LoraConfig, RunConfig])
@examples(30)
@given(data=st.data())
def test_run_configs(kind, data):
    fields = data.draw(some_fields(kind))
    cfg, _ = tried(lambda: kind(**fields))
    assert cfg is None or from_json(kind, to_json(cfg)) == cfg
    tried(lambda: from_json(kind, json.dumps(fields)))


@examples(90)
@given(name=st.sampled_from(tx.Sampler._fields), value=VALUES)
def test_samplers(name, value):
    sampler = tx.Sampler(**{"temperature": 1.0, name: value})
    if tried(lambda: check_sampler(sampler, V, 1, True))[1] is None:
        how = {"max_new_tokens": NEW, "sampler": sampler, "key": jax.random.key(0)}
        out = tx.generate(MODEL, PARAMS, [[1, 2, 3]], eos_id=1, **how)
        assert out.tokens.min() >= 0
        assert out.tokens.max() < V


@examples(60)
@given(row=st.lists(st.integers(-3, 300), max_size=4))
def test_tokenizers(row):
    for tokenizer in (ByteTokenizer(), CharTokenizer("ab")):
        valid = all(0 <= i < tokenizer.vocab_size for i in row)
        law(lambda tokenizer=tokenizer: tokenizer.decode(np.asarray(row, int)), valid)
