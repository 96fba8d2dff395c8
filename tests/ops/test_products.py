"""Products of a few rows, which a CPU takes in halves of the kernel, are those of NumPy; so are their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tx_jax.modules.linear import FEW, LONG, _is_few, product


@pytest.mark.parametrize("n_rows", [1, 2, 16, 17])
@pytest.mark.parametrize(("inner", "outer"), [(LONG, 6), (LONG - 1, 6), (LONG, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product(n_rows, inner, outer, dtype):
    draw = np.random.default_rng(n_rows).normal
    shapes = (n_rows, inner), (outer, inner), (n_rows, outer)
    x, w, y = (
        jnp.asarray(draw(size=shape), kind) for shape, kind in zip(shapes, (dtype, dtype, "float32"), strict=True)
    )

    @jax.jit
    def run(x, w, y):
        found, gradient = jax.vjp(lambda x, w: product(x, w, jnp.dtype(dtype), jnp.float32), x, w)
        return found, gradient(y)

    found, (dx, dw) = run(x, w, y)
    exact = [np.asarray(part, np.float64) for part in (x, w, y)]
    near = {"rtol": 0, "atol": 1e-4 if dtype == "float32" else 0.2}
    np.testing.assert_allclose(found, exact[0] @ exact[1].T, rtol=0, atol=1e-3)
    np.testing.assert_allclose(np.asarray(dx, np.float64), exact[2] @ exact[1], **near)
    np.testing.assert_allclose(np.asarray(dw, np.float64), exact[2].T @ exact[0], **near)
    assert _is_few(x, w) == (n_rows in FEW and inner == LONG and outer == 6 and jax.default_backend() == "cpu")
