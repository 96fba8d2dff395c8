"""A mixture's experts: tensors of their own in a public file, one leaf of ours."""

import json

import jax
import numpy as np
import pytest

import tx_jax as tx
from tx_jax.convert.files import open_safetensors, save_safetensors
from tx_jax.convert.pretrained import read_family
from tx_jax.errors import InputError

CFG = tx.ModelConfig(
    vocab_size=11, max_len=32, d_model=8, n_layers=2, n_heads=4, n_kv_heads=2, d_mlp=12, positions="rotary",
    mlp="swiglu", norm="rmsnorm", tie_head=False, n_experts=4,
)  # fmt: skip
ONE = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


def down(params):
    return params["stack"]["blocks_1"]["mlp"]["experts"]["down"]["kernel"]


@pytest.fixture(scope="module")
def params():
    return tx.init_params(tx.build(CFG), jax.random.key(0))


@pytest.fixture(scope="module")
def root(params, tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    assert tx.save_pretrained(root, CFG, params) == "MixtralForCausalLM"
    return root


def test_each_is_a_tensor(root, params):
    np.testing.assert_array_equal(dict(open_safetensors(root).read())[ONE], down(params)[2])
    jax.tree.map(np.testing.assert_array_equal, tx.load_pretrained(root).params, params)


def test_each_device_has_its_own(root, params):
    found = tx.load_pretrained(root, mesh=tx.make_mesh(tx.MeshConfig(data=1, fsdp=2, expert=2, tensor=2)))
    kernel = down(found.params)
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("expert", "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (2, 4, 6)
    np.testing.assert_array_equal(kernel, down(params))


def test_what_is_not_theirs_is_refused(root, tmp_path):
    """One that is missing by its name; more than a file can hold, at once; a number that is none."""
    values, tensors = json.loads((root / "config.json").read_text()), dict(open_safetensors(root).read())
    cases = {
        rf"has no {ONE}; {ONE} would be \[8, 12\], our stack/blocks_1/mlp/experts/down/kernel$": ({}, ONE),
        r"has \d+ tensors, too few for 2 layers of 100000000 experts$": ({"num_local_experts": 10**8}, None),
    }
    for i, (text, (changes, left_out)) in enumerate(cases.items()):
        save_safetensors(tmp_path / f"{i}", ((name, part) for name, part in tensors.items() if name != left_out))
        (tmp_path / f"{i}/config.json").write_text(json.dumps(values | changes))
        with pytest.raises(InputError, match=text):
            tx.load_pretrained(tmp_path / f"{i}")
    with pytest.raises(InputError, match=r"num_local_experts=None must be a positive int$"):
        read_family(values | {"num_local_experts": None}, "config.json")
