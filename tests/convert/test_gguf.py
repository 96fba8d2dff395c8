"""GGUF against the package gguf's own writer and reader, and K-quants against ggml's layout."""

import re
import struct
import sys
import time

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from tx_jax.convert.gguf import QUANTISED, is_gguf, open_gguf
from tx_jax.errors import InputError


def refuses(text):
    return pytest.raises(InputError, match=f"^[^\n]*{re.escape(text)}[^\n]*$")


def text_of(value):
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key, kind, value):
    return text_of(key) + struct.pack("<I", kind) + value


def info(name="w", dims=(4,), kind=0, offset=0):
    return text_of(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw_gguf(pairs=(), infos=(), data=b"", magic=b"GGUF", version=3, counts=None):
    counts = counts or (len(infos), len(pairs))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join((*pairs, *infos))
    return head + bytes(-len(head) % 32) + data


def written(path, tensors, **fields):
    """A file by GGUFWriter: tensors by name as (array, kind), where quantised ones are given as bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        writer.add_key_value(key, *value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind, rows, blocks, seed=5):
    """Random bytes, where those that are a float16 scale are finite."""
    _, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, n_bytes), dtype=np.uint8)
    scales = {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
    for at in scales.get(kind.name, [0] if kind.name.endswith("_0") else [0, 2]):
        raw[..., at : at + 2] = rng.normal(size=(rows, blocks, 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, blocks * n_bytes)


@pytest.mark.parametrize("name", QUANTISED)
def test_dequantises_as_the_package_does(tmp_path, name):
    kind = Kind[name]
    n_elements = gguf.GGML_QUANT_SIZES[kind][0]
    tensors = {"wide": (random_blocks(kind, 3, 5), kind), "long": (random_blocks(kind, 1100, 1), kind)}
    if "K" not in name:
        real = np.random.default_rng(0).normal(size=(7, 2 * n_elements)).astype(np.float32)
        tensors["real"] = gguf.quantize(real, kind), kind
    path = written(tmp_path / "a.gguf", tensors)
    _, found = open_gguf(path)
    assert set(found.dtypes.values()) == {"float32"}
    assert found.shapes["wide"] == (3, 5 * n_elements)
    arrays = dict(found.read())
    reader = gguf.GGUFReader(path)
    assert arrays.keys() == {tensor.name for tensor in reader.tensors} == tensors.keys()
    for tensor in reader.tensors:
        wanted = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert arrays[tensor.name].dtype == np.float32
        np.testing.assert_array_equal(arrays[tensor.name], wanted)
        assert np.isfinite(wanted).all()
    if "real" in arrays:
        assert np.abs(arrays["real"] - real).max() < 0.4


def half(block, at):
    return float(np.frombuffer(bytes(block[at : at + 2]), np.float16)[0])


def q4_k(block):
    """Source: ggml-common.h, block_q4_K (d, dmin, scales[12], qs[128]); ggml-quants.c, get_scale_min_k4."""
    d, dmin, scales, qs = half(block, 0), half(block, 2), [int(x) for x in block[4:16]], block[16:]
    values = []
    for j in range(8):  # sub-blocks of 32: the low nibbles of 32 bytes, then their high ones
        if j < 4:
            scale, least = scales[j] & 63, scales[j + 4] & 63
        else:
            scale = (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4
            least = (scales[j + 4] >> 4) | (scales[j] >> 6) << 4
        nibbles = [(int(q) >> 4 * (j % 2)) & 15 for q in qs[32 * (j // 2) : 32 * (j // 2) + 32]]
        values += [d * scale * q - dmin * least for q in nibbles]
    return values


def q6_k(block):
    """Source: ggml-common.h, block_q6_K (ql[128], qh[64], scales[16], d); ggml-quants.c, dequantize_row_q6_K."""
    ql, qh, scales, d = block[:128], block[128:192], block[192:208].view(np.int8), half(block, 208)
    values = []
    for i in range(256):
        part, quarter, place = i // 128, i % 128 // 32, i % 32
        low = int(ql[64 * part + 32 * (quarter % 2) + place]) >> 4 * (quarter // 2) & 15
        high = int(qh[32 * part + place]) >> 2 * quarter & 3
        values.append(d * int(scales[i // 16]) * ((low | high << 4) - 32))
    return values


@pytest.mark.parametrize(("kind", "decode"), [(Kind.Q4_K, q4_k), (Kind.Q6_K, q6_k)])
def test_dequantises_as_ggml_lays_blocks_out(tmp_path, kind, decode):
    raw = random_blocks(kind, 2, 3, seed=6)
    _, found = open_gguf(written(tmp_path / "a.gguf", {"w": (raw, kind)}))
    wanted = [[value for block in row.reshape(3, -1) for value in decode(block)] for row in raw]
    np.testing.assert_allclose(dict(found.read())["w"], wanted, rtol=1e-5, atol=1e-5)


def test_floats_stay_as_they_are(tmp_path):
    array = np.arange(24).reshape(2, 3, 4)
    half = array.astype(ml_dtypes.bfloat16)
    tensors = {"a": (array.astype(np.float32), None), "b": (array.astype(np.float16), None)}
    path = written(tmp_path / "a.gguf", tensors | {"c": (half.view(np.uint8), Kind.BF16)})
    _, found = open_gguf(str(path))
    assert found.shapes == dict.fromkeys("abc", (2, 3, 4))
    assert found.dtypes == {"a": "float32", "b": "float16", "c": "bfloat16"}
    for _ in range(2):
        for name, got in found.read():
            assert (got.dtype.name, got.shape) == (found.dtypes[name], (2, 3, 4))
            assert got.flags.c_contiguous
            np.testing.assert_array_equal(got.astype(int), array)


def test_a_scalar(tmp_path):
    (tmp_path / "a").write_bytes(raw_gguf(infos=[info(dims=())], data=struct.pack("<f", 2.5)))
    ((_, got),) = open_gguf(tmp_path / "a")[1].read()
    assert (got.shape, got) == ((), 2.5)


def test_metadata(tmp_path):
    kinds, of = gguf.GGUFValueType, (gguf.GGUFValueType.ARRAY,)
    fields = {
        "text": ("é\n", kinds.STRING), "no": (False, kinds.BOOL), "small": (-3, kinds.INT8), "byte": (200, kinds.UINT8),
        "i16": (-300, kinds.INT16), "u16": (60_000, kinds.UINT16), "i32": (-(2**31), kinds.INT32),
        "u32": (2**32 - 1, kinds.UINT32), "i64": (-(2**63), kinds.INT64), "u64": (2**64 - 1, kinds.UINT64),
        "f32": (0.5, kinds.FLOAT32), "f64": (0.1, kinds.FLOAT64), "words": (["a", "", "ü"], *of),
        "numbers": ([1, -2], *of), "floats": ([0.5], *of), "flags": ([True, False], *of),
    }  # fmt: skip
    metadata, tensors = open_gguf(written(tmp_path / "a.gguf", {}, **fields))
    wanted = {key: value[0] for key, value in fields.items()} | {"general.architecture": "llama"}
    assert metadata == wanted
    assert {key: type(value) for key, value in metadata.items()} == {key: type(value) for key, value in wanted.items()}
    assert [type(flag) for flag in metadata["flags"]] == [bool, bool]
    assert tensors.shapes == {}


def test_alignment_and_version(tmp_path):
    pairs = [pair("general.alignment", 4, struct.pack("<I", 1024))]
    data = raw_gguf(pairs, [info("a"), info("b", offset=1024)], version=2)
    data = data.ljust(1024, b"\0") + np.arange(4, dtype=np.float32).tobytes().ljust(1024, b"\0") + b"\0" * 16
    (tmp_path / "a").write_bytes(data)
    found = dict(open_gguf(tmp_path / "a")[1].read())
    assert found["a"].tolist() == [0, 1, 2, 3]
    assert found["b"].tolist() == [0, 0, 0, 0]


def test_is_gguf(tmp_path):
    assert is_gguf(written(tmp_path / "a.gguf", {}))
    (tmp_path / "b").write_bytes(b"GGU")
    assert not any(is_gguf(path) for path in (tmp_path, tmp_path / "b", tmp_path / "none"))


def test_a_vocabulary_is_quick(tmp_path):
    words = [f"{i:x}" * 2 for i in range(100_000)]  # as many strings as SmolLM2's header has
    path = written(tmp_path / "a.gguf", {}, words=(words, gguf.GGUFValueType.ARRAY))
    started = time.process_time()
    metadata, _ = open_gguf(path)
    assert time.process_time() - started < 1  # seconds; 0.06 on a quiet machine
    assert metadata["words"] == words


def test_refuses_types_when_they_are_read(tmp_path):
    path = written(tmp_path / "a.gguf", {"a": (np.ones(4, np.float32), None), "odd": (np.ones(4, np.int32), None)})
    _, found = open_gguf(path)
    assert found.dtypes == {"a": "float32", "odd": "I32"}
    with refuses(f"{path}: the tensor 'odd' is I32; convert it to one of F32, F16, BF16, Q4_0"):
        next(found.read())


def test_needs_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with refuses("reading GGUF needs the package gguf; pip install 'tx_jax[gguf]'"):
        open_gguf(tmp_path / "a")
