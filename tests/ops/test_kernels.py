"""The kernels of accelerators are the reference, forward and gradient, and every program lowers for its accelerator.

Splash attention is interpreted here; in place of cuDNN stands the function of `jax.nn` that has the same arguments.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

import tx_jax as tx
from tx_jax import InputError, Mask
from tx_jax.command_line import parse_run
from tx_jax.ops import kernels
from tx_jax.ops.int8 import Int8
from tx_jax.training.start import first_state, make_assemble

B, T, H = 2, 256, 8
PADDED = jnp.array([[*range(100), *[-1] * 156], [*range(256)]])
PACKED = jnp.array([[*range(100), *range(100), *[-1] * 56], [*range(56), *range(200)]])
DOCUMENTS = jnp.array([[0] * 100 + [1] * 156, [2] * 56 + [5] * 200])
BACKWARDS = jnp.broadcast_to(jnp.arange(T)[::-1], (B, T))


def of(positions, segments=None, **rules):
    at = {"q_positions": positions, "k_positions": positions}
    return Mask(**rules, **at, q_segments=segments, k_segments=segments)


CASES = {  # name: (kernels, query heads, key-value heads, mask, more arguments)
    "causal": ("cudnn splash", 2, 2, Mask(causal=True), {}),
    "grouped, all": ("cudnn splash", 4, 2, Mask(), {"scale": 0.5}),
    "multi-query": ("splash", 3, 1, Mask(causal=True), {"soft_cap": 0.7, "d_value": 5}),
    "window": ("cudnn splash", 2, 1, Mask(causal=True, window=9), {}),
    "window both ways": ("splash", 2, 1, Mask(window=9), {}),
    "padded": ("cudnn splash", 2, 1, of(PADDED, causal=True), {}),
    "padded, all": ("cudnn splash", 1, 1, Mask(k_positions=PADDED), {}),
    "packed": ("splash", 2, 1, of(PACKED, DOCUMENTS, causal=True, window=30), {"soft_cap": 2.0}),
    "backwards": ("cudnn splash", 1, 1, of(BACKWARDS, causal=True), {}),
    "ahead": ("splash", 1, 1, Mask(causal=True, q_positions=jnp.arange(3, T + 3)[None]), {}),
    "apart, all": ("splash", 1, 1, of(PACKED, DOCUMENTS), {}),  # its padding sees what no kernel shows it
    "no token": ("cudnn splash", 1, 1, Mask(k_positions=jnp.stack([PADDED[0], jnp.full(T, -1)])), {}),
    "returning": ("splash", 1, 1, of(None, DOCUMENTS.at[:, 200:].set(0), causal=True), {}),
}


def draw(N, K, d_value=H, dtype=jnp.float16):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, d_value), (B, T, N, d_value)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def gradients(f, weights, *qkv):
    """f(*qkv), and the gradients of its weighted sum."""
    out, pull = jax.vjp(f, *qkv)
    return out, pull(weights)


with_gradients = jax.jit(gradients, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


def here(monkeypatch):
    """cuDNN's place taken; several blocks of splash attention."""
    function = jax.nn.dot_product_attention

    def stand_in(*qkv, implementation, **how):
        wide = (x.astype(jnp.float32) for x in qkv)  # the CPU has no products of float16
        return function(*wide, **how, implementation="xla").astype(qkv[0].dtype)

    monkeypatch.setattr(kernels, "has_cudnn", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(kernels, "SPLASH_BLOCK", 128)


@pytest.mark.parametrize(("name", "impl"), [(name, impl) for name, case in CASES.items() for impl in case[0].split()])
def test_a_kernel_is_the_reference(name, impl, monkeypatch):
    here(monkeypatch)
    _, N, K, mask, more = CASES[name]
    dtype = jnp.float16 if impl == "cudnn" else jnp.float32
    *qkv, weights = draw(N, K, more.get("d_value", H), dtype)
    how = functools.partial(tx.attention, mask=mask, **{key: x for key, x in more.items() if key != "d_value"})
    found, expected = (with_gradients(functools.partial(how, impl=i), weights, *qkv) for i in (impl, "xla"))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-2 if dtype == jnp.float16 else 2e-5)


SMALL = 6
AT = st.lists(st.integers(-1, 4), min_size=SMALL, max_size=SMALL)


@st.composite
def positions(draw):
    """Of some tokens: mostly packed documents with padding behind, sometimes anything."""
    if draw(st.booleans()):
        return draw(AT)
    lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    tokens = [i for length in lengths for i in range(length)]
    return (tokens + [-1] * SMALL)[:SMALL]


@settings(deadline=None, max_examples=300)
@given(
    at=st.tuples(positions(), positions()),
    segments=st.none() | st.tuples(AT, AT) | AT.map(lambda x: (sorted(x), sorted(x))),
    same=st.booleans(),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 3),
)
def test_a_kernel_that_may_be_asked_sees_what_the_mask_does(at, segments, same, causal, window):
    q, k = (jnp.array([x]) for x in (at[0], at[0] if same else at[1]))
    q_in, k_in = (None, None) if segments is None else (jnp.array([x]) for x in segments)
    k_in = q_in if same else k_in
    mask = Mask(causal=causal, window=window, q_positions=q, k_positions=k, q_segments=q_in, k_segments=k_in)
    told = kernels.padded(mask, SMALL, SMALL)
    if told is None or not told.fits:
        return
    back = np.arange(SMALL)[:, None] - np.arange(SMALL)
    by_index = np.ones_like(back, bool) if not causal else back >= 0
    by_index &= True if window is None else np.abs(back) < window
    expected = np.asarray(mask.materialize(SMALL, SMALL)[0])
    by_segment = np.asarray(told.q[0][:, None] == told.k[0][None])
    real = np.asarray(told.q[0] >= 0)
    assert (by_index & by_segment)[real].any(1).all()  # no query of splash attention is without a key
    np.testing.assert_array_equal((by_index & by_segment) & real[:, None], expected)
    if segments is None:
        by_length = np.arange(SMALL)[None] < max(int(told.n_keys[0]), 1)
        np.testing.assert_array_equal(by_index & by_length & real[:, None], expected)


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_asked_wherever_it_is_right(name):
    positions = CASES[name][3]
    told = kernels.padded(positions, T, T)
    asked = told is None or bool(told.fits)
    assert asked == (name not in ("backwards", "ahead", "apart, all", "no token", "returning"))


REFUSED = {  # what a kernel does not do: (kernel, the words for it, what is changed of a plain call)
    "bias": ("splash", "a bias", {"bias": jnp.zeros((1, 2, T, T))}),
    "dropout": ("splash", "dropout", {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}),
    "prefix": ("cudnn", "a prefix", {"mask": Mask(causal=True, prefix=jnp.array([3, 4]))}),
    "sinks": ("splash", "sinks", {"mask": Mask(causal=True, window=9, n_sinks=2)}),
    "later": ("splash", "queries beside earlier keys", {"mask": Mask(causal=True), "q": (B, 128, 2, H)}),
    "device": ("cudnn", "anything on this device, which is no NVIDIA GPU since Ampere,", {}),
    "float32": ("cudnn", "queries of float32", {"q": jnp.zeros((B, T, 2, H))}),
    "heads": ("cudnn", "heads of 12, which is no multiple of 8 up to 128,", {"q": (B, T, 2, 12), "k": (B, T, 2, 12)}),
    "values": ("cudnn", "values of another width", {"v": (B, T, 2, 16)}),
    "cap": ("cudnn", "a soft cap", {"soft_cap": 1.0}),
    "both ways": ("cudnn", "a window both ways", {"mask": Mask(window=3)}),
    "segments": ("cudnn", "segments", {"mask": of(PACKED, DOCUMENTS)}),
    "lengths": ("splash", "lengths of 100 and 256, which are no multiples of 128,", {"q": (B, 100, 2, H)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_kernel_does_not_do_is_done_without(name, monkeypatch):
    impl, words, changed = REFUSED[name]
    call = {"mask": Mask(), "q": (B, T, 2, H), "k": (B, T, 2, H), "v": (B, T, 2, H)} | changed
    call = {key: jnp.ones(x, jnp.float16) if isinstance(x, tuple) else x for key, x in call.items()}
    monkeypatch.setattr(kernels, "has_cudnn", lambda: name != "device")
    with pytest.raises(InputError, match=rf"^impl='{impl}' does not do {words}; use auto, or blockwise$"):
        tx.attention(**call, impl=impl)
    monkeypatch.setattr(jax, "default_backend", lambda: {"cudnn": "gpu", "splash": "tpu"}[impl])
    assert np.isfinite(tx.attention(**call)).all()


def test_keys_in_8_bits_have_no_kernel():
    q, _, v, _ = draw(2, 2)
    small = Int8(jnp.zeros((B, 2, H, T), jnp.int8), jnp.ones((B, 2, 1, T)))
    assert kernels.why_not("splash", q, small, v.swapaxes(1, 2), Mask(), None, None, 0.0) == "keys in 8 bits"


LOWERED = {"tpu": ("tpu", "tpu_custom_call"), "gpu": ("cuda", "__cudnn$fmha")}  # by backend


@pytest.fixture(params=LOWERED)
def lowered(request, monkeypatch):
    """Lowers a function for an accelerator that is not there; gives how often its kernel is called."""
    platform, call = LOWERED[request.param]
    jax.clear_caches()  # what was traced for another backend
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    if request.param == "gpu":  # JAX asks the card, for what every card since Ampere has
        from jax._src.cudnn import fused_attention_stablehlo as of_jax

        monkeypatch.setattr(kernels, "has_cudnn", lambda: True)
        monkeypatch.setattr(of_jax, "check_cudnn_version", lambda: 91000)
        monkeypatch.setattr(of_jax, "check_compute_capability", lambda capability: True, raising=False)
        monkeypatch.setattr(of_jax, "is_cuda_compute_capability_equal", lambda capability: False)
    known = [export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{way}") for way in ("", "Backward")]

    def count(function, *args):
        text = export.export(jax.jit(function), platforms=[platform], disabled_checks=known)(*args).mlir_module()
        return text.count(f'@"{call}') + text.count(f"@{call}")

    return count


@pytest.mark.parametrize("mask", [Mask(causal=True), Mask(causal=True, window=100), of(PADDED, causal=True)], ids=str)
def test_attention_is_lowered_to_the_kernel_forward_and_backward(mask, lowered):
    q, k = (jax.ShapeDtypeStruct((B, T, n, 64), jnp.bfloat16) for n in (4, 2))
    both = jax.grad(lambda q, k, v: tx.attention(q, k, v, mask).astype(jnp.float32).sum(), (0, 1, 2))
    assert lowered(both, q, k, k) >= 2


def test_each_device_of_a_mesh_calls_the_kernel_for_its_own_rows_and_heads(lowered):
    """XLA cannot split the kernel of a TPU, and refuses to."""
    mesh = tx.make_mesh(tx.MeshConfig(data=2, tensor=2), jax.devices()[:4])
    where = jax.NamedSharding(mesh, jax.P("data", None, "tensor"))
    q, k = (jax.ShapeDtypeStruct((B, T, n, 64), jnp.bfloat16, sharding=where) for n in (4, 2))
    both = jax.grad(lambda q, k, v: tx.attention(q, k, v, Mask(causal=True)).astype(jnp.float32).sum(), (0, 1, 2))
    with jax.set_mesh(mesh):
        assert lowered(both, q, k, k) >= 2


MODELS = {
    "gpt2": {"positions": "learned"},
    "llama": {"positions": "rotary", "mlp": "swiglu", "norm": "rmsnorm", "n_kv_heads": 2},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_is_lowered_to_the_kernel(name, lowered):
    cfg = tx.ModelConfig(
        vocab_size=128, max_len=T, d_model=256, n_layers=2, n_heads=4, dtype="bfloat16", **MODELS[name]
    )
    model = tx.build(cfg)
    optimizer = tx.make_optimizer(tx.OptimConfig(), 100)
    state = jax.eval_shape(lambda: tx.init_state(model, optimizer, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = tx.Batch(tokens, tokens, jax.ShapeDtypeStruct((B, T), jnp.float32))
    assert lowered(tx.make_train_step(model, optimizer), state, batch) >= 2  # all layers call the same


RUNS = {  # that notebooks train: flags, the size of the vocabulary, how often a kernel is called at least
    "gpt-shakespeare": ("", 65, 0),  # never: it has dropout of attention
    "number-words": ("--optim.schedule noam --train.label-smoothing-rate 0.1", 320, 0),  # of 20 tokens
    "finetune": ("--lora.rank 8", 49_152, 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_steps_of_the_notebooks_are_lowered(name, lowered):
    flags, V, n_calls = RUNS[name]
    run = parse_run([name, *flags.split()])  # as it is on the accelerator
    assert run.model.dtype == "bfloat16"
    sizes = tx.presets.smollm2_135m() if run.init else run.model
    model = tx.build(dataclasses.replace(sizes, n_layers=1, dtype="bfloat16", vocab_size=V))  # all blocks are alike
    optimizer = tx.make_optimizer(run.optim, run.train.n_steps)
    state = jax.eval_shape(lambda: first_state(run.lora, model, optimizer, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((run.data.batch_size, run.data.seq_len), jnp.int32)
    weights = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
    batch = tx.Batch(tokens, tokens, weights)
    if sizes.stack == "encoder_decoder":
        batch = tx.PairBatch(tokens, tokens, tokens, weights, tokens, tokens)
    how = {"label_smoothing": run.train.label_smoothing_rate, "assemble": make_assemble(run.lora)}
    assert lowered(tx.make_train_step(model, optimizer, **how), state, batch) >= n_calls


def test_a_kernel_is_shared_by_all_launchers():
    """Of eight devices, by rows and heads, each asks the kernel for its own part."""
    *qkv, weights = draw(4, 2, dtype=jnp.float32)
    expected = with_gradients(functools.partial(tx.attention, mask=of(PACKED, DOCUMENTS, causal=True)), weights, *qkv)

    def step(q, k, v, weights, positions, segments):
        mask = of(positions, segments, causal=True)
        return gradients(functools.partial(tx.attention, mask=mask, impl="splash"), weights, q, k, v)

    args = (*qkv, weights, PACKED, DOCUMENTS)
    mesh = tx.make_mesh(tx.MeshConfig(data=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = jax.jit(step)(*args)
    twice = (jnp.stack([x, x]) for x in args)  # as many rows a device as there are devices
    each = jax.pmap(step, "data", devices=jax.devices()[:2])(*twice)
    for one, other, by_pmap in zip(*map(jax.tree.leaves, (found, expected, each)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
        np.testing.assert_allclose(by_pmap[1], other, rtol=0, atol=2e-5)
