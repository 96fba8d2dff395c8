"""GGUF files, llama.cpp's: their metadata as plain values, their tensors as a stream of arrays.

The header is parsed here, within bounds, as the reader of the package gguf takes seconds for a vocabulary and for ever
for a hostile length. That package dequantises. Source: github.com/ggml-org/ggml, docs/gguf.md.
"""

import functools
import itertools
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from tx_jax.convert.files import HEADER_LIMIT, MAX_TENSORS, Tensors, brief, check_shape, fill, reader, reading
from tx_jax.errors import InputError, require

# The value types of the metadata, and the fewest bytes that a value of each takes.
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
BOOL, STRING, ARRAY = 7, 8, 9
FEWEST_BYTES = {kind: np.dtype(number).itemsize for kind, number in NUMBERS.items()} | {BOOL: 1, STRING: 8}
MAX_VALUES = 2**21  # in all arrays together; Gemma 3's vocabulary has 1.3 million

NATIVE = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
STEP = 2**16  # elements dequantised at a time, a multiple of every block; the quickest from 2^13 to 2^22


class Entry(NamedTuple):
    """Where a tensor lies."""

    start: int  # bytes
    n_bytes: int
    kind: str  # such as "Q4_K"
    block: tuple[int, int]  # the elements and the bytes of one
    shape: tuple[int, ...]


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a file that begins as GGUF does."""
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file):
        return False
    with reading(file) as opened:
        return opened.read(4) == b"GGUF"


def open_gguf(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Tensors]:
    """The metadata of a GGUF file, and its tensors; shapes in NumPy's order, GGUF's reversed.

    Floating-point tensors keep their dtype, quantised ones (QUANTISED) become float32.

    Raises:
        InputError: there is no such file, it is damaged, or the package gguf is missing; on reading, a type of tensor
            that is neither.
    """
    file = Path(os.path.expanduser(path))
    constants = _package().constants
    with reading(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        head = opened.read(HEADER_LIMIT)
        limit = f"has more than {HEADER_LIMIT} bytes" if size > len(head) else "is cut short"
        try:
            metadata, infos, end = _header(head)
        except (struct.error, OverflowError) as error:
            raise InputError(f"its header {limit}") from error
        alignment = metadata.get("general.alignment", 32)
        good = type(alignment) is int and 0 < alignment < 2**32 and alignment & (alignment - 1) == 0
        require(good, f"general.alignment={brief(alignment)} is no power of two below 2^32")
        data = end + -end % alignment
        entries = {name: _entry(name, info, data, alignment, constants) for name, info in infos.items()}
        _check_extents(entries, size)
    dtypes = {
        name: at.kind if _unread(at.kind) else NATIVE.get(at.kind, NATIVE["F32"]).name for name, at in entries.items()
    }
    shapes = {name: at.shape for name, at in entries.items()}
    return metadata, Tensors(shapes, dtypes, reader(entries, functools.partial(_stream, file)))


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InputError("reading GGUF needs the package gguf; pip install 'tx_jax[gguf]'") from error
    return gguf


def _header(head: bytes) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]], int]:
    """The metadata, the tensors' (dims, type, offset), and the header's end. struct.error: the bytes do not suffice."""
    require(head[:4] == b"GGUF", f"it begins with {head[:4]!r}, not b'GGUF'")
    version, n_tensors, n_pairs = struct.unpack_from("<IQQ", head, 4)
    require(version not in (2 << 24, 3 << 24), "it is big-endian; convert it to little-endian")
    require(version in (2, 3), f"its version is {version}, not 2 or 3")
    at = 24
    _suffices(head, at, 24 * n_tensors + 13 * n_pairs)  # without dimensions, names and keys; with values of a byte
    counts = f"it has {n_tensors} tensors and {n_pairs} keys, more than {MAX_TENSORS}"
    require(max(n_tensors, n_pairs) <= MAX_TENSORS, counts)
    metadata: dict[str, Any] = {}
    n_values = 0
    for _ in range(n_pairs):
        (key,), at = _values(head, at, STRING, 1)
        require(key not in metadata, f"the key {brief(key)} is given twice in it")
        (kind,) = struct.unpack_from("<I", head, at)
        if kind != ARRAY:
            (metadata[key],), at = _values(head, at + 4, kind, 1)
            continue
        kind, count = struct.unpack_from("<IQ", head, at + 4)
        require(kind != ARRAY, f"the key {brief(key)} is an array of arrays, which is not read")  # nor by llama.cpp
        n_values += count
        require(n_values <= MAX_VALUES, f"its metadata has more than {MAX_VALUES} values")
        metadata[key], at = _values(head, at + 16, kind, count)
    infos: dict[str, tuple[Any, ...]] = {}
    for _ in range(n_tensors):
        (name,), at = _values(head, at, STRING, 1)
        require(name not in infos, f"the tensor {brief(name)} is given twice in it")
        (n_dims,) = struct.unpack_from("<I", head, at)
        require(n_dims <= 4, f"the tensor {brief(name)} has {n_dims} dimensions, more than 4")
        *dims, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", head, at + 4)
        infos[name] = dims, kind, offset
        at += 16 + 8 * n_dims
    return metadata, infos, at


def _values(head: bytes, at: int, kind: int, count: int) -> tuple[list[Any], int]:
    """`count` values of a kind from byte `at` on, and the byte after them."""
    require(kind in FEWEST_BYTES, f"its metadata has a value of the unknown type {kind}")
    _suffices(head, at, count * FEWEST_BYTES[kind])
    if kind == STRING:
        return _strings(head, at, count)
    values = np.frombuffer(head, NUMBERS.get(kind, "<u1"), count, at)
    require(kind != BOOL or not (values > 1).any(), "its metadata has a bool that is neither 0 nor 1")
    return (values == 1 if kind == BOOL else values).tolist(), at + values.nbytes


def _strings(head: bytes, at: int, count: int) -> tuple[list[Any], int]:
    values = []
    length = struct.Struct("<Q").unpack_from
    for _ in range(count):
        (n_bytes,) = length(head, at)
        end = at + 8 + n_bytes
        if end > len(head):  # not _suffices, for speed: a vocabulary has 100,000 strings
            raise struct.error(f"a string ends at byte {end} of {len(head)}")
        values.append(str(head[at + 8 : end], "utf-8"))
        at = end
    return values, at


def _suffices(head: bytes, at: int, n_bytes: int) -> None:
    if at + n_bytes > len(head):
        raise struct.error(f"{n_bytes} bytes are needed at byte {at} of {len(head)}")


def _entry(name: str, info: tuple[Any, ...], data: int, alignment: int, constants: Any) -> Entry:
    dims, kind, offset = info
    require(kind in constants.GGML_QUANT_SIZES, f"the tensor {brief(name)} is of the unknown type {kind}")
    kind = constants.GGMLQuantizationType(kind)
    block, block_bytes = constants.GGML_QUANT_SIZES[kind]
    require(0 not in dims, f"the tensor {brief(name)} has a dimension of 0")
    check_shape(name, tuple(dims))
    whole = (dims or [1])[0] % block == 0
    require(whole, f"the tensor {brief(name)} has rows of {(dims or [1])[0]}, no multiple of {kind.name}'s {block}")
    require(offset % alignment == 0, f"the tensor {brief(name)} is at {offset}, no multiple of {alignment}")
    n_bytes = math.prod(dims) // block * block_bytes
    return Entry(data + offset, n_bytes, kind.name, (block, block_bytes), tuple(reversed(dims)))


def _check_extents(entries: dict[str, Entry], size: int) -> None:
    placed = sorted(entries.items(), key=lambda item: item[1].start)
    for name, at in placed:
        end = at.start + at.n_bytes
        require(end <= size, f"the tensor {brief(name)} ends at byte {end}, the file at {size}")
    for (one, at), (other, after) in itertools.pairwise(placed):
        apart = at.start + at.n_bytes <= after.start
        require(apart, f"the tensors {brief(one)} and {brief(other)} overlap")


def _unread(kind: str) -> bool:
    return kind not in NATIVE and kind not in QUANTISED


def _stream(path: Path, entries: dict[str, Entry]) -> Iterator[tuple[str, np.ndarray]]:
    for name, at in entries.items():
        remedy = f"convert it to one of {', '.join((*NATIVE, *QUANTISED))}"
        require(not _unread(at.kind), f"{path}: the tensor {brief(name)} is {at.kind}; {remedy}")
    with reading(path) as file:
        for name, at in entries.items():
            array = np.empty(at.shape, NATIVE.get(at.kind, NATIVE["F32"]))
            if at.kind in NATIVE:
                fill(file, at.start, array)
            else:
                _dequantise(file, at, array.reshape(-1))
            yield name, array


def _dequantise(file: BinaryIO, at: Entry, out: np.ndarray) -> None:
    gguf = _package()
    kind = gguf.GGMLQuantizationType[at.kind]
    block, block_bytes = at.block
    for start in range(0, out.size, STEP):
        piece = out[start : start + STEP]
        raw = np.empty(piece.size // block * block_bytes, np.uint8)
        fill(file, at.start + start // block * block_bytes, raw)
        with np.errstate(over="ignore", invalid="ignore"):  # a scale may be infinite: that is the file's to say
            piece[:] = gguf.dequantize(raw, kind)
