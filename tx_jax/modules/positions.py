"""A position scheme answers three questions: what is added to the embedding, how q and k are turned, and what is
added to the scores. One with nothing to say returns its input, or None."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tx_jax.config import ModelConfig, RotaryConfig
from tx_jax.errors import require
from tx_jax.modules.linear import TABLE_INITS
from tx_jax.ops import positions as ops

FREQUENCIES = {  # of rotary, by RotaryConfig.scaling: radians per token of each pair
    "none": lambda r, H: ops.rotary_frequencies(H, r.base),
    "linear": lambda r, H: ops.rotary_frequencies(H, r.base) / r.factor,  # Chen et al. 2023
    "ntk": lambda r, H: ops.ntk_frequencies(H, r.base, r.factor),
    "yarn": lambda r, H: ops.yarn_frequencies(H, r.base, r.factor, r.original_len, r.beta_fast, r.beta_slow),
    "llama3": lambda r, H: ops.llama3_frequencies(
        H, r.base, r.factor, r.original_len, r.low_freq_factor, r.high_freq_factor
    ),
}


def rotation(positions: Int[Array, "b T"], cfg: RotaryConfig, d_head: int) -> ops.Rotation:
    """The angles of a RotaryConfig for heads of which d_head columns are turned."""
    amplitude = ops.yarn_amplitude(cfg.factor) if cfg.scaling == "yarn" else 1.0
    return ops.rotation(positions, FREQUENCIES[cfg.scaling](cfg, d_head), amplitude)


class NoPositions(nn.Module):
    """Order enters by the causal mask alone. Also what the other schemes refine."""

    cfg: ModelConfig
    causal: bool

    def add(self, x: Float[Array, "B T D"], positions: Int[Array, "b T"]) -> Float[Array, "B T D"]:
        """The embeddings, with what this scheme adds."""
        return x

    def turn(self, positions: Int[Array, "b T"], windowed: bool = False) -> ops.Rotation | None:
        """What q and k are turned by, in layers that see a window or all."""
        return None

    def bias(self, q_positions: Int[Array, "b T"], k_positions: Int[Array, "b S"]) -> Float[Array, "b N T S"] | None:
        """What is added to the scores."""
        return None


class Sinusoidal(NoPositions):
    """Vaswani et al. 2017, §3.5."""

    def add(self, x, positions):
        interleaved = self.cfg.positions == "sinusoidal"
        return x + ops.sinusoids(positions, self.cfg.d_model, interleaved=interleaved).astype(x.dtype)


class Learned(NoPositions):
    """A (position_offset + max_len, D) table, as in GPT-2 and BERT."""

    def setup(self) -> None:
        init = TABLE_INITS[self.cfg.init](self.cfg.d_model)
        self.table = self.param("table", init, (self.cfg.position_offset + self.cfg.max_len, self.cfg.d_model))

    def add(self, x, positions):
        T, room = x.shape[1], self.cfg.max_len
        require(room >= T, f"{T} tokens exceed max_len={room}, the learned positions; shorten them")
        rows = self.cfg.position_offset + jnp.maximum(positions, 0)  # −1 would wrap to the last row
        return x + self.table.astype(x.dtype)[rows]


class Rotary(NoPositions):
    """Su et al. 2021 (RoFormer)."""

    def turn(self, positions, windowed=False):
        rotary = self.cfg.rotary
        if windowed and rotary.window_base is not None:
            rotary = RotaryConfig(base=rotary.window_base, fraction=rotary.fraction)
        return rotation(positions, rotary, int(self.cfg.H * rotary.fraction))


class Alibi(NoPositions):
    """Press et al. 2021."""

    def bias(self, q_positions, k_positions):
        return ops.alibi_bias(q_positions, k_positions, self.cfg.n_heads)


class T5(NoPositions):
    """Raffel et al. 2020, §2.1: one learned bias for each bucket and head, shared by the layers of a stack."""

    def setup(self) -> None:
        shape = (self.cfg.n_buckets, self.cfg.n_heads)
        self.table = self.param("table", nn.initializers.normal(0.02), shape)

    def bias(self, q_positions, k_positions):
        cfg = self.cfg
        buckets = ops.t5_buckets(
            q_positions, k_positions,
            n_buckets=cfg.n_buckets, max_distance=cfg.max_distance, bidirectional=not self.causal,
        )  # fmt: skip
        return jnp.moveaxis(self.table[buckets], -1, 1)


SCHEMES = {
    "none": NoPositions,
    "sinusoidal": Sinusoidal,
    "sinusoidal_concat": Sinusoidal,
    "learned": Learned,
    "rotary": Rotary,
    "rotary_pairs": Rotary,
    "alibi": Alibi,
    "t5": T5,
}
