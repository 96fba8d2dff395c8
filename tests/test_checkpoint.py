"""Checkpoints: bit for bit, onto other devices, after a kill; and each refusal by its text."""

import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tx_jax.checkpoint import CheckpointError, latest_step, restore, restore_params, saved_steps
from tx_jax.errors import InputError
from tx_jax.integrity import sums
from tx_jax.run_config import MeshConfig, RunConfig
from tx_jax.run_dir import claim_run_dir, read_config, write_config
from tx_jax.saver import Saver

DATA = {"next_index": 3, "parents": {"a": [1, 2.5, None, True], "é": {}}, "big": 2**70}


class State(NamedTuple):
    step: jax.Array
    params: dict[str, Any]
    opt_state: Any
    key: jax.Array


def make_state(step: int = 0, optimizer: optax.GradientTransformation = optax.adamw(1e-3)) -> State:
    key = jax.random.fold_in(jax.random.key(5), step)
    params = {"w": jax.random.normal(key, (8, 3)), "b": {"c": jnp.full((7,), step, jnp.bfloat16)}}
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), optimizer.init(params))
    return State(jnp.int32(step), params, opt_state, key)


def put(run_dir: pathlib.Path, *steps: int, keep: int = 9) -> pathlib.Path:
    with Saver(run_dir, keep) as save:
        for step in steps:
            save(step, make_state(step), DATA | {"next_index": step})
    return run_dir


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        raw = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b)]
        assert np.asarray(raw[0]).tobytes() == np.asarray(raw[1]).tobytes()


def refuses(text: str) -> Any:
    return pytest.raises(InputError, match=f"^[^\n]*{re.escape(text)}[^\n]*$")


def test_bit_for_bit(tmp_path, caplog):
    put(tmp_path, 4)
    for abstract in (make_state(0), jax.eval_shape(make_state)):
        state, data = restore(tmp_path, abstract)
        assert_same(state, make_state(4))
        assert data == DATA | {"next_index": 4}
    assert not [record for record in caplog.records if record.levelname != "INFO"]  # nothing on the terminal


def test_saved_values_outlive_donation(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params, data = {"w": jnp.zeros(1 << 20)}, {"next_index": 0}
    with Saver(tmp_path, 9) as save:
        for step in range(3):
            save(step, State(jnp.int32(step), params, (), jax.random.key(0)), data)
            data["next_index"] += 1
            for _ in range(5):
                params = bump(params)
    for step in range(3):
        state, data = restore(tmp_path, State(jnp.int32(0), params, (), jax.random.key(0)), step)
        assert data == {"next_index": step}
        assert jnp.all(state.params["w"] == 5 * step)


def test_numpy_leaves(tmp_path):
    state = State(jnp.int32(4), {"w": jnp.ones((3, 4))}, (), jax.random.key(0))
    mine = state._replace(step=np.int32(4), params={"w": np.ones((3, 4), np.float32)})
    with Saver(tmp_path, 1) as save:
        save(4, mine, {})
        mine.params["w"][:] = 9
    assert_same(restore(tmp_path, state)[0], state)


def test_params_alone(tmp_path):
    put(tmp_path, 1, 2)
    for path in (tmp_path / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")  # the optimiser's state is not read
    abstract = jax.eval_shape(make_state).params
    assert_same(restore_params(tmp_path, abstract), make_state(2).params)
    assert_same(restore_params(tmp_path, abstract, step=1), make_state(1).params)


def test_onto_eight_devices(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))

    def onto(x: Any) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec("data") if x.shape[:1] == (8,) else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    abstract = jax.tree.map(onto, make_state())
    state, data = restore(put(tmp_path, 3), abstract)
    assert_same(state, make_state(3))
    jax.tree.map(lambda x, a: pytest.fail(f"{x.sharding}") if x.sharding != a.sharding else None, state, abstract)
    with Saver(tmp_path, 1) as save:
        save(5, state, data)
    assert_same(restore(tmp_path, jax.eval_shape(make_state))[0], state)  # and from eight onto one


def with_params(state: State, **params: Any) -> State:
    return state._replace(params=state.params | params)


def without(state: State, name: str) -> State:
    return state._replace(params={key: value for key, value in state.params.items() if key != name})


@pytest.mark.parametrize(
    ("change", "leaf", "there", "here"),
    [
        (lambda s: with_params(s, w=s.params["w"].astype(jnp.bfloat16)), "params/w", "float32[8, 3]", "bfloat16[8, 3]"),
        (lambda s: with_params(s, w=s.params["w"].T), "params/w", "float32[8, 3]", "float32[3, 8]"),
        (lambda s: with_params(s, z=s.step), "params/z", "absent", "int32[]"),
        (lambda s: without(s, "w"), "params/w", "float32[8, 3]", "absent"),
        (lambda s: make_state(0, optax.sgd(0.1, momentum=0.9)), "state/opt_state/0/count", "int32[]", "absent"),
        (lambda s: s._replace(key=jax.random.PRNGKey(0)), "state/key", "key<fry>[]", "uint32[2]"),
        (lambda s: s._replace(key=jax.random.key(0, impl="rbg")), "state/key", "key<fry>[]", "key<rbg>[]"),
    ],
)
def test_refuses_another_tree(tmp_path, change, leaf, there, here):
    path = put(tmp_path, 1) / "checkpoints" / "1"
    with refuses(f"{leaf} is {there} in {path}, but {here} here; use the configuration it was saved with"):
        restore(tmp_path, change(make_state()))


def test_refuses_params_of_another_model(tmp_path):
    with refuses("params/w is float32[8, 3]"):
        restore_params(put(tmp_path, 1), {"w": jnp.zeros(3), "b": {"c": make_state().params["b"]["c"]}})


def test_refuses_steps(tmp_path):
    with refuses(f"run_dir='{tmp_path}' holds no checkpoint; train with --run-dir {tmp_path} up to a save"):
        restore(tmp_path, make_state())
    put(tmp_path, 5, 10)
    with refuses(f"step=7 is not in run_dir='{tmp_path}'; it has 5, 10"):
        restore_params(tmp_path, make_state().params, step=7)
    text = f"step=10 is not after step 10 in run_dir='{tmp_path}'; restore it, or use another --run-dir"
    with Saver(tmp_path, 2) as save, refuses(text):
        save(10, make_state(10), {})
    assert latest_step(tmp_path) == 10


@pytest.mark.parametrize("victim", ["_CHECKPOINT_METADATA", "params/_METADATA", "params/manifest.ocdbt", "params/d/*"])
@pytest.mark.parametrize("damage", [pathlib.Path.unlink, functools.partial(os.truncate, length=9)], ids=["lost", "cut"])
def test_refuses_damage(tmp_path, caplog, victim, damage):
    # One leaf: of several reads at once, those that fail after the first call an event loop that Orbax has closed.
    params = {"w": jnp.ones(5)}
    with Saver(tmp_path, 1) as save:
        save(1, make_state()._replace(params=params), {})
    path = tmp_path / "checkpoints" / "1"
    for file in path.glob(victim):
        damage(file)
    with refuses(f"{path} cannot be read: ") as refusal:
        restore_params(tmp_path, params)
    assert str(refusal.value).endswith("; take an earlier step, by --resume or --step")
    assert not caplog.records  # nothing on the terminal but the refusal


def test_a_changed_element_is_named(tmp_path, monkeypatch):
    """As a bit that its file's own checks let pass."""
    from orbax.checkpoint import v1 as ocp

    put(tmp_path, 1)
    load = ocp.load_checkpointables

    def flipped(path, wanted):
        found = load(path, wanted)
        found["params"]["b"]["c"] = found["params"]["b"]["c"].at[6].set(1.0078125)  # the last bit of a bfloat16
        return found

    monkeypatch.setattr(ocp, "load_checkpointables", flipped)
    with pytest.raises(CheckpointError, match=r"^params/b/c of .*/checkpoints/1 is damaged: its bits are not those"):
        restore(tmp_path, make_state())


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "float16", "bfloat16", "int32", "float32", "key<fry>"])
def test_sums_tell_every_bit_and_place(dtype):
    keys = jax.random.split(jax.random.key(0), (4, 2, 3))
    x = keys if dtype == "key<fry>" else (jax.random.key_data(keys)[..., 0] % 2).astype(dtype)
    mesh = jax.make_mesh((4,), ("data",))
    shared = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    others = [x.at[i].set(x[(i + 1) % 4]) for i in range(4)] + [x[::-1], x.swapaxes(0, 1), x.reshape(4, 6)]
    told = [sums({"x": other})["x"] for other in [x, *others]]
    assert sums({"x": shared})["x"] == told[0]
    assert len(set(told)) == len(told)


IN_TURN = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from tx_jax.integrity import sums
from tx_jax.saver import Saver
mesh = jax.make_mesh((2,), ("data",))
where = NamedSharding(mesh, P("data"))
tree = {str(i): jax.device_put(jnp.ones((32, 32 + i % 5)), where) for i in range(40)}
step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * jnp.tanh(tree["0"] @ tree["0"]).mean(), tree))
for _ in range(50):
    tree = step(tree)
    sums(tree)
"""


def test_sums_between_steps_never_wait_for_ever():
    """As programs of many devices do that are on a CPU at once."""
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
    }
    subprocess.run([sys.executable, "-c", IN_TURN], env=env, timeout=100, check=True)


def changed(**fields: Any) -> RunConfig:
    """A RunConfig with changes given as section__field=value."""
    cfg = RunConfig()
    for name, value in fields.items():
        section, field = name.split("__")
        cfg = dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **{field: value})})
    return cfg


def test_config_goes_to_disk_and_back(tmp_path):
    cfg = changed(data__seq_len=32, train__sample_prompt="é\n")
    write_config(tmp_path / "new" / "run", cfg)
    assert read_config(tmp_path / "new" / "run") == cfg
    assert os.listdir(tmp_path / "new" / "run") == ["config.json"]


def test_the_same_run_goes_on(tmp_path):
    claim_run_dir(tmp_path / "run", RunConfig())
    free = dict.fromkeys(("log_every", "eval_every", "sample_every", "save_every", "keep", "sample_tokens"), 7)
    cfg = changed(**{f"train__{name}": value for name, value in free.items()}, train__sample_prompt="x")
    cfg = dataclasses.replace(cfg, run_dir="elsewhere", mesh=MeshConfig(data=2, fsdp=4))
    claim_run_dir(tmp_path / "run", cfg)
    assert read_config(tmp_path / "run") == cfg


def test_a_kill_before_the_first_config_is_no_obstacle(tmp_path):
    (tmp_path / "config.json.tmp").write_text("{")
    claim_run_dir(tmp_path, RunConfig())
    assert read_config(tmp_path) == RunConfig()


def test_refuses_another_run(tmp_path):
    claim_run_dir(tmp_path, RunConfig())
    text = "holds a run with model.rotary.base=10000.0, not 5.0; use another --run-dir, or its values"
    with refuses(f"run_dir='{tmp_path}' {text}"):
        claim_run_dir(tmp_path, changed(model__rotary=dataclasses.replace(RunConfig().model.rotary, base=5.0)))
    with refuses("a run with model.window=None, not 4, train.n_steps=2000, not 3000; use"):
        claim_run_dir(tmp_path, changed(model__window=4, train__n_steps=3000))
    with refuses("data.batch_size=12, not 3, model.n_layers=6, not 1, optim.eps=1e-08, not 0.1, and 2 more; use"):
        more = {"train__seed": 1, "train__n_steps": 3000}
        claim_run_dir(tmp_path, changed(model__n_layers=1, data__batch_size=3, optim__eps=0.1, **more))
    assert read_config(tmp_path) == RunConfig()


def test_refuses_what_is_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with refuses(f"run_dir='{path}' holds no config.json; name the --run-dir of a training run"):
            read_config(path)
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with refuses(f"run_dir='{tmp_path}' holds files but no config.json; use another --run-dir"):
        claim_run_dir(tmp_path, RunConfig())
    with refuses(f"run_dir='{file}' is a file; use another --run-dir"):
        claim_run_dir(file, RunConfig())
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[]", b'{"model": {"n_heds": 3}}', b'{"model": {"n_layers": 0}}'])
def test_refuses_a_broken_config(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    for read in (read_config, functools.partial(claim_run_dir, cfg=RunConfig())):
        with refuses(f"{tmp_path / 'config.json'} cannot be read: ") as refusal:
            read(tmp_path)
        assert str(refusal.value).endswith("; use another --run-dir")


class WithMean(NamedTuple):
    step: jax.Array
    params: dict[str, Any]
    ema: dict[str, Any]


def test_a_mean_over_steps_lies_apart(tmp_path):
    state = WithMean(jnp.int32(3), {"w": jnp.ones(3)}, {"w": jnp.full(3, 0.25)})
    with Saver(tmp_path, 1) as save:
        save(3, state, {})
    assert_same(restore(tmp_path, state)[0], state)
    assert_same(restore_params(tmp_path, state.params, part="ema"), state.ema)
    assert_same(restore_params(tmp_path, state.params), state.params)
    with refuses("ema/b/c is absent in"):
        restore_params(put(tmp_path / "none", 1), make_state().params, part="ema")


def test_parameters_are_the_mean_of_the_last_checkpoints(tmp_path):
    put(tmp_path, 1, 2, 5, 9)
    abstract = jax.eval_shape(make_state).params

    def mean(*steps):
        return np.mean([make_state(step).params["w"] for step in steps], axis=0)

    for step, n, steps in ((None, 1, [9]), (None, 3, [2, 5, 9]), (5, 2, [2, 5]), (None, 9, [1, 2, 5, 9])):
        got = restore_params(tmp_path, abstract, step, n_averaged=n)
        np.testing.assert_allclose(got["w"], mean(*steps), rtol=1e-6)
        assert got["b"]["c"].dtype == jnp.bfloat16


def test_a_checkpoint_of_before_there_was_a_mean(tmp_path):
    """As 0.1 wrote it: the rest of the state is a NamedTuple without that field."""
    from orbax.checkpoint import v1 as ocp

    class Moving(NamedTuple):
        step: Any
        params: Any
        opt_state: Any
        key: Any

    class MovingNow(NamedTuple):
        step: Any
        params: Any
        opt_state: Any
        key: Any
        ema: Any = ()

    state = make_state(4)
    path = str(tmp_path / "checkpoints" / "4")
    parts = {"params": state.params, "state": Moving(*state)._replace(params=())}
    ocp.save_checkpointables(path, parts, custom_metadata={"data": DATA})
    found, data = restore(tmp_path, MovingNow(*make_state()))
    assert_same(found, MovingNow(*state))
    assert data == DATA


def test_only_names_of_steps_are_steps(tmp_path):
    for name in ("12", "0", "007", "²", "12.aside", "-3"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert saved_steps(tmp_path) == [0, 12]
