"""Eight CPU devices, and shapes checked as the code runs, for every test."""

import os
import random
from importlib.metadata import version
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before jax is imported
if 10 <= (jaxlib := int(version("jaxlib").split(".")[1])) <= 12:  # others might end at a flag that they do not know
    os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=600"  # eight devices, few cores
    if os.environ.get("COMPILE") != "well":  # as users do; otherwise quickly, to slower programs
        os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_cpu_experimental_ynn_fusion_type="
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false" * (jaxlib == 10)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
from jaxtyping import install_import_hook

if os.environ.get("ANNOTATIONS") != "unchecked":
    install_import_hook("tx_jax", "beartype.beartype")


def pytest_collection_modifyitems(items):
    """In another order, by the number in SHUFFLE: files, and the tests of each."""
    if seed := os.environ.get("SHUFFLE"):
        draw = random.Random(seed)
        files = {item.path: draw.random() for item in items}
        items.sort(key=lambda item: (files[item.path], draw.random()))


@pytest.hookimpl(trylast=True)  # when what a test has patched is mended
def pytest_runtest_teardown(item):
    """A program takes some of the 65,530 maps of memory that Linux gives a process, and XLA crashes without."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def fetched():
    """Calls a function that fetches something by pip; skips the test where pip finds no packages, saying why."""

    def call(function, *args):
        from tx_jax.errors import InputError

        try:
            return function(*args)
        except InputError as error:
            if not str(error).startswith("pip cannot download"):
                raise
            pytest.skip(str(error))

    return call


@pytest.fixture(autouse=True, scope="module")
def programs():
    """Compiled programs end with their file: kept for the whole suite, they would take 7 GB a worker."""
    yield
    jax.clear_caches()
