"""What a model costs is what XLA counts in its programs, what init makes, and what others have published."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import pytest

import tx_jax as tx
from tx_jax.complexity import __main__ as command
from tx_jax.complexity.activations import kept_bytes
from tx_jax.complexity.costs import n_bytes, total
from tx_jax.complexity.leaves import leaves
from tx_jax.complexity.measure import Curve, measure, report
from tx_jax.complexity.train_flops import make_train_flops
from tx_jax.convert import sources
from tx_jax.ops import attention
from tx_jax.presets import MODELS

SIZES = {"vocab_size": 97, "d_model": 128, "n_heads": 4, "n_layers": 2, "max_len": 64}
IDS = jnp.ones((2, 48), int)
ONES = jnp.ones((2, 48))
TEXT = tx.Batch(IDS, IDS, ONES)
PAIRS = tx.PairBatch(jnp.ones((2, 32), int), IDS, IDS, ONES)
TWELVE = (
    "vaswani-base", "vaswani-big", "gpt2-small", "gpt2-medium", "gpt2-xl", "llama2-7b", "llama3-8b", "llama3-2-1b",
    "smollm2-135m", "mixtral-8x7b", "t5-small", "bert-base",
)  # fmt: skip


@pytest.fixture
def whole_rows(monkeypatch):
    """Attention as XLA can count it: a loop's body it counts once, and blocks leave out what causality hides."""
    for key in attention.AUTO:
        monkeypatch.setitem(attention.AUTO, key, "xla")


def counted(function, *args, compiled=False):
    lowered = jax.jit(function).lower(*args)
    cost = (lowered.compile() if compiled else lowered).cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def shapes_of(cfg, B, T):
    model = tx.build(cfg)
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    params = jax.eval_shape(lambda key: tx.init_params(model, key), jax.random.key(0))
    return model, params, (ids, ids) if cfg.stack == "encoder_decoder" else (ids,)


def passes(cfg, B, T, **how):
    """FLOPs of a forward pass, and of the backward pass after it, as XLA counts them."""
    if cfg.n_experts:  # on a CPU all experts read all tokens, but where they have a capacity
        cfg, how = dataclasses.replace(cfg, capacity_factor=1.0), how | {"deterministic": False}
    compiled = how.pop("compiled", False)
    model, params, ids = shapes_of(cfg, B, T)

    def forward(params, *ids):
        return model.apply({"params": params}, *ids, **how)[0]

    def both(params, gradient, *ids):
        logits, pull = jax.vjp(lambda params: forward(params, *ids), params)
        return logits, pull(gradient)

    logits = jax.eval_shape(forward, params, *ids)
    first = counted(forward, params, *ids, compiled=compiled)
    return first, counted(both, params, logits, *ids, compiled=compiled) - first


def check(cfg, rel, **how):
    for B, T in ((1, 128), (3, 256), (1, min(cfg.max_len, 2048))):
        forward, backward = passes(cfg, B, T, **how)
        found = tx.complexity(cfg, B, T)
        assert total(found.forward).flops == pytest.approx(forward, rel=rel)
        assert total(found.backward).flops == pytest.approx(backward, rel=rel)


@pytest.mark.parametrize("name", TWELVE)
def test_flops_are_those_that_xla_counts(name, whole_rows):
    check(MODELS[name](), 0.01)


@pytest.mark.parametrize("name", TWELVE)
def test_the_compiled_program_has_as_many(name, whole_rows):
    """Of one layer; with DEPTH=whole of all, which takes XLA half an hour."""
    cfg = MODELS[name]()
    if os.environ.get("DEPTH") == "whole":
        check(cfg, 0.02, compiled=True)
    else:
        encoder = 1 if cfg.stack == "encoder_decoder" else None
        check(dataclasses.replace(cfg, n_layers=1, n_encoder_layers=encoder), 0.002, compiled=True)


@pytest.mark.parametrize("name", ["gpt2-small", "llama3-2-1b", "t5-small", "vaswani-base"])
def test_a_token_more_with_the_cache_and_without(name, whole_rows):
    """Without: all of the row, but for the logits of its last token alone."""
    cfg, B, T = MODELS[name](), 2, 256
    model, params, (ids, *_) = shapes_of(cfg, B, T)
    token, cache, memory = jax.ShapeDtypeStruct((B, 1), jnp.int32), jax.eval_shape(lambda: tx.init_cache(cfg, B, T)), {}
    if cfg.stack == "encoder_decoder":
        encode = lambda params, ids: model.apply({"params": params}, ids, None, method="encode")  # noqa: E731
        memory = {"memory": jax.eval_shape(encode, params, ids)}

    def step(params, token, cache, memory):
        x, cache = model.apply({"params": params}, token, cache=cache, method="hidden", **memory)
        return model.apply({"params": params}, x, method="logits"), cache

    def again(params, ids, memory):
        x, _ = model.apply({"params": params}, ids, method="hidden", **memory)
        return model.apply({"params": params}, x[:, -1], method="logits")

    found = tx.complexity(cfg, B, T)
    assert total(found.decode).flops == pytest.approx(counted(step, params, token, cache, memory), rel=0.02)
    assert total(found.decode_again).flops == pytest.approx(counted(again, params, ids, memory), rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_init(name):
    cfg = MODELS[name]()
    assert sum(leaf.n_params for leaf in leaves(cfg)) == tx.count_params(cfg)


@pytest.mark.parametrize("change", [{}, {"n_kv_heads": 2, "d_value": 24}, {"window": 16}, {"dtype": "bfloat16"}])
def test_cache_bytes_are_those_of_the_cache(change):
    cfg = tx.ModelConfig(**SIZES | change)
    slots = min(48, cfg.window or 48)
    assert tx.complexity(cfg, 3, 48).cache_bytes == n_bytes(tx.init_cache(cfg, 3, slots))


def test_what_cross_attention_keeps_is_what_encode_gives():
    cfg = tx.ModelConfig(**SIZES, stack="encoder_decoder", n_encoder_layers=3, n_kv_heads=2, d_value=24)
    model, params, (source, _) = shapes_of(cfg, 3, 48)
    memory = jax.eval_shape(lambda params, ids: model.apply({"params": params}, ids, method="encode"), params, source)
    found = tx.complexity(cfg, 3, 40, source_len=48)
    assert (found.cache_bytes, found.memory_bytes) == (n_bytes(tx.init_cache(cfg, 3, 40)), n_bytes(memory))
    assert tx.complexity(tx.ModelConfig(**SIZES), 3, 48).memory_bytes == 0


@pytest.mark.parametrize("remat", ["none", "full", "dots", "names"])
def test_half_the_bytes_are_kept_of_numbers_of_half_the_size(remat):
    """But of float32 logits; and no weight is among them, though its numbers are halved, too."""
    cfg, half = (tx.ModelConfig(**SIZES, dtype=dtype) for dtype in ("float32", "bfloat16"))
    many, few = (tx.complexity(one, 1, 2).activation_bytes(remat) for one in (cfg, half))
    assert sum(few.values()) < sum(many.values()) < 4 * tx.count_params(cfg) / 10
    assert few["feed-forward"] * 2 == many["feed-forward"]


def test_one_array_under_several_shapes_is_kept_once():
    def loss(params, x):
        rows = jnp.sin(x).reshape(-1, 4)  # read by two products, by one of them as another shape
        return ((rows @ params).reshape(2, 3, 4) * (rows.reshape(2, 3, 4) @ params)).sum()

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 4), (2, 3, 4)))
    assert sum(kept_bytes(loss, *shapes).values()) == 3 * 4 * 24  # the sine and both products


@pytest.mark.parametrize("more", [{}, {"capacity_factor": 1.0}, {"n_experts_per_token": 1}])
def test_experts_keep_what_is_kept(more):
    cfg = tx.ModelConfig(**SIZES, n_experts=4, **more)
    none, full = (tx.complexity(cfg, 2, 16).activation_bytes(remat)["feed-forward"] for remat in ("none", "full"))
    assert none > full == 0


def test_what_a_backward_pass_is_given():
    """With full remat what goes into a block; with names also q, k, v and what attention gives."""
    cfg = tx.ModelConfig(**SIZES | {"n_kv_heads": 2})
    more = dataclasses.replace(cfg, n_layers=3)

    def of_a_layer(remat):
        few, many = (tx.complexity(of, 2, 48).activation_bytes(remat) for of in (cfg, more))
        return {name: many[name] - few[name] for name in few}

    token = 4 * 2 * 48
    full, names, dots, none = (of_a_layer(remat) for remat in ("full", "names", "dots", "none"))
    assert {name: size for name, size in full.items() if size} == {"norms": token * cfg.d_model}
    kept = {"attention projections": token * 2 * 2 * 32, "attention scores": token * 2 * 4 * 32}  # k, v; q, result
    assert {name: size for name, size in names.items() if size} == {"norms": full["norms"]} | kept
    assert none["feed-forward"] > dots["feed-forward"] > 0
    assert sum(full.values()) < sum(names.values()) < sum(dots.values()) < sum(none.values())


def products(cfg, T):
    """FLOPs of a row's products alone, as others count: of kernels but the head's, of the head's, and of scores."""
    blocks, head = (
        sum(2 * T * leaf.matrix for leaf in leaves(cfg) if leaf.name == "kernel" and (leaf.component == "head") == own)
        for own in (False, True)
    )
    return blocks, head, cfg.n_layers * 4 * cfg.n_heads * cfg.H * T * T


def test_gpt2():
    """nanoGPT, transformer_sizing.ipynb."""
    assert sum(products(MODELS["gpt2-small"](), 1024)) == 291_648_307_200


def test_llama():
    """Grattafiori et al. 2024, §3.2: 3.8 · 10²⁵ FLOPs for 15.6 · 10¹² tokens of Llama 3 405B, of Table 3's sizes."""
    sizes = {"d_model": 16_384, "n_layers": 126, "n_heads": 128, "d_mlp": 53_248}
    llama = dataclasses.replace(MODELS["llama3-70b"](), **sizes)
    assert 6 * sum(leaf.n_params for leaf in leaves(llama)) * 15.6e12 == pytest.approx(3.8e25, rel=0.005)


@pytest.mark.parametrize(
    ("n_layers", "d_model", "n_heads", "d_head", "printed"),
    [
        (10, 640, 10, 64, 1.03), (20, 1024, 16, 64, 1.10), (24, 1280, 10, 128, 1.08), (26, 1792, 14, 128, 1.04),
        (28, 2048, 16, 128, 1.03), (40, 3584, 28, 128, 0.99),
    ],
)  # fmt: skip
def test_chinchilla(n_layers, d_model, n_heads, d_head, printed):
    """Hoffmann et al. 2022, Table A4: FLOPs by appendix F ÷ 6 · parameters · tokens, of 2,048 tokens.

    What is printed has no products with the vocabulary, 3 FLOPs a number in a softmax, and parameters with one table of
    32,000 and one further D · D a layer, of relative positions.
    """
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_head": d_head}
    cfg = tx.ModelConfig(vocab_size=32_000, max_len=2048, **sizes)
    blocks, _, scores = products(cfg, 2048)
    softmax = 3 * n_heads * 2048**2 * n_layers
    n_params = sum(leaf.n_params for leaf in leaves(cfg)) + n_layers * d_model**2
    assert round((blocks + scores + softmax) / (2 * n_params * 2048), 2) == pytest.approx(printed, abs=0.0051)


def test_an_exponent_is_a_slope_over_the_upper_half():
    sizes = (1, 2, 4, 8, 16)
    curve = Curve("x", "tokens", sizes, tuple(3 * n**1.5 for n in sizes), sizes, tuple(n**2 for n in sizes))
    assert (curve.exponent, curve.predicted) == pytest.approx((1.5, 2.0))
    assert "x in tokens                          measured 1.50   FLOPs 2.00   (1 … 16: 3,000.00 … " in report([curve])


def test_what_is_measured_grows_as_the_formulas_say():
    curves = measure(MODELS["gpt2-small"](), (16, 32, 64), (32, 64, 128), 1)
    found = {(curve.name, curve.size): curve for curve in curves}
    predicted = {key: round(curve.predicted, 1) for key, curve in found.items()}
    assert predicted == {
        ("attention", "tokens"): 2.0, ("feed-forward", "tokens"): 1.0, ("feed-forward", "width"): 2.0,
        ("next token, cached", "tokens"): 0.1, ("next token, without cache", "tokens"): 1.1,
    }  # fmt: skip
    assert all(len(curve.seconds) == 3 and min(curve.seconds) > 0 for curve in found.values())


def test_what_cannot_be():
    cfg = tx.ModelConfig(**SIZES)
    with pytest.raises(tx.InputError, match=r"batch=0, seq_len=48 must be at least 1"):
        tx.complexity(cfg, 0, 48)
    with pytest.raises(
        tx.InputError, match=r"seq_len=65 exceeds max_len=64; shorten it, or replace max_len in the cfg"
    ):
        tx.complexity(cfg, 1, 65)
    with pytest.raises(tx.InputError, match=r"source_len=8 needs stack='encoder_decoder', not 'decoder'"):
        tx.complexity(cfg, 1, 48, source_len=8)
    with pytest.raises(tx.InputError, match=r"source_len=0 must be at least 1; None is seq_len"):
        tx.complexity(dataclasses.replace(cfg, stack="encoder_decoder"), 1, 48, source_len=0)


def test_the_command_prints_every_component_and_a_time(capsys):
    command.main(["gpt2-small", "--seq-len", "1024", "--device", "TPU v5e"])
    said = capsys.readouterr().out
    assert "attention scores" in said
    assert "124,439,808" in said
    assert "on TPU v5e (197 TFLOP/s of 16 bits, 819 GB/s; 241 FLOPs a byte)" in said


def test_the_command_takes_what_a_preset_is_named_like(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = tx.ModelConfig(**SIZES | {"vocab_size": 7}, mlp="swiglu", norm="rmsnorm")
    tx.save_pretrained("gpt2-smal", cfg, tx.init_params(tx.build(cfg), jax.random.key(0)))
    monkeypatch.setattr(sources, "fetch_model", lambda name: tmp_path / "gpt2-smal")
    for name in ("gpt2-smal", "smollm2"):
        command.main([name])
        assert f"{tx.count_params(cfg):,}" in capsys.readouterr().out


def test_the_command_alone_lists_presets(capsys):
    command.main([])
    assert set(MODELS) < set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (
            ["gpt2-small", "--device", "h100"],
            "device='h100' is not known; did you mean 'H100'? Or use here, or one of ",
        ),
        (["./gpt2-smal"], "model='./gpt2-smal' is no preset; did you mean 'gpt2-small'?"),
        (["gpt2-small", "--device", "none"], "device='none' is not known; use here, or one of B200, "),
        (
            ["gpt-shakespeare"],
            "model='gpt-shakespeare' is a preset of train.py; see python train.py gpt-shakespeare --d",
        ),
        (["gpt2-smal"], "model='gpt2-smal' is no preset; did you mean 'gpt2-small'?"),
        (
            ["gpt2-small", "--device", "H300"],
            "device='H300' is not known; did you mean 'H200'? Or use here, or one of ",
        ),
    ],
)
def test_the_command_refuses(args, told, capsys):
    with pytest.raises(SystemExit):
        command.main(args)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "batch"),
    [
        ({}, TEXT),
        ({"n_kv_heads": 2, "mlp": "swiglu", "tie_head": False, "positions": "learned"}, TEXT),
        ({"stack": "encoder_decoder", "n_encoder_layers": 3}, PAIRS),
        ({"stack": "encoder_decoder", "tie_source": False}, PAIRS),
    ],
)
def test_flops_are_those_of_the_compiled_step(more, batch):
    cfg = tx.ModelConfig(**SIZES, **more)
    model = tx.build(cfg)
    shapes = jax.eval_shape(lambda key: tx.init_params(model, key), jax.random.key(0))
    loss = lambda params: tx.make_eval_step(model)(params, batch)[0]  # noqa: E731
    cost = jax.jit(jax.grad(loss)).lower(shapes).compile().cost_analysis()
    counted = (cost[0] if isinstance(cost, list) else cost)["flops"]
    assert make_train_flops(cfg)(batch) == pytest.approx(counted, rel=0.1)  # XLA also counts norms and activations


def test_padding_and_what_is_frozen_need_less_and_a_window_sees_less():
    cfg = tx.ModelConfig(**SIZES)
    all_of_it, half = make_train_flops(cfg)(TEXT), jnp.where(jnp.arange(48) < 24, jnp.arange(48), -1)
    assert make_train_flops(cfg)(TEXT._replace(positions=jnp.broadcast_to(half, (2, 48)))) == all_of_it / 2
    attention = 2 * 48 * 2 * 12 * 128 * 48
    assert make_train_flops(cfg, adapters=True)(TEXT) - attention == pytest.approx((all_of_it - attention) * 2 / 3)
    windowed = make_train_flops(tx.ModelConfig(**SIZES, window=12, window_pattern="wf"))
    assert all_of_it - windowed(TEXT) == pytest.approx(attention / 2 * 3 / 4)
