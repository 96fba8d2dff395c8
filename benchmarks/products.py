"""The matrix products of one feed-forward layer and its gradient, by XLA and by torch, in turn: float32, on a CPU.

    python benchmarks/products.py

Two thirds of the default step of benchmarks/train.py are such products, which neither side writes itself: their ratio
says how much of the ratio there is that of the libraries. Each side has a process of its own, and one core or two.
"""

import statistics
import subprocess
import sys

SHAPE = "rows, inner, outer = 4096, 384, 1536"
SIDES = {
    "XLA": """
import jax, jax.numpy as jnp
from tx_jax.memory import keep_memory
keep_memory()
x, w, g = jnp.ones((rows, inner)), jnp.ones((outer, inner)), jnp.ones((rows, outer))
products = [(jax.jit(lambda a, b, how=how: jnp.einsum(how, a, b)), a, b) for how, a, b in (
    ("RI,OI->RO", x, w), ("RO,OI->RI", g, w), ("RO,RI->OI", g, x))]
def run():
    for product, a, b in products: product(a, b).block_until_ready()
""",
    "torch": """
import os, torch
torch.set_num_threads(len(os.sched_getaffinity(0)))
x, w, g = torch.ones(rows, inner), torch.ones(outer, inner), torch.ones(rows, outer)
def run(): x @ w.T, g @ w, g.T @ x
""",
}
LOOP = """
import sys, time
run(), run(), print(flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    for _ in range(3): run()
    print(3 * 3 * 2e-9 * rows * inner * outer / (time.perf_counter() - start), flush=True)
"""


def main(rounds: int = 30) -> None:
    for cores in ("0", "0,1"):
        sides = {}
        for name, code in SIDES.items():
            command = ["taskset", "-c", cores, sys.executable, "-c", SHAPE + code + LOOP]
            sides[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            ask(sides[name], None)
        found = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                found[name].append(float(ask(side, "\n")))
        for side in sides.values():
            side.communicate()
        ratio = statistics.median(ours / theirs for ours, theirs in zip(*found.values(), strict=True))
        speeds = ", ".join(f"{name} {statistics.median(speed):.0f}" for name, speed in found.items())
        print(f"cores {cores}: GFLOP/s, medians of {rounds}: {speeds}; ratio {ratio:.2f}")


def ask(side: subprocess.Popen, line: str | None) -> str:
    """A line of what a side prints, after it was given one."""
    assert side.stdin is not None
    assert side.stdout is not None
    if line:
        side.stdin.write(line)
        side.stdin.flush()
    return side.stdout.readline()


if __name__ == "__main__":
    main()
