"""The most that a device can do, by which a run's speed is judged: published for an accelerator, measured on a CPU."""

import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Device(NamedTuple):
    """What one jax.Device can do in a second, at most."""

    flops: float  # products of bfloat16 (float16 where there is no other) with sums in float32, dense
    bandwidth: float  # bytes from and to its memory


# Sources: NVIDIA's data sheet of each GPU, without sparsity; Google Cloud's page of each TPU, whose figures of a chip
# are halved for v2, v3 and 7x, in which JAX sees two devices.
PEAKS = {  # by name, which finds itself: the device_kind of such a device, and what it can do
    "B200": (r"B200", Device(2250e12, 8000e9)),
    "H100 PCIe": (r"H100 PCIe", Device(756e12, 2000e9)),
    "H100 NVL": (r"H100 NVL", Device(835e12, 3900e9)),
    "GH200": (r"GH200", Device(989e12, 4000e9)),
    "H200": (r"H200", Device(989e12, 4800e9)),
    "H100": (r"H100", Device(989e12, 3350e9)),
    "A100 40GB": (r"A100.*40 ?GB", Device(312e12, 1555e9)),
    "A100": (r"A100", Device(312e12, 2039e9)),
    "L40S": (r"L40S", Device(362e12, 864e9)),
    "L4": (r"L4$", Device(121e12, 300e9)),
    "A10G": (r"A10G", Device(70e12, 600e9)),
    "A10": (r"A10$", Device(125e12, 600e9)),
    "V100": (r"V100", Device(125e12, 900e9)),
    "T4": (r"T4$", Device(65e12, 320e9)),
    "RTX 4090": (r"RTX 4090", Device(165e12, 1008e9)),
    "RTX 3090": (r"RTX 3090", Device(71e12, 936e9)),
    "TPU v7x": (r"TPU v?7x?", Device(1153e12, 3690e9)),
    "TPU v6e": (r"TPU v6", Device(918e12, 1640e9)),
    "TPU v5e": (r"TPU v5 ?(lite|e)", Device(197e12, 819e9)),
    "TPU v5p": (r"TPU v5", Device(459e12, 2765e9)),
    "TPU v4": (r"TPU v4", Device(275e12, 1228e9)),
    "TPU v3": (r"TPU v3", Device(61.5e12, 450e9)),
    "TPU v2": (r"TPU v2", Device(23e12, 350e9)),
}


def published(kind: str) -> Device | None:
    """That of a jax.Device's device_kind, or of a name in PEAKS; None: there is none.

    >>> published("TPU v5 lite") == published("TPU v5e") == Device(197e12, 819e9)
    True
    """
    return next((device for pattern, device in PEAKS.values() if re.search(pattern, kind)), None)


def this_device() -> Device:
    """The first of this machine: published or, where it has no entry in PEAKS, the best of ten products and copies."""
    device = jax.local_devices()[0]
    return published(device.device_kind) or Device(peak_flops(device), _copied(device))


def peak_flops(device: Any = None) -> float:
    """The FLOP/s of one device (None: the first): from PEAKS or, where it has no entry, of the best of ten products.

    A CPU that is seen as several devices is shared by them.
    """
    device = device or jax.local_devices()[0]
    known = published(device.device_kind)
    return known.flops if known else _measured(device) / (jax.local_device_count() if device.platform == "cpu" else 1)


def _measured(device: Any) -> float:
    n, dtype = (1024, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
    x = jax.device_put(jnp.ones((n, n), dtype), device)
    return 2 * n**3 / _least_time(jax.jit(jnp.matmul), x, x)


def _copied(device: Any) -> float:
    x = jax.device_put(jnp.ones(2**26, jnp.float32), device)
    return 2 * x.nbytes / _least_time(jax.jit(jnp.negative), x)


def _least_time(function: Any, *args: Any) -> float:
    times = []
    for _ in range(11):  # the first compiles
        start = time.perf_counter()
        function(*args).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)
