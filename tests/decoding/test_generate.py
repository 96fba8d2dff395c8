"""Laws 7 and 12: generation is a loop of whole forwards, whatever the batch and the cache; nothing compiles twice."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import InputError, ModelConfig, Sampler
from tx_jax.decoding import generate as module
from tx_jax.decoding import prompts

V, NEW, WINDOW = 11, 13, 3
GPT2 = ModelConfig(
    vocab_size=V, n_layers=2, n_heads=4, d_head=6, d_model=30, max_len=200, tie_head=False, positions="learned",
)  # fmt: skip
CONFIGS = {
    "gpt2": GPT2,
    "llama": replace(GPT2, positions="rotary", n_kv_heads=2, mlp="swiglu", norm="rmsnorm"),
    "mistral": replace(GPT2, positions="rotary", n_kv_heads=1, window=WINDOW),
    "vaswani": replace(GPT2, positions="sinusoidal", stack="encoder_decoder"),
}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 10]]
NUMBERS = ("temperature", "top_k", "top_p", "min_p")
SAMPLED = Sampler(temperature=1.5)
KEY = jax.random.key(5)


@functools.cache
def make(name):
    """The model, large parameters, and keyword arguments: an encoder-decoder's memory of ragged sources."""
    model = tx.build(CONFIGS[name])
    params = jax.tree.map(lambda leaf: leaf if leaf.ndim < 2 else 20 * leaf, tx.init_params(model, jax.random.key(1)))
    if name != "vaswani":
        return model, params, {}
    memory = model.apply({"params": params}, *tx.pad_prompts([[7, 7, 1], [2, 3, 4, 5, 6], [8]]), method="encode")
    return model, params, {"memory": memory}


def generate(name, prompts=PROMPTS, rows=slice(None), **more):
    model, params, memory = make(name)
    more = {"max_new_tokens": NEW} | jax.tree.map(lambda leaf: leaf[rows], memory) | more
    return tx.generate(model, params, *tx.pad_prompts(prompts[rows]), **more)


@functools.cache
def greedy(name):
    """NEW tokens a row, each the likeliest after a whole forward over all before it, without a cache."""
    model, params, memory = make(name)
    method = "decode" if memory else None
    forward = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs, **memory, method=method)[0])
    rows = [list(prompt) for prompt in PROMPTS]
    for _ in range(NEW):
        tokens, positions = tx.pad_prompts([*rows, [0] * (len(PROMPTS[-1]) + NEW)])  # one length for all steps
        logits = np.asarray(forward(tokens[:-1], positions[:-1]))
        for b, row in enumerate(rows):
            row.append(int(logits[b, len(row) - 1].argmax()))
    return np.array([row[-NEW:] for row in rows])


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_the_likeliest_after_a_whole_forward(name, monkeypatch):
    monkeypatch.setattr(prompts, "BUCKET", 4)  # so that the ring of a window has fewer slots than there are tokens
    result = generate(name)
    np.testing.assert_array_equal(result.tokens, greedy(name))
    assert len(np.unique(greedy(name))) > 3
    assert result.lengths.tolist() == [NEW] * 3
    slots = {True: 12 + WINDOW - 1, False: 12 + NEW}[name == "mistral"]
    assert result.cache.positions.shape == (3, slots)
    held = [len(prompt) + NEW - 1 for prompt in PROMPTS]  # all tokens but the last
    np.testing.assert_array_equal(result.cache.next_positions(), held)


@pytest.mark.parametrize("name", ["mistral", "vaswani"])
def test_a_prompt_in_a_batch_is_that_prompt_alone(name):
    alone = [generate(name, rows=slice(b, b + 1)).tokens[0] for b in range(3)]
    np.testing.assert_array_equal(alone, greedy(name))


def test_sampling_is_a_function_of_the_key_and_rules_that_keep_all_change_nothing():
    everything = SAMPLED._replace(top_k=V, top_p=1.0, min_p=0.0)
    draws = [
        (KEY, SAMPLED),
        (KEY, SAMPLED),
        (KEY, everything),
        (jax.random.key(6), SAMPLED),
        (KEY, everything._replace(top_k=1)),
    ]
    one, again, whole, other, top_1 = (
        np.asarray(generate("llama", key=key, sampler=sampler).tokens) for key, sampler in draws
    )
    assert (one == again).all()
    assert (one == whole).all()
    assert (one != other).any()
    assert (top_1 == greedy("llama")).all()


@pytest.mark.parametrize("eos_id", range(V))
def test_a_row_ends_with_its_eos_and_the_loop_with_the_last_row(eos_id):
    result, free = generate("llama", eos_id=eos_id), greedy("llama")
    ends = [list(row).index(eos_id) + 1 if eos_id in row else NEW for row in free]
    expected = np.where(np.arange(NEW) < np.array(ends)[:, None], free, eos_id)
    np.testing.assert_array_equal(result.tokens, expected)
    assert result.lengths.tolist() == ends
    held = [len(prompt) + end - 1 for prompt, end in zip(PROMPTS, ends, strict=True)]
    assert result.cache.next_positions().tolist() == held  # all but a row's last token, whenever the others end


def test_eos_outside_of_the_vocabulary():
    with pytest.raises(InputError, match=rf"^eos_id={V} must be from 0 to {V - 1}$"):
        generate("llama", eos_id=V)
    model, params, _ = make("llama")
    with pytest.raises(InputError, match=rf"^eos_id={V} must be from 0 to {V - 1}$"):
        tx.stream(model, params, np.ones((1, 2), int), max_new_tokens=2, eos_id=(1, V))


def test_a_prompt_of_chunks_is_held_to_the_slots(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)  # each of which would fit
    model, params, _ = make("llama")
    prompt, cache = tx.pad_prompts([[1] * 8]), tx.init_cache(model.cfg, 1, 6)
    with pytest.raises(
        InputError, match=r"^a prompt of 8 tokens exceeds the 6 slots of the cache; make it by n_slots=8"
    ):
        tx.prefill(model, params, tx.Prompt(*prompt), cache)


@pytest.mark.parametrize(("name", "sampler"), [("mistral", SAMPLED), ("vaswani", Sampler())])
def test_stream_is_generate_token_for_token(name, sampler):
    model, params, memory = make(name)
    whole = generate(name, sampler=sampler, key=KEY).tokens
    prompt = tx.pad_prompts(PROMPTS)
    pieces = tx.stream(model, params, *prompt, max_new_tokens=NEW, sampler=sampler, key=KEY, **memory)
    np.testing.assert_array_equal(np.stack(list(pieces), axis=1), whole)


def test_inside_jit_and_vmap():
    model, params, _ = make("llama")
    batches, keys = jnp.array([PROMPTS[2:] * 2, [PROMPTS[2][::-1]] * 2]), jax.random.split(KEY, 2)

    def call(tokens, key):
        return tx.generate(model, params, tokens, max_new_tokens=NEW, sampler=SAMPLED, key=key, eos_id=1).tokens

    by_key = np.stack([call(batches[0], key) for key in keys])
    by_batch = np.stack([call(tokens, keys[0]) for tokens in batches])
    np.testing.assert_array_equal(jax.jit(call)(batches[0], keys[0]), by_key[0])
    np.testing.assert_array_equal(jax.vmap(call, (None, 0))(batches[0], keys), by_key)
    np.testing.assert_array_equal(jax.jit(jax.vmap(call, (0, None)))(batches, keys[0]), by_batch)


def test_a_new_number_or_prompt_length_compiles_nothing():
    model, params, _ = make("llama")

    def call(length, seed, eos_id, *numbers):
        prompt = np.ones((2, length), np.int32)
        tx.generate(
            model,
            params,
            prompt,
            max_new_tokens=5,
            sampler=Sampler(**dict(zip(NUMBERS, numbers, strict=True))),
            key=jax.random.key(seed),
            eos_id=eos_id,
        )

    call(3, 0, 1, 0.5, 3, 0.9, 0.1)
    before = module._generate._cache_size()
    call(64, 1, 2, 2.0, 5, 0.2, 0.7)
    assert module._generate._cache_size() == before
    call(65, 1, 2, 2.0, 5, 0.2, 0.7)  # another bucket: what is counted can change
    assert module._generate._cache_size() == before + 1


def test_the_loop_never_copies_the_cache():
    """XLA on CPU turns one layer's keys and values at a time for its products: of four layers, a quarter."""
    model = tx.build(replace(GPT2, d_head=64, n_layers=4))  # a cache far larger than scores
    params = jax.eval_shape(lambda: tx.init_params(model, jax.random.key(0)))
    cache = jax.eval_shape(lambda: tx.init_cache(model.cfg, 2, 4096))
    n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    loop = jax.jit(lambda params, logits, cache: tx.decode(model, params, logits, cache, 7), donate_argnums=2)
    memory = loop.lower(params, jnp.zeros((2, V)), cache).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= n_bytes  # the result's cache is the argument's
    assert memory.temp_size_in_bytes < n_bytes / 2


REFUSED = [  # (a change of the arguments, the error)
    ({"tokens": np.array([[3, V]])}, f"tokens holds id {V}; the vocabulary is 0 … {V - 1}"),
    ({"tokens": np.array([[-1, 2]])}, f"tokens holds id -1; the vocabulary is 0 … {V - 1}"),
    ({"tokens": np.ones(3, int)}, "tokens.shape=(3,) must be (batch, length); wrap one row as [row]"),
    ({"tokens": np.ones((1, 3))}, "tokens.dtype=float64 must be an integer"),
    ({"tokens": np.ones((1, 0), int)}, "tokens.shape=(1, 0) holds no token; give at least one a row"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ({"max_new_tokens": 199}, "a prompt of 2 tokens and max_new_tokens=199 exceed max_len=200; ask for at most 198"),
    ({"positions": np.array([[0]])}, "positions.shape=(1, 1) must be that of tokens, (1, 2)"),
    *(({"positions": np.array([row])}, "positions must be 0, 1, 2, … and then −1 in each row, with a token in each")
      for row in ([-1, 0], [1, 2], [-1, -1])),
    ({"sampler": SAMPLED}, "sampling needs key=jax.random.key(seed); without a temperature it is greedy"),
    ({"sampler": Sampler(top_k=2, min_p=0.1)}, "top_k, min_p without a temperature above 0 would be ignored"),
    ({"sampler": Sampler(temperature=-1.0), "key": KEY}, "temperature=-1.0 must be at least 0, which is"),
    ({"memory": tx.init_cache(CONFIGS["llama"], 1, 2)}, "memory is for an encoder-decoder; a decoder-only model"),
]  # fmt: skip


@pytest.mark.parametrize("call", [tx.generate, tx.stream])
@pytest.mark.parametrize(("change", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_refused_arguments(change, text, call):
    """`__wrapped__`: as without the check of the annotations, which only tests turn on."""
    model, params, _ = make("llama")
    arguments = {"tokens": np.array([[3, 1]]), "max_new_tokens": 2} | change
    with pytest.raises(InputError, match="^" + re.escape(text)):
        call.__wrapped__(model, params, **arguments)


def test_refused_without_memory_or_prompts():
    model, params, _ = make("vaswani")
    with pytest.raises(InputError, match=r"^memory=None: an encoder-decoder needs memory=model.apply\("):
        tx.generate(model, params, np.ones((1, 1), np.int32), max_new_tokens=1)
    with pytest.raises(InputError, match=r"^prompts=\[\]: give at least one prompt$"):
        tx.pad_prompts([])
    with pytest.raises(InputError, match=r"^prompt 1 has no token; a model goes on from at least one$"):
        tx.pad_prompts([[1], []])


def test_a_prefix_is_read_from_both_sides():
    """Greedy is an argmax loop over whole forwards in which the prompt's tokens, and no others, see each other."""
    model, params, _ = make("llama")
    rows = [list(prompt) for prompt in PROMPTS]
    for _ in range(NEW):
        for row, prompt in zip(rows, PROMPTS, strict=True):
            tokens, prefix = jnp.array([row]), jnp.array([len(prompt)])
            logits, _ = model.apply({"params": params}, tokens, prefix=prefix)
            row.append(int(logits[0, -1].argmax()))
    expected = np.array([row[-NEW:] for row in rows])
    np.testing.assert_array_equal(generate("llama", prefix_lm=True).tokens, expected)
    assert (expected != greedy("llama")).any()
    streamed = tx.stream(model, params, *tx.pad_prompts(PROMPTS), max_new_tokens=NEW, prefix_lm=True)
    np.testing.assert_array_equal(np.stack(list(streamed), 1), expected)
    with pytest.raises(InputError, match=r"^prefix_lm=True is for a decoder-only model that sees all, without"):
        generate("vaswani", prefix_lm=True)
    with pytest.raises(InputError, match=r"^prefix_lm=True is for a decoder-only model that sees all, without"):
        generate("mistral", prefix_lm=True)


def test_a_prompt_may_be_a_constant_of_your_own_jit():
    model, params, _ = make("llama")
    tokens = jnp.array([PROMPTS[0]])
    got = jax.jit(lambda params: tx.generate(model, params, tokens, max_new_tokens=NEW).tokens)(params)
    np.testing.assert_array_equal(got[0], greedy("llama")[0])
