"""Safetensors: bit for bit both ways, in little memory; and each refusal by its text."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tx_jax.convert.files import DTYPES, INDEX, WEIGHTS, open_safetensors, save_safetensors
from tx_jax.errors import InputError


def refuses(text):
    return pytest.raises(InputError, match=f"^[^\n]*{re.escape(text)}[^\n]*$")


def some(*dtypes):
    rng = np.random.default_rng(3)
    arrays = {dtype.name: rng.integers(0, 99, (3, 5)).astype(dtype) for dtype in dtypes or DTYPES.values()}
    return arrays | {"scalar": np.array(2, np.float32), "none": np.ones((0, 7), np.float16)}


def assert_same(found, wanted):
    found = dict(found)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].flags.c_contiguous
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def put(directory, sizes=None, **arrays):
    """A directory of two shards with an index, and its weight_map."""
    save_safetensors(directory, arrays.items(), max_shard_bytes=sizes or 1)
    return json.loads((directory / INDEX).read_text())["weight_map"]


def test_to_disk_and_back(tmp_path):
    save_safetensors(tmp_path, some().items())
    assert os.listdir(tmp_path) == [WEIGHTS]
    for path in (tmp_path, tmp_path / WEIGHTS, str(tmp_path)):
        tensors = open_safetensors(path)
        assert_same(tensors.read(), some())
        assert_same(tensors.read(), some())  # again
        assert tensors.shapes == {name: array.shape for name, array in some().items()}
        assert tensors.dtypes == {name: array.dtype.name for name, array in some().items()}


def test_reads_what_others_write_and_is_read_by_them(tmp_path):
    save_file(some(), tmp_path / "theirs.safetensors")
    assert_same(open_safetensors(tmp_path / "theirs.safetensors").read(), some())
    save_safetensors(tmp_path / "new" / "ours", some().items())
    assert_same(load_file(tmp_path / "new" / "ours" / WEIGHTS), some())
    torch = pytest.importorskip("torch")
    found = pytest.importorskip("safetensors.torch").load_file(tmp_path / "new" / "ours" / WEIGHTS)
    assert found["bfloat16"].dtype == torch.bfloat16
    assert found["bfloat16"].view(torch.uint8).numpy().tobytes() == some()["bfloat16"].tobytes()


def test_writes_what_an_array_holds_not_what_lies_under_it(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {"transposed": base.T, "sliced": base[1:3, ::2], "backwards": base[::-1], "swapped": base.astype(">f4")}
    views["half"] = base.astype(ml_dtypes.bfloat16).T
    save_safetensors(tmp_path, views.items())
    wanted = {name: np.array(view.astype(view.dtype.newbyteorder("=")), order="C") for name, view in views.items()}
    assert_same(load_file(tmp_path / WEIGHTS), wanted)


def test_shards(tmp_path):
    arrays = {f"w{i}": np.full((i,), i, np.float32) for i in (1, 2, 9, 3)}  # 4, 8, 36 and 12 bytes
    weight_map = put(tmp_path, 15, **arrays)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert weight_map == {"w1": files[0], "w2": files[0], "w3": files[2], "w9": files[1]}
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": 60}
    assert sorted(os.listdir(tmp_path)) == [*files, INDEX]
    assert_same(open_safetensors(tmp_path).read(), arrays)
    save_safetensors(tmp_path / "fits", arrays.items(), max_shard_bytes=60)
    assert os.listdir(tmp_path / "fits") == [WEIGHTS]


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_loads_it(tmp_path, max_shard_bytes):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    config.save_pretrained(tmp_path)
    bits = {name: x.detach().view(torch.uint16).numpy() for name, x in model.state_dict().items()}
    arrays = {name: array.view(ml_dtypes.bfloat16) for name, array in bits.items()}
    save_safetensors(tmp_path, arrays.items(), max_shard_bytes)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert loaded.keys() == arrays.keys()
    for name, x in loaded.items():
        assert np.array_equal(x.view(torch.uint16).numpy(), bits[name])


def test_others_may_read_what_is_written(tmp_path):
    (tmp_path / "usual").touch()
    save_safetensors(tmp_path, some().items())
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (WEIGHTS, "usual")]
    assert modes[0] == modes[1]


MEASURED = """
import resource, sys
import numpy as np
from tx_jax.convert.files import open_safetensors, save_safetensors
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
if sys.argv[1] == "write":
    save_safetensors(sys.argv[2], ((f"w{i}", np.ones((4 << 20,), np.float32)) for i in range(24)), 64 << 20)
else:
    kept = [array if sys.argv[1] == "keep" else array.sum() for _, array in open_safetensors(sys.argv[2]).read()]
print(peak() - before)
"""


def test_memory(tmp_path):
    weights = 24 * 16 << 20  # bytes, in shards of four tensors

    def grown(what):
        command = [sys.executable, "-c", MEASURED, what, str(tmp_path / "model")]
        return int(
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
        )

    assert grown("write") < weights / 3  # a shard, one more tensor, and some for the library
    assert grown("discard") < weights / 6
    assert grown("keep") < weights * 1.1


def test_refuses_what_is_no_safetensors_file(tmp_path):
    for name in ("pytorch_model.bin", "a.pt", "b.pth", "c.ckpt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        for path in (tmp_path / name, tmp_path / name / name):
            text = "is a pickle, which can run any code when it is loaded; give safetensors, which"
            with refuses(f"{tmp_path / name / name} {text}"):
                open_safetensors(path if path.is_file() else tmp_path / name)
    with refuses(f"{tmp_path / 'none'} is no file; give one that is there"):
        open_safetensors(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with refuses(f"{tmp_path / 'empty'} holds neither {WEIGHTS} nor {INDEX}; give a directory of weights"):
        open_safetensors(tmp_path / "empty")
    (tmp_path / "empty" / "adapter.safetensors").touch()
    with refuses(f"neither {WEIGHTS} nor {INDEX}; give {tmp_path / 'empty' / 'adapter.safetensors'}"):
        open_safetensors(tmp_path / "empty")


def test_refuses_dtypes_when_they_are_read(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"plain": np.ones(2, np.float32), "odd": np.ones(3, ml_dtypes.float8_e4m3fn)}, file)
    tensors = open_safetensors(file)
    assert tensors.dtypes == {"plain": "float32", "odd": "F8_E4M3"}
    with refuses(f"{file}: the tensor 'odd' is F8_E4M3; convert it to one of F64, F32, F16, BF16, BOOL"):
        next(tensors.read())


@pytest.mark.parametrize(
    ("shard", "text"),
    [
        ("../model.safetensors", "names the shard '../model.safetensors', which is no plain file name"),
        ("..", "names the shard '..', which is no plain file name; use weights that you trust"),
        ("/etc/passwd", "names the shard '/etc/passwd', which is no plain"),
        ("a/b.safetensors", "names the shard 'a/b.safetensors', which is no plain"),
        ("a\\b.safetensors", r"names the shard 'a\\b.safetensors', which is no plain"),
        ("", "names the shard '', which is no plain"),
        ("a\0.safetensors", r"has no file 'a\x00.safetensors'; fetch it, too"),
        ("x" * 999, "has no file 'xxx"),
        ("missing.safetensors", "has no file 'missing.safetensors'; fetch it, too"),
        (7, "its weight_map gives a shard that is no string"),
        ("link.safetensors", "link.safetensors is a link that leads out of its directory; put the file itself there"),
    ],
)
def test_refuses_shards_elsewhere(tmp_path, shard, text):
    weight_map = put(tmp_path / "model", a=np.ones(2), b=np.ones(3))
    save_file({"b": np.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "model" / "link.safetensors").symlink_to(tmp_path / "model.safetensors")
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": weight_map | {"b": shard}}))
    with refuses(text):
        open_safetensors(tmp_path / "model")


def test_follows_the_links_of_the_hub_cache(tmp_path):
    put(tmp_path / "blobs", a=np.ones(2), b=np.ones(3))
    snapshot = tmp_path / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    for name in os.listdir(tmp_path / "blobs"):
        (snapshot / name).symlink_to(Path("..", "..", "blobs", name))
    assert_same(open_safetensors(snapshot).read(), {"a": np.ones(2), "b": np.ones(3)})
    (snapshot / INDEX).unlink()
    (tmp_path / WEIGHTS).write_bytes(b"")
    (snapshot / WEIGHTS).symlink_to(Path("..", "..", WEIGHTS))
    with refuses("is a link that leads out of its directory"):
        open_safetensors(snapshot)


def test_refuses_an_index_that_is_wrong(tmp_path):
    weight_map = put(tmp_path, a=np.ones(2), b=np.ones(3))
    one, two = sorted(set(weight_map.values()))
    for wrong, text in [
        ({"a": one}, None),
        ({"a": one, "b": two, "c": two}, f"{two} lacks 'c', which {INDEX} puts there; fetch both again"),
        ({"a": one, "b": one}, f"{one} lacks 'b', which"),
        ({"b": two, "c": two}, "lacks 'c', which"),
        ([], f"{INDEX} cannot be read: it has no weight_map; fetch it again"),
        (None, "it has no weight_map"),
    ]:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": wrong}))
        if text:
            with refuses(text):
                open_safetensors(tmp_path)
        else:
            assert open_safetensors(tmp_path).shapes == {"a": (2,)}  # a shard that the index does not name
    save_file({"a": np.ones(2), "b": np.ones(3)}, tmp_path / two)  # `a` is in both
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with refuses(f"{two} holds 'a', which {INDEX} does not put there; fetch both again"):
        open_safetensors(tmp_path)
    for text, why in [
        ("[]", "no object"),
        ("{", "Expecting"),
        ('{"a":1,"a":2}', "'a' is given twice"),
        ("[" * 10**5, "rec"),
    ]:
        (tmp_path / INDEX).write_text(text)
        with refuses(f"{INDEX} cannot be read: ") as refusal:
            open_safetensors(tmp_path)
        assert why in str(refusal.value)
    os.truncate(tmp_path / INDEX, 25_000_001)
    with refuses("it has more than 25000000 bytes"):
        open_safetensors(tmp_path)


def test_refuses_to_write(tmp_path):
    one = np.ones(2)
    with refuses("max_shard_bytes=0 must be positive; 5 * 10**9 is usual"):
        save_safetensors(tmp_path, [], max_shard_bytes=0)
    for tensors, text in [
        ([("a", one), ("a", one)], "the name 'a' is taken; give each tensor its own"),
        ([("__metadata__", one)], "the name '__metadata__' is taken"),
        ([("b", one), ("a", np.ones(2, complex))], "'a' is complex128; use one of float64, float32"),
        ([("b", one), ("a", np.array([None]))], "'a' is object; use one of"),
    ]:
        with refuses(text):
            save_safetensors(tmp_path / "new", tensors, max_shard_bytes=1)
        assert os.listdir(tmp_path / "new") == []
    (tmp_path / "file").touch()
    with refuses(f"cannot write weights into {tmp_path / 'file' / 'x'} ([Errno 20] Not a directory"):
        save_safetensors(tmp_path / "file" / "x", [("a", one)])
    save_safetensors(tmp_path, [("a", one)])
    with refuses(f"{tmp_path} holds {WEIGHTS} already; use another directory, or remove it"):
        save_safetensors(tmp_path, [("a", one)])


FULL = """
import resource, sys
import numpy as np
from tx_jax.convert.files import save_safetensors
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_safetensors(sys.argv[1], [(str(n), np.ones(n)) for n in (9, 9_999)], 100)
except ValueError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert f"cannot write weights into {tmp_path} (Error while serializing: " in done.stdout
    assert "File too large" in done.stdout
    assert done.stdout.endswith("; make room there, or use another directory\n")
    assert os.listdir(tmp_path) == []
