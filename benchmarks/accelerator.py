"""What only an accelerator tells: whether its attention kernel is right, and how near its peak training comes.

    python benchmarks/accelerator.py           # on one GPU or TPU, in minutes; torch beside it where it has the GPU
    python benchmarks/accelerator.py --small   # the same on a CPU, of models so small that the figures mean nothing

Prints, for attention, the time of the kernel and of the reference, forward and backward, and how far they are apart, in
parts of the largest value; for a step of GPT-2 small and of Llama 3.2 1B in bfloat16, tokens/s, MFU and memory.
"""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import tx_jax as tx
from tx_jax.complexity.train_flops import make_train_flops
from tx_jax.config import ModelConfig
from tx_jax.ops.kernels import OF_BACKEND
from tx_jax.parallel import jit_step
from tx_jax.run_config import OptimConfig
from tx_jax.training.peaks import peak_flops
from tx_jax.training.report import memory_in_use


@dataclasses.dataclass
class Args:
    small: bool = False
    steps: int = 20  # that are timed
    batch_size: int = 32  # of GPT-2, 1,024 tokens a row
    llama_batch_size: int = 8  # of Llama, 2,048 tokens a row
    remat: str = "dots"  # of Llama


def seconds(function, *args, n: int = 10) -> float:
    """The median time of a call, after the first two."""
    found = []
    for _ in range(n + 2):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


def kernels(small: bool) -> None:
    """The kernel of this device beside the reference."""
    impl, dtype = (OF_BACKEND.get(jax.default_backend()), jnp.bfloat16) if not small else ("splash", jnp.float32)
    N, K, H = (2, 1, 64) if small else (16, 4, 64)
    for T in (256,) if small else (1024, 4096):
        for window in (None, T // 4):
            keys = jax.random.split(jax.random.key(0), 4)
            q, k, v, w = (
                jax.random.normal(key, (4, T, n, H), dtype) for key, n in zip(keys, (N, K, K, N), strict=True)
            )
            mask, found = tx.Mask(causal=True, window=window), {}
            for name in (impl, "xla"):
                attend = functools.partial(tx.attention, mask=mask, impl=name)
                both = jax.jit(lambda q, k, v, w, f=attend: (lambda out, pull: (out, pull(w)))(*jax.vjp(f, q, k, v)))
                found[name] = seconds(both, q, k, v, w), jax.tree.leaves(both(q, k, v, w))
            (ours, one), (plain, other) = found[impl], found["xla"]
            apart = max(
                float(jnp.abs(a.astype(float) - b).max() / jnp.abs(b).max()) for a, b in zip(one, other, strict=True)
            )
            times = f"{impl} {ours * 1e3:.2f} ms, xla {plain * 1e3:.2f} ms"
            print(f"attention, T {T}, window {window}: {times}, apart {apart:.1e}")


def train(name: str, cfg: ModelConfig, B: int, T: int, remat: str, steps: int) -> None:
    """Tokens/s, MFU and memory of a training step."""
    model, optimizer = tx.build(cfg, remat), tx.make_optimizer(OptimConfig(moment_dtype="bfloat16"), 1000)
    begin = functools.partial(tx.init_state, model, optimizer)
    launch = jit_step(tx.make_train_step(model, optimizer), jax.eval_shape(begin, jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(cfg.vocab_size or 1, size=(B, T + 1), dtype=np.int32)
    batch = tx.Batch(tokens[:, :-1], tokens[:, 1:], np.ones((B, T), np.float32))
    flops, placed = make_train_flops(cfg)(batch), launch.put_batch(batch)
    state = launch.make_state(begin)(jax.random.key(0))
    for _ in range(3):
        state, metrics = launch.step(state, placed)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = launch.step(state, placed)
    loss, each = float(metrics.loss), (time.perf_counter() - start) / steps
    print(
        f"{name}, B {B}, T {T}: {B * T / each:,.0f} tokens/s, MFU {flops / each / peak_flops():.1%}, "
        f"{memory_in_use() / 2**30:.1f} GiB, loss {loss:.4f}"
    )


def torch_gpt2(cfg: ModelConfig, B: int, T: int, steps: int) -> None:
    """The plain torch peer: fused attention, autocast to bfloat16, compiled."""
    try:
        import torch
        from torch_gpt import TorchGPT, adamw_groups
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    model = TorchGPT(cfg).cuda()
    optimizer = torch.optim.AdamW(adamw_groups(model, 0.1), lr=1e-3, fused=True)
    compiled = torch.compile(model)
    ids = torch.randint(cfg.vocab_size or 1, (B, T + 1), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(compiled(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    print(f"the same in torch {torch.__version__}: {B * T * steps / (time.perf_counter() - start):,.0f} tokens/s")


def main(args: Args) -> None:
    """Measure and print."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, peak {peak_flops() / 1e12:.0f} TFLOP/s")
    kernels(args.small)
    gpt2, llama = tx.presets.gpt2_small(), tx.presets.llama3_2_1b()
    sizes = {"vocab_size": 128, "d_model": 64, "n_layers": 2, "n_heads": 2, "max_len": 128} if args.small else {}
    gpt2 = dataclasses.replace(gpt2, **(sizes or {"dtype": "bfloat16"}))
    llama = dataclasses.replace(llama, **(sizes | {"n_kv_heads": 1, "d_mlp": 128} if sizes else {"dtype": "bfloat16"}))
    T = 128 if args.small else 1024
    train("GPT-2 small", gpt2, args.batch_size, T, "none", args.steps)
    torch_gpt2(gpt2, args.batch_size, T, args.steps)
    train("Llama 3.2 1B", llama, args.llama_batch_size, T if args.small else 2 * T, args.remat, args.steps)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
