"""What each device of many computes and sends for a training step, by the compiled program and by a formula.

Neither depends on the machine that compiles: a laptop with 64 virtual devices tells what 64 of a cluster would have to
do. What that takes there at the best, by published peaks, is the second table. Ends with 1 if a ratio is off by 10 %.
"""

import functools
import math
import os
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=64"  # before jax is imported

import jax
import numpy as np

import tx_jax as tx
from tx_jax import Batch, MeshConfig, ModelConfig
from tx_jax.complexity.train_flops import make_train_flops
from tx_jax.models import count_params
from tx_jax.presets import llama3_2_1b

CFG = ModelConfig(vocab_size=4096, d_model=1024, n_heads=64, n_layers=2, max_len=128, mlp="swiglu", norm="rmsnorm")
SENT = {  # bytes that a device sends for one byte of the result, around a ring of n
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
CLUSTERS = {  # devices, FLOP/s of one in bfloat16, bytes/s that one sends, and to other hosts. Sources: as in peaks.py
    "TPU v5e": (256, 197e12, 200e9, None),  # 1,600 Gb/s to neighbours
    "H100 SXM": (64, 989e12, 450e9, 50e9),  # NVLink among eight, then 400 Gb/s each
}


def make_batch(rows: int, length: int) -> Batch:
    return Batch(*(np.zeros((rows, length), kind) for kind in (np.int32, np.int32, np.float32)))


def compiled(axis: str, n: int, batch: Batch) -> jax.stages.Compiled:
    """The training step of CFG on n devices along an axis."""
    model, optimizer = tx.build(CFG), tx.make_optimizer(tx.OptimConfig(), n_steps=100)
    shapes = jax.eval_shape(functools.partial(tx.init_state, model, optimizer), jax.random.key(0))
    mesh = tx.make_mesh(MeshConfig(**{axis: n}), jax.devices()[:n])
    launcher = tx.jit_step(tx.make_train_step(model, optimizer), shapes, mesh)
    return launcher.lower(shapes, launcher.put_batch(batch)).compile()


def sent(program: str) -> float:
    """Bytes that a device sends in a compiled program without loops."""
    total = 0.0
    for line in program.splitlines():
        if message := re.search(rf"= (.*?) ({'|'.join(SENT)})\(", line):
            parts = re.findall(r"(\w+)\[([\d,]*)\]", message[1])
            size = sum(BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d) for kind, dims in parts)
            total += size * SENT[message[2]](ring(line))
    return total


def ring(line: str) -> int:
    """How many devices a message goes around, in each of the ways that XLA writes them."""
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(groups[1].split(","))
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(groups[1])
    groups = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    assert groups, f"no devices in {line}"
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", groups[2]))


def to_send(axis: str, n: int, batch: Batch) -> float:
    """Bytes by the formula, in float32, times (n − 1) / n as around any ring.

    fsdp: each parameter comes once, and its gradient is summed, which is two passes where XLA has no reduce-scatter (on
    CPU); the tied table is multiplied and looked up, and so summed twice. tensor: sums of activations (B, T, D), two
    passes each: two products a layer and the table forward, the gradients of five products a layer and of the head.
    """
    table, activations = CFG.vocab_size * CFG.d_model, batch.tokens.size * CFG.d_model
    numbers = {
        "fsdp": 3 * count_params(CFG) + 2 * table,
        "tensor": 2 * activations * (7 * CFG.n_layers + 2),
    }[axis]
    return 4 * numbers * (n - 1) / n


def foretold(name: str, n: int, peak: float, near: float, far: float | None, rows: int) -> str:
    """A row of the second table: Llama 3.2 1B on rows of 4,096 tokens a device, split by fsdp over a ring of them."""
    cfg = llama3_2_1b()
    flops = make_train_flops(cfg)(make_batch(rows, 4096))
    group = n if far is None else 8  # fsdp where it is quick, copies of that over the rest
    part = 2 * count_params(cfg)  # in bfloat16
    sending = 3 * part * (group - 1) / group / near
    if far is not None:
        copies = n // group
        sending += 2 * part / group * (copies - 1) / copies / far
    computing = flops / peak
    best, worst = computing / max(computing, sending), computing / (computing + sending)
    mesh = f"fsdp {group}" if far is None else f"data {n // group} × fsdp {group}"
    cells = (
        f"{n} × {name}",
        mesh,
        rows,
        f"{computing * 1e3:.0f} ms",
        f"{sending * 1e3:.0f} ms",
        f"{worst:.0%}",
        f"{best:.0%}",
    )
    return row(*cells)


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    print(row("axis", "devices", "GFLOPs of each", "of the formula", "MB that each sends", "of the formula"))
    print(row(*["---"] * 6))
    ratios = []
    for axis in ("fsdp", "tensor"):
        for n in (1, 2, 4, 8, 16, 32, 64):
            batch = make_batch(n if axis == "fsdp" else 8, 128)  # as many rows a device; or the same, split
            program = compiled(axis, n, batch)
            flops, moved = program.cost_analysis()["flops"], sent(program.as_text())
            of_flops = flops / (make_train_flops(CFG)(batch) / n)
            of_bytes = moved / to_send(axis, n, batch) if n > 1 else 1.0
            ratios += [of_flops, of_bytes]
            print(row(axis, n, f"{flops / 1e9:.2f}", f"{of_flops:.3f}", f"{moved / 1e6:.1f}", f"{of_bytes:.3f}"))
    print("\nLlama 3.2 1B, bfloat16, rows of 4,096 tokens: MFU if nothing is sent while computing, and if all is\n")
    print(row("cluster", "mesh", "rows a device", "computing", "sending", "MFU at the least", "at the most"))
    print(row(*["---"] * 7))
    for name, numbers in CLUSTERS.items():
        for rows in (1, 4):
            print(foretold(name, *numbers, rows))
    return int(any(abs(ratio - 1) > 0.1 for ratio in ratios))


if __name__ == "__main__":
    sys.exit(main())
