"""Weights on disk as a stream of named arrays: a safetensors file, or a directory of them.

A file may come from anyone. The safetensors library judges its header; what the library lets pass (a name given twice,
a path out of the directory, a header that takes seconds) is refused here. The bytes are read rather than mapped, as
mapped pages count as memory for as long as a file is open.
"""

import collections
import contextlib
import itertools
import json
import math
import os
import struct
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tx_jax.config_json import check_count, check_link
from tx_jax.errors import InputError, require

HEADER_LIMIT = 25_000_000  # bytes; the largest headers in use have some 10 MB, nearly all of it a GGUF vocabulary
MAX_TENSORS = 2**16  # in one file; those in use have some thousands
DTYPES = {  # that NumPy and JAX compute with, by their name in a header
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "BOOL": np.dtype(np.bool_),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32), "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8),
}  # fmt: skip
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # loading one can run any code
FORMAT: Mapping[str, str] = types.MappingProxyType({"format": "pt"})  # transformers refuses a file without it


class Tensors(NamedTuple):
    """Named arrays that are not in memory yet: what they are, and a function that streams them, one at a time."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # NumPy's name, such as "bfloat16"; of what cannot be read, the file's
    read: Callable[..., Iterator[tuple[str, np.ndarray]]]  # all, or those of the names given; C-contiguous


def reader(entries: dict[str, Any], stream: Callable[[dict[str, Any]], Iterator]) -> Callable[..., Iterator]:
    """What `Tensors.read` is, from what streams entries."""
    return lambda names=None: stream({name: at for name, at in entries.items() if names is None or name in names})


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    start: int  # bytes
    dtype: str  # as the file calls it
    shape: tuple[int, ...]


def open_safetensors(path: str | os.PathLike[str]) -> Tensors:
    """The tensors in a safetensors file, or in a directory with model.safetensors or model.safetensors.index.json.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_safetensors(directory, [("w", np.ones((2, 3), np.float16))])
    ...     open_safetensors(directory).shapes
    {'w': (2, 3)}

    Raises:
        InputError: there are no such files, they are damaged or contradict each other, or lie outside the directory;
            on reading, a dtype that is not in DTYPES.
    """
    root = Path(os.path.expanduser(path))
    entries: dict[str, Entry] = {}
    for file, names in (_shards(root) if os.path.isdir(root) else {check_no_pickle(root): None}).items():
        found = _entries(file)
        for name in found.keys() ^ (found.keys() if names is None else names):
            rule = "holds {}, which {} does not put there" if name in found else "lacks {}, which {} puts there"
            raise InputError(f"{file} {rule.format(brief(name), INDEX)}; fetch both again")
        entries |= found
    dtypes = {name: DTYPES[at.dtype].name if at.dtype in DTYPES else at.dtype for name, at in entries.items()}
    return Tensors({name: at.shape for name, at in entries.items()}, dtypes, reader(entries, _stream))


def save_safetensors(
    directory: str | os.PathLike[str],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = 5 * 10**9,  # as transformers' save_pretrained
    metadata: Mapping[str, str] = FORMAT,
) -> None:
    """Write tensors into a directory as model.safetensors; over max_shard_bytes in shards, with an index.

    At most one shard and one more tensor are held in memory. Files get their names when all of them are whole.

    Raises:
        InputError: the directory cannot be written or holds weights already, a name comes twice, or a dtype is not
            in DTYPES.
    """
    require(max_shard_bytes > 0, f"max_shard_bytes={max_shard_bytes} must be positive; 5 * 10**9 is usual")
    root = Path(os.path.expanduser(directory))
    parts: list[Path] = []
    names: list[list[str]] = []
    total = 0
    try:
        with _writing(root):
            root.mkdir(parents=True, exist_ok=True)
            old = sorted(root.glob("*.safetensors*"))
            require(not old, f"{root} holds {old and old[0].name} already; use another directory, or remove it")
        for shard in _batches(tensors, max_shard_bytes):
            parts.append(root / f"{len(parts)}.{os.getpid()}.part")
            names.append(list(shard))
            total += sum(array.nbytes for array in shard.values())
            with _writing(root):
                parts[-1].touch()
                mode = parts[-1].stat().st_mode  # the library's files are for their owner alone
                save_file(shard, parts[-1], dict(metadata))
                parts[-1].chmod(mode)
            del shard  # before the next one fills
        with _writing(root):
            _publish(root, parts, names, total)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """An open file; whatever is found wrong with it becomes an InputError that names it."""
    require(os.path.isfile(path), f"{path} is no file; give one that is there")
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); give a file that you may read") from error
    except (ValueError, RecursionError, struct.error, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {brief(error, 300)}; fetch it again") from error


def fill(file: BinaryIO, start: int, array: np.ndarray) -> None:
    """Read into an array the bytes of a file from a byte on."""
    file.seek(start)
    got = file.readinto(array.reshape(-1).view(np.uint8))  # type: ignore[attr-defined]  # of open files, not BinaryIO
    require(got == array.nbytes, f"it ends {array.nbytes - got} bytes before a tensor does")


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Refuse what NumPy cannot hold, which has limits for arrays without elements too."""
    fits = len(shape) <= 32 and math.prod(max(n, 1) for n in shape) < 2**60
    require(fits, f"the tensor {brief(name)} has shape {brief(list(shape))}, more than an array can have")


def brief(value: Any, length: int = 80) -> str:
    """A value of a file in an error message: one line, printable, not long."""
    text = repr(value) if isinstance(value, str) else repr(str(value))[1:-1]
    return text if len(text) <= length else f"{text[:length]}…"


def check_no_pickle(path: Path) -> Path:
    rule = "is a pickle, which can run any code when it is loaded"
    remedy = "give safetensors, which transformers' save_pretrained writes"
    require(path.suffix not in PICKLES, f"{path} {rule}; {remedy}")
    return path


def _shards(root: Path) -> dict[Path, set[str] | None]:
    """The files of a directory, each with the names that the index promises."""
    if os.path.isfile(root / WEIGHTS):
        return {_inside(root, WEIGHTS): None}
    if not os.path.isfile(root / INDEX):
        found = sorted(file.name for file in root.glob("*") if file.suffix in (".safetensors", *PICKLES))
        safe = [name for name in found if name.endswith(".safetensors")]
        check_no_pickle(root / (found[0] if found and not safe else WEIGHTS))
        remedy = f"give {root / safe[0]}" if safe else "give a directory of weights"
        raise InputError(f"{root} holds neither {WEIGHTS} nor {INDEX}; {remedy}")
    index = _inside(root, INDEX)
    with reading(index) as file:
        text = file.read(HEADER_LIMIT + 1)
        require(len(text) <= HEADER_LIMIT, f"it has more than {HEADER_LIMIT} bytes")
        found = _json_object(text).get("weight_map")
        if not isinstance(found, dict):
            raise InputError("it has no weight_map")
        where = {name: shard for name, shard in found.items() if isinstance(shard, str)}
        require(len(where) == len(found), "its weight_map gives a shard that is no string")
    promised = collections.defaultdict(set)
    for name, shard in where.items():
        promised[shard].add(name)
    return {_inside(root, shard): promised[shard] for shard in sorted(promised)}


def _inside(root: Path, name: str) -> Path:
    """A file of a directory by its plain name."""
    plain = name == os.path.basename(name) and "\\" not in name and name not in ("", ".", "..")
    require(plain, f"{INDEX} names the shard {brief(name)}, which is no plain file name; use weights that you trust")
    require(os.path.isfile(root / name), f"{root} has no file {brief(name)}; fetch it, too")
    return check_link(root / name)


def _entries(path: Path) -> dict[str, Entry]:
    """What a file holds, in the order of its bytes."""
    with reading(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        room = os.fstat(file.fileno()).st_size - 8
        require(length <= HEADER_LIMIT, f"its header has {length} bytes, more than {HEADER_LIMIT}")
        require(length <= room, f"its header has {length} bytes, but {room} are left")
        header = _json_object(file.read(length))
        header.pop("__metadata__", None)
        require(len(header) <= MAX_TENSORS, f"it has {len(header)} tensors, more than {MAX_TENSORS}")
        with safe_open(path, "np"):  # the library's judgement of names, dtypes, shapes, and the bytes they cover
            pass
        found = [_entry(path, 8 + length, name, about) for name, about in header.items()]
    return dict(sorted(found, key=lambda item: item[1].start))


def _entry(path: Path, base: int, name: str, about: Any) -> tuple[str, Entry]:
    usual = isinstance(about, dict) and isinstance(about["dtype"], str)  # the library takes lists for objects
    require(usual, f"the tensor {brief(name)} is not an object with a dtype")
    shape = tuple(about["shape"])
    check_shape(name, shape)
    return name, Entry(path, base + about["data_offsets"][0], about["dtype"], shape)


def _json_object(text: bytes) -> dict[str, Any]:
    check_count(text)
    found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    require(isinstance(found, dict), "its JSON is no object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = collections.Counter(name for name, _ in pairs).most_common(1)
        raise InputError(f"{brief(twice)} is given twice in it")
    return found


def _stream(entries: dict[str, Entry]) -> Iterator[tuple[str, np.ndarray]]:
    for name, at in entries.items():
        remedy = f"convert it to one of {', '.join(DTYPES)}"
        require(at.dtype in DTYPES, f"{at.file}: the tensor {brief(name)} is {at.dtype}; {remedy}")
    for path, group in itertools.groupby(entries.items(), lambda item: item[1].file):
        with reading(path) as file:
            for name, at in group:
                array = np.empty(at.shape, DTYPES[at.dtype])
                fill(file, at.start, array)
                yield name, array


def _batches(tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    """The tensors, as many at a time as fit into max_bytes, at least one."""
    seen: set[str] = set()
    shard: dict[str, np.ndarray] = {}
    room = max_bytes
    for name, given in tensors:
        array = np.asarray(given, order="C")  # safetensors writes the buffer under a view, whatever its strides
        require(
            name not in seen and name != "__metadata__", f"the name {brief(name)} is taken; give each tensor its own"
        )
        remedy = "use one of " + ", ".join(dtype.name for dtype in DTYPES.values())
        require(array.dtype.newbyteorder("=") in DTYPES.values(), f"{brief(name)} is {array.dtype}; {remedy}")
        if shard and array.nbytes > room:
            yield shard
            shard, room = {}, max_bytes
        seen.add(name)
        shard[name] = array
        room -= array.nbytes
    yield shard


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        remedy = "make room there, or use another directory"
        raise InputError(f"cannot write weights into {root} ({brief(error, 300)}); {remedy}") from error


def _publish(root: Path, parts: list[Path], names: list[list[str]], total: int) -> None:
    """Give whole files their names: the index last, as it vouches for the rest."""
    if len(parts) == 1:
        os.replace(parts[0], root / WEIGHTS)
        return
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    weight_map = {name: file for file, held in zip(files, names, strict=True) for name in held}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    parts.append(root / f"{INDEX}.{os.getpid()}.part")
    parts[-1].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for part, file in zip(parts, [*files, INDEX], strict=True):
        os.replace(part, root / file)
