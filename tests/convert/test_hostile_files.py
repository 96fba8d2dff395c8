"""Files made to do harm: each is refused with one line, at once, in little memory; and thousands of damaged ones."""

import json
import os
import random
import re
import struct
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from test_gguf import info, pair, random_blocks, raw_gguf, text_of, written

from tx_jax.config_json import read_object
from tx_jax.convert.files import open_safetensors
from tx_jax.convert.gguf import open_gguf
from tx_jax.errors import InputError

HUGE = 2**63


def load_gguf(path):
    return dict(open_gguf(path)[1].read())


def load_safetensors(path):
    return dict(open_safetensors(path).read())


def about(start=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def raw(header=None, data=bytes(8), length=None):
    text = header if isinstance(header, bytes) else json.dumps({"a": about()} if header is None else header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = json.dumps(about()).encode()
THEIRS = "Error while deserializing header: "  # the library's own rules, in words that change with its version
SAFETENSORS = {
    "empty file": (b"", "requires a buffer of 8 bytes"),
    "cut length": (b"\x09\0\0", "requires a buffer of 8 bytes"),
    "header over the limit": (raw(length=25_000_001), "its header has 25000001 bytes, more than 25000000"),
    "header of 2^64-1": (raw(length=2**64 - 1), "its header has 18446744073709551615 bytes"),
    "header longer than the file": (raw(length=99, data=b""), "its header has 99 bytes, but 61 are left"),
    "no header": (raw(b"", b""), "Expecting value"),
    "no JSON": (raw(b"{'a'}"), "Expecting property name"),
    "no UTF-8": (raw(b'{"\xff"}'), "'utf-8' codec can't decode byte 0xff"),
    "no object": (raw(b"[]"), "its JSON is no object"),
    "deep lists": (raw(b"[" * 10**5), "recursion"),
    "deep objects": (raw(b'{"a":' * 10**5), "recursion"),
    "deep within the library's limit": (raw(b'{"a":' * 200 + b"1" + b"}" * 200), THEIRS),
    "long number": (raw(b'{"a":' + b"9" * 9999 + b"}"), "Exceeds the limit"),
    "not a number": (raw({"a": about(end=float("nan"))}), THEIRS),
    "twice the same": (raw(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}"), "'a' is given twice in it"),
    "twice a key": (raw(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'), "'dtype' is given"),
    "a name of control characters": (raw(b'{"\\u001b[2J":1,"\\u001b[2J":2}'), r"'\\x1b[2J' is given"),
    "a list for a tensor": (raw({"a": ["F32", [2], [0, 8]]}), "the tensor 'a' is not an object with a dtype"),
    "an object for a dtype": (raw({"a": about(dtype={"F32": None})}), "not an object with a dtype"),
    "unknown dtype": (raw({"a": about(dtype="Q9")}), THEIRS),
    "no shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), THEIRS),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), THEIRS),
    "negative offset": (raw({"a": about(-8, 0)}), THEIRS),
    "negative size": (raw({"a": about(shape=[-2])}), THEIRS),
    "fraction": (raw({"a": about(shape=[2.5])}), THEIRS),
    "swapped offsets": (raw({"a": about(8, 0)}), THEIRS),
    "overlap": (raw({"a": about(), "b": about(4, 12)}, bytes(12)), THEIRS),
    "the same bytes": (raw({"a": about(), "b": about()}), THEIRS),
    "hole": (raw({"a": about(), "b": about(12, 20)}, bytes(20)), THEIRS),
    "bytes missing": (raw(data=bytes(7)), THEIRS),
    "bytes left over": (raw(data=bytes(9)), THEIRS),
    "shape of other bytes": (raw({"a": about(shape=[3])}), THEIRS),
    "shape of 2^63": (raw({"a": about(shape=[HUGE])}), THEIRS),
    "shape of 2^64": (raw({"a": about(shape=[2**64])}), THEIRS),
    "shape that wraps to 8 bytes": (raw({"a": about(shape=[2**62, 4, 2])}), THEIRS),
    "end of 2^64-1": (raw({"a": about(end=2**64 - 1)}), THEIRS),
    "no elements of 2^63": (raw({"a": about(0, 0, [0, HUGE])}, b""), "shape [0, 9223372036854775808], more"),
    "100 dimensions": (raw({"a": about(0, 4, [1] * 100)}, bytes(4)), "more than an array can have"),
    "10^5 tensors": (raw(dict.fromkeys(map(str, range(10**5)), 0)), "it has 100000 tensors, more than 65536"),
    "10^6 tensors": (raw(b"{" + b",".join(b'"%d":%s' % (i, ENTRY) for i in range(10**6)) + b"}"), "its header has"),
}
CUT = "its header is cut short"


def an_array(kind, count, body=b""):
    return raw_gguf([pair("a", 9, struct.pack("<IQ", kind, count) + body)])


AN_ARRAY_OF_EACH = [pair(str(i), 9, struct.pack("<IQ", 2, 10**6) + bytes(2 * 10**6)) for i in range(10)]


def aligned(kind, value):
    return raw_gguf([pair("general.alignment", kind, value)])


GGUF = {
    "empty file": (b"", "it begins with b'', not b'GGUF'"),
    "magic": (raw_gguf(magic=b"GGML"), "it begins with b'GGML', not b'GGUF'"),
    "cut": (b"GGUF\3\0\0", CUT),
    "version": (raw_gguf(version=4), "its version is 4, not 2 or 3"),
    "big-endian": (raw_gguf(version=3 << 24), "it is big-endian; convert it to little-endian"),
    "2^60 tensors": (raw_gguf(counts=(2**60, 0)), CUT),
    "2^64-1 pairs": (raw_gguf(counts=(0, 2**64 - 1)), CUT),
    "10^6 tensors": (raw_gguf(infos=[info(str(i)) for i in range(10**6)]), "it has 1000000 tensors and 0 keys, more"),
    "string of 2^63": (raw_gguf([struct.pack("<Q", HUGE) + bytes(9)]), CUT),
    "string of 2^64-1": (raw_gguf([pair("a", 8, struct.pack("<Q", 2**64 - 1))]), CUT),
    "string that is cut": (raw_gguf([pair("a", 8, struct.pack("<Q", 999))]), CUT),
    "strings in an array": (an_array(8, 2, struct.pack("<Q", HUGE) + bytes(9)), CUT),
    "no UTF-8": (raw_gguf([pair(b"\xff", 7, b"\1")]), "'utf-8' codec can't decode byte 0xff"),
    "array that is cut": (an_array(4, 999), CUT),
    "array of 2^60": (an_array(4, 2**60), "its metadata has more than 2097152 values"),
    "array of 2^64-1 strings": (an_array(8, 2**64 - 1), "its metadata has more than 2097152 values"),
    "10^7 numbers": (raw_gguf(AN_ARRAY_OF_EACH), "its metadata has more than 2097152 values"),
    "10^5 arrays deep": (an_array(9, 1, struct.pack("<IQ", 9, 1) * 10**5), "the key 'a' is an array of arrays, which"),
    "array of 10^6 arrays": (an_array(9, 10**6, bytes(12 * 10**6)), "the key 'a' is an array of arrays, which"),
    "unknown value": (raw_gguf([pair("a", 13, bytes(9))]), "a value of the unknown type 13"),
    "unknown values in an array": (an_array(99, 0), "a value of the unknown type 99"),
    "bool": (raw_gguf([pair("a", 7, b"\2")]), "a bool that is neither 0 nor 1"),
    "key twice": (raw_gguf([pair("a", 7, b"\1")] * 2), "the key 'a' is given twice in it"),
    "tensor twice": (raw_gguf(infos=[info()] * 2, data=bytes(16)), "the tensor 'w' is given twice in it"),
    "alignment of 0": (aligned(4, bytes(4)), "general.alignment=0 is no power of two below"),
    "alignment of 2^32": (aligned(10, struct.pack("<Q", 2**32)), "general.alignment=4294967296"),
    "alignment of 48": (aligned(4, struct.pack("<I", 48)), "general.alignment=48 is no"),
    "alignment of text": (aligned(8, text_of("8")), "general.alignment='8' is no power"),
    "alignment of a half": (aligned(6, struct.pack("<f", 0.5)), "general.alignment=0.5 is no power"),
    "alignment past the end": (raw_gguf([pair("general.alignment", 4, struct.pack("<I", 2**31))], [info()], bytes(16)),
                               "the tensor 'w' ends at byte 2147483664, the file at "),
    "5 dimensions": (raw_gguf(infos=[info(dims=[1] * 5)]), "the tensor 'w' has 5 dimensions, more than 4"),
    "2^31 dimensions": (raw_gguf(infos=[text_of("w") + struct.pack("<I", 2**31) + bytes(9)]), "2147483648 dimen"),
    "dimension of 0": (raw_gguf(infos=[info(dims=(4, 0))]), "the tensor 'w' has a dimension of 0"),
    "size that wraps": (raw_gguf(infos=[info(dims=(2**32, 2**32, 4))], data=bytes(16)), "more than an array can have"),
    "size of 2^63": (raw_gguf(infos=[info(dims=(HUGE,))], data=bytes(16)), "more than an array can have"),
    "unknown type": (raw_gguf(infos=[info(kind=4)], data=bytes(64)), "the tensor 'w' is of the unknown type 4"),
    "part of a block": (raw_gguf(infos=[info(dims=(33, 32), kind=2)]), "has rows of 33, no multiple of Q4_0's 32"),
    "offset off the grid": (raw_gguf(infos=[info(offset=8)], data=bytes(64)), "'w' is at 8, no multiple of 32"),
    "offset of 2^63": (raw_gguf(infos=[info(offset=HUGE)], data=bytes(64)), "the tensor 'w' ends at byte 92233720"),
    "bytes missing": (raw_gguf(infos=[info()], data=bytes(15)), "the tensor 'w' ends at byte 80, the file at 79"),
    "overlap": (raw_gguf(infos=[info("a", dims=(9,)), info("b", offset=32)], data=bytes(64)), "'a' and 'b' overlap"),
}  # fmt: skip
CASES = [pytest.param(load_safetensors, *case, id=f"safetensors, {name}") for name, case in SAFETENSORS.items()]
CASES += [pytest.param(load_gguf, *case, id=f"gguf, {name}") for name, case in GGUF.items()]


@pytest.mark.parametrize(("load", "data", "text"), CASES)
def test_refuses(tmp_path, load, data, text):
    path = tmp_path / "file"
    path.write_bytes(data)
    started = time.process_time()
    one_line = f"^{re.escape(str(path))} cannot be read: .*{re.escape(text)}.*; fetch it again$"
    with pytest.raises(InputError, match=one_line) as refusal:
        load(path)
    assert time.process_time() - started < 1
    assert len(str(refusal.value)) < 600


def test_a_long_header_is_not_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", 10**11))
    os.truncate(path, 10**11 + 8)  # sparse
    started = time.process_time()
    with pytest.raises(InputError, match="its header has 100000000000 bytes, more than 25000000"):
        open_safetensors(path)
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize("load", [open_safetensors, open_gguf])
def test_refuses_what_is_no_file(tmp_path, load):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    for name in ("none", "pipe", "link", "x" * 999, "a\0b"):
        with pytest.raises(InputError, match="is no file; give one that is there"):
            load(tmp_path / name)
    with pytest.raises(InputError, match="is no file; give" if load is open_gguf else "holds neither"):
        load(tmp_path)


@pytest.mark.parametrize("load", [load_safetensors, load_gguf])
def test_a_file_that_shrinks(tmp_path, load):
    path = tmp_path / "file"
    path.write_bytes(raw() if load is load_safetensors else raw_gguf(infos=[info()], data=bytes(16)))
    tensors = open_safetensors(path) if load is load_safetensors else open_gguf(path)[1]
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(InputError, match="cannot be read: it ends 3 bytes before a tensor does; fetch it again"):
        dict(tensors.read())


NUMBERS = [0, 1, 2, 7, 8, 9, 32, 255, 2**16, 2**31, 2**32 - 1, 2**32, 2**60, HUGE - 1, HUGE, 2**64 - 1]


def damaged(data, header, rng):
    """One to three changes, most of them in the header."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(min(len(data), header if rng.random() < 0.8 else len(data)) or 1)
        number = rng.choice(NUMBERS)
        digits = [match.span() for match in re.finditer(rb"\d+", data[:header])] or [(at, at)]
        (a, b), (c, d) = sorted(rng.choices(digits, k=2))
        piece = bytes(data[at : at + rng.randrange(1, 40)])
        change = rng.randrange(9)
        if change == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif change == 1:
            data[at : at + 1] = bytes([(data[at : at + 1] or b"\0")[0] ^ 1 << rng.randrange(8)])
        elif change == 2:
            del data[at : at + rng.choice((1, 3, 8, len(data)))]
        elif change == 3:
            data[at:at] = piece if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 9))
        elif change == 4:
            data[at : at + 8] = struct.pack("<Q", number)
        elif change == 5:
            data[at : at + 4] = struct.pack("<I", number % 2**32)
        elif change == 6:
            data[:8] = struct.pack("<Q", rng.choice((number, header + rng.randrange(-9, 9))))
        elif change == 7:
            data[a:b] = str(rng.choice((number, -number, rng.randrange(200)))).encode()
        elif (a, b) != (c, d):
            data[a:d] = data[c:d] + data[b:c] + data[a:b]
    return bytes(data)


def memory(key):
    """In MiB: VmRSS, or VmHWM, the peak of this process; ru_maxrss begins with that of the parent."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def rounds(path, data, header, load, judge, n):
    """Load n damaged copies of a file, each quickly and in little memory: the count that loads, the last refusal."""
    rng = random.Random(11)
    before, loaded, line = memory("VmRSS"), 0, ""
    for i in range(n):
        path.write_bytes(damaged(data, header, rng) if i else data)
        started, found = time.process_time(), None
        try:
            found = load(path)
        except InputError as error:
            line = str(error)
        assert time.process_time() - started < 1
        assert "\n" not in line
        loaded += found is not None
        if judge:
            judge(path, found)
    assert memory("VmHWM") - before < 300  # MiB
    return loaded, line


def in_child(*args):
    if sys.platform != "linux":
        pytest.skip("the peak of memory is read from /proc")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(rounds, *args).result()


def as_the_library(path, found):
    """What loads is what the library loads; what does not, the library refuses too, but for our own rules."""
    try:
        wanted = load_file(path)
    except (SafetensorError, KeyError, ValueError, OverflowError):
        assert found is None
        return
    if found is None:
        with pytest.raises(InputError, match=r"given twice|more than an array|not an object|convert it"):
            load_safetensors(path)
        return
    assert {name: (x.dtype, x.shape, x.tobytes()) for name, x in found.items()} == {
        name: (x.dtype, x.shape, x.tobytes()) for name, x in wanted.items()
    }


def test_damaged_safetensors(tmp_path):
    arrays = {"w": np.ones((2, 3), np.float32), "b": np.ones(5, ml_dtypes.bfloat16), "none": np.ones((0, 3), np.int8)}
    data = save(arrays, {"format": "pt"})
    header = 8 + int.from_bytes(data[:8], "little")
    assert in_child(tmp_path / "file", data, header, load_safetensors, as_the_library, 5_000)[0] > 100


def test_damaged_gguf(tmp_path):
    blocks = {kind.name: (random_blocks(kind, 1, 2), kind) for kind in (Kind.Q4_1, Kind.Q4_K, Kind.Q6_K)}
    words = {"words": (["a", "ü", "c"] * 5, GGUFValueType.ARRAY)}
    data = written(tmp_path / "whole", blocks | {"w": (np.ones((2, 3), np.float32), None)}, **words).read_bytes()
    header = data.index(b"w\2\0\0\0") + 40
    assert in_child(tmp_path / "file", data, header, load_gguf, None, 5_000)[0] > 100


EMPTY = [(read_object, b"[],", "1,000,000 bytes"), (load_safetensors, b"[],", 2**19), (load_safetensors, b"{},", 2**19)]


@pytest.mark.parametrize(("load", "unit", "most"), EMPTY)
def test_millions_of_empty_values(tmp_path, load, unit, most):
    data = (raw if load is load_safetensors else bytes)(b"[" + unit * 8_000_000 + b"1]")
    assert f" more than {most}" in in_child(tmp_path / "file", data, 0, load, None, 1)[1]
