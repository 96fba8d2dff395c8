"""Each rule does to logits what the processor of transformers does, row by row, and so do several in their order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tx_jax as tx
from tx_jax import InputError, Sampler, sample
from tx_jax.decoding.rules import begin_text
from tx_jax.decoding.samplers import OF_TEXT, RULES, as_arrays

V, B, L = 13, 4, 9
ENDS = (2, 5)
NUMBERS = {  # of each rule: several numbers, of which the last leaves everything as it is
    "repetition_penalty": (0.5, 1.3, 4.0, 1.0),
    "no_repeat_ngram": (1, 2, 3, 0),
    "forbidden": ([3], [0, 7, 12], [2, 2], None),
    "min_new_tokens": (1, 4, 5, 0),
    "logit_bias": ({3: 2.0}, {0: -1.5, 12: 100.0}, {5: -100.0}, {4: 0.0}),
    "temperature": (0.3, 1.7, 3.0, 1.0),
    "top_k": (1, 3, 12, V),
    "top_p": (0.1, 0.5, 0.9, 1.0),
    "min_p": (0.02, 0.3, 0.9, 0.0),
    "typical_p": (0.1, 0.5, 0.9, None),
    "epsilon_cutoff": (0.01, 0.1, 0.5, None),
    "eta_cutoff": (0.01, 0.1, 0.5, None),
}
CASES = [(name, value) for name, values in NUMBERS.items() for value in values if value is not None]


def theirs(name, value, n_prompt):
    """The processor of transformers."""
    library = pytest.importorskip("transformers.generation.logits_process")
    made = {
        "repetition_penalty": lambda: library.RepetitionPenaltyLogitsProcessor(float(value)),
        "no_repeat_ngram": lambda: library.NoRepeatNGramLogitsProcessor(value),
        "forbidden": lambda: library.SuppressTokensLogitsProcessor(value),
        "min_new_tokens": lambda: library.MinNewTokensLengthLogitsProcessor(n_prompt, value, list(ENDS)),
        "logit_bias": lambda: library.SequenceBiasLogitsProcessor([[[i], bias] for i, bias in value.items()]),
        "temperature": lambda: library.TemperatureLogitsWarper(float(value)),
        "top_k": lambda: library.TopKLogitsWarper(value),
        "top_p": lambda: library.TopPLogitsWarper(value),
        "min_p": lambda: library.MinPLogitsWarper(value),
        "typical_p": lambda: library.TypicalLogitsWarper(value),
        "epsilon_cutoff": lambda: library.EpsilonLogitsWarper(value),
        "eta_cutoff": lambda: library.EtaLogitsWarper(value),
    }
    if (name, value) in (("no_repeat_ngram", 0), ("min_new_tokens", 0), ("top_p", 1.0), ("min_p", 0.0)):
        return lambda ids, scores: scores  # which transformers refuses, or leaves out
    return made[name]()


def logits_of(seed):
    """Rows without ties, which either library may break in its own way."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, V)) * 3, jnp.float32)


def written(seed, n_prompt=4, n_new=5):
    """The same tokens for both: transformers' array, and a Text."""
    tokens = np.random.default_rng(seed).integers(4, size=(B, n_prompt + n_new))
    positions = jnp.tile(jnp.arange(n_prompt), (B, 1))
    text = begin_text(jnp.asarray(tokens[:, :n_prompt]), positions, n_new + 3, jnp.array(ENDS))
    for i in range(n_prompt, n_prompt + n_new):
        text = text.write(jnp.asarray(tokens[:, i]), jnp.zeros(B, bool))
    return tokens, text


@functools.cache
def compiled(name):
    return jax.jit(lambda logits, value, text: RULES[name](logits, value, text))


def ours(name, value, logits, text):
    (sampler,) = as_arrays(Sampler(**{name: value}), V)
    return np.asarray(compiled(name)(logits, getattr(sampler, name), text))


@pytest.mark.parametrize(("name", "value"), CASES, ids=str)
def test_a_rule_is_the_processor_of_transformers(name, value):
    torch = pytest.importorskip("torch")
    for seed in range(10):
        logits, (tokens, text) = logits_of(seed), written(seed)
        expected = theirs(name, value, 4)(torch.tensor(tokens), torch.tensor(np.asarray(logits))).numpy()
        np.testing.assert_allclose(ours(name, value, logits, text), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_all_rules_in_their_order(seed):
    """As transformers chains them in `generate`; the draw is by what is left."""
    torch = pytest.importorskip("torch")
    rng, (tokens, text) = np.random.default_rng(seed), written(seed)
    chosen = {name: values[rng.integers(3)] for name, values in NUMBERS.items() if name != "forbidden"}
    chosen |= {"top_k": 9, "top_p": 0.95, "min_p": 0.01, "min_new_tokens": 9, "no_repeat_ngram": 2}
    logits = logits_of(seed)
    expected = torch.tensor(np.asarray(logits))
    for name in [name for name in RULES if name in chosen]:
        expected = theirs(name, chosen[name], 4)(torch.tensor(tokens), expected)
    expected = torch.softmax(expected, -1).numpy()
    n = 4000
    rows = np.tile(np.arange(B), n)
    many = jax.tree.map(lambda leaf: leaf[rows], text._replace(ends=None))._replace(ends=text.ends)
    drawn = jax.jit(sample)(logits[rows], as_arrays(Sampler(**chosen), V), jax.random.key(seed), many)
    found = np.stack([np.bincount(np.asarray(drawn)[rows == b], minlength=V) for b in range(B)]) / n
    assert not found[expected == 0].any()
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 0.5 / n**0.5)


def test_several_samplers_apply_in_turn():
    """top_p before the temperature keeps what it would keep at temperature 1."""
    logits = jnp.tile(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), (4000, 1))
    both = (Sampler(top_p=0.6), Sampler(temperature=100.0))
    for sampler, left in ((both, {0, 1}), (both[::-1], {0, 1, 2})):
        drawn = jax.jit(sample)(logits, sampler, jax.random.key(0))
        assert {*np.asarray(drawn).tolist()} == left


@pytest.mark.parametrize("name", [name for name in NUMBERS if name not in ("forbidden", "logit_bias")])
def test_a_number_for_each_row(name):
    values = [value for value in NUMBERS[name] if value is not None]
    values = np.array([values[b % len(values)] for b in range(B)])
    logits, (_, text) = logits_of(1), written(1)
    together = ours(name, values, logits, text)
    for b, value in enumerate(values):
        alone = ours(name, value, logits[b : b + 1], jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], text))
        np.testing.assert_allclose(together[b : b + 1], alone, rtol=1e-6) if name != "min_new_tokens" else None
    if name == "min_new_tokens":
        banned = np.isinf(together)
        np.testing.assert_array_equal(banned.any(1), values > 5)
        np.testing.assert_array_equal(
            ours(name, np.array([6, 0, 5, 9]), logits, text)[:, ENDS[0]] == -np.inf, [1, 0, 0, 1]
        )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=L), st.integers(0, 4), st.integers(0, 5))
def test_no_ngram_comes_twice(row, n, n_prompt):
    """Over two rows of which the second is shorter, so that lengths differ."""
    n_prompt, rows = min(n_prompt, len(row)), [row, row[: len(row) // 2 + 1]]
    tokens = np.array([[*r, *[-1] * (L - len(r))] for r in rows])
    lengths = jnp.array([len(r) for r in rows])
    text = begin_text(jnp.zeros((2, 0), int), jnp.zeros((2, 0), int), L)
    text = text._replace(tokens=jnp.asarray(tokens), n_tokens=lengths, n_prompt=jnp.array([n_prompt] * 2))
    kept = ours("no_repeat_ngram", n, jnp.zeros((2, 3)), text) > -np.inf
    for r, may in zip(rows, kept, strict=True):
        grams = {tuple(r[i : i + n]) for i in range(len(r) - n + 1)} if n else set()
        expected = [n == 0 or (*r[len(r) - n + 1 :], token) not in grams or len(r) < n - 1 for token in range(3)]
        assert may.tolist() == expected


def test_presence_and_frequency_count_what_was_written_but_not_the_prompt():
    logits, (tokens, text) = logits_of(0), written(0)
    counts = np.stack([np.bincount(row[4:], minlength=V) for row in tokens])
    np.testing.assert_allclose(ours("frequency_penalty", 0.7, logits, text), logits - 0.7 * counts, rtol=1e-6)
    np.testing.assert_allclose(ours("presence_penalty", -0.5, logits, text), logits + 0.5 * (counts > 0), rtol=1e-6)


def test_forced_tokens_come_first_and_minus_one_leaves_the_choice():
    logits = logits_of(0)
    for n_new, expected in ((0, 7), (1, None), (2, 4), (3, None)):
        _, text = written(0, n_new=n_new)
        found = ours("forced", [[7, -1, 4]] * B, logits, text)
        if expected is None:
            np.testing.assert_array_equal(found, logits)
        else:
            assert (np.flatnonzero(found[0] > -np.inf) == expected).all()


def test_a_rule_that_leaves_nothing_does_not_apply():
    logits, (_, text) = jnp.zeros((B, 3)), written(0)
    text = text._replace(tokens=jnp.tile(jnp.array([0, 1, 2, 0, 1, 2]), (B, 1)), n_tokens=jnp.full(B, 6))
    token = sample(logits, Sampler(no_repeat_ngram=1, forbidden=[0, 2]), None, text)
    assert token.tolist() == [1] * B  # the second rule applies


def test_temperature_zero_is_greedy_row_by_row():
    logits = jnp.tile(logits_of(3)[:1], (200, 1))
    heat = np.where(np.arange(200) < 100, 0.0, 5.0)
    drawn = np.asarray(sample(logits, Sampler(temperature=heat), jax.random.key(0)))
    assert (drawn[:100] == logits[0].argmax()).all()
    assert len({*drawn[100:].tolist()}) > 5


def test_a_key_for_each_row():
    """A row's draws are those that it has alone."""
    logits, keys, sampler = logits_of(3), jax.random.split(jax.random.key(7), B), Sampler(temperature=2.0)
    together = sample(logits, sampler, keys)
    alone = [int(sample(logits[b : b + 1], sampler, keys[b : b + 1])[0]) for b in range(B)]
    assert together.tolist() == alone


@pytest.mark.parametrize("name", OF_TEXT)
def test_a_rule_about_the_text_needs_one(name):
    value = {"forbidden": [1], "forced": [1], "processor": after_the_last}.get(name, 1)
    with pytest.raises(InputError, match=f"^{name} looks at what was written; give text=begin_text"):
        sample(jnp.zeros((1, V)), Sampler(**{name: value}))


NAN, KEY = float("nan"), {"key": jax.random.key(0)}
REFUSED = [  # (a sampler, other arguments, the error)
    (Sampler(repetition_penalty=0.0), {}, "repetition_penalty=0.0 must be positive; 1 or None leaves it out"),
    (Sampler(repetition_penalty=NAN), {}, "repetition_penalty=nan must be positive; 1 or None leaves it out"),
    (Sampler(presence_penalty=NAN), {}, "presence_penalty=nan must be finite; 0 or None leaves it out"),
    (Sampler(frequency_penalty=np.inf), {}, "frequency_penalty=inf must be finite; 0 or None leaves it out"),
    (Sampler(no_repeat_ngram=-1), {}, "no_repeat_ngram=-1 must be a whole number, at least 0, which leaves it out"),
    (Sampler(no_repeat_ngram=1.5), {}, "no_repeat_ngram=1.5 must be a whole number, at least 0, which leaves it out"),
    (Sampler(min_new_tokens=-1), {"eos_id": 1}, "min_new_tokens=-1 must be a whole number, at least 0"),
    (Sampler(min_new_tokens=2), {}, "min_new_tokens=2 needs an eos_id; give one"),
    (Sampler(temperature=-0.5), KEY, "temperature=-0.5 must be at least 0, which is greedy, and finite"),
    (Sampler(temperature=NAN), KEY, "temperature=nan must be at least 0, which is greedy, and finite"),
    (Sampler(temperature=np.array([1.0, -1])), KEY, "temperature=[ 1. -1.] must be at least 0, which is greedy"),
    (Sampler(temperature=np.ones(3)), KEY, "temperature=[1. 1. 1.] must be one number for all rows, or one for each"),
    (Sampler(temperature=1.0, top_k=0), KEY, "top_k=0 must be a whole number, at least 1; leave it out (None)"),
    (Sampler(temperature=1.0, top_p=0.0), KEY, "top_p=0.0 must be in (0, 1]; leave it out (None) to keep all"),
    (Sampler(temperature=1.0, top_p=1.01), KEY, "top_p=1.01 must be in (0, 1]; leave it out (None) to keep all"),
    (Sampler(temperature=1.0, typical_p=0), KEY, "typical_p=0 must be in (0, 1]; leave it out (None) to keep all"),
    (Sampler(temperature=1.0, epsilon_cutoff=1.0), KEY, "epsilon_cutoff=1.0 must be in [0, 1); leave it out (None)"),
    (Sampler(temperature=1.0, eta_cutoff=0.0), KEY, "eta_cutoff=0.0 must be in (0, 1); leave it out (None)"),
    (Sampler(temperature="hot"), KEY, "temperature=hot must be one number for all rows, or one for each of 2"),
    (Sampler(processor=3), {}, "processor=3 must be a function of (logits, text) that gives logits"),
    (Sampler(typical_p=0.5), {}, "typical_p without a temperature above 0 would be ignored; set one, such as 1.0"),
    (Sampler(forbidden=()), {}, "forbidden=() holds no id; leave it out"),
    (Sampler(forbidden=[V]), {}, f"forbidden holds id [{V}]; the vocabulary is 0 … {V - 1}"),
    (Sampler(forbidden=[-1]), {}, f"forbidden holds id [-1]; the vocabulary is 0 … {V - 1}"),
    (Sampler(forbidden=[0.5]), {}, "forbidden=[0.5] must be a list of ids, or rows of them"),
    (Sampler(forbidden=[*range(V)]), {}, f"forbidden holds all {V} ids of the vocabulary; leave at least one"),
    (Sampler(forced=[[1], [2], [3]]), {}, "forced has 3 rows, the batch 2; give one for each, or one list for all"),
    (Sampler(forced=[99]), {}, f"forced holds id [99]; the vocabulary is 0 … {V - 1}"),
    (Sampler(logit_bias={V: 1.0}), {}, f"logit_bias holds id [{V}]; the vocabulary is 0 … {V - 1}"),
    (Sampler(logit_bias={}), {}, "logit_bias={} holds no id; leave it out"),
    (Sampler(logit_bias=np.zeros(3)), {}, f"logit_bias of shape (3,) must be ({V},), or have a row for each text"),
    (Sampler(temperature=1.0), {"key": jax.random.split(jax.random.key(0), 3)}, "key holds 3 keys; it must be one, or"),
    (Sampler(temperature=1.0), {"key": 7}, "key=7 is no key; give jax.random.key(seed)"),
    (Sampler(), {"n_samples": 0}, "n_samples=0 must be at least 1 a prompt"),
    (Sampler(), {"n_top": V + 1}, f"n_top={V + 1} must be from 0 to {V}, the tokens that"),
]  # fmt: skip


@pytest.mark.parametrize(("sampler", "more", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_refused(sampler, more, text):
    model = tx.build(tx.ModelConfig(vocab_size=V, d_model=8, n_heads=2, n_layers=1))
    with pytest.raises(InputError) as error:
        tx.generate.__wrapped__(model, {}, np.ones((2, 3), np.int32), max_new_tokens=2, sampler=sampler, **more)
    assert str(error.value).startswith(text)


def after_the_last(logits, text, step=1):
    """May be only the id that is `step` above the last one of the text."""
    last = jnp.take_along_axis(text.tokens, text.n_tokens[:, None] - 1, axis=1)
    return jnp.where(jnp.arange(V) == (last + step) % V, logits, -jnp.inf)


def test_a_function_of_ones_own_in_every_way_of_writing():
    model = tx.build(tx.ModelConfig(vocab_size=V, d_model=8, n_heads=2, n_layers=1, max_len=64))
    params, prompts = tx.init_params(model, jax.random.key(0)), [[3, 9], [4, 1, 7]]
    expected = [[(prompt[-1] + 1 + i) % V for i in range(6)] for prompt in prompts]
    prompt, how = tx.pad_prompts(prompts), {"sampler": Sampler(processor=after_the_last), "max_new_tokens": 6}
    assert tx.generate(model, params, *prompt, **how).tokens.tolist() == expected
    assert tx.speculate(model, params, *prompt, **how).tokens.tolist() == expected
    assert np.stack([*tx.stream(model, params, *prompt, **how)], axis=1).tolist() == expected
    assert [w.tokens.tolist() for w in sorted(tx.write_all(model, params, prompts, **how))] == expected
    drawn = how | {"sampler": (Sampler(processor=after_the_last), Sampler(temperature=2.0)), "key": jax.random.key(1)}
    assert tx.generate(model, params, *prompt, **drawn).tokens.tolist() == expected


def test_a_function_that_holds_arrays_compiles_once():
    compiled, text = (
        jax.jit(lambda *given: sample(*given)),
        begin_text(jnp.array([[3], [5]]), jnp.zeros((2, 1), int), 1),
    )
    for step in (1, 2, 5):
        (ruled,) = as_arrays(Sampler(processor=jax.tree_util.Partial(after_the_last, step=jnp.asarray(step))), V)
        assert compiled(jnp.zeros((2, V)), ruled, None, text).tolist() == [3 + step, 5 + step]
    assert compiled._cache_size() == 1


def test_a_function_that_gives_other_shapes():
    text = begin_text(jnp.array([[3]]), jnp.zeros((1, 1), int), 1)
    must = r"; it must give logits, float32\[1, 13\], as it was given$"
    for wrong, gave in (
        (lambda logits, text: logits[:, 0], r"float32\[1\]"),
        (lambda logits, text: logits > 0, r"bool\[1, 13\]"),
        (lambda logits, text: None, "NoneType"),
    ):
        with pytest.raises(InputError, match=f"^processor gave {gave}{must}"):
            sample(jnp.zeros((1, V)), Sampler(processor=wrong), text=text)
