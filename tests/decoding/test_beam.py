"""Law 8: one beam is greedy, many beams are exhaustive search, and what lies between is a search in plain Python."""

import functools
import itertools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import InputError, ModelConfig
from tx_jax.decoding import beam as module
from tx_jax.decoding import prompts

V, NEW, EOS = 11, 13, 2
QUICK = {"xla_backend_optimization_level": 0}  # halves the time to compile, which is nearly all of the time
LLAMA = ModelConfig(
    vocab_size=V, n_layers=1, n_heads=4, n_kv_heads=2, d_head=6, d_model=30, max_len=200, tie_head=False,
)  # fmt: skip
CONFIGS = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, window=3, positions="sinusoidal"),  # the cache goes round
    "vaswani": replace(
        LLAMA, positions="sinusoidal", norm="rmsnorm", stack="encoder_decoder", n_layers=2, n_encoder_layers=1
    ),
    "four": replace(LLAMA, vocab_size=4),
}
SEEDS = {"llama": 8, "mistral": 8, "vaswani": 1, "four": 4}  # of parameters whose best texts end soon, late and never
PROMPTS = [[3, 1, 4, 1, 5], [9], [10, 6, 5, 3, 5, 8, 9, 7, 10]]
SOURCES = [[7, 7, 1], [3, 3, 4, 5, 6], [8]]


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(prompts, "BUCKET", 4)  # so that a window's cache has fewer slots than there are tokens


@functools.cache
def make(name, seed=None):
    """The model, and parameters so large that its choices differ from step to step."""
    model, rng = tx.build(CONFIGS[name]), np.random.default_rng(SEEDS[name] if seed is None else seed)
    shapes = jax.eval_shape(lambda: tx.init_params(model, jax.random.key(0)))

    def draw(path, leaf):
        return rng.normal(float(path[-1].key == "scale"), 0.35, leaf.shape).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def encode(model, params, source, positions):
    return model.apply({"params": params}, source, positions, method="encode")


def memory_of(name, sources=SOURCES, **more):
    model, params = make(name, **more)
    return encode(model, params, *tx.pad_prompts(sources)) if name == "vaswani" else None


@functools.partial(jax.jit, static_argnums=(0, 6), compiler_options=QUICK)
def compiled(model, params, tokens, positions, memory, length_penalty, options):
    more = {"max_new_tokens": NEW, "eos_id": EOS, **dict(options)}
    return tx.beam_search(model, params, tokens, positions, memory=memory, length_penalty=length_penalty, **more)


def search(name, prompts=PROMPTS, memory=None, length_penalty=0.6, **options):
    memory = memory_of(name) if memory is None else memory
    rules = tuple(options.items())
    return jax.tree.map(
        np.asarray, compiled(*make(name), *tx.pad_prompts(prompts), memory, float(length_penalty), rules)
    )


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def forward(model, params, tokens, positions, **memory):
    return model.apply({"params": params}, tokens, positions, method="decode" if memory else None, **memory)[0]


def whole_forwards(name, row, n_rows, prompts=PROMPTS, new=NEW):
    """A function of texts, of at most n_rows, to the log-probabilities of what follows: no cache, a memory a row."""
    (model, params), prompt = make(name), prompts[row]
    repeat = functools.partial(jax.tree.map, lambda leaf: np.repeat(leaf[row : row + 1], n_rows, axis=0))
    memory = {"memory": repeat(memory_of(name))} if name == "vaswani" else {}

    def log_probs(texts):
        rows = [[*prompt, *text] for text in texts]
        rows += [[0] * (len(prompt) + new)] * (n_rows + 1 - len(rows))  # one shape for all steps
        tokens, positions = tx.pad_prompts(rows)
        logits = np.asarray(forward(model, params, tokens[:-1], positions[:-1], **memory), np.float64)
        last = np.stack([logits[i, len(prompt) + len(text) - 1] for i, text in enumerate(texts)])
        return last - np.log(np.exp(last - last.max(-1, keepdims=True)).sum(-1, keepdims=True)) - last.max(-1)[:, None]

    return log_probs


PENALTIES = {"gnmt": lambda n, alpha: ((5 + n) / 6) ** alpha, "plain": lambda n, alpha: n**alpha}


def allowed(text, token, ends, min_new_tokens=0, no_repeat_ngram=0, forced=(), forbidden=()):
    n, longer = no_repeat_ngram, (*text, token)
    grams = [longer[i : i + n] for i in range(len(longer) - n + 1)] if n else []
    return not (
        (token in ends and len(text) < min_new_tokens)
        or (len(grams) > len(set(grams)))
        or (len(text) < len(forced) and token != forced[len(text)])
        or token in forbidden
    )


def reference(log_probs, alpha, n_beams=4, n_best=1, eos_id=EOS, penalty="gnmt", early_stopping=False, **rules):
    """Beam search in plain Python: (score, log-probability, text), the best first. It never stops by a bound."""
    ends = eos_id if isinstance(eos_id, tuple) else (eos_id,)
    live, finished = [(0.0, ())], []
    for step in range(1, NEW + 1):
        following = log_probs([text for _, text in live])
        candidates = sorted(
            ((total + more[token], (*text, token)) for (total, text), more in zip(live, following, strict=True)
             for token in range(V) if allowed(text, token, ends, **rules)),
            reverse=True,
        )  # fmt: skip
        finished += [
            (total / PENALTIES[penalty](len(text), alpha), total, text)
            for total, text in candidates[:n_beams] if text[-1] in ends or step == NEW
        ]  # fmt: skip
        live = [(total, text) for total, text in candidates if text[-1] not in ends][:n_beams]
        if (early_stopping or n_beams == 1) and len(finished) >= n_beams:
            return sorted(finished, reverse=True)[:n_best]
        if not live:
            break
    return sorted(finished, reverse=True)[:n_best]


def assert_found(found, row, expected, n_best, fill):
    texts = [text for _, _, text in expected]
    n = len(texts)
    assert [tuple(found.tokens[row, i, : found.lengths[row, i]]) for i in range(n)] == texts
    np.testing.assert_allclose(found.scores[row, :n], [score for score, _, _ in expected], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.log_probs[row, :n], [total for _, total, _ in expected], rtol=1e-4, atol=1e-4)
    assert (found.scores[row, n:n_best] == -np.inf).all()  # there are no more
    assert (found.log_probs[row, n:n_best] == -np.inf).all()
    assert (found.lengths[row, n:n_best] == 0).all()
    after = np.arange(found.tokens.shape[-1]) >= found.lengths[row][:, None]
    assert (found.tokens[row][after] == fill).all()


@functools.cache
def all_texts(row):
    """Every text of up to four tokens of four, with its log-probability."""
    log_probs = whole_forwards("four", row, 64, [[3, 1], [0]], new=3)
    following = {text: log_probs([text])[0] for n in range(4) for text in itertools.product((0, 1, 3), repeat=n)}
    ended = [(*text, EOS) for text in following]
    whole = list(itertools.product((0, 1, 3), repeat=4))
    return [(sum(following[text[:i]][token] for i, token in enumerate(text)), text) for text in ended + whole]


@pytest.mark.parametrize(
    ("penalty", "early_stopping", "n_best"),
    [("gnmt", True, 128), ("gnmt", False, 5), ("plain", True, 5), ("plain", False, 128)],
)
def test_with_room_for_all_it_is_exhaustive_search(penalty, early_stopping, n_best):
    """1 + 3 + 9 + 27 texts that end and 81 that do not: 121, of which none is lost among 128 beams."""
    options = {"n_beams": 128, "n_best": n_best, "early_stopping": early_stopping, "penalty": penalty}
    for alpha in (-0.5, 0.0, 0.6, 1.5):
        found = search("four", [[3, 1], [0]], length_penalty=alpha, max_new_tokens=4, **options)
        for row in range(2):
            expected = sorted(
                ((total / PENALTIES[penalty](len(text), alpha), total, text) for total, text in all_texts(row)),
                reverse=True,
            )
            assert len(expected) == 121
            assert np.diff([score for score, _, _ in expected]).max() < -1e-5  # so that rounding ranks none differently
            assert_found(found, row, expected[:n_best], n_best, EOS)
        assert (found.scores == found.log_probs).all() == (alpha == 0)


CASES = [  # (model, options)
    *itertools.product(["llama", "vaswani"], [{"n_best": 2, "early_stopping": early} for early in (True, False)]),
    ("mistral", {"penalty": "plain", "n_best": 3, "no_repeat_ngram": 20}),  # longer than any text
    ("mistral", {"early_stopping": False, "penalty": "plain", "eos_id": (7, EOS, 0), "n_best": 3}),
    ("vaswani", {"min_new_tokens": 5, "n_best": 3, "early_stopping": True}),
    ("vaswani", {"no_repeat_ngram": 2, "n_best": 3, "early_stopping": False}),
    ("llama", {"no_repeat_ngram": 1, "n_best": 3, "early_stopping": False}),
    ("llama", {"forced": (3, 5), "n_best": 3, "early_stopping": True}),
    ("vaswani", {"forbidden": (1, 4, 10), "n_best": 3, "eos_id": (EOS, 6), "early_stopping": True}),
    ("vaswani", {"no_repeat_ngram": 3, "forced": (4,), "forbidden": (1,), "min_new_tokens": 4, "n_best": 3}),
    ("llama", {"forbidden": (0, 1, 3, 4, 6, 7, 8, 9, 10), "no_repeat_ngram": 2, "n_best": 3}),  # few texts exist
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_it_is_the_search_in_plain_python(name, options):
    ends = options.get("eos_id", EOS)
    for alpha in (0.0, 0.6, 2.0, -1.0):
        found = search(name, n_beams=3, length_penalty=alpha, **options)
        for row in range(3):
            expected = reference(whole_forwards(name, row, 3), alpha, n_beams=3, **options)
            assert_found(found, row, expected, options["n_best"], ends[0] if isinstance(ends, tuple) else ends)


@pytest.mark.parametrize("name", ["vaswani", "llama"])
def test_one_beam_is_greedy(name):
    """A thousand sentences of an encoder-decoder, and a thousand ragged prompts."""
    rng, lengths = np.random.default_rng(0), []
    for i in range(10):
        model, params = make(name, seed=i // 2)
        prompts, sources = ([rng.integers(V, size=n).tolist() for n in rng.integers(1, 8, 100)] for _ in range(2))
        prompt = tx.pad_prompts([*prompts[1:], [3] * 7])
        memory = memory_of(name, [*sources[1:], [3] * 7], seed=i // 2)
        expected = tx.generate(model, params, *prompt, max_new_tokens=NEW, eos_id=EOS, memory=memory)
        found = compiled(model, params, *prompt, memory, [0.0, 0.6, 1.0, 3.0, -2.0][i % 5], (("n_beams", 1),))
        np.testing.assert_array_equal(found.tokens[:, 0], expected.tokens)
        np.testing.assert_array_equal(found.lengths[:, 0], expected.lengths)
        lengths += found.lengths[:, 0].tolist()
    assert len(lengths) == 1000
    assert len({*lengths}) >= 10


@pytest.mark.parametrize("name", ["llama", "vaswani"])
def test_options_matter(name):
    """The tests above would say nothing if all of these gave one answer."""
    found = [
        search(name, n_beams=3, n_best=2, early_stopping=early, length_penalty=alpha)
        for early in (True, False) for alpha in (0.0, 2.0)
    ]  # fmt: skip
    assert len({str(result.tokens) for result in found}) >= 3
    assert len({n for result in found for n in result.lengths.flat}) >= 3
    greedy = search(name, n_beams=1)
    assert (found[0].tokens[:, 0] != greedy.tokens[:, 0]).any()


@pytest.mark.parametrize("name", ["vaswani", "mistral"])
def test_a_sentence_in_a_batch_is_that_sentence_alone_in_any_order(name):
    options = {"n_beams": 3, "n_best": 3, "penalty": "plain"}
    together, memory = search(name, **options), memory_of(name)
    for row in range(3):
        part = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], memory)
        alone = search(name, PROMPTS[row : row + 1], part, **options)
        jax.tree.map(lambda one, other, row=row: assert_same(one[0], other[row]), alone, together)
    order = np.array([2, 0, 1])
    permuted = search(name, [PROMPTS[i] for i in order], jax.tree.map(lambda leaf: leaf[order], memory), **options)
    jax.tree.map(lambda one, other: assert_same(one, other[order]), permuted, together)


def assert_same(one, other):
    if one.dtype == np.int32:
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def test_padding_of_the_source_and_of_the_prompt_has_no_effect_at_all():
    model, params = make("vaswani")
    results = []
    for garbage in (0, 9):
        (source, at), (tokens, positions) = tx.pad_prompts(SOURCES), tx.pad_prompts(PROMPTS)
        memory = encode(model, params, jnp.where(at < 0, garbage, source), at)
        tokens = jnp.where(positions < 0, garbage, tokens)
        results.append(compiled(model, params, tokens, positions, memory, 0.6, (("n_best", 4),)))
    jax.tree.map(np.testing.assert_array_equal, *results)


def shapes_in(jaxpr):
    """Of every value of a program and of all programs in it; and of what its loops carry."""
    values, carried = set(), set()
    for eqn in jaxpr.eqns:
        values |= {(tuple(v.aval.shape)) for v in (*eqn.invars, *eqn.outvars)}
        if eqn.primitive.name == "while":
            carried |= {tuple(v.aval.shape) for v in eqn.outvars}
        for inner in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                more = shapes_in(inner)
                values, carried = values | more[0], carried | more[1]
    return values, carried


def test_the_memory_of_a_sentence_serves_its_beams_and_is_never_copied():
    """No value of B · n_beams rows has the source's length, and no loop carries one that has."""
    B, S, n = 3, 53, 5
    model, params = make("vaswani")
    memory = memory_of("vaswani", [[3] * S] * B)
    jaxpr = jax.make_jaxpr(
        lambda memory: tx.beam_search(
            model, params, np.ones((B, 1), np.int32), max_new_tokens=NEW, eos_id=EOS, n_beams=n, memory=memory
        )
    )(memory)
    values, carried = shapes_in(jaxpr.jaxpr)
    with_source = {shape for shape in values if S in shape}
    assert {(B, 2, 6, S), (B, 2, S, 6)} <= with_source  # keys and values as they came
    assert (B, 2, 2, 1, S) in with_source  # the scores of one beam of each sentence
    assert {(B * n, 2, 6, 16), (B * n, 2, 16, 6)} <= carried  # the cache of self-attention
    assert {shape[0] for shape in with_source} <= {1, B, S}
    assert max(np.prod(shape) for shape in with_source) == B * S * 2 * 6
    assert not any(S in shape for shape in carried)


def test_a_memory_that_does_not_fit_is_refused():
    model, params = make("vaswani")
    memory, prompt = memory_of("vaswani"), np.ones((6, 1), np.int32)
    for call in (tx.generate, tx.beam_search):
        with pytest.raises(
            InputError, match=r"^memory holds 3 sources, tokens 6 rows; encode one source for each row$"
        ):
            call(model, params, prompt, max_new_tokens=1, memory=memory, eos_id=1)
    with pytest.raises(InputError, match=r"^memory holds 3 rows, x 4: x must have as many, or a multiple; encode one"):
        model.apply({"params": params}, jnp.ones((4, 1), int), memory=memory, method="decode")


def test_a_memory_serves_the_rows_of_each_sentence_in_turn():
    """Six rows over three sources, two each: as with a memory of six rows, for one query, few and many blocks."""
    model, params = make("vaswani")
    memory = memory_of("vaswani")
    for T in (1, 3, 70):
        tokens, positions = np.random.default_rng(T).integers(V, size=(6, T)), np.tile(np.arange(T), (6, 1))
        short, long = (
            forward(model, params, tokens, positions, memory=source)
            for source in (memory, jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), memory))
        )
        np.testing.assert_allclose(short, long, rtol=0, atol=1e-4)


def test_a_new_length_penalty_or_prompt_length_compiles_nothing(monkeypatch):
    monkeypatch.setattr(prompts, "BUCKET", 64)
    model, params = make("llama")

    def call(length, alpha, **more):
        prompt = np.ones((2, length), np.int32)
        tx.beam_search(model, params, prompt, max_new_tokens=5, eos_id=EOS, length_penalty=alpha, n_beams=2, **more)

    call(3, 0.6)
    before = module._search._cache_size()
    call(64, 1)
    call(2, jnp.float32(-2.5))
    assert module._search._cache_size() == before
    call(2, 1.0, n_best=2)  # what is counted can change
    assert module._search._cache_size() == before + 1


def test_inside_jit_and_vmap():
    model, params = make("llama")
    prompts = jnp.array([PROMPTS[2:] * 2, [PROMPTS[2][::-1]] * 2])

    def call(tokens):
        return tx.beam_search(model, params, tokens, max_new_tokens=NEW, eos_id=EOS, n_best=2)

    one = [call(tokens) for tokens in prompts]
    both = jax.jit(jax.vmap(call))(prompts)
    for i in range(2):
        jax.tree.map(lambda one, other, i=i: assert_same(np.asarray(one), np.asarray(other[i])), one[i], both)


REFUSED = [  # (a change of the arguments, the error)
    ({"tokens": np.array([[3, V]])}, f"tokens holds id {V}; the vocabulary is 0 … {V - 1}"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ({"n_beams": 0}, "n_beams=0 must be at least 1, which is greedy"),
    ({"n_best": 0}, "n_best=0 must be from 1 to n_beams=4; ask for fewer or search wider"),
    ({"n_best": 5}, "n_best=5 must be from 1 to n_beams=4; ask for fewer or search wider"),
    ({"penalty": "wu"}, "penalty='wu' is not one of gnmt, plain"),
    ({"length_penalty": np.nan}, "length_penalty=nan must be one finite number; 0 is none"),
    ({"length_penalty": np.ones(2)}, "length_penalty=[1. 1.] must be one finite number; 0 is none"),
    ({"min_new_tokens": 2}, "min_new_tokens=2 must be from 0 to below max_new_tokens=2; one is the end"),
    ({"min_new_tokens": -1}, "min_new_tokens=-1 must be from 0 to below max_new_tokens=2; one is the end"),
    ({"no_repeat_ngram": -1}, "no_repeat_ngram=-1 must be at least 0; 0 leaves it out"),
    ({"eos_id": ()}, "eos_id=() must hold at least one id; give the one that ends a text"),
    ({"eos_id": V}, f"eos_id holds id {V}; the vocabulary is 0 … {V - 1}"),
    ({"eos_id": (1, -1)}, f"eos_id holds id -1; the vocabulary is 0 … {V - 1}"),
    ({"forced": (1, V)}, f"forced holds id {V}; the vocabulary is 0 … {V - 1}"),
    ({"forbidden": [-1]}, f"forbidden holds id -1; the vocabulary is 0 … {V - 1}"),
    ({"forced": [1, EOS]}, f"forced holds id {EOS}, which eos_id holds too: nothing follows an end; leave it out"),
    ({"forbidden": [EOS]}, f"forbidden holds id {EOS}, which eos_id holds too: a text must be able to end"),
    ({"forced": [4], "forbidden": [3, 4]}, "forced holds id 4, which forbidden holds too: take it out of one"),
    ({"forced": [1, 3, 5]}, "forced holds 3 ids, max_new_tokens=2; force fewer or raise it"),
    ({"forced": [1, 1], "no_repeat_ngram": 1}, "forced=(1, 1) repeats 1 tokens, no_repeat_ngram=1; change one"),
    ({"memory": tx.init_cache(LLAMA, 1, 2)}, "memory is for an encoder-decoder; a decoder-only model"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_refused_arguments(change, text):
    """`__wrapped__`: as without the check of the annotations, which only tests turn on."""
    arguments = {"tokens": np.array([[3, 1]]), "max_new_tokens": 2, "eos_id": EOS} | change
    with pytest.raises(InputError, match="^" + re.escape(text)):
        tx.beam_search.__wrapped__(*make("llama"), **arguments)


@pytest.mark.parametrize("n_beams", [None, 3])
def test_no_step_transposes_or_copies_the_memory(n_beams):
    """In what XLA compiled, for keys of 67 tokens: the loop moves nothing so large that has an axis of 67."""
    S, cfg = 67, replace(CONFIGS["vaswani"], n_heads=4, d_model=64, d_head=16)
    model = tx.build(cfg)
    params = tx.init_params(model, jax.random.key(0))
    memory = model.apply({"params": params}, jnp.ones((5, S), int), method="encode")

    def call(params, memory):
        more = {"max_new_tokens": NEW, "memory": memory}
        if n_beams is None:
            return tx.generate(model, params, jnp.ones((5, 1), int), **more)
        return tx.beam_search(model, params, jnp.ones((5, 1), int), eos_id=EOS, n_beams=n_beams, **more)

    text = jax.jit(call).lower(params, memory).compile().as_text()
    shapes = re.findall(r"= f32\[(\S+?)\]\S* (?:copy|transpose)\(.*while/body", text)
    moved = [shape for shape in (tuple(map(int, shape.split(","))) for shape in shapes) if S in shape]
    assert "while/body" in text
    assert not [shape for shape in moved if np.prod(shape) >= memory.layers[0].k.size]


class Sure(tx.DecoderLM):
    """As much of a model as a search asks for: 0.97 of each step is one token, which depends on its place alone."""

    def apply(self, params, x, positions=None, *, cache=None, method):
        V, text = self.cfg.vocab_size, jnp.asarray(SURE, jnp.float32)
        if method == "logits":
            return jnp.log(0.03 / V + 0.97 * jax.nn.one_hot(x[..., 0].astype(int), V))
        last = jnp.maximum(cache.positions, positions.max(axis=1, keepdims=True))
        return text[jnp.clip(positions, 0, len(SURE) - 1)][..., None], cache._replace(positions=last)


SURE = [3, 4, 5, 3, 4, 5, EOS]


def test_where_a_model_is_sure_early_stopping_stops_too_early():
    """The end is among the four likeliest of each step, so that four bad texts have soon finished."""
    model = Sure(ModelConfig(vocab_size=6, d_model=8, n_heads=1, n_layers=1))
    more = {"max_new_tokens": 12, "eos_id": EOS}
    found = [tx.beam_search(model, {}, jnp.ones((1, 1), int), early_stopping=early, **more) for early in (True, False)]
    assert found[1].tokens[0, 0, : found[1].lengths[0, 0]].tolist() == SURE
    assert found[0].lengths[0, 0] < len(SURE)
