"""A device's peak is the published one, or what it shows in a product."""

from types import SimpleNamespace

import jax
import pytest

from tx_jax.training.peaks import PEAKS, peak_flops, published, this_device


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125),
        ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459), ("TPU v6 lite", 918), ("TPU v2", 23),
    ],
)  # fmt: skip
def test_published(kind, teraflops):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == teraflops * 1e12


def test_every_row_of_the_table_is_found_by_its_name():
    assert {name: published(name) for name in PEAKS} == {name: device for name, (_, device) in PEAKS.items()}


def test_measured_where_there_is_none_and_shared_by_the_devices_of_a_cpu():
    assert 1e9 / jax.local_device_count() < peak_flops() < 1e13


def test_this_machine_computes_and_copies():
    assert 1e8 < this_device().bandwidth < 1e13
