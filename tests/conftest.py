"""Eight CPU devices, and shapes checked as the code runs, for every test."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before jax is imported
os.environ["JAX_PLATFORMS"] = "cpu"

from jaxtyping import install_import_hook

install_import_hook("tx_jax", "beartype.beartype")
