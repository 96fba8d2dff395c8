"""The loss is its definition in NumPy, counts what has weight and nothing else, and is a sum that adds up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx

B, T, V = 3, 5, 7
rng = np.random.default_rng(0)
LOGITS = jnp.asarray(rng.normal(scale=3, size=(B, T, V)), jnp.float32)
TARGETS = jnp.asarray(rng.integers(V, size=(B, T)), jnp.int32)
WEIGHTS = jnp.asarray(rng.choice([0, 0.25, 1, 2], size=(B, T)), jnp.float32)


def oracle(logits, targets, weights, smoothing):
    """Szegedy et al. 2016, §7, in loops: −Σ q(k) log p(k), q = (1 − ε) [k is gold] + ε / V."""
    total, gradient = 0.0, np.zeros(logits.shape)
    for b, t in np.ndindex(targets.shape):
        p = np.exp(np.float64(logits[b, t]))
        p /= p.sum()
        q = np.full(V, smoothing / V)
        q[targets[b, t]] += 1 - smoothing
        total -= weights[b, t] * q @ np.log(p)
        gradient[b, t] = weights[b, t] * (p - q)
    return total, gradient


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_sum_count_and_gradient(smoothing):
    def loss(logits):
        return tx.cross_entropy(logits, TARGETS, WEIGHTS, label_smoothing=smoothing)

    (total, count), gradient = jax.value_and_grad(loss, has_aux=True)(LOGITS)
    expected, expected_gradient = oracle(LOGITS, TARGETS, WEIGHTS, smoothing)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert count == WEIGHTS.sum()
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-6)
    assert not np.asarray(gradient)[np.asarray(WEIGHTS) == 0].any()  # exactly


def test_no_smoothing_is_the_plain_loss():
    gold = jnp.take_along_axis(LOGITS, TARGETS[..., None], -1)[..., 0]
    plain = ((jax.nn.logsumexp(LOGITS, -1) - gold) * WEIGHTS).sum()
    for given in ({}, {"label_smoothing": 0.0}):
        assert tx.cross_entropy(LOGITS, TARGETS, WEIGHTS, **given)[0] == plain


def test_what_has_no_weight_does_not_count():
    noise = jnp.where(WEIGHTS[..., None] == 0, 100 * LOGITS + 7, LOGITS)
    targets = jnp.where(WEIGHTS == 0, (TARGETS + 1) % V, TARGETS)
    one, other = tx.cross_entropy(LOGITS, TARGETS, WEIGHTS), tx.cross_entropy(noise, targets, WEIGHTS)
    assert one == other
    assert tx.cross_entropy(LOGITS, TARGETS, 0 * WEIGHTS) == (0, 0)


def test_a_target_without_weight_may_be_any_id():
    targets = jnp.where(WEIGHTS == 0, -100, TARGETS)  # Hugging Face's mark of what is ignored
    loss = jax.value_and_grad(lambda logits, targets: tx.cross_entropy(logits, targets, WEIGHTS)[0])
    for one, other in zip(loss(LOGITS, targets), loss(LOGITS, TARGETS), strict=True):
        np.testing.assert_array_equal(one, other)


def test_sums_of_parts_are_the_sum_of_all():
    whole = tx.cross_entropy(LOGITS, TARGETS, WEIGHTS)
    parts = [tx.cross_entropy(*(x[b : b + 1] for x in (LOGITS, TARGETS, WEIGHTS))) for b in range(B)]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_bfloat16_logits_are_summed_in_float32_and_large_ones_are_finite(scale):
    rounded = (scale * LOGITS).astype(jnp.bfloat16)
    total, _ = tx.cross_entropy(rounded, TARGETS, WEIGHTS)
    assert total.dtype == jnp.float32
    assert total == tx.cross_entropy(rounded.astype(jnp.float32), TARGETS, WEIGHTS)[0]
    assert np.isfinite(total)


D = 4
HIDDEN = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
HEAD = {"table": jnp.asarray(rng.normal(size=(V, D)), jnp.float32), "bias": jnp.zeros(V), "unused": jnp.ones(2)}


def apply_head(head, hidden):
    return hidden @ head["table"].T + head["bias"]


@pytest.mark.parametrize("most", [1, 2 * B * V, 4 * B * V, B * T * V])  # 5 chunks, 3 and 2 with padding, and one
@pytest.mark.parametrize("how", [{}, {"label_smoothing": 0.1, "z_loss_rate": 0.3}])
def test_in_chunks_it_is_the_same_loss_with_the_same_gradient(most, how):
    def chunked(head, hidden):
        found = tx.chunked_cross_entropy(apply_head, head, hidden, TARGETS, WEIGHTS, vocab_size=V, most=most, **how)
        return 2 * found[0], found  # twice: a gradient that comes from behind is passed on

    def plain(head, hidden):
        found = tx.cross_entropy(apply_head(head, hidden), TARGETS, WEIGHTS, **how)
        return 2 * found[0], found

    for function in (jax.value_and_grad(chunked, (0, 1), has_aux=True), chunked):  # also where no gradient is asked for
        oracle = jax.value_and_grad(plain, (0, 1), has_aux=True) if function is not chunked else plain
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5),
            jax.jit(function)(HEAD, HIDDEN),
            oracle(HEAD, HIDDEN),
        )


def test_z_loss_is_its_definition():
    log_z = np.log(np.exp(np.float64(LOGITS)).sum(-1))
    plain, _ = tx.cross_entropy(LOGITS, TARGETS, WEIGHTS)
    total, _ = tx.cross_entropy(LOGITS, TARGETS, WEIGHTS, z_loss_rate=0.1)
    np.testing.assert_allclose(total - plain, 0.1 * (WEIGHTS * log_z**2).sum(), rtol=1e-5)


def test_logits_of_a_large_vocabulary_are_never_held():
    """B · T of 8 k tokens, V of 128 k: XLA's own count of temporaries, against the loss of all logits at once."""
    B, T, V, D = 8, 1024, 128 * 1024, 512

    def temporaries(most):
        def loss(table, hidden, targets, weights):
            head = functools.partial(jnp.einsum, "VD,BTD->BTV", preferred_element_type=jnp.float32)
            return tx.chunked_cross_entropy(head, table, hidden, targets, weights, vocab_size=V, **most)[0]

        shapes = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (((V, D), "float32"), ((B, T, D), "bfloat16"), ((B, T), "int32"), ((B, T), "float32"))
        )
        return jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries({}) <= 0.15 * temporaries({"most": B * T * V})
