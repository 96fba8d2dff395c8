"""How far four steps of AdamW move the last block's vectors and the logits, by width, with muP and without: `python -m
benchmarks.coordinate_check`. With muP the columns stay as they are (Yang et al. 2022, appendix D.1)."""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tx_jax as tx


class Changes(NamedTuple):
    """Root mean squares of what steps have changed."""

    hidden: float
    logits: float


def changes(width: int, base: int | None, n_steps: int = 4) -> Changes:
    """Those of a model of two blocks and heads of width / 4, after n_steps on one batch."""
    cfg = tx.ModelConfig(vocab_size=31, d_model=width, n_heads=4, n_layers=2, max_len=16, mup_base_width=base)
    optim = tx.OptimConfig(schedule="constant", warmup_steps=0, peak_lr=1e-2, weight_decay=0.0, clip_norm=None)
    model, optimizer = tx.build(cfg), tx.make_optimizer(optim, n_steps, cfg.width_ratio)
    tokens = np.random.default_rng(0).integers(31, size=(8, 17)).astype(np.int32)
    ones, positions = np.ones((8, 16), np.float32), np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
    batch = tx.Batch(*map(jnp.asarray, (tokens[:, :-1], tokens[:, 1:], ones, positions)))
    quick = {"xla_backend_optimization_level": 0}

    def look(params: dict) -> tuple:
        (logits, _), found = model.apply(
            {"params": params}, batch.tokens,
            capture_intermediates=lambda module, _: module.name == "blocks_1", mutable=["intermediates"],
        )  # fmt: skip
        return found["intermediates"]["stack"]["blocks_1"]["__call__"][0][
            0
        ], logits  # before the norm, which hides scales

    look = jax.jit(look, compiler_options=quick)
    step = jax.jit(tx.make_train_step(model, optimizer), compiler_options=quick)
    state = tx.init_state(model, optimizer, jax.random.key(0))
    before = look(state.params)
    for _ in range(n_steps):
        state, _ = step(state, batch)
    moved = jax.tree.map(lambda new, old: jnp.sqrt(jnp.mean((new - old) ** 2)), look(state.params), before)
    return Changes(*map(float, moved))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    widths = parser.parse_args().widths
    print("| width | muP: hidden | logits | standard: hidden | logits |\n|---|---|---|---|---|")
    for width in widths:
        numbers = [*changes(width, widths[0]), *changes(width, None)]
        print(f"| {width} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")


if __name__ == "__main__":
    main()
