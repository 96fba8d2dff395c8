"""The position-wise feed-forward: two maps with an activation between, or three with a gate."""

import functools

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from tx_jax.config import ModelConfig
from tx_jax.modules.linear import Linear

gelu_exact = functools.partial(jax.nn.gelu, approximate=False)
ACTIVATIONS = {  # name: (function, gated)
    "relu": (jax.nn.relu, False),  # Vaswani et al. 2017, eq. 2
    "gelu": (gelu_exact, False),  # Hendrycks & Gimpel 2016: x Φ(x)
    "gelu_tanh": (jax.nn.gelu, False),  # its tanh approximation, as in GPT-2
    "swiglu": (jax.nn.silu, True),  # Shazeer 2020, eq. 6
    "geglu": (gelu_exact, True),
    "geglu_tanh": (jax.nn.gelu, True),  # T5 v1.1, Gemma
}


class MLP(nn.Module):
    """down(activation(gate x) · up x), or down(activation(up x)) where nothing gates."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        activation, gated = ACTIVATIONS[self.cfg.mlp]
        h = Linear(self.cfg, self.cfg.F, "mlp", name="up")(x)
        h = activation(Linear(self.cfg, self.cfg.F, "mlp", name="gate")(x)) * h if gated else activation(h)
        return Linear(self.cfg, self.cfg.d_model, "mlp", residual=True, name="down")(h)
