"""Models of our own: the family that holds each, its way to transformers and onto a mesh, and the memory it takes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax.convert.pretrained import find_family
from tx_jax.errors import InputError
from tx_jax.run_presets import gpt_shakespeare, nanogpt_shakespeare

SIZES = {"vocab_size": 65, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_len": 64}
SHAKESPEARE = dataclasses.replace(gpt_shakespeare("cpu").model, **SIZES, window=5)
NANOGPT = dataclasses.replace(nanogpt_shakespeare("cpu").model, **SIZES)
LLAMA = tx.ModelConfig(
    **SIZES, n_kv_heads=2, positions="rotary", mlp="swiglu", norm="rmsnorm", d_mlp=48, tie_head=False
)
TOKENS = np.random.default_rng(0).integers(0, 65, (2, 9)).astype(np.int32)
QUICK = {"xla_backend_optimization_level": 0}


def logits(cfg, params):
    apply = jax.jit(tx.build(cfg).apply, compiler_options=QUICK)
    return np.asarray(apply({"params": params}, jnp.asarray(TOKENS))[0])


@pytest.mark.parametrize(
    ("cfg", "architecture", "biases"),
    [
        (SHAKESPEARE, "Starcoder2ForCausalLM", "norm"),
        (NANOGPT, "GPT2LMHeadModel", "all"),
        (LLAMA, "LlamaForCausalLM", "none"),
        (dataclasses.replace(LLAMA, window=5), "MistralForCausalLM", "none"),
        (dataclasses.replace(LLAMA, n_experts=3, capacity_factor=1.0), "MixtralForCausalLM", "none"),
    ],
)
def test_the_first_family_that_holds_a_model(cfg, architecture, biases, tmp_path):
    family, wide = find_family(cfg)
    assert (family.architecture, wide.biases) == (architecture, biases)
    params = tx.init_params(tx.build(cfg), jax.random.key(0))
    assert tx.save_pretrained(tmp_path, cfg, params, special_ids={"eos_token_id": 0}) == architecture
    found, wanted = tx.load_pretrained(tmp_path), logits(cfg, params)
    np.testing.assert_allclose(logits(found.cfg, found.params), wanted, atol=1e-5)
    assert found.special_ids == {"eos_token_id": 0}
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peer = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        np.testing.assert_allclose(peer(torch.tensor(TOKENS).long()).logits.numpy(), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("cfg", "text"),
    [
        (dataclasses.replace(NANOGPT, positions="alibi"), r"no architecture .* has .*positions='alibi' \("),
        (dataclasses.replace(LLAMA, parallel=True), r"has parallel=True \(LlamaForCausalLM has False\); write it your"),
        (dataclasses.replace(NANOGPT, norm_order="sandwich"), "norm_order='sandwich'"),
        (
            dataclasses.replace(LLAMA, n_experts=3, qk_norm=True),
            r"has qk_norm=True \(MixtralForCausalLM has F",
        ),
        (dataclasses.replace(LLAMA, d_value=6), r"has d_value=6 \(LlamaForCausalLM has 8\); write it yourself"),
    ],
)
def test_what_no_family_holds_is_refused_with_the_fields_that_differ(cfg, text, tmp_path):
    with pytest.raises(InputError, match=text):
        tx.save_pretrained(tmp_path, cfg, {})
    with pytest.raises(InputError, match="architecture='Llama' is not one of GPT2LMHeadModel, LlamaForCausalLM"):
        tx.save_pretrained(tmp_path, cfg, {}, architecture="Llama")
    with pytest.raises(InputError, match=r".+; architecture='T5ForCondi\w+' cannot hold this model; leave it out"):
        tx.save_pretrained(tmp_path, cfg, {}, architecture="T5ForConditionalGeneration")
    assert not [*tmp_path.iterdir()]


def test_a_model_is_not_overwritten(tmp_path):
    params = tx.init_params(tx.build(LLAMA), jax.random.key(0))
    tx.save_pretrained(tmp_path, LLAMA, params)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"holds config.json, model.safetensors already; name another directory"):
        tx.save_pretrained(tmp_path, LLAMA, params)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_onto_a_mesh(tmp_path):
    params = tx.init_params(tx.build(LLAMA), jax.random.key(0))
    tx.save_pretrained(tmp_path, LLAMA, params)
    mesh = tx.make_mesh(tx.MeshConfig(data=2, fsdp=2, tensor=2))
    found = tx.load_pretrained(tmp_path, mesh=mesh)
    q = found.params["stack"]["blocks_0"]["attention"]["q"]["kernel"]
    assert q.sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
    assert q.addressable_shards[0].data.shape == (16, 16)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(found.params)} == {mesh}
    np.testing.assert_allclose(logits(found.cfg, found.params), logits(LLAMA, params), atol=1e-5)


CHILD = """
import pathlib, sys, jax, tx_jax as tx
mesh = tx.make_mesh(tx.MeshConfig(fsdp=4, tensor=2)) if sys.argv[2] == "mesh" else None
params = jax.block_until_ready(tx.load_pretrained(sys.argv[1], mesh=mesh).params)
lines = pathlib.Path("/proc/self/status").read_text().splitlines()  # ru_maxrss begins with that of the parent
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))  # the peak in KiB
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A directory of 433 MB, and its bytes."""
    cfg = dataclasses.replace(LLAMA, vocab_size=16_000, d_model=1024, d_mlp=3072, n_layers=6, n_heads=8, n_kv_heads=4)
    shapes = jax.eval_shape(lambda key: tx.init_params(tx.build(cfg), key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, np.float32), shapes)
    root = tmp_path_factory.mktemp("large")
    tx.save_pretrained(root, cfg, params, max_shard_bytes=10**8)
    return root, sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("where", ["one", "mesh"])
def test_memory_of_the_host(where, large):
    root, weights = large
    assert 3.5e8 < weights < 5e8
    command = [sys.executable, "-c", CHILD, str(root), where]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout) * 1024 <= 1.2 * weights + 300e6, f"{weights} bytes of weights"
