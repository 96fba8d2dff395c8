"""A mixture of experts is a sum over a loop in NumPy, and what it adds to the loss is its papers' formula."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tx_jax as tx
from tx_jax import InputError, MeshConfig, ModelConfig
from tx_jax.modules.moe import LOSSES, Experts, _expert_sum, route
from tx_jax.parallel import check_mesh

B, T, D, E, K = 3, 10, 6, 4, 2
CFG = ModelConfig(vocab_size=11, d_model=D, n_heads=2, n_layers=2, d_mlp=7, n_experts=E, n_experts_per_token=K,
                  mlp="swiglu", max_len=T, positions="none")  # fmt: skip
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
POSITIONS = jnp.where(jnp.arange(T) < jnp.array([10, 3, 0])[:, None], jnp.arange(T), -1)


def make(**changes):
    module = Experts(dataclasses.replace(CFG, **changes))
    params = module.init(jax.random.key(0), X)["params"]
    rng = np.random.default_rng(1)
    return module, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32), params)


def loop(params, factor=None):
    """Token by token: (outputs, how many choices each expert has refused)."""
    kernels, out, refused = params["experts"], np.zeros(X.shape), 0
    x = np.asarray(X)
    slots = T * K if factor is None else int(np.ceil(factor * K * T / E))
    logits = x @ params["router"]["kernel"].T
    for b in range(B):
        taken = np.zeros(E, int)
        for choice in range(K):
            for t in range(T):
                if POSITIONS[b, t] < 0:
                    continue
                best = np.argsort(-logits[b, t])[:K]
                p = np.exp(logits[b, t, best] - logits[b, t, best].max())
                e = best[choice]
                taken[e] += 1
                if taken[e] > slots:
                    refused += 1
                    continue
                up, gate, down = (kernels[name]["kernel"][e] for name in ("up", "gate", "down"))
                h = gate @ x[b, t]
                out[b, t] += (p / p.sum())[choice] * (down @ (h / (1 + np.exp(-h)) * (up @ x[b, t])))
    return out, refused


@pytest.mark.parametrize("factor", [None, 0.5, 1.0])
def test_it_is_a_loop_over_tokens(factor):
    module, params = make(capacity_factor=factor)
    expected, refused = loop(params, factor)
    assert (refused > 0) == (factor is not None)
    got = module.apply({"params": params}, X, POSITIONS, deterministic=False)
    real = np.asarray(POSITIONS >= 0)
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], rtol=1e-4, atol=1e-6)
    evaluated = module.apply({"params": params}, X, POSITIONS)
    np.testing.assert_allclose(np.asarray(evaluated)[real], loop(params)[0][real], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", [0, 1])
def test_groups_are_slots_for_all(first):
    """Two ways of one sum, with one gradient, which reaches the router; of all experts, or of all but the first."""

    def loss(params, slots):
        routed = route(X @ params["router"]["kernel"].T, POSITIONS >= 0, K)
        routed = routed._replace(expert=routed.expert - first)
        kernels = jax.tree.map(lambda kernel: kernel[first:], params["experts"])
        return (_expert_sum(X, routed, kernels, "swiglu", slots) ** 2).sum()

    params = make()[1]
    one, other = (jax.jit(jax.grad(functools.partial(loss, slots=slots)))(params) for slots in (None, T))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)
    assert all(np.abs(leaf[1:]).max() > 1e-3 for leaf in jax.tree.leaves(one))


def test_what_is_added_to_the_loss():
    """Fedus et al. 2022, eq. 4 of each sequence, × its tokens, and Zoph et al. 2022, eq. 5, as a sum over tokens."""
    module, params = make()
    _, left = module.apply({"params": params}, X, POSITIONS, mutable=[LOSSES])
    logits = np.float64(X @ params["router"]["kernel"].T)
    balance = squares = 0.0
    for b in range(B):
        real = logits[b][POSITIONS[b] >= 0]
        if len(real):
            p = np.exp(real) / np.exp(real).sum(-1, keepdims=True)
            f = np.bincount(np.argsort(-real, axis=-1)[:, :K].ravel(), minlength=E) / (K * len(real))
            balance += len(real) * E * (f * p.mean(0)).sum()
            squares += (np.log(np.exp(real).sum(-1)) ** 2).sum()
    np.testing.assert_allclose(left[LOSSES]["added"], [balance, squares], rtol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_a_step_adds_it_at_its_rates(scan):
    """Once for each layer, however the layers are run."""
    model, optimizer = tx.build(CFG), tx.make_optimizer(tx.OptimConfig(), n_steps=9)
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, 11)
    batch = tx.Batch(tokens, tokens, (POSITIONS >= 0).astype(jnp.float32), POSITIONS)
    state = tx.init_state(model, optimizer, jax.random.key(0))
    _, left = model.apply({"params": state.params}, tokens, POSITIONS, mutable=[LOSSES])
    total = sum(np.asarray(leaf) for leaf in jax.tree.leaves(left))
    assert len(jax.tree.leaves(left)) == CFG.n_layers
    state = tx.stack_layers(state) if scan else state
    losses = []
    for rates in ((0.0, 0.0), (0.5, 0.25)):
        step = jax.jit(tx.make_train_step(model, optimizer, balance_rate=rates[0], router_z_rate=rates[1]))
        losses.append(step(state, batch)[1].loss)
    np.testing.assert_allclose(losses[1] - losses[0], (0.5 * total[0] + 0.25 * total[1]) / 13, rtol=1e-4)


def test_first_choices_come_before_second_ones():
    logits = jnp.log(jnp.array([[[0.6, 0.4], [0.3, 0.7], [0.9, 0.1]]]))
    found = route(logits, jnp.array([[True, True, False]]), 2)
    np.testing.assert_array_equal(found.expert[0, :2], [[0, 1], [1, 0]])
    np.testing.assert_array_equal(found.rank[0, :2], [[0, 1], [0, 1]])
    np.testing.assert_allclose(found.weight[0, :2], [[0.6, 0.4], [0.7, 0.3]], rtol=1e-6)
    np.testing.assert_array_equal(found.expert[0, 2], [2, 2])  # no token: nobody's


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_experts_per_token": 5}, r"^n_experts_per_token=5 exceeds n_experts=4; lower it$"),
        (
            {"biases": "all"},
            r"^biases='all' has some in the feed-forward, and experts have none; use none, n",
        ),
        ({"mup_base_width": 3}, r"^mup_base_width=3 says nothing of n_experts=4; leave one of them out$"),
        ({"capacity_factor": 0.0}, r"^capacity_factor=0.0 must be positive; 1.25 is usual, and None drops no token$"),
    ],
)
def test_numbers_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        dataclasses.replace(CFG, **changes)


def test_a_mesh_has_whole_experts():
    mesh = tx.make_mesh(MeshConfig(expert=8))
    with pytest.raises(InputError, match=r"^mesh\.expert=8 must divide model\.n_experts=4; use 1, 2, 4$"):
        check_mesh(mesh, CFG)
    with pytest.raises(
        InputError, match=r"^mesh\.expert=8 must divide model\.n_experts=None; give --model\.n-experts 8"
    ):
        check_mesh(mesh, dataclasses.replace(CFG, n_experts=None))
