"""One table of models × the laws that every model keeps: a new option inherits all of them by adding a row."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax.config import ModelConfig, RotaryConfig
from tx_jax.modules.attention import Plan
from tx_jax.ops.masks import Mask

V, T, L, WINDOW = 11, 14, 2, 3
QUICK = {"xla_backend_optimization_level": 0}  # halves the time to compile, which is nearly all of the time
tiny = functools.partial(ModelConfig, vocab_size=V, max_len=31, n_layers=L, d_mlp=23)
rotary = functools.partial(RotaryConfig, base=97.0, factor=3.0, original_len=8)
GPT2 = tiny(positions="learned", biases="all", n_heads=5, d_model=35)
LLAMA = tiny(positions="rotary", mlp="swiglu", norm="rmsnorm", n_heads=6, n_kv_heads=2, d_head=4, d_model=31)
T5 = tiny(
    positions="t5", n_buckets=8, max_distance=9, attention_scale=1.0, scale_head=True, mlp="geglu_tanh",
    norm="rmsnorm", n_heads=3, d_head=7, d_model=29,
)  # fmt: skip
VASWANI = tiny(
    positions="sinusoidal", scale_embeddings=True, biases="mlp", mlp="relu", norm_order="post", init="xavier",
    n_heads=2, d_model=26,
)  # fmt: skip
BOTH = {"stack": "encoder_decoder", "n_encoder_layers": 1}
CONFIGS = {
    "gpt2": GPT2,
    "gpt1": replace(GPT2, norm_order="post", mlp="gelu", n_kv_heads=1),
    "gptj": replace(GPT2, positions="rotary_pairs", biases="mlp", tie_head=False, d_head=6),
    "bloom": replace(GPT2, positions="alibi", norm_embeddings=True),
    "falcon": replace(GPT2, positions="alibi", n_kv_heads=1, biases="none", window=WINDOW),
    "tensor2tensor": replace(
        VASWANI, positions="sinusoidal_concat", norm_order="pre", n_heads=6, n_kv_heads=3, d_head=5, d_value=7
    ),
    "no-positions": replace(LLAMA, positions="none", n_kv_heads=1, mlp="relu"),
    "llama": LLAMA,
    "llama-yarn": replace(LLAMA, rotary=rotary(scaling="yarn", beta_fast=2.0, beta_slow=0.5)),
    "llama3": replace(LLAMA, rotary=rotary(scaling="llama3"), n_kv_heads=6, biases="qkv"),
    "qwen3": replace(LLAMA, rotary=rotary(scaling="ntk"), qk_norm=True, d_head=10),
    "gemma2": replace(
        LLAMA,
        window=WINDOW,
        window_pattern="wf",
        mlp="geglu_tanh",
        norm="rmsnorm_offset",
        norm_order="sandwich",
        attention_scale=0.7,
        attention_soft_cap=1.5,
        head_soft_cap=2.0,
    ),
    "mixtral": replace(LLAMA, n_experts=5, capacity_factor=0.5),  # which a model that is not trained does not heed
    "gemma3": replace(
        LLAMA, window=WINDOW, window_pattern="fw", qk_norm=True, norm="rmsnorm_offset", rotary=rotary(window_base=7.0)
    ),
    "streaming": replace(LLAMA, window=WINDOW, n_sinks=2, qk_norm=True, rotary=rotary(fraction=0.5)),
    "streaming-alibi": replace(GPT2, positions="alibi", n_kv_heads=1, window=2, n_sinks=1),
    "gptneox": replace(
        GPT2, positions="rotary", rotary=rotary(fraction=0.25), parallel=True, tie_head=False, d_head=8, d_model=40
    ),
    "t5-lm": T5,
    "vaswani": replace(VASWANI, **BOTH),
    "t5": replace(T5, **BOTH, tie_source=False),
    "bart": replace(
        GPT2, **BOTH, norm_order="post", norm_embeddings=True, position_offset=2, head_bias=True, mlp="silu"
    ),
    "sandwich-translator": replace(LLAMA, **BOTH, norm_order="sandwich", biases="attention"),
    "llama-translator": replace(LLAMA, **BOTH, window=WINDOW, qk_norm=True, attention_soft_cap=3.0, d_value=3),
    "bert": replace(
        GPT2, stack="encoder", norm_order="post", norm_embeddings=True, n_token_types=2, pooler=True, head_bias=True
    ),
    "bert-mlm": replace(GPT2, stack="encoder", norm_order="post", position_offset=2, head_transform=True),
    "modern-bert": replace(LLAMA, stack="encoder", window=WINDOW, mlp="geglu"),
    "alibi-encoder": replace(GPT2, stack="encoder", positions="alibi", n_heads=7),
    "t5-encoder": replace(T5, stack="encoder"),
    "experts-translator": replace(T5, **BOTH, n_experts=4, n_experts_per_token=3),
}
CAUSAL = [name for name, cfg in CONFIGS.items() if cfg.stack != "encoder"]
PLAN = Plan(Mask(causal=True))
ONE_STACK = [name for name, cfg in CONFIGS.items() if cfg.stack != "encoder_decoder"]
STACKS = {  # of each kind of model: (name, causal, layers)
    "decoder": [("stack", True, L)],
    "encoder": [("stack", False, L)],
    "encoder_decoder": [("encoder", False, 1), ("decoder", True, L)],
}


@functools.cache
def make(name):
    """The model and parameters of ordinary size, so that every part of it matters: norms near 1, others N(0, 0.2²)."""
    model, rng = tx.build(CONFIGS[name]), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: tx.init_params(model, jax.random.key(0)))

    def draw(path, leaf):
        return rng.normal(float(path[-1].key == "scale"), 0.2, leaf.shape).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method", compiler_options=QUICK)
def run(model, params, *inputs, method=None, **more):
    return model.apply({"params": params}, *inputs, method=method, **more)


def source_of(tokens, positions):
    """The source of a translation: what follows the first target token."""
    return tokens[:, 1:], None if positions is None else np.maximum(positions[:, 1:] - 1, -1)


def logits(name, tokens, positions=None, **more):
    model, params = make(name)
    if CONFIGS[name].stack == "encoder_decoder":
        source, source_positions = source_of(tokens, positions)
        return np.asarray(run(model, params, source, tokens, source_positions, positions)[0])
    return np.asarray(run(model, params, tokens, positions, **more)[0])


def draw_tokens(B, seed=0):
    return np.random.default_rng(seed).integers(V, size=(B, T)).astype(np.int32)


def ragged(*lengths):
    return np.array([[i if i < length else -1 for i in range(T)] for length in lengths], np.int32)


HOLES = np.array([*ragged(T, 7), [-1, -1, 0, 1, 2, -1, 3, 4, -1, -1, 5, 6, -1, 7]], np.int32)  # right; left and middle


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def influence(model, stack, params, x, prefix, memory):
    """(T, U): the largest |d out[t] / d x[u]|, where out is a mean of features with unequal weights."""
    direction = jnp.sin(1.0 + jnp.arange(x.shape[-1]))

    def out(x):
        y = model.apply(
            {"params": params}, x, method=lambda m, x: getattr(m, stack)(x, prefix=prefix, memory=memory)[0]
        )
        return y[0] @ direction

    return jnp.abs(jax.jacrev(out)(x)[:, 0]).max(-1)


@pytest.mark.parametrize("name", CONFIGS, scope="module")
def test_an_output_depends_on_what_it_may_see_and_on_nothing_else(name):
    (model, params), cfg, memory = make(name), CONFIGS[name], None
    if cfg.stack == "encoder_decoder":
        memory = run(model, params, draw_tokens(1), method="encode")
    t, u = np.arange(T)[:, None], np.arange(T)
    for (stack, causal, depth), prefix in itertools.product(STACKS[cfg.stack], [0, 5]):
        x = np.random.default_rng(1).normal(size=(1, T, cfg.d_model)).astype(np.float32)
        found = influence(model, stack, params, x, np.array([prefix], np.int32), memory if causal else None)
        reaches = {"w": cfg.window or T, "f": T}
        sees = [
            ((abs(t - u) < reaches[cfg.window_pattern[i % len(cfg.window_pattern)]]) | (u < cfg.n_sinks))
            & ((u <= t) | (not causal))
            | (u < prefix)
            for i in range(depth)
        ]
        paths = functools.reduce(np.matmul, (see.astype(int) for see in reversed(sees)))
        np.testing.assert_array_equal(found != 0, paths > 0, f"{stack} {found}")


@pytest.mark.parametrize("name", CONFIGS, scope="module")
def test_padding_changes_nothing_exactly(name):
    tokens, other = draw_tokens(3), draw_tokens(3, seed=1)
    one = logits(name, tokens, HOLES)
    two = logits(name, np.where(HOLES >= 0, tokens, other), HOLES)
    np.testing.assert_array_equal(one[HOLES >= 0], two[HOLES >= 0])
    assert np.isfinite(one).all()


@pytest.mark.parametrize("split", [[T], [1] * T, [4, 1, 4, 4, 1]], ids=str)
@pytest.mark.parametrize("name", CAUSAL, scope="module")
def test_cached_is_uncached(name, split):
    (model, params), cfg, tokens = make(name), CONFIGS[name], draw_tokens(3)
    expected = logits(name, tokens, HOLES)
    translates = cfg.stack == "encoder_decoder"
    more = {"memory": run(model, params, *source_of(tokens, HOLES), method="encode")} if translates else {}
    cuts = np.cumsum(split)[:-1]
    ring = (cfg.reach or T) + max(split) - 1
    for n_slots in {T + 3, min(ring, T + 3)}:  # a slot for every token and more, and the smallest ring
        cache, got = tx.init_cache(cfg, 3, n_slots), []
        for part, positions in zip(np.split(tokens, cuts, 1), np.split(HOLES, cuts, 1), strict=True):
            out, cache = run(
                model, params, part, positions, cache=cache, method="decode" if translates else None, **more
            )
            got.append(out)
        np.testing.assert_allclose(np.concatenate(got, 1)[HOLES >= 0], expected[HOLES >= 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("window", "n_slots"), [(4, 5), (None, 6)])
def test_a_cache_that_would_lose_keys_is_refused(window, n_slots):
    cfg = tx.ModelConfig(vocab_size=V, d_model=8, n_heads=2, n_layers=1, window=window)
    model, tokens = tx.build(cfg), jnp.asarray(draw_tokens(1))
    params = {"params": tx.init_params(model, jax.random.key(0))}
    _, cache = model.apply(params, tokens[:, :4], cache=tx.init_cache(cfg, 1, n_slots))
    with pytest.raises(tx.InputError, match=rf"position 6 does not fit a cache of n_slots={n_slots}.* at least 7"):
        model.apply(params, tokens[:, 4:7], cache=cache)


def test_untied_logits_are_not_rounded():
    cfg = tx.ModelConfig(vocab_size=V, d_model=8, n_heads=2, n_layers=1, tie_head=False, dtype="bfloat16")
    model = tx.build(cfg)
    got, _ = model.apply({"params": tx.init_params(model, jax.random.key(0))}, jnp.asarray(draw_tokens(1)))
    assert (got != got.astype("bfloat16")).any()


def test_each_block_drops_on_its_own():
    """Blocks are traced once for all; their masks are still their own. Here each sub-layer adds 1, or drops it."""
    cfg = tx.ModelConfig(vocab_size=V, d_model=32, n_heads=2, n_layers=2, biases="all", dropout_rate=0.5)
    model = tx.build(cfg)
    shapes = jax.eval_shape(lambda: tx.init_params(model, jax.random.key(0)))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.full(leaf.shape, float(name.endswith(("attention/out/bias", "mlp/down/bias"))))

    params = jax.tree_util.tree_map_with_path(draw, shapes)

    def residual(model, x):
        for block in model.stack.blocks:
            x, _ = block(x, PLAN, deterministic=False)
        return x

    x = model.apply({"params": params}, jnp.zeros((1, T, 32)), method=residual, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(x)) == {0.0, 2.0, 4.0, 6.0, 8.0}  # equal masks would give 0, 4 and 8


def test_learned_positions_end():
    cfg = tx.ModelConfig(vocab_size=V, d_model=8, n_heads=2, n_layers=1, max_len=5, positions="learned")
    model = tx.build(cfg)
    with pytest.raises(tx.InputError, match=r"^6 tokens exceed max_len=5, the learned positions; shorten them"):
        model.apply({"params": tx.init_params(model, jax.random.key(0))}, jnp.asarray(draw_tokens(1))[:, :6])


@pytest.mark.parametrize("name", CONFIGS, scope="module")
def test_a_row_of_a_batch_is_that_row_alone(name):
    tokens, lengths = draw_tokens(3), np.array([7, T, 7])
    together = logits(name, tokens, ragged(*lengths))
    for row, length in enumerate(lengths):
        alone = logits(name, tokens[row : row + 1, :length])[0]  # positions None: 0, 1, 2, …
        np.testing.assert_allclose(together[row, :length], alone, rtol=0, atol=1e-5)
    order = np.array([1, 2, 0])
    permuted = logits(name, tokens[order], ragged(*lengths[order]))
    np.testing.assert_allclose(permuted, together[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ONE_STACK, scope="module")
def test_packed_documents_are_the_documents_alone(name):
    tokens, n = draw_tokens(1), 7
    positions = np.array([[*range(n), *range(T - n)]], np.int32)
    packed = logits(name, tokens, positions, segments=np.array([[4] * n + [2] * (T - n)], np.int32))[0]
    alone = [logits(name, part)[0] for part in (tokens[:, :n], tokens[:, n:])]
    np.testing.assert_allclose(packed, np.concatenate(alone), rtol=0, atol=1e-5)
