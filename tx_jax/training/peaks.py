"""The most that a device can do, by which a run's speed is judged: published for an accelerator, measured on a CPU."""

import re
import time
from typing import Any

import jax
import jax.numpy as jnp

# Products of bfloat16 (float16 where the device has no other) with sums in float32, dense, a jax.Device a second.
# Sources: NVIDIA's data sheet of each GPU, without sparsity; Google Cloud's page of each TPU, whose figure of a chip is
# halved for v2, v3 and 7x, in which JAX sees two devices.
PEAKS = (
    (r"B200", 2250e12),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100|H200|GH200", 989e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"L4$", 121e12),
    (r"A10G", 70e12),
    (r"A10$", 125e12),
    (r"V100", 125e12),
    (r"T4$", 65e12),
    (r"RTX 4090", 165e12),
    (r"RTX 3090", 71e12),
    (r"TPU ?7x?", 1153e12),
    (r"TPU v6", 918e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v4", 275e12),
    (r"TPU v3", 61.5e12),
    (r"TPU v2", 23e12),
)


def peak_flops(device: Any = None) -> float:
    """The FLOP/s of one device (None: the first): from PEAKS or, where it has no entry, of the best of ten products.

    A CPU that is seen as several devices is shared by them.
    """
    device = device or jax.local_devices()[0]
    known = next((peak for pattern, peak in PEAKS if re.search(pattern, device.device_kind)), None)
    return known or _measured(device) / (jax.local_device_count() if device.platform == "cpu" else 1)


def _measured(device: Any) -> float:
    n, dtype = (1024, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
    x, product, times = jax.device_put(jnp.ones((n, n), dtype), device), jax.jit(jnp.matmul), []
    for _ in range(11):  # the first compiles
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)
