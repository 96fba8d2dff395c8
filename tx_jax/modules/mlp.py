"""The position-wise feed-forward: two maps with an activation between, or three with a gate."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tx_jax.config import ModelConfig
from tx_jax.modules.linear import Linear


def gelu_exact(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """x Φ(x) by erf, which costs half of the erfc that jax.nn.gelu takes. Source: Hendrycks & Gimpel 2016."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS = {  # name: (function, gated)
    "relu": (jax.nn.relu, False),  # Vaswani et al. 2017, eq. 2
    "gelu": (gelu_exact, False),
    "gelu_tanh": (jax.nn.gelu, False),  # its tanh approximation, as in GPT-2
    "silu": (jax.nn.silu, False),  # Marian
    "swiglu": (jax.nn.silu, True),  # Shazeer 2020, eq. 6
    "geglu": (gelu_exact, True),
    "geglu_tanh": (jax.nn.gelu, True),  # T5 v1.1, Gemma
}


class MLP(nn.Module):
    """down(activation(gate x) · up x), or down(activation(up x)) where nothing gates. Called as a mixture is."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"] | None = None, *, deterministic: bool = True
    ) -> Float[Array, "B T D"]:
        activation, gated = ACTIVATIONS[self.cfg.mlp]
        if self.has_variable("params", "gate_up"):  # by `fuse`
            gate, h = jnp.split(Linear(self.cfg, 2 * self.cfg.F, "mlp", name="gate_up")(x), 2, axis=-1)
        else:
            h = Linear(self.cfg, self.cfg.F, "mlp", name="up")(x)
            gate = Linear(self.cfg, self.cfg.F, "mlp", name="gate")(x) if gated else h
        h = activation(gate) * h if gated else activation(h)
        return Linear(self.cfg, self.cfg.d_model, "mlp", residual=True, name="down")(h)
